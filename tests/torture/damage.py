"""Files of ours that are damaged, and two commands in one folder."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from helpers import contents

from diffusers_dod import DoDPipeline
from diffusers_dod.data.latents import LatentDataset
from diffusers_dod.evaluation.feature_cache import FeatureCache
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.files import sha256_of_weights
from diffusers_dod.results import as_metric, read_results, write_results
from diffusers_dod.training.checkpoints import find_latest_checkpoint

from .jobs import Archive, Encoding, Job, Sampling, Training, find_differences, on_change
from .rows import Try, in_child, row


REFUSALS = (ValueError, OSError)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    """The same file of another run, step or data set."""
    shutil.copy(other, path)


DAMAGES = (empty, cut, flip, delete, swap)


def damage_all(folder: Path, other: Path, read: Callable[[Path], object]) -> Iterator[Try]:
    """Damages each file in each way: what is read is the same, or is refused by a plain error."""

    def attempt(own: Path, name: str, damage: Callable[[Path, Path], None]) -> None:
        copy = own / folder.name
        shutil.copytree(folder, copy)
        expected = read(copy)
        damage(copy / name, other / name)
        try:
            found = read(copy)
        except REFUSALS:
            return
        differences = list(find_differences(found, expected))
        assert not differences, f"read as if nothing were: {', '.join(differences)}"

    other_names = contents(other).keys()
    for name, content in sorted(contents(folder).items()):
        for damage in DAMAGES:
            if content and (damage is not swap or name in other_names):
                yield f"{name}: {damage.__name__}", lambda own, n=name, d=damage: attempt(own, n, d)


class TwoCheckpoints(Training):
    """Runs of two seeds, whose checkpoints are all kept."""

    seed = 0

    def arguments(self) -> list[object]:
        return [*super().arguments(), "--checkpoints_total_limit", 9, "--seed", self.seed]


def train_twice(shared: Path) -> tuple[Path, Path]:
    job = TwoCheckpoints(shared)
    for job.seed in (0, 1):
        in_child(lambda: job.run(shared / f"{job.seed}" / "run")).check()
    return shared / "0" / "run", shared / "1" / "run"


@row("damaged file: checkpoint, resumed")
def checkpoint(shared: Path) -> Iterator[Try]:
    """The checkpoint before it is taken, or the same one where the damage is none."""
    run, other = train_twice(shared)

    def read(folder: Path) -> object:
        parent = folder.parent / "run"
        shutil.rmtree(parent, ignore_errors=True)
        shutil.copytree(run, parent)
        shutil.rmtree(parent / folder.name)
        shutil.copytree(folder, parent / folder.name)
        latest = find_latest_checkpoint(parent)
        assert latest is not None, "no checkpoint is left"
        return {} if latest.name != folder.name else dict(contents(latest))

    def read_or_older(folder: Path) -> object:
        return read(folder) or read(run / "checkpoint-4")

    yield from damage_all(run / "checkpoint-4", other / "checkpoint-4", read_or_older)


def read_pipeline(folder: Path) -> object:
    pipeline = DoDPipeline.from_pretrained(folder)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "config": {key: value for key, value in pipeline.config.items() if key != "_name_or_path"},
        **{name: sha256_of_weights(model.state_dict()) for name, model in models.items()},
        **{f"{name} config": {k: v for k, v in dict(m.config).items() if k[0] != "_"} for name, m in models.items()},
        "scheduler": {key: value for key, value in pipeline.scheduler.config.items() if key[0] != "_"},
    }


@row("damaged file: checkpoint, read as a pipeline")
def pipeline(shared: Path) -> Iterator[Try]:
    run, other = train_twice(shared)
    yield from damage_all(run / "checkpoint-4", other / "checkpoint-4", read_pipeline)


def run_other(kind: type[Job], shared: Path) -> tuple[Job, Path, Path]:
    """A job, its folder, and the folder of the same job with other input."""
    folders = []
    for name in ("first", "other"):
        (shared / name).mkdir()
        job = kind(shared / name)
        if name == "other":
            in_child(lambda job=job: job.make_other()).check()
        in_child(lambda job=job, name=name: job.run(shared / name / "whole")).check()
        folders.append(shared / name / "whole")
        if name == "first":
            first = job
    return first, *folders


class OtherEncoding(Encoding):
    def make_other(self) -> None:
        from PIL import Image, ImageOps

        for path in (self.shared / "images").rglob("*.png"):
            ImageOps.invert(Image.open(path)).save(path)


class OtherSampling(Sampling):
    def make_other(self) -> None:
        from helpers import tiny_pipeline, tiny_transformer

        tiny_pipeline(transformer=tiny_transformer(seed=9)).save_pretrained(self.shared / "pipeline")


class OtherArchive(OtherSampling, Archive):
    pass


def read_latents(folder: Path) -> object:
    latents = LatentDataset(folder)
    values = {str(i): tuple(map(str, latents.read(i))) for i in range(len(latents))}
    digests = {str(i): sha256_of_weights({"mean": latents.read(i)[0]}) for i in range(len(latents))}
    return {"labels": latents.labels.tolist(), "classes": latents.manifest["class_names"], **values, **digests}


@row("damaged file: latents, read for training")
def latents(shared: Path) -> Iterator[Try]:
    _, folder, other = run_other(OtherEncoding, shared)
    yield from damage_all(folder, other, read_latents)


@row("damaged file: latents, encoded again")
def latents_again(shared: Path) -> Iterator[Try]:
    job, folder, other = run_other(OtherEncoding, shared)

    def encode(own: Path) -> object:
        job.run(own)  # notes of shards are for an encoding that has not ended
        return {name: value for name, value in job.result(own).items() if not re.match(r"shard-\d+\.json", name)}

    yield from damage_all(folder, other, encode)


@row("damaged file: samples, read for evaluation")
def samples(shared: Path) -> Iterator[Try]:
    _, folder, other = run_other(OtherSampling, shared)
    yield from damage_all(folder, other, read_samples)


@row("damaged file: archive of samples, read for evaluation")
def archives(shared: Path) -> Iterator[Try]:
    _, folder, other = run_other(OtherArchive, shared)
    yield from damage_all(folder, other, read_samples)


def read_samples(folder: Path) -> object:
    source = open_images(str(folder))
    images = torch.cat([batch for batch, *_ in source.batches(2)])
    return {"images": sha256_of_weights({"images": images})}


def write_features(folder: Path, seed: int) -> Path:
    """The folder of an entry in a cache of features."""
    cache, settings = FeatureCache(folder, "0" * 64), {"num_drawn": 6, "batch_size": 4, "seed": seed}
    values = np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32)
    with cache.writing(settings) as write:
        write(({"features": values, "logits": values + 1}, np.arange(6)))
    (entry,) = folder.iterdir()
    return entry


def read_features(entry: Path, seed: int = 0) -> object:
    batches = FeatureCache(entry.parent, "0" * 64).open({"num_drawn": 6, "batch_size": 4, "seed": seed})
    listed = ({**rows, "labels": labels} for rows, labels in batches)
    return {str(i): {name: array.tolist() for name, array in found.items()} for i, found in enumerate(listed)}


@row("damaged file: features in a cache")
def features(shared: Path) -> Iterator[Try]:
    yield from damage_all(write_features(shared / "0", 0), write_features(shared / "1", 1), read_features)


@row("damaged file: samples, drawn again")
def samples_again(shared: Path) -> Iterator[Try]:
    job, folder, other = run_other(OtherSampling, shared)
    yield from damage_all(folder, other, lambda own: (job.run(own), job.result(own))[1])


@row("damaged file: results")
def results(shared: Path) -> Iterator[Try]:
    for name, value in (("first", 4.25), ("other", 7.5)):
        (shared / name).mkdir()
        metrics = {"fid": as_metric(value, (value - 1, value + 1)), "kid": as_metric(value / 2)}
        argv = ["samples", "--reference", "images"]
        write_results(shared / name / "fid.json", "evaluate", argv, metrics, {"name": "a"}, {"seed": 1}, "cpu")
    tries = damage_all(shared / "first", shared / "other", lambda own: read_results(own / "fid.json"))
    yield from (attempt for attempt in tries if not attempt[0].endswith("swap"))  # whole, so nothing can tell


# ------------------------------------------------------------------------------------------- two commands, one folder


def run_two(job: Job, changes: range) -> Iterator[Try]:
    """A second command of the same folder starts before a change of files of the first: it is refused by name."""

    def attempt(folder: Path, change: int) -> None:
        seen = []

        def start_second() -> None:
            ended = in_child(lambda: job.run(folder / "run"))
            seen.append(ended)

        def work() -> None:
            on_change(folder / "run", lambda number, path: start_second() if number == change else None)
            job.run(folder / "run")
            assert len(seen) == 1 and seen[0].code == 1 and "in use by" in seen[0].text, seen
            os.write(1, b"")

        in_child(work).check()
        (folder / "reported").touch()
        job.check(folder / "run", folder / "reported")

    for change in changes:
        yield f"change {change}", lambda folder, change=change: attempt(folder, change)


@row("two trainings in one folder")
def two_trainings(shared: Path) -> Iterator[Try]:
    job = Training(shared)
    yield from run_two(job, spread(len(job.make_expected()), 8))


@row("two samplers in one folder")
def two_samplers(shared: Path) -> Iterator[Try]:
    job = Sampling(shared)
    yield from run_two(job, spread(len(job.make_expected()), 8))


@row("two encoders in one folder")
def two_encoders(shared: Path) -> Iterator[Try]:
    """The second one waits; both end."""
    job = Encoding(shared)
    changes = len(job.make_expected())

    def attempt(folder: Path, change: int) -> None:
        children = []

        def start_second() -> None:
            child = os.fork()
            if child == 0:
                os.closerange(3, 1024)  # of the first one, with its lock
                os._exit(in_child(lambda: job.run(folder / "run")).code)
            children.append(child)

        def work() -> None:
            on_change(folder / "run", lambda number, path: start_second() if number == change else None)
            job.run(folder / "run")
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            assert codes == [0], codes

        in_child(work).check()
        (folder / "reported").touch()
        job.check(folder / "run", folder / "reported")

    for change in spread(changes, 8):
        yield f"change {change}", lambda folder, change=change: attempt(folder, change)


def spread(count: int, number: int) -> list[int]:
    """Numbers below `count`, evenly spread, behind the first changes, which make the folder and its lock."""
    first = min(3, count - 1)
    return sorted({first + i * (count - first) // number for i in range(number)})
