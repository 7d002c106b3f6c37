# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Files: whether they can be written, that they are there whole or not at all, who uses a folder, hashes."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from helpers import contents, says
from launch import PATIENCE_S

from diffusers_dod import files
from diffusers_dod.files import (
    LOCK_FILE,
    check_output,
    file_sha256,
    in_use,
    remove_folder,
    remove_unfinished,
    replacing,
    replacing_contents,
    replacing_files,
    write_json,
)


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_with_sizes_and_what_is_kept(tmp_path):
    path = tmp_path / "weights.bin"

    def write() -> None:
        with replacing(path) as unfinished:
            unfinished.write_bytes(b"12345")
            Path("/dev/full").write_bytes(b"more")

    with pytest.raises(
        OSError, match=says(str(path), "No space left", "5 bytes written", "free", "not there")
    ) as full:
        write()
    assert full.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(OSError, match=says(str(path), "No space left", "as it was before")):
        write()
    assert contents(tmp_path) == {"weights.bin": b"old"}

    class LibraryError(Exception):
        """An error of a library that has only the text of the system's error."""

    with pytest.raises(OSError, match=says(str(tmp_path), "No space left", "2 bytes")):
        with replacing_contents(tmp_path, "index") as folder:
            (folder / "index").parent.mkdir(exist_ok=True)
            (folder / "index").write_text("ab")
            raise LibraryError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    assert contents(tmp_path) == {"weights.bin": b"old"}
    with pytest.raises(LibraryError, match="another"), replacing(path):
        raise LibraryError("another")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with replacing(tmp_path / "folder") as unfinished:
            (unfinished / "deep").mkdir(parents=True)
            (unfinished / "deep" / name).write_text(name)
        assert contents(tmp_path) == {f"folder/deep/{name}": name.encode()}
    remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    pass


def test_contents_of_a_folder_are_never_mixed(tmp_path, monkeypatch):
    """Killed at any renaming: the index is there with the old contents or with the new ones, or not at all."""
    replace, states = os.replace, set()
    for num_steps in range(20):
        folder = tmp_path / f"{num_steps}"
        (folder / "other").mkdir(parents=True)
        for name in ("a/weights", "b/weights", "index.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("old")
        calls = []

        def replace_or_die(source, target, calls=calls, num_steps=num_steps):
            if len(calls) == num_steps:
                raise Killed
            calls.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            try:
                with replacing_contents(folder, "index.json") as unfinished:
                    for name in ("a/weights", "b/weights", "index.json"):
                        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                        (unfinished / name).write_text("new")
                is_killed = False
            except Killed:
                is_killed = True
        visible = {name: text for name, text in contents(folder).items() if not name.startswith(".")}
        assert (folder / "other").is_dir()
        if "index.json" in visible:
            assert set(visible) == {"a/weights", "b/weights", "index.json"} and len(set(visible.values())) == 1
        states.add(visible.get("index.json"))
        if not is_killed:
            break
    assert not is_killed and states == {None, b"new"} and num_steps > 5
    with pytest.raises(KeyError), replacing_contents(folder, "index.json") as unfinished:
        unfinished.mkdir()
        raise KeyError
    assert contents(folder) == visible and set(visible.values()) == {b"new"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_of_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "private") as unfinished:
            os.close(os.open(unfinished, os.O_CREAT, 0o600))
        with replacing(tmp_path / "folder") as unfinished:
            unfinished.mkdir()
            os.close(os.open(unfinished / "private", os.O_CREAT, 0o600))
        (tmp_path / "usual").write_text("")
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "folder" / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the umask is found there")
def test_writing_changes_no_umask(tmp_path, monkeypatch):
    """Else another thread could write a file that everybody may change."""
    monkeypatch.setattr(os, "umask", None)
    with replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("")


def test_files_are_replaced_together(tmp_path, monkeypatch):
    """Each is flushed before it has its name, and the folder at last."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "0.png").write_text("old")
    with pytest.raises(KeyError), replacing_files(tmp_path) as unfinished:
        (unfinished / "0.png").write_text("new")
        raise KeyError
    assert contents(tmp_path) == {"kept": b"kept", "0.png": b"old"} and len(list(tmp_path.iterdir())) == 2
    flushed, flush, replace = [], files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: (flushed.append(path.name), flush(path)))

    def replace_what_is_flushed(source, target):
        assert Path(source).name in flushed
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_what_is_flushed)
    with replacing_files(tmp_path, tmp_path) as unfinished:
        for i in range(40):
            (unfinished / f"{i}.png").write_text("new")
    assert contents(tmp_path) == {"kept": b"kept", **{f"{i}.png": b"new" for i in range(40)}}
    assert flushed[-1] == tmp_path.name and not list(tmp_path.glob(".unfinished*"))


def test_what_a_stopped_command_left_is_removed_but_nothing_in_use(tmp_path):
    # Processes have numbers up to 2**22, so those in the names do not live.
    for place in ("", "bucket-8x8", "samples", "latents"):
        (tmp_path / place / ".unfinished-4194307-folder").mkdir(parents=True)
        (tmp_path / place / ".unfinished-4194307-folder" / "0.png").write_text("half")
        (tmp_path / place / ".unfinished-4194307-file").write_text("half")
        (tmp_path / place / "kept").write_text("kept")
    with in_use(tmp_path / "latents"):
        (tmp_path / "latents" / ".unfinished-4194308-shard").write_text("of the other command")
        with in_use(tmp_path):
            names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".unfinished*")]
            assert names == ["latents/.unfinished-4194308-shard"]
    remove_unfinished(tmp_path)
    assert not list(tmp_path.rglob(".unfinished*")) and len(list(tmp_path.rglob("kept"))) == 4


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
    owner = f"process {process.pid} on {socket.gethostname()} since 20"
    for name in ("output_dir", "latents_dir"):
        with pytest.raises(ValueError, match=says(f"`{name}`", "another command", str(tmp_path / "new"), owner)):
            with in_use(tmp_path / "new", name):
                pass
    with in_use(tmp_path / "other"):
        pass
    process.kill()
    process.join()
    for _ in range(2):
        with in_use(tmp_path / "new"):
            assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK_FILE]
        assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_can_be_waited_for(tmp_path, caplog):
    """The second enters when the first has left, though the first has removed the file of its lock."""
    order, has_entered = [], threading.Event()

    def wait():
        with in_use(tmp_path, waits=True):
            order.append("second")
            has_entered.set()

    with in_use(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not has_entered.wait(0.3)
        order.append("first")
    assert has_entered.wait(PATIENCE_S)
    thread.join()
    assert order == ["first", "second"] and "Waiting for process" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_a_stopped_command_left_unfinished_is_removed(tmp_path):
    (tmp_path / ".unfinished-4194305-checkpoint-7").mkdir()
    (tmp_path / ".unfinished-4194305-checkpoint-7" / "file").write_text("half")
    (tmp_path / ".unfinished-4194305-README.md").write_text("half")
    (tmp_path / "other").write_text("whole")
    with pytest.raises(KeyError), in_use(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"other", LOCK_FILE}
        raise KeyError
    assert contents(tmp_path) == {"other": b"whole"}


def test_systems_without_locks(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError("no locks")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with in_use(tmp_path), in_use(tmp_path):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files, "fcntl", None)
    with in_use(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_the_hash_of_a_file_is_the_usual_one(tmp_path):
    (tmp_path / "file").write_bytes(b"marble" * 100_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"marble" * 100_000).hexdigest()
    (tmp_path / "next").write_bytes(b"wood")
    both = file_sha256(tmp_path / "file", tmp_path / "next")
    assert both == hashlib.sha256(b"marble" * 100_000 + b"wood").hexdigest()


def test_a_folder_that_could_not_be_replaced_stays(tmp_path, monkeypatch):
    """Also for the next command, if the process was killed between the two renames."""
    path, replace = tmp_path / "folder", os.replace
    with replacing(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "old").touch()

    def fail(source, target):
        if Path(target) == path and "-old" not in str(source):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), replacing(path) as unfinished:
        unfinished.mkdir()
    monkeypatch.undo()
    assert [file.name for file in path.iterdir()] == ["old"]
    os.replace(path, tmp_path / f".unfinished-{2**22 + 1}-folder-old")  # a process with this number cannot exist
    remove_unfinished(tmp_path)
    assert [file.name for file in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_what_a_living_process_writes_is_not_removed(tmp_path):
    with replacing(tmp_path / "out.json") as unfinished:
        unfinished.write_text("{}")
        with in_use(tmp_path):
            pass
    assert (tmp_path / "out.json").read_text() == "{}"
