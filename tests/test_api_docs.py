"""Every public name is documented with all that it takes; `tests/test_site.py` has the pages that are made of it."""

import ast
import builtins
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
import types
from pathlib import Path

from helpers import assert_none

import diffusers_dod


ROOT = Path(__file__).parents[1]
SECTIONS = ["Args", "Returns", "Raises", "Examples"]

# name (`type`, *optional*, defaults to `x`): Text, or `kwargs: Text` for what is passed on.
ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?: \((?P<type>.+?)\))?:(?:\s+(?P<text>.*))?")
OPTIONAL = ", *optional*"
DEFAULT = re.compile(r", defaults to (`?)(?P<value>.+)\1$")
LINK_OR_CODE = r"\[?`[^`]+`\]?"

# A text of a docstring is also shown without the one before it: it must not open with a word that refers to that.
RIDDLE = re.compile(r"(Of|Both|Its?|Those|That of|Likewise|See there|What\b.*\bdid cost)\b")
# Names that only their docstrings explained. `run` is one for the position of a stage among those that are run.
UNCLEAR = re.compile(r"whole|together|barren|\w*replica\w*")


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


def is_options(member):
    """Whether a class is of options, whose fields say in `--help` what they are."""
    return dataclasses.is_dataclass(member) and any("option" in field.metadata for field in dataclasses.fields(member))


def find_parameters(member):
    """Name -> parameter, `self` left out; a class has those of its own `__init__`."""
    if isinstance(member, property):
        return {}
    if not inspect.isclass(member):
        parameters = inspect.signature(member).parameters
        return {name: parameter for name, parameter in parameters.items() if name != "self"}
    if "__init__" not in vars(member) or is_options(member):
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
    """Pairs of a name and the match of its entry in the section `Args:`; an entry of another form is left out."""
    matches = map(ENTRY.fullmatch, parse_entries(parse_sections(docstring).get("Args", "")))
    return [(name, match) for match in matches if match for name in match["names"].split(", ")]


def find_raised(member):
    """Names of the built-in exceptions that the member's own code raises."""
    if inspect.isclass(member):
        member = vars(member).get("__init__")
    function = inspect.unwrap(member) if callable(member) else None
    if function is None or not inspect.getsourcefile(function).startswith(str(Path(diffusers_dod.__file__).parent)):
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


def check_members(rule):
    """Fails with what `rule` yields of each public member that has a docstring, all in one list."""
    documented = {name: member for name, member in MEMBERS.items() if member.__doc__}
    assert_none(f"{name}: {violation}" for name, member in documented.items() for violation in rule(member))


def test_every_module_and_every_public_member_has_a_docstring():
    documented = {module.__name__: module for module in MODULES} | MEMBERS
    assert len(documented) > 400
    assert_none(name for name, member in documented.items() if not member.__doc__)


def test_all_parameters_are_documented_and_no_others():
    """In a section `Args:`, or in backticks in the text of a docstring that has none."""

    def rule(member):
        docstring, parameters = member.__doc__, list(find_parameters(member))
        if "Args" in parse_sections(docstring):
            documented = [name for name, _ in parse_args(docstring)]
            if documented != parameters:
                yield f"documents {documented}, takes {parameters}"
        else:
            yield from (f"`{name}` is not documented" for name in parameters if f"`{name}`" not in docstring)

    check_members(rule)


def test_types_and_defaults_are_those_of_the_signature():
    def rule(member):
        parameters = find_parameters(member)
        for name, entry in parse_args(member.__doc__):
            if name not in parameters or parameters[name].kind in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            ):
                continue
            kind, expected = entry["type"] or "", parameters[name].default
            default = DEFAULT.search(kind)
            if not re.match(LINK_OR_CODE, kind):
                yield f"`{name}` has no type in backticks, got {kind!r}"
            if (OPTIONAL in kind) != (expected is None):
                yield f"`{name}` must be *optional* if its default is None and only then, got {kind!r}"
            if (default is not None) != (expected not in (None, inspect.Parameter.empty)):
                yield f"`{name}` must say its default if it has one other than None, got {kind!r}"
            elif default is not None:
                names = vars(sys.modules[member.__module__])  # for `math.inf`
                if repr(eval(default["value"], names)) != repr(expected):
                    yield f"`{name}` defaults to {expected!r}, got {kind!r}"

    check_members(rule)


def test_sections_have_one_form():
    def rule(member):
        sections = parse_sections(member.__doc__)
        names = [section for section in sections if section]
        if not set(names) <= set(SECTIONS) or names != sorted(names, key=SECTIONS.index):
            yield f"sections must be some of {SECTIONS} in this order, got {names}"
        for entry in parse_entries(sections["Args"]) if "Args" in sections else ():
            match = ENTRY.fullmatch(entry)
            if match is None:
                yield f"an argument must be of the form `name (`type`): Text.`, got {entry!r}"
            elif not re.match(r"[^a-z].*\.$", match["text"] or ""):
                yield f"the text of an argument must be a sentence, got {entry!r}"
        if "Returns" in sections and not re.match(LINK_OR_CODE + r"(\.|, | of | with |: [^a-z])", sections["Returns"]):
            yield f"Returns must open with a type in backticks, got {sections['Returns']!r}"
        for entry in parse_entries(sections["Raises"]) if "Raises" in sections else ():
            match = re.fullmatch(r"(`\w+`(?:, `\w+`)*): (?![A-Z][a-z]).*\.", entry)
            kinds = [getattr(builtins, kind.strip("`"), None) for kind in match[1].split(", ")] if match else [None]
            if not all(inspect.isclass(kind) and issubclass(kind, Exception) for kind in kinds):
                yield f"Raises must be of the form `built-in exception: text.`, got {entry!r}"

    check_members(rule)


def test_what_is_raised_is_documented():
    def rule(member):
        yield from (f"raises `{kind}`" for kind in sorted(find_raised(member)) if f"`{kind}`" not in member.__doc__)

    check_members(rule)


def find_docstrings(tree):
    """Pairs of a name and its docstring: of a file and of all that it defines, private and nested names too."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                yield getattr(node, "name", "module"), docstring


def find_texts(docstring):
    """What is read alone: the first line, and the text of each entry of a section."""
    sections = parse_sections(docstring)
    yield sections.pop("").splitlines()[0]
    for section in sections.values():
        for entry in parse_entries(section):
            yield from (entry, entry.partition(": ")[2])


def find_names(tree):
    """Pairs of a function, class or file and the set of the names that it binds itself."""
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for scope in filter(lambda node: isinstance(node, scopes), ast.walk(tree)):
        names, nodes = set(), list(ast.iter_child_nodes(scope))
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, scopes):
                names.add(node.name)
                continue
            nodes += ast.iter_child_nodes(node)
        yield getattr(scope, "name", "module"), names


def find_in_files(find, *folders):
    """The pairs of a name and what was found that `find(tree)` yields, with the paths of all files of `folders`."""
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for name, found in find(ast.parse(path.read_text())):
            yield f"{path.relative_to(ROOT)}: {name}", found


def test_texts_of_docstrings_can_be_read_alone():
    texts = [
        (place, text)
        for place, docstring in find_in_files(find_docstrings, "src", "tests", "training", "benchmarks", "examples")
        for text in find_texts(docstring)
    ]
    assert len(texts) > 1000
    assert_none(f"{place}: {text}" for place, text in texts if RIDDLE.match(text))


def test_names_say_what_they_are():
    assert_none(
        f"{place}: {name}"
        for place, names in find_in_files(find_names, "src")
        for name in sorted(names)
        if UNCLEAR.fullmatch(name) or (name == "run" and "stage" in names)
    )
