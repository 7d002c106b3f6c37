"""
No call passes more than five arguments by position: two neighbours of one type could change places unnoticed. Beyond
`options.py` the arguments of commands are dataclasses.
"""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "training", "benchmarks", "examples")
MAXIMUM = 5
# Functions of any number of arguments of one kind, and the recomputation that passes on what blocks take.
EXCEPTIONS = {"reshape", "permute", "stateless_noise", "_gradient_checkpointing_func"}


def find_long_calls(code: str) -> list[str]:
    """Line and function of each call in `code` with too many arguments by position."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and len(node.args) > MAXIMUM]
    names = {
        node: node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func) for node in calls
    }
    return [f"{node.lineno}: {name}" for node, name in names.items() if name not in EXCEPTIONS]


def test_no_call_has_more_than_five_arguments_by_position():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 80
    assert [f"{path.relative_to(ROOT)}:{call}" for path in files for call in find_long_calls(path.read_text())] == []


def test_arguments_of_commands_are_parsed_in_one_place():
    files = sorted((ROOT / "src").rglob("*.py"))
    imports = re.compile(r"^\s*(import|from) argparse", re.MULTILINE)
    assert [path.name for path in files if imports.search(path.read_text())] == ["options.py"]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("f(1, 2, 3, 4, 5)", []),
        ("f(1, 2, 3, 4, 5, six=6)", []),
        ("f(1, 2, 3, 4, 5, 6)", ["1: f"]),
        ("x = 1\nclass A(B):\n    def g(self):\n        return self.f(*a, 1, 2, 3, 4, 5)", ["4: f"]),
        ("tensor.reshape(1, 2, 3, 4, 5, 6)", []),
    ],
)
def test_long_calls_are_found(code, found):
    assert find_long_calls(code) == found
