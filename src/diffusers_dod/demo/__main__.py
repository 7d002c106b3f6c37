# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Start of the command `python -m diffusers_dod.demo`."""

from ..command_line import run_main
from . import main


if __name__ == "__main__":
    run_main(main)
