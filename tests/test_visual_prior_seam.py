"""
Another encoder of the visual prior, the thirty lines of `GridEncoder`, does all that the latent embedding module does.

It is trained, saved, loaded, sampled with, measured, put on a card and exported, without a change of the package.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from helpers import fresh_accelerator, noise, randomize, run_trainer, says, tiny_pipeline, tiny_transformer, tiny_vae
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export import Dim

from diffusers_dod import DoDPipeline, LatentEmbeddingModule, VisualPriorMixin
from diffusers_dod.checkpoint_manifest import STATE_FOLDER
from diffusers_dod.compute import TrainingStep, count_model, sampling_compute, training_cost
from diffusers_dod.evaluation import linear_probe, reconstruction, sample, sweep
from diffusers_dod.latent_embedding import find_visual_prior_class
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import parse_options
from diffusers_dod.presets import PRESETS, Preset
from diffusers_dod.remote_code import export_remote_code, self_contained_source
from diffusers_dod.results import read_results
from diffusers_dod.training.cost import describe_run
from diffusers_dod.training.models import build_models
from diffusers_dod.training_options import TrainingOptions


class GridEncoder(VisualPriorMixin):
    """Tokens are averages over a coarse grid. An MLP makes a prior of what bilinear interpolation gives a patch."""

    @register_to_config
    def __init__(self, patch_size: int = 2, in_channels: int = 4, side: int = 2, width: int = 32):
        super().__init__()
        self.inner_dim = width
        self.token_shape = (side**2, in_channels)
        self.mlp = nn.Sequential(nn.Linear(in_channels, width), nn.SiLU(), nn.Linear(width, width))

    def encode(self, latents, attention_kwargs=None):
        averages = F.adaptive_avg_pool2d(latents.to(self.dtype), self.config.side)
        return averages.flatten(2).transpose(1, 2)

    def decode(self, latent_tokens, height, width, attention_kwargs=None):
        side, patch_size = self.config.side, self.config.patch_size
        grid = latent_tokens.to(self.dtype).transpose(1, 2).unflatten(2, (side, side))
        patches = F.interpolate(grid, size=(height // patch_size, width // patch_size), mode="bilinear")
        return self.mlp(patches.flatten(2).transpose(1, 2))


PRESET = Preset(
    transformer_config=dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, prior_embed_dim=32, sample_size=8, num_classes=12
    ),
    latent_embedder_config=dict(side=2, width=32),
    pipeline_config=dict(default_guidance_scale=3.0, default_num_inference_steps=2, default_num_stages=2),
    latent_embedder_class=GridEncoder,
)
RUN = (
    "--preset DoD-Grid --dataset_name textures --num_train_samples 16 --resolution 16 --train_batch_size 4 "
    "--max_train_steps 4 --checkpointing_steps 2 --logging_steps 1 --learning_rate 1e-2"
).split()
GRID_ENCODER = ["test_visual_prior_seam", "GridEncoder"]


@pytest.fixture(autouse=True, scope="module")
def preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "DoD-Grid", PRESET)
        yield


def tiny_encoder(**overrides) -> GridEncoder:
    return randomize(GridEncoder(**overrides), 5)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, autoencoder) -> Path:
    output_dir = tmp_path_factory.mktemp("seam") / "run"
    return run_trainer(RUN, output_dir, "--pretrained_vae_name_or_path", autoencoder)


@pytest.fixture(scope="module")
def checkpoint(run) -> Path:
    return run / "checkpoint-4"


@pytest.fixture
def pipe() -> DoDPipeline:
    return tiny_pipeline(latent_embedder=tiny_encoder())


def draw(pipe: DoDPipeline, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 3], num_stages=2, output_type="pt", generator=generator, **kwargs).images


def options(tmp_path: Path, *arguments: str) -> TrainingOptions:
    return parse_options(TrainingOptions, [*RUN, "--output_dir", str(tmp_path / "run"), *arguments])


# ------------------------------------------------------------------------------------------------- models and pipeline


def test_the_pipeline_samples_with_it(pipe):
    images = draw(pipe)
    assert torch.equal(images, draw(pipe)) and images.isfinite().all()
    assert not torch.allclose(images, draw(tiny_pipeline()), atol=1e-2)
    wide = pipe(3, num_stages=2, height=16, width=24, output_type="latent").images
    assert wide.shape == (1, 4, 8, 12)
    pipe.set_pos_interpolation("ntk")  # of the backbone alone
    assert pipe.transformer.config.pos_interpolation == "ntk"
    assert "pos_interpolation" not in pipe.latent_embedder.config


def test_tokens_stand_for_an_image(pipe):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = pipe.get_prior_tokens(image)
    latents = pipe.encode_image(2 * image - 1)
    assert tokens.shape == (1, 4, 4) and torch.equal(tokens, pipe.latent_embedder.encode(latents))
    torch.testing.assert_close(draw(pipe, prior_tokens=tokens), draw(pipe, image=image))
    with pytest.raises(ValueError, match=says("`prior_tokens`", "(1, 4, 4)", "got (1, 3, 4)")):
        draw(pipe, prior_tokens=tokens[:, :3])


def test_a_saved_pipeline_names_it_and_is_loaded_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["latent_embedder"] == GRID_ENCODER
    for cls in (DoDPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded.latent_embedder) is GridEncoder
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(draw(loaded), draw(pipe))
        assert DoDPipeline.from_pipe(loaded).components["latent_embedder"] is loaded.latent_embedder
    half = DoDPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.latent_embedder.dtype == torch.bfloat16 and draw(half).isfinite().all()
    # As of all our models, weights must be its own.
    save_file({"other": torch.zeros(1)}, tmp_path / "latent_embedder" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=says("`GridEncoder`", "4 weights are missing", "mlp.0.bias")):
        DoDPipeline.from_pretrained(tmp_path)


def test_the_joint_loss_trains_it():
    model = DoDJointModel(tiny_transformer(), tiny_encoder().train())
    latents, sigmas, labels = noise(0), torch.tensor([0.3, 0.7]), torch.tensor([1, 2])
    loss = model(latents, noise(1), sigmas, labels, num_priors=1)
    with_priors = model.transformer(
        0.7 * latents[:1] + 0.3 * noise(1)[:1],
        torch.tensor([300.0]),
        labels[:1],
        prior_embeds=model.latent_embedder(latents[:1]).prior_embeds,
    ).sample
    torch.testing.assert_close(loss[0], F.mse_loss(with_priors, noise(1)[:1] - latents[:1]))
    loss.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.latent_embedder.parameters())
    model.zero_grad()
    model(latents, noise(1), sigmas, labels).mean().backward()  # no priors: zeros, not None
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.latent_embedder.parameters())


def test_torch_exports_it():
    encoder, latents = tiny_encoder(), noise(0, height=8, width=12)
    sizes = {"latents": {0: Dim("batch", min=2), 2: 2 * Dim("rows", min=2), 3: 2 * Dim("columns", min=2)}}
    exported = torch.export.export(encoder, (), {"latents": latents}, dynamic_shapes=sizes).module()
    for shape in ((2, 8, 12), (3, 16, 8)):
        latents = noise(1, shape[0], height=shape[1], width=shape[2])
        torch.testing.assert_close(exported(latents=latents).prior_embeds, encoder(latents).prior_embeds)


def test_it_takes_lora_adapters(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    plain = draw(pipe)
    encoder = pipe.latent_embedder
    encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["mlp.0", "mlp.2"], init_lora_weights=False))
    adapted = draw(pipe)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    torch.testing.assert_close(draw(pipe, attention_kwargs={"scale": 0.0}), plain)
    adapter = peft.get_peft_model_state_dict(encoder, adapter_name="default")
    pipe.save_lora_weights(tmp_path, latent_embedder_lora_layers=adapter)
    loaded = tiny_pipeline(latent_embedder=tiny_encoder())
    loaded.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(loaded), adapted)
    loaded.unload_lora_weights()
    assert torch.equal(draw(loaded), plain)


def test_offloading_hooks_run_around_its_methods():
    calls = []
    encoder = tiny_encoder()
    encoder._hf_hook = type("Hook", (), {"pre_forward": lambda self, module: calls.append(module)})()
    tokens = encoder.encode(noise(0))
    encoder.decode(tokens, 8, 8)
    assert calls == [encoder] * 2


# ------------------------------------------------------------------------------------------------------------ training


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / STATE_FOLDER / "model.safetensors")


def test_the_trainer_trains_it(run, checkpoint):
    encoder = DoDPipeline.from_pretrained(checkpoint).latent_embedder
    assert type(encoder) is GridEncoder and (encoder.config.in_channels, encoder.config.patch_size) == (4, 2)
    before, after = weights(run, 2), weights(run, 4)
    names = [name for name in before if name.startswith("latent_embedder.")]
    assert len(names) == 4 and not any(torch.equal(before[name], after[name]) for name in names)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_resumed_run_is_the_same_run(run, autoencoder, tmp_path):
    vae = ["--pretrained_vae_name_or_path", str(autoencoder)]
    run_trainer(RUN, tmp_path / "run", *vae, "--max_train_steps", "2")
    run_trainer(RUN, tmp_path / "run", *vae, "--resume_from_checkpoint", "latest")
    for name in (f"{STATE_FOLDER}/model", "latent_embedder/diffusion_pytorch_model"):
        files = (folder / "checkpoint-4" / f"{name}.safetensors" for folder in (run, tmp_path / "run"))
        expected, actual = map(load_file, files)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_options_of_the_trainer_that_concern_it(tmp_path, checkpoint):
    arguments = ["--gradient_checkpointing", "--trainable_parameters", "difffit", "--patch_size", "4"]
    model = build_models(options(tmp_path, *arguments).model, (4, 8, 8), 12)
    assert type(model.latent_embedder) is GridEncoder and model.latent_embedder.config.patch_size == 4
    trained = {name for name, parameter in model.latent_embedder.named_parameters() if parameter.requires_grad}
    assert trained == {"mlp.0.bias", "mlp.2.bias"}
    saved = ["--pretrained_model_name_or_path", str(checkpoint)]
    assert type(build_models(options(tmp_path, *saved).model, (4, 8, 8), 12).latent_embedder) is GridEncoder
    with pytest.raises(ValueError, match=says("`num_latent_tokens`", "GridEncoder", "no such argument", "got 6")):
        build_models(options(tmp_path, "--num_latent_tokens", "6").model, (4, 8, 8), 12)


def test_a_plain_backbone_gets_it(tmp_path):
    tiny_pipeline(latent_embedder=None, vae=None).save_pretrained(tmp_path / "plain")
    arguments = options(tmp_path, "--pretrained_model_name_or_path", str(tmp_path / "plain"))
    model = build_models(arguments.model, (4, 8, 8), 10)
    assert type(model.latent_embedder) is GridEncoder and model.transformer.config.prior_embed_dim == 32


def test_what_training_costs(tmp_path, checkpoint, autoencoder):
    cost = training_cost(PRESET, (4, 8, 8), 12, TrainingStep(batch_size=4))
    encoder = GridEncoder()
    assert cost.latent_embedder_parameters == encoder.num_parameters() == 4 * 32 + 32 + 32 * 32 + 32
    plain = Preset({**PRESET.transformer_config, "prior_embed_dim": None}, None)
    assert cost.forward_flops > training_cost(plain, (4, 8, 8), 12, TrainingStep(batch_size=4)).forward_flops
    checkpointed = training_cost(PRESET, (4, 8, 8), 12, TrainingStep(batch_size=4, gradient_checkpointing=True))
    assert checkpointed.activation_bytes < cost.activation_bytes
    vae = ["--pretrained_vae_name_or_path", str(autoencoder)]
    for arguments in (vae, [*vae, "--pretrained_model_name_or_path", str(checkpoint)]):
        assert f"{encoder.num_parameters():,}" in describe_run(options(tmp_path, *arguments))


def test_what_sampling_costs(checkpoint):
    counted = count_model(PRESET)
    assert counted.latent_embedder_parameters == GridEncoder().num_parameters()
    # Of two Linears on 16 patches, each multiply-add two operations.
    assert counted.flops.latent_embedder == 2 * 16 * (4 * 32 + 32 * 32)
    pipeline = DoDPipeline.from_pretrained(checkpoint)
    assert count_model(pipeline) == counted == count_model(Preset.from_pretrained(checkpoint))
    assert [stage["num_evaluations"] for stage in sampling_compute(pipeline)["stages"]] == [2, 2]


def test_the_card_names_it(run, checkpoint):
    card = (run / "README.md").read_text()
    assert "a `GridEncoder` compresses" in card and "Backbone and `GridEncoder` are trained together" in card
    assert "LEM" not in card.partition("## Recipe")[0].replace("takes the place of the LEM", "")
    rows = dict(re.findall(r"^\| (parameters|layers|width|attention heads)\s*\|(.*)\|$", card, re.MULTILINE))
    assert [cell.strip() for cell in rows["parameters"].split("|")][1] == f"{GridEncoder().num_parameters():,}"
    assert [cell.strip() for cell in rows["width"].split("|")] == ["32", "32"]
    assert "4 tokens of 4 numbers" in card
    assert Preset.from_pretrained(checkpoint).latent_embedder_class is GridEncoder


# ---------------------------------------------------------------------------------------------------------- evaluation

EXTRACTOR = """
from torch.nn.functional import adaptive_avg_pool2d


def extractor(images):
    return adaptive_avg_pool2d(images.float(), 1).flatten(1)
"""


def command(checkpoint: Path, text: str, **paths: Path | str) -> list[str]:
    paths = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    return ["--pretrained_model_name_or_path", str(checkpoint), *text.split(), *paths]


@pytest.mark.filterwarnings("ignore:The best of")
def test_the_linear_probe_takes_its_tokens(checkpoint, tmp_path):
    text = "--dataset_name textures --resolution 16 --num_images 60 --num_test_images 24 --num_neighbors 3 "
    text += "--num_epochs 2 --num_seeds 1 --learning_rates 0.1 --batch_size 32 --device cpu"
    linear_probe.main(command(checkpoint, text, output_file=tmp_path / "probe.json"))
    results = read_results(tmp_path / "probe.json")
    assert results["settings"]["features"] == {"lem": 16, "random_lem": 16, "latents": 16}
    assert results["metrics"]["top1_lem"]["value"] > 1 / 12


def test_images_are_drawn_again_from_its_priors(checkpoint, tmp_path):
    text = "--dataset_name textures --resolution 16 --num_images 4 --batch_size 4 --device cpu"
    reconstruction.main(command(checkpoint, text, output_file=tmp_path / "again.json"))
    assert any(name.startswith("psnr") for name in read_results(tmp_path / "again.json")["metrics"])


def test_samples_are_drawn_with_it(checkpoint, tmp_path):
    with fresh_accelerator():
        text = "--num_images 3 --batch_size 2 --seed 1 --num_stages 2"
        sample.main(command(checkpoint, text, output_dir=tmp_path / "samples"))
    assert len(list((tmp_path / "samples").rglob("*.png"))) >= 3


@pytest.mark.filterwarnings("ignore:FID of", "ignore:The covariance of")
def test_a_sweep_judges_it(checkpoint, tmp_path):
    (tmp_path / "features.py").write_text(EXTRACTOR)
    text = "--reference textures:24:5 --resolution 16 --num_images 4 --batch_size 4 --num_groups 2 "
    text += "--num_inference_steps 1 --guidance_scales 1 2 --metrics fid"
    paths = {"extractor": f"{tmp_path / 'features.py'}:extractor", "output_dir": tmp_path / "sweep"}
    sweep.main(command(checkpoint, text, **paths))
    names = [name for name in read_results(tmp_path / "sweep" / "sweep.json")["metrics"] if name.startswith("fid/")]
    assert len(names) == 3  # stage 1, and stage 2 of both scales


# ------------------------------------------------------------------------------------------------- with its own code

WITHOUT_THE_PACKAGE = """
import sys

sys.modules["diffusers_dod"] = sys.modules["test_visual_prior_seam"] = None
import torch
from diffusers import DiffusionPipeline

folder, expected = sys.argv[1], torch.load(sys.argv[2])
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code was run without being asked for")
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipe.latent_embedder).__module__.startswith("diffusers_modules.")
generator = torch.Generator().manual_seed(0)
images = pipe([1, 3], num_stages=2, output_type="pt", generator=generator).images
torch.testing.assert_close(images, expected)
"""


@pytest.fixture
def exported(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "saved")
    return export_remote_code(tmp_path / "saved", tmp_path / "exported")


@pytest.mark.usefixtures("no_grad")
def test_the_exported_pipeline_brings_its_code(pipe, exported):
    assert json.loads((exported / "model_index.json").read_text())["latent_embedder"] == GRID_ENCODER
    file = exported / "latent_embedder" / "test_visual_prior_seam.py"
    code = file.read_text()
    assert "class GridEncoder" in code and "class VisualPriorMixin" in code
    for unneeded in ("diffusers_dod import", "class LatentEmbeddingModule", "pytest", "def test_"):
        assert unneeded not in code.partition("import")[2]
    spec = importlib.util.spec_from_file_location("exported_encoder", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder = module.GridEncoder.from_pretrained(exported / "latent_embedder")
    assert torch.equal(encoder(noise(1)).prior_embeds, pipe.latent_embedder(noise(1)).prior_embeds)


@pytest.mark.slow
def test_the_exported_pipeline_needs_no_package(pipe, exported, tmp_path):
    torch.save(draw(pipe), tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(exported), str(tmp_path / "images.pt")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr


def test_an_encoder_that_needs_other_files_is_refused(tmp_path, monkeypatch):
    text = """
from diffusers_dod import VisualPriorMixin
from diffusers_dod.training.ema import averaged_parameters


class FarEncoder(VisualPriorMixin):
    def encode(self, latents, attention_kwargs=None):
        return averaged_parameters(self)
"""
    (tmp_path / "far_encoder.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    from far_encoder import FarEncoder

    with pytest.raises(ValueError, match=says("`FarEncoder`", "its own file", "got averaged_parameters")):
        self_contained_source(FarEncoder)


# ------------------------------------------------------------------------------------------------------------ consent


def test_no_file_makes_anything_import_a_class(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "unasked.py").write_text("raise SystemExit('this code was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = tmp_path / "saved" / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "latent_embedder": ["unasked", "UnaskedEncoder"]}))
    with pytest.raises(ValueError, match=says("unasked", "import")):
        DoDPipeline.from_pretrained(tmp_path / "saved")
    message = says("`latent_embedder`", "LatentEmbeddingModule", "got 'UnaskedEncoder'", "import the module")
    for read in (Preset.from_pretrained, lambda path: export_remote_code(path, tmp_path / "exported")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "saved")
    assert "unasked" not in sys.modules and not (tmp_path / "exported").exists()


def test_classes_are_found_by_name():
    assert find_visual_prior_class("GridEncoder") is GridEncoder
    assert find_visual_prior_class("LatentEmbeddingModule") is LatentEmbeddingModule


# ----------------------------------------------------------------------------------------------------------- bad input


def test_an_encoder_that_does_not_fit_is_refused():
    for overrides, fragments in (
        (dict(width=48), ["width 32", "`prior_embed_dim`", "got 48"]),
        (dict(in_channels=3), ["in_channels 4", "got 3"]),
        (dict(patch_size=4), ["patch_size 2", "got 4"]),
    ):
        for build in (tiny_pipeline, lambda latent_embedder: DoDJointModel(tiny_transformer(), latent_embedder)):
            with pytest.raises(ValueError, match=says("`latent_embedder`", *fragments)):
                build(latent_embedder=GridEncoder(**overrides))


def test_an_encoder_that_is_not_whole_is_refused():
    class Unfinished(VisualPriorMixin):
        @register_to_config
        def __init__(self, patch_size: int = 2, in_channels: int = 4):
            super().__init__()
            self.inner_dim = 32

        def encode(self, latents, attention_kwargs=None):
            return latents

    with pytest.raises(TypeError, match="abstract class Unfinished .*abstract method '?decode"):
        Unfinished()

    class WithoutShape(Unfinished):
        def decode(self, latent_tokens, height, width, attention_kwargs=None):
            return latent_tokens

    with pytest.raises(TypeError, match=says("`latent_embedder`", "`token_shape`", "WithoutShape")):
        tiny_pipeline(latent_embedder=WithoutShape())
    with pytest.raises(TypeError, match=says("`latent_embedder`", "VisualPriorMixin", "got Linear")):
        tiny_pipeline(latent_embedder=nn.Linear(2, 2))
