"""Settings beside each other: one file of results, a table and plots, resumable."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import says, tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from diffusers_dod import DoDPipeline
from diffusers_dod.evaluation import evaluate, sample, sweep
from diffusers_dod.evaluation.compute import sampling_compute
from diffusers_dod.evaluation.results import as_metric, checkpoint_sha256, read_results
from diffusers_dod.losses import DoDJointModel


EXTRACTOR = """
import torch
from diffusers_dod.evaluation.extractors import PictureFeatures

def extractor(pictures):
    small = torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 1).flatten(1) / 255
    return PictureFeatures(small, logits=10 * small)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline = tiny_pipeline(default_guidance_scale=2.0)
    with torch.no_grad():  # or all images would be the noise
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extractor") / "features.py"
    path.write_text(EXTRACTOR)
    return path


def run(folder: Path, checkpoint: Path, extractor: Path, *arguments: object) -> dict:
    side = DoDPipeline.from_pretrained(checkpoint).transformer.config.sample_size
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    resolution = side * pipeline.vae_scale_factor
    options = ["--pretrained_model_name_or_path", checkpoint, "--reference", "textures:24:5", "--extractor"]
    options += [f"{extractor}:extractor", "--resolution", resolution, "--num_images", 10, "--batch_size", 5]
    options += ["--num_groups", 2, "--output_dir", folder]
    sweep.main([*map(str, options), *map(str, arguments)])
    return read_results(folder / "sweep.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint, extractor) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    grid = ["--guidance_scales", 1, 3, "--num_inference_steps", 1, 2, "--seeds", 0, 1]
    run(folder, checkpoint, extractor, *grid, "--metrics", "fid", "is", "precision_recall")
    return folder


def test_every_setting_has_its_numbers(finished):
    results = read_results(finished / "sweep.json")
    labels = {name.split("/", 1)[1] for name in results["metrics"]}
    stage_2 = {f"stage-2/pipeline/{steps}/euler/{scale}" for steps in (1, 2) for scale in (1.0, 3.0)}
    assert labels == stage_2 | {f"stage-1/pipeline/{steps}/euler/1.0" for steps in (1, 2)}
    assert {name.split("/", 1)[0] for name in results["metrics"]} == {"fid", "is", "precision", "recall"}
    assert len(results["metrics"]) == 4 * len(labels)
    assert len({metric["value"] for name, metric in results["metrics"].items() if name.startswith("fid")}) == 6
    assert not (finished / "samples").exists()


def test_a_number_is_that_of_the_two_commands(finished, checkpoint, extractor, tmp_path):
    path = finished / "settings" / "pipeline_2_euler_3.0_1_stage-2.json"
    arguments = ["--num_images", "10", "--batch_size", "5", "--labels", "balanced", "--seed", "1", "--format", "npz"]
    arguments += ["--num_stages", "2", "--num_inference_steps", "2", "--guidance_scale", "3"]
    where = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "samples")]
    sample.main([*arguments, *where])
    judged = read_results(path)["argv"]
    judged = [str(tmp_path / "samples" / "samples.npz"), *judged[1:-1], str(tmp_path / "results.json")]
    evaluate.main(judged)
    ours, expected = (read_results(file)["metrics"]["fid"]["value"] for file in (path, tmp_path / "results.json"))
    assert ours == pytest.approx(expected, rel=1e-6)
    of_seeds = read_results(finished / "sweep.json")["metrics"]["fid/stage-2/pipeline/2/euler/3.0"]
    assert of_seeds["seeds"][1] == ours and of_seeds["value"] == pytest.approx(np.mean(of_seeds["seeds"]))


def test_the_table_has_the_compute(finished, checkpoint):
    rows = [line.split("|")[1:-1] for line in (finished / "sweep.md").read_text().splitlines()[2:]]
    assert len(rows) == 6
    row = next(row for row in rows if [cell.strip() for cell in row[:5]] == ["2", "pipeline", "2", "euler", "3"])
    flops = sampling_compute(DoDPipeline.from_pretrained(checkpoint), [2, 2], [1.0, 3.0])["flops"]
    assert float(row[5]) == pytest.approx(flops / 1e9, rel=1e-3)


def test_plots(finished):
    for name in ("fid_scale", "fid_gflops", "precision_recall"):
        with Image.open(finished / f"{name}.png") as plot:
            assert plot.size == (840, 600) and len(plot.convert("RGB").getcolors(1 << 20)) > 20


def test_finished_settings_are_not_run_again(finished, checkpoint, extractor, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (finished / "settings").iterdir()}
    calls = []
    main = sample.main
    monkeypatch.setattr(sample, "main", lambda argv: (calls.append(argv), main(argv)))
    grid = ["--guidance_scales", 1, 3, "--num_inference_steps", 1, 2, "--seeds", 0, 1]
    results = run(finished, checkpoint, extractor, *grid, "--metrics", "fid", "is", "precision_recall")
    assert calls == [] and len(results["metrics"]) == 24
    missing = finished / "settings" / "pipeline_1_euler_1.0_0_stage-2.json"
    content = json.loads(missing.read_text())
    missing.unlink()
    run(finished, checkpoint, extractor, *grid, "--metrics", "fid", "is", "precision_recall")
    assert len(calls) == 1 and json.loads(missing.read_text())["metrics"] == content["metrics"]
    assert {path: path.stat().st_mtime_ns for path in before if "1.0_0" not in path.name}.items() <= before.items()


def test_a_changed_extractor_is_noticed(finished, checkpoint, extractor):
    before = extractor.read_text()
    try:
        extractor.write_text(before + "# changed")
        with pytest.raises(ValueError, match=says("`output_dir`", "`extractor_sha256`")):
            run(finished, checkpoint, extractor, "--metrics", "fid", "is", "precision_recall")
    finally:
        extractor.write_text(before)


def test_a_folder_of_another_sweep_is_refused(finished, checkpoint, extractor):
    with pytest.raises(ValueError, match=says("`output_dir`", "`num_groups` = 5", "with 2")):
        run(finished, checkpoint, extractor, "--metrics", "fid", "is", "precision_recall", "--num_groups", 5)


def test_another_average_of_a_training_checkpoint(tmp_path, checkpoint, extractor):
    trained = tmp_path / "checkpoint-1"
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    pipeline.save_pretrained(trained)
    model = DoDJointModel(pipeline.transformer, pipeline.latent_embedder)
    (trained / "training_state").mkdir()
    state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    save_file(state, trained / "training_state" / "ema-decay-0.9.safetensors")
    averages = ["--averages", "pipeline", "decay-0.9", "--num_inference_steps", 1, "--metrics", "fid"]
    results = run(tmp_path / "run", trained, extractor, *averages)
    values = {name: metric["value"] for name, metric in results["metrics"].items()}
    assert values["fid/stage-2/pipeline/1/euler/2.0"] != values["fid/stage-2/decay-0.9/1/euler/2.0"]
    saved = DoDPipeline.from_pretrained(tmp_path / "run" / "pipelines" / "decay-0.9").transformer.proj_out.weight
    torch.testing.assert_close(saved, 1.5 * pipeline.transformer.proj_out.weight)
    assert checkpoint_sha256(trained) == checkpoint_sha256(checkpoint)  # not of the training state
    save_file(model.state_dict(), trained / "training_state" / "ema-decay-0.9.safetensors")
    with pytest.raises(ValueError, match=says("`output_dir`", "`decay-0.9_sha256`")):
        run(tmp_path / "run", trained, extractor, *averages)
    with pytest.raises(ValueError, match=says("`averages`", "'pipeline', 'decay-0.9'", "got 'none'")):
        run(tmp_path / "other", trained, extractor, "--averages", "none", "--metrics", "fid")


def test_intervals_of_seeds():
    two = sweep.mean_over_seeds([as_metric(1.0, (0.5, 1.5)), as_metric(3.0)])
    assert two["value"] == 2 and two["interval"] == pytest.approx([2 - 12.706, 2 + 12.706], rel=1e-4)
    one = sweep.mean_over_seeds([as_metric(1.0, (0.5, 1.5))])
    assert one["value"] == 1 and one["interval"] == [0.5, 1.5]
    eleven = sweep.mean_over_seeds([as_metric(value) for value in range(11)])
    half = 2.2281 * np.std(range(11), ddof=1) / 11**0.5  # Student's t of 10 degrees of freedom
    assert eleven["interval"] == pytest.approx([5 - half, 5 + half], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--seeds", 0, 0, "--num_images", 1], ["`seeds` must hold different values", "`num_images`", ">= 2, got 1"]),
        (["--guidance_scales", -1], ["`guidance_scales`", "got -1"]),
        (["--num_inference_steps", 0], ["`num_inference_steps`", ">= 1, got 0"]),
    ],
)
def test_bad_options(tmp_path, checkpoint, extractor, capsys, arguments, fragments):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", checkpoint, extractor, *arguments)
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in fragments), message


def test_no_checkpoint(tmp_path, extractor, capsys):
    with pytest.raises(SystemExit):
        sweep.main(
            ["--pretrained_model_name_or_path", str(tmp_path), *"--reference a --extractor b --output_dir c".split()]
        )
    assert "`pretrained_model_name_or_path` must be the folder of a pipeline" in capsys.readouterr().err
