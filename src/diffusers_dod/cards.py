# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Model cards: one template, filled from the configs of a pipeline, the options of its training and results."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .checks import check_choice
from .compute import sampling_compute, training_cost
from .data.labelled_images import PROCEDURAL
from .files import METRICS_FILE
from .guidance_options import GUIDANCE_FIELDS
from .latent_embedding import LatentEmbeddingModule, VisualPriorMixin
from .metrics.extractors import INCEPTION
from .metrics.inception import WEIGHTS_SHA256
from .metrics.table import METRICS
from .options import list_options
from .pipeline_dod import DoDPipeline
from .presets import PRESETS, Preset
from .records import read_lines
from .sampling_options import CallOptions
from .shipped import find_shipped
from .tables import format_table
from .training_options import TrainingOptions
from .transformer_dod import DoDTransformer2DModel


CARD = "README.md"
CURVES = "curves.png"

# Tasks of results: a heading, and the title of the rows of their table.
TASKS = {
    "evaluate": ("Samples", "images"),
    "sweep": ("Samples with several settings", "stage, average, steps, solver, scales"),
    "reconstruction": ("Reconstruction: stage 2 with the visual prior of real images", "guidance"),
    "linear_probe": ("Linear probe of the visual prior's tokens", "features"),
    "train": ("Fréchet distance after {step:,} steps", "images"),
}
HUB_TASKS = ("evaluate", "train")  # of one setting each: their numbers are the `model-index`
# Settings that numbers depend on, as far as they differ from these values; `None` is no value at all. Options
# of the call are always shown, as their defaults are the checkpoint's.
SETTINGS = dict.fromkeys(list_options(CallOptions)) | {name: field.default for name, field in GUIDANCE_FIELDS.items()}
SETTINGS |= dict.fromkeys(("labels", "seed", "dtype", "guidance_model_sha256", "lora_weights_sha256"))
SETTINGS |= {"allow_tf32": False, "prior_noise": 0.0, "use_token_prior": False}

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def _is_local(name: str | None) -> bool:
    return name is not None and Path(find_shipped(name)).exists()


def _split(name: str) -> tuple[str, str]:
    """Kind of a metric and what it is of: `fid_stage_1` -> `fid`, `stage 1`."""
    kind, label = re.fullmatch(r"([^_/]+)[_/]?(.*)", name).groups()
    return kind, re.sub(r"\blem\b", "LEM", label.replace("_", " ").replace("/", ", "))


def _title(kind: str) -> str:
    return METRICS[kind].title if kind in METRICS else kind


def _features(results: Mapping[str, Any]) -> str | None:
    """Name of the extractor without folders; nothing for Inception with the published weights."""
    settings = results["settings"]
    extractor, sha256 = settings.get("extractor"), settings.get("extractor_sha256")
    is_published = extractor == INCEPTION or (sha256 or "").startswith(WEIGHTS_SHA256)
    return None if extractor is None or is_published else Path(extractor).name


def _settings(results: Mapping[str, Any]) -> str:
    """The settings of sampling that numbers depend on, in one line."""
    sampling = results["data"].get("samples", {}).get("manifest", {}).get("settings", {})
    found = sampling | results["settings"]
    values = {name: found[name] for name in SETTINGS if found.get(name) is not None}
    values = {name: value for name, value in values.items() if _to_tuple(value) != SETTINGS[name]}
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in values.items()
    )


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _dataset(results: Mapping[str, Any]) -> str:
    """The reference of samples, or the images that were taken."""
    data = results["data"]
    source = data.get("reference") or data.get("train") or data
    return source.get("name") or source.get("images") or "no reference"


def to_eval_results(results: Mapping[str, Any], dataset_type: str | None = None) -> list[EvalResult]:
    """
    Turns results into the metadata of cards.

    Args:
        results (`Mapping`): Results from [`read_results`].
        dataset_type (`str`, *optional*): Id of the data on the Hub. By default their name in the results.

    Returns:
        `list[EvalResult]`: An entry for each number of samples with one setting. Grids of settings, and numbers that
        are not of samples, have none.
    """
    if results["task"] not in HUB_TASKS:
        return []
    dataset, features, num_samples = _dataset(results), _features(results), results["data"].get("num_samples")
    evaluated = []
    for name, metric in results["metrics"].items():
        kind, label = _split(name)
        parts = [_title(kind), label, num_samples and f"{num_samples:,} samples"]
        shown = ", ".join(part for part in [*parts, features and f"features of {features}"] if part)
        if metric["interval"] is not None:
            shown += " (95 %: {:.4g} to {:.4g})".format(*metric["interval"])
        evaluated.append(
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=dataset_type or dataset.split(":")[0],
                dataset_name=dataset,
                metric_type=METRICS[kind].hub_type or kind if kind in METRICS else kind,
                metric_name=shown,
                metric_value=round(metric["value"], 4),
                metric_config=_settings(results) or None,
            )
        )
    return evaluated


def _table(results: Mapping[str, Any]) -> str:
    """Table with a column for each kind of metric and a row for each subject, such as a stage."""
    rows: dict[str, dict[str, str]] = {}
    for name, metric in results["metrics"].items():
        kind, label = _split(name)
        interval = "" if metric["interval"] is None else " [{:.4g}, {:.4g}]".format(*metric["interval"])
        rows.setdefault(label or "all", {})[kind] = f"{metric['value']:.4g}{interval}"
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    header = [TASKS[results["task"]][1], *(_title(kind) for kind in kinds)]
    return format_table(header, [[label, *(row.get(kind, "") for kind in kinds)] for label, row in rows.items()])


def _caption(name: str, results: Mapping[str, Any]) -> str:
    data, settings, features = results["data"], _settings(results), _features(results)
    counts = {"num_samples": "samples", "num_images": "images", "num_test": "images to test with"}
    parts = [f"{data[key]:,} {what}" for key, what in counts.items() if data.get(key) is not None]
    if results["task"] == "sweep" and len(seeds := results["settings"].get("seeds", [])) > 1:
        parts[0] += f" of each of {len(seeds)} seeds"
    parts += [f"data: {_dataset(results)}", settings]
    lines = [f"`{name}`: {'; '.join(part for part in parts if part)}."]
    if features is not None:
        lines.append(
            f"Computed on the features of `{features}`, not Inception's: not comparable with published numbers."
        )
    if results["task"] == "train":
        lines.append("So few samples make it larger than many would; it compares steps and stages of one run.")
    return "\n".join(lines)


def _command(module: str, argv: Sequence[str]) -> str:
    """Wraps a command into lines, with every option beside its values."""
    lines = [f"python -m diffusers_dod.evaluation.{module}"]
    for option in re.split(r" (?=--)", shlex.join(argv)):
        if len(lines[-1]) + len(option) > 115:
            lines.append("   ")
        lines[-1] += f" {option}"
    return " \\\n".join(lines)


def _commands(results: Mapping[str, Any]) -> str:
    """Commands that compute the numbers, with the sampling first."""
    if "argv" not in results:
        return ""
    manifest = results["data"].get("samples", {}).get("manifest")
    sampling = [] if manifest is None else [_command("sample", manifest["argv"])]
    return "\n".join([*sampling, _command(results["task"], results["argv"])])


def read_model(folder: Path) -> tuple[Preset, tuple[str, ...]]:
    """Reads the configs and the class names of the pipeline in `folder`."""
    names = DoDPipeline.load_config(folder).get("id2label") or {}
    return Preset.from_pretrained(folder), tuple(names[key] for key in sorted(names, key=int))


def _build_without_weights(model: Preset) -> tuple[DoDTransformer2DModel, VisualPriorMixin | None]:
    """Builds both models without weights, for their sizes."""
    with torch.device("meta"):
        return model.build()


def _embedder_name(model: Preset) -> str | None:
    """Name of the latent embedder on cards, if there is one."""
    if model.latent_embedder_config is None:
        return None
    is_lem = issubclass(model.latent_embedder_class, LatentEmbeddingModule)
    return "LEM" if is_lem else model.latent_embedder_class.__name__


def _architecture(model: Preset) -> str:
    transformer, embedder = _build_without_weights(model)
    config, columns = transformer.config, [transformer] + [embedder] * (embedder is not None)
    layers = [str(config.num_layers)]
    text = [
        f"Latents of {config.in_channels} x {config.sample_size} x {config.sample_size} numbers in patches of "
        f"{config.patch_size} x {config.patch_size}; {config.num_classes:,} classes and a null class."
    ]
    name = _embedder_name(model)
    if embedder is not None:
        count, width = embedder.token_shape
        text.append(f"A visual prior is {count} tokens of {width} numbers")
        if isinstance(embedder, LatentEmbeddingModule):
            layers.append(f"{embedder.config.num_encoder_layers} + {embedder.config.num_decoder_layers}")
            text[-1] += "; the LEM's layers are those of its encoder and decoder."
        else:
            layers.append("")
            text[-1] += f"; a {name} takes the place of the LEM."
    rows = [
        ["parameters", *(f"{part.num_parameters():,}" for part in columns)],
        ["layers", *layers],
        ["width", *(str(part.inner_dim) for part in columns)],
        ["attention heads", *(str(part.config.get("num_attention_heads", "")) for part in columns)],
    ]
    return "\n\n".join([format_table(["", "backbone", name][: len(columns) + 1], rows), "\n".join(text)])


def _format_flops(flops: float) -> str:
    power = (len(f"{flops:.0f}") - 1) // 3
    return f"{flops / 1000**power:.1f} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}FLOPs"


def _count(options: TrainingOptions, model: Preset, num_images: int) -> dict[str, str]:
    """Counts the cost of training and sampling, for the template."""
    config = _build_without_weights(model)[0].config
    training = training_cost(
        model, (config.in_channels, config.sample_size, config.sample_size), config.num_classes, options.training_step
    ).training_flops
    sampling = sampling_compute(model)
    stages = [
        f"{stage['num_evaluations']} {'guided ' if stage['num_guided_evaluations'] else ''}Euler steps"
        for stage in sampling["stages"]
    ]
    return {
        "image": _format_flops(training),
        "num_images": f"{num_images:,}",
        "run": _format_flops(training * num_images),
        "sampling": ", then ".join(stages),
        "sample": _format_flops(sampling["flops"]),
    }


def _training_time(metrics: Path, images_per_step: int) -> str | None:
    """Time that the steps of a run took, by its metrics."""
    seconds, last = 0.0, 0
    for line in read_lines(metrics):
        if not line["images_per_second"]:
            return None  # rounded to nothing
        seconds += (line["step"] - last) * images_per_step / line["images_per_second"]
        last = line["step"]
    if not last:
        return None
    unit, size = ("hours", 3600) if seconds >= 3600 else ("minutes", 60) if seconds >= 60 else ("seconds", 1)
    return f"{seconds / size:.1f} {unit}"


def _autoencoder(options: TrainingOptions, folder: Path | None) -> str:
    name = options.data.pretrained_vae_name_or_path
    if name is None and options.model.lora.lora_rank is not None:
        return "that of the pipeline the adapters belong to"
    if name is not None and not _is_local(name):
        return f"`{name}`"
    is_saved = folder is not None and (folder / "vae").is_dir()
    return "the one in `vae/`" if is_saved or name is not None else "none, it draws pixels"


def _classes(names: Sequence[str]) -> str | None:
    return f"{len(names):,} classes: {', '.join(names[:20])}{', ...' * (len(names) > 20)}" if names else None


def _steps(step: int, max_steps: int, images_per_step: int | None, num_images: int | None) -> str:
    num_steps = step or max_steps
    text = f"{num_steps:,}{f' of {max_steps:,}' * (num_steps < max_steps)} steps"
    if images_per_step is None:
        return text
    if num_images is not None:
        return f"{text} of {num_images:,} images in all"
    return f"{text} of {images_per_step:,} images ({num_steps * images_per_step:,} in all)"


def _optimizer(options: TrainingOptions) -> str:
    optimizer, precision = options.optimizer, options.precision.mixed_precision
    own_rate = optimizer.latent_embedder_learning_rate
    parts = {
        {"adamw": "AdamW", "adamw_8bit": "AdamW with moments of 8 bits"}[optimizer.optimizer]: True,
        f"learning rate {optimizer.learning_rate:g}": True,
        f"that of the LEM {own_rate}": own_rate is not None,
        f"{optimizer.lr_scheduler.replace('_', ' ')} schedule": "constant" not in optimizer.lr_scheduler,
        f"{optimizer.lr_warmup_steps:,} steps of warm-up": optimizer.lr_warmup_steps > 0,
        f"the last {optimizer.lr_decay_steps or 0:,} steps of decay": optimizer.lr_decay_steps is not None,
        f"weight decay {optimizer.adam_weight_decay:g}": True,
        f"mixed precision {precision}": precision not in (None, "no"),
        "fp32": precision == "no",
    }
    return ", ".join(part for part, is_shown in parts.items() if is_shown)


def _is_own(dataset_name: str | None) -> bool:
    """Whether images are no data set of the Hub."""
    return dataset_name is None or dataset_name in PROCEDURAL or _is_local(dataset_name)


def _images(dataset_name: str | None) -> str:
    if dataset_name in PROCEDURAL:
        return f"procedural {dataset_name} (`diffusers_dod.data.{dataset_name}`)"
    return "own images" if _is_own(dataset_name) else f"`{dataset_name}`"


def _metadata(
    options: TrainingOptions, name: str, results: Mapping[str, Mapping[str, Any]], texts: Mapping[str, Any]
) -> ModelCardData:
    """Metadata of a card, which the Hub shows."""
    dataset_name, base_model = options.data.images.dataset_name, options.model.pretrained_model_name_or_path
    datasets = texts.get("datasets") or ([] if _is_own(dataset_name) else [dataset_name])
    eval_results = [
        entry for content in results.values() for entry in to_eval_results(content, datasets[0] if datasets else None)
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=texts.get("license", "apache-2.0"),
        tags=["diffusion-on-diffusion", "diffusers_dod", "rectified-flow", "class-conditional"],
        datasets=datasets or None,
        base_model=None if _is_local(base_model) else base_model,
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
    )


def _section(file: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Section of a card with the results of a file."""
    return {
        "title": TASKS[results["task"]][0].format(**results["settings"]),
        "caption": _caption(file, results),
        "table": _table(results),
        "commands": _commands(results),
    }


def describe_loading(
    options: TrainingOptions, path: str, class_names: Sequence[str] = (), base: str | None = None
) -> list[str]:
    """
    Writes the Python that loads what a run has trained: a pipeline, or LoRA adapters with the one they belong to.

    Args:
        options ([`TrainingOptions`]): The run's options.
        path (`str`): Path or Hub id of the pipeline or of the adapters.
        class_names (`Sequence[str]`, defaults to `()`): Names of the classes, if they are known yet.
        base (`str`, *optional*): What stands for the place of the adapters' pipeline. By default the place itself.

    Returns:
        `list[str]`: Lines; the first one imports.
    """
    if options.model.lora.lora_rank is None:
        return ["from diffusers_dod import DoDPipeline", f'pipe = DoDPipeline.from_pretrained("{path}")']
    place = find_shipped(options.model.pretrained_model_name_or_path)
    shown, names, arguments = json.dumps(base or place), ["DoDPipeline"], []
    if class_names:
        known = DoDPipeline.load_config(place).get("id2label") or {}
        if DoDTransformer2DModel.load_config(place, subfolder="transformer")["num_classes"] != len(class_names):
            names.append("DoDTransformer2DModel")
            arguments.append(
                f'transformer=DoDTransformer2DModel.from_pretrained({shown}, subfolder="transformer", '
                f"num_classes={len(class_names)})"
            )
        if [known[key] for key in sorted(known, key=int)] != list(class_names):
            arguments.append(f"id2label={dict(enumerate(class_names))}")
    return [
        f"from diffusers_dod import {', '.join(names)}",
        f"pipe = DoDPipeline.from_pretrained({', '.join([shown, *arguments])})",
        f"pipe.load_lora_weights({json.dumps(path)})",
    ]


def _describe_lora(options: TrainingOptions) -> str | None:
    """The adapters of a run, if it trains some."""
    lora = options.model.lora
    if lora.lora_rank is None:
        return None
    modules = ", ".join(f"`{name}`" for name in lora.lora_target_modules)
    parts = "backbone and latent embedder" if lora.lora_latent_embedder else "the backbone"
    scale = (lora.lora_alpha or lora.lora_rank) / lora.lora_rank
    return f"of rank {lora.lora_rank}, scaled by {scale:g}, in {parts}: {modules}"


def fill_card(
    options: TrainingOptions,
    recipe: Path,
    path: str,
    name: str,
    step: int = 0,
    images_per_step: int | None = None,
    class_names: Sequence[str] = (),
    folder: Path | None = None,
    model: Preset | None = None,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    with_cost: bool = False,
    texts: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    changes: Sequence[str] = (),
) -> ModelCard:
    """
    Fills the template of a card.

    Args:
        options ([`TrainingOptions`]): The options of the training.
        recipe (`Path`): File of the options that differ from the defaults. Comments at its head are left out.
        path (`str`): Path or Hub id of the pipeline, for the card.
        name (`str`): Name of the model.
        step (`int`, defaults to 0): Number of finished steps; 0 if there are no weights yet.
        images_per_step (`int`, *optional*): Images of a step over all processes.
        class_names (`Sequence[str]`, defaults to `()`): Names of the classes.
        folder (`Path`, *optional*): Folder of the card. Once there are weights, the card shows its metrics, curves and
            samples.
        model ([`Preset`], *optional*): The configs of the models.
        results (`Mapping[str, Mapping]`, *optional*): Results from [`read_results`], by file name.
        with_cost (`bool`, defaults to `False`): Whether to count the FLOPs of training and sampling. It takes seconds,
            and needs `images_per_step` and `model`.
        texts (`Mapping[str, Any]`, *optional*): `repo_id`, `license`, `datasets`, `hardware`, `description`, `data`,
            `training`, `limitations` and `paper` from the file of a card, see docs/model_cards.md.
        num_images (`int`, *optional*): Images in all finished steps, if not `step` times `images_per_step`.
        changes (`Sequence[str]`, defaults to `()`): What has changed between steps, in sentences.

    Returns:
        `ModelCard`: The card.

    Raises:
        `ValueError`: there are results of a task that cards do not show.
    """
    results, texts = results or {}, texts or {}
    for content in results.values():
        check_choice("task", content["task"], tuple(TASKS))
    dataset_name, num_processes = options.data.images.dataset_name, options.processes.num_processes or 1
    run = folder if step > 0 else None
    if step == 0 or images_per_step is None or num_images == step * images_per_step:
        num_images = None  # all steps have, or will have, as many
    time = None
    if run is not None and images_per_step and num_images is None:
        time = _training_time(run / METRICS_FILE, images_per_step)
    drawn = [] if run is None else sorted((run / "samples").glob("step-*.png"))
    drawn = [path for path in drawn if int(path.stem.removeprefix("step-")) <= step]  # later ones are abandoned
    base = options.model.pretrained_model_name_or_path
    imports, *loading = describe_loading(
        options, texts.get("repo_id", path), class_names, "path/or/hub-id/of/the/base" if _is_local(base) else None
    )
    card = ModelCard.from_template(
        _metadata(options, name, results, texts),
        template_path=TEMPLATE,
        preset=options.model.preset,
        resolution=options.data.images.resolution,
        embedder=_embedder_name(model or PRESETS[options.model.preset]),
        is_trained=step > 0,
        samples=f"samples/{drawn[-1].name}" if drawn else None,
        imports=imports,
        loading="\n".join(loading),
        lora=_describe_lora(options),
        label=json.dumps(class_names[0], ensure_ascii=False) if class_names else 0,
        architecture=None if model is None else _architecture(model),
        data=texts.get("data") or f"{_images(dataset_name)}.",
        classes=_classes(class_names),
        autoencoder=_autoencoder(options, folder),
        steps=_steps(step, options.optimizer.max_train_steps, images_per_step, num_images),
        changes=changes,
        ema_decay=options.averages.ema_decay[0],
        optimizer=_optimizer(options),
        prior_dropout=f"{100 * options.dropout.prior_dropout_prob:g}",
        label_dropout=f"{100 * options.dropout.label_dropout_prob:g}",
        time=time,
        launcher=f"accelerate launch --multi_gpu --num_processes {num_processes}" if num_processes > 1 else "python",
        data_option="" if dataset_name else "--train_data_dir ... ",
        recipe_path=recipe.name if recipe.parent == folder else recipe.as_posix(),
        recipe=re.sub(r"\A(#.*\n)+", "", recipe.read_text(encoding="utf-8")).strip(),
        curves=CURVES if run is not None and (run / CURVES).exists() else None,
        results=[_section(file, content) for file, content in results.items()],
        has_commands=any("argv" in content for content in results.values()),
        paper=[
            {"title": table["title"], "table": format_table(table["header"], [map(str, row) for row in table["rows"]])}
            for table in texts.get("paper", ())
        ],
        cost=_count(options, model, (step or options.optimizer.max_train_steps) * images_per_step)
        if with_cost
        else None,
        **{key: texts.get(key, "") for key in ("hardware", "description", "training", "limitations")},
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n")
