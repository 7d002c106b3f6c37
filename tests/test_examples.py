"""The examples run, on the checkpoint of the repository, and draw what they say."""

import hashlib
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_dod.data.textures import TextureDataset


ROOT = Path(__file__).parents[1]
GAP, SIDE = 4, 96


def run(name: str, tmp_path, *arguments: str) -> np.ndarray:
    """The image that an example draws, as (H, W, 3)."""
    output = tmp_path / "output.png"
    main = runpy.run_path(str(ROOT / "examples" / name))["main"]
    main(["--pipeline", str(ROOT / "checkpoints" / "dod-desk"), "--output", str(output), *arguments])
    return np.asarray(Image.open(output))


def tiles(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The images of a grid, (rows, columns, H, W, 3)."""
    height, width = rows * (SIDE + GAP) - GAP, columns * (SIDE + GAP) - GAP
    assert image.shape[0] > height and image.shape[1] >= width  # with captions above, and on the left of some
    assert (image[: image.shape[0] - height] < 128).any()
    image = image[-height:, -width:]
    padded = np.pad(image, ((0, GAP), (0, GAP), (0, 0)))
    return padded.reshape(rows, SIDE + GAP, columns, SIDE + GAP, 3).swapaxes(1, 2)[:, :, :SIDE, :SIDE]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    dataset = TextureDataset(2, seed=5)
    for index in range(2):  # larger than the model, and not square
        Image.fromarray(dataset[index]["image"]).resize((80, 64)).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(2)]


def test_stages_side_by_side(tmp_path):
    grid = tiles(run("stages.py", tmp_path, "--num_samples", "2", "--num_stages", "3"), 2, 3)
    for row in grid:
        assert np.abs(row[0].astype(int) - row[1]).mean() > 1 and np.abs(row[1].astype(int) - row[2]).mean() > 1


def test_variations_of_an_image(tmp_path, images):
    (row,) = tiles(run("variations.py", tmp_path, "--image", images[0], "--num_images", "2"), 1, 3)
    assert np.abs(row[1].astype(int) - row[2]).mean() > 1


def test_variations_from_one_image_to_another(tmp_path, images):
    arguments = ["--image", images[0], "--second_image", images[1], "--num_priors", "3", "--num_images", "1"]
    grid = tiles(run("variations.py", tmp_path, *arguments), 3, 2)
    assert (grid[1, 0] == 255).all() and not (grid[0, 0] == 255).all() and not (grid[2, 0] == 255).all()
    assert np.abs(grid[0, 1].astype(int) - grid[2, 1]).mean() > 1


def test_sweep_of_the_guidance_scale(tmp_path):
    arguments = ["--class_labels", "rings", "--guidance_scales", "1", "8"]
    (row,) = tiles(run("guidance_sweep.py", tmp_path, *arguments), 1, 2)
    (rescaled,) = tiles(run("guidance_sweep.py", tmp_path, *arguments, "--guidance_rescale", "1"), 1, 2)
    assert np.abs(row[0].astype(int) - row[1]).mean() > 1
    assert (row[0] == rescaled[0]).all() and (row[1] != rescaled[1]).any()


def test_folders_of_imagenet_are_checked(tmp_path, capsys):
    module = runpy.run_path(str(ROOT / "examples" / "check_imagenet.py"))
    find_errors, known = module["find_errors"], module["find_errors"].__globals__
    for number in range(1000):
        (tmp_path / f"n{number:08}").mkdir()
    errors = find_errors(tmp_path, "val")
    assert "wnids" in errors[0] and "50,000 images, got 0" in errors[1] and "50 images, got 0" in errors[2]
    names = sorted(folder.name for folder in tmp_path.iterdir())
    known["WNIDS_SHA256"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
    known["NUM_IMAGES"] = {"train": 1}
    (tmp_path / names[3] / "a.JPEG").touch()
    assert find_errors(tmp_path, "train") == []
    assert "n00000207" in capsys.readouterr().out
    (tmp_path / names[0]).rmdir()
    assert find_errors(tmp_path, "train") == ["There must be 1,000 folders, got 999."]


def error_of(name: str, capsys, monkeypatch, *arguments: str) -> str:
    """The line that an example ends with where it is a process of its own."""
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if "rror" in line] == lines[-1:]
    return lines[-1]


def test_files_that_cannot_be_read_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the checkpoint is found, too
    (tmp_path / "text.png").write_text("no image")
    missing = error_of("variations.py", capsys, monkeypatch, "--image", "missing.png")
    assert missing.startswith("variations.py: error:") and "missing.png" in missing
    assert "text.png" in error_of("variations.py", capsys, monkeypatch, "--image", "text.png")
    assert "nowhere" in error_of("stages.py", capsys, monkeypatch, "--pipeline", "nowhere")
    for name in ("guidance_sweep.py", "quickstart.py", "stages.py", "toy_2d.py"):
        assert "`output` must end with .png, got a.txt" in error_of(name, capsys, monkeypatch, "--output", "a.txt")


def test_an_image_of_a_phone_is_turned_and_its_transparency_white(tmp_path):
    phone, upright = tmp_path / "phone.png", tmp_path / "upright.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(phone, exif=exif)
    white = Image.new("RGBA", (60, 40), "white")
    Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB").rotate(-90, expand=True).save(upright)
    (one,), (two,) = (
        tiles(run("variations.py", tmp_path, "--image", str(path), "--num_images", "1"), 1, 2)
        for path in (phone, upright)
    )
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1
