"""accelerate launch training/train_dod.py --help  (the trainer itself: diffusers_dod.training.train)"""

from diffusers_dod.command_line import run_main
from diffusers_dod.training.train import main


if __name__ == "__main__":
    run_main(main)
