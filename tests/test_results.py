# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Files of results: what they hold, what identifies a checkpoint, and that they are written whole or not at all."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import says, tiny_pipeline

from diffusers_dod import results
from diffusers_dod.results import (
    RESULTS_FORMAT,
    as_metric,
    checkpoint_sha256,
    describe_versions,
    git_commit,
    read_results,
    write_results,
)


ARGUMENTS = {
    "task": "evaluate",
    "argv": ["samples", "--seed", "0"],
    "metrics": {"fid": as_metric(4.2, (4.0, 4.5), num_samples=100)},
    "data": {"name": "textures"},
    "settings": {"rounding": "round(255 x)"},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_what_is_written_is_read(tmp_path, checkpoint):
    path = tmp_path / "new" / "folder" / "results.json"
    written = write_results(path, **ARGUMENTS, checkpoint=checkpoint)
    assert read_results(path) == written == json.loads(path.read_text())
    assert {name: written[name] for name in ARGUMENTS if name != "device"} == {
        name: value for name, value in ARGUMENTS.items() if name != "device"
    }
    assert written["format"] == RESULTS_FORMAT
    assert written["checkpoint"] == {"path": str(checkpoint), "sha256": checkpoint_sha256(checkpoint)}
    assert written["versions"] == describe_versions("cpu")
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_result_without_a_checkpoint(tmp_path):
    assert write_results(tmp_path / "results.json", **ARGUMENTS)["checkpoint"] is None


@pytest.mark.parametrize(
    "changed",
    [{"data": {"folder": Path("samples")}}, {"settings": {"scale": float("nan")}}, {"checkpoint": "no/such/pipeline"}],
    ids=["no JSON", "no number", "no checkpoint"],
)
def test_a_failure_leaves_the_file_alone(tmp_path, changed):
    path = tmp_path / "results.json"
    write_results(path, **ARGUMENTS)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError, OSError)):
        write_results(path, **(ARGUMENTS | changed))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_versions_are_of_what_computes():
    versions = describe_versions(torch.device("cpu"))
    assert versions["torch"] == torch.__version__ and versions["numpy"] == np.__version__
    assert versions["device"] == "cpu" and versions["num_threads"] == str(torch.get_num_threads())


def test_versions_are_looked_up_once(monkeypatch):
    """Samples ask for them with each chunk."""
    asked = []
    monkeypatch.setattr(results, "version", lambda package: asked.append(package) or "1.0")
    results._find_version.cache_clear()
    try:
        for _ in range(3):
            assert describe_versions("cpu")["numpy"] == "1.0"
    finally:
        results._find_version.cache_clear()
    assert asked == list(results.PACKAGES)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that runs git in a checkout, whose package is that which computes; its commit is looked up afresh."""
    package = tmp_path / "checkout" / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    monkeypatch.delenv("GIT_DIR", raising=False)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path / "checkout"), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git.package = package
    git("init", "--quiet")
    return git


def commit_of(git) -> str | None:
    git_commit.cache_clear()
    try:
        return describe_versions("cpu")["git_commit"]
    finally:
        git_commit.cache_clear()


def test_the_commit_of_a_checkout(checkout, monkeypatch):
    assert commit_of(checkout) is None  # the package is none of its files
    checkout("add", "src")
    assert commit_of(checkout) is None  # there is no commit
    checkout("commit", "--quiet", "-m", "first")
    commit = checkout("rev-parse", "HEAD")
    assert len(commit) == 40 and commit_of(checkout) == commit
    (checkout.package.parent / "README.md").write_text("not of the package")
    assert commit_of(checkout) == commit
    (checkout.package / "new.py").write_text("")
    assert commit_of(checkout) == f"{commit}-dirty"
    (checkout.package / "new.py").unlink()
    (checkout.package / "__init__.py").write_text("1")
    assert commit_of(checkout) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit_of(checkout) is None  # no git
    assert json.dumps(describe_versions("cpu"))


def test_metrics_are_plain_numbers():
    metric = as_metric(np.float32(0.5), (np.float64(0.25), np.float32(0.75)), num_samples=3)
    assert metric == {"value": 0.5, "interval": [0.25, 0.75], "num_samples": 3}
    assert json.loads(json.dumps(metric)) == metric
    assert as_metric(1)["interval"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=says("`value`", "finite", str(value))):
        as_metric(value)
    with pytest.raises(ValueError, match=says("`interval`", "finite", str(value))):
        as_metric(1.0, (0.0, value))


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError, match=says("`value`", "None")):
        as_metric(None)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", "{}", '{"format": 1}', b"\xff\xfe\x00"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says("`path`", "file of results", "other.json")):
        read_results(path)


def test_another_format_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=says("`path`", "results.json")):
        read_results(path)
    with pytest.raises(ValueError, match=says("`path`", str(tmp_path))):
        read_results(tmp_path)
    written = write_results(path, **ARGUMENTS)
    path.write_text(json.dumps({name: value for name, value in written.items() if name != "argv"}))
    with pytest.raises(ValueError, match=says("`path`", "`argv`", "must be there")):
        read_results(path)
    path.write_text(json.dumps(written | {"format": 7}))
    with pytest.raises(ValueError, match=says("`format` must be 1 or 2", "got 7")):
        read_results(path)


@pytest.mark.parametrize(
    "change, fragments",
    [
        ({"argv": "a string"}, ["`argv`", "list", "'a string'"]),
        ({"argv": [1, 2]}, ["`argv[0]`", "str", "got 1"]),
        ({"metrics": {"fid": {"value": "4", "interval": None}}}, ["`metrics.fid.value`", "'4'"]),
        ({"metrics": {"fid": {"value": 4}}}, ["`metrics.fid.interval`", "must be there"]),
        ({"checkpoint": {"path": "a"}}, ["`checkpoint.sha256`", "must be there"]),
        ({"data": {"samples": {"manifest": {"argv": "a"}}}}, ["`data.samples.manifest.argv`", "list", "'a'"]),
        (
            {"data": {"samples": {"manifest": {"settings": {}}}}},
            ["`data.samples.manifest.settings.stage`", "be there"],
        ),
        ({"data": {"samples": []}}, ["`data.samples`", "dict", "[]"]),
        ({"settings": {"seed": 1234}}, ["results.json", "another hash"]),
        ({"sha256": "0" * 64}, ["results.json", "another hash"]),
    ],
)
def test_other_entries_are_refused_by_name(tmp_path, change, fragments):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(write_results(path, **ARGUMENTS) | change))
    with pytest.raises(ValueError, match=says("`path`", *fragments)):
        read_results(path)


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path):
    path = tmp_path / "results.json"
    written = write_results(path, **ARGUMENTS)
    content = path.read_bytes()
    for index in range(0, len(content), 7):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        try:
            assert read_results(path) == written  # a blank between entries is no content
        except ValueError as error:
            assert "results.json" in str(error)


def test_results_of_format_1_have_no_hash(tmp_path):
    path = tmp_path / "results.json"
    old = {name: value for name, value in write_results(path, **ARGUMENTS).items() if name != "sha256"}
    path.write_text(json.dumps(old | {"format": 1}))
    assert read_results(path)["metrics"] == old["metrics"]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=says("`path`", "another hash")):
        read_results(path)


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_the_hash_is_of_the_content_and_not_of_the_place(saved, checkpoint):
    assert checkpoint_sha256(checkpoint) == checkpoint_sha256(str(saved))
    linked = checkpoint.with_name("linked")
    linked.symlink_to(saved)
    assert checkpoint_sha256(linked) == checkpoint_sha256(saved)


def test_the_hash_leaves_out_what_is_no_component(saved, checkpoint):
    (checkpoint / "README.md").write_text("A card.")
    (checkpoint / "samples").mkdir()
    (checkpoint / "samples" / "grid.png").write_bytes(b"png")
    assert checkpoint_sha256(checkpoint) == checkpoint_sha256(saved)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "latent_embedder/diffusion_pytorch_model.safetensors",
    ],
)
def test_the_hash_changes_with_every_file(saved, checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    # The last byte of the weights; a space in JSON.
    content[-1:] = bytes([content[-1] ^ 1]) if name.endswith("safetensors") else content[-1:] + b" "
    (checkpoint / name).write_bytes(content)
    assert checkpoint_sha256(checkpoint) != checkpoint_sha256(saved)


def test_the_hash_changes_with_names(saved, checkpoint):
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("other.safetensors"))
    assert checkpoint_sha256(checkpoint) != checkpoint_sha256(saved)


def test_the_hash_changes_with_folders(saved, checkpoint):
    """Where the name of the file and the order of all stay as they were."""
    config = checkpoint / "scheduler" / "scheduler_config.json"
    config.rename(checkpoint / "latent_embedder" / config.name)
    assert checkpoint_sha256(checkpoint) != checkpoint_sha256(saved)


def test_a_pipeline_without_an_optional_component_has_a_hash(tmp_path):
    tiny_pipeline(vae=None).save_pretrained(tmp_path / "pixels")
    assert len(checkpoint_sha256(tmp_path / "pixels")) == 64


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("`path`", "model_index.json", str(tmp_path))):
        checkpoint_sha256(tmp_path)
    with pytest.raises(ValueError, match=says("no-such-folder")):
        checkpoint_sha256(tmp_path / "no-such-folder")
