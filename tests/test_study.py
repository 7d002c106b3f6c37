"""The study: its commands are those of the package, and its page is made of its results."""

import itertools
import json
import sys
from colorsys import rgb_to_hsv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import check_all, fresh_accelerator, says, tiny_pipeline

from diffusers_dod.data.latents import LatentDataset, find_damaged_shards
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset
from diffusers_dod.evaluation.linear_probe import LinearProbeOptions
from diffusers_dod.evaluation.reconstruction import ReconstructionOptions
from diffusers_dod.evaluation.sweep import SweepOptions
from diffusers_dod.options import build_parser, parse_options
from diffusers_dod.results import as_metric, write_results
from diffusers_dod.training import encode_latents
from diffusers_dod.training.token_prior import TokenPriorOptions
from diffusers_dod.training_options import TrainingOptions


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training" / "study"))
import judge_priors  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import study_results  # noqa: E402


STUDY = study.load_study()
COMMANDS = {"sweep": SweepOptions, "reconstruction": ReconstructionOptions, "linear_probe": LinearProbeOptions}
EVALUATIONS = [
    (run, step, name)
    for run in STUDY["runs"]
    for step, names in study.evaluations_of(STUDY, run).items()
    for name in names
]


def test_runs_are_what_the_trainer_takes(monkeypatch):
    monkeypatch.chdir(ROOT)

    def check(run):
        options = parse_options(TrainingOptions, study.training_argv(STUDY, run))
        assert options.output.output_dir == study.OUTPUTS / run
        assert options.averages.ema_decay == tuple(STUDY["common"]["ema_decay"])
        for step in study.evaluations_of(STUDY, run):
            assert step <= options.optimizer.max_train_steps and step % options.output.checkpointing_steps == 0

    check_all(check, ((run,) for run in STUDY["runs"]))


def test_evaluations_are_what_the_commands_take():
    def check(run, step, name):
        command, *argv = study.evaluation_argv(STUDY, run, step, name)
        if command == "training/study/judge_priors.py":
            args = judge_priors.parse_args(argv)
        else:
            args = build_parser(COMMANDS[command.rpartition(".")[2]]).parse_args(argv)
        assert args.output_file == study.result_file(run, step, name)

    check_all(check, EVALUATIONS)


def test_labels_that_say_less_or_more():
    num_images = 12 * 60
    classes = np.arange(num_images) % 12
    names, kinds = study.label_kinds(num_images)
    assert sorted(sum(study.KINDS.values(), ())) == sorted(TEXTURE_CLASSES) and len(names) == 3
    for label, texture in enumerate(TEXTURE_CLASSES):
        (kind,) = set(kinds[classes == label])
        assert texture in study.KINDS[names[kind]]
    names, hues = study.label_hues(num_images)
    assert np.bincount(hues).tolist() == [10] * 72 and len(names) == 72
    assert (hues // 6 == classes).all()
    colors = [TextureDataset(num_images)[i]["attributes"][3:6] for i in np.flatnonzero(classes == 3)]
    found = [rgb_to_hsv(*color)[0] for color in colors]
    sixths = hues[classes == 3] % 6
    for low, high in itertools.pairwise(range(6)):
        assert np.max(found, where=sixths == low, initial=0) <= np.min(found, where=sixths == high, initial=1)


def test_hues_of_other_images_are_told_as_in_training(monkeypatch):
    monkeypatch.setattr(study, "load_study", lambda: {"data": {"num_train_samples": 720}})
    trained, (_, labels) = study.find_hues(720, 0), study.label_hues(240, seed=5)
    for index, hue in enumerate(study.find_hues(240, 5)):
        of_texture = trained[index % 12 :: 12]  # the next smaller one of these 60 says which sixth it is
        sixth = max(np.sum(of_texture <= hue) - 1, 0) * 6 // 60
        assert labels[index] // 6 == index % 12 and labels[index] % 6 == sixth
    assert len(set(np.bincount(labels, minlength=72))) > 1  # they need not be equally many


def test_latents_get_other_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LATENTS", tmp_path / "latents")
    options = "--dataset_name textures --num_train_samples 24 --resolution 8 --shard_size 12 --latents_dir".split()
    with fresh_accelerator():
        encode_latents.main([*options, str(tmp_path / "latents")])
    study.relabel("kinds")
    before, after = (LatentDataset(tmp_path / name) for name in ("latents", "latents-kinds"))
    names = json.loads((tmp_path / "latents-kinds" / "manifest.json").read_text())["class_names"]
    assert names == list(study.KINDS) and find_damaged_shards(tmp_path / "latents-kinds") == []
    assert after.labels.tolist() == study.label_kinds(24)[1].tolist() != before.labels.tolist()
    assert torch.equal(after.read(17)[0], before.read(17)[0])
    run = {"common": {}, "runs": {"a": {"labels": "kinds"}}, "vae": "vae"}
    assert study.training_argv(run, "a")[:2] == ["--latents_dir", str(tmp_path / "latents-kinds")]


def test_runs_of_several_seeds_and_evaluations_by_several_judges():
    assert [STUDY["runs"][f"classes-dod-seed{seed}"]["seed"] for seed in range(6)] == list(range(6))
    found = {}
    for name in ("tuned-stage2", "tuned-stage2-imagenet", "none-stage1", "noised-stage2-25-spectrum"):
        run = {"none": "none-fitv2", "noised": "classes-noised-dod"}.get(
            name.partition("-stage")[0], "classes-dod"
        ) + "-seed1"
        module, *argv = study.evaluation_argv(STUDY, run, 4000, name)
        found[name] = build_parser(SweepOptions).parse_args(argv)
    first, second = found["tuned-stage2"], found["tuned-stage2-imagenet"]
    assert first.samples_dir == second.samples_dir and first.output_dir != second.output_dir
    assert first.extractor != second.extractor and "accuracy" in first.metrics and "accuracy" not in second.metrics
    assert found["none-stage1"].guidance_model == str(study.OUTPUTS / "none-fitv2-seed1" / "checkpoint-1000")
    assert len({options.samples_dir for options in found.values()}) == 3  # each has a run or a noise of its own
    assert found["noised-stage2-25-spectrum"].samples_dir.name == "samples-4000-0.25"


def test_a_token_prior_is_trained_after_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run_command(command, check):
        assert check
        commands.append(command[1:])
        if "training/train_dod.py" in command:
            (study.last_checkpoint(STUDY, "none-dod-seed1")).mkdir(parents=True)
            (study.OUTPUTS / "none-dod-seed1" / "metrics.jsonl").touch()
            assert not is_trained(STUDY, "none-dod-seed1")

    is_trained = study.is_trained
    monkeypatch.setattr(study.subprocess, "run", run_command)
    study.train(["none-dod-seed1"])
    _, training, token_prior = commands
    assert training[0] == "training/train_dod.py" and token_prior[1] == "diffusers_dod.training.token_prior"
    options = parse_options(TokenPriorOptions, token_prior[2:])
    assert options.pretrained_model_name_or_path == "outputs/study/none-dod-seed1/checkpoint-4000"
    assert options.steps.label_dropout_prob == 0.99 and options.data.seed == 1
    study.train(["none-dod-seed1"])  # which was stopped after the first part
    assert commands[3:] == [commands[0], token_prior]
    (study.OUTPUTS / "none-dod-seed1" / "token-prior").mkdir()
    (study.OUTPUTS / "none-dod-seed1" / "token-prior" / "model_index.json").touch()
    assert is_trained(STUDY, "none-dod-seed1")
    module, *argv = study.evaluation_argv(STUDY, "none-dod-seed1", 4000, "none-tokens")
    options = parse_options(SweepOptions, argv)
    assert options.pretrained_model_name_or_path == "outputs/study/none-dod-seed1/token-prior"
    assert options.samples_dir.name == "samples-4000-1000-use_token_prior"


def test_every_part_of_the_plan_is_of_a_run():
    assert {run for part in STUDY["plan"] for run in part["runs"]} == set(STUDY["runs"])
    assert {name for _, _, name in EVALUATIONS} == set(STUDY["evaluations"])


def test_work_that_is_done_or_taken_is_left_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "OUTPUTS", tmp_path)
    done, worked = {"b"}, []

    def work(name):
        worked.append(name)
        study.work_off(["a", "b", "c"], done.__contains__, worked.append)  # another process at the same time

    study.work_off(["a", "b"], done.__contains__, work)
    assert worked == ["a", "c"]


def test_a_run_is_trained_when_it_has_all_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "OUTPUTS", tmp_path)
    for step, trained in ((4000, False), (8000, True)):
        (tmp_path / "dod-n2" / f"checkpoint-{step}").mkdir(parents=True)
        assert study.is_trained(STUDY, "dod-n2") is trained
    (tmp_path / "dod-seed0" / "checkpoint-8000").mkdir(parents=True)
    assert not study.is_trained(STUDY, "dod-seed0")  # more steps than the others


def write(folder: Path, run: str, **metrics: float) -> None:
    found = {name: as_metric(value, (value - 1, value + 1)) for name, value in metrics.items()}
    write_results(folder / f"{run}-8000" / "reconstruction.json", "reconstruction", [], found, {}, {}, "cpu")


def test_numbers_of_one_run_and_of_several(tmp_path):
    for run, value in (("dod-seed0", 1.0), ("dod-seed1", 2.0), ("dod-seed2", 6.0), ("dod-n2", 7.0)):
        write(tmp_path, run, rfid_scale_1=value)
    results = report.Results(tmp_path)
    assert results.find("dod-n2", "rfid_scale_1") == (7.0, 1.0, True)  # half of its own interval
    *mean, is_of_samples = results.find(report.DOD, "rfid_scale_1")
    # Student's quantile for two degrees of freedom, and the standard error of the three values.
    assert not is_of_samples and mean == pytest.approx([3.0, 4.302653 * 7**0.5 / 3**0.5])
    assert results.find("dod-n8", "rfid_scale_1") is None and report.show(None) == "-"
    assert results.find(report.OFTEN, "rfid_scale_1") is None
    assert report.show(report.Number(3.0, 0.25)) == "3.00 ± 0.25"
    assert report.show(report.Number(0.5, 0.01, is_of_samples=True), 1, percent=True) == "50.0 ±ₛ 1.0"


def test_until_all_of_several_runs_are_there_the_first_one_stands_alone(tmp_path):
    write(tmp_path, "dod-seed0", rfid_scale_1=1.0, rfid_scale_2=0.5)
    write(tmp_path, "dod-seed1", rfid_scale_1=2.0)
    results = report.Results(tmp_path)
    assert results.group(report.DOD) == ("dod-seed0",) and results.find(report.DOD, "rfid_scale_1") == (1.0, 1.0, True)
    write(tmp_path, "dod-seed2", rfid_scale_1=6.0)
    results = report.Results(tmp_path)
    assert results.group(report.DOD) == report.DOD and results.find(report.DOD, "rfid_scale_1")[0] == 3
    assert results.find(report.DOD, "rfid_scale_2") is None  # which one of three has
    assert results.find("dod-seed0", "rfid_scale_2") == (0.5, 1.0, True)


def test_a_folder_is_of_one_checkpoint(tmp_path):
    for name, overrides in (("one", {}), ("other", {"latent_embedder": None})):
        tiny_pipeline(**overrides).save_pretrained(tmp_path / "outputs" / name)
        file = tmp_path / "results" / "dod-n2-8000" / f"{name}.json"
        write_results(file, "sweep", [], {}, {}, {}, "cpu", tmp_path / "outputs" / name)
    with pytest.raises(ValueError, match=says("dod-n2-8000", "one checkpoint", "other.json")):
        report.Results(tmp_path / "results")


def test_results_of_other_options_or_weights_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(study.OUTPUTS / "dod-n2" / "checkpoint-8000")
    job = (STUDY, "dod-n2", 8000, "linear_probe")
    assert not study.has_result(*job)
    _, *argv = study.evaluation_argv(*job)
    for given, weights, expected in ((argv, "these", True), (argv[:-2], "these", False), (argv, "others", False)):
        checkpoint = {"path": "x", "sha256": "0" * 64}
        if weights == "these":
            checkpoint = study.OUTPUTS / "dod-n2" / "checkpoint-8000"
        write_results(study.result_file(*job[1:]), "linear_probe", given, {}, {}, {}, "cpu", checkpoint)
        assert study.has_result(*job) is expected


def test_best_scales(tmp_path):
    label = "fid/stage-2/pipeline/20/euler/1:"
    metrics = {f"{label}{scale}": as_metric(fid) for scale, fid in (("2", 5.0), ("3", 4.0), ("4", 4.5))}
    write_results(tmp_path / "dod-n2-8000" / "stage2.json", "sweep", [], metrics, {}, {}, "cpu")
    results = report.Results(tmp_path)
    assert results.best("dod-n2", "1:", ["2", "3", "4", "5.5"]) == "1:3"
    assert results.best("dod-n8", "1:", ["2", "3"]) is None


def test_differences_are_taken_seed_by_seed(tmp_path):
    for run, (first, second) in zip(report.DOD, ((10.0, 9.0), (20.0, 18.0), (30.0, 27.0)), strict=True):
        scales = {"1": first, "1:3": second}
        metrics = {report.stage_label("fid", scale): as_metric(fid) for scale, fid in scales.items()}
        write_results(tmp_path / f"{run}-8000" / "stage2.json", "sweep", [], metrics, {}, {}, "cpu")
    results = report.Results(tmp_path)
    second, first = ((report.DOD, report.stage_label("fid", scales)) for scales in ("1:3", "1"))
    assert results.differences(second, first) == [-1.0, -2.0, -3.0]
    assert results.differences(second, first, step=4000) == []
    assert results.differences(second, (report.DOD, report.stage_label("fid", "1", 40))) == []
    row = next(line for line in report.differences_table(results).splitlines() if "unguided stage 1" in line)
    assert "1:3 - 1 " in row and "-2.00 ± 2.48" in row and "-1.00, -2.00, -3.00" in row


def cells(table: str, row: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[2 + row].split("|")[1:-1]]


def test_differences_of_dropout_training_and_scales(tmp_path):
    """Each table takes its own runs, steps and metrics."""

    def write_seeds(runs, step, **fids):
        for number, run in enumerate(runs):
            metrics = {
                report.stage_label("fid", scales): as_metric(fid * (number + 1)) for scales, fid in fids.items()
            }
            if runs is report.DOD and step == 8000:
                metrics |= {f"rfid_scale_{scale}": as_metric(float(scale)) for scale in (2, 3, 4)}
            write_results(tmp_path / f"{run}-{step}" / "stage.json", "sweep", [], metrics, {}, {}, "cpu")

    write_seeds(report.DOD, 8000, **{"1": 9.0, "3": 4.0, "1:3": 5.0, "3:3": 3.0})
    write_seeds(report.OFTEN, 8000, **{"1": 10.0, "3": 3.0, "1:3": 7.0, "3:3": 3.5})
    write_seeds(report.DOD, 2000, **{"4": 40.0, "1:4": 41.0, "3:3": 42.0})
    write_seeds(report.FITV2, 2000, **{"3": 30.0, "4": 31.0})
    results = report.Results(tmp_path)
    table = report.dropout_differences_table(results)
    assert cells(table, 0)[:2] == ["stage 1", "1"] and cells(table, 0)[4] == "1.00, 2.00, 3.00"
    assert cells(table, 1)[1::3] == ["3", "-1.00, -2.00, -3.00"]
    assert cells(table, 3)[1::3] == ["3:3", "0.50, 1.00, 1.50"]
    table = report.training_differences_table(results)
    assert cells(table, 0) == [
        "128,000",
        "DoD, stage 1 - FiTv2, guided",
        "4 - 3",
        "20.00 ± 24.84",
        "30.97",  # of 5.77, the standard error, and Student's quantiles 4.30 and 1.06
        "10.00, 20.00, 30.00",
    ]
    assert cells(table, 2)[2::3] == ["3:3 - 3", "12.00, 24.00, 36.00"] and set(cells(table, 3)[2:]) == {"-"}
    table = report.reconstruction_differences_table(results)
    assert [cells(table, row)[3] for row in (0, 1)] == ["-1.00, -1.00, -1.00", "1.00, 1.00, 1.00"]


def test_stage_1_with_one_task_and_with_two(tmp_path):
    for run, fid in (("fitv2-seed0", 1.0), ("dod-ps100", 2.0), ("dod-seed0", 3.0)):
        metrics = {report.stage_label("fid", scales): as_metric(fid * 10 + int(scales)) for scales in ("1", "3", "4")}
        write_results(tmp_path / f"{run}-4000" / "stage1.json", "sweep", [], metrics, {}, {}, "cpu")
    table = report.tasks_table(report.Results(tmp_path))
    assert cells(table, 1) == ["256,000", "11.00", "21.00", "31.00", "13.00 (3)", "23.00 (3)", "33.00 (3)"]
    assert set(cells(table, 0)[1:]) == {"-"}


def test_other_ways_to_guide_stand_by_themselves(tmp_path):
    label = report.stage_label("fid", "1:3")
    for file, null_condition, fid in (("stage2", "class_and_prior", 5.0), ("null-class", "class", 4.0)):
        path = tmp_path / "dod-seed0-8000" / f"{file}.json"
        settings = {"null_condition": null_condition}
        write_results(path, "sweep", [], {label: as_metric(fid)}, {}, settings, "cpu")
    results = report.Results(tmp_path)
    assert results.stage("dod-seed0", "fid", "1:3")[0] == 5
    assert results.stage("dod-seed0", "fid", "1:3", way="class")[0] == 4
    cells = [line.split("|")[4].strip() for line in report.guidance_table(results).splitlines()]
    assert cells[-3:] == ["5.00", "4.00", "-"]


def test_results_of_other_judges_noise_and_guidance_stand_by_themselves(tmp_path):
    """The metrics of one checkpoint have the same names for all judges and ways to guide."""
    label = report.stage_label("fid", "3")
    ways = {
        "": {"extractor": "training/desk/texture_features.py:extractor", "prior_noise": 0.0, "guidance_model": None},
        "imagenet": {"extractor": "training/desk/imagenet_features.py:extractor"},
        "weaker": {"guidance_model": "outputs/other"},
        "noise 0.25/spectrum": {"extractor": "training/desk/spectrum_features.py:extractor", "prior_noise": 0.25},
    }
    for fid, settings in enumerate(ways.values()):
        path = tmp_path / "dod-n2-8000" / f"file-{fid}.json"
        write_results(path, "sweep", [], {label: as_metric(float(fid))}, {}, settings, "cpu")
    results = report.Results(tmp_path)
    assert [results.stage("dod-n2", "fid", "3", way=way)[0] for way in ways] == [0, 1, 2, 3]


JUDGES_OF_TUNED = ("texture", "attribute", "imagenet", "spectrum")


def write_tuned(
    folder: Path, run: str, judge: str, fids: dict[str, float], steps: int = 20, trained: int = 4000, **settings
) -> None:
    """Results of a run by a judge: the FID of the last stage by scales."""
    settings |= {"extractor": f"training/desk/{judge}_features.py:extractor"}
    way = study_results.way_of(settings | {"extractor": None})
    metrics = {report.stage_label("fid_corrected", scales, steps, way): fid for scales, fid in fids.items()}
    metrics = {name.removeprefix(f"{way}/"): as_metric(fid) for name, fid in metrics.items()}
    name = "-".join([judge, str(steps), *fids, *settings]).replace(":", "_")
    write_results(folder / f"{run}-{trained}" / f"{name}.json", "sweep", [], metrics, {}, settings, "cpu")


def test_gains_of_visual_priors_by_labels_and_judge(tmp_path, monkeypatch):
    auto = {"guidance_model": "weaker"}
    for seed, judge in itertools.product((0, 1, 2), JUDGES_OF_TUNED):
        fitv2, dod = f"classes-fitv2-seed{seed}", f"classes-dod-seed{seed}"
        write_tuned(tmp_path, fitv2, judge, {"3": 11.0 + seed, "4": 10.0 + seed})
        write_tuned(tmp_path, fitv2, judge, {"3": 9.0 + seed, "4": 9.5 + seed}, steps=40, **auto)
        write_tuned(tmp_path, fitv2, judge, {"2": 9.0 + seed}, **auto)
        write_tuned(tmp_path, dod, judge, {"1": 30.0, "3": 12.0, "1:3": 8.5, "1:4": 8.0})
        write_tuned(tmp_path, dod, judge, {"1": 30.0, "1:3": 8.0}, **auto)
        if seed < 2:  # the last one has not been evaluated in full
            write_tuned(tmp_path, dod, judge, {"3": 7.0 + 2 * seed}, use_token_prior=True)
        write_tuned(tmp_path, dod, judge, {"2": 9.0, "3": 6.0}, use_token_prior=True, **auto)
        write_tuned(tmp_path, f"none-fitv2-seed{seed}", judge, {"2": 20.0 + seed}, 40, **auto)
        write_tuned(tmp_path, f"none-dod-seed{seed}", judge, {"1:3": 15.0}, **auto)
    write_tuned(tmp_path, "classes-fitv2-seed3", "texture", {"3": 1.0})  # its DoD is not there yet
    write_tuned(tmp_path, "classes-fitv2-long-seed1", "texture", {"4": 6.0}, trained=6500, **auto)
    report.draw_map(report.Results(tmp_path / "empty"), tmp_path)
    assert not (tmp_path / "label_map.png").exists()
    results = report.Results(tmp_path)
    table = report.map_table(results)
    assert len(table.splitlines()) == 2 + 4 + 2 * 4
    none, two, drawn = cells(table, 0), cells(table, 4), cells(table, 5)
    assert none[:5] == ["1", "0.0", "3", "classes", "two stages"] and none[7] == "1:3 - 2"
    assert none[10] == "-5.00, -6.00, -7.00"
    assert two[:2] == ["12", "3.6"] and two[4] == "two stages" and two[7] == "1:3 - 3"
    assert two[10] == "-1.00, -2.00, -3.00"
    assert drawn[4] == "tokens drawn" and drawn[7] == "3 - 2" and drawn[10] == "-3.00, -4.00, -5.00"
    assert drawn[5:7] == ["10.00 ± 2.48", "6.00"] and drawn[8] == "-4.00 ± 2.48"
    rows = [cells(report.tuned_table(results), row) for row in range(4)]
    assert [row[1:5] for row in rows] == [
        ["FiTv2, guided", "4", "3", "9.25 ± 8.85"],
        ["DoD, stage 1, guided", "3", "3", "12.00"],
        ["DoD, stage 2", "3", "1:4", "8.00"],
        ["DoD, tokens drawn", "2", "3", "8.00 ± 12.71"],
    ]
    rows = {row[1]: row for row in (cells(report.tuned_differences_table(results), row) for row in range(11))}
    drawn, longer = rows["tokens drawn - FiTv2"], rows["autoguided: tokens drawn - FiTv2, trained longer"]
    assert drawn[2:4] == ["3 - 4", "-2.50 ± 6.35"] and drawn[5] == "-3.00, -2.00"  # of the seeds that both have
    assert longer[2:] == ["3 - 4", "0.00", "-", "0.00"]
    for seed in (0, 1, 2):
        metrics = {
            f"fid_corrected/{judge}/{name}": as_metric(fid + seed)
            for judge in ("classes", "spectrum")
            for name, fid in ((judge_priors.REAL, 2.0), (judge_priors.WRONG, 40.0))
        }
        file = tmp_path / f"classes-dod-seed{seed}-4000" / "bounds.json"
        write_results(file, "judges", [], metrics, {}, auto, "cpu")
    results = report.Results(tmp_path)
    bounds = report.bounds_table(results)
    assert [cells(bounds, row)[:3] for row in (0, 1)] == [["12", "classes", "3"], ["12", "spectrum", "3"]]
    assert cells(bounds, 0)[3:] == ["8.00", "6.00", "3.00 ± 2.48", "41.00 ± 2.48"]
    axes = []
    monkeypatch.setattr(report.plt, "close", lambda figure: axes.extend(figure.axes))
    report.draw_map(results, tmp_path)
    assert (tmp_path / "label_map.png").stat().st_size > 0
    assert len(axes[1].containers) == 2  # the judge of attributes has no bounds
    two, drawn, real = (container.lines[0].get_xydata() for container in axes[0].containers)
    np.testing.assert_allclose(two[:, 1], [100 * 6 / 21, 100 * 2 / 10])
    np.testing.assert_allclose(drawn, [[np.log2(12) + 0.06, 100 * 4 / 10]])
    np.testing.assert_allclose(real, [[np.log2(12), 100 * 7 / 10]])


def test_guidance_scales_by_judge(tmp_path):
    for number, judge in enumerate(JUDGES_OF_TUNED):
        write_tuned(tmp_path, "fitv2-stable-4e-3", judge, {"3": 10.0 + number})
        write_tuned(tmp_path, "dod-stable-4e-3-lem5e-4", judge, {"1": 30.0 + number, "1:4": 8.0 + number})
    table = report.grid_table(report.Results(tmp_path))
    assert [cells(table, row) for row in range(3)] == [
        ["FiTv2", "3", "10.00", "11.00", "12.00", "13.00"],
        ["DoD, stage 1", "1", "30.00", "31.00", "32.00", "33.00"],
        ["DoD, stage 2", "1:4", "8.00", "9.00", "10.00", "11.00"],
    ]


def test_variants_are_compared_at_the_scales_that_all_have(tmp_path):
    for judge in JUDGES_OF_TUNED:
        write_tuned(tmp_path, "dod-stable-4e-3-lem5e-4", judge, {"2": 9.0, "3": 10.0, "1:2": 5.0, "1:4": 8.0})
        write_tuned(tmp_path, "dod-stable-ps25", judge, {"2": 12.0, "3": 11.0, "1:4": 7.0})
        write_tuned(tmp_path, "dod-stable-ps25", judge, {"3": 6.0}, use_token_prior=True)
    table = report.variants_table(report.Results(tmp_path))
    assert [cells(table, row)[:3] for row in range(6)] == [
        ["p_s 0.5, 4 tokens", "stage 1, guided", "9.00 (2)"],
        ["p_s 0.5, 4 tokens", "stage 2", "8.00 (1:4)"],
        ["p_s 0.5, 4 tokens", "tokens drawn", "-"],
        ["p_s 0.25", "stage 1, guided", "11.00 (3)"],
        ["p_s 0.25", "stage 2", "7.00 (1:4)"],
        ["p_s 0.25", "tokens drawn", "-"],  # which the other one lacks
    ]


def test_the_page_has_the_tables_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = report.PAGE.read_text()
    assert report.fill_page(page, report.Results(report.RESULTS)) == page


def test_a_page_must_have_places_for_all_tables(tmp_path):
    with pytest.raises(ValueError, match=says("stages", "got ['dropout']")):
        report.fill_page("<!-- table: dropout -->\n<!-- end -->", report.Results(tmp_path))


def test_losses_of_a_training(tmp_path):
    losses = [(100, 2.0, None), (200, 1.0, None), (300, 0.5, None), (9000, 9.0, None)]  # the last one is too late
    lines = [
        json.dumps({"step": step, "loss_without_prior": without, "loss_with_prior": given})
        for step, without, given in losses
    ]
    (tmp_path / "dod-n2").mkdir()
    (tmp_path / "dod-n2" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    images, values = report.Results(tmp_path).losses("dod-n2", "loss_without_prior", window=2)
    assert images == [200 * 64, 300 * 64] and values.tolist() == [1.5, 0.75]
    for run, name in (("dod-n2", "loss_with_prior"), ("dod-n8", "loss_without_prior")):
        images, values = report.Results(tmp_path).losses(run, name)
        assert images == [] and values.size == 0


def test_plots(tmp_path):
    write(tmp_path, "dod-n2", rfid_scale_1=3.0, rfid_scale_3=2.0)
    report.draw_plots(report.Results(tmp_path), tmp_path)
    assert (tmp_path / "study.png").stat().st_size > 10_000
