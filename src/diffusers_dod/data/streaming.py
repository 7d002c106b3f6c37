# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Streamed training data: images are read, cropped and put into the batch as pixels while the model trains.

A data set consists of shards: Parquet or WebDataset's tar files with many images each. In every pass all shards are
dealt anew to the readers, which are the workers of all processes. A reader holds the images of one shard in memory,
not decoded, and yields them in a random order. All orders are functions of the seed, the pass and the shard. There is
no shuffle buffer, so a few integers describe the position of a reader exactly. At the end of its shards a reader
starts the next pass, and waits for no other reader.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..checks import check_at_least
from ..image_reading import center_crop, to_pixels
from ..options import check_options
from ..processes import worker_settings
from ..seeding import stateless_generator
from .class_names import clean_class_names
from .encoding import EncodingOptions, Share
from .labelled_images import (
    PROCEDURAL,
    Columns,
    ImageOptions,
    check_label_column,
    find_shards,
    open_dataset,
    read_row,
)
from .sample_stream import SampleDraws, collate_priors_first


READ_SIZE = 256  # rows of a shard that are read at a time


def open_stream(
    images: ImageOptions,
    class_names: list[str] | None = None,
) -> tuple[datasets.IterableDataset, tuple[str, ...]]:
    """
    Opens a data set of the Hub, or a folder of Parquet or WebDataset's tar files, without reading its images.

    Args:
        images ([`ImageOptions`]): Source of the images; its columns of classes may hold ids from 0 or names.
        class_names (`list[str]`, *optional*):
            Names of the classes in the order of their ids. Needed unless the column is of type `ClassLabel`.

    Returns:
        `tuple[datasets.IterableDataset, tuple[str, ...]]`: The two columns, with images not decoded, and the names of
        the classes.

    Raises:
        `ValueError`: both or neither source is given, it cannot be opened, it has no such columns, or its classes are
            unknown.
    """
    if errors := images.find_source_errors():
        raise ValueError(errors[0])
    image_column, label_column = images.image_column, images.label_column
    stream = (
        _open_dataset(images.dataset_name) if images.train_data_dir is None else _open_folder(images.train_data_dir)
    )
    features = stream.features or {}  # formats such as JSON do not list their columns in advance
    for name, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in features:
            raise ValueError(f"`{name}` must be one of the columns {sorted(features)}, got {column!r}.")
    feature = features[image_column]
    is_plain = feature == datasets.Value("binary") or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    if not isinstance(feature, datasets.Image) and not is_plain:
        raise ValueError(f"`image_column` must be a column of images, got {image_column!r} of type {feature}.")
    class_names = _check_classes(features[label_column], label_column, class_names)
    stream = stream.select_columns([image_column, label_column])
    # Decoded here, so that what cannot be read has a path and a reason.
    return stream.cast_column(image_column, datasets.Image(decode=False)), class_names


def _open_folder(folder: str) -> datasets.IterableDataset:
    shards = find_shards(folder)
    if shards is None:
        raise ValueError(
            f"`train_data_dir` must be a folder with Parquet or tar files to be streamed, got {folder!r}."
        )
    # By default Parquet files are read by the size of their first group of rows, which fails where that is 0.
    options = {"batch_size": READ_SIZE} if shards.builder == "parquet" else {}
    return datasets.load_dataset(shards.builder, data_files=shards.patterns, split="train", streaming=True, **options)


def _open_dataset(name: str) -> datasets.IterableDataset:
    if name in PROCEDURAL:
        raise ValueError(
            f"`dataset_name` must be a stored data set to be streamed, not a procedural one, got {name!r}."
        )
    return open_dataset(name, streaming=True)


def _check_classes(feature: Any, label_column: str, class_names: list[str] | None) -> tuple[str, ...]:
    """Names of the classes, from the `ClassLabel` if the column is one."""
    check_label_column(feature, label_column)
    own_names = getattr(feature, "names", None)
    if own_names is None and not class_names:
        raise ValueError(
            "`class_names` must be given where `label_column` is not of type ClassLabel, since a stream does not tell "
            f"its classes in advance, got {class_names!r} for {label_column!r} of type {feature}."
        )
    if own_names is not None and class_names is not None and list(class_names) != list(own_names):
        raise ValueError(f"`class_names` must be those of {label_column!r}, {own_names}, got {class_names}.")
    class_names = clean_class_names(class_names if own_names is None else own_names)
    if own_names is None and "string" in feature.dtype and len(set(class_names)) < len(class_names):
        raise ValueError(
            f"`class_names` must differ from each other where the labels are names, got {list(class_names)}."
        )
    return class_names


@dataclass
class StreamState:
    """
    Position of one process in a stream: behind the last batch it has used, however far its workers have read ahead.

    Args:
        seed (`int`): Seed of the orders.
        num_shards (`int`): Shards of the data set.
        num_processes (`int`): Number of processes.
        num_workers (`int`): Readers of a process, at least 1.
        process_index (`int`): Index of this process.
        batch_size (`int`): Samples in a micro-batch of one process.
        num_batches (`int`, defaults to 0): Micro-batches that this process has used. Its readers bring them in turn.
        readers (`list[list[int]]`, defaults to `[]`):
            Four numbers for each reader of this process: its pass, its current shard, the rows of that shard it has
            done, and the bad images it has left out so far. All zeros by default.
    """

    seed: int
    num_shards: int
    num_processes: int
    num_workers: int
    process_index: int
    batch_size: int
    num_batches: int = 0
    readers: list[list[int]] = field(default_factory=list)

    def __post_init__(self):
        self.readers = self.readers or [[0, 0, 0, 0] for _ in range(self.num_workers)]

    @property
    def num_bad_images(self) -> int:
        """Number of bad images that this process has left out so far, counted again in every pass."""
        return sum(reader[-1] for reader in self.readers)

    def update(self, batch: dict[str, Any]) -> None:
        """Moves behind `batch`, the next one of the loader, and removes the entries of the state from it."""
        # A reader's own states grow, so that the greatest is the last, whatever the order in the batch.
        self.readers[self.num_batches % self.num_workers] = max(batch.pop("reader_state").tolist())
        self.num_batches += 1

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict for JSON."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Moves to the position of another run.

        Args:
            state (`dict`): The [`StreamState.state_dict`] of this process in that run.

        Raises:
            `ValueError`: that run had another seed, data set, number of processes or workers, or batch size.
        """
        for name in ("num_processes", "num_workers", "process_index", "num_shards", "batch_size", "seed"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"`{name}` must be {state.get(name)!r} as in the run that is resumed, got {getattr(self, name)}: "
                    "a stream is exact only at the same number of processes and workers, with the same data, batch "
                    "size and seed. No worker counts as one."
                )
        self.num_batches = state["num_batches"]
        self.readers = [list(reader) for reader in state["readers"]]


class ImageStream(IterableDataset):
    """
    The endless stream of training samples of one process, from its `state` on.

    The order of the images depends on (seed, pass, shard). The random draws of a sample depend on (seed, position) as
    in [`TrainingSamples`], with the position from [`PositionSampler`].

    A sample is a dict of the `pixels` (3, R, R) in [-1, 1], `noise` and `posterior_noise` (C, h, w), `sigma`,
    `class_label`, `has_prior`, and the `reader_state` (4,): the position of its reader behind it.

    Args:
        stream (`datasets.IterableDataset`): A stream from [`open_stream`], with at least as many shards as readers.
        class_names (`tuple[str, ...]`): Names of the classes in the order of their ids.
        draws ([`SampleDraws`]): The random draws. The orders use the same seed.
        latent_shape (`tuple[int, ...]`): Shape (C, h, w) of the latents.
        batch_size (`int`): Samples in a micro-batch of one process.
        images ([`ImageOptions`], *optional*): Columns of the stream, and the side R of the images in pixels.
        encoding ([`EncodingOptions`], *optional*): Workers of the `DataLoader`, whether half of the images are
            mirrored, and whether an image that cannot be read or has no class is an error or is left out and counted.
        share ([`Share`], *optional*): This process among all; the only one if not given.
        state (`dict`, *optional*): A [`StreamState.state_dict`] to continue from. By default the start.

    Raises:
        `ValueError`: an argument is out of range, there are fewer shards than readers, or the state comes from a run
            with other settings.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        class_names: tuple[str, ...],
        draws: SampleDraws,
        latent_shape: tuple[int, ...],
        batch_size: int,
        images: ImageOptions | None = None,
        encoding: EncodingOptions | None = None,
        share: Share | None = None,
        state: dict[str, Any] | None = None,
    ):
        images, encoding, share = images or ImageOptions(), encoding or EncodingOptions(), share or Share()
        check_options(images)
        check_options(encoding)
        check_at_least("batch_size", batch_size, 1)
        num_workers = encoding.dataloader_num_workers or 0
        num_readers = max(num_workers, 1)
        if len(class_names) != draws.num_classes:
            raise ValueError(f"`class_names` must be {draws.num_classes} names, got {len(class_names)}.")
        if stream.num_shards < share.num_processes * num_readers:
            raise ValueError(
                "`num_shards` of the data set must be at least the number of processes times that of workers, "
                f"{share.num_processes} x {num_readers}, got {stream.num_shards}: use fewer of them, or store the "
                "data in more files."
            )
        self.stream = stream
        self.columns = Columns(
            images.image_column, images.label_column, {name: index for index, name in enumerate(class_names)}
        )
        self.draws = draws
        self.resolution = images.resolution
        self.latent_shape = latent_shape
        self.num_workers = num_workers
        self.random_flip = encoding.random_flip
        self.on_bad_image = encoding.on_bad_image
        #: Position of this process; call [`StreamState.update`] with each batch that is used.
        self.state = StreamState(
            seed=draws.seed,
            num_shards=stream.num_shards,
            num_processes=share.num_processes,
            num_workers=num_readers,
            process_index=share.process_index,
            batch_size=batch_size,
        )
        if state is not None:
            self.state.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state, worker = self.state, get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if num_workers != state.num_workers:
            raise ValueError(f"`num_workers` of the loader must be {state.num_workers}, got {num_workers}.")
        # A new loader takes its first batch from worker 0, so worker 0 plays the reader whose turn it is.
        first_batch = state.num_batches + worker_id
        images = self._read(first_batch % num_workers)
        for batch in itertools.count(first_batch, num_workers):
            start = (batch * state.num_processes + state.process_index) * state.batch_size
            for position in range(start, start + state.batch_size):
                yield self._sample(position, *next(images))

    def _sample(self, position: int, image: np.ndarray, label: int, reader_state: list[int]) -> dict[str, Any]:
        draw = self.draws(position)
        pixels = to_pixels(torch.from_numpy(image)[None])[0]
        return {
            "pixels": pixels.flip(-1) if self.random_flip and draw.view >= 0.5 else pixels,
            "noise": torch.randn(self.latent_shape, generator=draw.generator),
            "posterior_noise": torch.randn(self.latent_shape, generator=draw.generator),
            "sigma": draw.sigma,
            "class_label": self.draws.num_classes if draw.drops_label else label,
            "has_prior": not draw.drops_prior,
            **self.draws.draw_prior_noise(draw, self.latent_shape),
            "reader_state": torch.tensor(reader_state),
        }

    def _read(self, reader: int) -> Iterator[tuple[np.ndarray, int, list[int]]]:
        """Yields images and labels of one reader of this process, each with the reader's position behind it."""
        state = self.state
        epoch, next_index, next_offset, num_bad = state.readers[reader]
        reader += state.process_index * state.num_workers
        num_readers = state.num_processes * state.num_workers
        empty_shards = set()  # shards without an image since the last image
        while True:
            shards = self._permutation(state.num_shards, epoch)[reader::num_readers]
            for index in range(next_index, len(shards)):
                shard = shards[index]
                if next_offset == 0:
                    empty_shards.add(shard)
                for offset, sample in self._read_shard(epoch, shard, next_offset):
                    if sample is None:
                        num_bad += 1
                        continue
                    empty_shards.clear()
                    yield *sample, [epoch, index, offset + 1, num_bad]
                if len(empty_shards) == state.num_shards:
                    raise ValueError(
                        f"The stream must have images, got {state.num_shards} shards with none that can be read and "
                        f"has a label in [0, {self.draws.num_classes - 1}]."
                    )
                next_offset = 0
            epoch, next_index = epoch + 1, 0

    def _permutation(self, size: int, *ids: int) -> list[int]:
        return torch.randperm(size, generator=stateless_generator(self.state.seed, 0, *ids)).tolist()

    def _read_shard(self, epoch: int, shard: int, start: int) -> Iterator[tuple[int, tuple[np.ndarray, int] | None]]:
        """Yields places in the order of a shard from `start` on, with image and label; `None` for a bad image."""
        part = self.stream.shard(num_shards=self.stream.num_shards, index=shard)
        # Unlike `iter(part)`, this does not deal the shards to the workers of a `DataLoader` once more.
        columns = (self.columns.image, self.columns.label)
        rows = [
            dict(zip(columns, values, strict=True))
            for batch in part.iter(batch_size=READ_SIZE)
            for values in zip(*(batch[column] for column in columns), strict=True)
        ]
        order = self._permutation(len(rows), epoch, shard)
        for offset in range(start, len(rows)):
            row = rows[order[offset]]
            try:
                sample = self._decode(row)
            except _BadImage as error:
                if self.on_bad_image == "error":
                    path = (row[self.columns.image] or {}).get("path")
                    raise ValueError(
                        f"{f'{path}, ' if path else ''}row {order[offset]} of shard {shard} cannot be used: {error}. "
                        "Repair or remove it, or leave out such images with `on_bad_image` = 'skip'."
                    ) from error
                sample = None
            yield offset, sample

    def _decode(self, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        source = row[self.columns.image]
        if source is not None and source["bytes"] is None and source["path"]:  # a file or an address
            try:
                with fsspec.open(source["path"], "rb") as file:
                    row = {**row, self.columns.image: {**source, "bytes": file.read()}}
            except FileNotFoundError as error:  # only its absence is for good
                raise _BadImage("there is no such file") from error
        try:
            image, class_id = read_row(row, self.columns)
            with image:
                pixels = center_crop(image, self.resolution)
        except MemoryError:
            raise
        except Exception as error:  # each library that decodes files has its own
            raise _BadImage(f"{type(error).__name__}: {error}") from error
        num_classes = self.draws.num_classes
        if not isinstance(class_id, int) or not 0 <= class_id < num_classes:
            raise _BadImage(f"its label is {class_id!r}, not in [0, {num_classes - 1}] and no name of a class")
        return pixels, class_id


class _BadImage(Exception):
    """Raised for an image that cannot be used."""


def build_stream_loader(samples: ImageStream, pin_memory: bool = False) -> DataLoader:
    """
    Builds the endless loader of one process's micro-batches; pass each to [`StreamState.update`] when it is used.

    Args:
        samples ([`ImageStream`]): The samples. The loader has the same batch size and workers.
        pin_memory (`bool`, defaults to `False`): Whether the batches are put into pinned memory, for a GPU.

    Returns:
        `torch.utils.data.DataLoader` of dicts: `pixels` (B, 3, R, R), `noise` and `posterior_noise` (B, C, h, w),
        `sigmas` and `class_labels` (B,), samples with a prior first, `num_priors`, and entries of the state.
    """
    return DataLoader(
        samples,
        batch_size=samples.state.batch_size,
        collate_fn=collate_priors_first,
        pin_memory=pin_memory,
        # New workers of a loader that is used again know where the last ones ended.
        **worker_settings(samples.num_workers) | {"persistent_workers": False},
    )
