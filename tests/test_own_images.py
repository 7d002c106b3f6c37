"""The page of own images, from a folder to an export: every command of it, as written, with fewer images and steps."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ENVIRONMENT


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_images.md"
SHORTER = {
    "python examples/own_images.py": "--images_per_class 12",
    "dod train": "--max_train_steps 2 --validation_steps 2 --checkpointing_steps 2 --logging_steps 1",
    "dod sample": "--steps 2",
    "dod sample-dataset": "--num_images 40 --num_inference_steps 2",
}


def commands():
    """Name of the language and source of each block of the page, in order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def run(command, folder):
    environment = os.environ | ENVIRONMENT | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("skimage")
    for name in ("checkpoints", "docs", "examples", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    for language, block in commands():
        if language == "python":
            run([sys.executable, "-c", block], tmp_path)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            options = SHORTER.get(" ".join(words[:2]), "").split()
            script = [str(ROOT / "src" / "diffusers_dod_command.py")] if words[0] == "dod" else []
            run([sys.executable, *script, *words[1:], *options], tmp_path)
    made = ["own/model_index.json", "own-samples.png", "own-variations.png", "own-tuned/model_index.json"]
    made += ["own-curves.png", "own-lora.png", "own-400.json", "own-remote/pipeline.py"]
    assert [name for name in made if not (tmp_path / "outputs" / name).exists()] == []


def test_the_example_makes_the_same_images_again(tmp_path):
    skimage = pytest.importorskip("skimage")
    assert skimage
    main = runpy.run_path(str(ROOT / "examples" / "own_images.py"))["main"]
    for name in ("one", "two"):
        main(["--images_per_class", "2", "--resolution", "16", "--output_dir", str(tmp_path / name)])
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.png")} for name in ("one", "two"))
    assert one == two
    assert len(list((tmp_path / "one").iterdir())) == 8
