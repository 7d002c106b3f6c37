"""Samples on disk: the same files whatever happens on the way, and a manifest that says what they are."""

import errno
import json
import logging
import os
import shutil
import sys
import threading
import tracemalloc
from importlib.metadata import version
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import fresh_accelerator, says, tiny_pipeline, tiny_token_prior, tiny_transformer
from launch import PATIENCE_S, run_command, started, torchrun, wait_until
from PIL import Image

from diffusers_dod import DoDPipeline
from diffusers_dod.command_line import run_main
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.evaluation.sample import SampleFolder, SamplingOptions, draw_labels, main, to_uint8
from diffusers_dod.files import file_sha256, in_use
from diffusers_dod.guidance import Guidance
from diffusers_dod.options import parse_options
from diffusers_dod.results import checkpoint_sha256


ROOT = Path(__file__).parents[2]
NUM_IMAGES = 7
BATCH_SIZE = 3  # the last chunk has one image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "checkpoint"
    tiny_pipeline().save_pretrained(path)
    return path


def command(checkpoint: Path, folder: Path, *arguments: str) -> list[str]:
    command = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(folder), "--seed", "5"]
    return [*command, "--num_images", str(NUM_IMAGES), "--batch_size", str(BATCH_SIZE), *arguments]


def run(checkpoint: Path, folder: Path, *arguments: str) -> dict:
    with fresh_accelerator():
        main(command(checkpoint, folder, *arguments))
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but for the command, which names another folder."""
    files = helpers.contents(folder)
    manifests = {name: content for name, content in files.items() if name.endswith("manifest.json")}
    assert manifests
    return files | {name: {**json.loads(content), "argv": None} for name, content in manifests.items()}


@pytest.fixture(scope="module")
def references(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """An uninterrupted run of one process in each format."""
    folders = {name: tmp_path_factory.mktemp("finished") / name for name in ("png", "npz")}
    for name, folder in folders.items():
        run(checkpoint, folder, "--format", name)
    return folders


@pytest.fixture(params=["png", "npz"])
def finished(request, references) -> Path:
    return references[request.param]


def read_images(folder: Path) -> np.ndarray:
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_0"]
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def read_labels(folder: Path) -> list[int]:
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_1"].tolist()
    return [int(line) for line in (folder / "labels.txt").read_text().splitlines()]


def test_images_are_those_of_the_pipeline(checkpoint, finished):
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    labels = draw_labels("random", 5, NUM_IMAGES, 10).tolist()
    assert read_labels(finished) == labels and len(set(labels)) > 3
    expected = [
        pipeline(labels[i : i + 3], seed=5, sample_indices=range(i, min(i + 3, 7)), output_type="np").images
        for i in (0, 3, 6)
    ]
    expected = np.round(np.concatenate(expected) * 255)
    assert expected.std() > 20
    images = read_images(finished)
    assert images.dtype == np.uint8 and images.shape == (7, 16, 16, 3)
    np.testing.assert_array_equal(images, expected)


def test_the_manifest_says_what_they_are(checkpoint, finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    is_png = finished.name == "png"
    options = parse_options(SamplingOptions, command(checkpoint, finished, "--format", finished.name))
    assert parse_options(SamplingOptions, manifest["argv"]) == options
    assert manifest["checkpoint"] == {"path": str(checkpoint), "sha256": checkpoint_sha256(checkpoint)}
    assert manifest["num_images"] == NUM_IMAGES and manifest["num_classes"] == 10
    assert manifest["images"] == ("*.png" if is_png else "arr_0 of samples.npz")
    assert manifest["labels"] == ("labels.txt" if is_png else "arr_1 of samples.npz")
    if is_png:
        joined = finished.parent / "joined"
        joined.write_bytes(b"".join((finished / f"{i:06d}.png").read_bytes() for i in range(NUM_IMAGES)))
    assert manifest["sha256"] == file_sha256(joined if is_png else finished / "samples.npz")
    assert manifest["settings"] == {
        "checkpoint_sha256": checkpoint_sha256(checkpoint),
        "num_images": 7,
        "labels": "random",
        "seed": 5,
        "batch_size": 3,
        "dtype": "float32",
        "allow_tf32": False,
        "num_stages": 2,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "first_stage_guidance_scale": 1.0,
        "stage_inference_steps": None,
        "stage_solvers": ["euler", "euler"],
        "stage_guidance_scales": None,
        "null_condition": "class_and_prior",
        "prior_guidance_scale": None,
        "guidance_channels": None,
        "guidance_interval": [0.0, 1.0],
        "guidance_power": None,
        "guidance_rescale": 0.0,
        "guidance_cosine_threshold": None,
        "prior_noise": 0.0,
        "use_token_prior": False,
        "token_prior_num_inference_steps": None,
        "token_prior_guidance_scale": None,
        "token_prior_truncation": None,
        "height": 16,
        "width": 16,
        "format": finished.name,
        "rounding": "round(255 x)",
        "stage": 2,
    }
    assert len(manifest["versions"]) == 1 and manifest["versions"][0]["torch"] == version("torch")


def test_nothing_else_is_left(finished):
    names = {path.name for path in finished.iterdir()}
    if finished.name == "npz":
        assert names == {"samples.npz", "manifest.json"}
    else:
        assert names == {*(f"{i:06d}.png" for i in range(7)), "labels.txt", "manifest.json", "chunks"}
        assert not list((finished / "chunks").glob(".unfinished-*"))


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_format", "stages", "num_files"),
    [
        ("png", ["--num_stages", "1"], 8),
        ("npz", ["--num_stages", "1"], 7),
        ("npz", ["--num_stages", "2", "--all_stages"], 14),
    ],
    ids=["png", "npz", "npz of all stages"],
)
def test_a_run_that_is_killed_at_any_file_goes_on(checkpoint, tmp_path, monkeypatch, image_format, stages, num_files):
    """Each of its files in turn is half written when it ends, of 2 chunks."""
    options = ["--format", image_format, "--num_images", "3", "--batch_size", "2", *stages]
    run(checkpoint, tmp_path / "expected", *options)
    replace = os.replace
    for number in range(num_files + 1):
        published = []

        def replace_some(source, target, published=published, number=number):
            published.append(target)
            if len(published) > number:
                Path(source).write_bytes(Path(source).read_bytes()[:-5])
                raise Killed
            replace(source, target)

        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            if number < num_files:
                with pytest.raises(Killed):
                    run(checkpoint, folder, *options)
                assert not (folder / "manifest.json").exists()
            else:
                run(checkpoint, folder, *options)
        run(checkpoint, folder, *options)
        assert contents(folder) == contents(tmp_path / "expected"), number


FEWER = ["--num_images", "3", "--batch_size", "2"]
MORE = ["--num_images", "5", "--batch_size", "2"]


@pytest.mark.parametrize("options", [["png"], ["npz"], ["npz", "--all_stages"]], ids=" ".join)
def test_a_finished_run_goes_on_with_more_images(checkpoint, tmp_path, monkeypatch, options):
    """The last chunk, which was smaller than the others, is sampled again, and those before are not."""
    options = ["--format", *options]
    run(checkpoint, tmp_path / "expected", *options, *MORE)
    run(checkpoint, tmp_path / "samples", *options, *FEWER)
    chunks = []
    write = SampleFolder.write
    monkeypatch.setattr(SampleFolder, "write", lambda self, *args: (chunks.append(args[0]), write(self, *args)))
    run(checkpoint, tmp_path / "samples", *options, *MORE)
    assert sorted(set(chunks)) == [1, 2]
    assert contents(tmp_path / "samples") == contents(tmp_path / "expected")
    with pytest.raises(ValueError, match=says("`output_dir`", "`num_images` = 3", "got 5")):
        run(checkpoint, tmp_path / "samples", *options, *FEWER)
    with pytest.raises(ValueError, match=says("`output_dir`", "`seed` = 6", "got 5")):
        run(checkpoint, tmp_path / "samples", *options, *MORE, "--num_images", "9", "--seed", "6")
    assert contents(tmp_path / "samples") == contents(tmp_path / "expected")


@pytest.mark.parametrize("image_format", ["png", "npz"])
def test_an_unfinished_run_goes_on_with_more_images(checkpoint, tmp_path, monkeypatch, image_format):
    options = ["--format", image_format, "--num_stages", "1"]
    run(checkpoint, tmp_path / "expected", *options, *MORE)
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "finish", lambda self, **details: None)
        with pytest.raises(FileNotFoundError, match="manifest.json"):
            run(checkpoint, tmp_path / "samples", *options, *FEWER)
    run(checkpoint, tmp_path / "samples", *options, *MORE)
    assert contents(tmp_path / "samples") == contents(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["png", "npz"])
def test_a_run_that_is_killed_while_it_goes_on_with_more_images(checkpoint, tmp_path, monkeypatch, image_format):
    """Before each of its files in turn is put in its place; then either number of images can follow, or is refused."""
    options = ["--format", image_format, "--num_stages", "1"]
    for name, number in {"fewer": FEWER, "more": MORE}.items():
        run(checkpoint, tmp_path / name, *options, *number)
    replace = os.replace
    for number in range(1, 100):
        published = []

        def replace_some(source, target, published=published, number=number):
            published.append(target)
            if len(published) == number:
                raise Killed
            replace(source, target)

        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "fewer", folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            try:
                run(checkpoint, folder, *options, *MORE)
                break
            except Killed:
                pass
        if (folder / "manifest.json").exists():  # it is still what it was
            run(checkpoint, folder, *options, *FEWER)
            assert contents(folder) == contents(tmp_path / "fewer"), number
        elif (folder / "samples.npz").exists():
            assert (folder / "samples.npz").read_bytes() == (tmp_path / "more" / "samples.npz").read_bytes(), number
        run(checkpoint, folder, *options, *MORE)
        assert contents(folder) == contents(tmp_path / "more"), number
    assert number > 7


def test_a_damaged_finished_run_goes_on_with_more_images(checkpoint, references, tmp_path):
    for name, finished in references.items():
        shutil.copytree(finished, tmp_path / name)
        path = next((tmp_path / name).glob("samples.npz" if name == "npz" else "000004.png"))
        path.write_bytes(path.read_bytes()[:-1])
        run(checkpoint, tmp_path / name, "--format", name, "--num_images", "8")
        run(checkpoint, tmp_path / f"{name}-expected", "--format", name, "--num_images", "8")
        assert contents(tmp_path / name) == contents(tmp_path / f"{name}-expected")


def test_names_of_as_many_digits(tmp_path):
    """Files are sorted by name: those of a million images and of more cannot be together."""
    settings = {"num_images": 1_000_000, "batch_size": 1_000_000, "format": "png"}
    more = {**settings, "num_images": 1_000_001}
    folder = SampleFolder(tmp_path, more, np.zeros(1_000_001, np.int64))
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": settings, "sha256": "", "versions": []}))
    with pytest.raises(ValueError, match=says("`num_images` = 1000001", "got 1000000")):
        folder.open()


def test_two_commands_in_one_folder(checkpoint, finished):
    before = contents(finished)
    with in_use(finished), pytest.raises(ValueError, match=says("`output_dir`", "in use by another", str(finished))):
        run(checkpoint, finished, "--format", finished.name)
    run(checkpoint, finished, "--format", finished.name)
    assert contents(finished) == before


def test_what_a_killed_process_was_writing_is_removed(checkpoint, finished, tmp_path):
    (tmp_path / "samples" / "chunks").mkdir(parents=True)
    (tmp_path / "samples" / "chunks" / f".unfinished-{2**22 + 1}-000000.npy").write_bytes(b"half")
    run(checkpoint, tmp_path / "samples", "--format", finished.name)
    assert contents(tmp_path / "samples") == contents(finished)


@pytest.fixture
def unfinished(checkpoint, tmp_path, monkeypatch):
    """A function that makes a run with all of its chunks, and no more, in a folder."""

    def make(image_format: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(SampleFolder, "finish", lambda self, **details: None)
            with pytest.raises(FileNotFoundError, match="manifest.json"):
                run(checkpoint, tmp_path / "samples", "--format", image_format)
        return tmp_path / "samples"

    return make


def test_what_is_there_is_not_sampled_again(checkpoint, finished, tmp_path, monkeypatch):
    calls = []
    call = DoDPipeline.__call__

    def counted(self, *args, **kwargs):
        if len(calls) == 2:
            raise RuntimeError("the third chunk")
        calls.append(list(kwargs["sample_indices"]))
        return call(self, *args, **kwargs)

    folder = tmp_path / "samples"
    with monkeypatch.context() as patch:
        patch.setattr(DoDPipeline, "__call__", counted)
        with pytest.raises(RuntimeError, match="the third chunk"):
            run(checkpoint, folder, "--format", finished.name)
        assert calls == [[0, 1, 2], [3, 4, 5]] and not (folder / "manifest.json").exists()
        calls.clear()
        run(checkpoint, folder, "--format", finished.name)
        assert calls == [[6]]
        calls[:] = [None, None]
        run(checkpoint, folder, "--format", finished.name)  # a finished run ends at once
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("png", "cut"),
        ("png", "changed"),
        ("png", "gone"),
        ("npy", "cut"),
        ("npy", "gone"),
        ("json", "cut"),
        ("json", "gone"),
    ],
)
def test_a_damaged_chunk_is_sampled_again(checkpoint, references, unfinished, monkeypatch, kind, damage):
    image_format = "npz" if kind == "npy" else "png"
    folder = unfinished(image_format)
    path = folder / "000004.png" if kind == "png" else folder / "chunks" / f"000001.{kind}"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        content[-20] ^= 1
        path.write_bytes(content)
    chunks = []
    write = SampleFolder.write
    monkeypatch.setattr(SampleFolder, "write", lambda self, *args: (chunks.append(args[0]), write(self, *args)))
    run(checkpoint, folder, "--format", image_format)
    assert chunks == [1] and contents(folder) == contents(references[image_format])


@pytest.mark.parametrize("name", ["samples.npz", "000002.png", "labels.txt"])
def test_a_damaged_finished_run_is_repaired(checkpoint, references, tmp_path, caplog, name):
    finished = references["npz" if name == "samples.npz" else "png"]
    folder = tmp_path / "samples"
    run(checkpoint, folder, "--format", finished.name)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        run(checkpoint, folder, "--format", finished.name)
    assert "does not hold the images of its manifest" in caplog.text
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("seed", ["--seed", "6"]),
        ("num_images", ["--num_images", "6"]),
        ("batch_size", ["--batch_size", "4"]),
        ("labels", ["--labels", "balanced"]),
        ("dtype", ["--dtype", "bfloat16"]),
        ("guidance_scale", ["--guidance_scale", "2.5"]),
        ("stage_solvers", ["--stage_solvers", "euler", "heun"]),
        ("height", ["--height", "20"]),
        ("format", ["--format", "npz"]),
    ],
)
def test_other_settings_are_refused(checkpoint, references, name, arguments):
    before = contents(references["png"])
    with pytest.raises(ValueError, match=says("`output_dir`", f"`{name}`", "another folder")):
        run(checkpoint, references["png"], *arguments)
    assert contents(references["png"]) == before


@pytest.mark.parametrize("image_format", ["png", "npz"])
def test_an_unfinished_run_of_other_settings_is_refused(checkpoint, unfinished, image_format):
    folder = unfinished(image_format)
    with pytest.raises(ValueError, match=says("`output_dir`", "`seed` = 6", "got 5", "another folder")):
        run(checkpoint, folder, "--format", image_format, "--seed", "6")


def test_another_checkpoint_is_refused(references, tmp_path):
    tiny_pipeline(default_num_inference_steps=3).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=says("`checkpoint_sha256`")):
        run(tmp_path / "checkpoint", references["png"], "--num_inference_steps", "2")


def test_defaults_that_are_given_are_the_same_settings(checkpoint, references):
    given = ["--num_stages", "2", "--num_inference_steps", "2", "--guidance_scale", "2", "--height", "16"]
    run(checkpoint, references["npz"], "--format", "npz", *given)


def test_a_folder_of_something_else_is_refused(checkpoint, tmp_path):
    (tmp_path / "000000.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=says("`output_dir`", "empty")):
        run(checkpoint, tmp_path)
    assert (tmp_path / "000000.png").read_bytes() == b"mine"


def test_options_that_the_pipeline_refuses_leave_a_folder_that_can_be_used(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=says("`channels` of `guidance`", "[1, 4]", "9")):
        run(checkpoint, tmp_path / "samples", "--guidance_channels", "9")
    assert run(checkpoint, tmp_path / "samples")["num_images"] == NUM_IMAGES


def test_all_stages(checkpoint, finished, tmp_path):
    """The last one is that of a run of its own, and so is the first one."""
    run(checkpoint, tmp_path / "all", "--format", finished.name, "--all_stages")
    run(checkpoint, tmp_path / "first", "--format", finished.name, "--num_stages", "1")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"stage-1", "stage-2"}
    assert json.loads((tmp_path / "all" / "stage-1" / "manifest.json").read_text())["settings"]["stage"] == 1
    np.testing.assert_array_equal(read_images(tmp_path / "all" / "stage-1"), read_images(tmp_path / "first"))
    np.testing.assert_array_equal(read_images(tmp_path / "all" / "stage-2"), read_images(finished))
    with pytest.raises(ValueError, match=says("`output_dir`", "`all_stages`")):
        run(checkpoint, finished, "--format", finished.name, "--all_stages")


def test_the_images_of_both_formats_are_equal(checkpoint, tmp_path):
    for name in ("png", "npz"):
        run(checkpoint, tmp_path / name, "--format", name, "--labels", "balanced", "--width", "20")
    images = read_images(tmp_path / "png")
    assert images.shape == (7, 16, 20, 3)
    np.testing.assert_array_equal(images, read_images(tmp_path / "npz"))
    assert read_labels(tmp_path / "png") == read_labels(tmp_path / "npz") == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["png", "npz"])
def test_samples_of_no_class(checkpoint, tmp_path, name):
    options = ("--format", name, "--labels", "null")
    run(checkpoint, tmp_path / name, *options, "--num_images", "3")
    run(checkpoint, tmp_path / name, *options)  # goes on with the others
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    expected = [
        pipeline([None] * len(part), seed=5, sample_indices=part, output_type="np").images
        for part in (range(3), range(3, 6), range(6, 7))
    ]
    np.testing.assert_array_equal(read_images(tmp_path / name), np.round(255 * np.concatenate(expected)))
    samples = open_images(str(tmp_path / name))
    assert samples.labels is None and samples.num_classes is None and len(samples) == 7
    assert json.loads((tmp_path / name / "manifest.json").read_text())["labels"] is None
    assert not (tmp_path / name / "labels.txt").exists()


def test_options_reach_the_pipeline(checkpoint, tmp_path):
    options = "--stage_inference_steps 1 3 --stage_solvers heun euler_maruyama --stage_guidance_scales 1.5 3"
    options += " --guidance_interval 0.1 0.9 --guidance_rescale 0.5 --null_condition class --num_images 3"
    run(checkpoint, tmp_path / "samples", *options.split(), "--dtype", "bfloat16")
    pipeline = DoDPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        draw_labels("random", 5, 3, 10).tolist(),
        seed=5,
        num_inference_steps=[1, 3],
        schedulers=["heun", "euler_maruyama"],
        guidance_scale=[1.5, 3.0],
        guidance=Guidance(interval=(0.1, 0.9), rescale=0.5, null_condition="class"),
        output_type="np",
    ).images
    np.testing.assert_array_equal(read_images(tmp_path / "samples"), np.round(255 * expected))


def test_a_weaker_model_is_the_guide(checkpoint, tmp_path):
    weak = tiny_pipeline(transformer=tiny_transformer(seed=7))
    weak.save_pretrained(tmp_path / "weak")
    options = ["--stage_guidance_scales", "2", "3", "--num_images", "2", "--guidance_model", str(tmp_path / "weak")]
    manifest = run(checkpoint, tmp_path / "samples", *options)
    assert manifest["settings"]["guidance_model_sha256"] == checkpoint_sha256(tmp_path / "weak")
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        draw_labels("random", 5, 2, 10).tolist(),
        seed=5,
        guidance_scale=[2.0, 3.0],
        guidance=Guidance(transformer=weak.transformer),
        output_type="np",
    ).images
    np.testing.assert_array_equal(read_images(tmp_path / "samples"), np.round(255 * expected))
    options[-1] = str(checkpoint)
    with pytest.raises(ValueError, match=says("`output_dir`", "guidance_model_sha256")):
        run(checkpoint, tmp_path / "samples", *options)


def test_a_token_prior_takes_the_place_of_stage_1(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tiny_pipeline(token_prior=tiny_token_prior(), default_num_stages=3).save_pretrained(checkpoint)
    options = ["--use_token_prior", "--token_prior_num_inference_steps", "3", "--token_prior_guidance_scale", "2"]
    options += ["--stage_inference_steps", "1", "2", "--num_images", "2", "--all_stages"]
    run(checkpoint, tmp_path / "samples", *options)
    assert sorted(path.name for path in (tmp_path / "samples").glob("stage-*")) == ["stage-2", "stage-3"]
    settings = json.loads((tmp_path / "samples/stage-3/manifest.json").read_text())["settings"]
    assert settings["token_prior_num_inference_steps"] == 3 and settings["token_prior_guidance_scale"] == 2
    assert settings["token_prior_truncation"] == 1 and settings["first_stage_guidance_scale"] is None
    assert settings["use_token_prior"] is True and settings["stage_solvers"] == ["euler", "euler"]
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        draw_labels("random", 5, 2, 10).tolist(),
        seed=5,
        num_inference_steps=[1, 2],
        use_token_prior=True,
        token_prior_num_inference_steps=3,
        token_prior_guidance_scale=2.0,
        output_type="np",
        return_stages=True,
    ).stages
    for stage, images in zip((2, 3), expected, strict=True):
        np.testing.assert_array_equal(read_images(tmp_path / f"samples/stage-{stage}"), np.round(255 * images))
    with pytest.raises(ValueError, match=says("`output_dir`", "`token_prior_truncation` = 0.5", "got 1.0")):
        run(checkpoint, tmp_path / "samples", *options, "--token_prior_truncation", "0.5")


def test_a_pipeline_without_a_token_prior_is_refused_before_anything_is_written(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=says("`use_token_prior`", "without a `token_prior`")):
        run(checkpoint, tmp_path / "samples", "--use_token_prior")
    assert not (tmp_path / "samples").exists()


def test_samples_from_before_an_option_had_its_default(checkpoint, references, tmp_path):
    shutil.copytree(references["png"], tmp_path / "samples")
    path = tmp_path / "samples/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"settings": {**manifest["settings"], "use_token_prior": None}}))
    with pytest.raises(ValueError, match=says("`use_token_prior` = False", "got None")):
        run(checkpoint, tmp_path / "samples", "--format", "png")
    del manifest["settings"]["use_token_prior"]
    path.write_text(json.dumps(manifest))
    assert run(checkpoint, tmp_path / "samples", "--format", "png") == manifest
    more = run(checkpoint, tmp_path / "samples", "--format", "png", "--num_images", "8")["settings"]
    assert more == {**manifest["settings"], "num_images": 8, "use_token_prior": False}


@pytest.mark.parametrize(
    ("options", "guidance_scale"),
    [
        ("", None),
        ("--guidance_scale 4", 4.0),
        ("--first_stage_guidance_scale 1.5", [1.5, None, None]),
        ("--first_stage_guidance_scale 1.5 --guidance_scale 4", [1.5, 4.0, 4.0]),
        ("--stage_guidance_scales 2 3 4", (2.0, 3.0, 4.0)),
        ("--use_token_prior --guidance_scale 4", 4.0),
        ("--use_token_prior --stage_guidance_scales 3 4", (3.0, 4.0)),
    ],
)
def test_scales_of_the_command_as_those_of_a_call(options, guidance_scale):
    required = ["--pretrained_model_name_or_path", "pipe", "--output_dir", "samples"]
    call = parse_options(SamplingOptions, [*required, *options.split()]).call
    assert call.to_call(3)["guidance_scale"] == guidance_scale
    if guidance_scale in (None, 4.0):
        assert call.to_call(1)["guidance_scale"] == guidance_scale


def test_without_a_latent_embedder_there_is_no_scale_of_stage_1(tmp_path):
    folder, path = tmp_path / "samples", tmp_path / "samples/manifest.json"
    tiny_pipeline(latent_embedder=None).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=says("`first_stage_guidance_scale`", "without a latent embedder", "got 1.7")):
        run(tmp_path / "pipeline", folder, "--first_stage_guidance_scale", "1.7")
    assert not folder.exists()
    manifest = run(tmp_path / "pipeline", folder)
    assert manifest["settings"]["first_stage_guidance_scale"] is None
    # Earlier versions recorded a scale that nothing used.
    old = manifest | {"settings": {**manifest["settings"], "first_stage_guidance_scale": 1.0}}
    path.write_text(json.dumps(old))
    assert run(tmp_path / "pipeline", folder) == old
    assert run(tmp_path / "pipeline", folder, "--num_images", "8")["settings"]["num_images"] == 8


@pytest.mark.parametrize(
    ("name", "value"), [("stage_solvers", "heun"), ("stage_inference_steps", "3"), ("stage_guidance_scales", "2")]
)
def test_values_of_the_stages_are_as_many_as_the_checkpoint_has(checkpoint, tmp_path, name, value):
    with pytest.raises(ValueError, match=says(f"`{name}` must hold 2 values", "got 1")):
        run(checkpoint, tmp_path / "samples", f"--{name}", value)


@pytest.mark.parametrize("options", [["--use_token_prior"], ["--num_stages", "1"]])
def test_noise_of_priors_that_no_stage_sees(checkpoint, tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        run(checkpoint, tmp_path / "samples", "--prior_noise", "0.3", *options)
    assert "`prior_noise` must be 0 with" in capsys.readouterr().err
    tiny_pipeline(default_num_stages=1).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=says("`prior_noise` must be 0 with one stage, got 0.3")):
        run(tmp_path / "pipeline", tmp_path / "samples", "--prior_noise", "0.3")
    assert not (tmp_path / "samples").exists()


def test_all_errors_of_options_are_reported_at_once(checkpoint, tmp_path, capsys):
    options = "--num_images 0 --batch_size 0 --seed -1 --num_stages 0 --num_inference_steps 0 --guidance_scale -1"
    options += " --guidance_interval 1 0 --stage_guidance_scales 1 nan 2 --height 0"
    with pytest.raises(SystemExit):
        run(checkpoint, tmp_path, *options.split())
    message = capsys.readouterr().err
    for name in ("num_images", "batch_size", "seed", "num_stages", "num_inference_steps", "guidance_scale", "height"):
        assert f"`{name}`" in message
    assert "`guidance_interval`" in message and message.count("`stage_guidance_scales`") == 3
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_an_error(tmp_path):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(torch.nan)
    pipeline.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(FloatingPointError, match=says("stage", "finite", "3 of 3", "of index 0, 1, 2")):
        run(tmp_path / "checkpoint", tmp_path / "samples")
    assert not (tmp_path / "samples" / "manifest.json").exists()


def test_rounding():
    values = np.array([0, 0.4999 / 255, 1.5 / 255, 2.5 / 255, 254.6 / 255, 1]).reshape(1, 2, 1, 3)
    assert to_uint8(values).ravel().tolist() == [0, 0, 2, 2, 255, 255]
    for value in (np.nan, -0.01, 1.01):
        with pytest.raises(ValueError, match="1 of 1"):
            to_uint8(np.where(values == 1, value, values))


def test_labels():
    assert draw_labels("balanced", 0, 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    labels = draw_labels("random", 0, 3000, 10)
    assert labels.dtype == np.int64 and (np.bincount(labels, minlength=10) > 230).all()  # 300 each, deviation 16
    assert (draw_labels("random", 0, 100, 10) == labels[:100]).all()
    assert (draw_labels("random", 1, 3000, 10) == labels).mean() < 0.2
    assert draw_labels("null", 0, 7, 3) is None


def test_memory_is_that_of_a_chunk(tmp_path):
    num_chunks, rng = 20, np.random.default_rng(0)
    num_images = 4 * num_chunks - 1
    settings = {"num_images": num_images, "batch_size": 4, "format": "npz"}
    folder = SampleFolder(tmp_path, settings, np.arange(num_images))
    folder.open()
    images = rng.integers(256, size=(num_images, 128, 128, 3), dtype=np.uint8)
    for chunk in range(num_chunks):
        folder.write(chunk, images[4 * chunk : 4 * chunk + 4], "cpu")
    tracemalloc.start()
    folder.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * images[:4].nbytes
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        assert file["arr_1"].tolist() == list(range(num_images))


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_chunk_is_written_while_the_next_is_sampled(checkpoint, tmp_path, monkeypatch, overlaps):
    """Either all chunks but the last wait until the next one is there, or each is written before."""
    options = ["--format", "npz", "--num_stages", "1", "--num_images", "5", "--batch_size", "2"]
    run(checkpoint, tmp_path / "expected", *options)
    num_sampled, num_written, sampled = 0, [], threading.Condition()
    call, write = DoDPipeline.__call__, SampleFolder.write

    def count_calls(*args, **kwargs):
        nonlocal num_sampled
        stages = call(*args, **kwargs)
        with sampled:
            num_sampled += 1
            sampled.notify_all()
        return stages

    def note_and_write(self, chunk, *args):
        with sampled:
            if overlaps and chunk < 2:
                assert sampled.wait_for(lambda: num_sampled > chunk + 1, PATIENCE_S)
            num_written.append((chunk, num_sampled))
        write(self, chunk, *args)

    monkeypatch.setattr(DoDPipeline, "__call__", count_calls)
    monkeypatch.setattr(SampleFolder, "write", note_and_write)
    run(
        checkpoint,
        tmp_path / "samples",
        *options,
        "--write_while_sampling" if overlaps else "--no-write_while_sampling",
    )
    assert overlaps or num_written == [(0, 1), (1, 2), (2, 3)]
    assert contents(tmp_path / "samples") == contents(tmp_path / "expected")


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_an_image_that_cannot_be_written_ends_the_command(checkpoint, tmp_path, monkeypatch, chunk):
    write = SampleFolder.write

    def refuse(self, number, *args):
        if number == chunk:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, number, *args)

    options = ["--num_stages", "1", "--num_images", "5", "--batch_size", "2"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(SampleFolder, "write", refuse)
        run(checkpoint, tmp_path / "samples", *options)
    assert not (tmp_path / "samples" / "manifest.json").exists()
    run(checkpoint, tmp_path / "samples", *options)
    run(checkpoint, tmp_path / "expected", *options)
    assert contents(tmp_path / "samples") == contents(tmp_path / "expected")


def test_an_error_of_sampling_does_not_hide_that_of_writing(checkpoint, tmp_path, monkeypatch, capsys):
    call = DoDPipeline.__call__

    def fail_later(self, *args, sample_indices, **kwargs):
        if sample_indices.start:
            raise FloatingPointError("Samples are not finite")
        return call(self, *args, sample_indices=sample_indices, **kwargs)

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DoDPipeline, "__call__", fail_later)
    monkeypatch.setattr(SampleFolder, "write", refuse)
    monkeypatch.setattr(sys, "argv", ["sample_dod.py", *command(checkpoint, tmp_path / "samples")])
    with fresh_accelerator(), pytest.raises(SystemExit):
        run_main(main)
    errors = capsys.readouterr().err
    assert "error: Samples are not finite\nBefore that" in errors and "No space left on device" in errors


def test_a_chunk_that_is_missing_in_the_end_is_an_error(tmp_path):
    folder = SampleFolder(tmp_path, {"num_images": 3, "batch_size": 1, "format": "png"}, np.arange(3))
    folder.open()
    for chunk in (0, 2):
        folder.write(chunk, np.zeros((1, 4, 4, 3), np.uint8), "cpu")
    with pytest.raises(ValueError, match=says("`output_dir`", "share", "[1]")):
        folder.finish()


def test_several_versions_are_named(tmp_path, caplog):
    folder = SampleFolder(tmp_path, {"num_images": 2, "batch_size": 1, "format": "png"}, np.arange(2))
    folder.open()
    for chunk in range(2):
        folder.write(chunk, np.zeros((1, 4, 4, 3), np.uint8), "cpu")
    note = tmp_path / "chunks" / "000001.json"
    note.write_text(note.read_text().replace('"device": "cpu"', '"device": "another"'))
    with caplog.at_level(logging.WARNING):
        manifest = folder.finish()
    assert [versions["device"] for versions in manifest["versions"]] == ["cpu", "another"]
    assert "2 versions or devices" in caplog.text


SCRIPT = ROOT / "training" / "sample_dod.py"
# The command, which stops before its sixth chunk, to be killed there.
STOPS = """
import signal, sys
from diffusers_dod.evaluation import sample

write = sample.SampleFolder.write
sample.SampleFolder.write = lambda self, chunk, *args: signal.pause() if chunk == 5 else write(self, chunk, *args)
sample.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_restarted_on_two_processes(checkpoint, tmp_path):
    folder = tmp_path / "samples"
    many = ["--num_images", "61", "--batch_size", "2", "--num_inference_steps", "10", "--format", "npz"]
    arguments = command(checkpoint, folder, *many)
    with started([sys.executable, "-c", STOPS, *arguments], tmp_path / "output") as process:
        wait_until(lambda: len(list(folder.glob("chunks/0*.json"))) == 5, process)
    assert len(list(folder.glob("chunks/0*.json"))) == 5
    run_command([*torchrun(tmp_path / "logs"), SCRIPT, *arguments], tmp_path / "output")
    run(checkpoint, tmp_path / "one", *many)
    assert contents(folder) == contents(tmp_path / "one")


# The command, whose processes leave their error beside the output folder, and end as if there was none: torchrun would
# end the others.
NOTES_ERRORS = """
import os, sys
from pathlib import Path
from diffusers_dod.evaluation.sample import main

folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
try:
    main(sys.argv[1:])
except Exception as error:
    folder.with_name(f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [2000, 4])  # it fails between chunks, and after the last one
def test_an_error_of_writing_in_one_process_ends_all(checkpoint, tmp_path, num_images):
    folder, script = tmp_path / "samples", tmp_path / "script.py"
    (folder / "chunks" / "000001.json").mkdir(parents=True)  # the second process cannot write its note
    script.write_text(NOTES_ERRORS)
    arguments = command(checkpoint, folder, "--num_images", str(num_images))
    run_command([*torchrun(tmp_path / "logs"), script, *arguments], tmp_path / "output")
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert errors[0].startswith("OtherProcessError: Another process failed: ") and "000001.json" in errors[0]
    assert errors[1].startswith("IsADirectoryError: ") and "000001.json" in errors[1]
    found = {path.name for path in folder.glob("chunks/0*.json")}
    assert {"000001.json"} < found <= {f"{chunk:06d}.json" for chunk in range(4)}
