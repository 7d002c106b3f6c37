"""Numbers that are computed again."""

import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
from helpers import says, tiny_pipeline

from diffusers_dod.evaluation import evaluate, reproduce, sample
from diffusers_dod.files import file_sha256
from diffusers_dod.results import as_metric, read_results, write_results


def write(
    path: Path,
    metrics: dict,
    checkpoint: Path | None = None,
    task: str = "evaluate",
    data: dict | None = None,
    **settings,
) -> Path:
    argv = ["samples", "--output_file", str(path)]
    write_results(path, task, argv, metrics, {"name": "textures"} | (data or {}), settings, "cpu", checkpoint)
    return path


@pytest.fixture
def command(monkeypatch):
    """Puts a command in the place of `evaluate` that writes what it is told."""
    calls = []

    def main(argv):
        calls.append(argv)
        output_file = Path(argv[argv.index("--output_file") + 1])
        write(output_file, command.metrics, data=command.data, **command.settings)

    module = types.ModuleType("evaluate")
    module.main = main
    monkeypatch.setitem(sys.modules, "diffusers_dod.evaluation.evaluate", module)
    command = types.SimpleNamespace(metrics={}, data={}, settings={}, calls=calls)
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
    extractors = ("some/file.py:name", "model.ts", "package.module:name")
    options = [["--extractor", name] for name in extractors]
    options += [["--extractor=package.module:name"], ["--trust_extractor"]]
    for number, option in enumerate(options):
        argv = ["samples", *option, "--output_file", "published.json"]
        path = tmp_path / f"{number}.json"
        write_results(path, "evaluate", argv, command.metrics, {"name": "samples"}, {}, "cpu")
        with pytest.raises(ValueError, match=says("`trust_extractor`", str(path), option[-1].split("=")[-1])):
            reproduce.reproduce(path, 0.0)
        assert len(command.calls) == number
        assert reproduce.reproduce(path, 0.0, trust_extractor=True)[0]["agrees"]
    for name in ("inception", "inception:own/weights.pt"):
        argv = ["samples.pt", "--extractor", name, "--output_file", "published.json"]
        write_results(path, "evaluate", argv, command.metrics, {"name": "samples"}, {}, "cpu")
        assert reproduce.reproduce(path, 0.0)[0]["agrees"]


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


@pytest.mark.parametrize("key", ["sha256", "fingerprint", "images"])
def test_other_data_are_warned_of(tmp_path, command, key):
    def data(samples: str, reference: str) -> dict:
        manifest = {"sha256": samples, "images": reference}
        return {"samples": {"name": samples, key: "same"}, "reference": {key: reference, "manifest": manifest}}

    published = write(tmp_path / "published.json", {}, data=data("here", "before"))
    command.data = data("there", "before")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reproduce.reproduce(published, 0.0)
    for other, found in (({key: "now"}, "now"), (None, None)):
        command.data["reference"] = other
        with pytest.warns(UserWarning, match=says(f"`data.reference.{key}`", "'before'", f"got {found!r}")):
            reproduce.reproduce(published, 0.0)


def test_outputs_of_the_published_command_stay(tmp_path, command):
    command.metrics = {"fid": as_metric(4.0)}
    argv = ["samples", "--output_dir=kept", "--cache_dir", "kept", "--save_statistics", "kept.npz"]
    path = tmp_path / "published.json"
    write_results(path, "evaluate", argv, command.metrics, {"name": "samples"}, {}, "cpu")
    reproduce.reproduce(path, 0.0, tmp_path / "new" / "again.json")
    assert not any("kept" in word for word in command.calls[0])
    assert read_results(tmp_path / "new" / "again.json")["metrics"] == command.metrics


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A folder with a `pipeline` and the extractor `ext.py:mean`, in which the commands of a test are run."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "ext.py").write_text(
        "import torch\n\ndef mean(images):\n    return images.float().mean(dim=(2, 3)) / 255\n"
    )
    monkeypatch.chdir(tmp_path)


def test_samples_are_drawn_again(tmp_path, pipeline):
    """The whole way: two commands, and then one that needs neither samples nor results of them."""
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


@pytest.mark.filterwarnings("ignore:FID of")
@pytest.mark.parametrize("samples", ["drawn-1.5", "drawn-1.5/", "./drawn-1.5"])
@pytest.mark.parametrize("output_format", ["png", "npz"])
def test_samples_are_not_those_that_lie_there_now(pipeline, recwarn, output_format, samples):
    """Whatever their folder is called and however it is spelled."""

    def draw(seed: str) -> None:
        options = ["--num_images", "4", "--num_inference_steps", "1", "--format", output_format, "--seed", seed]
        sample.main(["--pretrained_model_name_or_path", "pipeline", *options, "--output_dir", "drawn-1.5"])

    draw("0")
    judged = [samples, "--reference", "textures:20:1", "--resolution", "16", "--num_groups", "0"]
    evaluate.main([*judged, "--extractor", "ext.py:mean", "--output_file", "published.json"])
    shutil.rmtree("drawn-1.5")
    draw("1")
    assert reproduce.reproduce(Path("published.json"), 1e-6, trust_extractor=True)[0]["agrees"]
    assert not any("is not the published" in str(entry.message) for entry in recwarn)
    evaluate.main([*judged, "--extractor", "ext.py:mean", "--output_file", "others.json"])
    numbers = [read_results(Path(name))["metrics"]["fid"]["value"] for name in ("published.json", "others.json")]
    assert abs(numbers[0] - numbers[1]) > 1e-6 * numbers[0]


def test_nothing_but_the_samples_is_replaced(tmp_path, command, monkeypatch):
    """Though the reference is spelled like them."""
    drawn = []
    monkeypatch.setattr(sample, "main", drawn.append)
    argv = ["--reference", "both.npz", "--extractor", "inception", "both.npz", "--output_file", "published.json"]
    samples = {"name": "both.npz", "manifest": {"argv": ["--output_dir=outputs/cfg-1.5"]}}
    write_results(tmp_path / "published.json", "evaluate", argv, {}, {"samples": samples}, {}, "cpu")
    reproduce.reproduce(tmp_path / "published.json", 0.0)
    assert drawn == [[f"--output_dir={command.calls[0][4]}"]]
    assert command.calls[0][:4] == argv[:4] and command.calls[0][4] != argv[4]


def test_another_checkpoint_is_refused(tmp_path, command):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    published = write(tmp_path / "published.json", {"fid": as_metric(4.0)}, tmp_path / "pipeline")
    command.metrics = {"fid": as_metric(4.0)}
    assert reproduce.reproduce(published, 0.0)[0]["agrees"]
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(
        ValueError, match=says(str(tmp_path / "pipeline"), "`checkpoint` must be the published", "got")
    ):
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


def test_everything_that_a_command_writes_is_redirected():
    names = ("output_file", "output_dir", "cache_dir", "save_statistics", "grid_file", "nearest_grid", "samples_dir")
    assert reproduce.OUTPUTS == {f"--{name}" for name in names}
