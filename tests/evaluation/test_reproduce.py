"""Numbers that are computed again."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from helpers import says, tiny_pipeline

from diffusers_dod.evaluation import evaluate, reproduce, sample
from diffusers_dod.evaluation.results import as_metric, file_sha256, read_results, write_results


def write(path: Path, metrics: dict, checkpoint: Path | None = None, task: str = "evaluate", **settings) -> Path:
    argv = ["samples", "--output_file", str(path)]
    write_results(path, task, argv, metrics, {"name": "textures"}, settings, "cpu", checkpoint)
    return path


@pytest.fixture
def command(monkeypatch):
    """Puts a command in the place of `evaluate` that writes what it is told."""
    calls = []

    def main(argv):
        calls.append(argv)
        write(Path(argv[argv.index("--output_file") + 1]), command.metrics, **command.settings)

    module = types.ModuleType("evaluate")
    module.main = main
    monkeypatch.setitem(sys.modules, "diffusers_dod.evaluation.evaluate", module)
    command = types.SimpleNamespace(metrics={}, settings={}, calls=calls)
    return command


def test_numbers_that_agree(tmp_path, command, capsys):
    published = write(tmp_path / "published.json", {"fid": as_metric(4.0), "is": as_metric(10.0)})
    before = published.read_bytes()
    command.metrics = {"fid": as_metric(4.003), "is": as_metric(10.0), "new": as_metric(1.0)}
    reproduce.main([str(published)])
    assert [line for line in capsys.readouterr().out.splitlines() if "yes" in line][0].startswith(
        "| fid | 4 | 4.003 |"
    )
    assert command.calls[0][0] == "samples" and command.calls[0][-1] != str(published)
    assert published.read_bytes() == before


@pytest.mark.parametrize(
    "metrics", [{"fid": as_metric(4.2)}, {"fid": as_metric(3.8)}, {}], ids=["more", "less", "none"]
)
def test_numbers_that_do_not_agree(tmp_path, command, capsys, metrics):
    published = write(tmp_path / "published.json", {"fid": as_metric(4.0)})
    command.metrics = metrics
    with pytest.raises(SystemExit) as ended:
        reproduce.main([str(published), "--rtol", "0.04"])
    assert ended.value.code == 1 and "| NO |" in capsys.readouterr().out
    if metrics:
        reproduce.main([str(published), "--rtol", "0.06"])


def test_code_is_run_only_if_it_is_trusted(tmp_path, command):
    command.metrics = {"fid": as_metric(4.0)}
    for number, option in enumerate((["--extractor", "some/file.py:name"], ["--trust_extractor"])):
        argv = ["samples", *option, "--output_file", "published.json"]
        path = tmp_path / f"{number}.json"
        write_results(path, "evaluate", argv, command.metrics, {"name": "samples"}, {}, "cpu")
        with pytest.raises(ValueError, match=says("`trust_extractor`", str(path), option[-1])):
            reproduce.reproduce(path, 0.0)
        assert len(command.calls) == number
        assert reproduce.reproduce(path, 0.0, trust_extractor=True)[0]["agrees"]


def test_another_extractor_is_warned_of(tmp_path, command, recwarn):
    """Where the hash is that of its file alone, as it was in older results, the file is compared."""
    (tmp_path / "ext.py").write_text("number = 1\n")
    own = f"{tmp_path / 'ext.py'}:number"
    command.settings = {"extractor": own, "extractor_sha256": "now"}
    for wanted, is_another in {"now": False, file_sha256(tmp_path / "ext.py"): False, "before": True}.items():
        published = write(tmp_path / "published.json", {}, extractor=own, extractor_sha256=wanted)
        recwarn.clear()
        reproduce.reproduce(published, 0.0)
        assert [f"{own!r} is not the published one" in str(entry.message) for entry in recwarn] == [True] * is_another


def test_outputs_of_the_published_command_stay(tmp_path, command):
    command.metrics = {"fid": as_metric(4.0)}
    argv = ["samples", "--output_dir=kept", "--cache_dir", "kept", "--save_statistics", "kept.npz"]
    path = tmp_path / "published.json"
    write_results(path, "evaluate", argv, command.metrics, {"name": "samples"}, {}, "cpu")
    reproduce.reproduce(path, 0.0, tmp_path / "new" / "again.json")
    assert not any("kept" in word for word in command.calls[0])
    assert read_results(tmp_path / "new" / "again.json")["metrics"] == command.metrics


def test_samples_are_drawn_again(tmp_path, monkeypatch):
    """The whole way: two commands, and then one that needs neither samples nor results of them."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "ext.py").write_text(
        "import torch\n\ndef mean(pictures):\n    return pictures.float().mean(dim=(2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--num_images", "6", "--batch_size", "3", "--num_inference_steps", "1", "--all_stages"]
    sample.main(["--pretrained_model_name_or_path", "pipeline", *options, "--output_dir", "samples"])
    judged = ["samples/stage-2", "--reference", "textures:20:1", "--resolution", "16", "--num_groups", "0"]
    evaluate.main([*judged, "--extractor", "ext.py:mean", "--output_file", "published.json"])
    assert read_results(tmp_path / "published.json")["checkpoint"]["path"] == "pipeline"
    shutil.rmtree(tmp_path / "samples")
    before = sorted(path.name for path in tmp_path.iterdir())
    rows = reproduce.reproduce(Path("published.json"), 1e-6, trust_extractor=True)
    assert [row["name"] for row in rows] == ["fid"] and rows[0]["agrees"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before
    with pytest.raises(ValueError, match=says("several stages", "stage-2")):
        sample.main(["--pretrained_model_name_or_path", "pipeline", *options, "--output_dir", "samples"])
        evaluate.main(["samples", *judged[1:], "--extractor", "ext.py:mean", "--output_file", "mixed.json"])


def test_another_checkpoint_is_refused(tmp_path, command):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    published = write(tmp_path / "published.json", {"fid": as_metric(4.0)}, tmp_path / "pipeline")
    command.metrics = {"fid": as_metric(4.0)}
    assert reproduce.reproduce(published, 0.0)[0]["agrees"]
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(ValueError, match=says(str(tmp_path / "pipeline"), "published checkpoint", "got")):
        reproduce.reproduce(published, 0.0)
    assert len(command.calls) == 1


def test_an_unknown_command_is_refused(tmp_path):
    published = write(tmp_path / "published.json", {}, task="os")
    with pytest.raises(ValueError, match=says("`task`", "evaluate", "got 'os'")):
        reproduce.reproduce(published, 0.0)


def test_files_of_something_else_are_refused(tmp_path):
    for content in ("", "{}", json.dumps({"format": 2, "task": "", "argv": [], "metrics": {}}), "[]"):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(ValueError, match=says("`path`", "file.json")):
            read_results(tmp_path / "file.json")
