"""Benchmarks run, at tiny size: what they claim to measure is measured, and their results are whole."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from helpers import fresh_accelerator

from diffusers_dod.operations import OperationCounter
from diffusers_dod.tableaus import SOLVERS


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


# -------------------------------------------------------------------------------------------------- the table of times


@pytest.fixture(scope="module")
def bench() -> dict:
    return runpy.run_path(str(BENCHMARKS / "bench.py"))


def test_a_row_has_moved_if_its_quartiles_do_not_meet(bench):
    before = {"lower": 0.8, "median": 0.9, "upper": 1.0}
    moved = {
        (0.7, 0.79): "faster",
        (0.7, 0.8): "",
        (0.9, 0.95): "",
        (1.0, 1.5): "",
        (1.01, 1.02): "slower",
    }
    for (lower, upper), expected in moved.items():
        assert bench["compare"]({"lower": lower, "median": lower, "upper": upper}, before) == expected
    assert bench["compare"](before, None) == "new"


def test_a_ratio_is_measured_in_turns(bench):
    calls = []
    row = (lambda: calls.append("ours"), lambda: calls.append("theirs"), 1.0)
    found = bench["measure"](row, num_repetitions=3)
    assert calls == ["ours", "theirs"] * 4  # the first are a warm-up
    assert 0 < found["lower"] <= found["median"] <= found["upper"]


def test_the_page_has_the_results_to_compare_with(bench):
    committed = json.loads(bench["COMMITTED"].read_text())
    page = bench["PAGE"].read_text()
    assert bench["fill_page"](page, committed) == page
    assert set(committed) == set(bench["ROWS"])
    slow = {"lower": 1.0, "median": 2.0, "upper": 3.0}
    filled = bench["fill_page"](page, {"average / EMAModel": slow, "training / broadcast, fp32": slow})
    rows = [line for line in filled.splitlines() if "2.00" in line]
    assert ["missed" in row for row in rows] == [False, True]  # the first one has no goal


def test_the_products_of_a_run_are_repeated(bench):
    x = torch.ones(3, 4)
    repeat = bench["products_of"](lambda: torch.nn.functional.gelu(x @ x.t()) @ x)
    with OperationCounter() as counter:
        repeat()
    found = [(key.name, key.flops) for key in counter.work.elements()]
    assert found == [("mm", 2 * 3 * 4 * 3), ("mm", 2 * 3 * 3 * 4)]


def test_the_command_goes_on_and_compares(bench, tmp_path, capsys):
    done = {"lower": 0.1, "median": 0.2, "upper": 0.3}
    output = tmp_path / "bench.json"
    output.write_text(json.dumps({"stage 1 / DiT, by FLOP, fp32": done}))
    argv = ["--rows", "stage 1 / DiT, by FLOP, fp32", "AdamW, fused / not", "--repetitions", "2"]
    bench["main"]([*argv, "--output_file", str(output)])
    found = json.loads(output.read_text())
    assert found["stage 1 / DiT, by FLOP, fp32"] == done and found["AdamW, fused / not"]["median"] > 0
    assert "| stage 1 / DiT, by FLOP, fp32 | 0.20 | 0.10 to 0.30 |" in capsys.readouterr().out


def test_every_ratio_has_a_result_to_compare_with(bench):
    committed = json.loads((BENCHMARKS / "results.json").read_text())
    ratios = [name for name in bench["ROWS"] if not name.startswith("growth with ")]
    assert len(ratios) == len(bench["ROWS"]) - len(bench["CURVES"])
    assert set(ratios) <= set(committed) <= set(bench["ROWS"])


def test_an_exponent_is_that_of_the_upper_half(bench):
    times = {1: 100.0, 10: 100.0, 100: 1e4, 1000: 1e6}  # a fixed time at first
    assert bench["exponent"](dict(reversed(times.items()))) == pytest.approx(2)
    assert bench["exponent"]({1: 5.0, 4: 10.0}) == pytest.approx(0.5)


def test_a_curve_is_measured_in_turns(bench):
    calls = []
    found = bench["measure"]({size: lambda size=size: calls.append(size) for size in (1, 2, 4)}, num_repetitions=2)
    assert calls == [1, 2, 4] * 3  # the first are a warm-up
    assert found["lower"] <= found["median"] <= found["upper"]


SMALL = {
    "the tokens": 4,
    "the classes, of a call": 12,
    "the shards that are read": 2,
    "the images of a sampling run": 2,
    "the samples, FID": 70,
    "the samples, KID": 70,
    "the samples, precision and recall": 8,
}


@pytest.mark.parametrize("name", [*SMALL, "the batch", "the stages of a call"])
def test_the_runs_of_every_curve_are_whole(bench, name):
    make, sizes, goal = bench["CURVES"][name]
    assert goal > 0 and sorted(set(sizes)) == list(sizes) and len(sizes) >= 4
    assert len(bench["CURVES"]) == len(SMALL) + 2
    with fresh_accelerator():
        make(SMALL.get(name, 1))()


# ------------------------------------------------------------------------------------------------- modes of inference


@pytest.fixture
def modes(monkeypatch) -> dict:
    monkeypatch.syspath_prepend(BENCHMARKS)  # its modules import each other
    monkeypatch.chdir(BENCHMARKS.parent)
    return runpy.run_path(str(BENCHMARKS / "inference_modes.py"))


def test_the_committed_modes_are_those_of_the_table(modes):
    report = json.loads((BENCHMARKS.parent / "docs" / "results" / "inference_modes.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "sampling.md").read_text()
    results = {name: report["results"][name] for name in modes["MODES"] if name in report["results"]}
    assert results.keys() == report["results"].keys() and len(results) > 10
    assert modes["to_table"](results) in page


@pytest.mark.slow
def test_modes_are_measured_and_not_measured_again(modes, tmp_path, capsys):
    output, names = tmp_path / "modes.json", ["Euler, 5 steps", "Taylor cache, every 4th"]
    argv = ["--num_samples", "20", "--num_reference", "40", "--timed_batch_size", "1", "--repetitions", "2"]
    argv += ["--modes", *names, "--output_file", str(output)]
    modes["main"](argv)
    report = json.loads(output.read_text())
    few, cached = (report["results"][name] for name in names)
    assert few["num_evaluations"] == 2 * 2 * 5 and cached["num_evaluations"] == 2 * 2 * 20
    assert (
        0 < few["gflops"] < 4 * few["gflops"] and cached["gflops"] < 3 * few["gflops"]
    )  # most of 20 steps are skipped
    assert all(row["fid"]["value"] > 0 and row["time"]["median"] > 0 for row in (few, cached))
    report["results"]["Euler, 5 steps"]["gflops"] = 123.0
    output.write_text(json.dumps(report))
    modes["main"](argv)
    assert "| Euler, 5 steps | 20 | 123.00 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`output_file` must hold results of the settings"):
        modes["main"]([*argv, "--num_samples", "30"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["guided / broadcast, bf16", "data loader / tensors in memory", "pipeline / its evaluations"]
)
def test_rows_run(bench, name):
    ours, theirs, factor = bench["ROWS"][name][0]()
    ours(), theirs()
    assert factor > 0


# ----------------------------------------------------------------------------------------------- the checks of a card


def check_gpu(tmp_path, *checks: str) -> dict:
    """Results of the checks, which must all be right."""
    main = runpy.run_path(str(BENCHMARKS / "gpu_check.py"))["main"]
    output = tmp_path / "check.json"
    with fresh_accelerator():
        code = main(["--device", "cpu", "--size", "tiny", "--checks", *checks, "--output_file", str(output)])
    found = json.loads(output.read_text())["checks"]
    assert (code, list(found)) == (0, list(checks)), found
    return found


@pytest.mark.slow
def test_the_checks_of_a_card_run_on_a_cpu(tmp_path):
    backend = _AttentionBackendRegistry.get_active_backend()
    found = check_gpu(tmp_path, "correctness", "training", "attention", "waits", "sampling")
    assert _AttentionBackendRegistry.get_active_backend() == backend  # each backend was for one model only
    assert found["correctness"]["training"]["fp32"] == found["correctness"]["samples"] == 0  # the same device
    assert 0 < found["correctness"]["training"]["bf16"] < 0.1
    for mode in ("eager", "compiled"):
        assert found["training"][f"DoD-Desk, {mode}"]["images_per_second"] > 0
    assert found["attention"]["native"]["error_of_gradients"] == 0
    assert found["attention"]["_native_math"]["error_of_gradients"] < 0.1
    assert {"training", *SOLVERS} < set(found["waits"])
    assert found["sampling"]["seconds"] > found["sampling"]["seconds_of_the_floor"] > 0


@pytest.mark.slow
def test_several_processes_are_checked_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = check_gpu(tmp_path, "several")["several"]
    assert found["num_processes"] == 2 and found["ddp"]["images_per_second"] > 0


def test_a_check_that_fails_is_an_entry(tmp_path):
    """There is no GPU to check here, and nothing of it is silent."""
    namespace = runpy.run_path(str(BENCHMARKS / "gpu_check.py"))
    namespace["CHECKS"]["sampling"] = lambda setting: 1 / 0
    output = tmp_path / "check.json"
    argv = ["--device", "cpu", "--size", "tiny", "--checks", "sampling", "--output_file", str(output)]
    assert namespace["main"](argv) == 1
    assert "ZeroDivisionError" in json.loads(output.read_text())["checks"]["sampling"]["error"]
