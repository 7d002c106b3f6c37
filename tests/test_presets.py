"""Sizes and costs of the presets against the paper's Table 1 and Table 4, to the unit, without allocating a weight."""

import pytest
import torch
from helpers import says, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dod import DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.presets import PRESETS, Preset


BACKBONE_PARAMETERS = {
    "DoD-S": 26_529_040,
    "DoD-B": 104_962_576,
    "DoD-XL": 527_126_800,
    "FiTv2-B": 128_149_072,
    "FiTv2-XL": 671_045_776,
    "FiTv2-3B": 2_971_928_080,
}
EMBEDDER_PARAMETERS = {"DoD-S": 21_474_464, "DoD-B": 85_711_136, "DoD-XL": 85_711_136}
PAPER_MILLIONS = {"DoD-S": 48, "DoD-B": 191, "DoD-XL": 613}
# 10^9 multiply-accumulates of the Linears, one 32x32 latent.
BACKBONE_GMACS = {"DoD-S": 6.609, "DoD-B": 26.431, "DoD-XL": 134.095, "FiTv2-B": 27.206, "FiTv2-XL": 146.872}
BACKBONE_GMACS["FiTv2-3B"] = 652.737
FIRST_STAGE_GMACS = {"DoD-S": 5.44, "DoD-B": 21.77, "DoD-XL": 114.24}
EMBEDDER_GMACS = {"DoD-S": 6.157, "DoD-B": 24.619, "DoD-XL": 24.619}


def on_meta(name: str) -> tuple[DoDTransformer2DModel, LatentEmbeddingModule | None]:
    with torch.device("meta"):
        return PRESETS[name].build()


def linear_gmacs(run) -> float:
    """Half the floating-point operations of `addmm` and `mm`: those of the Linears, not of attention's products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation) in ("aten.addmm", "aten.mm")) / 2e9


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", BACKBONE_PARAMETERS)
def test_parameters(name):
    transformer, embedder = on_meta(name)
    assert parameters(transformer) == BACKBONE_PARAMETERS[name]
    assert (parameters(embedder) if embedder is not None else None) == EMBEDDER_PARAMETERS.get(name)
    if embedder is not None:
        assert round((parameters(transformer) + parameters(embedder)) / 1e6) == PAPER_MILLIONS[name]
        assert embedder.inner_dim == transformer.config.prior_embed_dim


@pytest.mark.parametrize("name", BACKBONE_GMACS)
def test_multiply_accumulates(name):
    transformer, embedder = on_meta(name)
    latents = torch.empty(1, 4, 32, 32, device="meta")
    timestep, labels = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    prior_embeds = None
    if embedder is not None:
        prior_embeds = embedder(latents).prior_embeds
        assert linear_gmacs(lambda: embedder(latents)) == pytest.approx(EMBEDDER_GMACS[name], abs=5e-4)
        # Without a prior the conditioning is one token wide, which is what stage 1 saves.
        first_stage = linear_gmacs(lambda: transformer(latents, timestep, labels))
        assert first_stage == pytest.approx(FIRST_STAGE_GMACS[name], abs=5e-3)
    count = linear_gmacs(lambda: transformer(latents, timestep, labels, prior_embeds=prior_embeds))
    assert count == pytest.approx(BACKBONE_GMACS[name], abs=5e-4)


def test_a_guided_batch_is_split_not_broadcast():
    """The unconditional half of a guided evaluation costs what stage 1 costs, not what a prior costs."""
    transformer, embedder = on_meta("DoD-B")
    latents = torch.empty(2, 4, 32, 32, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    prior_embeds = torch.empty(1, 256, 768, device="meta")
    guided = linear_gmacs(lambda: transformer(latents, torch.empty(2, device="meta"), labels, prior_embeds))
    assert guided == pytest.approx(BACKBONE_GMACS["DoD-B"] + FIRST_STAGE_GMACS["DoD-B"], abs=1e-2)


def test_sampling_defaults_follow_the_paper():
    assert PRESETS["DoD-B"].pipeline_config["default_guidance_scale"] == 5.5
    assert PRESETS["DoD-XL"].pipeline_config["default_guidance_scale"] == 3.5
    assert PRESETS["DoD-S"].latent_embedder_config["num_latent_tokens"] == 32
    assert PRESETS["DoD-S"].latent_embedder_config["latent_token_dim"] == 16
    assert PRESETS["FiTv2-B"].pipeline_config["default_num_stages"] == 1


def test_models_are_built_for_latents_and_with_other_arguments():
    preset = PRESETS["DoD-Desk"]
    transformer, embedder = preset.build((3, 16, 16), 5, patch_size=4, num_latent_tokens=6, prior_embed_dim=128)
    for model in (transformer, embedder):
        assert (model.config.in_channels, model.config.sample_size, model.config.patch_size) == (3, 16, 4)
    assert transformer.config.num_classes == 5 and embedder.token_shape == (6, 8)
    assert embedder.inner_dim == transformer.config.prior_embed_dim == 128
    # The preset itself stays as it is.
    assert preset == PRESETS["DoD-Desk"] and preset.build()[1].token_shape == (4, 8)
    with torch.random.fork_rng():  # weights are drawn by the backbone first
        torch.manual_seed(0)
        transformer, embedder = preset.build()
        torch.manual_seed(0)
        expected = DoDTransformer2DModel(**preset.transformer_config)
        expected_embedder = LatentEmbeddingModule(**preset.latent_embedder_config)
    for model, same in ((transformer, expected), (embedder, expected_embedder)):
        weights = same.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_argument_that_no_model_takes_is_refused():
    for preset, names in (
        ("DoD-S", ["DoDTransformer2DModel", "LatentEmbeddingModule"]),
        ("FiTv2-B", ["DoDTransformer"]),
    ):
        with pytest.raises(ValueError, match=says("`num_latents`", *names, "no such argument", "got 3")):
            PRESETS[preset].build(num_latents=3)
    with pytest.raises(ValueError, match=says("`num_latent_tokens`", "DoDTransformer2DModel", "got 3")):
        PRESETS["FiTv2-B"].override(num_latent_tokens=3)


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_pipeline_and_its_folder_tell_the_preset(is_plain, tmp_path):
    pipeline = tiny_pipeline(**({"latent_embedder": None} if is_plain else {}))
    preset = Preset.from_pipeline(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert Preset.from_pretrained(tmp_path) == preset
    assert preset.pipeline_config == dict(
        default_guidance_scale=2.0,
        default_num_inference_steps=2,
        default_num_stages=2,
        default_first_stage_guidance_scale=1.0,
    )
    with torch.device("meta"):
        models = preset.build()
    for model, own in zip(models, (pipeline.transformer, pipeline.latent_embedder), strict=True):
        if own is None:
            assert model is None and is_plain
            continue
        shapes = {name: tensor.shape for name, tensor in own.state_dict().items()}
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
