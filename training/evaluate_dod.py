"""python training/evaluate_dod.py --help  (the command itself: diffusers_dod.evaluation.evaluate)"""

from diffusers_dod.command_line import run_main
from diffusers_dod.evaluation.evaluate import main


if __name__ == "__main__":
    run_main(main)
