"""python training/train_dod.py --help  (the trainer itself: diffusers_dod.training.train)"""

import os
from functools import partial


if __name__ == "__main__":
    launcher = os.getppid()  # before imports that take seconds, in which it may end
    from diffusers_dod.command_line import run_main
    from diffusers_dod.training.train import main

    run_main(partial(main, launcher=launcher))
