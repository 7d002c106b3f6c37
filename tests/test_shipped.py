"""Files that come with the package are found in the repository and in an installed wheel."""

import shutil
import sys
from pathlib import Path

import pytest
from launch import run_command

import diffusers_dod
from diffusers_dod import shipped
from diffusers_dod.metrics.extractors import extractor_sha256, load_extractor
from diffusers_dod.options import parse_options
from diffusers_dod.results import checkpoint_sha256
from diffusers_dod.shipped import find_recipe, find_shipped
from diffusers_dod.training.cost import CostOptions, find_recipes
from diffusers_dod.training_options import TrainingOptions


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
    assert find_shipped("training/recipes/none.yaml") == "training/recipes/none.yaml"
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_shipped(path) == path
    assert find_shipped(tmp_path / "none") == tmp_path / "none"


def test_paths_stay_below_what_is_shipped(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = f"checkpoints/../../{ROOT.name}/README.md"
    assert (ROOT / path).exists() and find_shipped(path) == path
    assert find_shipped("user/name") == "user/name"  # of the Hub


def test_recipes_have_names(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--train_data_dir", "images", "--output_dir", "run", "--config"]
    by_name = parse_options(TrainingOptions, [*argv, "dod-s-imagenet256"])
    assert by_name.model.preset == "DoD-S" and by_name.config == Path("dod-s-imagenet256")
    by_path = parse_options(TrainingOptions, [*argv, "training/recipes/dod-s-imagenet256.yaml"])
    assert by_path.model == by_name.model and by_path.optimizer == by_name.optimizer
    with pytest.raises(SystemExit):
        parse_options(TrainingOptions, [*argv, "dod-s"])
    text = capsys.readouterr().err
    assert "`config` must be a YAML file, or one of the recipes cifar10, desk, dod-b-imagenet256," in text
    assert "got 'dod-s'." in text
    assert find_recipe(Path("desk")) == ROOT / "training" / "recipes" / "desk.yaml"
    (tmp_path / "desk").write_text("preset: DoD-S\n")
    assert find_recipe(Path("desk")) == Path("desk")
    assert len(find_recipes(CostOptions()).recipes) > 5


def test_published_names_hold_anywhere(monkeypatch, tmp_path):
    name = "training/desk/texture_features.py:extractor"
    monkeypatch.chdir(ROOT)
    expected = checkpoint_sha256("checkpoints/dod-desk"), extractor_sha256(name, load_extractor(name))
    monkeypatch.chdir(tmp_path)
    assert (checkpoint_sha256("checkpoints/dod-desk"), extractor_sha256(name, load_extractor(name))) == expected


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
EVALUATE = "evaluate textures:24:102 --reference textures:200:101 --resolution 32 --metrics fid is --device cpu"


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
def test_an_installed_wheel_works_offline(installed, tmp_path, monkeypatch):
    environment = {"PYTHONPATH": str(installed)}
    run_command([sys.executable, "-c", SAMPLE, installed], tmp_path / "log", environment)
    dod = [sys.executable, installed / "bin" / "dod"]
    monkeypatch.chdir(tmp_path)
    run_command([*dod, "sample", "marble", "--steps", "1", "-o", "marble.png"], tmp_path / "log", environment)
    assert (tmp_path / "marble.png").is_file()
    text = run_command(
        [*dod, "train", "--config", "desk", "--dry_run", "--output_dir", "run"], tmp_path / "log", environment
    )
    assert "DoD-Desk" in text
    extractor = ["--extractor", "training/desk/texture_features.py:extractor"]
    assert "FID" in run_command([*dod, *EVALUATE.split(), *extractor], tmp_path / "log", environment).upper()
