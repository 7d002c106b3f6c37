"""
Imports go down only: the library at the bottom, `data` and `metrics` side by side on it, options of training and cards
on these, then training and evaluation side by side, and the demo on the latter.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "diffusers_dod"
# Floor -> the floors beneath it.
BENEATH = {
    "library": set(),
    "data": {"library"},
    "metrics": {"library"},
    "training_options": {"library", "data"},
    "cards": {"library", "data", "metrics", "training_options"},
    "training": {"library", "data", "metrics", "training_options", "cards"},
    "evaluation": {"library", "data", "metrics"},
    "demo": {"library", "data", "evaluation"},
}


def find_modules(package: Path) -> dict[str, ast.Module]:
    """The modules of a package by their dotted names in it, a package by its own: `""`, `data`, `data.latents`, ..."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")}
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): ast.parse(path.read_text())
        for path, parts in names.items()
    }


def find_imports(name: str, modules: dict[str, ast.Module], packages: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in its code."""
    for node in ast.walk(modules[name]):
        if isinstance(node, ast.Import):
            imported = [alias.name.removeprefix(f"{PACKAGE.name}.") for alias in node.names]
            yield from (module for module in imported if module in modules)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = [*name.split("."), "__init__"] if name in packages else name.split(".")
                base = [*parts[: -node.level], *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                base = node.module.split(".")[1:]
            else:
                continue
            module = ".".join(part for part in base if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield inner if inner in modules else module


def floor_of(module: str) -> str:
    floor = module.split(".")[0]
    return floor if floor in BENEATH else "library"


def find_faults(package: Path) -> list[str]:
    """Arrows that run up or across, a circle, and imports for annotations only."""
    modules = find_modules(package)
    packages = {"", *(path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py"))} - {"."}
    arrows = {name: set(find_imports(name, modules, packages)) for name in modules}
    faults = [
        f"{name} imports {imported}"
        for name in sorted(arrows)
        for imported in sorted(arrows[name])
        if floor_of(imported) not in {floor_of(name)} | BENEATH[floor_of(name)]
    ]
    faults += [
        f"{name} has TYPE_CHECKING"
        for name, tree in sorted(modules.items())
        if any(isinstance(node, ast.alias) and node.name == "TYPE_CHECKING" for node in ast.walk(tree))
        or any(isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING" for node in ast.walk(tree))
    ]
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        faults.append(f"circle: {' -> '.join(error.args[1])}")
    return faults


def test_imports_go_down_only():
    assert find_faults(PACKAGE) == []


def test_the_floors_are_there():
    assert {floor_of(module) for module in find_modules(PACKAGE)} == set(BENEATH)


@pytest.mark.parametrize(
    "files, fault",
    [
        ({"checks": "from .data import images"}, "checks imports data.images"),
        (
            {"training/train": "def f():\n    from ..evaluation.images import open"},
            "training.train imports evaluation",
        ),
        ({"evaluation/images": "import diffusers_dod.training.train"}, "evaluation.images imports training.train"),
        ({"data/images": "from diffusers_dod.metrics.table import METRICS"}, "data.images imports metrics.table"),
        ({"checks": "from . import files", "files": "from .checks import check"}, "circle: "),
        ({"checks": "from typing import TYPE_CHECKING"}, "checks has TYPE_CHECKING"),
        ({"evaluation/images": "from ..training.checkpoints import S"}, "evaluation.images imports training.check"),
        ({"training/train": "from . import train_state", "training/train_state": "from .. import checks"}, None),
    ],
)
def test_faults_are_found(tmp_path, files, fault):
    modules = ["training/train", "training/checkpoints", "evaluation/images", "metrics/table", "data/images", "checks"]
    for name in [*modules, *files]:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(files.get(name, ""))
    found = find_faults(tmp_path)
    assert found == [] if fault is None else len(found) == 1 and found[0].startswith(fault)
