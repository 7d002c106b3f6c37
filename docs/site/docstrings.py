"""Docstrings have Diffusers' form; this turns them into that of mkdocstrings before it reads them."""

import re
from typing import Any

import griffe


# name (`type`, *optional*, defaults to `x`): text. The signature says the same of type and default.
ENTRY = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)*)(?: \(\[?`.+?\))?:(?P<text>.*)$")
TYPE = re.compile(r"^(?P<indent> +)(?P<type>\[?`[^:]+`\]?(?:, \[?`[^:]+`\]?)*):(?P<text> .*)$")
LINK = re.compile(r"\[`([\w.]+)`\](?!\[|\()")


def _translate(text: str, is_public: Any) -> str:
    lines, section = [], ""
    for line in text.split("\n"):
        if heading := re.fullmatch(r" *(Args|Attributes|Returns|Raises|Examples):", line):
            section = heading[1]
        match = ENTRY.match(line) if section in ("Args", "Attributes") else None
        kind = TYPE.match(line) if section in ("Returns", "Raises") else None
        if match:
            # Several names share a text: mkdocstrings takes one name for each.
            names = match["names"].split(", ")
            lines += [f"{match['indent']}{name}: As `{names[-1]}`." for name in names[:-1]]
            lines.append(f"{match['indent']}{names[-1]}:{match['text']}")
        elif kind:
            name = re.sub(r"[`\[\]]", "", kind["type"])
            lines.append(f"{kind['indent']}{name}:{kind['text']}")
        else:
            lines.append(line)
    return LINK.sub(lambda found: is_public(found[1]), "\n".join(lines))


class DiffusersDocstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called by griffe."""
        self._paths = {}
        self._collect(pkg)
        self._rewrite(pkg)

    def _members(self, owner: griffe.Object) -> list[griffe.Object]:
        return [member for member in owner.members.values() if not member.is_alias]

    def _collect(self, owner: griffe.Object) -> None:
        """Notes where the names are documented that docstrings may link to: with and without their class."""
        for member in self._members(owner):
            if member.is_module:
                self._collect(member)
            elif not member.name.startswith("_") and member.docstring is not None:
                name = f"{owner.name}.{member.name}" if owner.is_class else member.name
                self._paths.setdefault(name, member.path)
                if member.is_class:
                    self._collect(member)

    def _link(self, name: str) -> str:
        path = self._paths.get(name)
        return f"`{name}`" if path is None else f"[`{name}`][{path}]"

    def _rewrite(self, owner: griffe.Object) -> None:
        if owner.docstring is not None:
            owner.docstring.value = _translate(owner.docstring.value, self._link)
        for member in self._members(owner):
            self._rewrite(member)
