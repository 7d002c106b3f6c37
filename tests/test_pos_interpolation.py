"""Positions on grids larger than the trained one: the trained ones below it, and formulas of their own above."""

import copy
import json
import math
import pickle

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_1d_sincos_pos_embed_from_grid
from helpers import assert_near, normal, says, tiny_latent_embedder, tiny_pipeline, tiny_transformer
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_dod import DoDPipeline
from diffusers_dod.latent_embedding import sincos_pos_embed
from diffusers_dod.modeling_utils import DoDModelMixin
from diffusers_dod.pos_interpolation import (
    POS_INTERPOLATIONS,
    attention_factor,
    grid_scales,
    interpolate_frequencies,
)
from diffusers_dod.transformer_dod import DoDRotaryPosEmbed


pytestmark = pytest.mark.usefixtures("no_grad")

CPU = torch.device("cpu")
MODES = [mode for mode in POS_INTERPOLATIONS if mode != "none"]
DIM = 32  # of a head, and of an embedding of the LEM: 8 frequencies per axis
LABELS = torch.tensor([1, 3])

every_mode = pytest.mark.parametrize("mode", MODES)
decoupled_or_not = pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
both_models = pytest.mark.parametrize("make", [tiny_transformer, tiny_latent_embedder])


def rope(rows, columns, mode="none", decoupled=False, trained_size=4, dim=DIM) -> torch.Tensor:
    """Cosines + i sines of a grid, (rows, columns, 2, dim / 4): one per axis, rows first, and frequency."""
    rotation = DoDRotaryPosEmbed(dim)(rows, columns, CPU, trained_size, mode, decoupled)
    assert rotation.shape == (rows * columns, dim // 2, 2) and rotation.dtype == torch.float32
    return torch.view_as_complex(rotation).reshape(rows, columns, 2, dim // 4)


def sincos(rows, columns, mode="none", decoupled=False, trained_size=4, dim=DIM) -> torch.Tensor:
    """The same of the LEM's positions, which are [sin column, cos column, sin row, cos row]."""
    embedding = sincos_pos_embed(dim, rows, columns, CPU, torch.float32, trained_size, mode, decoupled)
    assert embedding.shape == (rows * columns, dim) and embedding.dtype == torch.float32
    parts = embedding.reshape(rows, columns, 2, 2, dim // 4)
    return torch.complex(parts[:, :, :, 1], parts[:, :, :, 0]).flip(2)


def turns(rotations: torch.Tensor) -> torch.Tensor:
    """Rotations of length 1, without YaRN's factor."""
    return rotations / rotations.abs()


both_positions = pytest.mark.parametrize("positions", [rope, sincos])


def run(model, rows, columns):
    """The output of either model on a grid of tokens; that of the LEM depends on the positions of both its halves."""
    latents = normal(2, 4, 2 * rows, 2 * columns)
    if hasattr(model, "encode"):
        return model(latents).prior_embeds
    return model(latents, 400.0, LABELS.clone(), normal(1, rows * columns, 32, seed=1)).sample


def assert_differ(actual: torch.Tensor, other: torch.Tensor) -> None:
    assert (actual - other).abs().max() > 1e-3


# --------------------------------------------------------------------------------- nothing changes up to trained size

SMALL = [(4, 4), (2, 4), (4, 1), (3, 3)]


@pytest.mark.parametrize(("rows", "columns"), [*SMALL, (8, 12)])
def test_the_trained_positions_are_those_of_diffusers(rows, columns):
    """Bit by bit, as checkpoints were trained with them."""
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    turns = [get_1d_rotary_pos_embed(DIM // 2, axis.float(), use_real=True) for axis in (row, column)]
    rotation = DoDRotaryPosEmbed(DIM)(rows, columns, CPU).repeat_interleave(2, dim=1)
    for actual, parts in zip(rotation.unbind(-1), zip(*turns, strict=True), strict=True):
        assert torch.equal(actual, torch.cat(parts, dim=-1))
    waves = [get_1d_sincos_pos_embed_from_grid(DIM // 2, axis, output_type="pt") for axis in (column, row)]
    assert torch.equal(sincos_pos_embed(DIM, rows, columns, CPU, torch.float32), torch.cat(waves, dim=-1).float())


@every_mode
@decoupled_or_not
@both_positions
@pytest.mark.parametrize(("rows", "columns"), SMALL)
def test_positions_up_to_the_trained_size_are_the_trained_ones(positions, mode, decoupled, rows, columns):
    assert torch.equal(positions(rows, columns, mode, decoupled), positions(rows, columns))


@every_mode
@decoupled_or_not
@both_models
def test_models_up_to_the_trained_size_are_the_trained_ones(make, mode, decoupled):
    plain, model = make(), make(pos_interpolation=mode, pos_interpolation_decoupled=decoupled)
    for rows, columns in SMALL:
        assert torch.equal(run(model, rows, columns), run(plain, rows, columns))


@every_mode
@decoupled_or_not
def test_samples_up_to_the_trained_size_are_the_trained_ones(mode, decoupled):
    pipe = tiny_pipeline()
    call = {"class_labels": [1], "num_inference_steps": 1, "output_type": "latent"}
    for size in ({}, {"height": 8}):
        pipe.set_pos_interpolation("none")
        expected = pipe(generator=torch.Generator().manual_seed(0), **size, **call).images
        pipe.set_pos_interpolation(mode, decoupled)
        assert torch.equal(pipe(generator=torch.Generator().manual_seed(0), **size, **call).images, expected)


@pytest.mark.parametrize("mode", POS_INTERPOLATIONS)
def test_a_scale_of_1_changes_no_frequency(mode):
    frequencies = 10000 ** -torch.linspace(0, 1, 9)[:-1]
    assert torch.equal(interpolate_frequencies(frequencies, 1.0, mode, 16), frequencies)
    assert attention_factor(1.0, mode) == 1


# -------------------------------------------------------------------------------------------------------- by formula


@pytest.mark.parametrize(
    ("rows", "columns", "decoupled", "expected"),
    [
        (16, 16, False, (1, 1)),
        (32, 32, False, (2, 2)),
        (32, 32, True, (2, 2)),
        (8, 24, False, (1.5, 1.5)),
        (24, 8, False, (1.5, 1.5)),
        (8, 24, True, (1, 1.5)),
        (24, 8, True, (1.5, 1)),
        (20, 40, True, (1.25, 2.5)),
        (4, 2, False, (1, 1)),
        (4, 2, True, (1, 1)),
    ],
)
def test_grid_scales(rows, columns, decoupled, expected):
    assert grid_scales(rows, columns, 16, decoupled) == expected


def yarn_keeps(index: int, num: int, trained_size: int) -> float:
    """From 1 at the last index of at least 32 rotations to 0 at the first of at most one, in fp64."""
    rotations = [trained_size * 10000.0 ** (-i / num) / (2 * math.pi) for i in range(num)]
    low = max((i for i in range(num) if rotations[i] >= 32), default=0)
    high = min((i for i in range(num) if rotations[i] <= 1), default=num - 1)
    if high <= low:
        return float(index <= low)
    return min(max((high - index) / (high - low), 0.0), 1.0)


def frequencies_of(mode: str, num: int, scale: float, trained_size: int) -> torch.Tensor:
    """An axis's frequencies, as the papers have them, in fp64."""
    dim, base = 2 * num, 10000.0
    if mode == "ntk" and dim > 2:
        base *= scale ** (dim / (dim - 2))
    found = []
    for index in range(num):
        frequency = base ** (-2 * index / dim)
        kept = {"none": 1.0, "linear": 0.0, "ntk": 1.0}.get(mode)
        if kept is None:
            kept = yarn_keeps(index, num, trained_size)
        found.append((1 - kept) * frequency / scale + kept * frequency)
    return torch.tensor(found, dtype=torch.float64)


@every_mode
@both_positions
@pytest.mark.parametrize(("trained_size", "scale"), [(4, 2.0), (16, 1.25), (64, 1.5), (300, 1.1)])
@pytest.mark.parametrize("dim", [8, 32])
def test_positions_agree_with_their_formula(positions, mode, trained_size, scale, dim):
    rows, columns = round(trained_size * scale), 2
    frequencies = frequencies_of(mode, dim // 4, scale, trained_size)
    row, column = torch.arange(rows)[:, None, None], torch.arange(columns)[None, :, None]
    angles = torch.stack([(row * frequencies).expand(-1, columns, -1), (column * frequencies).expand(rows, -1, -1)], 2)
    is_sharpened = mode == "yarn" and positions is rope
    factor = 1 + 0.1 * math.log(scale) if is_sharpened else 1.0
    expected = torch.polar(torch.full_like(angles, factor), angles)
    actual = positions(rows, columns, mode, trained_size=trained_size, dim=dim)
    torch.testing.assert_close(actual, expected.to(torch.complex64), rtol=0, atol=1e-6 * rows + 1e-6)
    assert_differ(actual, positions(rows, columns, trained_size=trained_size, dim=dim))


@both_positions
@decoupled_or_not
def test_linear_interpolation_puts_twice_as_many_positions_into_the_trained_range(positions, decoupled):
    doubled = positions(8, 8, "linear", decoupled)
    assert_near(doubled[::2, ::2], positions(4, 4))
    assert_near(doubled[1::2, ::2, 0] ** 2, positions(8, 8)[1::2, ::2, 0])  # half of the angle


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_scale():
    frequencies = 10000 ** -(torch.arange(8) / 8)
    ratio = interpolate_frequencies(frequencies, 3.0, "ntk", 16) / frequencies
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 1 / 3]))
    assert (ratio.diff() < 0).all()
    new_base = 10000 * 3 ** (16 / 14)
    torch.testing.assert_close(frequencies * ratio, new_base ** -(torch.arange(8) / 8))


def test_yarn_divides_what_turns_less_than_once_and_keeps_what_turns_32_times():
    frequencies = 10000 ** -(torch.arange(8) / 8)
    rotations = 1000 * frequencies / (2 * math.pi)
    assert [round(float(number)) for number in rotations] == [159, 50, 16, 5, 2, 1, 0, 0]
    assert rotations[4] > 1 > rotations[5]
    ratio = interpolate_frequencies(frequencies, 2.0, "yarn", 1000) / frequencies
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5]))
    # FiT's 16 tokens along an axis of 32 numbers.
    kept = interpolate_frequencies(10000 ** -(torch.arange(16) / 16), 2.0, "yarn", 16) * 10000 ** (
        torch.arange(16) / 16
    )
    torch.testing.assert_close(kept, torch.tensor([1.0, 0.75, *[0.5] * 14]))


def test_only_yarn_sharpens_the_attention():
    assert attention_factor(math.e, "yarn") == pytest.approx(1.1)
    for mode in ("none", "linear", "ntk"):
        assert attention_factor(math.e, mode) == 1


@every_mode
@decoupled_or_not
def test_the_length_of_rotations_is_the_attention_factor_of_the_axis(mode, decoupled):
    rotations = rope(8, 6, mode, decoupled)
    for axis in range(2):  # one for both axes, that of the longer side
        factor = 1 + 0.1 * math.log(2) if mode == "yarn" else 1.0
        assert_near(rotations[:, :, axis].abs(), torch.full((8, 6, 8), factor))
    assert_near(sincos(8, 6, mode, decoupled).abs(), torch.ones(8, 6, 2, 8))  # that of the LEM is added, not turned by


# --------------------------------------------------------------------------------------------------------- decoupled


@every_mode
@both_positions
def test_decoupled_axes_are_those_of_square_grids_of_their_own(positions, mode):
    wide = positions(6, 8, mode, True)
    for other, rows, columns in ((wide, 6, 8), (positions(8, 6, mode, True), 8, 6)):
        assert_near(turns(other[:, :, 0]), turns(positions(rows, rows, mode)[:, :1, 0].expand(-1, columns, -1)))
        assert_near(turns(other[:, :, 1]), turns(positions(columns, columns, mode)[:1, :, 1].expand(rows, -1, -1)))
    coupled = positions(6, 8, mode)
    assert_near(coupled, positions(8, 8, mode)[:6])  # both as the longer side
    assert_near(positions(8, 6, mode), positions(8, 8, mode)[:, :6])
    assert_differ(coupled[:, :, 0], wide[:, :, 0])
    assert torch.equal(coupled[:, :, 1], wide[:, :, 1])


@every_mode
@both_positions
def test_a_decoupled_side_within_the_trained_size_is_the_trained_one(positions, mode):
    for rows, columns, axis in ((4, 8, 0), (8, 3, 1)):
        decoupled, plain = positions(rows, columns, mode, True), positions(rows, columns)
        assert_near(turns(decoupled[:, :, axis]), plain[:, :, axis])
        if mode != "yarn":
            assert torch.equal(decoupled[:, :, axis], plain[:, :, axis])
        assert_differ(decoupled[:, :, 1 - axis], plain[:, :, 1 - axis])
        assert_differ(positions(rows, columns, mode)[:, :, axis], plain[:, :, axis])


@every_mode
@both_models
def test_models_tell_decoupled_from_coupled_on_oblong_grids_only(make, mode):
    coupled, decoupled = (make(pos_interpolation=mode, pos_interpolation_decoupled=choice) for choice in (False, True))
    assert torch.equal(run(coupled, 8, 8), run(decoupled, 8, 8))
    for rows, columns in ((4, 8), (8, 4), (6, 8)):
        assert_differ(run(coupled, rows, columns), run(decoupled, rows, columns))


# ------------------------------------------------------------------------------------------------------------ models


@both_models
def test_every_mode_makes_an_output_of_its_own_on_a_larger_grid(make):
    """With 64 trained rows YaRN keeps a part of the highest frequencies."""
    model, outputs = make(sample_size=128), []
    for mode in POS_INTERPOLATIONS:
        model.set_pos_interpolation(mode)
        outputs.append(run(model, 80, 2))
        assert outputs[-1].isfinite().all()
        for other in outputs[:-1]:
            assert_differ(outputs[-1], other)
    model.set_pos_interpolation()
    assert torch.equal(run(model, 80, 2), outputs[0])


@every_mode
def test_both_halves_of_the_latent_embedder_interpolate(mode):
    embedder, latents = tiny_latent_embedder(), normal(1, 4, 16, 16)
    tokens, prior = embedder.encode(latents), embedder.decode(normal(1, 4, 8), 16, 16)
    embedder.set_pos_interpolation(mode)
    assert_differ(embedder.encode(latents), tokens)
    assert_differ(embedder.decode(normal(1, 4, 8), 16, 16), prior)


@every_mode
def test_the_trained_size_is_counted_in_tokens(mode):
    """16 latent pixels are 8 tokens of 2 and 4 of 4, the trained number for a model of that size alone."""
    latents, call = normal(1, 4, 16, 16), (400.0, LABELS[:1])
    for patch_size, sample_size in ((2, 16), (4, 16), (2, 8), (4, 8)):
        model = tiny_transformer(patch_size=patch_size, sample_size=sample_size)
        plain = model(latents, *call).sample
        model.set_pos_interpolation(mode)
        assert torch.equal(model(latents, *call).sample, plain) == (sample_size == 16)


@every_mode
@decoupled_or_not
def test_an_axis_of_one_frequency(mode, decoupled):
    model = tiny_transformer(num_attention_heads=8, attention_head_dim=4)
    embedder = tiny_latent_embedder(latent_token_dim=4)
    plain = run(model, 8, 8)
    for each in (model, embedder):
        each.set_pos_interpolation(mode, decoupled)
        assert run(each, 8, 8).isfinite().all()
    # 1 is the highest frequency, which only linear interpolation divides.
    expected = torch.full((8, 8, 2, 1), 0.5 if mode == "linear" else 1.0)
    frequencies = rope(8, 8, mode, decoupled, dim=4)[1:2, 1:2].angle().expand(8, 8, 2, 1)
    assert_near(frequencies, expected)
    assert torch.allclose(run(model, 8, 8), plain, atol=1e-5) == (mode == "ntk")  # YaRN sharpens the attention


@every_mode
def test_a_model_in_bf16_has_positions_in_fp32(mode):
    model = tiny_transformer(pos_interpolation=mode).to(torch.bfloat16)
    seen = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    output = model(normal(2, 4, 16, 16), 400.0, LABELS).sample
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert torch.equal(seen[0], DoDRotaryPosEmbed(16)(8, 8, CPU, 4, mode))


# ------------------------------------------------------------------------------------------------------------ config


def choice_of(model) -> tuple[str, bool]:
    return model.config.pos_interpolation, model.config.pos_interpolation_decoupled


@both_models
def test_the_choice_is_part_of_the_config(make, tmp_path):
    model = make()
    assert choice_of(model) == ("none", False)
    assert choice_of(make(pos_interpolation="yarn", pos_interpolation_decoupled=True)) == ("yarn", True)
    model.set_pos_interpolation("ntk", True)
    assert choice_of(model) == ("ntk", True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert choice_of(loaded) == ("ntk", True)
    assert_near(run(loaded, 6, 8), run(model, 6, 8))
    assert choice_of(type(model).from_pretrained(tmp_path, pos_interpolation="linear")) == ("linear", True)
    model.set_pos_interpolation("linear")
    assert choice_of(model) == ("linear", False)
    model.set_pos_interpolation()
    assert choice_of(model) == ("none", False)


@both_models
def test_a_model_made_from_the_config_has_the_choice(make):
    model = make()
    model.set_pos_interpolation("ntk", True)
    assert choice_of(type(model).from_config(model.config)) == ("ntk", True)


class Pooling(DoDModelMixin):
    """A model without positions."""

    @register_to_config
    def __init__(self, patch_size: int = 2):
        super().__init__()


def test_models_without_positions_save_no_choice(tmp_path):
    pipe = tiny_pipeline()
    pipe.register_modules(latent_embedder=Pooling())
    pipe.set_pos_interpolation("ntk", True)
    assert choice_of(pipe.transformer) == ("ntk", True)
    pipe.latent_embedder.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name for name in saved if name[0] != "_"} == {"patch_size"}


@pytest.mark.parametrize("has_embedder", [True, False])
def test_a_pipeline_chooses_for_all_its_models(has_embedder, tmp_path):
    pipe = tiny_pipeline() if has_embedder else tiny_pipeline(latent_embedder=None)
    pipe.set_pos_interpolation("yarn", True)
    pipe.save_pretrained(tmp_path)
    for each in (pipe, DoDPipeline.from_pretrained(tmp_path)):
        assert choice_of(each.transformer) == ("yarn", True)
        assert not has_embedder or choice_of(each.latent_embedder) == ("yarn", True)
    pipe.set_pos_interpolation()
    assert choice_of(pipe.transformer) == ("none", False)
    assert not has_embedder or choice_of(pipe.latent_embedder) == ("none", False)


@every_mode
def test_larger_images_of_a_pipeline_depend_on_both_models(mode):
    pipe = tiny_pipeline()

    def sample():
        generator = torch.Generator().manual_seed(0)
        sizes = {"height": 32, "width": 16, "num_inference_steps": 1}
        return pipe([1], generator=generator, output_type="latent", return_stages=True, **sizes).stages

    plain = sample()
    pipe.set_pos_interpolation(mode)
    both = sample()
    assert all(stage.isfinite().all() for stage in both)
    pipe.latent_embedder.set_pos_interpolation()
    backbone_only = sample()
    assert torch.equal(both[0], backbone_only[0])
    for first, second in ((both[0], plain[0]), (both[1], plain[1]), (both[1], backbone_only[1])):
        assert_differ(first, second)
    pipe.set_pos_interpolation()
    assert all(torch.equal(stage, other) for stage, other in zip(sample(), plain, strict=True))


BAD = [
    (
        {"pos_interpolation": "cubic"},
        ValueError,
        ["`pos_interpolation`", "'none', 'linear', 'ntk', 'yarn'", "'cubic'"],
    ),
    ({"pos_interpolation": None}, ValueError, ["`pos_interpolation`", "'none', 'linear', 'ntk', 'yarn'", "None"]),
    ({"pos_interpolation_decoupled": 1}, TypeError, ["`pos_interpolation_decoupled`", "bool", "got 1"]),
    ({"pos_interpolation_decoupled": None}, TypeError, ["`pos_interpolation_decoupled`", "bool", "got None"]),
    (
        {"pos_interpolation": "ntk", "pos_interpolation_decoupled": "yes"},
        TypeError,
        ["`pos_interpolation_decoupled`", "bool", "'yes'"],
    ),
]


@pytest.mark.parametrize(("kwargs", "error", "fragments"), BAD)
def test_bad_values_are_refused_and_change_nothing(kwargs, error, fragments):
    for make in (tiny_transformer, tiny_latent_embedder):
        with pytest.raises(error, match=says(*fragments)):
            make(**kwargs)
    pipe = tiny_pipeline()
    pipe.set_pos_interpolation("linear", True)
    for each in (pipe, pipe.transformer, pipe.latent_embedder):
        with pytest.raises(error, match=says(*fragments)):
            each.set_pos_interpolation(**kwargs)
    assert choice_of(pipe.transformer) == choice_of(pipe.latent_embedder) == ("linear", True)


# ------------------------------------------------------------------------------------------------------- compilation


@every_mode
@both_positions
def test_one_graph_serves_every_larger_grid(positions, mode, fresh_compiler):
    rotary = DoDRotaryPosEmbed(DIM)

    def positions_of(grid):
        if positions is rope:
            return rotary(*grid.shape, CPU, 4, mode, True)
        return sincos_pos_embed(DIM, *grid.shape, CPU, torch.float32, 4, mode, True)

    counter = CompileCounter()
    compiled = torch.compile(positions_of, fullgraph=True, backend=counter, dynamic=True)
    for size in ((8, 12), (6, 9), (10, 14)):
        torch.testing.assert_close(compiled(torch.empty(size)), positions_of(torch.empty(size)))
    assert counter.frame_count == 1


def test_a_compiled_model_follows_every_choice(fresh_compiler):
    model = tiny_transformer(num_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = []
    for mode in POS_INTERPOLATIONS:
        compiled.set_pos_interpolation(mode)
        outputs.append(run(compiled, 8, 8))
        assert_near(outputs[-1], run(model, 8, 8))
        for other in outputs[:-1]:
            assert_differ(outputs[-1], other)


@both_models
def test_a_model_that_was_run_with_fake_tensors_is_copied_and_pickled(make):
    model = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        run(model, 4, 6)
    expected = run(model, 4, 6)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, 4, 6), expected)
