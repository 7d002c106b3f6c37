"""`make docs` builds the site without a warning, and it shows every public name with its arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_api_docs import MEMBERS, parse_args, qualname

import diffusers_dod
from diffusers_dod.guidance_options import GuidanceOptions
from diffusers_dod_command import COMMANDS


ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, made by the command of `make docs`."""
    folder = tmp_path_factory.mktemp("docs")
    recipe = re.search(r"^docs: install\n\t(.+)\n", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = f"{recipe.replace('$(BIN)/python', sys.executable)} --site-dir {folder}"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_the_reference_shows_every_public_name_and_its_arguments(site):
    pages, missing = {}, []
    for name, member in MEMBERS.items():
        if member is GuidanceOptions:  # made of the fields of `Guidance`; the pages of options have it
            continue
        module = name.removesuffix(f".{qualname(member)}").removeprefix("diffusers_dod.")
        if module not in pages:
            html = (site / "reference" / "api" / f"{module}.html").read_text()
            parts = re.split(r'<h\d id="(diffusers_dod\.[^"]+)"', html)
            pages[module] = dict(zip(parts[1::2], parts[2::2], strict=True))
        html = pages[module].get(name)
        if html is None:
            missing.append(name)
            continue
        for _, entry in parse_args(member.__doc__):
            for argument in entry["names"].split(", "):
                if not re.search(rf"<code>\*{{0,2}}{argument}</code>", html):
                    missing.append(f"{name}: {argument}")
    assert missing == []


@pytest.mark.slow
def test_there_are_pages_of_what_is_exported_and_of_all_commands(site):
    page = (site / "reference" / "api" / "index.html").read_text()
    own = [
        name for name in diffusers_dod.__all__ if getattr(diffusers_dod, name).__module__.startswith("diffusers_dod")
    ]
    assert [name for name in own if f"<code>{name}</code>" not in page] == []
    assert [name for name in COMMANDS if not (site / "reference" / "options" / f"{name}.html").exists()] == []
    assert "<code>--learning_rate</code>" in (site / "reference" / "options" / "train.html").read_text()


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    """Scripts, styles, fonts and images are the site's own."""
    loaded = [
        f"{path.name}: {source}"
        for path in site.rglob("*.html")
        for source in re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?://[^"]+)', path.read_text())
        if 'rel="canonical"' not in source
    ]
    assert loaded == []
