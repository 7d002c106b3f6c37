"""Hostile files, each read with limits of time and memory; weights and inputs that are not finite."""

import io
import json
import math
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from helpers import tiny_pipeline, write_images
from PIL import Image

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.data.latents import LatentDataset
from diffusers_dod.evaluation.images import open_images
from diffusers_dod.metrics.extractors import load_statistics
from diffusers_dod.options import parse_options
from diffusers_dod.results import read_results
from diffusers_dod.training.checkpoints import find_latest_checkpoint
from diffusers_dod.training_options import TrainingOptions

from .jobs import Encoding
from .rows import Try, in_child, row


LIMIT_S = 60
MAX_BYTES = 1 << 30
REFUSALS = (ValueError, TypeError, OSError)
DEEP = "[" * 100_000 + "]" * 100_000
TAKEN: set[tuple[str, object]] = set()


def refuse(name: str, make: Callable[[Path], object], read: Callable[[Path], object]) -> Try:
    """A file that must be refused by a plain error, within the limits."""

    def attempt(folder: Path) -> None:
        make(folder)

        def work() -> None:
            try:
                read(folder)
            except REFUSALS as error:
                assert str(error).strip(), "an error without words"
            except SystemExit as ended:
                assert ended.code == 2
            else:
                raise AssertionError("it was taken")

        in_child(work, LIMIT_S, MAX_BYTES).check()

    return name, attempt


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


@row("hostile file: config.json of a model, scheduler or pipeline")
def configs(shared: Path) -> Iterator[Try]:
    pipeline = shared / "pipeline"
    in_child(lambda: tiny_pipeline().save_pretrained(pipeline)).check()
    kinds = {
        "transformer/config.json": (DoDTransformer2DModel, "num_layers num_attention_heads num_classes patch_size"),
        "latent_embedder/config.json": (LatentEmbeddingModule, "num_latent_tokens num_encoder_layers sample_size"),
        "scheduler/scheduler_config.json": (DoDFlowMatchScheduler, "shift"),
        "model_index.json": (DoDPipeline, "default_num_stages default_num_inference_steps"),
    }
    for file, (kind, names) in kinds.items():

        def put(folder: Path, text: str, file: str = file) -> None:
            shutil.copytree(pipeline, folder / "p")
            (folder / "p" / file).write_text(text)

        def read(folder: Path, kind: type = kind, file: str = file) -> object:
            place = folder / "p" if kind is DoDPipeline else (folder / "p" / file).parent
            return kind.from_pretrained(place)

        config = json.loads((pipeline / file).read_text())
        texts = {"deep": DEEP, "a list": "[]", "null": "null", "empty": "", "no text": "\0\xff"}
        for name in names.split():
            for value in (10**9, -1, 0, None, "x", [1], {}, 1e308, True):
                if not (name.startswith("default") and value is None):  # the default of a default
                    texts[f"{name} = {value}"] = json.dumps(config | {name: value})
        for label, text in texts.items():
            yield refuse(f"{file}: {label}", lambda folder, text=text, put=put: put(folder, text), read)


def npz_of(name: str, descr: str, shape: tuple[int, ...], content: bytes) -> bytes:
    """A file of one array, with a header that may claim anything."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + content)
    return file.getvalue()


def safetensors_of(header: dict | bytes, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


@row("hostile file: arrays, latents, results, checkpoints, recipes")
def arrays(shared: Path) -> Iterator[Try]:
    bombs = {
        "800 TB": npz_of("mu", "<f8", (10**14,), b"\0" * 8),
        "12 GiB": npz_of("mu", "<f8", (1_610_612_736,), b"\0" * 8),
        "unpacks 3 GiB": npz_of("mu", "<f8", (3 << 27,), bytes(3 << 30)),
        "objects": npz_of("mu", "|O", (1,), b"\x80\x04N."),
    }
    for name, content in bombs.items():
        yield refuse(f"statistics: {name}", write("s.npz", content), lambda f: load_statistics(f / "s.npz"))
    images = npz_of("arr_0", "|u1", (10**9, 512, 512, 3), b"\0" * 8)
    yield refuse("images: 786 TB", write("i.npz", images), lambda f: list(open_images(f"{f / 'i.npz'}").batches(2)))

    job = Encoding(shared)
    job.make_expected()
    whole, manifest = shared / "whole", json.loads((shared / "whole" / "manifest.json").read_text())

    def put(folder: Path, name: str, content: bytes) -> None:
        shutil.copytree(whole, folder / "latents")
        (folder / "latents" / name).write_bytes(content)

    def read(folder: Path) -> None:
        latents = LatentDataset(folder / "latents")
        for index in range(len(latents)):
            latents.read(index)

    shard = manifest["shards"][0]
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    manifests = {
        "deep": DEEP,
        "outside": json.dumps(manifest | {"shards": [shard | {"file": "../latents/shard-00000.safetensors"}]}),
        "absolute": json.dumps(manifest | {"shards": [shard | {"file": f"{whole / shard['file']}"}]}),
        "10^9 samples": json.dumps(manifest | {"shards": [shard | {"num_samples": 10**9}]}),
        "shards of text": json.dumps(manifest | {"shards": "abc"}),
        "no shards": json.dumps({key: value for key, value in manifest.items() if key != "shards"}),
        "number of 10^309": json.dumps(manifest).replace('"format": 1', '"format": 1e309'),
        "a list": "[]",
    }
    shards = {
        "header of 99 MB": safetensors_of(b" " * 99_000_000),
        "header of 2^60": safetensors_of(b"{}", length=1 << 60),
        "300,000 tensors": safetensors_of({f"t{i}": entry for i in range(300_000)}, b"\0" * 4),
        "a tensor of 2^50": safetensors_of({"mean": entry | {"shape": [1 << 50], "data_offsets": [0, 1 << 52]}}),
    }
    for name, text in manifests.items():
        content = text.encode()
        yield refuse(f"latents: {name}", lambda f, c=content: put(f, "manifest.json", c), read)
    for name, content in shards.items():
        yield refuse(f"shard: {name}", lambda f, c=content: put(f, shard["file"], c), read)

    for name, text in (("deep", DEEP), ("10^309", '{"format": 1e309, "task": "a", "argv": [], "metrics": {}}')):
        yield refuse(f"results: {name}", write("r.json", text), lambda f: read_results(f / "r.json"))
    for name, argv in (("text", '"a"'), ("numbers", "[1, 2]")):
        text = f'{{"format": 1, "task": "a", "argv": {argv}, "metrics": {{}}}}'
        yield refuse(f"results: argv as {name}", write("r.json", text), lambda f: read_results(f / "r.json"))

    def no_checkpoint(folder: Path) -> None:
        if find_latest_checkpoint(folder) is None:
            raise ValueError("none")

    for name, text in (("deep", DEEP), ("outside", '{"step": 2, "sha256": {"../a": "b"}}'), ("none", "{}")):
        make = write("checkpoint-2/manifest.json", text)
        yield refuse(f"checkpoint: {name}", make, no_checkpoint)

    aliases = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for last, name in zip("abcdefghi", "bcdefghij", strict=True):
        aliases += f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
    recipes = {
        "aliases": aliases,
        "deep": DEEP,
        "no mapping": "[1]",
        "10^9 workers": "dataloader_num_workers: 1000000000",
    }
    recipes |= {"code": "!!python/object/apply:os.system ['true']", "unknown": "no_such_option: 1"}
    for name, text in recipes.items():
        yield refuse(f"recipe: {name}", write("r.yaml", text), read_recipe)


def read_recipe(folder: Path) -> object:
    argv = ["--config", f"{folder / 'r.yaml'}", "--train_data_dir", str(folder), "--output_dir", str(folder / "run")]
    return parse_options(TrainingOptions, [*argv, "--preset", "DoD-Desk", "--resolution", "8"])


@row("hostile file: images")
def images(shared: Path) -> Iterator[Try]:
    """Each among sound ones, with the rule that bad images are an error."""
    job = Encoding(shared)

    def bomb(path: Path) -> None:
        Image.new("1", (30_000, 30_000)).save(path)

    def narrow(path: Path, size: tuple[int, int]) -> None:
        Image.new("RGB", size).save(path)

    def cut(path: Path) -> None:
        Image.effect_noise((64, 64), 9).save(path)
        path.write_bytes(path.read_bytes()[:900])

    made = {
        "bomb of 900 million pixels": bomb,
        "1 x 20,000": lambda path: narrow(path, (1, 20_000)),
        "100,000 x 1": lambda path: narrow(path, (100_000, 1)),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("no image" * 99),
        "cut": cut,
    }
    for name, write_image in made.items():

        def make(folder: Path, write_image: Callable[[Path], None] = write_image) -> None:
            (folder / "images").mkdir()
            write_images(folder / "images", [(9, 11)] * 2)
            write_image(folder / "images" / "ant" / "bad.png")

        def read(folder: Path) -> None:
            job.shared = folder
            job.run(folder / "latents")

        yield refuse(name, make, read)


# --------------------------------------------------------------------------------------------------------- not finite


@row("weights, latents and scales that are not finite or absurd: samples are an error, or finite")
def nonfinite(shared: Path) -> Iterator[Try]:
    def attempt(break_it: Callable[[DoDPipeline, dict], None], output_type: str) -> None:
        pipeline = tiny_pipeline()
        call = {"output_type": output_type, "seed": 0, "class_labels": [1, 2], "num_inference_steps": 2}
        break_it(pipeline, call)
        try:
            images = pipeline(**call).images
        except (FloatingPointError, ValueError) as error:
            assert str(error)
            return
        values = np.stack([np.asarray(image, dtype=np.float64) for image in images])
        assert np.isfinite(values).all(), "not finite, without an error"
        assert all(np.ptp(value) > 0 for value in values), "images of one color, without an error"

    def fill(part: str, value: float) -> Callable[[DoDPipeline, dict], None]:
        def break_it(pipeline: DoDPipeline, call: dict) -> None:
            with torch.no_grad():
                for parameter in list(getattr(pipeline, part).parameters())[-2:]:
                    parameter.fill_(value)

        return break_it

    faults = {
        f"{value} in {part}": fill(part, value)
        for part in ("transformer", "latent_embedder", "vae")
        for value in (math.nan, math.inf, -math.inf, 1e38)
    }
    faults["guidance 1e30"] = lambda pipeline, call: call.update(guidance_scale=1e30)
    faults["latents of 1e37"] = lambda pipeline, call: call.update(latents=torch.full((2, 4, 8, 8), 1e37))
    faults["latents of NaN"] = lambda pipeline, call: call.update(latents=torch.full((2, 4, 8, 8), math.nan))
    faults["float16"] = lambda pipeline, call: (fill("transformer", 6e4)(pipeline, call), pipeline.to(torch.float16))
    faults["callback"] = lambda pipeline, call: call.update(
        callback_on_step_end=lambda pipe, step, t, values: {"latents": values["latents"] * math.nan}
    )
    for name, break_it in faults.items():
        for output_type in ("pil", "np", "pt", "latent"):
            yield f"{name}, {output_type}", lambda folder, b=break_it, o=output_type: attempt(b, o)
