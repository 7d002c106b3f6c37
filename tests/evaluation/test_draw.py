"""`dod sample`: images as the pipeline draws them, whose files draw them again, and nothing overwritten."""

from pathlib import Path

import numpy as np
import pytest
from helpers import noise_image, says, tiny_token_prior
from PIL import Image

from diffusers_dod import DoDPipeline, desk_checkpoint
from diffusers_dod.demo.settings import DemoOptions, open_pipeline
from diffusers_dod.evaluation import draw, gallery
from diffusers_dod.evaluation.draw import main
from diffusers_dod.image_reading import center_crop
from diffusers_dod.image_settings import read_image_settings, save_with_settings


SIDE, GAP, LINE = 32, 4, 16
QUICK = ["--steps", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Images of a grid are not enlarged."""
    monkeypatch.setattr(draw, "MIN_SIDE", SIDE)


def call(*arguments: object) -> None:
    main([*map(str, arguments)])


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def cells(grid: np.ndarray, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The images of a grid, which lie in its lower right corner."""
    top, left = (
        size - number * (SIDE + GAP) + GAP for size, number in zip(grid.shape[:2], (rows, columns), strict=True)
    )
    places = [[(top + i * (SIDE + GAP), left + j * (SIDE + GAP)) for j in range(columns)] for i in range(rows)]
    return [[grid[y : y + SIDE, x : x + SIDE] for y, x in row] for row in places]


def change(path: Path, **entries: object) -> Path:
    """The image with other settings, beside it."""
    settings = read_image_settings(path)
    changed = path.with_name(f"changed-{path.name}")
    with Image.open(path) as image:
        options = {**settings["options"], **entries.pop("options", {})}
        checkpoint = {**settings["checkpoint"], **entries.pop("checkpoint", {})}
        task = entries.get("task", settings["task"])
        save_with_settings(image, changed, task, options, checkpoint=checkpoint, device="cpu")
    return changed


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "grid.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "MIN_SIDE", SIDE)
        call("marble", "0", "null", "--count", 2, "--seed", 3, "--scale", 1, 2, "--batch_size", 4, *QUICK, "-o", path)
    return path


def test_images_are_those_of_the_pipeline(grid):
    pipe = DoDPipeline.from_pretrained(desk_checkpoint())
    ids = pipe.get_label_ids("marble") * 2 + [0] * 2 + [None] * 2
    settings = {"num_inference_steps": 1, "guidance_scale": [1, 2], "seed": 3, "output_type": "pil"}
    images = pipe(ids[:4], **settings).images + pipe(ids[4:], sample_indices=[4, 5], **settings).images
    found = [image for row in cells(read(grid), 3, 2) for image in row]
    assert all(np.array_equal(image, np.asarray(expected)) for image, expected in zip(found, images, strict=True))


def test_a_file_draws_itself_again(grid, tmp_path, capsys):
    call("--like", grid, "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == grid.read_bytes()
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'again.png'}: the pixels of {grid}, bit for bit.\n"


def test_stages_and_a_file_for_each_image(tmp_path):
    folder = tmp_path / "images"
    arguments = ["marble", "bricks", "--count", 2, "--all-stages", "--batch_size", 3, *QUICK]
    call(*arguments, "-o", folder)
    call(*arguments, "-o", folder)  # over its own files
    names = [f"{i:04d}-{name}-stage-{n}.png" for i, name in enumerate(["marble"] * 2 + ["bricks"] * 2) for n in (1, 2)]
    assert sorted(path.name for path in folder.iterdir()) == names
    call(*arguments, "-o", tmp_path / "grid.png")
    rows = cells(read(tmp_path / "grid.png"), 4, 2)
    assert all(np.array_equal(rows[n][i], read(folder / names[2 * i + n])) for i in range(2) for n in range(2))
    assert not np.array_equal(rows[0][0], rows[1][0])
    for name in (names[6], names[1]):  # of the second batch and of the first
        call("--like", folder / name, "-o", tmp_path / "one.png")
        assert (tmp_path / "one.png").read_bytes() == (folder / name).read_bytes()


def test_variations_of_an_image(tmp_path):
    photo, output = tmp_path / "photo.png", tmp_path / "variations.png"
    noise_image(50, 40).save(photo)
    call("marble", "--image", photo, "--count", 9, "--all-stages", *QUICK, "-o", output)
    rows = cells(read(output), 3, 8)
    assert np.array_equal(rows[0][0], center_crop(Image.open(photo), SIDE))
    pipe = DoDPipeline.from_pretrained(desk_checkpoint())
    images = pipe(["marble"] * 9, image=photo, num_inference_steps=1, seed=0).images
    found = [*rows[1], rows[2][0]]
    assert all(np.array_equal(image, np.asarray(expected)) for image, expected in zip(found, images, strict=True))
    call("--like", output, "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == output.read_bytes()
    noise_image(50, 40, seed=1).save(photo)
    with pytest.raises(ValueError, match="an image that is still there"):
        call("--like", output, "-o", tmp_path / "again.png")
    photo.write_text("none")
    with pytest.raises(ValueError, match="`image` must be an image that can be read"):
        call("marble", "--image", photo, *QUICK, "-o", output)


def test_a_token_prior_takes_the_place_of_stage_1(tmp_path):
    output, options = tmp_path / "image.png", ["--use_token_prior", "--token_prior_truncation", 0.5, *QUICK]
    with pytest.raises(ValueError, match=says("`use_token_prior`", "without a `token_prior`")):
        call("marble", *options, "-o", output)
    pipe = DoDPipeline.from_pretrained(desk_checkpoint(), token_prior=tiny_token_prior(num_classes=12))
    pipe.save_pretrained(tmp_path / "pipeline")
    call("marble", "--count", 2, *options, "--checkpoint", tmp_path / "pipeline", "--all-stages", "-o", output)
    settings = {"use_token_prior": True, "token_prior_truncation": 0.5, "num_inference_steps": 1, "seed": 0}
    images = pipe(["marble"] * 2, **settings).images
    assert np.array_equal(cells(read(output), 1, 2)[0], [np.asarray(image) for image in images])
    call("--like", output, "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == output.read_bytes()
    with pytest.raises(ValueError, match=says("`stages` must be >= 2", "`use_token_prior`", "got 1")):
        call("marble", *options, "--stages", 1, "--checkpoint", tmp_path / "pipeline", "-o", output)


def test_nothing_else_is_overwritten(tmp_path):
    path, folder = tmp_path / "image.png", tmp_path / "folder"
    noise_image(8, 8).save(path)
    with pytest.raises(ValueError, match="`output` must be a PNG file of this package"):
        call("marble", *QUICK, "-o", path)
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match=says("`output` must be a folder without other files", "notes.txt")):
        call("marble", *QUICK, "-o", folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "image.png"], "`class_labels` must name at least one class"),
        (["marble", "-o", "image.jpg"], "`output` must be a folder or end with .png"),
        (
            ["--like", "image.png", "--seed", "1", "-o", "x.png"],
            "without other settings, got seed",
        ),
        (["marble"], "required: --output/-o"),
        (["marble", "--count", "0", "-o", "image.png"], "`count` must be an integer >= 1, got 0."),
    ],
)
def test_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_class_is_named_with_those_like_it(tmp_path):
    with pytest.raises(ValueError, match=says("'marble'", "got 'marbel'")):
        call("marbel", *QUICK, "-o", tmp_path / "image.png")


def test_what_cannot_be_drawn_again_is_refused(grid, tmp_path):
    output = ["-o", tmp_path / "again.png"]
    with pytest.raises(ValueError, match=says("`checkpoint` must be what", "drawn with", "0" * 64)):
        call("--like", change(grid, checkpoint={"sha256": "0" * 64}), *output)
    with pytest.raises(ValueError, match="drawn by `dod sample` or `dod demo`, got .* of 'other'"):
        call("--like", change(grid, task="other"), *output)
    with pytest.raises(ValueError, match=says("`checkpoint` must be given with `like`", "'own'")):
        call("--like", change(grid, checkpoint={"path": "own"}), *output)  # as a demo of a folder says it
    with pytest.raises(ValueError, match="`count` must be an integer >= 1, got 0"):
        call("--like", change(grid, options={"count": 0}), *output)
    too_large = {"count": 400_000, "height": 65_537, "width": 10**9, "stages": 1001, "steps": [10**7]}
    for name, value in too_large.items():
        with pytest.raises(ValueError, match=says(f"`{name}` must be", "got")):
            call("--like", change(grid, options={name: value}), *output)
    others = {"class_labels": 5, "count": None, "all_stages": 1, "seed": 1.5, "steps": ["1"], "image": 3}
    for name, value in others.items():
        with pytest.raises(TypeError, match=f"`{name}` must be of type"):
            call("--like", change(grid, options={name: value}), *output)
    with pytest.raises(ValueError, match="`like` must be one of the 6 images of its call, got"):
        call("--like", change(grid, options={"index": 6, "stage": 2}), *output)
    with pytest.raises(TypeError, match="got new_option"):
        call("--like", change(grid, options={"new_option": 0}), *output)
    with pytest.raises(ValueError, match="`output` must be a file"):
        call("--like", grid, "-o", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_the_demo_is_drawn_again(tmp_path, capsys):
    pipe, identity = open_pipeline(DemoOptions(device="cpu"))
    sampler = gallery.Sampler(pipe, gallery.Limits(max_batch_size=3), identity)
    settings = gallery.Settings(classes=(1, 4), num_images=2, steps=1)
    sampler.save(sampler.sample(settings).rows[2][1], tmp_path / "demo.png")
    call("--like", tmp_path / "demo.png", "-o", tmp_path / "again.png", "--device", "cpu")
    assert "bit for bit" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "demo.png").read_bytes()
    with pytest.raises(ValueError, match=says("`like`", "one of the 4 images of its settings")):
        call("--like", change(tmp_path / "demo.png", options={"sample_index": 7}), "-o", tmp_path / "again.png")
    too_large = {"batch_size": 10_001, "num_images": 5001, "size": 64 * SIDE + 2, "steps": 10**7}
    for name, value in too_large.items():
        with pytest.raises(ValueError, match=says(f"`{name}` must be", "got")):
            call("--like", change(tmp_path / "demo.png", options={name: value}), "-o", tmp_path / "again.png")
    with pytest.raises(TypeError, match=says("`classes`", "list")):
        call("--like", change(tmp_path / "demo.png", options={"classes": 3}), "-o", tmp_path / "again.png")


def test_settings_that_no_server_draws_are_refused_without_a_pipeline():
    """So that `dod info` does not suggest to draw them."""
    for name, value in {"num_stages": 9, "steps": 10**7, "num_images": 10_001, "num_between": 10_001}.items():
        settings = {"classes": [1], name: value, **({"mode": "between"} if name == "num_between" else {})}
        with pytest.raises(ValueError, match=says(f"`{name}` must be", f"got {value}")):
            gallery.recall(settings)


def test_other_pixels_and_versions_are_said(grid, tmp_path, capsys, monkeypatch):
    found = draw.describe_versions("cpu")
    monkeypatch.setattr(draw, "describe_versions", lambda device: {**found, "torch": "2.99"})
    with pytest.raises(SystemExit) as ended:
        call("--like", change(grid, options={"seed": 4}), "-o", tmp_path / "again.png")
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert "its pixels are not those of" in lines[0]
    assert lines[1] == f"  torch: {found['torch']} there, 2.99 here"
