"""What the documentation names exists."""

import importlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "equations.md").read_text().splitlines()
    if re.match(r"\| (Eq|Sec|Table)", line)
]


def test_all_equations_of_the_paper_have_a_place():
    named = " ".join(row[0] for row in TABLE)
    assert all(f"Eq. {number}" in named for number in range(1, 12))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_the_table_names_what_exists(row):
    path, test = row[2].strip("`"), row[3].strip("`")
    parts = path.split(".")
    target = importlib.import_module(".".join(parts[:2]))
    for name in parts[2:]:
        target = getattr(target, name)
    assert (ROOT / test).is_file()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/desk_size.md"])
def test_links_and_commands_lead_to_files(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    scripts = re.findall(r"(?:python|launch) (\S+\.py)", text)
    base = (ROOT / document).parent
    assert all((base / link).exists() for link in links)
    assert all((ROOT / script).exists() for script in scripts)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"(?:^ *|`)make ([a-z-]+)", text, re.MULTILINE))
