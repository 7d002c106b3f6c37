# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Writes samples of a pipeline to disk, e.g. the 50,000 of an FID:

    accelerate launch training/sample_dod.py --pretrained_model_name_or_path outputs/dod-b --num_images 50000 \\
        --batch_size 64 --dtype bfloat16 --format npz --output_dir outputs/samples

    output_dir/000000.png ...   the images, and `labels.txt` with the class id of each in a line of its own
    output_dir/samples.npz      in their place with `--format npz`: `arr_0` (N, H, W, 3) in uint8, `arr_1` (N,), labels
    output_dir/manifest.json    written last: what the images depend on, and their hash
    output_dir/chunks/          finished chunks, for a run that was stopped

With `--all_stages` each stage has such a folder, `stage-1`, `stage-2`, ..., in `output_dir`.

Image i depends on checkpoint, settings, seed and i alone. Images are sampled in chunks of `--batch_size`, always as
the same batch. So a run that was killed continues where it was, on any number of processes. A run that has ended
continues with a larger `--num_images`. The files are the same on the same kind of device with as many threads. All
processes must see `output_dir`.
"""

import io
import logging
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..command_line import run_main
from ..files import (
    LOCK_FILE,
    file_sha256,
    in_use,
    make_folder,
    remove_unfinished,
    replacing,
    replacing_files,
    write_json,
)
from ..guidance import Guidance
from ..guidance_options import GuidanceOptions
from ..options import list_options, option, parse_options, to_argv, to_json, to_values
from ..pipeline_dod import DoDPipeline
from ..pipeline_inputs import check_token_settings
from ..processes import all_or_none, check_processes, end_processes, end_with_launcher, process_group_timeout
from ..records import Count, Sha256, find_record, read_record
from ..results import checkpoint_sha256, describe_versions, lora_sha256
from ..sampling_options import CallOptions
from ..seeding import stateless_generator
from ..shipped import find_shipped
from ..token_prior import GENERATION_DEFAULTS
from ..transformer_dod import DoDTransformer2DModel
from .images import CHUNKS, LABELS_FILE, SAMPLES_MANIFEST, NpzImages, SamplesManifest
from .options import DTYPES, load_pipeline, lora_weights_option


logger = logging.getLogger(__name__)

SAMPLES_FORMAT = 1
SETTINGS_FILE = "settings.json"
ARCHIVE = "samples.npz"
ROUNDING = "round(255 x)"
LABELS = ("random", "balanced", "null")


def guidance_model_option() -> Any:
    """Declares the option for the weaker model of autoguidance in a dataclass of options."""
    return option(
        None,
        help="Pipeline (folder or Hub id) whose transformer, a weaker one, is the guide in place of the null class.",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of the command."""

    pretrained_model_name_or_path: str = option(help="Pipeline (folder or Hub id).")
    output_dir: Path = option(writes="folder", help="Folder that the images go to.")
    num_images: int = option(50_000, at_least=1, help="Number of images.")
    batch_size: int = option(64, at_least=1, help="Images in a chunk, the unit of the work.")
    labels: str = option(
        "random", choices=LABELS, help="Uniform and independent, all classes in turn, or no class (the null class)."
    )
    seed: int = option(0, at_least=0, below=2**64, help="Seed of noise and random labels.")
    format: str = option("png", choices=("png", "npz"), help="A PNG file each, or ADM's archive.")
    all_stages: bool = option(False, help="Write the images of each stage, not of the last one alone.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights of all models.")
    allow_tf32: bool = option(False, help="TF32 products and convolutions on NVIDIA GPUs.")
    write_while_sampling: bool = option(True, help="Whether a thread writes images while the next are sampled.")
    guidance_model: str | None = guidance_model_option()
    lora_weights: str | None = lora_weights_option()
    call: CallOptions = field(default_factory=CallOptions)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)


def draw_labels(kind: str, seed: int, num_images: int, num_classes: int) -> np.ndarray | None:
    """
    Draws the class of each image; it depends on the image's index and the seed alone.

    Args:
        kind (`str`):
            `"random"` (uniform and independent), `"balanced"` (all classes in turn) or `"null"` (no class).
        seed (`int`): Seed of random classes.
        num_images (`int`): Number N of images.
        num_classes (`int`): Number of classes.

    Returns:
        `np.ndarray` of shape `(N,)`: Class ids in int64; `None` for no class.
    """
    if kind == "null":
        return None
    if kind == "balanced":
        return np.arange(num_images) % num_classes
    draws = [torch.randint(num_classes, (), generator=stateless_generator(seed, i)) for i in range(num_images)]
    return np.array(draws, dtype=np.int64)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """
    Rounds images to bytes: round(255 x), halves to the even number.

    Args:
        images (`np.ndarray` of shape `(B, H, W, 3)`): Images in [0, 1].

    Returns:
        `np.ndarray` of the same shape, in uint8.

    Raises:
        `ValueError`: a value is not finite or out of range.
    """
    is_good = ((images >= 0) & (images <= 1)).all(axis=(1, 2, 3))  # which NaN is not
    if not is_good.all():
        raise ValueError(
            f"`images` must be finite and in [0, 1], got {(~is_good).sum()} of {len(images)} that are not."
        )
    return np.round(255 * images).astype(np.uint8)


def sample_settings(options: SamplingOptions, pipeline: DoDPipeline) -> dict[str, Any]:
    """
    Settings that images depend on, except for versions and devices.

    Args:
        options ([`SamplingOptions`]): The options.
        pipeline ([`DoDPipeline`]): The pipeline that they apply to.

    Returns:
        `dict`: The settings, ready for JSON. Defaults of the checkpoint are filled in.

    Raises:
        `ValueError`: options do not fit the number of stages, or the pipeline has no latent embedder or token prior
            for them.
    """
    call = to_json(to_values(options.call) | to_values(options.guidance))
    if options.guidance_model is not None:
        call["guidance_model_sha256"] = checkpoint_sha256(options.guidance_model)
    if options.lora_weights is not None:
        call["lora_weights_sha256"] = lora_sha256(options.lora_weights)
    has_embedder = pipeline.latent_embedder is not None
    if call["num_stages"] is None:
        call["num_stages"] = pipeline.config.default_num_stages if has_embedder else 1
    if call["first_stage_guidance_scale"] is not None and not has_embedder:
        raise ValueError(
            "`first_stage_guidance_scale` must not be given without a latent embedder, where `guidance_scale` is that "
            f"of the only stage, got {call['first_stage_guidance_scale']}."
        )
    if wrong := options.call.find_stage_conflicts(call["num_stages"]):
        raise ValueError("\n".join(wrong))
    token_prior = options.call.token_prior
    check_token_settings(token_prior.use_token_prior, pipeline.token_prior, pipeline.latent_embedder, prior=None)
    if token_prior.use_token_prior:
        defaults = {f"token_prior_{name}": value for name, value in GENERATION_DEFAULTS.items()}
        call |= {name: value for name, value in defaults.items() if call[name] is None}
    if call["num_inference_steps"] is None and call["stage_inference_steps"] is None:
        call["num_inference_steps"] = pipeline.config.default_num_inference_steps
    has_first_scale = has_embedder and call["stage_guidance_scales"] is None and not token_prior.use_token_prior
    if has_first_scale and call["first_stage_guidance_scale"] is None:
        call["first_stage_guidance_scale"] = pipeline.config.default_first_stage_guidance_scale
    if call["stage_guidance_scales"] is None and call["guidance_scale"] is None:
        call["guidance_scale"] = pipeline.config.default_guidance_scale
    if call["stage_solvers"] is None:
        scheduler = pipeline.scheduler
        number = call["num_stages"] - token_prior.first_stage + 1
        call["stage_solvers"] = [scheduler.config.get("solver", type(scheduler).__name__)] * number
    trained_size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    for name in ("height", "width"):
        call[name] = trained_size if call[name] is None else call[name]
    return {
        "checkpoint_sha256": checkpoint_sha256(options.pretrained_model_name_or_path),
        "num_images": options.num_images,
        "labels": options.labels,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "allow_tf32": options.allow_tf32,
        **call,
        "format": options.format,
        "rounding": ROUNDING,
    }


def load_guidance(options: GuidanceOptions, guidance_model: str | None, dtype: torch.dtype) -> Guidance:
    """
    Makes the guidance of a command.

    Args:
        options ([`GuidanceOptions`]): The settings of the guidance.
        guidance_model (`str` or `None`): The pipeline whose transformer, a weaker model, is the guide.
        dtype (`torch.dtype`): Data type of the weights of the weaker model.

    Returns:
        [`Guidance`]: The guidance. A weaker model is on the CPU.

    Raises:
        `OSError`: there is no such pipeline.
    """
    guidance = options.to_guidance()
    if guidance_model is None:
        return guidance
    weaker = DoDTransformer2DModel.from_pretrained(find_shipped(guidance_model), subfolder="transformer", dtype=dtype)
    return replace(guidance, transformer=weaker)


class ChunkNote(TypedDict):
    """What the note of a chunk has."""

    num_images: Count
    sha256: Sha256
    versions: list[dict[str, str | None]]


class SampleFolder:
    """
    Images of one stage on their way to disk, in chunks of fixed ranges of indices.

    Each file is written atomically. The note of a chunk, with its hash, follows its images.

    Args:
        folder (`Path`): Folder of images and manifest.
        settings (`dict`): Settings that images depend on, with `num_images`, `batch_size` and `format`.
        labels (`np.ndarray` of shape `(N,)`): The class of each image; `None` if they have none.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], labels: np.ndarray | None):
        self.folder = folder
        self.settings = settings
        self.labels = labels
        #: Number of chunks; the last one may be smaller than the others.
        self.num_chunks = -(-settings["num_images"] // settings["batch_size"])
        self._chunks = folder / CHUNKS

    def indices(self, chunk: int) -> range:
        """The indices of the images of `chunk`."""
        size = self.settings["batch_size"]
        return range(chunk * size, min((chunk + 1) * size, self.settings["num_images"]))

    def open(self) -> bool:
        """
        Prepares the folder; one process must have done so before any writes.

        Returns:
            `bool`: Whether all images are there already, with a manifest that has their hash.

        Raises:
            `ValueError`: the folder holds samples with other settings, which the message names, or something else.
        """
        remove_unfinished(self._chunks)
        files = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        files.discard(LOCK_FILE)
        is_complete = False
        manifest = find_record(self.folder / SAMPLES_MANIFEST, SamplesManifest)
        if manifest is not None:
            found = self._with_settings(manifest["settings"])
            is_intact = found._find_sha256() == manifest["sha256"]
            is_complete = is_intact and found.settings == self.settings
            if not is_intact:
                logger.warning(f"{self.folder} does not hold the images of its manifest: what is missing comes again.")
            elif not is_complete:
                found._unpack(manifest["versions"])
        elif files - {f"{CHUNKS}/{SETTINGS_FILE}"}:  # else nothing has been sampled yet
            settings = find_record(self._chunks / SETTINGS_FILE, dict[str, Any])
            if settings is None:
                raise ValueError(f"`output_dir` must be empty or hold samples, got {self.folder} with other files.")
            self._with_settings(settings)
        if is_complete:
            self._clean()
        else:
            make_folder(self._chunks)
            write_json(self._chunks / SETTINGS_FILE, self.settings, self._chunks)
            for name in (SAMPLES_MANIFEST, ARCHIVE):
                (self.folder / name).unlink(missing_ok=True)
        return is_complete

    def is_done(self, chunk: int) -> bool:
        """Whether the images of `chunk` are on disk, undamaged."""
        try:
            note = self._read_note(chunk)
            is_whole = note["num_images"] == len(self.indices(chunk))  # unlike the last chunk of fewer images
            return is_whole and note["sha256"] == file_sha256(*self._chunk_files(chunk))
        except (OSError, ValueError):  # missing, or no such file
            return False

    def write(self, chunk: int, images: np.ndarray, device: torch.device | str) -> None:
        """
        Writes the images of a chunk.

        Args:
            chunk (`int`): Number of the chunk.
            images (`np.ndarray` of shape `(n, H, W, 3)`): The images in uint8.
            device (`torch.device` or `str`): Device that computed them, for the note.
        """
        self._write_chunk(chunk, images, [describe_versions(device)])

    def finish(self, **details: Any) -> dict[str, Any]:
        """
        Writes archive or labels, and then the manifest.

        Args:
            details (`Any`): Further entries of the manifest.

        Returns:
            `dict`: The manifest.

        Raises:
            `ValueError`: a chunk is missing.
        """
        missing = [chunk for chunk in range(self.num_chunks) if not self._note(chunk).is_file()]
        if missing:
            raise ValueError(
                f"`output_dir` must be a folder that all processes share, got {self.folder} without the chunks "
                f"{missing[:10]}{'...' if len(missing) > 10 else ''}."
            )
        versions: list[dict[str, str | None]] = []
        for chunk in range(self.num_chunks):
            versions += [found for found in self._read_note(chunk)["versions"] if found not in versions]
        if len(versions) > 1:
            logger.warning(f"The samples in {self.folder} were computed by {len(versions)} versions or devices.")
        is_png = self.settings["format"] == "png"
        if not is_png:
            self._publish(self.folder / ARCHIVE, self._write_archive)
        elif self.labels is not None:
            self._publish(self.folder / LABELS_FILE, lambda file: file.write(self._labels_text()))
        labels = LABELS_FILE if is_png else f"arr_1 of {ARCHIVE}"
        manifest = {
            "format": SAMPLES_FORMAT,
            **details,
            "num_images": self.settings["num_images"],
            "images": "*.png" if is_png else f"arr_0 of {ARCHIVE}",
            "labels": None if self.labels is None else labels,
            "sha256": self._find_sha256(),
            "settings": self.settings,
            "versions": versions,
        }
        write_json(self.folder / SAMPLES_MANIFEST, manifest, self._chunks)
        self._clean()
        return manifest

    def _with_settings(self, found: dict[str, Any]) -> "SampleFolder":
        """The folder with the settings found in it: the same, but for fewer images."""
        known = to_json({name: field.default for name, field in list_options(SamplingOptions).items()})
        # Older ones lack options, which then had their defaults.
        found = {name: known[name] for name in self.settings if name in known} | found
        if self.settings.get("first_stage_guidance_scale", 1) is None:  # older ones may have one that nothing used
            found["first_stage_guidance_scale"] = None
        for name in [*self.settings, *found]:
            wanted, value = self.settings.get(name), found.get(name)
            can_go_on = name == "num_images" and isinstance(value, int) and 0 < value < wanted
            if can_go_on and self.settings["format"] == "png":
                can_go_on = self._num_digits(value) == self._num_digits(wanted)
            if value != wanted and not can_go_on:
                raise ValueError(
                    f"`output_dir` must hold samples with `{name}` = {wanted!r}, got {value!r} in {self.folder}: "
                    "remove it, or use another folder."
                )
        labels = None if self.labels is None else self.labels[: found["num_images"]]
        return SampleFolder(self.folder, found, labels)

    def _unpack(self, versions: list[dict[str, str | None]]) -> None:
        """Turns an archive back into chunks, so that others can be added."""
        if self.settings["format"] == "npz":
            images = NpzImages(self.folder / ARCHIVE).batches(self.settings["batch_size"])
            for chunk, (batch, _) in enumerate(images):
                self._write_chunk(chunk, batch.permute(0, 2, 3, 1).numpy(), versions)

    @staticmethod
    def _num_digits(num_images: int) -> int:
        """Digits of the numbers in the names of the PNG files."""
        return max(6, len(str(num_images - 1)))

    def _chunk_files(self, chunk: int) -> list[Path]:
        if self.settings["format"] == "npz":
            return [self._chunks / f"{chunk:06d}.npy"]
        num_digits = self._num_digits(self.settings["num_images"])
        return [self.folder / f"{index:0{num_digits}d}.png" for index in self.indices(chunk)]

    def _write_chunk(self, chunk: int, images: np.ndarray, versions: list[dict[str, str | None]]) -> None:
        paths = self._chunk_files(chunk)
        if self.settings["format"] == "png":
            with replacing_files(self.folder, self._chunks) as unfinished:
                for path, image in zip(paths, images, strict=True):
                    Image.fromarray(image).save(unfinished / path.name)
        else:
            self._publish(paths[0], lambda file: np.save(file, images))
        note = {"num_images": len(images), "sha256": file_sha256(*paths), "versions": versions}
        write_json(self._note(chunk), note, self._chunks)

    def _note(self, chunk: int) -> Path:
        return self._chunks / f"{chunk:06d}.json"

    def _read_note(self, chunk: int) -> dict[str, Any]:
        return read_record(self._note(chunk), ChunkNote)

    def _labels_text(self) -> bytes:
        return "".join(f"{label}\n" for label in self.labels).encode()

    def _find_sha256(self) -> str | None:
        """Hash of the archive, or of all PNG files in order; `None` if a file is missing or has other labels."""
        try:
            if self.settings["format"] == "npz":
                return file_sha256(self.folder / ARCHIVE)
            if self.labels is not None and (self.folder / LABELS_FILE).read_bytes() != self._labels_text():
                return None
            return file_sha256(*(path for chunk in range(self.num_chunks) for path in self._chunk_files(chunk)))
        except FileNotFoundError:
            return None

    def _write_archive(self, file: io.BufferedIOBase) -> None:
        """Writes as `np.savez(images, labels)` would, but with one chunk in memory at a time and without a date."""
        shape = np.load(self._chunk_files(0)[0], mmap_mode="r").shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.settings["num_images"], *shape[1:])}
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for chunk in range(self.num_chunks):
                    array.write(np.load(self._chunk_files(chunk)[0]).data)
            if self.labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as array:
                    np.lib.format.write_array(array, self.labels)

    def _publish(self, path: Path, write: Callable[[io.BufferedIOBase], Any]) -> None:
        """Writes a file atomically."""
        with replacing(path, self._chunks) as unfinished, open(unfinished, "wb") as file:
            write(file)

    def _clean(self) -> None:
        """Removes the chunks of an archive; the notes of PNG files can still tell which one is damaged."""
        if self.settings["format"] == "npz":
            shutil.rmtree(self._chunks, ignore_errors=True)


def sample(options: SamplingOptions, accelerator: Accelerator) -> list[dict[str, Any]]:
    """
    Writes the samples that the options ask for, except for samples that exist already.

    Args:
        options ([`SamplingOptions`]): The options.
        accelerator (`Accelerator`): The processes. They share the work.

    Returns:
        `list[dict]`: The manifest of each folder of samples.

    Raises:
        `OSError`: there is no such pipeline, or a file cannot be written.
        `RuntimeError`: another process has failed.
        `FloatingPointError`: samples are not finite.
        `ValueError`: the options do not fit the pipeline, or the folder holds something else.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each shape, of which adaptive steps have many
    with accelerator.local_main_process_first():  # which downloads what is on the Hub
        pipeline = load_pipeline(
            options.pretrained_model_name_or_path,
            options.lora_weights,
            options.dtype,
            use_token_prior=options.call.token_prior.use_token_prior,
        )
        settings = sample_settings(options, pipeline)
        guidance = load_guidance(options.guidance, options.guidance_model, DTYPES[options.dtype])
    pipeline.to(accelerator.device)
    if guidance.transformer is not None:
        guidance.transformer.to(accelerator.device)
    checkpoint = {"path": options.pretrained_model_name_or_path, "sha256": settings["checkpoint_sha256"]}
    if options.lora_weights is not None:
        checkpoint["lora_weights"] = {"path": options.lora_weights, "sha256": settings["lora_weights_sha256"]}
    labels = draw_labels(options.labels, options.seed, options.num_images, pipeline.transformer.config.num_classes)
    stages = range(options.call.token_prior.first_stage, settings["num_stages"] + 1)
    if options.all_stages:
        folders = {n: options.output_dir / f"stage-{n}" for n in stages}
    else:
        folders = {stages[-1]: options.output_dir}
    if options.all_stages and any((options.output_dir / name).exists() for name in (SAMPLES_MANIFEST, CHUNKS)):
        raise ValueError(f"`output_dir` must not hold one stage alone with `all_stages`, got {options.output_dir}.")
    outputs = {n: SampleFolder(folder, {**settings, "stage": n}, labels) for n, folder in folders.items()}
    complete: list[int] = []
    with ExitStack() as stack:
        with all_or_none():
            if accelerator.is_main_process:
                stack.enter_context(in_use(options.output_dir))
                complete = [n for n, output in outputs.items() if output.open()]
        complete = gather_object(complete)
        outputs = {n: output for n, output in outputs.items() if n not in complete}
        if outputs:
            first = next(iter(outputs.values()))
            own = range(accelerator.process_index, first.num_chunks, accelerator.num_processes)
            own = [chunk for chunk in own if not all(output.is_done(chunk) for output in outputs.values())]
            missing = sorted(gather_object(own))
            _sample_chunks(options, pipeline, guidance, outputs, missing=missing, accelerator=accelerator)
            with all_or_none():
                if accelerator.is_main_process:
                    details = {
                        "task": "sample",
                        "argv": to_argv(options),
                        "checkpoint": checkpoint,
                        "num_classes": None if labels is None else pipeline.transformer.config.num_classes,
                    }
                    for output in outputs.values():
                        output.finish(**details)
    return [read_record(folder / SAMPLES_MANIFEST, SamplesManifest) for folder in folders.values()]


def _sample_chunks(
    options: SamplingOptions,
    pipeline: DoDPipeline,
    guidance: Guidance,
    outputs: dict[int, SampleFolder],
    missing: list[int],
    accelerator: Accelerator,
) -> None:
    """Deals chunks to the processes, one to each at a time, so that an error in one ends all."""
    first = next(iter(outputs.values()))
    call = options.call.to_call(first.settings["num_stages"])
    first_stage = options.call.token_prior.first_stage
    progress = tqdm(
        total=options.num_images,
        initial=options.num_images - sum(len(first.indices(chunk)) for chunk in missing),
        desc="Sampling",
        unit="images",
        disable=None if accelerator.is_main_process else True,
    )

    def write(chunk: int, stages: Any) -> None:
        for n, output in outputs.items():
            images = stages[n - first_stage] if options.all_stages else stages
            output.write(chunk, to_uint8(images), accelerator.device)

    pending: deque[Future[None]] = deque()
    with progress, ThreadPoolExecutor(max_workers=1) as writer:
        for start in range(0, len(missing), accelerator.num_processes):
            dealt = missing[start : start + accelerator.num_processes]
            with all_or_none():
                for chunk in dealt[accelerator.process_index :][:1]:
                    indices = first.indices(chunk)
                    known = first.labels is not None
                    with _with_notes(pending):
                        stages = pipeline(
                            first.labels[indices.start : indices.stop] if known else [None] * len(indices),
                            seed=options.seed,
                            sample_indices=indices,
                            output_type="np",
                            return_stages=options.all_stages,
                            return_dict=False,
                            guidance=guidance,
                            **call,
                        )[-1]
                    pending.append(writer.submit(write, chunk, stages))
                while len(pending) > options.write_while_sampling:
                    pending.popleft().result()
            progress.update(sum(len(first.indices(chunk)) for chunk in dealt))
        with all_or_none():
            while pending:
                pending.popleft().result()


@contextmanager
def _with_notes(pending: Iterable[Future[None]]) -> Iterator[None]:
    """Context in which an error of sampling hides none of writing: that is a note of it."""
    try:
        yield
    except Exception as error:
        for future in pending:
            if (other := future.exception()) is not None:
                error.add_note(f"Before that, images could not be written: {other}")
        raise


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises a `ValueError` if they do not fit."""
    options = parse_options(SamplingOptions, argv, __doc__)
    end_with_launcher()
    accelerator = Accelerator(kwargs_handlers=[process_group_timeout()])
    check_processes(accelerator)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("diffusers_dod").setLevel(logging.INFO)
    for manifest in sample(options, accelerator):
        if accelerator.is_main_process:
            stage = manifest["settings"]["stage"]
            logger.info(f"{manifest['num_images']:,} images of stage {stage}, SHA-256 {manifest['sha256']}.")
    end_processes(accelerator)


if __name__ == "__main__":
    run_main(main)
