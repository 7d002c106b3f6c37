"""Pages of the site that are made when it is built: the reference of modules, and of the options of commands."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
PACKAGE = "diffusers_dod"
sys.path.insert(0, str(ROOT / "src"))

from diffusers_dod.options import OptionField, _list_fields  # noqa: E402
from diffusers_dod_command import COMMANDS  # noqa: E402


FOLDERS = {  # of the package -> heading in the menu
    "": "Models, pipeline, scheduler",
    "data": "Images and latents",
    "metrics": "Metrics",
    "training": "Training",
    "evaluation": "Evaluation",
}


def _list_modules() -> dict[str, list[str]]:
    """Heading -> modules of its folder, by their dotted names."""
    package = ROOT / "src" / PACKAGE
    found: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        folder = path.parent.relative_to(package).parts
        if path.stem in ("__init__", "__main__") or path.stem.startswith("_") or "shipped" in folder:
            continue
        heading = FOLDERS.get("/".join(folder), folder[0].capitalize() if folder else "")
        found.setdefault(heading, []).append(".".join([PACKAGE, *folder, path.stem]))
    return found


# ------------------------------------------------------------------------------------------------ options of commands


class _Kind(Exception):
    """Raised in place of parsing, with the dataclass of options."""


def find_options(command: str) -> type | None:
    """
    Finds the dataclass of a command's options.

    Args:
        command (`str`): Name of the command.

    Returns:
        `type`, or `None` if the command does without, or needs packages that are not there.
    """
    try:
        module = importlib.import_module(f"{PACKAGE}.{COMMANDS[command][0]}")
    except ModuleNotFoundError:  # an optional package
        return None
    parse = getattr(module, "parse_options", None)
    if parse is None:
        return None

    def stop(kind: type, *args: Any, **kwargs: Any) -> None:
        raise _Kind(kind)

    module.parse_options = stop
    try:
        module.main([])
    except _Kind as found:
        return found.args[0]
    finally:
        module.parse_options = parse
    return None


def _describe_values(field: OptionField) -> str:
    option = field.option
    if field.type is bool:
        return "flag"
    if option.choices is not None:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    ends = [
        f"{sign} {f'2^{value.bit_length() - 1}' if isinstance(value, int) and value > 2**40 else value}"
        for sign, value in (("≥", option.at_least), (">", option.above), ("≤", option.at_most), ("<", option.below))
        if value is not None
    ]
    name = {int: "integer", float: "number", str: "text", Path: "path"}.get(field.type, field.type.__name__)
    several = {type(None): "", int: f", {field.nargs} of them", str: ", several"}[type(field.nargs)]
    return f"{name} {' and '.join(ends)}".strip() + several


def _describe_default(field: OptionField) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return f"`{' '.join(map(str, values))}`"


def _format_group(kind: type, level: int) -> list[str]:
    parts = list(_list_fields(kind))
    lines = []
    fields = [part for _, part in parts if isinstance(part, OptionField)]
    if fields:
        lines += ["| option | values | default | |", "|---|---|---|---|"]
    for field in fields:
        names = [field.name, *field.option.aliases]
        shown = [f"`{'-' if len(name) == 1 else '--'}{name}`" for name in names]
        name = f"`{field.name}`" if field.option.is_positional else ", ".join(shown)
        text = field.option.help.replace("|", "\\|")
        lines.append(f"| {name} | {_describe_values(field)} | {_describe_default(field)} | {text} |")
    for _, part in parts:
        if not isinstance(part, OptionField):
            title = (part.__doc__ or "").strip().partition("\n")[0].rstrip(".")
            lines += ["", f"{'#' * level} {title}", "", *_format_group(part, level + 1)]
    return lines


def format_command(command: str) -> str:
    """
    Writes the page of a command: what it does, and a table of its options out of their dataclass.

    Args:
        command (`str`): Name of the command.

    Returns:
        `str`: The page in Markdown.
    """
    module, text = COMMANDS[command]
    lines = [f"# dod {command}", "", text, "", f"The same as `python -m {PACKAGE}.{module}`.", ""]
    kind = find_options(command)
    if kind is None:
        lines.append(f"`dod {command} --help` shows its arguments.")
    else:
        lines += _format_group(kind, 2)
        lines += ["", "Every option that is a flag has a `--no-` form. `--debug` shows the traceback of an error."]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- hooks of MkDocs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages that are made to the menu, and to the guides those that it does not name."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    guides += sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named)
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"Options": [{f"dod {name}": f"reference/options/{name}.md"} for name in COMMANDS]})
    api: list[Any] = [{"Public names": "reference/api/index.md"}]
    for heading, modules in _list_modules().items():
        prefix = len(PACKAGE) + 1
        api.append({heading: [{name[prefix:]: f"reference/api/{name[prefix:]}.md"} for name in modules]})
    config.nav.append({"API": api})
    return config


def _first_line(module: Any, name: str) -> str:
    return (getattr(module, name).__doc__ or "").strip().partition("\n")[0]


def _format_public_names() -> str:
    package = importlib.import_module(PACKAGE)
    lines = [
        "# Public names",
        "",
        f"`from {PACKAGE} import ...` has these names. The other pages list all modules.",
        "",
    ]
    lines += ["| name | |", "|---|---|"]
    for name in package.__all__:
        member = getattr(package, name)
        if member.__module__.startswith(PACKAGE):
            text = re.sub(r"\[(`[^`]+`)\]", r"\1", _first_line(package, name)).replace("|", "\\|")
            lines.append(f"| [`{name}`][{member.__module__}.{name}] | {text} |")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made to those that are written."""
    pages = {"reference/api/index.md": _format_public_names()}
    pages |= {f"reference/options/{name}.md": format_command(name) for name in COMMANDS}
    for modules in _list_modules().values():
        for name in modules:
            title = name[len(PACKAGE) + 1 :]
            pages[f"reference/api/{title}.md"] = f"# {title.replace('_', chr(92) + '_')}\n\n::: {name}\n"
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository that are no pages lead to the project's home."""
    return re.sub(r"\]\(\.\./(?!\.)([^)]*)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)
