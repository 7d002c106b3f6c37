# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Start of a command: its errors are one block of lines, with exit code 2."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import distributed

from .checks import hide_secrets
from .options import DEBUG
from .processes import OtherProcessError, describe_error


ERROR_EXIT_CODE = 2  # that of argparse
INTERRUPTED_EXIT_CODE = 130  # 128 + 2: the status that shells report for a process that SIGINT has ended
# What the library, its files and its machine are expected to raise. All else keeps its traceback: a run of days cannot
# be repeated to see it.
EXPECTED_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    torch.OutOfMemoryError,
    OtherProcessError,
)


def run_main(main: Callable[[], None]) -> None:
    """
    Runs a command as a process of its own: an expected error is one block of lines on stderr, with exit code 2.

    Of several processes only the first one that fails says why. `--debug` among the arguments of the process shows the
    traceback, too. Any other error has its traceback and exit code 1 in any case. A warning of this package is one
    line in the same form; with `--debug` it has its place in the code, as those of other packages have.

    Args:
        main (`Callable`): The command. It reads its arguments from `sys.argv`.
    """
    shows_traceback = DEBUG in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != DEBUG]
    show_warning = warnings.showwarning
    if not shows_traceback:
        warnings.showwarning = _show_warning
    try:
        main()
    except KeyboardInterrupt:
        if shows_traceback:
            traceback.print_exc()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except EXPECTED_ERRORS as error:
        if shows_traceback:
            traceback.print_exc()
        elif _is_first_to_fail():
            text = hide_secrets(describe_error(error))
            print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
        sys.exit(ERROR_EXIT_CODE)
    finally:
        warnings.showwarning = show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """As Python shows warnings, but those of this package without the line of code that gives them."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        text = f"{os.path.basename(sys.argv[0])}: warning: {hide_secrets(str(message))}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def _is_first_to_fail() -> bool:
    """Whether no other process of the group, if there is one, has asked this before."""
    if not distributed.is_initialized():
        return True
    try:
        return distributed.distributed_c10d._get_default_store().add("diffusers_dod/failures", 1) == 1
    except RuntimeError:  # the process that has the store is gone
        return True
