"""Numbers that are computed again, and that go into model cards."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from helpers import says, tiny_pipeline
from huggingface_hub import ModelCard

from diffusers_dod.evaluation import cards, evaluate, reproduce, sample
from diffusers_dod.evaluation.results import as_metric, read_results, write_results


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
        write(Path(argv[argv.index("--output_file") + 1]), command.metrics)

    module = types.ModuleType("evaluate")
    module.main = main
    monkeypatch.setitem(sys.modules, "diffusers_dod.evaluation.evaluate", module)
    command = types.SimpleNamespace(metrics={}, calls=calls)
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


def test_results_in_a_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: diffusers\n---\n\n# A model\n\nText.\n")
    first = write(tmp_path / "first.json", {"fid": as_metric(4.25, (4.0, 4.5)), "is": as_metric(11.5)}, num_stages=2)
    cards.main([str(card), str(first)])
    loaded = ModelCard.load(card)
    assert loaded.data.library_name == "diffusers" and loaded.text.strip() == "# A model\n\nText."
    entries = {entry.metric_type: entry for entry in loaded.data.eval_results}
    assert entries["fid"].metric_value == 4.25 and "95 %: 4 to 4.5" in entries["fid"].metric_name
    assert entries["inception_score"].metric_value == 11.5 and entries["fid"].metric_config == "num_stages 2"
    assert entries["fid"].dataset_name == "textures"
    cards.main([str(card), str(first)])  # in place of what was there
    assert len(ModelCard.load(card).data.eval_results) == 2


def test_results_of_several_checkpoints_are_refused(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_pipeline(default_guidance_scale=2.0 + seed).save_pretrained(tmp_path / name)
        write(tmp_path / f"{name}.json", {"fid": as_metric(4.0)}, tmp_path / name)
    card = tmp_path / "README.md"
    card.write_text("# A model\n")
    with pytest.raises(ValueError, match=says("`paths`", "one checkpoint", "a.json", "b.json")):
        cards.add_results(card, [tmp_path / "a.json", tmp_path / "b.json"])
    assert card.read_text() == "# A model\n"


def test_files_of_something_else_are_refused(tmp_path):
    for content in ("", "{}", json.dumps({"format": 2, "task": "", "argv": [], "metrics": {}}), "[]"):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(ValueError, match=says("`path`", "file.json")):
            read_results(tmp_path / "file.json")
