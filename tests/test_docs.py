"""What the documentation names exists."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from diffusers_dod.options import parse_options
from diffusers_dod.training_options import TrainingOptions


ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


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
    pkgutil.resolve_name(path)
    assert (ROOT / test).is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_commands_lead_to_files(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    scripts = re.findall(r"(?:python|launch) (\S+\.py)", text) + re.findall(r"sbatch .*?(\S+\.sbatch)", text)
    base = (ROOT / document).parent
    assert all((base / link).exists() for link in links)
    assert all((ROOT / script).exists() for script in scripts)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"(?:^ *|`)make ([a-z-]+)", text, re.MULTILINE))


def anchors(document: Path) -> set[str]:
    """Names that links to headings of a page have, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_headings(document):
    page = ROOT / document
    links = re.findall(r"\]\(((?!http)[^)#\s]*\.md|)#([^)\s]+)\)", page.read_text())
    assert [
        (name, anchor) for name, anchor in links if anchor not in anchors(page.parent / name if name else page)
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_by_reference_have_an_address(document):
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / document).read_text(), flags=re.DOTALL)
    named = set(re.findall(r'\]\[([^\]"\n]+)\]', text))
    assert named == set(re.findall(r"^\[([^\]]+)\]: \S+$", text, re.MULTILINE))


RUN_ELSEWHERE = ["docs/own_images.md"]  # by its own test, with what it makes on the way


@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if code_blocks(name, "python") and name not in RUN_ELSEWHERE]
)
def test_python_in_the_documentation_runs(document, tmp_path, monkeypatch):
    if "peft" in (ROOT / document).read_text():
        pytest.importorskip("peft")
    if "torchao" in (ROOT / document).read_text():
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        exec(compile("\n".join(code_blocks(document, "python")), document, "exec"), {"__name__": document})
    finally:
        _AttentionBackendRegistry.set_active_backend(backend)  # a model's choice is that of the process
        torch.compiler.reset()


TRAIN_COMMANDS = [
    (document, command.replace("\\\n", " "))
    for document in DOCUMENTS
    for block in code_blocks(document, "bash")
    for command in re.findall(r"(?:training/train_dod\.py|dod train)((?:.*\\\n)*.*)", block)
]


@pytest.mark.parametrize(("document", "command"), TRAIN_COMMANDS)
def test_training_commands_are_accepted(document, command):
    parse_options(TrainingOptions, shlex.split(command, comments=True))


def test_there_are_training_commands():
    assert {"README.md", "docs/fine_tuning.md", "docs/desk_size.md"} <= {document for document, _ in TRAIN_COMMANDS}
