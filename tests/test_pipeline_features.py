"""What Diffusers promises of a pipeline, for one whose stages share a transformer: caches, offloading, LoRA, ..."""

import itertools
import re

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from helpers import assert_near, says, tiny_latent_embedder, tiny_pipeline, tiny_transformer, tiny_vae

from diffusers_dod import DoDFlowMatchScheduler, DoDPipeline, Guidance
from diffusers_dod.guidance import NULL_CONDITIONS


LABELS = [1, 3]
IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5))
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def sample(pipe: DoDPipeline, class_labels=LABELS, seed: int = 0, **kwargs) -> torch.Tensor:
    """The latents of the last stage, or with `output_type="pt"` the images."""
    generator = kwargs.pop("generator", None) or torch.Generator().manual_seed(seed)
    return pipe(class_labels, **{"output_type": "latent", "generator": generator, **kwargs}).images


@pytest.fixture
def log(caplog):
    """What Diffusers logs; its loggers do not hand on to the root unless they are told to."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


# ----------------------------------------------------------------------------------------------------------- caches

ALL, FIRST, NONE = [0, 1, 2, 3], [0], []  # blocks whose attention is computed
SKIP_ALWAYS = FirstBlockCacheConfig(threshold=1e6)


@pytest.fixture
def deep_pipe():
    return tiny_pipeline(transformer=tiny_transformer(num_layers=4))


def record_blocks(pipe: DoDPipeline) -> list[list[int]]:
    """For every later evaluation of the transformer, the blocks whose attention is computed in it."""
    evaluations = []
    pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append([]))
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn.to_q.register_forward_hook(lambda *_, index=index: evaluations[-1].append(index))
    return evaluations


def test_first_block_cache_starts_anew_in_every_stage(deep_pipe):
    evaluations = record_blocks(deep_pipe)
    deep_pipe.transformer.enable_cache(SKIP_ALWAYS)
    sample(deep_pipe, num_stages=3, num_inference_steps=3)
    assert evaluations == [ALL, FIRST, FIRST] * 3


@pytest.mark.parametrize(
    ("stage_1", "later", "replacement", "when"),
    [
        (1.0, 3.0, ("_guidance_scale", 1.0), 5),
        (1.0, 1.0, ("_guidance_scale", 3.0), 5),
        (3.0, 3.0, ("_guidance_scale", 1.0), 1),
    ],
    ids=["stops in stage 2", "starts in stage 2", "stops in stage 1"],
)
def test_first_block_cache_starts_anew_when_guidance_does(deep_pipe, stage_1, later, replacement, when):
    evaluations = record_blocks(deep_pipe)
    deep_pipe.transformer.enable_cache(SKIP_ALWAYS)

    def callback(pipe, step_index, timestep, kwargs):
        if step_index == when:
            setattr(pipe, *replacement)

    sample(
        deep_pipe,
        num_inference_steps=4,
        guidance_scale=[stage_1, later],
        callback_on_step_end=callback,
    )
    expected = [ALL, FIRST, FIRST, FIRST] * 2
    expected[when + 1] = ALL
    assert evaluations == expected


def test_first_block_cache_is_not_revived_when_guidance_pauses(deep_pipe):
    evaluations = record_blocks(deep_pipe)
    deep_pipe.transformer.enable_cache(SKIP_ALWAYS)

    def callback(pipe, step_index, timestep, kwargs):
        pipe._guidance_scale = 1.0 if step_index == 0 else 3.0

    sample(deep_pipe, image=IMAGE, num_inference_steps=4, guidance_scale=3.0, callback_on_step_end=callback)
    assert evaluations == [ALL, ALL, ALL, FIRST]  # guided, not, guided again: what was kept is two steps old


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_first_block_cache_under_other_solvers(solver):
    scheduler = DoDFlowMatchScheduler(solver=solver, rtol=1e-2, atol=1e-2)
    pipe = tiny_pipeline(transformer=tiny_transformer(num_layers=4), scheduler=scheduler)
    evaluations, inputs = record_blocks(pipe), record_inputs(pipe)
    pipe.transformer.enable_cache(SKIP_ALWAYS)
    assert sample(pipe).isfinite().all()
    # It starts anew in every stage, and when a sample that is done leaves the batch.
    batches = [(batch_size, priors is not None) for batch_size, priors in inputs]
    is_new = [index == 0 or batch != batches[index - 1] for index, batch in enumerate(batches)]
    assert evaluations == [ALL if new else FIRST for new in is_new]
    assert evaluations.count(FIRST) > evaluations.count(ALL) >= 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_first_block_cache_with_threshold_zero_changes_nothing(deep_pipe, guidance_scale):
    scales = {"guidance_scale": [guidance_scale, guidance_scale]}
    expected = sample(deep_pipe, num_inference_steps=4, **scales)
    evaluations = record_blocks(deep_pipe)
    deep_pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample(deep_pipe, num_inference_steps=4, **scales), expected)
    assert evaluations == [ALL] * 8


def pyramid(pipe: DoDPipeline, timesteps: tuple[int, int]) -> PyramidAttentionBroadcastConfig:
    """Every second attention is computed while the time is between those two."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=timesteps,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


CACHES = {
    "first block": (lambda pipe: SKIP_ALWAYS, [ALL, FIRST, FIRST]),
    "pyramid": (lambda pipe: pyramid(pipe, (-1, 1001)), [ALL, NONE, ALL]),
    "taylorseer": (
        lambda pipe: TaylorSeerCacheConfig(
            cache_interval=4, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
        ),
        [ALL, NONE, ALL],
    ),
    "mag": (
        lambda pipe: MagCacheConfig(
            threshold=1e6, num_inference_steps=9, retention_ratio=0.0, mag_ratios=[1.0] * 9, max_skip_steps=9
        ),
        [ALL, NONE, NONE],
    ),
}


@pytest.mark.parametrize("cache", CACHES)
# Stages of the same batch size are the ones that could take over what a cache holds of another unnoticed.
@pytest.mark.parametrize("first_scale", [1.0, 3.0])
def test_every_cache_belongs_to_its_stage_and_its_call(deep_pipe, cache, first_scale):
    kwargs = {"num_inference_steps": 3, "guidance_scale": [first_scale, 3.0]}
    plain = sample(deep_pipe, **kwargs)
    config, expected = CACHES[cache]
    evaluations = record_blocks(deep_pipe)
    deep_pipe.transformer.enable_cache(config(deep_pipe))
    images = sample(deep_pipe, **kwargs)
    assert evaluations == expected * 2
    assert not torch.allclose(images, plain, atol=1e-3)
    assert torch.equal(sample(deep_pipe, **kwargs), images)
    single = sample(deep_pipe, [1], latents=[noise[:1] for noise in drawn()], **kwargs)
    assert_near(single, images[:1], atol=1e-4)  # products of other sizes round otherwise
    assert evaluations == expected * 6

    deep_pipe.transformer.disable_cache()
    assert torch.equal(sample(deep_pipe, **kwargs), plain)
    assert evaluations == expected * 6 + [ALL] * 6


def drawn() -> list[torch.Tensor]:
    """The noise of both stages that `sample` draws by default."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("last_step", [0, 4])
def test_nothing_leaks_out_of_a_call_that_failed(deep_pipe, cache, last_step):
    config, expected = CACHES[cache]
    deep_pipe.transformer.enable_cache(config(deep_pipe))
    kwargs = {"num_inference_steps": 3, "guidance_scale": 1.0}
    images = sample(deep_pipe, **kwargs)

    def callback(pipe, step_index, timestep, kwargs):
        if step_index == last_step:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sample(deep_pipe, seed=1, callback_on_step_end=callback, **kwargs)
    evaluations = record_blocks(deep_pipe)
    assert torch.equal(sample(deep_pipe, **kwargs), images)
    assert evaluations == expected * 2


@pytest.mark.parametrize("num_train_timesteps", [1000, 100])
def test_current_timestep_is_the_time_that_the_model_sees(num_train_timesteps):
    scheduler = DoDFlowMatchScheduler(num_train_timesteps=num_train_timesteps)
    pipe = tiny_pipeline(transformer=tiny_transformer(num_layers=4), scheduler=scheduler)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(float(pipe.current_timestep)))
    evaluations = record_blocks(pipe)
    pipe.transformer.enable_cache(pyramid(pipe, (100, 600)))
    sample(pipe, num_inference_steps=4)
    assert seen == [1000, 750, 500, 250] * 2
    assert evaluations == [ALL, ALL, ALL, NONE] * 2  # the second is computed as its time is not in the range
    assert pipe.current_timestep is None


def test_current_timestep_is_one_number_though_samples_have_times_of_their_own():
    pipe = tiny_pipeline(
        transformer=tiny_transformer(num_layers=4), scheduler=DoDFlowMatchScheduler(solver="dopri5", rtol=1e-2)
    )
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(pipe.current_timestep.shape))
    sample(pipe)
    assert set(seen) == {()}
    pipe.transformer.enable_cache(pyramid(pipe, (-1, 1001)))  # compares it with the ends of its range
    assert sample(pipe).isfinite().all()


# ------------------------------------------------------------------------------------------- several images per label


def test_images_of_a_label_follow_each_other(pipe):
    labels = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(args[2].tolist()), with_kwargs=True
    )
    images = sample(pipe, ["goldfish", 3], num_images_per_label=2, guidance_scale=1.0, num_inference_steps=1)
    assert images.shape == (4, 4, 8, 8) and labels == [[1, 1, 3, 3]] * 2
    assert torch.equal(images, sample(pipe, [1, 1, 3, 3], guidance_scale=1.0, num_inference_steps=1))
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(images[i], images[j], atol=1e-2)
    assert len(pipe(4, num_images_per_label=3, num_inference_steps=1).images) == 3


def test_every_image_of_a_label_has_its_own_generator(pipe):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    images = sample(pipe, num_images_per_label=2, generator=generators())
    assert torch.equal(images, sample(pipe, [1, 1, 3, 3], generator=generators()))
    for i, label in enumerate([1, 1, 3, 3]):
        assert_near(images[i : i + 1], sample(pipe, [label], seed=i))
    with pytest.raises(ValueError, match=says("`generator`", "a list of 4", "got a list of 2")):
        sample(pipe, num_images_per_label=2, generator=generators()[:2])
    with pytest.raises(ValueError, match=says("`latents`", "(4, 4, 8, 8)", "got (2, 4, 8, 8)")):
        sample(pipe, num_images_per_label=2, latents=torch.zeros(2, 4, 8, 8))


def test_all_images_of_a_label_share_its_image(pipe):
    given = [IMAGE, IMAGE.flip(1)]
    embedded, calls = [], record_inputs(pipe)
    pipe.latent_embedder.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(args[0]), with_kwargs=True
    )
    images = sample(pipe, image=given, num_images_per_label=2)
    assert [len(latents) for latents in embedded] == [2]  # each image once
    _, priors = calls[0]
    assert len(priors) == 4
    assert torch.equal(priors[0], priors[1]) and torch.equal(priors[2], priors[3])
    assert not torch.allclose(priors[1], priors[2], atol=1e-2)
    assert_near(images, sample(pipe, [1, 1, 3, 3], image=[given[0], given[0], given[1], given[1]]))
    assert_near(sample(pipe, image=IMAGE, num_images_per_label=2), sample(pipe, [1, 1, 3, 3], image=IMAGE))
    with pytest.raises(ValueError, match=says("`image`", "1 or 2 images (one per label)", "got 4")):
        sample(pipe, image=given * 2, num_images_per_label=2)


# ------------------------------------------------------------------------------------------------------- offloading


class Residency:
    """
    Which models Accelerate's hooks have on the accelerator, with a CPU in its place.

    On the CPU nothing moves, so the hooks' two movements are replaced by notes of them, in the order of
    `accelerate.hooks.CpuOffload`: a model that is about to run sends the one before it away and comes itself.
    """

    def __init__(self, pipe: DoDPipeline, monkeypatch: pytest.MonkeyPatch):
        self.names = {id(model): name for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
        self.resident: set[str] = set()
        self.events: list[str] = []
        self.while_running: set[frozenset[str]] = set()

        def pre_forward(hook, module, *args, **kwargs):
            if hook.prev_module_hook is not None:
                hook.prev_module_hook.offload()
            self.move(module, to_accelerator=True)
            return args, kwargs

        def init_hook(hook, module):
            self.move(module, to_accelerator=False)
            return module

        monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
        monkeypatch.setattr(CpuOffload, "init_hook", init_hook)
        for model in (pipe.transformer, pipe.latent_embedder, pipe.vae.encoder, pipe.vae.decoder):
            next(model.children()).register_forward_pre_hook(
                lambda *_: self.while_running.add(frozenset(self.resident))
            )
        pipe.enable_model_cpu_offload(device="cpu")

    def move(self, module: torch.nn.Module, to_accelerator: bool) -> None:
        name = self.names[id(module)]
        if (name in self.resident) != to_accelerator:
            self.events.append(f"{'+' if to_accelerator else '-'}{name}")
        (self.resident.add if to_accelerator else self.resident.discard)(name)


MODELS_OF_A_STAGE = ["+latent_embedder", "-latent_embedder"]


@pytest.mark.parametrize("with_image", [False, True])
def test_models_that_take_turns_change_places_once(pipe, monkeypatch, with_image):
    kwargs = {"num_stages": 3, "return_stages": True, "output_type": "pt", "image": IMAGE if with_image else None}
    generator = torch.Generator().manual_seed(0)
    expected = pipe(LABELS, generator=generator, **kwargs)
    residency = Residency(pipe, monkeypatch)
    for _ in range(2):
        residency.events.clear()
        output = pipe(LABELS, generator=generator.manual_seed(0), **kwargs)
        for images, others in zip(output.stages, expected.stages, strict=True):
            assert torch.equal(images, others)
        if with_image:
            encoding_and_stage_2 = ["+vae", "-vae", "+latent_embedder", "-latent_embedder", "+transformer"]
            assert residency.events == [*encoding_and_stage_2, *MODELS_OF_A_STAGE, "-transformer", "+vae", "-vae"]
        else:
            assert residency.events == ["+transformer", *MODELS_OF_A_STAGE * 2, "-transformer", "+vae", "-vae"]
        assert not residency.resident
    assert frozenset({"transformer"}) in residency.while_running
    assert not any({"transformer", "vae"} <= models for models in residency.while_running)


def test_nothing_stays_behind_without_decoding(pipe, monkeypatch):
    residency = Residency(pipe, monkeypatch)
    sample(pipe)
    assert residency.events == ["+transformer", *MODELS_OF_A_STAGE, "-transformer"] and not residency.resident


@pytest.mark.parametrize("with_image", [False, True])
def test_hooks_are_freed_at_the_end_and_after_encoding(pipe, monkeypatch, with_image):
    events = []
    pipe.transformer.register_forward_pre_hook(lambda *_: events.append("transformer"))
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: events.append("encoder"))
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: events.append("decoder"))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: events.append("free"))
    sample(pipe, num_inference_steps=1, output_type="pt", image=IMAGE if with_image else None)
    begin = ["encoder", "free"] if with_image else ["transformer"]
    assert events == [*begin, "transformer", "decoder", "free"]


@pytest.mark.parametrize("with_image", [False, True])
def test_sequential_offload(pipe, monkeypatch, with_image):
    kwargs = {"output_type": "pt", "image": IMAGE if with_image else None}
    expected = sample(pipe, **kwargs)
    cpu_offload = accelerate.cpu_offload
    # Diffusers numbers its devices, and Accelerate does not take "cpu:0" for the CPU.
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **kwargs: cpu_offload(model, torch.device("cpu"), **kwargs)
    )
    pipe.enable_sequential_cpu_offload(device="cpu")
    models = (pipe.transformer, pipe.latent_embedder, pipe.vae)
    for _ in range(2):
        assert all(parameter.device.type == "meta" for model in models for parameter in model.parameters())
        assert_near(sample(pipe, **kwargs), expected)


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(
    "how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
)
def test_group_offload(pipe, how, with_image):
    kwargs = {"output_type": "pt", "image": IMAGE if with_image else None}
    expected = sample(pipe, **kwargs)
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, **how)
    for _ in range(2):
        assert_near(sample(pipe, **kwargs), expected)


# -------------------------------------------------------------------------------------------------------- callbacks


class Cutoff(PipelineCallback):
    """Ends guidance after a step, and notes what it was given."""

    tensor_inputs = ["latents", "class_labels"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.given = set(callback_kwargs)
        if step_index == self.config.cutoff_step_index:
            pipeline._guidance_scale = 1.0
        return callback_kwargs


class Shift(PipelineCallback):
    """Adds to the visual priors in every step."""

    tensor_inputs = ["prior_embeds"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.given = set(callback_kwargs)
        if callback_kwargs["prior_embeds"] is not None:
            callback_kwargs["prior_embeds"] = callback_kwargs["prior_embeds"] + 1
        return callback_kwargs


def record_inputs(pipe: DoDPipeline) -> list[tuple[int, torch.Tensor | None]]:
    """Batch size and visual priors of every later evaluation."""
    calls = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((len(args[0]), kwargs["prior_embeds"])), with_kwargs=True
    )
    return calls


def test_a_cutoff_callback_by_step_index(pipe):
    calls = record_inputs(pipe)
    callback = Cutoff(cutoff_step_ratio=None, cutoff_step_index=4)
    # The callback's own choice of tensors holds, whatever else is asked for.
    sample(
        pipe,
        num_inference_steps=3,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prior_embeds"],
    )
    assert callback.given == {"latents", "class_labels"}
    assert [batch_size for batch_size, _ in calls] == [2, 2, 2, 4, 4, 2]


def test_several_callbacks_see_what_the_ones_before_them_left(pipe):
    calls = record_inputs(pipe)
    first, second, third = Shift(), Shift(), Cutoff(cutoff_step_ratio=None, cutoff_step_index=3)
    callbacks = MultiPipelineCallbacks([first, second, third])
    sample(pipe, num_inference_steps=3, callback_on_step_end=callbacks)
    assert first.given == second.given == third.given == {"latents", "class_labels", "prior_embeds"}
    assert [batch_size for batch_size, _ in calls] == [2, 2, 2, 4, 2, 2]
    assert [priors is None for _, priors in calls] == [True] * 3 + [False] * 3
    for step in (4, 5):
        torch.testing.assert_close(calls[step][1], calls[step - 1][1] + 2)


def test_a_callback_that_asks_for_an_unknown_tensor_is_refused(pipe):
    class Unknown(Shift):
        tensor_inputs = ["prompt_embeds"]

    for callback in (Unknown(), MultiPipelineCallbacks([Shift(), Unknown()])):
        with pytest.raises(ValueError, match=says("`callback_on_step_end_tensor_inputs`", "got 'prompt_embeds'")):
            sample(pipe, callback_on_step_end=callback)


# ------------------------------------------------------------------------------------------------------- components


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


def load(folder, **kwargs) -> DoDPipeline:
    pipe = DoDPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("cls", [DoDPipeline, DiffusionPipeline])
def test_a_pipeline_without_its_transformer_only_encodes_and_decodes(pipe, folder, cls):
    loaded = cls.from_pretrained(folder, transformer=None)
    assert type(loaded) is DoDPipeline and loaded.transformer is None
    assert loaded.label2ids == pipe.label2ids
    latents = loaded.encode_image(IMAGE[None] * 2 - 1)
    torch.testing.assert_close(latents, pipe.encode_image(IMAGE[None] * 2 - 1))
    torch.testing.assert_close(loaded.decode_latents(latents, "pt"), pipe.decode_latents(latents, "pt"))
    for labels in ("goldfish", 3, []):
        with pytest.raises(ValueError, match=says("`transformer`", "got None")):
            loaded(labels)
    with pytest.raises(ValueError, match=says("`id2label`", "[0, 999999]", "got -1: 'owl'")):
        cls.from_pretrained(folder, transformer=None, id2label={-1: "owl"})


@pytest.mark.parametrize("cls", [DoDPipeline, DiffusionPipeline])
def test_optional_components_are_left_out(folder, cls):
    loaded = cls.from_pretrained(folder, vae=None)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vae is None and loaded.vae_scale_factor == 1
    assert sample(loaded).shape == (2, 4, 8, 8)

    loaded = cls.from_pretrained(folder, latent_embedder=None)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.latent_embedder is None and sample(loaded).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match=says("`num_stages`", "without a `latent_embedder`", "got 2")):
        sample(loaded, num_stages=2)


def test_components_make_another_pipeline(pipe):
    assert set(pipe.components) == {"transformer", "scheduler", "vae", "latent_embedder", "token_prior"}
    other = DoDPipeline(**pipe.components, id2label=dict(pipe.config.id2label), default_guidance_scale=2.0)
    other.set_progress_bar_config(disable=True)
    assert all(other.components[name] is component for name, component in pipe.components.items())
    assert torch.equal(sample(other, num_inference_steps=2), sample(pipe, num_inference_steps=2))


@pytest.mark.parametrize("cls", [DoDPipeline, DiffusionPipeline])
def test_from_pipe_shares_components_and_keeps_the_defaults(cls):
    pipe = tiny_pipeline(default_num_stages=3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    other = cls.from_pipe(pipe, scheduler=scheduler) if cls is DoDPipeline else DoDPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is DoDPipeline
    for name in ("transformer", "vae", "latent_embedder"):
        assert other.components[name] is pipe.components[name]
    assert other.scheduler is (scheduler if cls is DoDPipeline else pipe.scheduler)
    assert other.id2label == pipe.id2label
    for name in ("default_guidance_scale", "default_num_inference_steps", "default_num_stages"):
        assert other.config[name] == pipe.config[name]
    assert_near(sample(other), sample(pipe))
    other = DoDPipeline.from_pipe(pipe, latent_embedder=None, default_num_inference_steps=1)
    assert other.latent_embedder is None and other.config.default_num_inference_steps == 1


def test_a_pipeline_changes_its_dtype(pipe):
    expected = sample(pipe, output_type="pt")
    assert pipe.to(torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert {pipe.transformer.dtype, pipe.latent_embedder.dtype, pipe.vae.dtype} == {torch.bfloat16}
    images = sample(pipe, output_type="pt")
    assert images.dtype == torch.float32 and sample(pipe).dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.02
    assert sample(pipe, output_type="pt", image=IMAGE).isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("in_half", ["transformer", "latent_embedder", "vae"])
def test_every_component_may_have_a_dtype_of_its_own(pipe, folder, keyword, in_half):
    loaded = load(folder, **{keyword: {in_half: torch.bfloat16, "default": torch.float32}})
    for name in ("transformer", "latent_embedder", "vae"):
        assert getattr(loaded, name).dtype == (torch.bfloat16 if name == in_half else torch.float32)
    time_embed = loaded.transformer.time_embed
    assert {parameter.dtype for parameter in time_embed.parameters()} == {torch.float32}
    images, expected = (sample(p, output_type="pt", guidance_scale=1.0) for p in (loaded, pipe))
    assert 0 < (images - expected).abs().mean() < 0.01
    assert sample(loaded, output_type="pt", image=IMAGE).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- LoRA


def make_with_lora(components=("transformer", "latent_embedder"), seed: int = 0, **config) -> DoDPipeline:
    """A pipeline with adapters of random weights, named "default_0"."""
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    torch.manual_seed(seed)
    for name in components:
        defaults = {"r": 2, "lora_alpha": 6, "target_modules": ATTENTION_LAYERS, "init_lora_weights": False}
        getattr(pipe, name).add_adapter(peft.LoraConfig(**{**defaults, **config}), adapter_name="default_0")
    return pipe


def save_lora(pipe: DoDPipeline, folder, **kwargs) -> None:
    """Saves the adapters of the components that have one as one file, as a training script would."""
    from peft import get_peft_model_state_dict

    layers = {}
    for name in ("transformer", "latent_embedder"):
        model = getattr(pipe, name)
        if getattr(model, "peft_config", None):
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default_0")
            layers[f"{name}_lora_adapter_metadata"] = model.peft_config["default_0"].to_dict()
    DoDPipeline.save_lora_weights(folder, **layers, **kwargs)


LORA_FILE = "pytorch_lora_weights.safetensors"


def test_the_scale_of_an_adapter_survives_saving(tmp_path):
    """The scale is `lora_alpha / r`, here 2: it is in the metadata alone."""
    peft = pytest.importorskip("peft")
    adapted = make_with_lora(("transformer",), r=4, lora_alpha=8)
    save_lora(adapted, tmp_path / "whole")
    layers = peft.get_peft_model_state_dict(adapted.transformer, adapter_name="default_0")
    with pytest.warns(UserWarning, match="`transformer_lora_adapter_metadata`"):
        DoDPipeline.save_lora_weights(tmp_path / "bare", transformer_lora_layers=layers)
    images = {}
    for name in ("whole", "bare"):
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path / name)
        images[name] = sample(pipe)
    assert_near(images["whole"], sample(adapted), atol=1e-6)
    assert not torch.allclose(images["bare"], images["whole"], atol=1e-4)


COMPONENTS = [["transformer"], ["latent_embedder"], ["transformer", "latent_embedder"]]
every_choice_of_components = pytest.mark.parametrize("components", COMPONENTS, ids=" and ".join)


@every_choice_of_components
def test_adapters_of_both_components_go_through_one_file(pipe, tmp_path, components):
    base = sample(pipe)
    adapted = make_with_lora(components)
    expected = sample(adapted)
    assert not torch.allclose(expected, base, atol=1e-3)
    save_lora(adapted, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [LORA_FILE]
    weights = DoDPipeline.lora_state_dict(tmp_path)
    assert {key.split(".")[0] for key in weights} == set(components)

    for source in (tmp_path, str(tmp_path), tmp_path / LORA_FILE):
        pipe.load_lora_weights(source)
        assert pipe.get_list_adapters() == {name: ["default_0"] for name in components}
        assert all(getattr(pipe, name).peft_config["default_0"].lora_alpha == 6 for name in components)
        assert pipe.get_active_adapters() == ["default_0"]
        torch.testing.assert_close(sample(pipe), expected)
        pipe.unload_lora_weights()
        assert not any("lora" in key for name in COMPONENTS[2] for key in getattr(pipe, name).state_dict())
        assert torch.equal(sample(pipe), base)


def test_adapters_from_a_dict(pipe, tmp_path):
    adapted = make_with_lora(lora_alpha=2)
    save_lora(adapted, tmp_path, weight_name="own.safetensors")
    weights = DoDPipeline.lora_state_dict(tmp_path, weight_name="own.safetensors")
    given = dict(weights)
    pipe.load_lora_weights(given, adapter_name="mine")  # without a configuration alpha is the rank
    assert given.keys() == weights.keys()
    assert pipe.get_list_adapters() == {"transformer": ["mine"], "latent_embedder": ["mine"]}
    torch.testing.assert_close(sample(pipe), sample(adapted))
    pipe.delete_adapters("mine")
    assert torch.equal(sample(pipe), sample(tiny_pipeline()))


@every_choice_of_components
def test_fused_adapters_need_no_adapter_any_more(components):
    pipe = make_with_lora(components)
    base, adapted = sample(tiny_pipeline()), sample(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"default_0"}
    assert_near(sample(pipe), adapted)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert_near(sample(pipe), adapted)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_near(sample(pipe), adapted)  # the weights themselves have it now

    pipe, scaled = make_with_lora(components), make_with_lora(components)
    pipe.fuse_lora(lora_scale=0.5)
    scaled.set_adapters("default_0", 0.5)
    assert_near(sample(pipe), sample(scaled))
    assert not torch.allclose(sample(pipe), base, atol=1e-3)


def test_fused_components_are_chosen():
    pipe = make_with_lora()
    expected = sample(pipe)
    pipe.fuse_lora(components=["transformer"])
    assert pipe.transformer.transformer_blocks[0].attn.to_q.merged
    assert not pipe.latent_embedder.encoder_blocks[0].attn.to_q.merged
    assert_near(sample(pipe), expected)
    with pytest.raises(ValueError, match="vae"):
        pipe.fuse_lora(components=["vae"])


@every_choice_of_components
def test_weights_of_adapters(pipe, tmp_path, components):
    base = sample(pipe)
    for seed in (0, 1):
        save_lora(make_with_lora(components, seed=seed), tmp_path / str(seed))
        pipe.load_lora_weights(tmp_path / str(seed), adapter_name=f"adapter {seed}")
    images = {}
    for seed in (0, 1):
        pipe.set_adapters(f"adapter {seed}")
        images[seed] = sample(pipe)
        torch.testing.assert_close(images[seed], sample(make_with_lora(components, seed=seed)))
    pipe.set_adapters(["adapter 0", "adapter 1"], [1.0, 0.0])
    torch.testing.assert_close(sample(pipe), images[0])
    pipe.set_adapters(["adapter 0", "adapter 1"], [0.5, 0.5])
    mixed = sample(pipe)
    assert not torch.allclose(mixed, images[0], atol=1e-3) and not torch.allclose(mixed, images[1], atol=1e-3)
    pipe.set_adapters("adapter 0", 0.5)
    half = sample(pipe)
    assert not torch.allclose(half, images[0], atol=1e-3) and not torch.allclose(half, base, atol=1e-3)
    pipe.set_adapters("adapter 0")
    torch.testing.assert_close(sample(pipe, attention_kwargs={"scale": 0.5}), half)
    assert_near(sample(pipe, attention_kwargs={"scale": 0.0}), base)
    torch.testing.assert_close(sample(pipe), images[0])
    pipe.disable_lora()
    assert torch.equal(sample(pipe), base)
    pipe.enable_lora()
    torch.testing.assert_close(sample(pipe), images[0])


def test_adapters_have_weights_by_component(tmp_path):
    pipe = make_with_lora()
    save_lora(pipe, tmp_path)
    weights, metadata = DoDPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert {key.split(".")[0] for key in metadata} == {"transformer", "latent_embedder"}
    # The configuration in the file says alpha / rank = 3; weights alone have 1.
    weights = {key: weight * 3**0.5 for key, weight in weights.items() if key.startswith("transformer.")}
    only_transformer = tiny_pipeline()
    only_transformer.load_lora_weights(weights)
    pipe.set_adapters("default_0", {"transformer": 1.0, "latent_embedder": 0.0})
    assert_near(sample(pipe), sample(only_transformer))


@every_choice_of_components
def test_adapters_are_swapped_in_place(pipe, tmp_path, components):
    for seed in (0, 1):
        save_lora(make_with_lora(components, seed=seed), tmp_path / str(seed))
    pipe.load_lora_weights(tmp_path / "0", adapter_name="one")
    places = {key: parameter.data_ptr() for key, parameter in pipe.transformer.named_parameters()}
    pipe.load_lora_weights(tmp_path / "1", adapter_name="one", hotswap=True)
    assert {key: parameter.data_ptr() for key, parameter in pipe.transformer.named_parameters()} == places
    torch.testing.assert_close(sample(pipe), sample(make_with_lora(components, seed=1)))


def test_adapters_for_a_component_that_is_missing_are_refused(tmp_path):
    save_lora(make_with_lora(), tmp_path)
    pipe = tiny_pipeline(latent_embedder=None)
    with pytest.raises(ValueError, match=says("`pretrained_model_name_or_path_or_dict`", "`latent_embedder`")):
        pipe.load_lora_weights(tmp_path)
    assert not getattr(pipe.transformer, "peft_config", None)  # not one without the other
    pipe = DoDPipeline(None, DoDFlowMatchScheduler(), latent_embedder=tiny_latent_embedder(), vae=tiny_vae())
    with pytest.raises(ValueError, match=says("`pretrained_model_name_or_path_or_dict`", "`transformer`")):
        pipe.load_lora_weights(tmp_path)


def test_weights_that_are_no_adapters_are_refused(pipe, folder, tmp_path):
    foreign = {"transformer.proj_out.weight": torch.ones(1), "transformer.x.lora_A.weight": torch.ones(1)}
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for source, found in ((foreign, "'transformer.proj_out.weight'"), (file, "adaln_global"), ({}, "got none")):
        with pytest.raises(ValueError, match=says("`pretrained_model_name_or_path_or_dict`", "LoRA", found)):
            pipe.load_lora_weights(source)
    assert pipe.get_list_adapters() == {}
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        pipe.load_lora_weights(tmp_path)


def test_adapters_of_no_component_are_reported(pipe, log):
    pipe.load_lora_weights({"unet.to_q.lora_A.weight": torch.ones(2, 4), "unet.to_q.lora_B.weight": torch.ones(4, 2)})
    assert "No LoRA keys associated to DoDTransformer2DModel" in log.text
    assert pipe.get_list_adapters() == {}


def test_saving_no_adapter_is_refused(tmp_path):
    message = says("`transformer_lora_layers`", "`latent_embedder_lora_layers`", "got neither")
    with pytest.raises(ValueError, match=message):
        DoDPipeline.save_lora_weights(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_adapters_without_peft_are_refused(pipe, monkeypatch):
    monkeypatch.setattr("diffusers_dod.lora.USE_PEFT_BACKEND", False)
    with pytest.raises(ValueError, match=says("`load_lora_weights`", "pip install peft")):
        pipe.load_lora_weights({"transformer.x.lora_A.weight": torch.ones(1)})


def test_adapters_are_loaded_into_an_offloaded_pipeline(pipe, tmp_path):
    adapted = make_with_lora()
    save_lora(adapted, tmp_path)
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    pipe.load_lora_weights(tmp_path)
    for layer in (pipe.transformer.transformer_blocks[0].attn.to_q, pipe.latent_embedder.encoder_blocks[0].attn.to_q):
        assert hasattr(layer.lora_A["default_0"], "_diffusers_hook")  # the adapter comes and goes like the rest
    assert_near(sample(pipe), sample(adapted))


def test_faster_cache_is_refused_where_it_would_split_the_batch(pipe):
    settings = dict(
        spatial_attention_block_identifiers=("transformer_blocks",),
        spatial_attention_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: pipe.current_timestep,
        tensor_format="BCHW",
    )
    with pytest.raises(ValueError, match=says("`is_guidance_distilled`", "True", "got False")):
        pipe.transformer.enable_cache(FasterCacheConfig(**settings))
    assert not pipe.transformer.is_cache_enabled
    pipe.transformer.enable_cache(FasterCacheConfig(is_guidance_distilled=True, **settings))
    assert sample(pipe, num_inference_steps=4, output_type="pt").isfinite().all()


def test_components_and_parameters_make_the_same_pipeline(pipe):
    other = DoDPipeline(**pipe.components, **pipe.parameters)
    assert other.id2label == pipe.id2label and dict(other.config) == dict(pipe.config)


# ------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_have_few_graphs_over_all_calls(pipe, fresh_compiler):
    """Every guidance, three batches and two sizes, with and without guidance; a graph break is an error."""
    weak = tiny_transformer(num_layers=1)
    for part in (pipe.transformer, pipe.latent_embedder, weak):
        part.compile_repeated_blocks(backend="eager", fullgraph=True)
    guidances = [
        *(Guidance(null_condition=name) for name in NULL_CONDITIONS),
        Guidance(prior_scale=3.0),
        Guidance(channels=3, power=2.0, rescale=0.5, interval=(0.3, 0.7)),
        Guidance(cosine_threshold=0.5),
        Guidance(transformer=weak),
    ]
    for labels, side in itertools.product([[1], [1, 3, 5], [0, 1, 2, 3, 4, 5]], [16, 24]):
        for guidance, scale in [(None, 1.0), *((guidance, [2.0, 2.0]) for guidance in guidances)]:
            call = {"guidance": guidance, "guidance_scale": scale, "height": side, "width": side}
            sample(pipe, labels, schedulers="heun", **call)
        sample(pipe, labels, schedulers="dopri5", height=side, width=side)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 20
