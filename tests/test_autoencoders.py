"""Every autoencoder of Diffusers that the pipeline and the trainer take, seen through the same functions."""

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderOobleck,
    AutoencoderRAE,
    AutoencoderTiny,
    DiffusionPipeline,
    VQModel,
)
from helpers import randomize, says, tiny_transformer, tiny_vae

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.autoencoders import (
    check_autoencoder,
    check_image_size,
    decode_pixels,
    denormalize_latents,
    encode_moments,
    latent_channels,
    normalize_latents,
    spatial_factor,
)


def make_kl(**config) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **config,
    )


def make_dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        scaling_factor=0.4,
    )


def make_rae() -> AutoencoderRAE:
    return AutoencoderRAE(
        encoder_type="mae",
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        patch_size=2,
        encoder_input_size=32,
        latents_mean=torch.linspace(-1, 1, 64).reshape(64, 1, 1),
        latents_std=torch.linspace(0.5, 2, 64).reshape(64, 1, 1),
    )


def make_tiny() -> AutoencoderTiny:
    blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
    return AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)


def make_asymmetric() -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        norm_num_groups=4,
    )


def make_vq() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
    )


# Name -> the autoencoder, its channels, pixels per latent pixel, and the side of its images here.
CASES = {
    "KL of 4 channels": (lambda: make_kl(latent_channels=4, scaling_factor=0.18215), 4, 2, 16),
    "KL of 16 channels": (lambda: make_kl(latent_channels=16, scaling_factor=0.36, shift_factor=0.11), 16, 2, 16),
    "KL with statistics": (
        lambda: make_kl(latent_channels=4, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]),
        4,
        2,
        16,
    ),
    "DC": (make_dc, 4, 2, 16),
    "RAE": (make_rae, 64, 2, 16),
    "tiny": (make_tiny, 4, 2, 16),
    "asymmetric": (make_asymmetric, 4, 2, 16),
    "VQ": (make_vq, 4, 2, 16),
}
each_case = pytest.mark.parametrize(("make", "channels", "factor", "side"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def pixels_of(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@each_case
@torch.no_grad()
def test_moments(make, channels, factor, side):
    vae = make().eval()
    assert (latent_channels(vae), spatial_factor(vae)) == (channels, factor)
    mean, std = encode_moments(pixels_of(side), vae)
    assert mean.shape == (2, channels, side // factor, side // factor) and mean.dtype == torch.float32
    assert (std is None) == (not isinstance(vae, (AutoencoderKL, AsymmetricAutoencoderKL)))
    if std is not None:
        posterior = vae.encode(pixels_of(side)).latent_dist
        torch.testing.assert_close(denormalize_latents(mean, vae), posterior.mean)
        noise = torch.randn(mean.shape)
        # The same draw before and after the latents are normalised.
        drawn = normalize_latents(posterior.mean + posterior.std * noise, vae)
        torch.testing.assert_close(mean + std * noise, drawn, atol=1e-5, rtol=1e-5)


@each_case
@torch.no_grad()
def test_decoding_undoes_the_normalisation(make, channels, factor, side):
    vae = make().eval()
    pixels = pixels_of(side)
    reconstructed = decode_pixels(encode_moments(pixels, vae)[0], vae)
    assert reconstructed.shape == pixels.shape
    if isinstance(vae, (AutoencoderKL, AsymmetricAutoencoderKL)):
        own = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    elif isinstance(vae, AutoencoderRAE):  # takes and gives images in [0, 1]
        own = vae(pixels / 2 + 0.5).sample * 2 - 1
    elif isinstance(vae, AutoencoderTiny):  # whose forward pass rounds the latents to bytes
        own = vae.decode(vae.encode(pixels).latents).sample
    else:
        own = vae(pixels).sample
    torch.testing.assert_close(reconstructed, own, atol=1e-5, rtol=1e-5)


def test_an_rae_normalises_its_latents_itself():
    vae = make_rae().eval()
    latents = torch.randn(1, 64, 8, 8)
    assert torch.equal(normalize_latents(latents, vae), latents)
    assert torch.equal(denormalize_latents(latents, vae), latents)


@torch.no_grad()
def test_pixel_space():
    pixels = pixels_of(8)
    mean, std = encode_moments(pixels, None)
    assert torch.equal(mean, pixels) and std is None and torch.equal(decode_pixels(pixels, None), pixels)


@each_case
def test_the_pipeline_takes_it(make, channels, factor, side, tmp_path):
    vae = make().eval()
    size = {"sample_size": side // factor, "in_channels": channels, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = DoDTransformer2DModel(**size, num_layers=1, num_classes=3, prior_embed_dim=16)
    embedder = LatentEmbeddingModule(
        **size, num_latent_tokens=4, latent_token_dim=8, num_encoder_layers=1, num_decoder_layers=1
    )
    pipe = DoDPipeline(randomize(transformer), DoDFlowMatchScheduler(), vae, randomize(embedder))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt", "seed": 0}
    images = pipe([0, 1], num_stages=2, image=(pixels_of(side) + 1) / 2, **settings).images
    assert images.shape == (2, 3, side, side) and images.isfinite().all()
    plain = pipe([0, 1], num_stages=2, **settings).images
    pipe.save_pretrained(tmp_path)
    for cls in (DoDPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.vae) is type(vae)
        torch.testing.assert_close(loaded([0, 1], num_stages=2, **settings).images, plain, atol=1e-4, rtol=1e-4)


def test_an_rae_has_one_size():
    vae = make_rae().eval()
    check_image_size(vae, 16, 16)
    for size in ((32, 32), (16, 8)):
        with pytest.raises(ValueError, match=says("must be 16", f"got {size[0]} x {size[1]}")):
            check_image_size(vae, *size)
    with pytest.raises(ValueError, match=says("must be 16", "got 32 x 32")):
        encode_moments(pixels_of(32), vae)
    transformer = DoDTransformer2DModel(sample_size=8, in_channels=64, num_layers=1, num_classes=3)
    pipe = DoDPipeline(transformer, DoDFlowMatchScheduler(), vae)
    with pytest.raises(ValueError, match=says("must be 16", "got 32 x 16")):
        pipe(0, height=32, num_inference_steps=1)


def test_channels_that_do_not_fit_are_refused():
    transformer = DoDTransformer2DModel(sample_size=8, in_channels=4, num_layers=1, num_classes=3)
    with pytest.raises(ValueError, match=says("`vae`", "`in_channels`", "got 64")):
        DoDPipeline(transformer, DoDFlowMatchScheduler(), make_rae())


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoencoderOobleck(
            encoder_hidden_size=4, downsampling_ratios=[2], channel_multiples=[1], decoder_channels=4
        ),
        lambda: AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1),
        lambda: AutoencoderKLTemporalDecoder(block_out_channels=(32,)),
        tiny_transformer,
        lambda: "vae",
    ],
    ids=["sound", "video", "frames", "transformer", "text"],
)
def test_models_of_other_kinds_are_refused(make):
    vae = make()
    received = repr(vae) if isinstance(vae, str) else type(vae).__name__
    with pytest.raises(TypeError, match=says("`vae`", "autoencoder of images", f"got {received}")):
        check_autoencoder("vae", vae)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (dict(scaling_factor=0.0), ["`scaling_factor` of `vae`", "(0, inf)", "got 0"]),
        (dict(scaling_factor=float("nan")), ["`scaling_factor` of `vae`", "(0, inf)", "got nan"]),
        (dict(shift_factor=float("inf")), ["`shift_factor` of `vae`", "finite", "got inf"]),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0, 0.0, 1.0, 1.0]), ["`latents_std` of `vae`", "(0", "got 0"]),
        (dict(latents_mean=[0.0, float("nan")] * 2, latents_std=[1.0] * 4), ["`latents_mean`", "finite", "got nan"]),
        (dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 4), ["`latents_mean`", "1 or 4 numbers", "got [0.0"]),
    ],
)
def test_statistics_that_no_latents_have_are_refused_at_loading(settings, fragments, tmp_path):
    tiny_vae(**{"latents_mean": None, "latents_std": None, **settings}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says(*fragments)):
        DoDPipeline(tiny_transformer(), DoDFlowMatchScheduler(), AutoencoderKL.from_pretrained(tmp_path))


def overflowing_vae(force_upcast: bool) -> AutoencoderKL:
    """An autoencoder whose first layers leave the range of float16, and whose norms bring all back."""
    vae = tiny_vae(force_upcast=force_upcast)
    with torch.no_grad():
        for layer in (vae.encoder.conv_in, vae.decoder.conv_in):
            layer.weight.mul_(5e4)
            layer.bias.mul_(5e4)
    return vae


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16_is_used_in_float32():
    vae = overflowing_vae(force_upcast=True)
    latents, pixels = torch.randn(1, 4, 8, 8), pixels_of(16)
    expected = decode_pixels(latents, vae), encode_moments(pixels, vae)[0]
    vae.half()
    found = decode_pixels(latents, vae), encode_moments(pixels, vae)[0]
    assert vae.dtype == torch.float16  # again
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=0.05, rtol=0.05)
    narrow = overflowing_vae(force_upcast=False).half()
    assert not decode_pixels(latents, narrow).isfinite().all()
    pipe = DoDPipeline(tiny_transformer(prior_embed_dim=None), DoDFlowMatchScheduler(), narrow)
    with pytest.raises(FloatingPointError, match=says("Decoded images", "float16")):
        pipe.decode_latents(latents, "pt")
