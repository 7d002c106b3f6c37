"""Files that come with the package are found in the repository and in an installed wheel."""

import shutil
import sys
from pathlib import Path

import pytest
from launch import run_command

import diffusers_dod
from diffusers_dod import shipped
from diffusers_dod.shipped import find_shipped


ROOT = Path(__file__).parents[1]


def test_the_repository_has_one_copy():
    assert diffusers_dod.desk_checkpoint() == ROOT / "checkpoints" / "dod-desk"
    assert not (ROOT / "src" / "diffusers_dod" / "shipped").exists()


def test_an_incomplete_installation_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="installed whole"):
        diffusers_dod.desk_checkpoint()


def test_what_the_user_has_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = Path("training/recipes/desk.yaml")
    assert find_shipped(path) == ROOT / path
    assert find_shipped("training/recipes/none.yaml") == Path("training/recipes/none.yaml")
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_shipped(path) == path
    assert find_shipped(tmp_path / "none") == tmp_path / "none"


SAMPLE = """
import sys
from pathlib import Path
import diffusers_dod
folder = Path(sys.argv[1])
checkpoint = diffusers_dod.desk_checkpoint()
assert Path(diffusers_dod.__file__).is_relative_to(folder) and checkpoint.is_relative_to(folder)
pipe = diffusers_dod.DoDPipeline.from_pretrained(checkpoint)
assert len(pipe("marble", seed=0, num_inference_steps=2).images) == 1
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with an installed wheel, which was built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "training", "checkpoints"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    run_command(wheel, folder / "wheel.log")
    (path,) = folder.glob("*.whl")
    run_command([*pip, "install", "--no-deps", "--target", folder / "installed", path], folder / "install.log")
    return folder / "installed"


@pytest.mark.slow
def test_an_installed_wheel_samples_offline(installed, tmp_path):
    run_command([sys.executable, "-c", SAMPLE, installed], tmp_path / "log", {"PYTHONPATH": str(installed)})
