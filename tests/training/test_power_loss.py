"""
What is left after a loss of power: every checkpoint that a run has reported, every shard and every image of a chunk.

A disk that keeps no more than it must is simulated: a file has the content of its last fsync. A folder has the names
of its last fsync or, as on some file systems, all of its names.
"""

import json
import os
import stat
from pathlib import Path

import pytest
from helpers import contents, fresh_accelerator, run_trainer, tiny_pipeline, write_images

from diffusers_dod.evaluation import sample
from diffusers_dod.files import LOCK_FILE
from diffusers_dod.training import encode_latents, train
from diffusers_dod.training.checkpoints import find_latest_checkpoint


TINY = "--preset DoD-Desk --train_batch_size 4 --logging_steps 1 --checkpointing_steps 2 --resolution 8".split()
TINY += "--max_train_steps 4 --validation_steps 2 --shard_size 4".split()
SPEED = ("images_per_second", "data_wait")


class Disk:
    """Notes what fsync has made durable, by inode; inodes that it knows are kept open, so that none is used again."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.contents: dict[int, bytes | dict[str, int]] = {}
        self.kept: dict[int, int] = {}
        fsync = os.fsync

        def note(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if stat.S_ISDIR(status.st_mode):
                names = {entry.name: entry.inode() for entry in os.scandir(path)}
                self.contents[status.st_ino] = names
                self.kept |= {
                    inode: os.open(path / name, os.O_RDONLY) for name, inode in names.items() if inode not in self.kept
                }
            else:
                self.contents[status.st_ino] = path.read_bytes()

        patch.setattr(os, "fsync", note)

    def restore(self, folder: Path, target: Path, keeps_names: bool) -> Path:
        """Writes what a loss of power leaves of a folder, which is durable itself, to `target`."""
        root = folder.stat().st_ino
        self._restore(self.contents.get(root, {}), target, folder if keeps_names else None)
        return target

    def _restore(self, names: dict[str, int], target: Path, current: Path | None) -> None:
        target.mkdir()
        if current is not None:
            names = {path.name: path.stat().st_ino for path in current.iterdir()}
        for name, inode in names.items():
            content = self.contents.get(inode)
            is_folder = isinstance(content, dict) or (current is not None and (current / name).is_dir())
            if is_folder:
                self._restore(content or {}, target / name, None if current is None else current / name)
            else:
                (target / name).write_bytes(content or b"")

    def close(self) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="paths of open files are found there")


@pytest.fixture
def disk(monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        yield disk
    disk.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[object]:
    return ["--train_data_dir", write_images(tmp_path_factory.mktemp("images"), [(9, 11)] * 5)]


def read_metrics(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def test_every_reported_checkpoint_resumes(tmp_path, data, disk, monkeypatch):
    """Power is lost when a checkpoint has been reported, and when the run has ended."""
    left = []
    save, save_of_trainer = train.save_checkpoint, train.Trainer.save

    def save_and_wait(self, *args):  # as a folder cannot be read in which files come and go
        save_of_trainer(self, *args)
        self.finish_saving()

    def save_and_lose_power(output_dir, step, *args):
        checkpoint = save(output_dir, step, *args)
        for keeps_names in (False, True):
            left.append((step, disk.restore(output_dir, tmp_path / f"{step}-{keeps_names}", keeps_names)))
        return checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_lose_power)
        patch.setattr(train.Trainer, "save", save_and_wait)
        whole = run_trainer(TINY, tmp_path / "whole", *data)
    for keeps_names in (False, True):
        left.append((4, disk.restore(whole, tmp_path / f"end-{keeps_names}", keeps_names)))
    assert [step for step, _ in left] == [2, 2, 4, 4, 4, 4]
    for _, run in left[-2:]:
        found, expected = contents(run), contents(whole)
        found = {name: content for name, content in found.items() if not name.endswith(LOCK_FILE)}  # stale
        del found["curves.png"], expected["curves.png"]  # drawn by the stand-in of these tests
        assert found == expected
    encode = encode_latents.encode_latents
    encoded = []
    monkeypatch.setattr(encode_latents, "encode_latents", lambda *args, **kw: (encoded.append(1), encode(*args, **kw)))
    for step, run in left:
        found = find_latest_checkpoint(run)
        assert found is not None and found.name == f"checkpoint-{step}"
        assert [line["step"] for line in read_metrics(run)][:step] == list(range(1, step + 1))
        run_trainer(TINY, run, *data, "--resume_from_checkpoint", "latest")
        assert read_metrics(run) == read_metrics(whole) and encoded == []
        for name in ("checkpoint-4", "samples", "latents", "transformer", "latent_embedder"):
            assert contents(run / name) == contents(whole / name), name


@pytest.mark.parametrize("keeps_names", [False, True])
def test_encoding_goes_on(tmp_path, data, disk, monkeypatch, keeps_names):
    """Power is lost behind each of the three shards."""
    from diffusers_dod.data import encoding

    left = []
    save = encoding.write_json

    def save_and_lose_power(path, content):
        save(path, content)
        left.append(disk.restore(path.parent, tmp_path / f"left-{len(left)}", keeps_names))

    def encode(folder: Path) -> dict[str, bytes]:
        with fresh_accelerator():
            options = ["--resolution", 8, "--shard_size", 4, *data, "--latents_dir", folder]
            encode_latents.main(list(map(str, options)))
        return contents(folder)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "write_json", save_and_lose_power)
        expected = encode(tmp_path / "whole")
    assert len(left) == 4  # three notes and the manifest
    written = []
    save_file = encoding.save_file
    monkeypatch.setattr(encoding, "save_file", lambda *args: (written.append(1), save_file(*args)))
    for done, folder in enumerate(left, 1):
        written.clear()
        assert encode(folder) == expected and len(written) == max(0, 3 - done)


@pytest.mark.parametrize("image_format", ["png", "npz"])
@pytest.mark.parametrize("keeps_names", [False, True])
def test_sampling_goes_on(tmp_path, disk, monkeypatch, image_format, keeps_names):
    """Power is lost behind each chunk, and at the end."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    options = ["--pretrained_model_name_or_path", tmp_path / "pipeline", "--num_inference_steps", 1]
    options += ["--num_images", 5, "--batch_size", 2, "--format", image_format]
    left = []

    def draw(folder: Path) -> dict[str, bytes]:
        with fresh_accelerator():
            sample.main(list(map(str, [*options, "--output_dir", folder])))
        return contents(folder)

    write = sample.SampleFolder.write

    def write_and_lose_power(self, chunk, images, device):
        write(self, chunk, images, device)
        left.append(disk.restore(self.folder, tmp_path / f"left-{chunk}", keeps_names))

    with monkeypatch.context() as patch:
        patch.setattr(sample.SampleFolder, "write", write_and_lose_power)
        expected = draw(tmp_path / "whole")
    left.append(disk.restore(tmp_path / "whole", tmp_path / "end", keeps_names))
    manifest = json.loads(expected.pop("manifest.json"))
    chunks = []
    monkeypatch.setattr(sample.SampleFolder, "write", lambda self, *args: (chunks.append(1), write(self, *args)))
    for folder, num_missing in zip(left, (2, 1, 0, 0), strict=True):
        chunks.clear()
        found = draw(folder)
        assert json.loads(found.pop("manifest.json"))["sha256"] == manifest["sha256"]
        assert {name: found[name] for name in found if "chunks" not in name} == {
            name: expected[name] for name in expected if "chunks" not in name
        }
        assert len(chunks) == num_missing
