"""Model cards: valid metadata, numbers that are in files and no others, and the same cards whenever they are built."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import says
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from diffusers_dod.results import as_metric, checkpoint_sha256, read_results, write_results
from diffusers_dod.training.model_card import SOURCES, build_card, main, read_sources


ROOT = Path(__file__).parents[1]
DESK = Path("checkpoints/dod-desk")
CARDS = [path.relative_to(ROOT) for path in sorted(ROOT.glob("model_cards/*.yaml"))]
UNFILLED = [path for path in CARDS if path.stem != "dod-desk"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(source: Path) -> ModelCard:
    return ModelCard.load(source.with_suffix(".md"))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    return re.search(rf"^{heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def write(path: Path, metrics: dict, task: str = "evaluate", checkpoint: Path | None = DESK, **settings) -> str:
    data = {"name": "samples", "num_samples": 1200, "reference": {"name": "textures:20:1"}}
    write_results(path, task, ["samples", "--seed", "3"], metrics, data, settings, "cpu", checkpoint)
    return str(path)


def desk(**sources) -> dict:
    return {"recipe": "training/recipes/desk.yaml", "pipeline": str(DESK)} | sources


def save(path: Path, sources: dict) -> Path:
    path.write_text(yaml.safe_dump(sources))
    return path


# ------------------------------------------------------------------------------------------------- the project's cards


def test_every_card_has_its_sources():
    assert [path.stem for path in CARDS] == ["dod-b", "dod-desk", "dod-s", "dod-xl"]
    assert sorted(Path("model_cards").glob("*.md")) == [path.with_suffix(".md") for path in CARDS]


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path in UNFILLED)) for path in CARDS],
)
def test_building_gives_the_same_card(source):
    sources = read_sources(source)
    card = str(build_card(sources, source.stem))
    assert card == source.with_suffix(".md").read_text()
    if "pipeline" in sources:
        assert card == (Path(sources["pipeline"]) / "README.md").read_text()


@pytest.mark.parametrize("source", CARDS, ids=lambda path: path.stem)
def test_the_metadata_are_the_hubs(source):
    data = load(source).data
    assert (data.library_name, data.license) == ("diffusers", "apache-2.0")
    assert data.pipeline_tag == "unconditional-image-generation" and "diffusers_dod" in data.tags
    known = {"library_name", "license", "pipeline_tag", "tags", "datasets", "model-index"}
    assert set(data.to_dict()) <= known
    for repo_id in data.datasets or []:
        validate_repo_id(repo_id)
    assert all(entry.task_type == data.pipeline_tag for entry in data.eval_results or [])


@pytest.mark.parametrize("source", CARDS, ids=lambda path: path.stem)
def test_a_card_speaks_of_everything(source):
    text = load(source).text
    for heading in ("Use", "Model", "Training", "Evaluation", "Compute", "Limitations and biases", "Citation"):
        assert section(text, f"## {heading}").strip()
    assert "\n\n\n" not in text and "{{" not in text and "None" not in text
    assert (Path(".") / read_sources(source)["recipe"]).read_text().endswith(code_blocks(text, "yaml")[0])


@pytest.mark.parametrize("source", UNFILLED, ids=lambda path: path.stem)
def test_cards_without_weights_claim_nothing(source):
    card = load(source)
    assert "model-index" not in card.data.to_dict()
    assert "There are no weights yet, and nothing has been measured" in card.text
    assert "Planned: " in card.text and "images, planned" in card.text
    measured, paper = section(card.text, "## Evaluation").split("### The paper's figures")
    assert "empty until a training run fills it" in measured and not re.search(r"\d", measured)
    assert "Quoted from the paper: they are of its authors' models, not of this one." in paper
    for table in read_sources(source)["paper"]:
        assert f"{table['title']}:" in paper
        for row in table["rows"]:
            assert f"| {' | '.join(row)} |" in paper


def test_the_numbers_of_the_desk_card_are_those_of_its_files():
    card, sources = load(Path("model_cards/dod-desk.yaml")), read_sources(Path("model_cards/dod-desk.yaml"))
    commands = [
        shlex.split(line)
        for block in code_blocks(section(card.text, "## Evaluation"), "bash")
        for line in block.replace("\\\n", "").splitlines()
    ]
    known = set()
    for file in sources["results"]:
        results = read_results(Path(file))
        known |= {f"{number:.4g}" for metric in results["metrics"].values() for number in _numbers(metric)}
        module = f"diffusers_dod.evaluation.{results['task']}"
        assert ["python", "-m", module, *results["argv"]] in commands
        if (manifest := results["data"].get("samples", {}).get("manifest")) is not None:
            assert ["python", "-m", "diffusers_dod.evaluation.sample", *manifest["argv"]] in commands
    rows = re.findall(r"^\| [^|]+ \| (\d.*) \|$", section(card.text, "## Evaluation"), re.MULTILINE)
    assert rows and {number for row in rows for number in re.findall(r"[\d.]+", row)} == known
    values = {
        round(metric["value"], 4) for file in sources["results"] for metric in read_results(file)["metrics"].values()
    }
    assert card.data.eval_results and {entry.metric_value for entry in card.data.eval_results} <= values


def _numbers(metric: dict) -> list[float]:
    return [metric["value"], *(metric["interval"] or [])]


def test_the_code_of_the_desk_card_runs():
    (code,) = code_blocks(load(Path("model_cards/dod-desk.yaml")).text, "python")
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (32, 32)


def test_the_documentation_has_all_names():
    named = re.findall(r"^\| (`.*?) \|", Path("docs/model_cards.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(named))) == sorted(SOURCES)


# ------------------------------------------------------------------------------------------------------- other models


def test_a_training_run_fills_a_card(tmp_path):
    """The folder gets the card as well, with what the folder has, and the numbers go into the metadata."""
    folder = Path(shutil.copytree(DESK, tmp_path / "run"))
    (folder / "curves.png").touch()
    (folder / "samples").mkdir()
    for step in (1, 2):
        (folder / "samples" / f"step-000000{step}.png").touch()
    metrics = {"fid": as_metric(4.25, (4.0, 4.5)), "is": as_metric(11.5), "accuracy": as_metric(0.75)}
    metrics["precision"] = as_metric(0.5)
    first = write(tmp_path / "a.json", metrics, checkpoint=folder, extractor="some/features.py:name", num_stages=2)
    second = write(tmp_path / "b.json", {"fid": as_metric(5.125)}, checkpoint=folder, extractor="inception")
    named = {"extractor": "inception:own/weights.pth", "extractor_sha256": "6726825d" + 56 * "0"}  # the published ones
    third = write(tmp_path / "c.json", {"fid": as_metric(6.5)}, checkpoint=folder, **named)
    texts = {"description": "Of stripes.", "hardware": "a GPU", "license": "mit", "datasets": ["me/stripes"]}
    texts["repo_id"] = "me/dod"
    source = save(
        tmp_path / "own.yaml", desk(pipeline=str(folder), results=[first, second, third], num_processes=4) | texts
    )
    main([str(source)])
    assert (tmp_path / "own.md").read_text() == (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert "no weights" not in card.text and "256 images (10,240,000 in all)" in card.text
    for text in (
        "Of stripes.",
        "on a GPU",
        'from_pretrained("me/dod")',
        "![curves](curves.png)",
        "![samples](samples/step-0000002.png)",
    ):
        assert text in card.text
    assert "| all | 4.25 [4, 4.5] | 11.5 | 0.75 | 0.5 |" in card.text and "| all | 5.125 |" in card.text
    assert card.text.count("features of `features.py:name`, not Inception's") == 1
    assert (card.data.license, card.data.datasets, card.data.model_name) == ("mit", ["me/stripes"], "own")
    entries = card.data.eval_results
    assert [(entry.metric_type, entry.metric_value) for entry in entries] == [
        ("fid", 4.25),
        ("inception_score", 11.5),
        ("accuracy", 0.75),
        ("improved_precision", 0.5),
        ("fid", 5.125),
        ("fid", 6.5),
    ]
    assert entries[0].metric_name == "FID, 1,200 samples, features of features.py:name (95 %: 4 to 4.5)"
    assert entries[4].metric_name == entries[5].metric_name == "FID, 1,200 samples"
    assert entries[0].metric_config == "num_stages 2" and entries[4].metric_config is None
    assert {(entry.dataset_type, entry.dataset_name) for entry in entries} == {("me/stripes", "textures:20:1")}


def test_grids_are_tables_and_no_metadata(tmp_path):
    """A row for each setting, a column for each metric, with a hole where one is missing."""
    metrics = {
        "fid/stage-1/pipeline/20/euler/1": as_metric(13.0, (12.5, 13.5)),
        "precision/stage-1/pipeline/20/euler/1": as_metric(0.5),
        "fid/stage-2/pipeline/20/euler/1:3": as_metric(4.75),
    }
    results = [write(tmp_path / f"sweep{len(seeds)}.json", metrics, "sweep", seeds=seeds) for seeds in ([0], [0, 1])]
    card = build_card(desk(results=results), "name")
    assert "sweep1.json`: 1,200 samples; data" in card.text
    assert "sweep2.json`: 1,200 samples of each of 2 seeds; data" in card.text
    assert "| FID | precision |" in card.text
    assert "| stage-1, pipeline, 20, euler, 1 | 13 [12.5, 13.5] | 0.5 |" in card.text
    assert "| stage-2, pipeline, 20, euler, 1:3 | 4.75 |  |" in card.text
    assert card.data.eval_results is None and "model-index" not in str(card)


@pytest.mark.slow
def test_how_a_run_was_optimized(tmp_path):
    sources = {"recipe": save(tmp_path / "recipe.yaml", {"preset": "DoD-B", "lr_scheduler": "cosine"})}
    assert "AdamW, learning rate 0.0001, cosine schedule, weight decay 0." in build_card(sources, "name").text
    assert ", linear schedule, 200 steps of warm-up, weight decay 0, fp32." in build_card(desk(), "name").text


def test_the_card_says_when_the_rate_falls(tmp_path):
    stable = {"preset": "DoD-Desk", "lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 2000}
    sources = {"recipe": save(tmp_path / "recipe.yaml", stable)}
    text = build_card(sources, "name").text
    assert ", warmup stable decay schedule, the last 2,000 steps of decay, weight decay 0." in text


def test_a_plain_fit_has_neither_stages_nor_a_prior():
    card = build_card({"recipe": "training/recipes/fitv2-b-imagenet256.yaml"}, "fitv2-b")
    assert "num_stages" not in card.text and "LEM" not in card.text
    assert "the paper's baseline" in card.text and "### The paper's figures" not in card.text
    ast.parse(code_blocks(card.text, "python")[0])


def test_a_run_that_was_stopped_says_so(tmp_path):
    folder = Path(shutil.copytree(DESK, tmp_path / "run"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:3]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    card = build_card(desk(pipeline=str(folder)), "name")
    assert "- 300 of " in card.text and "300 steps" not in card.text
    assert "Nothing has been evaluated." in card.text and "no weights" not in card.text


def test_a_checkpoint_says_after_how_many_steps(tmp_path):
    folder = Path(shutil.copytree(DESK, tmp_path / "checkpoint-700"))
    (folder / "manifest.json").write_text('{"step": 700, "sha256": {}}')  # the metrics may be of a later step
    card = build_card(desk(pipeline=str(folder)), "name")
    assert "- 700 of " in card.text and "44,800 images" in card.text
    (folder / "manifest.json").unlink()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=says("`pipeline`", "manifest.json or metrics.jsonl", "checkpoint-700")):
        build_card(desk(pipeline=str(folder)), "name")


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("a: [", ["`path`", "YAML"]),
        ("[]", ["`path`", "map names", "[]"]),
        ("recipe: a.yaml\nfid: 3.0", ["`path`", "recipe (str)", "'fid': 3.0"]),
        ("recipe: [a.yaml]", ["`path`", "recipe (str)", "['a.yaml']"]),
        ("pipeline: checkpoints/dod-desk", ["`recipe`", "must be given", "pipeline"]),
        ("recipe: a.yaml\nresults: [b.json]", ["`pipeline`", "with `results`", "got none"]),
    ],
    ids=["no YAML", "no mapping", "unknown", "another type", "no recipe", "no weights"],
)
def test_other_files_are_refused(tmp_path, content, fragments):
    path = tmp_path / "card.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=says("card.yaml", *fragments)):
        main([str(path)])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("sources", "fragments"),
    [
        ({"pipeline": "no/such/folder"}, ["`pipeline`", "folder", "'no/such/folder'"]),
        ({"num_processes": 0}, ["`num_processes`", ">= 1", "0"]),
        ({"recipe": "training/recipes/dod-s-imagenet256.yaml"}, ["`pipeline`", "DoD-S", "'num_layers': 6"]),
    ],
    ids=["no folder", "no process", "another model"],
)
def test_what_does_not_fit_is_refused(sources, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        build_card(desk(**sources), "name")


def test_results_of_another_checkpoint_are_refused(tmp_path):
    """Or of none that is known."""
    copy = Path(shutil.copytree(DESK, tmp_path / "copy"))
    index = copy / "model_index.json"
    index.write_text(index.read_text() + " ")
    for checkpoint, found in ((copy, checkpoint_sha256(copy)), (None, "None")):
        file = write(tmp_path / "results.json", {"fid": as_metric(4.0)}, checkpoint=checkpoint)
        with pytest.raises(ValueError, match=says("`results`", checkpoint_sha256(DESK), "results.json", found)):
            build_card(desk(results=[file]), "name")


def test_results_of_something_else_are_refused(tmp_path):
    file = write(tmp_path / "results.json", {"flops": as_metric(4.0)}, "compute")
    with pytest.raises(ValueError, match=says("`task`", "'evaluate'", "'compute'")):
        build_card(desk(results=[file]), "name")
