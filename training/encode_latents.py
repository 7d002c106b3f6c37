"""accelerate launch training/encode_latents.py --help  (the command itself: diffusers_dod.training.encode_latents)"""

from diffusers_dod.command_line import run_main
from diffusers_dod.training.encode_latents import main


if __name__ == "__main__":
    run_main(main)
