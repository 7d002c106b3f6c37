# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Exports a pipeline together with its code, for people who have Diffusers but not this package:

    python -m diffusers_dod.remote_code checkpoints/dod-desk outputs/dod-desk-remote
    hf upload user/dod-desk outputs/dod-desk-remote

    DiffusionPipeline.from_pretrained("user/dod-desk", trust_remote_code=True)

Each class gets one self-contained file, made from the sources of this package. Definitions that the class needs from
other modules come first, and imports are merged. So no code is written twice by hand.
"""

import ast
import importlib
import inspect
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download

from .command_line import run_main
from .files import replacing
from .latent_embedding import LatentEmbeddingModule, VisualPriorMixin, find_visual_prior_class
from .options import option, parse_options
from .pipeline_dod import DoDPipeline
from .records import read_record
from .scheduling_dod import DoDFlowMatchScheduler
from .shipped import find_shipped
from .token_prior import TokenPrior
from .transformer_dod import DoDTransformer2DModel


COMPONENT_CLASSES = {
    cls.__name__: cls for cls in (DoDTransformer2DModel, LatentEmbeddingModule, TokenPrior, DoDFlowMatchScheduler)
}
# The classes that the pipeline's code only names in annotations.
STAND_INS = {
    DoDTransformer2DModel.__name__: ModelMixin,
    VisualPriorMixin.__name__: ModelMixin,
    TokenPrior.__name__: ModelMixin,
    DoDFlowMatchScheduler.__name__: SchedulerMixin,
}
PACKAGE = __package__
CARD = "README.md"


@dataclass(frozen=True)
class _Statement:
    """A top-level statement, the comments above it, the names it defines and the names it mentions."""

    source: str
    defines: frozenset[str]
    mentions: frozenset[str]


@dataclass(frozen=True)
class _Module:
    docstring: str
    statements: list[_Statement]
    relative_imports: dict[str, list[str]]  # module of this package -> names
    absolute_imports: dict[str, tuple[str, str]]  # name in the module -> (imported module or "", what is imported)
    other_imports: frozenset[str] = frozenset()  # names that cannot be put into the same file

    def find_needed(self, name: str) -> "_Module":
        """Finds the statements and imports of this module that `name` needs."""
        needed, kept = {name}, []
        while found := [s for s in self.statements if s not in kept and s.defines & needed]:
            kept += found
            needed |= set().union(*(statement.mentions for statement in found))
        if unknown := sorted(needed & self.other_imports):
            raise ValueError(
                f"`{name}` must need nothing but what is in its own file, in the modules right in {PACKAGE} and in "
                f"other libraries, got {', '.join(unknown)}."
            )
        relative = {module: [n for n in names if n in needed] for module, names in self.relative_imports.items()}
        return _Module(
            self.docstring,
            [statement for statement in self.statements if statement in kept],
            {module: names for module, names in relative.items() if names},
            self.absolute_imports,
        )


def _module_of(package_module: str, name: str) -> str | None:
    """Finds the module directly in this package that `from package_module import name` imports from, if any."""
    origin = package_module
    if package_module == PACKAGE:
        origin = getattr(getattr(importlib.import_module(PACKAGE), name, None), "__module__", PACKAGE)
    return origin.removeprefix(f"{PACKAGE}.") if origin.count(".") == 1 and origin.startswith(PACKAGE) else None


def _parse(file: Path) -> _Module:
    is_ours = file.parent == Path(__file__).parent
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree, clean=False)
    statements: list[_Statement] = []
    relative: dict[str, list[str]] = {}
    absolute: dict[str, tuple[str, str]] = {}
    others: set[str] = set()
    end = 0
    for node in tree.body:
        start, end = end, node.end_lineno
        if isinstance(node, ast.ImportFrom) and node.level and is_ours:
            relative.setdefault(node.module, []).extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.partition(".")[0] == PACKAGE):
            for alias in node.names:
                module = None if node.level or alias.asname else _module_of(node.module, alias.name)
                if module is None:
                    others.add(alias.asname or alias.name)
                else:
                    relative.setdefault(module, []).append(alias.name)
        elif isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE for alias in node.names):
            others.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                renamed = f" as {alias.asname}" if alias.asname else ""
                name_here = alias.asname or alias.name.split(".")[0]
                absolute[name_here] = (getattr(node, "module", ""), alias.name + renamed)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # the docstring
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            defines = {getattr(target, "name", getattr(target, "id", None)) for target in targets} - {None}
            mentions = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
            text = "".join(lines[start:end]).strip("\n")
            statements.append(_Statement(text, frozenset(defines), frozenset(mentions)))
    return _Module(docstring, statements, relative, absolute, frozenset(others))


def self_contained_source(cls: type, stand_ins: dict[str, type] | None = None) -> str:
    """
    Makes one file of a class and of everything that it needs from its module and from this package.

    Args:
        cls (`type`): A class of this package, with all of its module; or an encoder of visual priors.
        stand_ins (`dict[str, type]`, *optional*):
            Names of classes that occur in annotations only -> the class of Diffusers to name instead.

    Returns:
        `str`: Python source that imports nothing of this package.

    Raises:
        `ValueError`: the class is in no file, or needs code that cannot be put into the same file.
    """
    stand_ins = stand_ins or {}
    try:
        file = Path(inspect.getsourcefile(cls))
    except (OSError, TypeError) as error:
        raise ValueError(f"`{cls.__name__}` must be defined in a file: {error}") from error
    module_name = file.stem
    entry = _parse(file)
    is_ours = file.parent == Path(__file__).parent
    if not is_ours:
        entry = entry.find_needed(cls.__name__)
    modules: dict[str, _Module] = {}

    def visit(name: str, module: _Module) -> None:  # what a module needs comes before it
        for needed, names in module.relative_imports.items():
            if needed not in modules and not set(names) <= set(stand_ins):
                visit(needed, _parse(Path(__file__).with_name(f"{needed}.py")))
        modules[name] = module

    visit(module_name, entry)

    needed_names = set().union(*(statement.mentions for statement in entry.statements))
    kept = {id(statement) for statement in entry.statements}
    others = [statement for name, module in modules.items() if name != module_name for statement in module.statements]
    while found := [s for s in others if id(s) not in kept and s.defines & (needed_names - set(stand_ins))]:
        for statement in found:
            kept.add(id(statement))
            needed_names |= statement.mentions
    statements = [s for module in modules.values() for s in module.statements if id(s) in kept]
    defined = [name for statement in statements for name in statement.defines]
    if twice := sorted({name for name in defined if defined.count(name) > 1}):
        raise ValueError(f"`{cls.__name__}` must not define names of {PACKAGE} that it needs, got {', '.join(twice)}.")

    imported: dict[str, set[str]] = {}
    for module in modules.values():
        mentioned = set().union(*(s.mentions for s in module.statements if id(s) in kept))
        for name, (origin, what) in module.absolute_imports.items():
            if name in mentioned:
                imported.setdefault(origin, set()).add(what)
    used_stand_ins = {name: cls for name, cls in stand_ins.items() if name in needed_names}
    for cls in used_stand_ins.values():
        imported.setdefault("diffusers", set()).add(cls.__name__)
    header = [
        f"# {'Copyright' if is_ours else 'Parts are copyright'} 2026 The diffusers_dod authors. "
        "Licensed under the Apache License, Version 2.0.",
        f"# Written by `python -m {PACKAGE}.remote_code` from "
        f"{'the sources of that package' if is_ours else f'{file.name} and that package'}: change them there.",
        *([f'"""{entry.docstring}"""'] if entry.docstring else []),
        "",
        *(f"import {what}" for what in sorted(imported.pop("", ()))),
        *(f"from {origin} import {', '.join(sorted(names))}" for origin, names in sorted(imported.items())),
        "",
    ]
    if used_stand_ins:
        header += ["# Named in annotations only; the classes themselves are in the folders of the components."]
        header += [f"{name} = {cls.__name__}" for name, cls in used_stand_ins.items()]
    return "\n".join(header) + "\n\n\n" + "\n\n\n".join(statement.source for statement in statements) + "\n"


def _find_component_classes(source: Path, index: dict) -> dict[str, type]:
    """Finds the class of each component that needs its code: of this package, or a custom encoder of priors."""
    classes = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or name == "_class_name":
            continue
        if entry[0] == PACKAGE:
            if entry[1] not in COMPONENT_CLASSES or not (source / name).is_dir():
                raise ValueError(
                    f"`pretrained_model_name_or_path` must have a folder `{name}` with one of "
                    f"{', '.join(COMPONENT_CLASSES)}, got {entry[1]} in {sorted(p.name for p in source.iterdir())}."
                )
            classes[name] = COMPONENT_CLASSES[entry[1]]
        elif name == "latent_embedder":
            classes[name] = find_visual_prior_class(entry[1])
    return classes


def export_remote_code(pretrained_model_name_or_path: str | Path, output_dir: str | Path) -> Path:
    """
    Copies a saved pipeline and its card with the code of its classes, so that `trust_remote_code=True` loads it.

    Args:
        pretrained_model_name_or_path (`str` or `Path`): Folder or Hub repository of a saved [`DoDPipeline`].
        output_dir (`str` or `Path`): A folder that is empty or does not exist yet.

    Returns:
        `Path`: `output_dir`.

    Raises:
        `OSError`: there is no such folder or repository.
        `ValueError`: the source is not a `DoDPipeline` of this package, `output_dir` is not empty or within the
            source, or the class of the latent embedder has not been imported or does not fit into one file.
    """
    source, output_dir = Path(find_shipped(os.fspath(pretrained_model_name_or_path))), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` must be empty or not exist yet, got {str(output_dir)!r}.")
    if output_dir.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"`output_dir` must not be in the exported folder {str(source)!r}, got {str(output_dir)!r}.")
    if not source.is_dir():
        try:
            source = Path(snapshot_download(str(pretrained_model_name_or_path)))
        except (OSError, ValueError) as error:
            raise OSError(
                "`pretrained_model_name_or_path` must be a folder or a repository on the Hub, "
                f"got {str(pretrained_model_name_or_path)!r}, which is no folder here: {error}"
            ) from error
    index_file = source / DoDPipeline.config_name
    index = read_record(index_file, dict[str, Any]) if index_file.is_file() else {}
    if index.get("_class_name") != DoDPipeline.__name__:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold a saved `{DoDPipeline.__name__}`, "
            f"got {str(pretrained_model_name_or_path)!r} of class {index.get('_class_name')!r}."
        )
    classes = _find_component_classes(source, index)
    sources = {name: self_contained_source(cls) for name, cls in classes.items()}

    components = [name for name, entry in index.items() if isinstance(entry, list) and (source / name).is_dir()]
    with replacing(output_dir) as folder:
        folder.mkdir()
        for name in components:
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns(".*"))
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, folder / CARD)
        for name, cls in classes.items():
            module_name = Path(inspect.getsourcefile(cls)).stem
            (folder / name / f"{module_name}.py").write_text(sources[name], encoding="utf-8")
            index[name] = [module_name, cls.__name__]
        code = self_contained_source(DoDPipeline, STAND_INS)
        (folder / "pipeline.py").write_text(code, encoding="utf-8")
        index["_class_name"] = ["pipeline", DoDPipeline.__name__]
        (folder / DoDPipeline.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return output_dir


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of the command."""

    pretrained_model_name_or_path: str = option(
        is_positional=True, help="Folder of a saved pipeline or a repository on the Hub."
    )
    output_dir: Path = option(is_positional=True, help="Folder that is empty or does not exist yet.")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(ExportOptions, argv, __doc__)
    output_dir = export_remote_code(options.pretrained_model_name_or_path, options.output_dir)
    print(f'{output_dir}: load it with DiffusionPipeline.from_pretrained("{output_dir}", trust_remote_code=True)')


if __name__ == "__main__":
    run_main(main)
