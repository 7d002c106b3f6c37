"""Commands that faults meet: each can be started, started again after a fault, and judged."""

import hashlib
import itertools
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import contents, fresh_accelerator, run_trainer, tiny_pipeline, write_images

from diffusers_dod.data import encoding
from diffusers_dod.evaluation import sample
from diffusers_dod.records import find_record
from diffusers_dod.training import encode_latents, train
from diffusers_dod.training.checkpoints import checkpoint_step, find_latest_checkpoint

from .rows import Ended, in_child


TRAIN = "--preset DoD-Desk --resolution 8 --train_batch_size 4 --logging_steps 1 --checkpointing_steps 2".split()
TRAIN += "--max_train_steps 4 --validation_steps 2 --shard_size 4 --checkpoints_total_limit 1".split()
SPEED = ("images_per_second", "data_wait")


class Job(ABC):
    """
    A command with its input.

    Args:
        shared: Folder for the input and for the result without any fault.
    """

    def __init__(self, shared: Path):
        self.shared = shared
        in_child(lambda: self.prepare()).check()

    def prepare(self) -> None:
        """Writes the input."""
        write_images(self._make("images"), [(9, 11)] * 5)

    def _make(self, name: str) -> Path:
        (self.shared / name).mkdir()
        return self.shared / name

    @abstractmethod
    def run(self, folder: Path, report: Callable[[object], None] = print) -> None:
        """Runs the command, from its beginning or from where it was stopped, and reports what is then safe."""

    @abstractmethod
    def find_lost(self, folder: Path, reported: list) -> list:
        """What was reported and is not there any more."""

    @abstractmethod
    def result(self, folder: Path) -> dict[str, object]:
        """What must be the same after any fault."""

    def make_expected(self) -> list[str]:
        """Runs without a fault, and gives the paths that change, in order."""
        changes = self.shared / "changes"
        in_child(lambda: self._run_noting(self.shared / "whole", changes)).check()
        return changes.read_text().splitlines()

    def _run_noting(self, folder: Path, changes: Path) -> None:
        with changes.open("w") as file:
            on_change(folder, lambda number, path: print(path, file=file))
            self.run(folder)

    def run_until(self, folder: Path, reported: Path, change: int, strike: Callable[[], None]) -> Ended:
        """Runs the command, which meets `strike` before a change of files, and notes what it reports in a file."""

        def work() -> None:
            on_change(folder, lambda number, path: strike() if number == change else None)
            with reported.open("a") as file:
                self.run(folder, lambda thing: (file.write(f"{json.dumps(thing)}\n"), file.flush()))

        return in_child(work)

    def check(self, folder: Path, reported: Path) -> None:
        """Raises unless all that was reported is there, and the command ends as if nothing had been."""
        things = [json.loads(line) for line in reported.read_text().splitlines()]
        lost = self.find_lost(folder, things) if folder.exists() else things
        assert not lost, f"lost: {lost}"
        in_child(lambda: self.run(folder)).check()
        differences = list(find_differences(self.result(folder), self.result(self.shared / "whole")))
        assert not differences, f"another result: {', '.join(differences)}"
        leftovers = [path.name for path in folder.rglob(".*")]
        assert not leftovers, f"left over: {leftovers}"


def on_change(folder: Path, tell: Callable[[int, str], None]) -> None:
    """Calls `tell` with number and path before every file of a folder is opened for writing, moved or removed."""
    import safetensors.torch

    numbers, root = itertools.count(), str(folder)  # counted as one, as a thread may write too

    def hear(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            is_change = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "torture.write"):
            path, is_change = arguments[0], True
        else:
            return
        if is_change and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
            tell(next(numbers), os.fspath(path))

    serialize = safetensors.torch.serialize_file  # which opens files out of sight of Python

    def serialize_file(tensors, path, *args, **kwargs):
        sys.audit("torture.write", path)
        return serialize(tensors, path, *args, **kwargs)

    safetensors.torch.serialize_file = serialize_file
    sys.addaudithook(hear)


def find_differences(found: object, expected: object, name: str = "result") -> Iterator[str]:
    """Names of what differs between two results."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            yield from find_differences(found.get(key), expected.get(key), f"{name}/{key}")
    elif found != expected:
        yield name


def hash_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


class Training(Job):
    """A run of four steps with two checkpoints, of which one is kept, and the finished pipeline."""

    options = TRAIN

    def arguments(self) -> list[object]:
        return ["--train_data_dir", self.shared / "images", "--resume_from_checkpoint", "latest"]

    def run(self, folder: Path, report: Callable[[object], None] = print) -> None:
        save = train.save_checkpoint

        def save_and_report(output_dir, step, *args, **kwargs):
            checkpoint = save(output_dir, step, *args, **kwargs)
            report(step)
            return checkpoint

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "save_checkpoint", save_and_report)
            run_trainer(self.options, folder, *self.arguments())

    def find_lost(self, folder: Path, reported: list) -> list:
        latest = find_latest_checkpoint(folder)
        return [step for step in reported if latest is None or checkpoint_step(latest) < step]

    def result(self, folder: Path) -> dict[str, object]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = ("checkpoint-4", "samples", "latents", "transformer", "latent_embedder", "scheduler")
        metrics = {str(line.pop("step")): {k: v for k, v in line.items() if k not in SPEED} for line in lines}
        index = (folder / "model_index.json").read_text()
        return {"metrics": metrics, "index": index, **{name: hash_of(contents(folder / name)) for name in names}}


class Encoding(Job):
    """Latents in three shards."""

    def run(self, folder: Path, report: Callable[[object], None] = print) -> None:
        write = encoding.write_json

        def write_and_report(path, *args, **kwargs):
            write(path, *args, **kwargs)
            report(path.name)

        with pytest.MonkeyPatch.context() as patch, fresh_accelerator():
            patch.setattr(encoding, "write_json", write_and_report)
            options = ["--resolution", 8, "--shard_size", 4, "--train_data_dir", self.shared / "images"]
            encode_latents.main(list(map(str, [*options, "--latents_dir", folder])))

    def find_lost(self, folder: Path, reported: list) -> list:
        return [name for name in reported if find_record(folder / name, dict) is None]

    def result(self, folder: Path) -> dict[str, object]:
        return hash_of(contents(folder))


class Sampling(Job):
    """Five images in three chunks."""

    image_format = "png"

    def prepare(self) -> None:
        tiny_pipeline().save_pretrained(self.shared / "pipeline")

    def run(self, folder: Path, report: Callable[[object], None] = print) -> None:
        write = sample.SampleFolder.write

        def write_and_report(self, chunk, *args, **kwargs):
            write(self, chunk, *args, **kwargs)
            report(chunk)

        options = ["--pretrained_model_name_or_path", self.shared / "pipeline", "--num_inference_steps", 1]
        options += ["--num_images", 5, "--batch_size", 2, "--format", self.image_format, "--output_dir", folder]
        with pytest.MonkeyPatch.context() as patch, fresh_accelerator():
            patch.setattr(sample.SampleFolder, "write", write_and_report)
            sample.main(list(map(str, options)))

    def find_lost(self, folder: Path, reported: list) -> list:
        if find_record(folder / sample.SAMPLES_MANIFEST, dict) is not None:
            return []
        return [chunk for chunk in reported if find_record(folder / sample.CHUNKS / f"{chunk:06d}.json", dict) is None]

    def result(self, folder: Path) -> dict[str, object]:
        manifest = json.loads((folder / sample.SAMPLES_MANIFEST).read_text())
        del manifest["argv"]
        images = {name: data for name, data in contents(folder).items() if name.endswith((".png", ".npz"))}
        return {"manifest": manifest, "images": hash_of(images)}


class Archive(Sampling):
    """The same in an archive."""

    image_format = "npz"
