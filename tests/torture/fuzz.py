"""Inputs by the thousand: parsers of ours get mutated files, and public callables numbers of every kind. A soak."""

import importlib
import io
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch
from helpers import normal, tiny_pipeline
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from diffusers_dod import DoDFlowMatchScheduler, DoDTransformer2DModel, Guidance, LatentEmbeddingModule
from diffusers_dod.conversion import load_fit_config, load_fitv2_checkpoint
from diffusers_dod.data.buckets import bucket_sizes
from diffusers_dod.data.labelled_images import Columns, read_row
from diffusers_dod.data.latents import LatentDataset
from diffusers_dod.data.sample_stream import PositionSampler, SampleDraws
from diffusers_dod.evaluation.draw import DrawingOptions, recall
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.evaluation.info import describe
from diffusers_dod.image_reading import center_crop
from diffusers_dod.image_settings import SETTINGS_KEY, read_image_settings, save_with_settings
from diffusers_dod.metrics.extractors import load_statistics
from diffusers_dod.metrics.intervals import mean_interval, wilson_interval
from diffusers_dod.metrics.kernel_distance import kernel_distance
from diffusers_dod.options import list_options, parse_options, read_recipe
from diffusers_dod.records import find_record, read_lines
from diffusers_dod.results import as_metric, read_results, write_results
from diffusers_dod.training.checkpoints import find_latest_checkpoint
from diffusers_dod.training.model_card import read_sources
from diffusers_dod.training_options import TrainingOptions

from .damage import TwoCheckpoints, read_features, write_features
from .jobs import Encoding, Sampling
from .rows import Skipped, Try, in_child, row


REFUSALS = (ValueError, TypeError, OSError)
NUM_INPUTS = 250  # of a try
WORDS = [
    b"null",
    b"NaN",
    b"1e309",
    b"-1",
    b"[]",
    b"{}",
    b'""',
    b"[[[[[[",
    b"../a",
    b"/etc/passwd",
    b"true",
    b"1" * 400,
]
WORDS += [b"\xff\xfe", b"\0", b"\n", b"&a [*a]", b'"\\ud800"', b"9223372036854775808", b"0.5", b'"x"', b"\xe2\x80\xa8"]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few bytes are flipped, cut, doubled or replaced by words that parsers stumble over."""
    mutated = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(mutated) + 1)
        end = min(len(mutated), start + rng.choice((0, 1, 4, 30)))
        kind = rng.randrange(5)
        if kind == 0 and start < len(mutated):
            mutated[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del mutated[start:end]
        elif kind == 2:
            mutated[start:start] = mutated[start:end]
        elif kind == 3:
            del mutated[start:]
        else:
            values = list(re.finditer(rb'"[^"]*"|-?\d[\d.e+-]*|true|null', bytes(mutated[:100_000])))
            place = rng.choice(values).span() if values else (start, end)
            mutated[slice(*place)] = rng.choice(WORDS)
    return bytes(mutated)


def fuzz(path: Path, read: Callable[[], object], num_tries: int = 8) -> Iterator[Try]:
    """Each try reads so many mutations of the file `path`; plain errors are welcome, others are not."""
    content = path.read_bytes()

    def attempt(seed: int) -> None:
        rng = random.Random(seed)
        for number in range(NUM_INPUTS):
            path.write_bytes(mutated := mutate(content, rng))
            try:
                with redirect_stderr(io.StringIO()):
                    read()
            except REFUSALS:
                pass
            except SystemExit as ended:
                assert ended.code == 2
            except Exception as error:
                start = next((i for i, (a, b) in enumerate(zip(content, mutated)) if a != b), len(mutated))  # noqa: B905
                near = mutated[max(0, start - 20) : start + 40]
                raise AssertionError(f"input {number}: {type(error).__name__}: {error} near {near}") from error

    def restored(folder: Path, seed: int) -> None:
        try:
            attempt(seed)
        finally:
            path.write_bytes(content)

    for seed in range(num_tries):
        yield f"seed {seed}", lambda folder, seed=seed: restored(folder, seed)


@row("fuzz: results", NUM_INPUTS)
def results(shared: Path) -> Iterator[Try]:
    path = shared / "fid.json"
    metrics = {"fid": as_metric(4.25, (3.25, 5.25)), "kid": as_metric(2.0)}
    write_results(path, "evaluate", ["samples", "--seed", "1"], metrics, {"name": "a"}, {"seed": 1}, "cpu")
    yield from fuzz(path, lambda: read_results(path))


@row("fuzz: lines of metrics", NUM_INPUTS)
def lines(shared: Path) -> Iterator[Try]:
    path = shared / "metrics.jsonl"
    path.write_text(
        "".join(f"{json.dumps({'step': step, 'loss': 1 / step, 'grad_norm': None})}\n" for step in (1, 2, 3))
    )
    yield from fuzz(path, lambda: (read_lines(path), find_record(path, dict)))


@row("fuzz: manifest of a checkpoint", NUM_INPUTS)
def checkpoints(shared: Path) -> Iterator[Try]:
    job = TwoCheckpoints(shared)
    in_child(lambda: job.run(shared / "run")).check()
    for other in (shared / "run").glob("checkpoint-2"):
        other.rename(shared / "other")
    yield from fuzz(shared / "run" / "checkpoint-4" / "manifest.json", lambda: find_latest_checkpoint(shared / "run"))


@row("fuzz: manifest of latents", NUM_INPUTS)
def latents(shared: Path) -> Iterator[Try]:
    Encoding(shared).make_expected()
    yield from fuzz(shared / "whole" / "manifest.json", lambda: read_latents(shared / "whole"))


@row("fuzz: shard of latents", NUM_INPUTS)
def shards(shared: Path) -> Iterator[Try]:
    Encoding(shared).make_expected()
    yield from fuzz(shared / "whole" / "shard-00000.safetensors", lambda: read_latents(shared / "whole"))


def read_latents(folder: Path) -> None:
    found = LatentDataset(folder)
    for index in range(min(4, len(found))):
        found.read(index)


@row("fuzz: manifest of samples", NUM_INPUTS)
def samples(shared: Path) -> Iterator[Try]:
    Sampling(shared).make_expected()
    yield from fuzz(shared / "whole" / "manifest.json", lambda: open_images(str(shared / "whole")))


@row("fuzz: record of features in a cache", NUM_INPUTS)
def features(shared: Path) -> Iterator[Try]:
    entry = write_features(shared / "cache", 0)
    yield from fuzz(entry / "settings.json", lambda: read_features(entry))


@row("fuzz: npz of statistics", NUM_INPUTS)
def statistics(shared: Path) -> Iterator[Try]:
    np.savez(shared / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    yield from fuzz(shared / "s.npz", lambda: load_statistics(shared / "s.npz"))


@row("fuzz: recipe", NUM_INPUTS)
def recipes(shared: Path) -> Iterator[Try]:
    path = shared / "r.yaml"
    path.write_text("preset: DoD-Desk\nlearning_rate: 1e-3\nema_decay: [0.9, 0.99]\nrandom_flip: true\nseed: 3\n")
    argv = ["--config", str(path), "--train_data_dir", str(shared), "--output_dir", str(shared / "run")]
    yield from fuzz(path, lambda: (read_recipe(path), parse_options(TrainingOptions, argv)))


@row("fuzz: sources of a card", NUM_INPUTS)
def cards(shared: Path) -> Iterator[Try]:
    path = shared / "card.yaml"
    path.write_text("recipe: a.yaml\npipeline: folder\nresults:\n  - a.json\n  - b.json\ntexts:\n  title: A\n")
    yield from fuzz(path, lambda: read_sources(path))


@row("fuzz: checkpoint of FiT, safetensors, pickle and config", NUM_INPUTS)
def fit(shared: Path) -> Iterator[Try]:
    weights = {"blocks.0.attn.qkv.weight": normal(4, 4), "final_layer.linear.bias": normal(4)}
    save_file(weights, shared / "fit.safetensors")
    torch.save({"ema": weights}, shared / "fit.pt")
    (shared / "fit.yaml").write_text(
        "diffusion:\n  network_config:\n    params:\n      depth: 2\n      hidden_size: 8\n"
    )
    for name, read in (
        ("fit.safetensors", load_fitv2_checkpoint),
        ("fit.pt", load_fitv2_checkpoint),
        ("fit.yaml", load_fit_config),
    ):
        yield from fuzz(shared / name, lambda read=read, name=name: read(shared / name), 4)


@row("fuzz: images", NUM_INPUTS)
def images(shared: Path) -> Iterator[Try]:
    image = Image.effect_noise((24, 20), 40)
    exif = Image.Exif()
    exif[274] = 6
    for name in ("a.png", "a.jpg", "a.webp"):
        image.save(shared / name, exif=exif)

        def read(name: str = name) -> None:
            try:
                found, _ = read_row({"image": {"path": str(shared / name), "bytes": None}, "label": 1}, Columns())
                with found:
                    center_crop(found, 16)
            except Image.DecompressionBombError as error:  # a bad image for who reads data sets
                raise ValueError from error

        yield from fuzz(shared / name, read, 3)


@row("fuzz: settings in an image", NUM_INPUTS)
def image_settings(shared: Path) -> Iterator[Try]:
    path, text = shared / "settings.png", shared / "settings.json"
    options = {"class_labels": ["marble"], "seed": 3, "scale": [1.0, 5.5], "all_stages": True, "image": None}
    checkpoint = {"path": "checkpoints/dod-desk", "sha256": "0" * 64}
    image = Image.new("RGB", (4, 4))
    save_with_settings(image, path, "sample", options, checkpoint=checkpoint, device="cpu")
    text.write_text(json.dumps(read_image_settings(path)))
    yield from fuzz(path, lambda: describe(str(path)), 4)

    def read() -> None:
        info = PngInfo()
        info.add_text(SETTINGS_KEY, text.read_bytes().decode(errors="replace"))
        image.save(path, pnginfo=info)
        describe(str(path))
        recall(DrawingOptions(like=path, output=shared / "again.png", device="cpu"))

    yield from fuzz(text, read, 4)


# --------------------------------------------------------------------------------------------------- numeric arguments


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-2, 20).map(np.float32),
    st.integers(-3, 40).map(np.int64),
    st.sampled_from([None, True, "1", "x", 2**31, 2**63, 2**64, -(2**63), 1e-320, math.nan, [], [1], 1j]),
)
NUM_EXAMPLES = 200


def vary(call: Callable[..., object], valid: dict[str, object], names: str, num_examples: int) -> Iterator[Try]:
    """Calls with numbers of every kind in place of each of the arguments `names`; `valid` are all arguments."""

    def attempt(name: str) -> None:
        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(NUMBERS)
        def check(value: object) -> None:
            try:
                call(**valid | {name: value})
            except (ValueError, TypeError) as error:
                assert f"`{name}`" in str(error), f"{name} = {value!r}: {error}"
            except (ArithmeticError, MemoryError, RuntimeError, LookupError, AttributeError) as error:
                raise AssertionError(f"{name} = {value!r}: {type(error).__name__}: {error}") from error

        check()

    for name in names.split():
        yield f"{getattr(call, '__qualname__', call)}: {name}", lambda folder, name=name: attempt(name)


def public_callables() -> Iterator[tuple[Callable[..., object], dict[str, object], str]]:
    """Callables, valid arguments, and the names of those that are numbers."""
    scheduler = DoDFlowMatchScheduler()
    tiny = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4, "in_channels": 4}
    embedder = {
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        **{k: v for k, v in tiny.items() if k != "num_layers"},
    }
    yield Guidance, {}, "prior_scale channels power rescale cosine_threshold"
    yield bounded(DoDFlowMatchScheduler), {}, "num_train_timesteps shift rtol atol diffusion_norm last_step_size"
    yield bounded(scheduler.set_timesteps), {"num_inference_steps": 2}, "num_inference_steps"
    with torch.device("meta"):  # sizes that are possible and huge cost nothing
        yield (
            on_meta(DoDTransformer2DModel),
            tiny,
            "num_attention_heads attention_head_dim patch_size in_channels mlp_ratio",
        )
        names = "num_attention_heads attention_head_dim patch_size in_channels num_latent_tokens latent_token_dim"
        yield on_meta(LatentEmbeddingModule), embedder, names
    draws = {"num_classes": 4, "seed": 0, "label_dropout_prob": 0.1, "prior_dropout_prob": 0.5}
    yield SampleDraws, draws, "num_classes label_dropout_prob prior_dropout_prob logit_mean logit_std time_shift"
    positions = {"start_step": 0, "num_steps": 3, "batch_size": 2}
    yield PositionSampler, positions, "start_step num_steps batch_size accumulation num_processes"
    yield bounded(bucket_sizes), {"resolution": 64, "multiple": 8}, "resolution multiple max_aspect_ratio"
    yield as_metric, {"value": 1.0}, "value"
    yield wilson_interval, {"share": 0.5, "num_samples": 9}, "share num_samples confidence"
    yield mean_interval, {"values": [1.0, 2.0, 4.0]}, "confidence"
    rows = {"samples": normal(8, 3).numpy(), "reference": normal(8, 3, seed=1).numpy()}
    yield kernel_distance, rows, "subset_size seed"


def bounded(call: Callable[..., object]) -> Callable[..., object]:
    """A call without integers that are possible and would only take long."""

    def call_unless_large(**arguments: object) -> object:
        is_large = any(isinstance(value, (int, np.integer)) and value > 10**6 for value in arguments.values())
        return None if is_large else call(**arguments)

    call_unless_large.__qualname__ = call.__qualname__
    return call_unless_large


def on_meta(kind: type) -> Callable[..., object]:
    def build(**config: object) -> object:
        with torch.device("meta"):
            return kind(**config)

    build.__qualname__ = kind.__name__
    return build


@row("numbers of every kind: arguments of public callables", NUM_EXAMPLES)
def numbers(shared: Path) -> Iterator[Try]:
    for call, valid, names in public_callables():
        yield from vary(call, valid, names, NUM_EXAMPLES)


@row("numbers of every kind: arguments of the pipeline", 40)
def pipeline_numbers(shared: Path) -> Iterator[Try]:
    pipeline = tiny_pipeline()
    valid = {"class_labels": [1], "seed": 0, "num_inference_steps": 1, "output_type": "latent"}
    names = "class_labels num_stages num_inference_steps guidance_scale sigmas num_images_per_label height width seed"
    names += " sample_indices num_images_per_prior generator"
    for name in names.split():

        def call(name: str = name, **arguments: object) -> object:
            value = arguments[name]
            if isinstance(value, (int, float, np.number)) and name != "seed" and 40 < abs(value) < math.inf:
                return None  # would only take long
            if name == "generator":
                del arguments["seed"]
            return pipeline(**arguments)

        call.__qualname__ = "DoDPipeline"
        yield from vary(call, valid, name, 40)


@row("numbers of every kind: options of commands", NUM_EXAMPLES)
def options(shared: Path) -> Iterator[Try]:
    """Every number of every command, as its users may type it: it is taken or refused with exit code 2."""
    kinds = {}
    for path in sorted((Path(__file__).parents[2] / "src").rglob("*.py")):
        for kind in re.findall(r"parse_options\((\w+Options), argv", path.read_text()):
            module = ".".join(path.relative_to(Path(__file__).parents[2] / "src").with_suffix("").parts)
            kinds[kind] = getattr(importlib.import_module(module), kind)
    texts = st.one_of(
        st.floats().map(repr),
        st.integers(-(2**70), 2**70).map(str),
        st.sampled_from(
            ["", " ", "1e309", "0x10", "1_000", "１", "--", "nan", "-0", "1,5", "\x00", "1e-400", "9" * 5000]
        ),
    )

    def attempt(kind: type, name: str) -> None:
        @settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
        @given(texts)
        def check(text: str) -> None:
            try:
                with redirect_stderr(io.StringIO()):
                    parse_options(kind, [f"--{name}={text}"])
            except SystemExit as ended:
                assert ended.code == 2, ended.code

        check()

    for label, kind in kinds.items():
        for name, field in list_options(kind).items():
            if field.type in (int, float) and not field.option.is_positional:
                yield f"{label}: {name}", lambda folder, kind=kind, name=name: attempt(kind, name)


# ---------------------------------------------------------------------------------------------------------------- soak


@row("soak: 300 calls of a pipeline, 300 steps of a training, memory and open files stay")
def soak(shared: Path) -> Iterator[Try]:
    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def grow(work: Callable[[], object], number: int) -> None:
        for _ in range(number // 5):
            work()
        before, files = pages(), len(os.listdir("/proc/self/fd"))
        for _ in range(number):
            work()
        assert pages() - before < 32 * 2**20, f"{(pages() - before) / 2**20:.0f} MiB more"
        assert len(os.listdir("/proc/self/fd")) <= files, "open files"

    def sample(folder: Path) -> None:
        pipeline = tiny_pipeline()
        first = pipeline([1, 2], seed=0, output_type="pt").images

        def call() -> None:
            assert torch.equal(pipeline([1, 2], seed=0, output_type="pt").images, first), "other samples"

        grow(call, 300)

    def train(folder: Path) -> None:
        from diffusers_dod.training import train as training

        steps, marks = [], {}
        step = training.Trainer.train_step

        def train_step(self) -> None:
            step(self)
            steps.append(1)
            if len(steps) in (60, 300):
                marks[len(steps)] = (pages(), len(os.listdir("/proc/self/fd")))

        training.Trainer.train_step = train_step
        job = TwoCheckpoints(shared)
        job.options = [
            *job.options,
            "--max_train_steps",
            "300",
            "--checkpointing_steps",
            "50",
            "--validation_steps",
            "150",
        ]
        job.run(folder / "run")
        assert marks[300][0] - marks[60][0] < 32 * 2**20, f"{(marks[300][0] - marks[60][0]) / 2**20:.0f} MiB more"
        assert marks[300][1] <= marks[60][1], "open files"

    if not Path("/proc/self/statm").exists():
        raise Skipped("memory is read from /proc")
    yield "pipeline", sample
    yield "training", train
