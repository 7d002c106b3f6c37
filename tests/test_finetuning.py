"""Fine-tuning: on other classes, from a FiTv2, of few weights or of LoRA adapters, and that nothing else changes."""

import itertools
import re
import shlex
import shutil

import pytest
import torch
from golden_data import golden, golden_model, timestep_of
from helpers import contents, fresh_accelerator, says, tiny_pipeline, tiny_transformer, tiny_vae
from safetensors.torch import load_file

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.cards import describe_loading
from diffusers_dod.checkpoint_manifest import STATE_FOLDER, find_damage
from diffusers_dod.data.textures import TEXTURE_CLASSES
from diffusers_dod.evaluation.options import load_pipeline
from diffusers_dod.evaluation.sample import SamplingOptions
from diffusers_dod.finetuning import difffit_parameters, freeze_all_but
from diffusers_dod.losses import DoDJointModel
from diffusers_dod.options import parse_options
from diffusers_dod.presets import PRESETS
from diffusers_dod.training.model_card import describe_end
from diffusers_dod.training.train import build_models, main
from diffusers_dod.training_options import TrainingOptions


DEFAULTS = {
    "default_guidance_scale": 2.5,
    "default_num_inference_steps": 3,
    "default_num_stages": 3,
    "default_first_stage_guidance_scale": 1.5,
}
STEPS = "--max_train_steps 2 --train_batch_size 4 --learning_rate 1e-2 --num_train_samples 24 --resolution 16".split()


def arguments(output_dir, *more) -> list[str]:
    texts = ["--preset", "DoD-Desk", "--dataset_name", "textures", *STEPS, "--output_dir", output_dir, *more]
    return [str(text) for text in texts]


def train(output_dir, *more) -> dict[str, torch.Tensor]:
    """Trains two steps; returns the raw weights."""
    with fresh_accelerator():
        main(arguments(output_dir, *more))
    return load_file(output_dir / "checkpoint-2" / STATE_FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A two-stage pipeline for 10 classes, without its names."""
    folder = tmp_path_factory.mktemp("pretrained")
    pipe = tiny_pipeline(id2label=None, **DEFAULTS)
    pipe.save_pretrained(folder / "pipeline")
    pipe.vae.save_pretrained(folder / "vae")
    return folder


# ------------------------------------------------------------------------------------------------------------ labels


def build(argv: list[str], latent_shape: tuple[int, int, int], num_classes: int) -> DoDJointModel:
    """The models of a run with these arguments."""
    options = parse_options(TrainingOptions, argv)
    return build_models(options.model, latent_shape, num_classes, seed=options.data.seed)


@pytest.mark.parametrize("num_classes", [1, 3, 25])
@torch.no_grad()
def test_other_classes_start_as_the_null_class(tmp_path, num_classes):
    saved = tiny_transformer()
    saved.save_pretrained(tmp_path)
    model = DoDTransformer2DModel.from_pretrained(tmp_path, num_classes=num_classes)
    assert model.config.num_classes == num_classes and model.class_embed.weight.shape[0] == num_classes + 1
    for name, weight in saved.state_dict().items():
        if name != "class_embed.weight":
            assert torch.equal(model.state_dict()[name], weight), name

    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unconditional = saved(latents, 400.0, torch.tensor([10, 10])).sample
    labels = torch.tensor([num_classes - 1, num_classes])  # the last class, and the null class
    torch.testing.assert_close(model(latents, 400.0, labels).sample, unconditional)

    model.save_pretrained(tmp_path / "resized")
    assert DoDTransformer2DModel.from_pretrained(tmp_path / "resized").config.num_classes == num_classes


def test_the_same_number_of_classes_is_left_alone(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    model, info = DoDTransformer2DModel.from_pretrained(tmp_path, num_classes=10, output_loading_info=True)
    assert torch.equal(model.class_embed.weight, tiny_transformer().class_embed.weight)
    assert not info["missing_keys"]


def test_a_class_may_start_as_one_that_the_model_knows():
    model = tiny_transformer()
    table = model.class_embed.weight.detach().clone()
    model.resize_class_embed(3, source_classes=[7, None, 0])
    assert torch.equal(model.class_embed.weight, table[[7, 10, 0, 10]])
    assert model.class_embed.weight.requires_grad and model.config.num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (dict(num_classes=0), ("`num_classes`", ">= 1", "got 0")),
        (dict(num_classes=2, source_classes=[1]), ("`source_classes`", "2 classes", "got 1")),
        (dict(num_classes=1, source_classes=[10]), ("`source_classes`", "[0, 9]", "got 10")),
        (dict(num_classes=1, source_classes=[-1]), ("`source_classes`", ">= 0", "got -1")),
    ],
)
def test_bad_label_tables(arguments, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        tiny_transformer().resize_class_embed(**arguments)


def test_a_pipeline_takes_a_transformer_for_other_classes(pretrained):
    folder = pretrained / "pipeline"
    transformer = DoDTransformer2DModel.from_pretrained(folder, subfolder="transformer", num_classes=2)
    pipe = DoDPipeline.from_pretrained(folder, transformer=transformer, id2label={0: "cat", 1: "dog"})
    assert pipe.get_label_ids("dog") == [1]
    assert pipe("dog", num_inference_steps=1, output_type="pt").images.isfinite().all()


# ------------------------------------------------------------------------------------------------- from a pipeline


def test_training_goes_on_from_a_pipeline_with_the_classes_of_the_data(pretrained, tmp_path):
    where = ["--pretrained_model_name_or_path", pretrained / "pipeline"]
    where += ["--pretrained_vae_name_or_path", pretrained / "vae"]
    start = build(arguments(tmp_path, *where), (4, 8, 8), 12).state_dict()
    original = DoDPipeline.from_pretrained(pretrained / "pipeline")
    for name, weight in original.latent_embedder.state_dict().items():
        assert torch.equal(start[f"latent_embedder.{name}"], weight)
    assert torch.equal(start["transformer.x_embedder.weight"], original.transformer.x_embedder.weight)
    null_row = original.transformer.class_embed.weight[-1]
    assert torch.equal(start["transformer.class_embed.weight"], null_row.expand(13, -1))

    trained = train(tmp_path, *where)
    assert trained.keys() == start.keys()
    unchanged = [name for name in start if torch.equal(start[name], trained[name])]
    assert unchanged == []
    pipe = DoDPipeline.from_pretrained(tmp_path)
    assert len(pipe.id2label) == 12
    assert {name: pipe.config[name] for name in DEFAULTS} == DEFAULTS


def test_the_autoencoder_of_the_pipeline_is_the_default(pretrained, tmp_path, caplog):
    caplog.set_level("INFO", logger="diffusers_dod")
    folder = pretrained / "pipeline"
    trained = train(tmp_path / "own", "--pretrained_model_name_or_path", folder)
    assert f"The autoencoder is that of {folder}" in caplog.text and "NO AUTOENCODER" not in caplog.text
    where = ["--pretrained_model_name_or_path", folder, "--pretrained_vae_name_or_path", pretrained / "vae"]
    given = train(tmp_path / "given", *where)
    assert trained.keys() == given.keys() and all(torch.equal(trained[name], given[name]) for name in given)
    assert DoDPipeline.from_pretrained(tmp_path / "own").vae is not None


def test_a_run_without_an_autoencoder_says_that_it_trains_on_pixels(tmp_path, caplog):
    train(tmp_path)
    (warning,) = [record for record in caplog.records if "NO AUTOENCODER" in record.message]
    assert warning.levelname == "WARNING" and "`pretrained_vae_name_or_path`" in warning.message


def test_a_pipeline_for_other_latents_is_refused(pretrained, tmp_path):
    argv = arguments(tmp_path, "--pretrained_model_name_or_path", pretrained / "pipeline")
    with pytest.raises(ValueError, match=says("`pretrained_model_name_or_path`", "3 channels", "for 4 channels")):
        build(argv, (3, 16, 16), 12)
    with pytest.raises(ValueError, match=says("`num_latent_tokens` must not be given", "whose own is 4", "got 8")):
        build([*argv, "--num_latent_tokens", "8"], (4, 8, 8), 12)


@torch.no_grad()
def test_a_fitv2_becomes_a_dod_that_starts_as_the_same_stage_1(tmp_path):
    fitv2 = golden_model()
    defaults = dict(default_guidance_scale=1.25, default_num_inference_steps=7, default_num_stages=1)
    DoDPipeline(fitv2, DoDFlowMatchScheduler(), **defaults).save_pretrained(tmp_path / "fitv2")
    tiny_vae().save_pretrained(tmp_path / "vae")
    where = ["--pretrained_model_name_or_path", tmp_path / "fitv2"]
    argv = arguments(tmp_path / "run", *where)
    data = golden("fitv2_tiny_io")
    inputs = (data["sq8x8.latents"], timestep_of(data["sq8x8.t"]), data["sq8x8.y"])

    start = build(argv, (4, 8, 8), 10)  # as many classes as it has
    assert start.latent_embedder is not None and start.transformer.config.prior_embed_dim == 128
    torch.testing.assert_close(start.transformer(*inputs).sample, -data["sq8x8.velocity"], atol=1e-5, rtol=0)
    other_classes = build(argv, (4, 8, 8), 12)  # the textures have more
    as_null = fitv2(*inputs[:2], torch.full_like(inputs[2], 10)).sample
    torch.testing.assert_close(other_classes.transformer(*inputs).sample, as_null, atol=1e-5, rtol=0)

    with torch.enable_grad():
        trained = train(tmp_path / "run", *where, "--pretrained_vae_name_or_path", tmp_path / "vae")
    pipe = DoDPipeline.from_pretrained(tmp_path / "run")
    # Those of its only stage are not those of two.
    expected = PRESETS["DoD-Desk"].pipeline_config | {"default_num_inference_steps": 7}
    assert {name: pipe.config[name] for name in expected} == expected
    assert pipe("bricks", num_stages=2, num_inference_steps=1, output_type="pt").images.isfinite().all()
    for name in ("sample_token", "prior_proj.linear_2.weight"):  # from zero on, they learn
        assert trained[f"transformer.{name}"].abs().max() > 0


# ----------------------------------------------------------------------------------------------------- few weights


def test_difffit_changes_biases_norms_and_embeddings_only(pretrained, tmp_path):
    where = ["--pretrained_model_name_or_path", pretrained / "pipeline", "--trainable_parameters", "difffit"]
    where += ["--pretrained_vae_name_or_path", pretrained / "vae"]
    model = build(arguments(tmp_path, *where), (4, 8, 8), 12)
    start = model.state_dict()
    chosen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {
        "transformer.class_embed.weight",
        "transformer.sample_token",
        "transformer.adaln_global.bias",
        "transformer.transformer_blocks.1.attn.to_q.bias",
        "latent_embedder.latent_queries",
        "latent_embedder.mask_token",
        "latent_embedder.encoder_blocks.0.norm1.weight",
    } <= chosen
    assert not any(name.endswith(("to_q.weight", "proj.weight", "adaln_up.weight")) for name in chosen)
    assert sum(start[name].numel() for name in chosen) < 0.1 * sum(weight.numel() for weight in start.values())

    trained = train(tmp_path, *where)
    assert {name for name in start if not torch.equal(start[name], trained[name])} == chosen

    resumed = [*where, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    with fresh_accelerator():
        main(arguments(tmp_path, *resumed))
    last = load_file(tmp_path / "checkpoint-3" / STATE_FOLDER / "model.safetensors")
    assert {name for name in trained if not torch.equal(trained[name], last[name])} == chosen


def test_names_of_weights_are_checked():
    model = tiny_transformer()
    with pytest.raises(ValueError, match=says("`names`", "got ['to_q']")):
        freeze_all_but(model, ["to_q"])
    with pytest.raises(ValueError, match=says("`names`", "got []")):
        freeze_all_but(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_all_but(model, difffit_parameters(model))
    assert not model.x_embedder.weight.requires_grad and model.x_embedder.bias.requires_grad


def test_lora_adapters_learn_and_nothing_else_changes():
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    model = DoDJointModel(pipe.transformer, pipe.latent_embedder)
    model.requires_grad_(False)
    for part in model.children():
        part.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)

    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    batch = (latents, noise, torch.full((4,), 0.5), torch.tensor([0, 1, 2, 3]), 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = model(*batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name for name, weight in model.state_dict().items() if not torch.equal(start[name], weight)} == adapters


# ------------------------------------------------------------------------------------------------- LoRA by the trainer


LORA = ["--lora_rank", "3", "--lora_alpha", "6", "--checkpointing_steps", "1"]


@pytest.fixture(scope="module")
def adapters(pretrained, tmp_path_factory):
    """Runs that train adapters of both models: on and on, and with a stop after the first step."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    where = ["--pretrained_model_name_or_path", pretrained / "pipeline", *LORA, "--lora_latent_embedder"]
    train(folder / "run", *where)
    with fresh_accelerator():
        main(arguments(folder / "resumed", *where, "--max_train_steps", 1))
    train(folder / "resumed", *where, "--resume_from_checkpoint", "latest")
    return folder


def test_adapters_are_all_that_is_trained_and_saved(adapters, pretrained):
    pipeline = contents(pretrained / "pipeline")
    run = adapters / "run"
    assert not list(run.rglob("model_index.json")) and (run / "pytorch_lora_weights.safetensors").is_file()
    model = build(arguments(run, "--pretrained_model_name_or_path", pretrained / "pipeline", *LORA), (4, 8, 8), 12)
    chosen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert chosen and all(name.startswith("transformer.") and ".lora_" in name for name in chosen)
    for step, file in itertools.product((1, 2), ("model", "ema-decay-0.999")):
        saved = load_file(run / f"checkpoint-{step}" / STATE_FOLDER / f"{file}.safetensors")
        assert {name for name in saved if name.startswith("transformer.")} == chosen
        assert all(".lora_" in name for name in saved) and len(saved) > len(chosen)
    assert contents(pretrained / "pipeline") == pipeline
    trained = load_file(run / "pytorch_lora_weights.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name)
    assert trained["transformer.class_embed.lora_embedding_A"].abs().max() > 0


def test_resumed_adapters_equal_those_of_a_run_without_a_stop(adapters):
    one, two = (
        {path.name: load_file(path) for path in (adapters / name / "checkpoint-2").rglob("*.safetensors")}
        for name in ("run", "resumed")
    )
    assert one.keys() == two.keys() and len(one) == 4
    for file, tensors in one.items():
        assert tensors.keys() == two[file].keys()
        assert all(torch.equal(tensor, two[file][name]) for name, tensor in tensors.items()), file
    assert find_damage(adapters / "run" / "checkpoint-2") is None


def test_other_weights_under_the_adapters_are_refused(adapters, pretrained, tmp_path):
    shutil.copytree(adapters / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    pipe = DoDPipeline.from_pretrained(pretrained / "pipeline")
    torch.nn.init.zeros_(pipe.transformer.proj_out.bias)
    pipe.save_pretrained(tmp_path / "other")
    where = ["--pretrained_model_name_or_path", tmp_path / "other", *LORA, "--lora_latent_embedder"]
    with fresh_accelerator(), pytest.raises(ValueError, match=says("`base_weights`")):
        main(arguments(tmp_path / "run", *where, "--resume_from_checkpoint", "latest"))


def test_a_damaged_adapter_is_found(adapters, tmp_path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(adapters / "run" / "checkpoint-2", folder)
    file = folder / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "pytorch_lora_weights.safetensors does not have the hash" in find_damage(folder)
    file.unlink()
    assert "files are missing: pytorch_lora_weights.safetensors" in find_damage(folder)


def test_the_lines_that_load_an_adapter_run(adapters, pretrained):
    """The card has such lines, and so has the end of the run. The data have other classes than the pipeline."""
    base, run = str(pretrained / "pipeline"), str(adapters / "run")
    card = (adapters / "run" / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    block = block.replace("path/or/hub-id/of/the/base", base).replace("path/or/hub-id", run)
    options = parse_options(TrainingOptions, arguments(run, "--pretrained_model_name_or_path", base, *LORA))
    *commands, python = describe_end(options, 16, TEXTURE_CLASSES).partition("To load them:\n")
    end = python.splitlines()
    assert "transformer=" not in " ".join(describe_loading(options, run, tuple(f"class {id}" for id in range(10))))
    images = []
    for lines in (block, "\n".join(line.strip() for line in end)):
        scope: dict = {}
        exec(lines, scope)
        assert scope["pipe"].get_list_adapters() == {
            part: ["default_0"] for part in ("transformer", "latent_embedder")
        }
        images.append(scope["pipe"]("bricks", num_inference_steps=1, seed=0, output_type="pt").images)
    assert torch.equal(*images)
    scope["pipe"].unload_lora_weights()
    assert not torch.equal(scope["pipe"]("bricks", num_inference_steps=1, seed=0, output_type="pt").images, images[0])
    (command,) = re.findall(r"evaluation\.(sample .*)", commands[0])
    found = parse_options(SamplingOptions, shlex.split(command)[1:])
    pipe = load_pipeline(found.pretrained_model_name_or_path, found.lora_weights)
    assert pipe.id2label == dict(enumerate(TEXTURE_CLASSES))
    assert torch.equal(pipe("bricks", num_inference_steps=1, seed=0, output_type="pt").images, images[0])
    assert "LoRA adapters of rank 3, scaled by 2, in backbone and latent embedder: `to_q`" in card
    with pytest.raises(ValueError, match=says("classes of this pipeline, 10", "`num_classes=12`")):
        DoDPipeline.from_pretrained(base).load_lora_weights(run)


def test_options_that_do_not_fit_adapters_are_refused(pretrained, tmp_path, capsys):
    base = ["--pretrained_model_name_or_path", pretrained / "pipeline"]

    def refuse(*fragments, argv):
        with pytest.raises((ValueError, SystemExit)) as error:
            build(arguments(tmp_path, *argv), (4, 8, 8), 12)
        message = f"{error.value} {capsys.readouterr().err}"
        assert all(fragment in message for fragment in fragments), message

    refuse("`lora_rank`", "with `pretrained_model_name_or_path` only", argv=["--lora_rank", 4])
    refuse("`lora_alpha`", "with `lora_rank` only", argv=[*base, "--lora_alpha", 4])
    refuse("`lora_rank`", ">= 1", "got 0", argv=[*base, "--lora_rank", 0])
    lora = [*base, "--lora_rank", 4]
    refuse("`trainable_parameters`", argv=[*lora, "--trainable_parameters", "difffit"])
    refuse("`ema_sigma_rel`", "[0.1]", argv=[*lora, "--ema_sigma_rel", 0.1])
    refuse("`latent_embedder_learning_rate`", "got 0.1", argv=[*lora, "--latent_embedder_learning_rate", 0.1])
    pytest.importorskip("peft")
    refuse("`lora_target_modules`", "got ['to_x']", argv=[*lora, "--lora_target_modules", "to_q", "to_x"])
    refuse(
        "`lora_target_modules`",
        "['class_embed']",
        argv=[*lora, "--lora_latent_embedder"] + ["--lora_target_modules", "class_embed"],
    )
    DoDPipeline(transformer=golden_model(), scheduler=DoDFlowMatchScheduler()).save_pretrained(tmp_path / "fitv2")
    fitv2 = ["--pretrained_model_name_or_path", tmp_path / "fitv2", "--lora_rank", 4]
    refuse("`lora_rank`", "latent embedder", argv=fitv2)
    refuse("`lora_latent_embedder`", "NoneType", argv=[*fitv2, "--preset", "FiTv2-Desk", "--lora_latent_embedder"])
