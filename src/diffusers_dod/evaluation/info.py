# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Says what a folder or a file of this package is, and which commands go on with it:

    dod info outputs/dod-b                 a pipeline, the folder of a training or one of its checkpoints
    dod info outputs/samples               samples, latents
    dod info docs/results/desk_stage2.json   results, or a PNG file of `dod sample`
    dod info user/dod-b                    a repository on the Hub, of which it reads no weights
    dod info training/accelerate/fsdp2.yaml --path   where a file that comes with the package is

Nothing is loaded, and hashes are computed with `--hash` alone, but for that of the photo that an image came from.
"""

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..checkpoint_manifest import ADAPTER, CHECKPOINT_MANIFEST, INDEX, STATE_FOLDER, CheckpointManifest, find_damage
from ..checks import abbreviate
from ..command_line import run_main
from ..data.latents import SHARD_MANIFEST, ShardManifest, find_damaged_shards
from ..files import METRICS_FILE, file_sha256
from ..image_settings import read_image_settings
from ..lora import read_lora_classes
from ..metrics.extractors import is_inception
from ..options import option, parse_options
from ..records import check_safetensors_header, find_record, read_lines, read_record
from ..results import checkpoint_sha256, read_results
from ..shipped import find_shipped
from . import draw
from .images import CHUNKS, SAMPLES_MANIFEST, SamplesManifest


# Files of weights of a component, without those of a variant.
WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Options of the command."""

    path: str = option(is_positional=True, help="Folder, file, or repository on the Hub.")
    hash: bool = option(False, help="Compute hashes, and compare files with those of their manifest.")
    path_only: bool = option(
        False, aliases=("path",), help="Print nothing but the path of what comes with the package under this name."
    )


@dataclass
class Description:
    """
    What a folder or file is.

    Args:
        kind (`str`): In a few words.
        facts (`dict[str, Any]`): What it says of itself; `None` for what it does not say.
        commands (`list[str]`): The commands that go on with it.
    """

    kind: str
    facts: dict[str, Any]
    commands: list[str]

    def __str__(self) -> str:
        facts = {name: value for name, value in self.facts.items() if value is not None}
        width = max(map(len, facts), default=0) + 2
        lines = [self.kind, *(f"  {name:{width}}{value}" for name, value in facts.items())]
        lines += ["Next:", *(f"  {command}" for command in self.commands)] if self.commands else []
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------- pipelines and trainings


def count_parameters(folder: Path) -> int | None:
    """
    Counts the parameters of a saved model.

    Args:
        folder (`Path`): The folder of the model.

    Returns:
        `int`, *optional*: The number of numbers in its safetensors files, of which only headers are read; `None` if
        there are no such files.

    Raises:
        `OSError`: a file cannot be read.
        `ValueError`: a file is no safetensors file.
    """
    paths = [path for path in sorted(folder.glob("*.safetensors")) if WEIGHTS.fullmatch(path.name)]
    total = 0
    for path in paths:
        check_safetensors_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} must be a safetensors file: {error}") from error
    return total if paths else None


def _describe_component(folder: Path, entry: list[Any]) -> str:
    count = count_parameters(folder)
    return f"{entry[1]}{'' if count is None else f', {count:,} parameters'}"


def _find_size(folder: Path, index: dict[str, Any]) -> str | None:
    """Size of images, or of latents where only the autoencoder knows that of images."""
    config = find_record(folder / "transformer" / "config.json", dict[str, Any]) or {}
    side, vae = config.get("sample_size"), find_record(folder / "vae" / "config.json", dict[str, Any]) or {}
    if not isinstance(side, int):
        return None
    latents = f"latents {config.get('in_channels')} x {side} x {side}, patches of {config.get('patch_size')}"
    levels = vae.get("block_out_channels")
    if index.get("vae", [None])[0] is None:
        return f"{side} x {side} pixels, patches of {config.get('patch_size')}"
    return f"{side << len(levels) - 1} x {side << len(levels) - 1} pixels, {latents}" if levels else latents


def _describe_classes(names: Any) -> str | None:
    if not isinstance(names, dict) or not names:
        return None
    return f"{len(names):,}: {abbreviate([str(names[key]).partition(',')[0] for key in sorted(names, key=int)], 12)}"


def _describe_training(folder: Path) -> dict[str, Any]:
    """Facts of the folder of a training."""
    lines = read_lines(folder / METRICS_FILE)
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    checkpoints = sorted(
        int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", path.name)
    )
    return {
        "steps": f"{lines[-1]['step']:,}" if lines else None,
        "loss": f"{losses[-1][1]:.4f} at step {losses[-1][0]:,}" if losses else None,
        "checkpoints": ", ".join(f"{step:,}" for step in checkpoints) or None,
    }


def describe_pipeline(folder: Path, name: str, with_hash: bool) -> Description | None:
    """
    Describes a pipeline, the folder of a training, or one of its checkpoints.

    Args:
        folder (`Path`): The folder.
        name (`str`): How the user calls it, for the commands.
        with_hash (`bool`): Whether to compute hashes.

    Returns:
        [`Description`], *optional*: `None` if it is none of these.

    Raises:
        `OSError`, `ValueError`: a file cannot be read.
    """
    has_index = (folder / INDEX).is_file()
    training = _describe_training(folder)
    if not has_index and not any(training.values()):
        return None
    word = shlex.quote(name)
    if not has_index:
        commands = [f"dod plot {word} --output curves.png"]
        if training["checkpoints"]:
            commands.insert(0, f"dod train ... --output_dir {word} --resume_from_checkpoint latest")
        return Description("Training run that has not finished", training, commands)
    index = read_record(folder / INDEX, dict[str, Any])
    if "default_num_stages" not in index:
        raise ValueError(f"`path` must be a pipeline of this package, got {name!r} of {index.get('_class_name')}.")
    facts: dict[str, Any] = {"class": index.get("_class_name")}
    for part, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            facts[part] = _describe_component(folder / part, entry)
    steps, scale = index.get("default_num_inference_steps"), index.get("default_guidance_scale")
    first_scale = index.get("default_first_stage_guidance_scale", 1.0)
    facts |= {
        "classes": _describe_classes(index.get("id2label")),
        "size": _find_size(folder, index),
        "defaults": f"{index.get('default_num_stages')} stages of {steps} steps, guidance scale {scale}"
        + (f", {first_scale} in stage 1" if first_scale != 1 else ""),
        **training,
    }
    kind = "Pipeline of a training run" if any(training.values()) else "Pipeline"
    if (folder / CHECKPOINT_MANIFEST).is_file():
        kind = "Training checkpoint"
        facts["step"] = f"{read_record(folder / CHECKPOINT_MANIFEST, CheckpointManifest)['step']:,}"
        facts["training state"] = "yes" if (folder / STATE_FOLDER).is_dir() else "no"
        if with_hash:
            facts["damage"] = find_damage(folder) or "none"
    if with_hash:
        facts["sha256"] = checkpoint_sha256(folder)
    names = index.get("id2label") or {}
    label = shlex.quote(str(names.get("0", "0")).partition(",")[0])
    return Description(
        kind,
        facts,
        [
            f"dod sample {label} --checkpoint {word} -o image.png",
            f"dod sample-dataset --pretrained_model_name_or_path {word} --num_images 1000 --output_dir samples",
            f"dod export {word} exported",
        ],
    )


def describe_adapters(folder: Path, name: str, with_hash: bool) -> Description | None:
    """
    Describes LoRA adapters, of a training or of others.

    Args:
        folder (`Path`): The folder.
        name (`str`): How the user calls it, for the commands.
        with_hash (`bool`): Whether to compare a checkpoint with its manifest.

    Returns:
        [`Description`], *optional*: `None` if it has no file of adapters, or a pipeline beside it.

    Raises:
        `OSError`, `ValueError`: a file cannot be read.
    """
    file = folder / ADAPTER
    if not file.is_file() or (folder / INDEX).is_file():
        return None
    check_safetensors_header(file)
    sizes: dict[str, int] = {}
    with safe_open(file, framework="pt") as weights:
        for key in weights.keys():
            part = key.partition(".")[0]
            sizes[part] = sizes.get(part, 0) + math.prod(weights.get_slice(key).get_shape())
    facts = {part: f"{count:,} parameters of adapters" for part, count in sizes.items()}
    facts |= {"classes": _describe_classes(read_lora_classes(file)[1]), **_describe_training(folder)}
    if (folder / CHECKPOINT_MANIFEST).is_file():
        facts["step"] = f"{read_record(folder / CHECKPOINT_MANIFEST, CheckpointManifest)['step']:,}"
        if with_hash:
            facts["damage"] = find_damage(folder) or "none"
    word = shlex.quote(name)
    commands = [
        f"pipe.load_lora_weights({name!r})  # Python; pipe is their pipeline",
        f"dod sample 0 --checkpoint PIPELINE --lora_weights {word} -o image.png",
        f"dod sample-dataset --pretrained_model_name_or_path PIPELINE --lora_weights {word} --num_images 1000 "
        "--output_dir samples",
    ]
    return Description("LoRA adapters", facts, commands)


# ----------------------------------------------------------------------------------------------------- all other kinds


def describe_latents(folder: Path, name: str, with_hash: bool) -> Description | None:
    """
    Describes latents of images.

    Args:
        folder (`Path`): Folder of the latents.
        name (`str`): How the user calls it, for the commands.
        with_hash (`bool`): Whether to compute hashes.

    Returns:
        [`Description`], *optional*: `None` if it is something else.
    """
    manifest = find_record(folder / SHARD_MANIFEST, ShardManifest)
    if manifest is None:
        return None
    facts = {
        "images": f"{manifest['num_samples']:,}, {manifest['num_views']} views of each",
        "shape": " x ".join(map(str, manifest["latent_shape"])) + f" in {manifest['latents_dtype']}",
        "classes": f"{len(manifest['class_names']):,}: {abbreviate(manifest['class_names'], 12)}",
        "left out": f"{len(manifest['bad_images'])} images" if manifest["bad_images"] else None,
        "shards": len(manifest["shards"]),
        "features": "of a vision model" if manifest.get("vision_model") else None,
    }
    if with_hash:
        facts["damage"] = ", ".join(find_damaged_shards(folder)) or "none"
    return Description(
        "Latents", facts, [f"dod train --latents_dir {shlex.quote(name)} --output_dir outputs/run --preset DoD-B"]
    )


def describe_samples(folder: Path, name: str, with_hash: bool) -> Description | None:
    """
    Describes samples, complete or not.

    Args:
        folder (`Path`): Folder of the samples.
        name (`str`): How the user calls it, for the commands.
        with_hash (`bool`): Whether to compute hashes.

    Returns:
        [`Description`], *optional*: `None` if it is something else.
    """
    manifest = find_record(folder / SAMPLES_MANIFEST, SamplesManifest)
    settings = manifest["settings"] if manifest else find_record(folder / CHUNKS / "settings.json", dict[str, Any])
    if settings is None:
        return None
    shown = {key: value for key, value in settings.items() if value is not None and key != "checkpoint_sha256"}
    facts = {
        "checkpoint": settings.get("checkpoint_sha256"),
        **shown,
        "sha256": manifest["sha256"] if manifest else None,
    }
    word = shlex.quote(name)
    if manifest is None:
        return Description("Samples that are not complete", facts, [f"dod sample-dataset ... --output_dir {word}"])
    return Description("Samples", facts, [f"dod evaluate {word} --reference path/to/images"])


def describe_results(path: Path, name: str, with_hash: bool) -> Description | None:
    """
    Describes a file of results.

    Args:
        path (`Path`): The file.
        name (`str`): How the user calls it, for the commands.
        with_hash (`bool`): Whether to compute hashes.

    Returns:
        [`Description`], *optional*: `None` if it is something else.

    Raises:
        `ValueError`: the results have changed since they were written.
        `OSError`: the file cannot be read.
    """
    if path.suffix != ".json" or "task" not in (find_record(path, dict[str, Any]) or {}):
        return None
    results = read_results(path)
    checkpoint = results.get("checkpoint") or {}
    facts: dict[str, Any] = {"task": results["task"], "checkpoint": checkpoint.get("path")}
    facts["lora_weights"] = checkpoint.get("lora_weights", {}).get("path")
    for metric, entry in results["metrics"].items():
        interval = entry["interval"]
        facts[metric] = f"{entry['value']:.6g}" + (f"  [{interval[0]:.6g}, {interval[1]:.6g}]" if interval else "")
    facts["versions"] = _format_versions(results.get("versions"))
    extractor = (results.get("settings") or {}).get("extractor")
    trust = "" if extractor is None or is_inception(str(extractor)) else " --trust_extractor"
    return Description("Results", facts, [f"dod reproduce {shlex.quote(name)}{trust}"])


def describe_image(path: Path, name: str, with_hash: bool) -> Description | None:
    """
    Describes an image with its settings.

    Args:
        path (`Path`): The file.
        name (`str`): How the user calls it, for the commands.
        with_hash (`bool`): Whether to compute hashes.

    Returns:
        [`Description`], *optional*: `None` if it is something else.

    Raises:
        `ValueError`: it is a PNG file without settings.
        `OSError`: the file cannot be read.
    """
    if path.suffix.lower() != ".png":
        return None
    settings = read_image_settings(path)
    options = {key: json.dumps(value) for key, value in settings["options"].items() if value is not None}
    parts = {"checkpoint": settings["checkpoint"], "lora_weights": settings["checkpoint"].get("lora_weights")}
    facts = {
        **{name: part and f"{part['path']}, SHA-256 {part['sha256']}" for name, part in parts.items()},
        **options,
        "versions": _format_versions(settings["versions"]),
    }
    try:
        draw.check_like(draw.DrawingOptions(like=path, output=Path("again.png")), settings)
        places = draw.find_names(settings)
    except (OSError, TypeError, ValueError) as error:
        facts["drawn again"], commands = f"not possible: {error}", []
    else:
        others = "".join(f" --{option} {shlex.quote(f'.../{place}')}" for option, place in places.items())
        commands = [f"dod sample --like {shlex.quote(name)}{others} -o again.png"]
    return Description(f"Image of the command {settings['task']}", facts, commands)


def _format_versions(versions: dict[str, str | None] | None) -> str | None:
    return ", ".join(f"{key} {value}" for key, value in (versions or {}).items()) or None


FOLDERS: tuple[Callable[[Path, str, bool], Description | None], ...] = (
    describe_adapters,
    describe_pipeline,
    describe_latents,
    describe_samples,
)
FILES = (describe_results, describe_image)


def describe(name: str, with_hash: bool = False) -> Description:
    """
    Finds out what a folder or a file is.

    Args:
        name (`str`): Path of the folder or file, or name of a repository on the Hub.
        with_hash (`bool`, defaults to `False`): Whether to compute hashes.

    Returns:
        [`Description`].

    Raises:
        `OSError`: there is no such folder, file or repository, or it cannot be read.
        `ValueError`: it is nothing of this package, or damaged.
    """
    path = Path(find_shipped(name))
    if not path.exists():
        try:
            path = Path(snapshot_download(name, allow_patterns=["*.json"]))
        except (OSError, ValueError) as error:
            raise OSError(
                f"`path` must be a folder or a file here, or a repository on the Hub, got {name!r}, which is none "
                f"here: {str(error).splitlines()[0]}"
            ) from error
    for kind in FOLDERS if path.is_dir() else FILES:
        if (found := kind(path, name, with_hash)) is not None:
            if with_hash and path.is_file():
                found.facts["file"] = f"SHA-256 {file_sha256(path)}"
            return found
    known = f"{INDEX}, {METRICS_FILE}, checkpoint-*, {SHARD_MANIFEST} of latents or samples, {CHUNKS}/"
    raise ValueError(
        f"`path` must be something that this package has written, got {name!r}, "
        + (f"in which there is none of {known}." if path.is_dir() else "which is neither results nor a PNG file.")
    )


def main(argv: list[str] | None = None) -> None:
    """
    Runs the command.

    Args:
        argv (`list[str]`, *optional*): Arguments; those of the process if not given.

    Raises:
        `OSError`, `ValueError`: see [`describe`]; or there is no file or folder of which the path is asked for.
    """
    options = parse_options(InfoOptions, argv, __doc__)
    if not options.path_only:
        print(describe(options.path, options.hash))
        return
    path = Path(find_shipped(options.path))
    if not path.exists():
        raise ValueError(f"`path` must be a file or folder that is there, or that comes with the package, got {path}.")
    print(path)


if __name__ == "__main__":
    run_main(main)
