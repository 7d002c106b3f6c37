# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Files: whether they can be written, that they are there whole or not at all, who uses a folder, hashes."""

import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from helpers import says
from launch import PATIENCE_S

from diffusers_dod import files
from diffusers_dod.files import check_output, file_sha256, in_use, replacing, write_json


def test_what_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "new.json", tmp_path / "deep" / "er" / "new.json", tmp_path / "file", None):
        check_output("output_file", path)
    check_output("output_dir", tmp_path, is_folder=True)
    check_output("output_dir", tmp_path / "a" / "b", is_folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path, is_folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "new.json", False)):
        with pytest.raises(ValueError, match=says("`name`", "can be written", str(path))):
            check_output("name", path, is_folder)


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=says("`output_file`", "can be written")):
        check_output("output_file", tmp_path / "deep" / "new.json")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as unfinished:
        assert unfinished.parent == path.parent and str(os.getpid()) in unfinished.name
        unfinished.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyError), replacing(path, tmp_path) as unfinished:
        assert unfinished.parent == tmp_path
        unfinished.write_text("second")
        raise KeyError
    assert path.read_text() == "first" and not unfinished.exists()
    with pytest.raises(KeyError), replacing(tmp_path / "folder") as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_of_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "private") as unfinished:
            os.close(os.open(unfinished, os.O_CREAT, 0o600))
        (tmp_path / "usual").write_text("")
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_is_strict_and_written_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": [1, "ä"]})
    assert json.loads(path.read_text()) == {"a": [1, "ä"]}
    for content, kind in (({"a": float("nan")}, ValueError), ({"a": path}, TypeError)):
        with pytest.raises(kind):
            write_json(path, content)
    assert json.loads(path.read_text()) == {"a": [1, "ä"]} and list(path.parent.iterdir()) == [path]


def test_a_folder_in_use_is_refused_until_the_other_command_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    is_in_use = context.Event()

    def use():
        with in_use(tmp_path / "new"):
            is_in_use.set()
            signal.pause()

    process = context.Process(target=use, daemon=True)
    process.start()
    assert is_in_use.wait(PATIENCE_S)
    with pytest.raises(ValueError, match=says("`output_dir`", "another command", str(tmp_path / "new"))):
        with in_use(tmp_path / "new"):
            pass
    with in_use(tmp_path / "other"):
        pass
    process.kill()
    process.join()
    for _ in range(2):
        with in_use(tmp_path / "new"):
            assert list((tmp_path / "new").iterdir()) == []


def test_systems_without_locks(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError("no locks")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with in_use(tmp_path), in_use(tmp_path):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with in_use(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_the_hash_of_a_file_is_the_usual_one(tmp_path):
    (tmp_path / "file").write_bytes(b"marble" * 100_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"marble" * 100_000).hexdigest()
    (tmp_path / "next").write_bytes(b"wood")
    both = file_sha256(tmp_path / "file", tmp_path / "next")
    assert both == hashlib.sha256(b"marble" * 100_000 + b"wood").hexdigest()
