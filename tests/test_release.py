"""What `make release` checks and builds; it is not run itself here, as its installation asks the package index."""

import importlib.util
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


@pytest.fixture
def clone(tmp_path):
    """A committed release 1.2.3 with what is checked of it."""
    (tmp_path / "src" / "diffusers_dod").mkdir(parents=True)
    urls = '[project.urls]\nRepository = "https://example.com/dod"\n'
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "1.2.3"\n{urls}')
    (tmp_path / "src" / "diffusers_dod" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-12-01)\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Release"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_release_has_no_problem(clone):
    assert release.find_problems(clone) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("pyproject.toml", "1.2.3", "1.2.3.dev0", "must be one of a release"),
        ("pyproject.toml", "example.com", "github.com/OWNER", "home must be known"),
        ("src/diffusers_dod/__init__.py", "1.2.3", "1.2.2", "__init__.py must be 1.2.3"),
        ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff must be 1.2.3"),
        ("CHANGELOG.md", "2026-12-01", "unreleased", "first heading of CHANGELOG.md"),
        ("CHANGELOG.md", "", "\n", "must be committed"),
    ],
)
def test_all_problems_are_found(clone, name, old, new, problem):
    path = clone / name
    path.write_text(path.read_text().replace(old, new) if old else path.read_text() + new)
    assert any(problem in found for found in release.find_problems(clone))


def test_a_tag_is_set_once(clone):
    subprocess.run(["git", "tag", "v1.2.3"], cwd=clone, check=True)
    assert release.find_problems(clone) == ["The tag v1.2.3 must be new."]


def test_links_of_the_readme_lead_to_the_project(tmp_path):
    text = "![a](docs/a.png) [b](docs/b.md#c) [d](https://e.org) [f](#g)"
    assert release.make_links_absolute(text, "https://h", "v1") == (
        "![a](https://h/raw/v1/docs/a.png) [b](https://h/blob/v1/docs/b.md#c) [d](https://e.org) [f](#g)"
    )


@pytest.mark.slow
def test_two_builds_have_the_same_bytes(tmp_path):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("builds what is committed")
    one, two = (release.build("HEAD", tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    wheel, sdist = one
    names = zipfile.ZipFile(wheel).namelist()
    assert "diffusers_dod/shipped/checkpoints/dod-desk/model_index.json" in names
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert "](docs/" not in zipfile.ZipFile(wheel).read(metadata).decode()
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())
