"""A pipeline that brings its own code, for people who have Diffusers but not this package."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from helpers import says, tiny_pipeline, tiny_token_prior
from hub_server import Hub
from launch import PATIENCE_S

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline
from diffusers_dod.remote_code import export_remote_code, main


PACKAGE = "diffusers_dod"
# Module of the package -> where its code goes, and the class that is loaded from there.
FILES = {
    "pipeline_dod": ("pipeline.py", "DoDPipeline"),
    "transformer_dod": ("transformer/transformer_dod.py", "DoDTransformer2DModel"),
    "latent_embedding": ("latent_embedder/latent_embedding.py", "LatentEmbeddingModule"),
    "token_prior": ("token_prior/token_prior.py", "TokenPrior"),
    "scheduling_dod": ("scheduler/scheduling_dod.py", "DoDFlowMatchScheduler"),
}
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(token_prior=tiny_token_prior()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    return export_remote_code(saved, tmp_path_factory.mktemp("remote") / "exported")


# -------------------------------------------------------------------------------------------------- what is written


def definitions(tree: ast.Module) -> list[tuple[str, str]]:
    """The names that are defined at the top level of a module, each with its definition."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.append((node.name, ast.dump(node)))
        elif isinstance(node, ast.Assign):
            found += [(target.id, ast.dump(node)) for target in node.targets if isinstance(target, ast.Name)]
    return found


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def test_the_files_are_those_of_the_pipeline_and_one_per_class(saved, exported):
    def files(folder):
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    before, after = files(saved), files(exported)
    assert set(after) - set(before) == {file for file, _ in FILES.values()} and set(before) <= set(after)
    assert {name for name in before if after[name] != before[name]} == {"model_index.json"}
    index = json.loads(before["model_index.json"])
    index["_class_name"] = ["pipeline", "DoDPipeline"]
    for module, component in (
        ("transformer_dod", "transformer"),
        ("latent_embedding", "latent_embedder"),
        ("token_prior", "token_prior"),
        ("scheduling_dod", "scheduler"),
    ):
        index[component] = [module, FILES[module][1]]
    assert json.loads(after["model_index.json"]) == index


@pytest.mark.parametrize("module", FILES)
def test_every_file_stands_alone(exported, module):
    path, name = FILES[module]
    tree = parse(exported / path)
    compile(tree, path, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == PACKAGE for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.partition(".")[0] != PACKAGE
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    names = [name for name, _ in definitions(tree)]
    assert name in names
    assert len(set(names + imported)) == len(names + imported)  # each once
    assert ast.get_docstring(tree, clean=False) == importlib.import_module(f"{PACKAGE}.{module}").__doc__


@pytest.mark.parametrize("module", FILES)
def test_every_definition_is_that_of_the_package(exported, module):
    package = Path(importlib.import_module(PACKAGE).__file__).parent
    originals = {entry for file in package.glob("*.py") for entry in definitions(parse(file))}
    path, name = FILES[module]
    written = dict(definitions(parse(exported / path)))
    stand_ins = {name for name, _ in written.items() if (name, written[name]) not in originals}
    # Four classes are named by the pipeline in annotations only.
    named = {"DoDTransformer2DModel", "VisualPriorMixin", "TokenPrior", "DoDFlowMatchScheduler"}
    assert stand_ins == (named if module == "pipeline_dod" else set())
    own = dict(definitions(parse(package / f"{module}.py")))
    assert {name: written.get(name) for name in own} == own  # nothing of the module itself is left out


def test_no_name_is_undefined_or_unused(exported):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", str(exported)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_what_is_missing_gets_no_code(tmp_path):
    pipe = tiny_pipeline(vae=None, in_channels=3, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "saved")
    folder = export_remote_code(str(tmp_path / "saved"), str(tmp_path / "exported"))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.py")} == {
        path for path, name in FILES.values() if name not in ("DoDFlowMatchScheduler", "TokenPrior")
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"] and index["vae"] == [None, None]


def test_what_is_no_part_of_a_pipeline_stays_behind(saved, tmp_path):
    source = shutil.copytree(saved, tmp_path / "saved")
    for name in ("training_state", ".cache", "latents", "checkpoint-3/transformer"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text("not for others")
    (source / "metrics.jsonl").write_text("not for others")
    (source / "README.md").write_text("a model card")
    folder = export_remote_code(source, tmp_path / "exported")
    names = {file.name for file in folder.iterdir()}
    components = {file.name for file in saved.iterdir() if file.is_dir()}
    assert names == {"README.md", "model_index.json", "pipeline.py", *components}


def test_an_output_within_the_source_is_refused(saved, tmp_path):
    source = shutil.copytree(saved, tmp_path / "saved")
    for output_dir in (source / "exported", source / "a" / "b"):
        with pytest.raises(ValueError, match=says("`output_dir`", "must not be in", str(source))):
            export_remote_code(source, output_dir)
    assert {file.name for file in source.iterdir()} == {file.name for file in saved.iterdir()}


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_folder_that_is_not_empty_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output_dir in (tmp_path, tmp_path / "file", str(tmp_path)):
        with pytest.raises(ValueError, match=says("`output_dir`", "empty or not exist", f"got {str(output_dir)!r}")):
            export_remote_code(saved, output_dir)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export_remote_code(saved, tmp_path / "empty") == tmp_path / "empty"


def test_what_is_no_pipeline_of_ours_is_refused(saved, exported, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    for source, found in (
        (tmp_path / "ddpm", "'DDPMPipeline'"),
        (saved / "transformer", "None"),
        (exported, "['pipeline', 'DoDPipeline']"),
    ):
        fragments = ("`pretrained_model_name_or_path`", "a saved `DoDPipeline`", f"got {str(source)!r}", found)
        with pytest.raises(ValueError, match=says(*fragments)):
            export_remote_code(source, tmp_path / "exported")
        assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("source", ["absolute", "no-such/folder", "no-such-folder", "no/such/folder"])
def test_a_missing_folder_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(tmp_path / "no" / "such") if source == "absolute" else source
    with pytest.raises((OSError, ValueError), match=says("`pretrained_model_name_or_path`", source)):
        export_remote_code(source, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_command_line(saved, tmp_path, capsys):
    main([str(saved), str(tmp_path / "exported")])
    assert (
        f'DiffusionPipeline.from_pretrained("{tmp_path / "exported"}", trust_remote_code=True)'
        in capsys.readouterr().out
    )
    assert (tmp_path / "exported" / "pipeline.py").is_file()
    with pytest.raises(ValueError, match=says("`output_dir`")):
        main([str(saved), str(tmp_path / "exported")])


# ------------------------------------------------------------------------------------------------- without the package

BLOCKER = """
import importlib.abc
import sys


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers_dod", "torchdiffeq"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
"""

COMMON = """
import sys

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance

folder, expected = sys.argv[1], torch.load(sys.argv[2])


def images(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["goldfish", 3], num_stages=2, output_type="pt", generator=generator, **kwargs).images


def check(pipe):
    own = (pipe, pipe.transformer, pipe.latent_embedder, pipe.token_prior, pipe.scheduler)
    assert all(type(part).__module__.startswith("diffusers_modules.") for part in own), own
    torch.testing.assert_close(images(pipe), expected["euler"])
    torch.testing.assert_close(images(pipe, use_token_prior=True), expected["token_prior"])
    Guidance = sys.modules[type(pipe).__module__].Guidance
    for guidance in (Guidance(), ClassifierFreeGuidance(guidance_scale=pipe.config.default_guidance_scale)):
        torch.testing.assert_close(images(pipe, guidance=guidance), expected["euler"])
    assert not torch.allclose(images(pipe, guidance=Guidance(rescale=1.0)), expected["euler"])
    ours = type(pipe.scheduler)
    pipe.scheduler = ours.from_config(pipe.scheduler.config, solver="heun")
    torch.testing.assert_close(images(pipe), expected["heun"])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(images(pipe), expected["euler"], rtol=1e-4, atol=1e-4)
    pipe.scheduler = ours(solver="dopri5")
    assert images(pipe).isfinite().all()
    pipe.scheduler = ours(solver="dopri5", error_norm="batch")
    refused("pip install torchdiffeq", lambda: images(pipe))


def refused(fragment, function):
    try:
        function()
    except (ImportError, OSError, ValueError) as error:
        assert fragment in str(error), error
    else:
        raise AssertionError(f"not refused: {fragment}")


def check_local():
    refused("trust_remote_code=True", lambda: DiffusionPipeline.from_pretrained(folder))
    check(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
"""

FROM_THE_HUB = """
from diffusers import FirstBlockCacheConfig
from huggingface_hub import HfApi

api = HfApi()
api.create_repo("user/remote")
api.upload_folder(repo_id="user/remote", folder_path=folder)
refused("trust_remote_code=True", lambda: DiffusionPipeline.from_pretrained("user/remote"))
assert not [name for name in sys.modules if name.startswith("diffusers_modules.local")]
pipe = DiffusionPipeline.from_pretrained("user/remote", trust_remote_code=True)
check(pipe)
pipe.scheduler = FlowMatchEulerDiscreteScheduler()
pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
torch.testing.assert_close(images(pipe), expected["euler"], rtol=1e-4, atol=1e-4)
check_local()
assert not [name for name in sys.modules if name.startswith(("diffusers_dod", "torchdiffeq"))]
print("done")
"""

IN_A_FRESH_ENVIRONMENT = """
import importlib.util

for name in ("diffusers_dod", "torchdiffeq"):
    assert importlib.util.find_spec(name) is None
check_local()
print("done")
"""


@pytest.fixture(scope="module")
def expected(saved, tmp_path_factory) -> Path:
    """A file with what the package's own classes make of the calls in the scripts."""
    images = {}
    for name, solver in {"euler": "euler", "heun": "heun", "token_prior": "euler"}.items():
        pipe = DoDPipeline.from_pretrained(saved, scheduler=DoDFlowMatchScheduler(solver=solver))
        pipe.set_progress_bar_config(disable=True)
        settings = {"generator": torch.Generator().manual_seed(0), "use_token_prior": name == "token_prior"}
        images[name] = pipe(["goldfish", 3], num_stages=2, output_type="pt", **settings).images
    assert not torch.allclose(images["euler"], images["heun"], atol=1e-2)
    file = tmp_path_factory.mktemp("expected") / "images.pt"
    torch.save(images, file)
    return file


def run(python: Path | str, script: str, exported: Path, expected: Path, folder: Path, **environment: str) -> None:
    """Runs a script that says "done" in the end, with everything that it downloads and caches in `folder`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    environment = {
        **kept,
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    process = subprocess.run(
        [str(python), "-c", script, str(exported), str(expected)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (process.stdout, process.returncode) == ("done\n", 0), process.stdout + process.stderr


# One test, so that there is one more process to start however the tests are spread over processes.
def test_diffusers_loads_it_without_the_package(exported, expected, tmp_path):
    with Hub() as hub:
        run(
            sys.executable,
            BLOCKER + COMMON + FROM_THE_HUB,
            exported,
            expected,
            tmp_path,
            HF_ENDPOINT=hub.url,
            HF_TOKEN="hf_dummy",
            HF_HUB_DISABLE_XET="1",
            NO_PROXY="127.0.0.1",
        )
    downloads = {request for request in hub.requests if request.startswith("GET /user/remote/resolve/")}
    for path, _ in FILES.values():
        assert any(download.endswith(f"/{path}") for download in downloads), path
    assert list((tmp_path / "modules").rglob("pipeline.py"))


def test_the_package_asks_for_trust_as_well(exported):
    for cls in (DoDPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            cls.from_pretrained(exported)


@pytest.mark.slow
def test_a_fresh_environment_loads_it(exported, expected, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    packages = ["torch", "diffusers", "transformers", "accelerate", "safetensors"]
    constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *constraints, *packages], check=True)
    run(python, COMMON + IN_A_FRESH_ENVIRONMENT, exported, expected, tmp_path, HF_HUB_OFFLINE="1")
    shutil.rmtree(environment)
