"""Settings beside each other: one file of results, a table and plots, resumable."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import says, tiny_pipeline, tiny_token_prior, tiny_transformer
from PIL import Image
from safetensors.torch import save_file

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline
from diffusers_dod.checkpoint_manifest import write_manifest
from diffusers_dod.compute import sampling_compute
from diffusers_dod.evaluation import evaluate, sample, sweep
from diffusers_dod.files import in_use
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import parse_options, replace_values, to_argv
from diffusers_dod.results import as_metric, checkpoint_sha256, read_results


EXTRACTOR = """
import torch
from diffusers_dod.metrics.extractors import ImageFeatures

def extractor(images):
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 1).flatten(1) / 255
    return ImageFeatures(small, logits=torch.cat([10 * small] * 3 + [small[:, :1]], dim=1))
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


def fids(metrics: dict) -> list[str]:
    """Names of the plain FIDs."""
    return [name for name in metrics if name.startswith("fid/")]


def run(folder: Path, checkpoint: Path, extractor: Path, *arguments: object, is_plotted: bool = False) -> dict:
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    resolution = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    options = ["--pretrained_model_name_or_path", checkpoint, "--reference", "textures:24:5", "--extractor"]
    options += [f"{extractor}:extractor", "--resolution", resolution, "--num_images", 10, "--batch_size", 5]
    options += ["--num_groups", 2, "--output_dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        if not is_plotted:  # that takes longer than the sampling
            patch.setattr(sweep, "draw_plots", lambda rows, folder: [])
        sweep.main([*map(str, options), *map(str, arguments)])
    return read_results(folder / "sweep.json")


GRID = ["--first_stage_guidance_scales", 1, 1.5, "--guidance_scales", 1, 3, "--num_inference_steps", 1, 2]
GRID += ["--seeds", 0, 1, "--metrics", "fid", "is", "precision_recall", "accuracy"]
STAGE_1, STAGE_2 = ("1", "1.5"), ("1:1", "1:3", "1.5:1", "1.5:3")


@pytest.fixture(scope="module")
def calls() -> dict[str, list]:
    """What the sweep `finished` has loaded, opened and sampled."""
    return {"extractor": [], "features": [], "sample": []}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint, extractor, calls) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    functions = {"extractor": (evaluate, "load_extractor"), "features": (evaluate, "compute_features")}
    functions["sample"] = (sample, "sample")
    with pytest.MonkeyPatch.context() as patch:
        for kind, (module, name) in functions.items():
            original = getattr(module, name)

            def count(*arguments, function=original, kind=kind, **options):
                calls[kind].append(arguments[0])
                return function(*arguments, **options)

            patch.setattr(module, name, count)
        run(folder, checkpoint, extractor, *GRID, is_plotted=True)
    return folder


def test_every_setting_has_its_numbers(finished):
    results = read_results(finished / "sweep.json")
    labels = {name.split("/", 1)[1] for name in results["metrics"]}
    stages = {1: STAGE_1, 2: STAGE_2}
    assert labels == {f"stage-{n}/pipeline/{steps}/euler/{s}" for n in stages for s in stages[n] for steps in (1, 2)}
    assert {name.split("/", 1)[0] for name in results["metrics"]} == {
        *("fid", "fid_corrected", "is", "precision", "recall", "accuracy")
    }
    assert len(results["metrics"]) == 6 * len(labels)
    assert len({metric["value"] for name, metric in results["metrics"].items() if name.startswith("fid/")}) == 12
    assert not (finished / "samples").exists()
    assert (
        results["data"]["reference"]["name"] == "textures:24:5" and len(results["settings"]["extractor_sha256"]) == 64
    )


def test_extractor_and_reference_are_looked_at_once_and_each_stage_of_a_setting_is_judged_once(finished, calls):
    assert len(calls["extractor"]) == 1
    names = [images.name for images in calls["features"]]
    assert names.count("textures:24:5") == 1 and len(names) == 1 + 2 * 2 * 6  # of 2 steps and 2 seeds
    assert len(set(names)) == len(names)
    assert len(calls["sample"]) == 2 * 2 * 4


@pytest.mark.parametrize("stage", [1, 2])
def test_a_number_is_that_of_the_two_commands(finished, checkpoint, stage, tmp_path):
    path = finished / "settings" / f"pipeline_2_euler_{('1.5', '1.5-3')[stage - 1]}_1_stage-{stage}.json"
    arguments = ["--num_images", "10", "--batch_size", "5", "--labels", "balanced", "--seed", "1", "--format", "npz"]
    arguments += ["--num_stages", str(stage), "--num_inference_steps", "2", "--first_stage_guidance_scale", "1.5"]
    arguments += ["--guidance_scale", "3"] if stage == 2 else []
    where = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "samples")]
    sample.main([*arguments, *where])
    ours = read_results(path)
    options = parse_options(evaluate.EvaluationOptions, ours["argv"])
    places = {"samples": str(tmp_path / "samples" / "samples.npz"), "output_file": tmp_path / "results.json"}
    evaluate.main(to_argv(replace_values(options, **places)))
    theirs = read_results(tmp_path / "results.json")
    assert ours["metrics"] == theirs["metrics"] and ours["settings"] == theirs["settings"]
    assert ours["data"]["reference"] == theirs["data"]["reference"]
    label = f"stage-{stage}/pipeline/2/euler/{('1.5', '1.5:3')[stage - 1]}"
    of_seeds = read_results(finished / "sweep.json")["metrics"][f"fid/{label}"]
    assert of_seeds["seeds"][1] == ours["metrics"]["fid"]["value"]
    assert of_seeds["value"] == pytest.approx(np.mean(of_seeds["seeds"]))


def test_the_table_has_scales_and_compute(finished, checkpoint):
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (finished / "sweep.md").read_text().splitlines()
    ]
    assert rows[0][:6] == ["stage", "average", "steps", "solver", "scales", "GFLOPs"] and rows[0][-1] == "accuracy"
    assert len(rows) == 2 + 12
    row = next(row for row in rows if row[:5] == ["2", "pipeline", "2", "euler", "1.5:3"])
    flops = sampling_compute(DoDPipeline.from_pretrained(checkpoint), [2, 2], [1.5, 3.0])["flops"]
    assert float(row[5]) == pytest.approx(flops / 1e9, rel=1e-3)


def test_a_token_prior_takes_the_place_of_stage_1(tmp_path, extractor, capsys):
    token_prior = tiny_token_prior(num_classes=10)
    pipeline = tiny_pipeline(token_prior=token_prior, default_num_stages=3, default_guidance_scale=2.0)
    pipeline.save_pretrained(tmp_path / "pipeline")
    options = ["--use_token_prior", "--token_prior_num_inference_steps", 2, "--metrics", "fid"]
    results = run(tmp_path / "run", tmp_path / "pipeline", extractor, *options, "--num_inference_steps", 1)
    assert fids(results["metrics"]) == ["fid/stage-2/pipeline/1/euler/2", "fid/stage-3/pipeline/1/euler/2:2"]
    assert results["settings"]["use_token_prior"] is True
    row = (tmp_path / "run/sweep.md").read_text().splitlines()[-1].split("|")
    cost = sampling_compute(pipeline, [1, 1], [2.0, 2.0], use_token_prior=True, token_prior_num_inference_steps=2)
    assert float(row[6]) == pytest.approx(cost["flops"] / 1e9, rel=1e-3)
    with pytest.raises(ValueError, match=says("`output_dir`", "`use_token_prior` = False", "True")):
        run(tmp_path / "run", tmp_path / "pipeline", extractor, "--metrics", "fid")
    with pytest.raises(SystemExit):
        run(tmp_path / "run", tmp_path / "pipeline", extractor, *options, "--first_stage_guidance_scales", 2)
    assert "`first_stage_guidance_scales` must not be given with `use_token_prior`" in capsys.readouterr().err


def test_plots(finished):
    for name in ("fid_scale", "fid_gflops", "precision_recall"):
        with Image.open(finished / f"{name}.png") as plot:
            assert plot.size == (840, 600) and len(plot.convert("RGB").getcolors(1 << 20)) > 20


def test_finished_settings_are_not_run_again(finished, checkpoint, extractor, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (finished / "settings").iterdir()}
    calls = []
    function = sample.sample
    monkeypatch.setattr(sample, "sample", lambda *args: (calls.append(args[0].call.num_stages), function(*args))[1])
    results = run(finished, checkpoint, extractor, *GRID)
    assert calls == [] and len(results["metrics"]) == 72
    missing = [finished / "settings" / f"pipeline_1_euler_{name}.json" for name in ("1-1_0_stage-2", "1.5_0_stage-1")]
    contents = [json.loads(path.read_text())["metrics"] for path in missing]
    for path in missing:
        path.unlink()
    run(finished, checkpoint, extractor, *GRID)
    assert calls == [2, 1]
    assert [json.loads(path.read_text())["metrics"] for path in missing] == contents
    assert {path: path.stat().st_mtime_ns for path in before if path not in missing}.items() <= before.items()


def test_a_second_judge_takes_the_kept_samples(tmp_path, finished, checkpoint, extractor, monkeypatch):
    kept = ["--samples_dir", tmp_path / "samples"]
    grid = ["--guidance_scales", 1, 3, "--num_inference_steps", 2, "--metrics", "fid", "is", *kept]
    first = run(tmp_path / "first", checkpoint, extractor, *grid)["metrics"]
    other = tmp_path / "other.py"
    other.write_text(EXTRACTOR.replace("/ 255", "/ 51"))
    monkeypatch.setattr(DoDPipeline, "__call__", None)  # nothing is sampled
    second = run(tmp_path / "second", checkpoint, other, *grid)["metrics"]
    assert first.keys() == second.keys()
    for name in fids(first):
        assert second[name]["value"] == pytest.approx(25 * first[name]["value"], rel=1e-6)
        assert first[name]["value"] == read_results(finished / "sweep.json")["metrics"][name]["seeds"][0]
    with pytest.raises(ValueError, match=says("`samples_dir`", "`prior_noise`")):
        run(tmp_path / "third", checkpoint, other, *grid, "--prior_noise", 0.5)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tmp_path, checkpoint, extractor, finished, monkeypatch):
    """At any file that is put in its place, of one setting of two stages."""
    grid = [
        "--guidance_scales",
        3,
        "--num_inference_steps",
        2,
        "--metrics",
        "fid",
        "is",
        "precision_recall",
        "accuracy",
    ]
    expected = read_results(finished / "settings" / "pipeline_2_euler_1-3_0_stage-2.json")["metrics"]["fid"]["value"]
    replace, published = os.replace, []
    for number in range(1, 100):
        published.clear()

        def replace_some(source, target, number=number):
            published.append(target)
            if len(published) == number:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            try:
                run(tmp_path / str(number), checkpoint, extractor, *grid)
                break
            except KeyboardInterrupt:
                pass
        results = run(tmp_path / str(number), checkpoint, extractor, *grid)
        assert results["metrics"]["fid/stage-2/pipeline/2/euler/1:3"]["value"] == expected
        assert len(results["metrics"]) == 12 and not (tmp_path / str(number) / "samples").exists()
    assert number > 15


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--reference", "textures:24:5", "--resolution", 8], ["`reference`", "(16, 16)", "got (8, 8)"]),
        (["--metrics", "fid", "sfid"], ["`extractor`", "`spatial_features` for `sfid`"]),
        (["--metrics", "fid", "accuracy"], ["`extractor`", "4 classes", "got 10"]),
        (["--metrics", "fid", "accuracy", "--labels", "null"], ["`samples`", "class ids", "got none"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(tmp_path, extractor, monkeypatch, options, fragments):
    tiny_pipeline(transformer=tiny_transformer(num_classes=4), id2label=None).save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(sample, "sample", None)
    with pytest.raises(ValueError, match=says(*fragments)):
        run(tmp_path / "run", tmp_path / "pipeline", extractor, *options)


def test_two_sweeps_in_one_folder(finished, checkpoint, extractor):
    before = (finished / "sweep.json").read_bytes()
    with in_use(finished), pytest.raises(ValueError, match=says("`output_dir`", "in use by another", str(finished))):
        run(finished, checkpoint, extractor, *GRID)
    assert (finished / "sweep.json").read_bytes() == before


def test_one_stage_has_the_first_scales_only(tmp_path, finished, checkpoint, extractor, capsys):
    options = [
        "--num_stages",
        1,
        "--first_stage_guidance_scales",
        1,
        1.5,
        "--num_inference_steps",
        2,
        "--metrics",
        "fid",
    ]
    metrics = run(tmp_path / "run", checkpoint, extractor, *options)["metrics"]
    assert fids(metrics) == ["fid/stage-1/pipeline/2/euler/1", "fid/stage-1/pipeline/2/euler/1.5"]
    of_both = read_results(finished / "sweep.json")["metrics"]
    assert all(metric["value"] == of_both[name]["seeds"][0] for name, metric in metrics.items())
    # A sweep of more stages goes on from there.
    options[1:2], options[4:5] = [2], []
    metrics = run(tmp_path / "run", checkpoint, extractor, *options)["metrics"]
    assert metrics["fid/stage-2/pipeline/2/euler/1:2"]["value"] > 0  # the checkpoint's scale of later stages
    with pytest.raises(SystemExit):
        run(tmp_path / "other", checkpoint, extractor, "--num_stages", 1, "--guidance_scales", 2)
    message = capsys.readouterr().err
    assert "`guidance_scales` must not be given for one stage" in message and "got [2.0]" in message


def test_a_pipeline_without_a_latent_embedder(tmp_path, extractor, capsys):
    tiny_pipeline(latent_embedder=None).save_pretrained(tmp_path / "pipeline")
    folders = {name: tmp_path / name for name in ("guidance_scales", "first_stage_guidance_scales")}
    found = [run(folders[name], tmp_path / "pipeline", extractor, f"--{name}", 1, 2)["metrics"] for name in folders]
    assert fids(found[0]) == ["fid/stage-1/pipeline/2/euler/1", "fid/stage-1/pipeline/2/euler/2"]
    assert found[0] == found[1]  # both are the scale of the only stage
    values = [found[0][name]["value"] for name in fids(found[0])]
    default = run(tmp_path / "default", tmp_path / "pipeline", extractor)["metrics"]
    assert fids(default) == ["fid/stage-1/pipeline/2/euler/2"] and default[fids(default)[0]]["value"] == values[1]
    with pytest.raises(SystemExit):
        run(tmp_path / "other", tmp_path / "pipeline", extractor, *GRID, "--num_stages", 2)
    message = capsys.readouterr().err
    assert "`guidance_scales` must not be given" not in message and "`num_stages` must be 1 without" in message
    with pytest.raises(SystemExit):
        run(tmp_path / "other", tmp_path / "pipeline", extractor, *GRID)
    assert "`guidance_scales` must not be given for one stage" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", [DoDFlowMatchScheduler(solver="heun"), FlowMatchEulerDiscreteScheduler()])
def test_the_default_solver_is_the_checkpoints(tmp_path, extractor, scheduler):
    tiny_pipeline(scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    metrics = run(tmp_path / "run", tmp_path / "pipeline", extractor)["metrics"]
    name = scheduler.config.get("solver", "FlowMatchEulerDiscreteScheduler")
    assert fids(metrics) == [f"fid/stage-1/pipeline/2/{name}/1", f"fid/stage-2/pipeline/2/{name}/1:2"]
    assert "GFLOPs" in (tmp_path / "run" / "sweep.md").read_text()


def test_a_changed_extractor_is_noticed(finished, checkpoint, extractor):
    before = extractor.read_text()
    try:
        extractor.write_text(before + "# changed")
        with pytest.raises(ValueError, match=says("`output_dir`", "`extractor_sha256`")):
            run(finished, checkpoint, extractor, *GRID)
    finally:
        extractor.write_text(before)


def test_a_folder_of_another_sweep_is_refused(finished, checkpoint, extractor):
    with pytest.raises(ValueError, match=says("`output_dir`", "`num_groups` = 5", "with 2")):
        run(finished, checkpoint, extractor, *GRID, "--num_groups", 5)


def test_another_average_of_a_training_checkpoint(tmp_path, checkpoint, extractor):
    trained = tmp_path / "checkpoint-1"
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    pipeline.save_pretrained(trained)
    model = DoDJointModel(pipeline.transformer, pipeline.latent_embedder)
    (trained / "training_state").mkdir()
    state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    save_file(state, trained / "training_state" / "ema-decay-0.9.safetensors")
    write_manifest(trained, 1)
    averages = ["--averages", "pipeline", "decay-0.9", "--num_inference_steps", 1, "--metrics", "fid"]
    results = run(tmp_path / "run", trained, extractor, *averages)
    values = {name: metric["value"] for name, metric in results["metrics"].items()}
    assert values["fid/stage-2/pipeline/1/euler/1:2"] != values["fid/stage-2/decay-0.9/1/euler/1:2"]
    saved = DoDPipeline.from_pretrained(tmp_path / "run" / "pipelines" / "decay-0.9").transformer.proj_out.weight
    torch.testing.assert_close(saved, 1.5 * pipeline.transformer.proj_out.weight)
    assert checkpoint_sha256(trained) == checkpoint_sha256(checkpoint)  # not of the training state
    save_file(model.state_dict(), trained / "training_state" / "ema-decay-0.9.safetensors")
    with pytest.raises(ValueError, match=says("`output_dir`", "`decay-0.9_sha256`")):
        run(tmp_path / "run", trained, extractor, *averages)
    with pytest.raises(ValueError, match=says("`averages`", "'pipeline', 'decay-0.9'", "got 'none'")):
        run(tmp_path / "other", trained, extractor, "--averages", "none", "--metrics", "fid")


def test_how_it_is_guided_is_handed_on(tmp_path, finished, checkpoint, extractor, capsys):
    def sweep_with(name: str, *options: object) -> tuple[dict[str, float], list[str]]:
        capsys.readouterr()
        results = run(tmp_path / name, checkpoint, extractor, *fixed, *options)
        last_row = capsys.readouterr().out.splitlines()[-1]
        return {label: metric["value"] for label, metric in results["metrics"].items()}, last_row.split(" | ")

    fixed = ["--guidance_scales", 3, "--num_inference_steps", 2, "--metrics", "fid"]
    first, last = "fid/stage-1/pipeline/2/euler/1", "fid/stage-2/pipeline/2/euler/1:3"
    values, row = sweep_with("default")
    without_prior, row_without_prior = sweep_with("class", "--null_condition", "class")
    never, row_never = sweep_with("never", "--guidance_interval", 0, 0)
    assert values[first] == without_prior[first] == never[first]
    assert len({values[last], without_prior[last], never[last]}) == 3
    unguided = read_results(finished / "settings" / "pipeline_2_euler_1-1_0_stage-2.json")["metrics"]["fid"]["value"]
    assert never[last] == pytest.approx(unguided, abs=1e-6)
    assert float(row_never[5]) < float(row[5]) and row_without_prior[5] == "-"
    with pytest.raises(ValueError, match=says("`output_dir`", "`null_condition` = 'prior'", "with 'class'")):
        sweep_with("class", "--null_condition", "prior")
    weaker, row_weaker = sweep_with("weaker", "--guidance_model", checkpoint)  # the same model: no guidance at all
    assert weaker[last] == pytest.approx(unguided, abs=1e-6) and float(row_weaker[5]) > float(row[5])  # with a prior
    with pytest.raises(ValueError, match=says("`output_dir`", "`guidance_model_sha256` = None")):
        sweep_with("weaker")
    path = tmp_path / "default" / "options.json"  # as sweeps had it before these options
    old = json.loads(path.read_text())
    del old["prior_noise"], old["guidance_model_sha256"]
    path.write_text(json.dumps(old))
    for options in (["--prior_noise", 0.5], ["--guidance_model", checkpoint]):
        with pytest.raises(ValueError, match=says("`output_dir`", "with None")):
            sweep_with("default", *options)
    assert sweep_with("default")[0] == values


def test_the_reference_is_computed_once_for_all_processes(tmp_path, checkpoint, extractor, monkeypatch):
    names = []

    def count(images, *arguments, function=evaluate.compute_features, **options):
        names.append(images.name)
        return function(images, *arguments, **options)

    monkeypatch.setattr(evaluate, "compute_features", count)
    options = ["--num_stages", 1, "--num_inference_steps", 1, "--metrics", "fid"]
    first = run(tmp_path / "run", checkpoint, extractor, *options, "--first_stage_guidance_scales", 1)
    again = run(tmp_path / "run", checkpoint, extractor, *options, "--first_stage_guidance_scales", 1, 2)
    alone = run(tmp_path / "other", checkpoint, extractor, *options, "--first_stage_guidance_scales", 2)
    assert names.count("textures:24:5") == 2 and len(names) == 2 + 3
    assert first["metrics"].items() < again["metrics"].items()
    assert alone["metrics"].items() < again["metrics"].items()


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
        (["--first_stage_guidance_scales", 1, 1], ["`first_stage_guidance_scales` must hold different values"]),
        (["--device", "nowhere", "--metrics", "is"], ["`device`", "'nowhere'", "`reference` must not be given"]),
        (["--num_groups", 20], ["`num_images`", ">= 20, got 10"]),
        (["--num_inference_steps", 0], ["`num_inference_steps`", ">= 1, got 0"]),
        (["--use_token_prior", "--metrics", "is"], ["`use_token_prior`", "without a `token_prior`"]),
        (["--guidance_power", -1], ["`guidance_power`", "in (0, inf), got -1"]),
        (["--prior_noise", 0.3, "--use_token_prior"], ["`prior_noise` must be 0 with `use_token_prior`, got 0.3"]),
        (["--prior_noise", 0.3, "--num_stages", 1], ["`prior_noise` must be 0 with one stage, got 0.3"]),
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
