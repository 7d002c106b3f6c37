# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Draws images of classes, or variations of an image, as one PNG file with captions or a PNG file each:

    dod sample marble bricks --seed 3 -o marble.png                     one image of each class
    dod sample marble --count 16 --all-stages --scale 3 -o grid.png     16 images of a class, in each stage
    dod sample marble --image photo.jpg --count 8 -o variations.png     variations: the photo in place of stage 1
    dod sample marble bricks --count 4 -o images/                       a folder with a file for each image
    dod sample 207 --checkpoint outputs/dod-b --device cuda -o dog.png  a class by its id, of another pipeline
    dod sample --like marble.png -o again.png                           the same image again, or one of `dod demo`

A file holds all settings that it was drawn with, the hash of the checkpoint and the versions: `dod info` shows them.
`dod sample-dataset` writes many images, for an evaluation.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ..checks import MAX_IMAGES, MAX_SIDE, MAX_STEPS
from ..command_line import run_main
from ..data.image_folder import IMAGE_SUFFIXES
from ..data.image_grid import make_grid
from ..data.latents import DTYPES
from ..files import check_output, file_sha256, replacing, replacing_files
from ..guidance_options import GuidanceOptions
from ..image_reading import cover_and_crop, to_image
from ..image_settings import ImageSettings, pixels_sha256, read_image_settings, save_with_settings
from ..options import (
    check_options,
    check_types,
    find_given,
    from_values,
    option,
    parse_options,
    replace_values,
    to_json,
    to_values,
)
from ..pipeline_dod import MAX_STAGES, DoDPipeline
from ..pipeline_inputs import find_image_size
from ..results import check_same_checkpoint, describe_versions, identify_checkpoint
from ..sampling_options import TokenPriorOptions
from ..tableaus import SOLVERS
from . import gallery
from .options import DESK_CHECKPOINT, device_option, load_pipeline, lora_weights_option


TASK = "sample"
SUFFIX = ".png"
NULL = "null"  # among class labels: no class
COLUMNS = 8  # images in a row
MIN_SIDE = 128  # in pixels, to which the small images of a grid are enlarged
# What an image does not depend on, or its file says elsewhere.
UNRECORDED = ("output", "like", "device", "checkpoint", "lora_weights")


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """Options of the command."""

    class_labels: tuple[str, ...] = option(
        (), is_positional=True, nargs="*", help=f"Names or ids of classes; `{NULL}` is no class."
    )
    output: Path = option(aliases=("o",), help="PNG file of all images, or folder of a PNG file for each.")
    like: Path | None = option(
        None, help="PNG file of this command, or of the demo, that is drawn again, with its own settings."
    )
    image: Path | None = option(None, help="Image in place of stage 1: variations of it are drawn.")
    count: int = option(1, at_least=1, help="Number of images of each class.")
    all_stages: bool = option(False, aliases=("all-stages",), help="Show each stage, not the last one alone.")
    stages: int | None = option(
        None, at_least=1, at_most=MAX_STAGES, help="Number of stages; the checkpoint's by default."
    )
    steps: tuple[int, ...] | None = option(
        None, at_least=1, at_most=MAX_STEPS, help="Steps of all stages, or of each; the checkpoint's by default."
    )
    scale: tuple[float, ...] | None = option(
        None, at_least=0, help="Guidance scale from stage 2 on, or of each stage; the checkpoint's by default."
    )
    solver: tuple[str, ...] | None = option(
        None, choices=SOLVERS, help="Solver of all stages, or of each; the checkpoint's by default."
    )
    seed: int = option(0, at_least=0, below=2**63, help="Seed of the noise.")
    height: int | None = option(
        None, at_least=1, at_most=MAX_SIDE, help="Height in pixels; the trained size by default."
    )
    width: int | None = option(
        None, at_least=1, at_most=MAX_SIDE, help="Width in pixels; the trained size by default."
    )
    checkpoint: str = option(DESK_CHECKPOINT, help="Pipeline (folder or Hub id); this one comes with the package.")
    lora_weights: str | None = lora_weights_option()
    batch_size: int = option(16, at_least=1, help="Images at a time.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights.")
    device: str = device_option()
    token_prior: TokenPriorOptions = field(default_factory=TokenPriorOptions)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)

    @property
    def is_grid(self) -> bool:
        """Whether all images go into one file."""
        return self.output.suffix == SUFFIX and not self.output.is_dir()

    def find_conflicts(self) -> list[str]:
        """Messages about options that do not fit each other."""
        found = []
        if not self.is_grid and self.output.suffix.lower() in IMAGE_SUFFIXES and not self.output.is_dir():
            found.append(f"`output` must be a folder or end with {SUFFIX}, got {self.output}.")
        if self.like is None and not self.class_labels:
            found.append(f"`class_labels` must name at least one class, or be `{NULL}` for no class, got none.")
        if (total := len(self.class_labels) * self.count) > MAX_IMAGES:
            found.append(f"`count` must be for at most {MAX_IMAGES} images of all classes, got {total}.")
        if self.like is not None and (others := find_given(self).keys() - UNRECORDED):
            found.append(f"`like` must be given without other settings, got {', '.join(sorted(others))}.")
        return found


@dataclass(frozen=True)
class Place:
    """
    An image among those of a call.

    Args:
        index (`int`): Index of the image.
        stage (`int`): Number of the stage, from 1 on.
        name (`str`): Name of the image's class.
    """

    index: int
    stage: int
    name: str

    @property
    def file(self) -> str:
        """Name of the file of the image alone."""
        name = re.sub(r"\W+", "-", self.name).strip("-")[:40]
        return f"{self.index:04d}-{name}-stage-{self.stage}{SUFFIX}"


class Drawing:
    """
    The images that options ask for.

    Args:
        options ([`DrawingOptions`]): The options, without `like`.
        wanted (`tuple[int, int]`, *optional*): Index and stage of the only image that is wanted. By default all are.

    Raises:
        `OSError`: there is no such pipeline, or there are no such adapters.
        `ValueError`: a class is unknown, the image cannot be read, or the adapters are of another pipeline.
    """

    def __init__(self, options: DrawingOptions, wanted: tuple[int, int] | None = None):
        self.options = options
        self.wanted = wanted
        self.checkpoint = identify_checkpoint(options.checkpoint, options.lora_weights)
        pipeline = load_pipeline(
            options.checkpoint, options.lora_weights, options.dtype, options.token_prior.use_token_prior
        )
        self.pipeline = pipeline.to(options.device)
        self.labels = self._find_labels()
        self.original = None if options.image is None else self._read_original(options.image)
        if not self.stages:
            raise ValueError(
                "`stages` must be >= 2 with `image` or `use_token_prior`, which stand for stage 1 and need a latent "
                "embedder, got 1."
            )
        if not self.places:
            raise ValueError(f"`like` must be one of the {self.num_images} images of its call, got {wanted}.")

    def _find_labels(self) -> list[int | None]:
        """Ids of the classes, `None` for no class."""
        known, num_classes = self.pipeline.label2ids, self.pipeline.transformer.config.num_classes
        words = [int(word) if word.isdecimal() and word not in known else word for word in self.options.class_labels]
        ids = self.pipeline.get_label_ids([None if word == NULL and NULL not in known else word for word in words])
        return [None if label == num_classes else label for label in ids]

    def _read_original(self, path: Path) -> Image.Image:
        """Reads the image for variations as the pipeline does."""
        size = find_image_size(self.options.height, self.options.width, self.pipeline.transformer, self.pipeline.vae)
        try:
            return Image.fromarray(cover_and_crop(to_image(path), *size))
        except (OSError, ValueError) as error:
            raise ValueError(f"`image` must be an image that can be read, got {str(path)!r}: {error}") from error

    @property
    def num_images(self) -> int:
        """Number of images, each of which may be shown in several stages."""
        return len(self.labels) * self.options.count

    @property
    def stages(self) -> list[int]:
        """The stages that are shown. A given image, or the token prior, stands for stage 1."""
        default = 1 if self.pipeline.latent_embedder is None else self.pipeline.config.default_num_stages
        first = self.options.token_prior.first_stage if self.original is None else 2
        stages = range(first, (self.options.stages or default) + 1)
        return list(stages if self.options.all_stages else stages[-1:])

    @property
    def places(self) -> list[Place]:
        """The images in order: class by class, stage by stage."""
        count = self.options.count
        places = [
            Place(position * count + k, stage, self._name(label))
            for position, label in enumerate(self.labels)
            for stage in self.stages
            for k in range(count)
        ]
        return [place for place in places if self.wanted in (None, (place.index, place.stage))]

    def _name(self, label: int | None) -> str:
        names = self.pipeline.config.id2label or {}
        return "no class" if label is None else names.get(str(label), f"class {label}").partition(",")[0]

    def settings(self, place: Place | None) -> dict[str, Any]:
        """All settings of the image at a `place`, or of the grid of all, ready for JSON, as its file has them."""
        values = to_json(to_values(self.options))
        config, image = self.pipeline.config, self.options.image
        return {
            **{name: value for name, value in values.items() if name not in UNRECORDED},
            "image_sha256": None if image is None else file_sha256(image),
            "index": None if place is None else place.index,
            "stage": None if place is None else place.stage,
            "defaults": {
                "stages": config.default_num_stages,
                "steps": config.default_num_inference_steps,
                "scale": config.default_guidance_scale,
                "first_scale": config.default_first_stage_guidance_scale,
            },
        }

    def draw(self) -> dict[Place, Image.Image]:
        """
        Draws the images, with a bar of the progress on a terminal.

        Returns:
            `dict[Place, PIL.Image.Image]`: The images, in the order of `places`.

        Raises:
            `ValueError`, `TypeError`, `FloatingPointError`: see [`DoDPipeline`].
        """
        size, places = self.options.batch_size, self.places
        needed = {place.index // size for place in places}
        batches = [range(start, min(start + size, self.num_images)) for start in range(0, self.num_images, size)]
        batches = [batch for number, batch in enumerate(batches) if number in needed]
        drawn = {}
        with tqdm(desc="Drawing", unit="steps", delay=1, disable=None) as progress:

            def count_step(pipeline: DoDPipeline, *_: Any) -> None:
                if pipeline.num_timesteps is not None:  # else the solver chooses its own steps
                    progress.total = len(batches) * pipeline.num_timesteps
                progress.update()

            for batch in batches:
                stages = self._draw_batch(batch, count_step)
                for place in places:
                    if place.index in batch:
                        drawn[place] = stages[place.stage][place.index - batch.start]
        return {place: drawn[place] for place in places}

    def _draw_batch(self, batch: range, callback: Any) -> dict[int, list[Image.Image]]:
        options = self.options
        output = self.pipeline(
            [self.labels[index // options.count] for index in batch],
            num_stages=options.stages,
            num_inference_steps=_one_or_all(options.steps),
            guidance_scale=_one_or_all(options.scale),
            schedulers=_one_or_all(options.solver),
            guidance=options.guidance.to_guidance(),
            image=self.original,
            **to_values(options.token_prior),
            height=options.height,
            width=options.width,
            seed=options.seed,
            sample_indices=batch,
            return_stages=options.all_stages,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=(),
        )
        return dict(zip(self.stages, output.stages if options.all_stages else [output.images], strict=True))

    def lay_out(self, images: dict[Place, Image.Image]) -> Image.Image:
        """Puts the `images` into one, with captions."""
        options = self.options
        rows = [] if self.original is None else [[self.original]]
        captions = ["image"] * len(rows)
        shown = list(images.items())
        for start in range(0, len(shown), options.count):  # a class in a stage
            (first, _), group = shown[start], [image for _, image in shown[start : start + options.count]]
            caption = f"{first.name}, stage {first.stage}" if options.all_stages else first.name
            for left in range(0, len(group), COLUMNS):
                rows.append(group[left : left + COLUMNS])
                captions.append("" if left else caption)
        enlarged = max(1, MIN_SIDE // rows[0][0].width)
        title = f"seed {options.seed}"
        return make_grid(rows, enlarged, gap=4, title=title, row_names=captions)

    def save(self, image: Image.Image, file: Path, place: Place | None) -> None:
        """Writes the `image` at a `place`, or the grid of all, with its settings to a `file`."""
        save_with_settings(
            image,
            file,
            task=TASK,
            options=self.settings(place),
            checkpoint=self.checkpoint,
            device=self.options.device,
        )


def _one_or_all(values: tuple | None) -> Any:
    """A single value for all stages, or the list of one for each."""
    return values[0] if values is not None and len(values) == 1 else values


def check_is_own(output: Path, names: Sequence[str] | None = None) -> None:
    """
    Raises unless all that would be overwritten is an image of this package.

    Args:
        output (`Path`): A file, or a folder.
        names (`Sequence[str]`, *optional*): Names of the files in the folder, which must have no others.

    Raises:
        `ValueError`: something else is in the way.
    """
    files = [output] if names is None else sorted(output.iterdir()) if output.is_dir() else []
    for file in files:
        if names is not None and file.name not in names:
            raise ValueError(f"`output` must be a folder without other files, got {output} with {file.name}.")
        if file.exists():
            read_image_settings(file, "output")


def write(drawing: Drawing) -> str:
    """
    Draws images and writes them.

    Args:
        drawing ([`Drawing`]): The images.

    Returns:
        `str`: The hash of the pixels of the last file, see [`pixels_sha256`].

    Raises:
        `OSError`: a file cannot be written.
        `ValueError`: something else is in the way, or see [`Drawing`].
    """
    output, is_grid = drawing.options.output, drawing.options.is_grid
    names = {place: place.file for place in drawing.places}
    check_output("output", output, is_folder=not is_grid)
    check_is_own(output, None if is_grid else list(names.values()))
    images = drawing.draw()
    if is_grid:
        # One image that is wanted alone stands for itself.
        place = next(iter(images)) if drawing.wanted else None
        image = drawing.lay_out(images) if place is None else images[place]
        with replacing(output) as unfinished:
            drawing.save(image, unfinished, place)
        return pixels_sha256(image)
    with replacing_files(output) as unfinished:
        for place, image in images.items():
            drawing.save(image, unfinished / names[place], place)
    return pixels_sha256(image)


# -------------------------------------------------------------------------------------------------------------- again


def recall(options: DrawingOptions, settings: ImageSettings) -> DrawingOptions:
    """
    Finds the options that an image of this command was drawn with.

    Args:
        options ([`DrawingOptions`]): Options with `like`. Output, device, checkpoint and adapters stay.
        settings ([`ImageSettings`]): The settings in the file.

    Returns:
        [`DrawingOptions`]: Options without `like`.

    Raises:
        `OSError`: an image that it was drawn from cannot be read.
        `ValueError`, `TypeError`: options have another meaning here.
    """
    extra = ("image_sha256", "index", "stage", "defaults")
    values = {name: value for name, value in settings["options"].items() if name not in extra}
    check_types(DrawingOptions, values)
    if values.get("image") is not None:
        values["image"] = Path(values["image"])
        if not values["image"].is_file() or file_sha256(values["image"]) != settings["options"].get("image_sha256"):
            raise ValueError(f"`like` must have been drawn from an image that is still there, got {values['image']}.")
    values |= {name: getattr(options, name) for name in ("output", "device", "checkpoint", "lora_weights")}
    recalled = from_values(DrawingOptions, values)
    check_options(recalled)
    return recalled


def check_like(options: DrawingOptions, settings: ImageSettings) -> None:
    """
    Raises unless an image can be drawn again, as far as its file tells.

    Args:
        options ([`DrawingOptions`]): Options with `like`.
        settings ([`ImageSettings`]): The settings in the file.

    Raises:
        `OSError`, `ValueError`, `TypeError`: another command has drawn it, see [`recall`] and [`gallery.recall`].
    """
    if settings["task"] not in (TASK, gallery.TASK):
        raise ValueError(
            f"`like` must be drawn by `dod sample` or `dod demo`, got {options.like} of {settings['task']!r}."
        )
    if settings["task"] == TASK:
        recall(options, settings)
    else:
        gallery.recall(settings["options"])


def _find_places(settings: ImageSettings) -> dict[str, str | None]:
    checkpoint = settings["checkpoint"]
    return {"checkpoint": checkpoint["path"], "lora_weights": checkpoint.get("lora_weights", {}).get("path")}


def find_names(settings: ImageSettings) -> dict[str, str]:
    """Options that `like` needs beside it: what the `settings` know by name alone, as those of the demo may."""
    places = _find_places(settings).items()
    return {name: place for name, place in places if place and "/" not in place and not Path(place).exists()}


def recall_checkpoint(options: DrawingOptions, settings: ImageSettings) -> DrawingOptions:
    """
    Finds the pipeline that an image was drawn with.

    Args:
        options ([`DrawingOptions`]): Options with `like`.
        settings ([`ImageSettings`]): The settings in the file.

    Returns:
        [`DrawingOptions`]: Options with the checkpoint and the adapters of the file, unless they are given.

    Raises:
        `OSError`, `ValueError`: they are not there, or others.
    """
    given, places = find_given(options), _find_places(settings)
    for name, place in find_names(settings).items():
        if name not in given:
            raise ValueError(f"`{name}` must be given with `like`: {options.like} knows the name {place!r} alone.")
    options = replace_values(options, **{name: given.get(name, place) for name, place in places.items()})
    found = identify_checkpoint(options.checkpoint, options.lora_weights)
    check_same_checkpoint(settings["checkpoint"], found, f"what {options.like} was drawn with")
    return options


def find_differences(settings: ImageSettings, device: str) -> list[str]:
    """The versions in the `settings` of an image that differ from those here, on a `device`: a line for each."""
    here, there = describe_versions(device), settings["versions"]
    return [
        f"{name}: {there.get(name, 'none')} there, {here.get(name, 'none')} here"
        for name in here | there
        if here.get(name) != there.get(name)
    ]


def draw_again(options: DrawingOptions) -> bool:
    """
    Draws an image again, and says whether it is the same, and what may be why it is not.

    Args:
        options ([`DrawingOptions`]): Options with `like`.

    Returns:
        `bool`: Whether the pixels are the same.

    Raises:
        `OSError`: a file cannot be read or written.
        `ValueError`, `TypeError`: the image cannot be drawn again, or something else is in the way.
    """
    settings = read_image_settings(options.like, "like")
    check_like(options, settings)
    if not options.is_grid:
        raise ValueError(f"`output` must be a file that ends with {SUFFIX}, got {options.output}.")
    options = recall_checkpoint(options, settings)
    if settings["task"] == TASK:
        index, stage = (settings["options"].get(name) for name in ("index", "stage"))
        sha256 = write(Drawing(recall(options, settings), None if index is None else (index, stage)))
    else:
        sha256 = _write_of_demo(options, settings)
    is_same = sha256 == settings["pixels_sha256"]
    differences = find_differences(settings, options.device)
    if is_same:
        print(f"Wrote {options.output}: the pixels of {options.like}, bit for bit.")
    else:
        print(f"Wrote {options.output}: its pixels are not those of {options.like}.", file=sys.stderr)
    for line in differences:
        print(f"  {line}", file=sys.stderr)
    return is_same


def _write_of_demo(options: DrawingOptions, settings: ImageSettings) -> str:
    """Draws an image of the demo again and writes it; returns the hash of its pixels."""
    check_output("output", options.output)
    check_is_own(options.output)
    pipeline = load_pipeline(options.checkpoint, options.lora_weights).to(options.device)
    image = gallery.draw_again(pipeline, settings["options"])
    with replacing(options.output) as unfinished:
        save_with_settings(
            image,
            unfinished,
            task=settings["task"],
            options=settings["options"],
            checkpoint=identify_checkpoint(options.checkpoint, options.lora_weights),
            device=options.device,
        )
    return pixels_sha256(image)


def main(argv: list[str] | None = None) -> None:
    """
    Runs the command. Its exit code is 1 if an image that is drawn again has other pixels.

    Args:
        argv (`list[str]`, *optional*): Arguments of the command. By default those of the process.

    Raises:
        `OSError`, `ValueError`, `TypeError`, `FloatingPointError`: see [`Drawing`], [`write`] and [`recall`].
    """
    options = parse_options(DrawingOptions, argv, __doc__)
    if options.like is not None:
        if not draw_again(options):
            sys.exit(1)
        return
    drawing = Drawing(options)
    write(drawing)
    names = ", ".join(dict.fromkeys(place.name for place in drawing.places))
    file = next(iter(sorted(options.output.glob("*.png")))) if options.output.is_dir() else options.output
    images = "1 image" if drawing.num_images == 1 else f"{drawing.num_images} images"
    print(f"Wrote {options.output}: {images} of {names}. Settings: dod info {file}")


if __name__ == "__main__":
    run_main(main)
