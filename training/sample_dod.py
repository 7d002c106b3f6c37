"""accelerate launch training/sample_dod.py --help  (the sampler itself: diffusers_dod.evaluation.sample)"""

from diffusers_dod.command_line import run_main
from diffusers_dod.evaluation.sample import main


if __name__ == "__main__":
    run_main(main)
