"""Every public name is documented with all that it takes, and `make docs` makes pages of it."""

import ast
import builtins
import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

import diffusers_dod


ROOT = Path(__file__).parents[1]
SECTIONS = ["Args", "Returns", "Raises", "Examples"]

# name (`type`, *optional*, defaults to `x`): Text, or `kwargs: Text` for what is passed on.
ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?: \((?P<type>.+?)\))?:(?:\s+(?P<text>.*))?")
OPTIONAL = ", *optional*"
DEFAULT = re.compile(r", defaults to (`?)(?P<value>.+)\1$")
LINK_OR_CODE = r"\[?`[^`]+`\]?"


def find_public_modules():
    names = [module.name for module in pkgutil.walk_packages(diffusers_dod.__path__, "diffusers_dod.")]
    return [importlib.import_module(name) for name in ["diffusers_dod", *names] if "._" not in name]


def find_public_members(owner, module):
    """The functions, classes and properties that `module` itself defines in `owner`: itself or one of its classes."""
    for name, member in vars(owner).items():
        if not isinstance(member, property):
            member = getattr(owner, name)
        is_public = not name.startswith("_") or name == "__call__"
        function = member.fget if isinstance(member, property) else member
        is_documented = inspect.isroutine(function) or inspect.isclass(function)
        if not is_public or not is_documented or function.__module__ != module.__name__:
            continue
        if inspect.isclass(owner) and inspect.isfunction(member) and not member.__doc__ and inspect.getdoc(member):
            continue  # the class that it is inherited from says what it does
        yield member
        if inspect.isclass(member):
            yield from find_public_members(member, module)


def find_parameters(member):
    """Name -> parameter, `self` left out; a class has those of its own `__init__`."""
    if isinstance(member, property):
        return {}
    if not inspect.isclass(member):
        parameters = inspect.signature(member).parameters
        return {name: parameter for name, parameter in parameters.items() if name != "self"}
    if "__init__" not in vars(member):
        return {}
    function = member.__init__
    if "__signature__" in vars(function):  # what `DoDPipeline` shows Diffusers is without some of its defaults
        code, closure = function.__code__, function.__closure__
        function = types.FunctionType(code, function.__globals__, argdefs=function.__defaults__, closure=closure)
    parameters = dict(list(inspect.signature(function).parameters.items())[1:])
    for field in dataclasses.fields(member) if dataclasses.is_dataclass(member) else ():
        if field.default_factory is not dataclasses.MISSING:
            parameters[field.name] = parameters[field.name].replace(default=field.default_factory())
    return parameters


def qualname(member):
    return member.fget.__qualname__ if isinstance(member, property) else member.__qualname__


def parse_sections(docstring):
    """Section -> its text without indentation, in order; the text before the first one is under ""."""
    parts = re.split(r"^([A-Z][A-Za-z ]+):\n(?= )", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0]} | {
        name: textwrap.dedent(text).strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def parse_entries(section):
    """The entries of a section as single lines."""
    return [" ".join(entry.split()) for entry in re.split(r"\n(?=\S)", section)]


def parse_args(docstring):
    """Name -> match of its entry in the section `Args:`."""
    entries = {}
    for entry in parse_entries(parse_sections(docstring).get("Args", "")):
        match = ENTRY.fullmatch(entry)
        if entry and match is None:
            raise ValueError(f"not of the form name (`type`): text: {entry}")
        for name in match["names"].split(", ") if match else ():
            if name in entries:
                raise ValueError(f"documented twice: {name}")
            entries[name] = match
    return entries


def find_raised(member):
    """Names of the built-in exceptions that the member's own code raises."""
    if inspect.isclass(member):
        member = vars(member).get("__init__")
    function = inspect.unwrap(member) if callable(member) else None
    if function is None or not inspect.getsourcefile(function).startswith(str(ROOT)):
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [
        node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return {name.id for name in raised if isinstance(name, ast.Name) and hasattr(builtins, name.id)}


MODULES = find_public_modules()
MEMBERS = {
    f"{module.__name__}.{qualname(member)}": member
    for module in MODULES
    for member in find_public_members(module, module)
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_module_says_what_it_is(module):
    assert module.__doc__


@pytest.mark.parametrize("name", MEMBERS)
def test_all_parameters_are_documented_and_no_others(name):
    """In a section `Args:`, or in backticks in the text of a docstring that has none."""
    docstring, parameters = MEMBERS[name].__doc__, find_parameters(MEMBERS[name])
    assert docstring
    if "Args" in parse_sections(docstring):
        assert list(parse_args(docstring)) == list(parameters)
    else:
        assert [parameter for parameter in parameters if f"`{parameter}`" not in docstring] == []


@pytest.mark.parametrize("name", MEMBERS)
def test_types_and_defaults_are_those_of_the_signature(name):
    parameters = find_parameters(MEMBERS[name])
    for parameter_name, entry in parse_args(MEMBERS[name].__doc__).items():
        parameter = parameters[parameter_name]
        if parameter.kind is parameter.VAR_KEYWORD or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        assert re.match(LINK_OR_CODE, entry["type"])
        assert (OPTIONAL in entry["type"]) == (parameter.default is None)
        default = DEFAULT.search(entry["type"])
        assert (default is not None) == (parameter.default not in (None, parameter.empty))
        if default is not None:
            names = vars(sys.modules[MEMBERS[name].__module__])  # for `math.inf`
            assert repr(eval(default["value"], names)) == repr(parameter.default)


@pytest.mark.parametrize("name", MEMBERS)
def test_sections_have_one_form(name):
    sections = parse_sections(MEMBERS[name].__doc__)
    names = [section for section in sections if section]
    assert names == sorted(names, key=SECTIONS.index)
    for entry in parse_args(MEMBERS[name].__doc__).values():
        assert re.match(r"[^a-z].*\.$", entry["text"])
    if "Returns" in sections:
        assert re.match(LINK_OR_CODE + r"(\.|, | of | with |: [^a-z])", sections["Returns"])
    for entry in parse_entries(sections["Raises"]) if "Raises" in sections else ():
        exceptions = re.fullmatch(r"(`\w+`(?:, `\w+`)*): (?![A-Z][a-z]).*\.", entry)[1]
        assert all(issubclass(getattr(builtins, kind.strip("`")), Exception) for kind in exceptions.split(", "))


@pytest.mark.parametrize("name", MEMBERS)
def test_what_is_raised_is_documented(name):
    assert [kind for kind in find_raised(MEMBERS[name]) if f"`{kind}`" not in MEMBERS[name].__doc__] == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Module -> id -> HTML, out of what `make docs` runs."""
    folder = tmp_path_factory.mktemp("docs")
    recipe = re.search(r"^docs: install\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = recipe.replace("$(BIN)/python", sys.executable).replace("outputs/docs", str(folder))
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "/pdoc/" not in result.stderr  # its warnings name its own files
    pages = {}
    for module in MODULES:
        html = (folder / (module.__name__.replace(".", "/") + ".html")).read_text()
        parts = re.split(r'<(?:section|div|dd) id="([^"]+)"', html)
        pages[module.__name__] = dict(zip(parts[1::2], parts[2::2], strict=True))
    return pages


@pytest.mark.slow
def test_the_pages_show_every_public_name_and_its_arguments(pages):
    for name, member in MEMBERS.items():
        module = name.removesuffix(f".{qualname(member)}")
        html = pages[module][qualname(member)]
        assert 'class="docstring"' in html, name
        for entry in parse_args(member.__doc__).values():
            assert re.search(rf"<li><strong>{entry['names']}(?: \(|:)", html), f"{name}: {entry['names']}"


@pytest.mark.slow
def test_the_package_page_shows_what_the_package_exports(pages):
    page = pages["diffusers_dod"]
    assert [name for name in diffusers_dod.__all__ if 'class="docstring"' not in page.get(name, "")] == []
