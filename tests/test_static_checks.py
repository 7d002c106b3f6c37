"""`make check` refuses pickles and what reads or runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PYTHON = ["import pickle", "import torch\n\n\ntorch.load('a', weights_only=True)", "eval(input())", "import dill"]


def check(code: str) -> str:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--output-format",
        "concise",
        "--stdin-filename",
        "src/a.py",
        "-",
    ]
    return subprocess.run(command, input=f"{code}\n", capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_code_that_reads_pickles_is_refused(code):
    assert re.search(r"TID251|S\d{3}", check(code))


def test_other_code_is_not():
    assert "All checks passed" in check("import torch\n\n\nprint(torch.ones(1))")


def test_arguments_that_allow_pickles_are_refused():
    pattern = re.search(r'grep -rnE --include=\*\.py "(.*)"', (ROOT / "Makefile").read_text())[1]
    for argument in ("weights_only=False", "weights_only = False", "allow_pickle=True"):
        assert re.search(pattern, f"load(file, {argument})")
