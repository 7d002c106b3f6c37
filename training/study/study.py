"""
Trains and evaluates the runs in `study.yaml`; their results make the tables of docs/study.md.

    python training/study/study.py train [RUN ...]
    python training/study/study.py evaluate [RUN ...]
    python training/study/report.py

Both commands continue where they were stopped. Any number of processes can work side by side: each takes the next run,
or the next checkpoint, that no other process has. Checkpoints go to `outputs/study`, results to `docs/results/study`.
"""

import argparse
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from colorsys import rgb_to_hsv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffusers_dod.data.latents import SHARD_MANIFEST, ShardManifest
from diffusers_dod.data.textures import TEXTURE_CLASSES, render_texture
from diffusers_dod.files import METRICS_FILE, file_sha256, replacing, write_json
from diffusers_dod.records import read_record
from diffusers_dod.results import checkpoint_sha256, read_results


ROOT = Path(__file__).parents[2]
OUTPUTS = Path("outputs/study")
RESULTS = Path("docs/results/study")
LATENTS = OUTPUTS / "latents"
# Kinds of textures, four classes each: what 3 labels say in place of 12.
KINDS = {
    "lattice": ("stripes", "checks", "bricks", "plaid"),
    "round": ("dots", "rings", "sphere", "spiral"),
    "irregular": ("voronoi", "marble", "wood", "polygon"),
}
NUM_HUES = 6
INDEX = "model_index.json"  # what a complete pipeline has
PRIOR_FOLDER = "token-prior"  # folder of a run's pipeline with its token prior
# Options of a sweep that make other samples.
WAYS = ("null_condition", "weaker_step", "prior_noise", "use_token_prior")
DATA_SEED = 0  # of the images, the default of training/encode_latents.py


def load_study() -> dict[str, Any]:
    """
    Reads `study.yaml`.

    A run with `seeds` becomes a run for each of them, and an evaluation with `other_judges` is followed by one for
    each of them. The plan names all of them at once.
    """
    study = yaml.safe_load((Path(__file__).parent / "study.yaml").read_text())
    runs: dict[str, dict[str, Any]] = {}
    for name, options in study["runs"].items():
        seeds = options.pop("seeds", None)
        runs[name] = {name: options} if seeds is None else {f"{name}-seed{k}": {**options, "seed": k} for k in seeds}
    evaluations: dict[str, dict[str, Any]] = {}
    for name, options in study["evaluations"].items():
        judges = options.pop("other_judges", {})
        evaluations[name] = {name: {**options, "judge": ["texture"]} if judges else options}
        for judge, changes in judges.items():
            evaluations[name][f"{name}-{judge}"] = {**options, **changes, "judge": [judge]}
    for part in study["plan"]:
        part["runs"] = [run for name in part["runs"] for run in runs[name]]
        part["evaluations"] = [evaluation for name in part["evaluations"] for evaluation in evaluations[name]]
    study["runs"] = {run: options for found in runs.values() for run, options in found.items()}
    study["evaluations"] = {name: options for found in evaluations.values() for name, options in found.items()}
    return study


def to_argv(options: dict[str, Any]) -> list[str]:
    """Turns options of a command into arguments: a list has several values, `True` is a flag."""
    argv = []
    for name, value in options.items():
        argv.append(f"--{name}")
        if value is not True:
            argv += map(str, value if isinstance(value, list) else [value])
    return argv


def training_argv(study: dict[str, Any], run: str) -> list[str]:
    """Arguments of training/train_dod.py for a run."""
    options = {**study["common"], **study["runs"][run]}
    options.pop("token_prior", None)
    places = {"latents_dir": latents_of(options.pop("labels", None)), "output_dir": OUTPUTS / run}
    return to_argv({**options, **places, "pretrained_vae_name_or_path": study["vae"]})


def token_prior_argv(study: dict[str, Any], run: str) -> list[str]:
    """Arguments of the command that trains the token prior of a run."""
    options = study["runs"][run]
    return to_argv(
        {
            **options["token_prior"],
            "seed": options["seed"],
            "latents_dir": latents_of(options.get("labels")),
            "pretrained_model_name_or_path": last_checkpoint(study, run),
            "output_dir": OUTPUTS / run / PRIOR_FOLDER,
        }
    )


def last_checkpoint(study: dict[str, Any], run: str) -> Path:
    """Folder of the checkpoint of `run` that has all of its steps."""
    steps = {**study["common"], **study["runs"][run]}["max_train_steps"]
    return OUTPUTS / run / f"checkpoint-{steps}"


def latents_of(labels: str | None) -> Path:
    """Folder of the latents with other `labels`, a key of [`LABELS`]; `None` for the 12 classes."""
    return LATENTS if labels is None else LATENTS.with_name(f"latents-{labels}")


def label_kinds(num_images: int, seed: int = DATA_SEED) -> tuple[list[str], np.ndarray]:
    """Names of 3 kinds of textures, and the one of each image of a `seed`."""
    kind_of = {name: kind for kind, names in enumerate(KINDS.values()) for name in names}
    kinds = np.array([kind_of[name] for name in TEXTURE_CLASSES])
    return list(KINDS), kinds[np.arange(num_images) % len(TEXTURE_CLASSES)]


def find_hues(num_images: int, seed: int) -> np.ndarray:
    """The hue in 0..1 of the second colour of each image of a `seed`."""
    hues = np.empty(num_images)
    for index in range(num_images):  # a small image has the colours of a large one
        _, attributes = render_texture(index % len(TEXTURE_CLASSES), (seed, index), size=8)
        hues[index] = rgb_to_hsv(*attributes[3:6])[0]
    return hues


def label_hues(num_images: int, seed: int = DATA_SEED) -> tuple[list[str], np.ndarray]:
    """
    Names of 72 classes, and the one of each image of a `seed`: its texture, and the sixth of the hues of its second
    colour.

    The sixths are those of the training images of one texture, of which all classes have equally many.
    """
    hues, number = find_hues(num_images, seed), len(TEXTURE_CLASSES)
    trained = hues if seed == DATA_SEED else find_hues(load_study()["data"]["num_train_samples"], DATA_SEED)
    sixths = np.empty(num_images, dtype=np.int64)
    for label in range(number):
        ordered = np.sort(trained[label::number])
        edges = ordered[np.arange(1, NUM_HUES) * len(ordered) // NUM_HUES]
        sixths[label::number] = np.searchsorted(edges, hues[label::number], side="right")
    names = [f"{name} {sixth + 1}" for name in TEXTURE_CLASSES for sixth in range(NUM_HUES)]
    return names, np.arange(num_images) % number * NUM_HUES + sixths


LABELS = {"kinds": label_kinds, "hues": label_hues}


def relabel(labels: str) -> None:
    """Writes the latents with other `labels`, a key of [`LABELS`], if they are not there yet."""
    target = latents_of(labels)
    if target.is_dir():
        return
    manifest = read_record(LATENTS / SHARD_MANIFEST, ShardManifest)
    names, all_labels = LABELS[labels](manifest["num_samples"])
    start = 0
    with replacing(target) as folder:
        folder.mkdir(exist_ok=True)
        for shard in manifest["shards"]:
            end = start + shard["num_samples"]
            tensors = load_file(LATENTS / shard["file"])
            save_file({**tensors, "labels": torch.from_numpy(all_labels[start:end])}, folder / shard["file"])
            shard["sha256"] = file_sha256(folder / shard["file"])
            start = end
        write_json(folder / SHARD_MANIFEST, {**manifest, "class_names": names})


def result_file(run: str, step: int, evaluation: str) -> Path:
    """Path for the result of an evaluation of the checkpoint of `run` after `step` steps."""
    return RESULTS / f"{run}-{step}" / f"{evaluation}.json"


def pipeline_of(study: dict[str, Any], run: str, step: int, evaluation: str) -> Path:
    """Folder of the pipeline that an evaluation of `run` after `step` steps samples."""
    has_token_prior = study["evaluations"][evaluation].get("use_token_prior", False)
    return OUTPUTS / run / (PRIOR_FOLDER if has_token_prior else f"checkpoint-{step}")


def evaluation_argv(study: dict[str, Any], run: str, step: int, evaluation: str) -> list[str]:
    """Module or script and arguments of an evaluation of the checkpoint of `run` after `step` steps."""
    options = dict(study["evaluations"][evaluation])
    module, judge = options.pop("module"), options.pop("judge", [])
    ways = [name if options[name] is True else str(options[name]) for name in WAYS if name in options]
    if "weaker_step" in options:
        options["guidance_model"] = OUTPUTS / run / f"checkpoint-{options.pop('weaker_step')}"
    if module != "linear_probe":  # noise of its own for each training, so that their spread contains its chance
        options["seeds" if module == "sweep" else "seed"] = study["runs"][run]["seed"]
    is_script = module.endswith(".py")
    name = "pipeline" if is_script else "pretrained_model_name_or_path"
    argv = [f"--{name}", str(pipeline_of(study, run, step, evaluation)), *to_argv(options)]
    if module == "sweep":  # a folder is of one judge and one way to guide
        parts = [str(step), *ways, *judge]
        argv += ["--output_dir", str(OUTPUTS / run / "-".join(["sweep", *parts]))]
        if judge:
            argv += ["--samples_dir", str(OUTPUTS / run / "-".join(["samples", str(step), *ways]))]
    command = module if is_script else f"diffusers_dod.evaluation.{module}"
    return [command, *argv, "--output_file", str(result_file(run, step, evaluation))]


def has_result(study: dict[str, Any], run: str, step: int, evaluation: str) -> bool:
    """Whether there is a result with exactly these options and weights."""
    file = result_file(run, step, evaluation)
    if not file.is_file():
        return False
    results = read_results(file)
    checkpoint = checkpoint_sha256(pipeline_of(study, run, step, evaluation))
    return (
        results["argv"] == evaluation_argv(study, run, step, evaluation)[1:]
        and results["checkpoint"]["sha256"] == checkpoint
    )


def evaluations_of(study: dict[str, Any], run: str) -> dict[int, list[str]]:
    """The evaluations of each checkpoint of `run`, by its number of steps."""
    evaluations: dict[int, list[str]] = {}
    for part in study["plan"]:
        for step in part["steps"] if run in part["runs"] else []:
            evaluations.setdefault(step, []).extend(part["evaluations"])
    return evaluations


def work_off(names: list[str], is_done: Callable[[str], bool], work: Callable[[str], None]) -> None:
    """Does the tasks that are not done, in order; processes that run at the same time share them."""
    locks = OUTPUTS / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    for name in names:
        with open(locks / name, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process is at it
            if not is_done(name):
                print(name, flush=True)
                work(name)


def is_trained(study: dict[str, Any], run: str) -> bool:
    """Whether `run` has all of its steps, and its token prior if it is to have one."""
    has_token_prior = (OUTPUTS / run / PRIOR_FOLDER / INDEX).is_file()
    return last_checkpoint(study, run).is_dir() and (has_token_prior or "token_prior" not in study["runs"][run])


def train(runs: list[str]) -> None:
    """Trains `runs`, one after the other."""
    study = load_study()

    def train_run(run: str) -> None:
        argv = training_argv(study, run)
        if list((OUTPUTS / run).glob("checkpoint-*")):
            argv += ["--resume_from_checkpoint", "latest"]
        if not last_checkpoint(study, run).is_dir():
            subprocess.run([sys.executable, "training/train_dod.py", *argv], check=True)
        if "token_prior" in study["runs"][run]:
            command = [sys.executable, "-m", "diffusers_dod.training.token_prior"]
            subprocess.run([*command, *token_prior_argv(study, run)], check=True)
        (RESULTS / run).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(OUTPUTS / run / METRICS_FILE, RESULTS / run / METRICS_FILE)

    data = {**study["data"], "pretrained_vae_name_or_path": study["vae"], "latents_dir": LATENTS}
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    with open(OUTPUTS / "latents.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the latents, and find them complete
        subprocess.run([sys.executable, "training/encode_latents.py", *to_argv(data)], check=True)
        for labels in sorted({study["runs"][run]["labels"] for run in runs if "labels" in study["runs"][run]}):
            relabel(labels)
    work_off(runs, partial(is_trained, study), train_run)


def evaluate(runs: list[str]) -> None:
    """Evaluates the existing checkpoints of `runs`."""
    study = load_study()
    jobs = {f"{run}-{step}": (run, step, names) for run in runs for step, names in evaluations_of(study, run).items()}

    def find_missing(checkpoint: str) -> list[list[str]]:
        run, step, names = jobs[checkpoint]
        names = [name for name in names if (pipeline_of(study, run, step, name) / INDEX).is_file()]
        return [evaluation_argv(study, run, step, name) for name in names if not has_result(study, run, step, name)]

    def is_done(checkpoint: str) -> bool:
        return not find_missing(checkpoint)

    def evaluate_checkpoint(checkpoint: str) -> None:
        for command, *argv in find_missing(checkpoint):
            subprocess.run([sys.executable, *["-m"] * (not command.endswith(".py")), command, *argv], check=True)

    work_off(list(jobs), is_done, evaluate_checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "evaluate"])
    parser.add_argument("runs", nargs="*", help="Some of the runs; all by default.")
    args = parser.parse_args()
    runs = list(load_study()["runs"])
    unknown = set(args.runs) - set(runs)
    if unknown:
        parser.error(f"`runs` must be among {runs}, got {sorted(unknown)}.")
    {"train": train, "evaluate": evaluate}[args.command](args.runs or runs)


if __name__ == "__main__":
    main()
