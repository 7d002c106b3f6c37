import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_data import CONFIG, SHAPES, golden, golden_model, timestep_of
from helpers import ID2LABEL, says, tiny_pipeline, tiny_transformer, tiny_vae
from safetensors.torch import load_file, save_file

from diffusers_dod import DoDPipeline, DoDTransformer2DModel
from diffusers_dod.conversion import (
    add_prior_projection,
    dod_to_fitv2,
    fitv2_to_dod,
    infer_fitv2_config,
    load_fit_config,
    load_fitv2_checkpoint,
    main,
    reverse_time,
)


SOURCE = golden("fitv2_tiny")
IO = golden("fitv2_tiny_io")
FIT_PARAMS = {  # as FiT's own configs have them, in the size of the golden model
    "context_size": 256,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 10,
    "learn_sigma": False,
    "use_sit": True,
    "use_swiglu": True,
    "use_swiglu_large": False,
    "q_norm": "layernorm",
    "k_norm": "layernorm",
    "qk_norm_weight": False,
    "rel_pos_embed": "rope",
    "abs_pos_embed": None,
    "adaln_type": "lora",
    "adaln_lora_dim": 16,
}


def fit_config(transport=None, **changes) -> dict:
    network = {"target": "fit.model.fit_model.FiT", "params": {**FIT_PARAMS, **changes}}
    return {"diffusion": {"transport": transport or {"path_type": "Linear"}, "network_config": network}}


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def assert_same(found: dict, expected: dict, **tolerance):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=name)


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the command; returns the folder that it wrote, or its message if it refused."""

    def run(*options, source=SOURCE, name="converted", **flags):
        path = source
        if isinstance(source, dict):
            path = tmp_path / "source.safetensors"
            save_file(source, path)
        flags = {"checkpoint_path": path, "output_dir": tmp_path / name, **flags}
        try:
            main([*options, *(text for key, value in flags.items() for text in (f"--{key}", str(value)))])
        except (OSError, ValueError, SystemExit) as error:
            assert not flags["output_dir"].is_dir()  # refused before anything was written
            return capsys.readouterr().err if isinstance(error, SystemExit) else str(error)
        return flags["output_dir"]

    return run


# ------------------------------------------------------------------------------------------------------ weights


def test_reverse_time_is_exact_and_its_own_inverse():
    torch.manual_seed(0)
    weight = torch.randn(5, 256, dtype=torch.float64)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(128) / 128)
    time = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)[:, None]

    def features(t):
        return torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)], dim=1)

    torch.testing.assert_close(features(time) @ reverse_time(weight).T, features(1 - time) @ weight.T)
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight)


def test_every_weight_is_used_once():
    converted = fitv2_to_dod(SOURCE)
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in SOURCE.values())
    assert set(converted) == set(golden_model().state_dict())


@pytest.mark.parametrize("direction", ["from fitv2", "from dod"])
def test_round_trip(direction):
    if direction == "from fitv2":
        original, there, back, time = SOURCE, fitv2_to_dod, dod_to_fitv2, "t_embedder.mlp.0.weight"
    else:
        original = tiny_transformer(prior_embed_dim=None).state_dict()
        there, back, time = dod_to_fitv2, fitv2_to_dod, "time_embed.mlp.linear_1.weight"
    returned = back(there(original))
    torch.testing.assert_close(returned[time], original[time], atol=1e-6, rtol=0)
    assert_same({**returned, time: original[time]}, original)  # bit for bit: nothing else is computed but a sign


@torch.no_grad()
def test_with_priors_training_starts_from_exactly_the_fitv2():
    model = golden_model(prior_embed_dim=20)
    arguments = (IO["sq8x8.latents"], timestep_of(IO["sq8x8.t"]), IO["sq8x8.y"])
    expected = golden_model()(*arguments).sample
    torch.testing.assert_close(model(*arguments).sample, expected, atol=1e-6, rtol=0)
    prior = torch.randn(3, 16, 20)
    torch.testing.assert_close(model(*arguments, prior_embeds=prior).sample, expected, atol=1e-5, rtol=0)
    assert model.prior_proj.linear_1.weight.abs().max() > 0  # else the projection could never learn


def test_prior_projection_is_added_to_any_plain_transformer():
    plain = tiny_transformer(prior_embed_dim=None)
    extended = add_prior_projection(plain.state_dict(), 24)
    tiny_transformer(prior_embed_dim=24).load_state_dict(extended)
    assert_same({name: extended[name] for name in plain.state_dict()}, plain.state_dict())
    with pytest.raises(ValueError, match=says("`state_dict` must be without visual priors, got sample_token")):
        add_prior_projection(extended, 24)
    with pytest.raises(ValueError, match=says("`prior_embed_dim` must be an integer >= 1, got 0")):
        add_prior_projection(plain.state_dict(), 0)
    with pytest.raises(ValueError, match=says("`state_dict`", "none named 'x_embedder.weight'")):
        add_prior_projection({}, 24)


def test_missing_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"`state_dict` must hold nothing but a FiTv2 model, got also \['extra'\]"):
        fitv2_to_dod({**SOURCE, "extra": torch.zeros(1)})
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.adaLN_modulation.2.weight"):
        with pytest.raises(ValueError, match=says("`state_dict`", f"none named {name!r}")):
            fitv2_to_dod({key: weight for key, weight in SOURCE.items() if key != name})
    with pytest.raises(ValueError, match=says("`state_dict` must have blocks 0, 1,", "got blocks [1]")):
        fitv2_to_dod({key: weight for key, weight in SOURCE.items() if not key.startswith("blocks.0.")})
    with pytest.raises(ValueError, match=says("`state_dict`", "such as x_embedder.proj.weight", "got an empty one")):
        fitv2_to_dod({})
    dod = tiny_transformer().state_dict()
    with pytest.raises(
        ValueError, match=says("`state_dict`", "such as x_embedder.proj.weight", "got adaln_global.bias")
    ):
        fitv2_to_dod(dod)
    with pytest.raises(ValueError, match=says("`state_dict` must have blocks", "DoD", "got blocks []")):
        dod_to_fitv2(SOURCE)
    with pytest.raises(ValueError, match=says("`state_dict` must hold nothing but a DoD", "got also ['extra']")):
        dod_to_fitv2({**dod, "extra": torch.zeros(1)}, drop_priors=True)
    del dod["sample_token"]
    with pytest.raises(ValueError, match=says("`state_dict`", "none named 'sample_token'")):
        dod_to_fitv2(dod, drop_priors=True)


def test_errors_that_the_documentation_states(monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "conversion.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(Path(__file__).parents[1])
    exec(code, {})
    errors = [float(number) for number in re.findall(r"\d\.\de-\d+", capsys.readouterr().out)]
    stated = [float(number) for number in re.findall(r"\d\.\de-\d+", page.read_text())]
    assert len(errors) == len(stated) == 5
    assert all(error <= 2 * number for error, number in zip(errors, stated, strict=True))  # other CPUs round otherwise


# ------------------------------------------------------------------------------------------------------- shapes


def test_sizes_are_inferred_from_the_shapes():
    assert infer_fitv2_config(SOURCE, 4, sample_size=8) == {
        **CONFIG,
        "patch_size": 2,
        "in_channels": 4,
        "mlp_ratio": 4.0,
    }


@pytest.mark.parametrize(
    "config",
    [
        dict(in_channels=3, patch_size=4, sample_size=16),
        dict(num_layers=3, num_classes=7, adaln_lora_dim=5),
        *(dict(attention_head_dim=dim, mlp_ratio=ratio) for dim in (4, 12, 20) for ratio in (1.0, 2.7, 3.0, 6.0)),
    ],
    ids=str,
)
def test_every_size_survives_the_round_trip(config):
    model = tiny_transformer(prior_embed_dim=None, **config)
    weights = dod_to_fitv2(model.state_dict())
    channels = model.config.in_channels
    inferred = infer_fitv2_config(weights, 2, in_channels=channels, sample_size=model.config.sample_size)
    again = DoDTransformer2DModel(**inferred)
    again.load_state_dict(fitv2_to_dod(weights))
    for name in ("patch_size", "num_layers", "num_classes", "attention_head_dim"):
        assert again.config[name] == model.config[name]


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1152, 16), (2304, 24)])
def test_heads_follow_from_the_width_of_a_preset(width, heads):
    with torch.device("meta"):
        model = DoDTransformer2DModel(num_layers=1, num_attention_heads=4, attention_head_dim=width // 4)
        weights = dod_to_fitv2(model.state_dict())
    assert infer_fitv2_config(weights)["num_attention_heads"] == heads


def test_arguments_that_do_not_fit_the_weights_are_refused():
    with pytest.raises(
        ValueError, match=says("`num_attention_heads` must be given for a width of 64", "1152", "None")
    ):
        infer_fitv2_config(SOURCE)
    with pytest.raises(ValueError, match=says("`num_attention_heads` must divide the width 64", "got 3")):
        infer_fitv2_config(SOURCE, 3)
    with pytest.raises(ValueError, match=says("`in_channels` must be 16", "got 3")):
        infer_fitv2_config(SOURCE, 4, in_channels=3)
    with pytest.raises(ValueError, match=says("`sample_size` must be a multiple", "got 9")):
        infer_fitv2_config(SOURCE, 4, sample_size=9)
    name = "blocks.1.mlp.fc2.weight"
    with pytest.raises(ValueError, match=says("`state_dict`", f"{name} (64, 170), got (64, 169)")):
        infer_fitv2_config({**SOURCE, name: SOURCE[name][:, 1:]}, 4)


# -------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_converted_pipeline_predicts_the_velocity_of_fitv2(convert, shape):
    pipeline = DoDPipeline.from_pretrained(convert(num_attention_heads=4, sample_size=8))
    arguments = (IO[f"{shape}.latents"], timestep_of(IO[f"{shape}.t"]), IO[f"{shape}.y"])
    velocity = pipeline.transformer(*arguments).sample
    torch.testing.assert_close(velocity, -IO[f"{shape}.velocity"], atol=1e-5, rtol=0)


def test_converted_pipeline_samples_as_fitv2_does(convert):
    pipeline = DoDPipeline.from_pretrained(convert(num_attention_heads=4, sample_size=8))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae is None and pipeline.latent_embedder is None
    assert pipeline.config.default_num_stages == 1 and pipeline.config.default_guidance_scale == 1.5
    options = dict(num_inference_steps=10, latents=IO["sample.noise"], output_type="latent")
    latents = pipeline(IO["sample.y"], guidance_scale=1.0, **options).images
    torch.testing.assert_close(latents, IO["sample.euler_pts11.nocfg"], atol=5e-5, rtol=0)


def test_pipeline_gets_autoencoder_and_class_names(convert, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    names = write_json(tmp_path / "names.json", ID2LABEL)
    folder = convert(num_attention_heads=4, sample_size=8, vae=tmp_path / "vae", id2label=names)
    pipeline = DoDPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.id2label == ID2LABEL
    assert pipeline("goldfish", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_back_to_fitv2_and_to_the_same_pipeline(convert, tmp_path):
    first = convert(num_attention_heads=4, sample_size=8)
    back = convert("--to", "fitv2", source=first, name="back")
    assert_same(load_file(back / "model.safetensors"), SOURCE, atol=1e-6, rtol=0)
    alone = convert("--to", "fitv2", source=first / "transformer", name="alone")
    assert_same(load_file(alone / "model.safetensors"), load_file(back / "model.safetensors"))

    # The config that is written for FiT says what the weights do not show.
    second = convert(source=back, config=back / "config.json", sample_size=8, name="second")
    models = [DoDTransformer2DModel.from_pretrained(folder, subfolder="transformer") for folder in (first, second)]
    assert_same(models[1].state_dict(), models[0].state_dict(), atol=1e-6, rtol=0)
    assert (second / "transformer/config.json").read_text() == (first / "transformer/config.json").read_text()


@torch.no_grad()
def test_stage_1_of_a_dod_becomes_a_fitv2(convert, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "dod")
    refusal = convert("--to", "fitv2", source=tmp_path / "dod", name="fit")
    assert "`drop_priors` must be True" in refusal and "sample_token, prior_proj.linear_1.weight" in refusal

    fit = convert("--to", "fitv2", "--drop_priors", source=tmp_path / "dod", name="fit")
    plain = DoDPipeline.from_pretrained(convert(source=fit, config=fit / "config.json", sample_size=8)).transformer
    assert plain.config.prior_embed_dim is None
    latents, timestep, labels = torch.randn(3, 4, 8, 12), torch.tensor([0.0, 300.0, 1000.0]), torch.tensor([0, 7, 10])
    expected = pipeline.transformer(latents, timestep, labels).sample
    torch.testing.assert_close(plain(latents, timestep, labels).sample, expected, atol=1e-5, rtol=0)
    assert pipeline.transformer.sample_token.abs().max() > 0.1  # else it would not show whether S was folded


def test_weights_in_low_precision_are_folded_in_fp32(convert):
    half = {name: weight.bfloat16() for name, weight in SOURCE.items()}
    transformer = load_file(
        convert(source=half, num_attention_heads=4) / "transformer/diffusion_pytorch_model.safetensors"
    )
    assert_same(transformer, fitv2_to_dod({name: weight.float() for name, weight in half.items()}))


@pytest.mark.slow
def test_command_line_in_a_process_of_its_own(tmp_path):
    save_file(SOURCE, tmp_path / "fitv2.safetensors")
    command = [sys.executable, "-m", "diffusers_dod.conversion", "--checkpoint_path", "fitv2.safetensors"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--num_attention_heads", "4", "--output_dir", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "171,224 parameters: out" in done.stdout
    assert "Without a `config` the weights are taken for those of a FiTv2 at its base resolution" in done.stderr
    assert DoDPipeline.from_pretrained(tmp_path / "out").transformer.config.sample_size == 32


def test_options_of_the_other_direction_are_refused(convert):
    assert "`vae` must be given with `--to dod` only, got `--to fitv2`" in convert("--to", "fitv2", vae="x")
    assert "`drop_priors` must be given with `--to fitv2` only" in convert("--drop_priors")
    assert "`num_attention_heads` must be given for a width of 64" in convert()


def test_other_arguments_are_checked(convert, tmp_path):
    flags = dict(num_attention_heads=4, sample_size=8)
    assert "`time_shifting` must be 1, got 3.0" in convert(time_shifting=3, **flags)
    assert "`id2label` must be a readable file" in convert(id2label=tmp_path / "none.json", **flags)
    names = write_json(tmp_path / "list.json", ["tench"])
    assert "`id2label` must be a file with one object" in convert(id2label=names, **flags)
    names = write_json(tmp_path / "names.json", {"10": "null"})
    assert "`id2label` must map ids in [0, 9]" in convert(id2label=names, **flags)
    assert "none" in convert(vae=tmp_path / "none", **flags)
    (tmp_path / "file").touch()
    assert "`output_dir` must be a folder, got the file" in convert(name="file", **flags)
    assert "`pretrained_model_name_or_path` must hold" in convert("--to", "fitv2", source=tmp_path, name="fit")


# ---------------------------------------------------------------------------------------------------- FiT's config


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_fits_config_gives_the_heads(convert, tmp_path, suffix):
    config = fit_config(adaln_lora_dim=16)
    if suffix == "yaml":
        lines = [
            "diffusion:",
            "  transport:",
            "    path_type: Linear",
            "    prediction: velocity",
            "    loss_weight: null",
        ]
        lines += ["  network_config:", "    target: fit.model.fit_model.FiT", "    params:"]
        lines += [f"      {name}: {json.dumps(value)}" for name, value in FIT_PARAMS.items()]
        lines += ["accelerate:", "  optimizer:", "    params:", "      betas: ${tuple:0.9, 0.999}"]
        path = tmp_path / "config.yaml"
        path.write_text("\n".join(lines) + "\n")
    else:
        path = write_json(tmp_path / "config.json", config)
    assert load_fit_config(path) == FIT_PARAMS
    folder = convert(config=path, sample_size=8)
    model = DoDTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert model.config.num_attention_heads == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(time_shifting=2), "`time_shifting` 1, got 2"),
        (dict(custom_freqs="ntk-aware"), "`custom_freqs` 'normal', got 'ntk-aware'"),
        (dict(q_norm=None), "`q_norm` 'layernorm', got None"),
        (dict(qk_norm_weight=True), "`qk_norm_weight` False, got True"),
        (dict(adaln_type="normal"), "`adaln_type` 'lora', got 'normal'"),
        (dict(learn_sigma=True, use_sit=False), "`use_sit` True, got False; `learn_sigma` False, got True"),
        (dict(transport={"path_type": "GVP"}), "`path_type` 'Linear', got 'GVP'"),
        (dict(transport={"prediction": "noise"}), "`prediction` 'velocity', got 'noise'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_of_another_model_is_refused(convert, tmp_path, changes, message):
    path = write_json(tmp_path / "config.json", fit_config(**changes))
    assert f"`config` must be that of a FiTv2 that a DoD transformer can be: {message}" in convert(config=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(depth=3), "depth 2, got 3"),
        (dict(hidden_size=128), "hidden_size 64, got 128"),
        (dict(patch_size=4), "patch_size 2, got 4"),
        (dict(num_classes=1000), "num_classes 10, got 1000"),
        (dict(adaln_lora_dim=8), "adaln_lora_dim 16, got 8"),
        (dict(mlp_ratio=2.0), "width of the SwiGLU 170, got 85"),
        (dict(use_swiglu_large=True), "width of the SwiGLU 170, got 256"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_does_not_fit_the_weights_is_refused(convert, tmp_path, changes, message):
    path = write_json(tmp_path / "config.json", fit_config(**changes))
    assert f"`config` must fit the weights and the other arguments: {message}" in convert(config=path)


def test_missing_settings_are_fits_defaults_and_arguments_must_agree(convert, tmp_path):
    config = fit_config()
    del config["diffusion"]["network_config"]["params"]["q_norm"]
    assert "`q_norm` 'layernorm', got None" in convert(config=write_json(tmp_path / "config.json", config))
    path = write_json(tmp_path / "config.json", fit_config())
    assert "num_heads 8, got 4" in convert(config=path, num_attention_heads=8)


def test_files_that_are_no_config_are_refused(convert, tmp_path):
    path = write_json(tmp_path / "config.json", {"model": {}, "data": {}})
    assert "with `diffusion.network_config.params`" in convert(config=path)
    path.write_text("{")
    assert "`config` must be a readable file" in convert(config=path)
    path = tmp_path / "config.yaml"
    path.write_text("a: [")
    assert "`config` must be a readable file" in convert(config=path)


# ------------------------------------------------------------------------------------------------------ other models


def relative(kind: str) -> dict:
    """Weights of a tiny DiT, SiT or FiT (version 1) under their own names: width 16, one block, learned sigma."""
    shapes = {
        "t_embedder.mlp.0": (16, 256),
        "t_embedder.mlp.2": (16, 16),
        "blocks.0.attn.qkv": (48, 16),
        "blocks.0.attn.proj": (16, 16),
        "blocks.0.mlp.fc2": (16, 64),
        "blocks.0.adaLN_modulation.1": (96, 16),
        "final_layer.adaLN_modulation.1": (32, 16),
        "final_layer.linear": (16 if kind == "SiT without sigma" else 32, 16),
    }
    if kind == "FiT (version 1)":
        shapes |= {"x_embedder.proj": (16, 16), "blocks.0.mlp.fc1_g": (64, 16), "blocks.0.mlp.fc1_x": (64, 16)}
    else:
        shapes |= {"x_embedder.proj": (16, 4, 2, 2), "blocks.0.mlp.fc1": (64, 16)}
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    weights["y_embedder.embedding_table.weight"] = torch.zeros(11, 16)
    if kind != "FiT (version 1)":
        weights["pos_embed"] = torch.zeros(1, 16, 16)
    return weights


BOTH = ["an AdaLN of full rank in each block instead of a global one plus LoRA", "no QK-norm", "noise (epsilon)"]
SIGMA = "a learned sigma, so twice the channels (32 outputs per patch instead of 16)"
PLAIN = ["DiT or SiT", "a fixed sin-cos `pos_embed`", "a GELU MLP (`mlp.fc1`) instead of SwiGLU", "if a DiT, noise"]


@pytest.mark.parametrize(
    "kind, named, unnamed",
    [
        ("DiT", [*BOTH, *PLAIN, SIGMA], ["version 1"]),
        ("SiT without sigma", [*BOTH, *PLAIN], ["version 1", "sigma"]),
        ("FiT (version 1)", [*BOTH, SIGMA, "FiT (version 1)"], ["DiT", "pos_embed", "GELU"]),
    ],
)
def test_relatives_are_refused_with_all_that_differs(convert, kind, named, unnamed):
    message = convert(source=relative(kind), num_attention_heads=2)
    assert "`state_dict` must hold the weights of a FiTv2 model, got those of a " in message
    differences = message.partition("got those of a ")[2]
    assert all(text in differences for text in named) and not any(text in differences for text in unnamed)
    with pytest.raises(ValueError, match=says(*named)):
        fitv2_to_dod(relative(kind))


def test_unknown_models_are_refused_with_the_names_found(convert):
    message = convert(source={"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)})
    assert "with names such as x_embedder.proj.weight" in message and "got conv1.weight, fc.bias" in message


# ------------------------------------------------------------------------------------------------------------- files


EMA = {name: weight + 1 for name, weight in SOURCE.items()}


@pytest.mark.parametrize(
    "checkpoint, choices",
    [
        (SOURCE, {None: SOURCE}),
        ({f"module.{name}": weight for name, weight in SOURCE.items()}, {None: SOURCE}),
        ({"state_dict": SOURCE, "step": 3}, {None: SOURCE, "model": SOURCE}),
        ({"model": SOURCE, "ema": EMA, "opt": {}}, {None: EMA, "ema": EMA, "model": SOURCE}),
        ({"module": SOURCE, "ema_model": {f"_orig_mod.{n}": w for n, w in EMA.items()}}, {None: EMA, "model": SOURCE}),
        ({f"_orig_mod.module.{name}": weight for name, weight in SOURCE.items()}, {None: SOURCE}),
        ({f"module._orig_mod.{name}": weight for name, weight in SOURCE.items()}, {None: SOURCE}),
        ({"n_averaged": torch.tensor(3), **{f"module.{n}": w for n, w in SOURCE.items()}}, {None: SOURCE}),
    ],
    ids=["flat", "parallel", "state_dict", "ema", "ema_model", "compiled parallel", "parallel compiled", "averaged"],
)
@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickled_checkpoints(tmp_path, suffix, checkpoint, choices):
    path = tmp_path / f"model.{suffix}"
    torch.save(checkpoint, path)
    for weights, expected in choices.items():
        assert_same(load_fitv2_checkpoint(path, weights), expected)


def test_pickle_under_the_name_of_a_safetensors_file(tmp_path):
    torch.save(SOURCE, tmp_path / "model_ema.safetensors")
    assert_same(load_fitv2_checkpoint(tmp_path / "model_ema.safetensors"), SOURCE)


def test_folders_of_releases_and_of_training(convert, tmp_path):
    save_file(SOURCE, tmp_path / "model.safetensors")
    assert_same(load_fitv2_checkpoint(tmp_path), SOURCE)
    save_file(EMA, tmp_path / "model_1.safetensors")
    assert_same(load_fitv2_checkpoint(tmp_path), EMA)
    assert_same(load_fitv2_checkpoint(tmp_path, "model"), SOURCE)
    folder = convert(source=tmp_path, weights="model", num_attention_heads=4)
    converted = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert_same(converted, fitv2_to_dod(SOURCE))


def test_weights_that_are_not_there_are_refused(tmp_path):
    torch.save({"model": SOURCE}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("`weights` must be 'model' for", "a.pt", "got 'ema'")):
        load_fitv2_checkpoint(tmp_path / "a.pt", "ema")
    with pytest.raises(ValueError, match=says("`weights` must be one of 'ema', 'model', got 'raw'")):
        load_fitv2_checkpoint(tmp_path / "a.pt", "raw")
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("`checkpoint_path`", "ema, ema_model, model", "keys optimizer, epoch")):
        load_fitv2_checkpoint(tmp_path / "a.pt")
    torch.save({"model": {"step": 3}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("`checkpoint_path` must hold tensors only as weights", "step")):
        load_fitv2_checkpoint(tmp_path / "a.pt")
    torch.save([torch.zeros(1)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("`checkpoint_path` must hold a dict of tensors", "with a list")):
        load_fitv2_checkpoint(tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says("`checkpoint_path` must be a file or a folder with", "with nothing")):
        load_fitv2_checkpoint(tmp_path / "empty")


def test_missing_truncated_and_foreign_files_are_refused(convert, tmp_path):
    path = tmp_path / "none.safetensors"
    assert "`checkpoint_path` must be an existing file or folder, got" in convert(source=path)
    refusal = "`checkpoint_path` must be a readable file of tensors (.safetensors, .bin, .pt or .pth), got"
    save_file(SOURCE, tmp_path / "whole.safetensors")
    torch.save(SOURCE, tmp_path / "whole.bin")
    for suffix in ("safetensors", "bin"):
        whole, path = (tmp_path / f"{name}.{suffix}" for name in ("whole", "cut"))
        for content in (whole.read_bytes()[: whole.stat().st_size // 2], b"", b"\x89PNG\r\n\x1a\n" * 9):
            path.write_bytes(content)
            assert refusal in convert(source=path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_pickles_cannot_run_code(convert, tmp_path, name):
    torch.save({"model": SOURCE, "args": Malicious(str(tmp_path / "pwned"))}, tmp_path / name)
    message = convert(source=tmp_path / name)
    assert "`checkpoint_path` must be a readable file of tensors" in message and "mkdir" in message
    assert not (tmp_path / "pwned").exists()
    with open(tmp_path / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "pwned").exists()  # it would have
