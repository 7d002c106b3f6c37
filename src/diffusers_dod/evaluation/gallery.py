# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Sampling of what a visitor of the demo asks for: settings, limits of the server, a plan of calls of the pipeline, what
they cost, and rows of images.

Every image of a later stage has a start: a sample of stage 1 or a photo. Latent tokens of the start, or tokens between
two starts, are its prior. So all modes are one sampling of starts, and one of images.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..checks import MAX_STEPS, check_at_least, check_number
from ..compute import ModelCost, count_model, sampling_compute
from ..image_reading import cover_and_crop
from ..image_settings import save_with_settings
from ..options import check_options, check_types, from_values, list_options, option, to_json, to_values
from ..pipeline_dod import DoDPipeline
from ..results import CheckpointIdentity
from ..tableaus import SOLVERS


TASK = "demo"
MODES = ("classes", "variations", "between", "grid")
FIXED_SOLVERS = tuple(name for name, solver in SOLVERS.items() if not solver.is_adaptive)
MAX_SCALE = 20.0
MAX_AT_ONCE = 10_000  # images, of which a server may draw fewer
MAX_SIZE_FACTOR = 64
PHOTO_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: Called after each step with their number so far, that of all steps, and the stage. It may raise [`Stopped`].
Report = Callable[[int, int, int], None]
PHOTO = -1  # in place of the class of a start


class Stopped(Exception):
    """The visitor has cancelled, or is gone."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a visitor may ask for at once. The server checks it, whatever the page allows."""

    max_stages: int = option(4, at_least=1, at_most=8, help="Stages.")
    max_inference_steps: int = option(100, at_least=1, at_most=MAX_STEPS, help="Steps of a stage.")
    max_images: int = option(32, at_least=1, at_most=MAX_AT_ONCE, help="Images of the last stage.")
    max_batch_size: int = option(
        16, at_least=1, at_most=MAX_AT_ONCE, help="Images at a time; more are drawn one batch after the other."
    )
    max_size_factor: float = option(
        2.0, at_least=1, at_most=MAX_SIZE_FACTOR, help="Sides of an image, as a multiple of the trained ones."
    )
    max_upload_mb: int = option(20, at_least=1, help="Megabytes of a photo.")
    max_megapixels: int = option(50, at_least=1, help="Millions of pixels of a photo.")
    max_waiting: int = option(50, at_least=1, help="Visitors who wait for their turn; others are sent away.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the images of a visitor depend on, but for the photos."""

    mode: str = option("classes", choices=MODES, help="What is drawn.")
    classes: tuple[int, ...] = option((0,), at_least=0, is_distinct=True, help="Ids of the classes.")
    num_images: int = option(4, at_least=1, help="Images of each class.")
    num_between: int = option(6, at_least=2, help="Images from one start to the other.")
    num_stages: int = option(2, at_least=1, help="Number of stages.")
    steps: int = option(20, at_least=1, help="Intervals of a stage.")
    solver: str = option("euler", choices=FIXED_SOLVERS, help="Solver of all stages.")
    scales: tuple[float, ...] = option((1.0, 3.0), at_least=0, at_most=MAX_SCALE, help="Guidance scale of each stage.")
    grid_scales: tuple[float, ...] = option(
        (1.0, 2.0, 3.0, 5.0, 8.0), at_least=0, at_most=MAX_SCALE, is_distinct=True, help="Columns of the grid."
    )
    first_scales: tuple[float, ...] | None = option(
        None,
        at_least=0,
        at_most=MAX_SCALE,
        is_distinct=True,
        help="Guidance scales of stage 1, a row of the grid each.",
    )
    size: int | None = option(None, at_least=1, help="Side of the images in pixels; the trained one by default.")
    seed: int = option(0, at_least=0, below=2**32, help="Seed of the noise.")


def check_settings(settings: Settings, limits: Limits, pipe: DoDPipeline) -> None:
    """
    Raises unless settings are in range, fit the pipeline and are within the limits of the server.

    Args:
        settings ([`Settings`]): The settings of a visitor.
        limits ([`Limits`]): The limits.
        pipe ([`DoDPipeline`]): The pipeline.

    Raises:
        `ValueError`, `TypeError`: they are not; the message is for the visitor.
    """
    for name, known in list_options(Settings).items():
        if known.default is not None and getattr(settings, name) is None:
            raise ValueError(f"`{name}` must be given, got None.")
    check_options(settings)
    num_classes = pipe.transformer.config.num_classes
    for label in settings.classes:
        check_at_least("classes", label, 0, num_classes - 1)
    most = limits.max_stages if pipe.latent_embedder is not None else 1
    check_at_least("num_stages", settings.num_stages, 1, most)
    if settings.mode in ("variations", "between"):
        check_at_least("num_stages", settings.num_stages, 2, most)
    if len(settings.scales) != settings.num_stages:
        raise ValueError(f"`scales` must hold one for each of {settings.num_stages} stages, got {settings.scales}.")
    check_at_least("steps", settings.steps, 1, limits.max_inference_steps)
    if settings.size is not None:
        largest = trained_size(pipe) * limits.max_size_factor
        check_number("size", settings.size, 1, largest)
    if (total := count_images(settings)) > limits.max_images:
        raise ValueError(f"This server draws at most {limits.max_images} images at once, got {total}.")


def count_images(settings: Settings) -> int:
    """Number of images of the last stage that `settings` ask for."""
    if settings.mode == "between":
        return settings.num_between
    columns = len(settings.grid_scales) * len(settings.first_scales or (1,)) if settings.mode == "grid" else 1
    return len(settings.classes) * settings.num_images * columns


def trained_size(pipe: DoDPipeline) -> int:
    """Side in pixels of the images that a pipeline, `pipe`, was trained on."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


@dataclass(frozen=True)
class Start:
    """
    What the prior of an image comes from.

    Args:
        label (`int`): Class of a sample of stage 1, or `PHOTO`.
        index (`int`): Index of the noise, or of the photo.
        scale (`float`): Guidance scale of stage 1.
    """

    label: int
    index: int
    scale: float


@dataclass(frozen=True)
class Wanted:
    """
    An image of the last stage.

    Args:
        label (`int`): Class of the image.
        index (`int`): Index of the noise.
        scales (`tuple[float, ...]`): Guidance scale of each stage after stage 1.
        starts (`tuple[Start, Start]`): What its prior lies between.
        weight (`float`, defaults to 0.0): Place between both, 0 at the first.
    """

    label: int
    index: int
    scales: tuple[float, ...]
    starts: tuple[Start, Start]
    weight: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """
    An image for the visitor.

    Args:
        image (`PIL.Image.Image`): The image.
        options (`dict`): Settings that it depends on, for its file; `None` for a photo.
    """

    image: Image.Image
    options: dict[str, Any] | None


@dataclass(frozen=True)
class Result:
    """
    Images in rows, as a grid shows them.

    Args:
        rows (`list[list[Drawn]]`): The images. In front of a row is the one that its others are compared with.
        row_names (`list[str]`): Caption of each row.
        column_names (`list[str]`): Caption of each column.
        title (`str`): Caption of all.
    """

    rows: list[list[Drawn]]
    row_names: list[str]
    column_names: list[str]
    title: str


@dataclass(frozen=True)
class Cost:
    """
    What a request costs.

    Args:
        num_images (`int`): Number of images of the last stage.
        num_evaluations (`int`): Evaluations of the model, an image and a guided half each counted on its own.
        flops (`float`): Floating-point operations.
        num_steps (`int`): Steps that are reported.
        has_adapters (`bool`): Whether there are adapters, which `flops` is without.
    """

    num_images: int
    num_evaluations: int
    flops: float
    num_steps: int
    has_adapters: bool

    def to_html(self) -> str:
        """Says it for the visitor."""
        units = ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)
        unit, size = next((unit, size) for unit, size in units if self.flops >= size or size == 1e6)
        images = "image" if self.num_images == 1 else "images"
        return (
            f"<b>{self.num_images} {images}</b> for <b>{self.num_evaluations:,}</b> evaluations of the model, "
            f"<b>{self.flops / size:.3g} {unit}</b>{' without the adapters' if self.has_adapters else ''}."
        )


def open_photo(path: Path, limits: Limits, height: int, width: int) -> Image.Image:
    """
    Reads a photo of a visitor, and crops it as the pipeline does.

    Args:
        path (`Path`): The file, whatever is in it.
        limits ([`Limits`]): The limits of the server.
        height (`int`): Height of the crop in pixels.
        width (`int`): Width of the crop.

    Returns:
        `PIL.Image.Image`: The crop, RGB.

    Raises:
        `ValueError`: it is no image that can be read, or too large; the message is for the visitor.
    """
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            if image.width * image.height > limits.max_megapixels * 1_000_000:
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, more than {limits.max_megapixels} million"
                )
            return Image.fromarray(cover_and_crop(image, height, width))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is damaged, or no image" if isinstance(error, (OSError, SyntaxError)) else str(error)
        raise ValueError(f"The photo cannot be read: {reason}. It must be {', '.join(PHOTO_FORMATS)}.") from error


class Sampler:
    """
    Samples what visitors ask for.

    Args:
        pipe ([`DoDPipeline`]): The pipeline.
        limits ([`Limits`]): The limits of the server.
        checkpoint (`dict`): Path and hash of the pipeline, for the settings in each image.
    """

    def __init__(self, pipe: DoDPipeline, limits: Limits, checkpoint: CheckpointIdentity):
        self.pipe, self.limits, self.checkpoint = pipe, limits, checkpoint
        self._costs: dict[int, ModelCost] = {}  # by side of the images

    def class_name(self, label: int) -> str:
        """The first name of the class `label`, or its id."""
        return self.pipe.id2label.get(label, f"class {label}").split(",")[0]

    def check(self, settings: Settings) -> None:
        """
        Raises unless the server draws what `settings` ask for.

        Args:
            settings ([`Settings`]): The settings of a visitor.

        Raises:
            `ValueError`, `TypeError`: they are out of range; the message is for the visitor.
        """
        check_settings(settings, self.limits, self.pipe)
        multiple = self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size
        if (settings.size or multiple) % multiple:
            raise ValueError(f"`size` must be a multiple of {multiple} pixels, got {settings.size}.")

    def plan(self, settings: Settings, photos: Collection[int] = ()) -> list[list[Wanted]]:
        """
        Lays out the images of the last stage in rows.

        Args:
            settings ([`Settings`]): Settings in range.
            photos (`Collection[int]`, defaults to `()`): Which of the starts are photos: 0, or 0 and 1 in between.

        Returns:
            `list[list[Wanted]]`: The rows.
        """
        first_scale, later = settings.scales[0], settings.scales[1:]
        if settings.mode == "between":
            ends = [Start(label, 0, first_scale) for label in (settings.classes[0], settings.classes[-1])]
            ends = [Start(PHOTO, end, 1.0) if end in photos else start for end, start in enumerate(ends)]
            weights = [number / (settings.num_between - 1) for number in range(settings.num_between)]
            labels = [settings.classes[0] if weight < 0.5 else settings.classes[-1] for weight in weights]
            return [
                [Wanted(label, 0, later, tuple(ends), weight) for label, weight in zip(labels, weights, strict=True)]
            ]
        indices = range(settings.num_images)
        if settings.mode == "variations":
            starts = (Start(PHOTO, 0, 1.0),) * 2
            return [[Wanted(label, index, later, starts) for index in indices] for label in settings.classes]
        if settings.mode == "classes":
            return [
                [Wanted(label, index, later, (Start(label, index, first_scale),) * 2)]
                for label in settings.classes
                for index in indices
            ]
        firsts = settings.first_scales or (first_scale,)
        rows = []
        for label in settings.classes:
            for first in firsts:
                for index in indices:
                    scales = [
                        ((first, *[scale] * len(later)) if later else (scale,)) for scale in settings.grid_scales
                    ]
                    rows.append([Wanted(label, index, s[1:], (Start(label, index, s[0]),) * 2) for s in scales])
        return rows

    def cost(self, settings: Settings, photos: Collection[int] = ()) -> Cost:
        """
        Counts what a request costs, before it runs.

        Args:
            settings ([`Settings`]): Settings in range.
            photos (`Collection[int]`, defaults to `()`): Which of the starts are photos.

        Returns:
            [`Cost`]: Without the autoencoder, adapters, and the latent embedder on photos.
        """
        side = settings.size or trained_size(self.pipe)
        if side not in self._costs:
            self._costs[side] = count_model(self.pipe, (side // self.pipe.vae_scale_factor,) * 2)
        wanted = [image for row in self.plan(settings, photos) for image in row]
        starts, batches = _batch(wanted, settings, self.limits)

        def count(scales: Sequence[float]) -> list[dict[str, Any]]:
            number = len(scales)
            compute = [settings.steps] * number, list(scales), [settings.solver] * number
            return sampling_compute(self.pipe, *compute, cost=self._costs[side])["stages"]

        evaluations = flops = steps = 0
        for batch in starts:
            (stage,) = count([batch[0].scale])
            evaluations += len(batch) * (stage["num_evaluations"] + stage["num_guided_evaluations"])
            flops, steps = flops + len(batch) * stage["flops"], steps + stage["num_evaluations"]
        for batch in batches:
            for stage in count([1.0, *batch[0].scales])[1:]:
                evaluations += len(batch) * (stage["num_evaluations"] + stage["num_guided_evaluations"])
                flops, steps = flops + len(batch) * stage["flops"], steps + stage["num_evaluations"]
        return Cost(len(wanted), evaluations, flops, steps, "lora_weights" in self.checkpoint)

    def sample(
        self, settings: Settings, photos: Mapping[int, Image.Image] | None = None, report: Report | None = None
    ) -> Result:
        """
        Draws the images.

        Args:
            settings ([`Settings`]): The settings of a visitor, which are checked.
            photos (`Mapping[int, PIL.Image.Image]`, *optional*): Crops of photos, by the start whose place they take.
            report (`Callable`, *optional*): Called after each step; it may raise [`Stopped`].

        Returns:
            [`Result`].

        Raises:
            `ValueError`, `TypeError`: settings are out of range.
            `FloatingPointError`: samples are not finite.
            `Exception`: what `report` raises; the current step is done then.
        """
        self.check(settings)
        photos = photos or {}
        if settings.mode == "variations" and 0 not in photos:
            raise ValueError("Variations need a photo: drop one first.")
        rows = self.plan(settings, photos)
        total = self.cost(settings, photos).num_steps
        call = _Call(self.pipe, settings, report or (lambda done, total, stage: None), total)
        starts, batches = _batch([image for row in rows for image in row], settings, self.limits)
        tokens, stages = {}, {}
        if settings.num_stages > 1:
            for end, photo in photos.items():
                tokens[Start(PHOTO, end, 1.0)] = self.pipe.get_prior_tokens(image=photo, **call.size)
        for batch in starts:
            output = call([s.label for s in batch], [s.index for s in batch], (batch[0].scale,), 1)
            stages |= {start: [image] for start, image in zip(batch, output.stages[0], strict=True)}
            if settings.num_stages > 1:
                tokens |= zip(batch, self.pipe.get_prior_tokens(latents=output.stage_latents[0]).split(1), strict=True)
        images = {}
        for batch in batches:
            prior = [torch.lerp(*(tokens[start] for start in wanted.starts), wanted.weight) for wanted in batch]
            labels, indices = [wanted.label for wanted in batch], [wanted.index for wanted in batch]
            output = call(labels, indices, batch[0].scales, settings.num_stages, prior_tokens=torch.cat(prior))
            images |= zip(batch, zip(*output.stages, strict=True), strict=True)
        return self._arrange(settings, rows, stages, images, photos)

    def _arrange(self, settings: Settings, rows: list[list[Wanted]], stages: dict, images: dict, photos) -> Result:
        """Puts the images of all stages into the rows that the visitor sees."""

        def keep(image: Image.Image, wanted: Wanted, stage: int) -> Drawn:
            return Drawn(image, self._options(settings, wanted, stage))

        last = settings.num_stages
        if settings.mode == "classes":
            shown = [
                [keep(stages[wanted.starts[0]][0], wanted, 1)]
                + [keep(image, wanted, number) for number, image in enumerate(images.get(wanted, ()), 2)]
                for (wanted,) in rows
            ]
            columns = [f"stage {number}" for number in range(1, last + 1)]
        else:
            finals = {w: images[w][-1] if last > 1 else stages[w.starts[0]][0] for row in rows for w in row}
            shown = [[keep(finals[wanted], wanted, last) for wanted in row] for row in rows]
            columns = [f"variation {number + 1}" for number in range(settings.num_images)]
        if settings.mode == "variations":
            shown, columns = [[Drawn(photos[0], None), *row] for row in shown], ["photo", *columns]
        if settings.mode == "between":
            columns = [f"{wanted.weight:.0%}" for wanted in rows[0]]
        if settings.mode == "grid":
            columns = [f"scale {scale:g}" for scale in settings.grid_scales]
        names = [self._row_name(settings, row) for row in rows]
        return Result(
            shown, names, columns, f"{settings.num_stages} stages, {settings.steps} steps, seed {settings.seed}"
        )

    def _row_name(self, settings: Settings, row: list[Wanted]) -> str:
        if settings.mode == "between":
            return " to ".join(dict.fromkeys(self.class_name(row[place].label) for place in (0, -1)))
        name = self.class_name(row[0].label)
        if settings.mode == "grid" and settings.first_scales:
            name += f" at {row[0].starts[0].scale:g}"
        is_one_of_many = settings.mode != "variations" and settings.num_images > 1
        return f"{name} {row[0].index + 1}" if is_one_of_many else name

    def _options(self, settings: Settings, wanted: Wanted, stage: int) -> dict[str, Any]:
        """All that the image of a stage depends on, for its file."""
        options = to_json(to_values(settings)) | {
            "class_label": wanted.label,
            "class_name": self.class_name(wanted.label),
            "sample_index": wanted.index,
            "stage": stage,
            "stage_guidance_scales": [wanted.starts[0].scale, *wanted.scales][:stage],
            "photos": sorted({start.index for start in wanted.starts if start.label == PHOTO}),
            "batch_size": self.limits.max_batch_size,  # the last bits depend on it
        }
        if settings.mode == "between":
            options["weight"] = wanted.weight
        return options

    def save(self, drawn: Drawn, path: Path) -> None:
        """
        Writes an image as PNG, with its settings.

        Args:
            drawn ([`Drawn`]): The image.
            path (`Path`): The file.
        """
        if drawn.options is None:
            drawn.image.save(path)
        else:
            about = {"options": drawn.options, "checkpoint": self.checkpoint, "device": self.pipe.device}
            save_with_settings(drawn.image, path, TASK, **about)


def recall(options: Mapping[str, Any]) -> tuple[Settings, Limits]:
    """
    Finds what an image of the demo was drawn with.

    Args:
        options (`Mapping[str, Any]`): The settings in the image's file, which may come from anybody.

    Returns:
        `tuple[Settings, Limits]`: The settings of the visitor, and the widest limits of a server with that batch size.

    Raises:
        `ValueError`, `TypeError`: settings are out of range or beyond what any server draws, or the image was drawn
            from a photo.
    """
    values = {name: options[name] for name in list_options(Settings) if name in options}
    check_types(Settings, values)
    batch_size = options.get("batch_size", Limits.max_batch_size)
    check_at_least("batch_size", batch_size, 1, MAX_AT_ONCE)
    if options.get("photos") or values.get("mode") == "variations":
        raise ValueError(
            "`like` must be drawn from classes alone, got an image of a photo, which its file does not hold."
        )
    settings = from_values(Settings, values)
    check_options(settings)
    widest = {name: field.option.at_most for name, field in list_options(Limits).items() if field.option.at_most}
    check_at_least("num_stages", settings.num_stages, 1, widest["max_stages"])
    check_at_least("steps", settings.steps, 1, widest["max_inference_steps"])
    if (total := count_images(settings)) > MAX_AT_ONCE:
        name = "num_between" if settings.mode == "between" else "num_images"
        raise ValueError(f"`{name}` must be for at most {MAX_AT_ONCE} images in all, got {total}.")
    return settings, Limits(**widest | {"max_batch_size": batch_size})


def draw_again(pipe: DoDPipeline, options: Mapping[str, Any]) -> Image.Image:
    """
    Draws an image of the demo again, in the same batch.

    Args:
        pipe ([`DoDPipeline`]): The pipeline.
        options (`Mapping[str, Any]`): The settings in the image's file, which may come from anybody.

    Returns:
        `PIL.Image.Image`: The image.

    Raises:
        `ValueError`, `TypeError`: see [`recall`]; or the settings do not fit the pipeline.
    """
    settings, limits = recall(options)
    result = Sampler(pipe, limits, {"path": "", "sha256": ""}).sample(settings)
    for drawn in (drawn for row in result.rows for drawn in row):
        if all(drawn.options.get(name) == value for name, value in options.items()):
            return drawn.image
    raise ValueError(f"`like` must be one of the {count_images(settings)} images of its settings, got another one.")


class _Call:
    """Calls of the pipeline for one visitor, whose steps are reported and can be stopped."""

    def __init__(self, pipe: DoDPipeline, settings: Settings, report: Report, num_steps: int):
        self.pipe, self.settings, self.report, self.num_steps, self.done = pipe, settings, report, num_steps, 0
        self.size = {"height": settings.size, "width": settings.size}

    def __call__(self, labels: list[int], indices: list[int], scales: tuple[float, ...], num_stages: int, **prior):
        settings, first = self.settings, num_stages - len(scales) + 1
        stopped: list[Stopped] = []

        def end_step(pipe: DoDPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            self.done += 1
            steps_of_stage = pipe.num_timesteps // len(scales)
            try:
                self.report(self.done, self.num_steps, first + step // steps_of_stage)
            except Stopped as error:  # the pipeline ends in order, and is ready for others
                stopped.append(error)
                pipe._interrupt = True
            return {}

        output = self.pipe(
            labels,
            num_stages=num_stages,
            num_inference_steps=settings.steps,
            guidance_scale=list(scales),
            schedulers=settings.solver,
            seed=settings.seed,
            sample_indices=indices,
            return_stages=True,
            callback_on_step_end=end_step,
            **self.size,
            **prior,
        )
        if stopped:
            raise stopped[0]
        return output


def _batch(
    wanted: Sequence[Wanted], settings: Settings, limits: Limits
) -> tuple[list[list[Start]], list[list[Wanted]]]:
    """Batches of the starts that stage 1 samples, and of images of the later stages; each has the same scales."""
    starts = dict.fromkeys(start for image in wanted for start in image.starts if start.label >= 0)
    images = dict.fromkeys(wanted) if settings.num_stages > 1 else {}
    return (
        _group(list(starts), lambda start: start.scale, limits.max_batch_size),
        _group(list(images), lambda image: image.scales, limits.max_batch_size),
    )


def _group(entries: list, key: Callable[[Any], Any], size: int) -> list[list]:
    groups: dict[Any, list] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]


def stream(sample: Callable[[Report], Result]) -> Iterator[tuple[int, int, int] | Result]:
    """
    Runs a sampling in a thread of its own. If this iterator is closed, the sampling ends after its current step.

    Args:
        sample (`Callable`): The sampling, which gets a function to report its steps with.

    Returns:
        `Iterator`: The reports, and the result at the end.

    Raises:
        `Exception`: what `sample` raises.
    """
    events: queue.SimpleQueue = queue.SimpleQueue()
    is_closed = threading.Event()

    def report(done: int, total: int, stage: int) -> None:
        if is_closed.is_set():
            raise Stopped
        events.put((done, total, stage))

    def work() -> None:
        try:
            events.put(sample(report))
        except Exception as error:
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        event = None
        while not isinstance(event, Result):
            if isinstance(event := events.get(), Exception):
                raise event
            yield event
    finally:
        is_closed.set()
