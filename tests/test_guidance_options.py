"""Guidance on the command line, in manifests and on cards: all of them have every field of `Guidance`."""

import dataclasses
from pathlib import Path

import pytest
from helpers import says, tiny_pipeline

from diffusers_dod import Guidance
from diffusers_dod.cards import to_eval_results
from diffusers_dod.evaluation.sample import SamplingOptions, sample_settings
from diffusers_dod.evaluation.sweep import SweepOptions
from diffusers_dod.guidance_options import GUIDANCE_FIELDS, GuidanceOptions, build_guidance
from diffusers_dod.options import build_parser, list_options, parse_options, to_values
from diffusers_dod.results import as_metric, read_results, write_results


# Field -> name of its option, words of the command line and value.
OPTIONS = {
    "null_condition": ("null_condition", "prior", "prior"),
    "prior_scale": ("prior_guidance_scale", "1.5", 1.5),
    "channels": ("guidance_channels", "3", 3),
    "interval": ("guidance_interval", "0.1 0.8", (0.1, 0.8)),
    "power": ("guidance_power", "2", 2.0),
    "rescale": ("guidance_rescale", "0.5", 0.5),
    "cosine_threshold": ("guidance_cosine_threshold", "0.9", 0.9),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_the_fields_are_all_but_the_weaker_model():
    assert [*OPTIONS, "transformer"] == [field.name for field in dataclasses.fields(Guidance)]
    assert {name: field.name for name, field in GUIDANCE_FIELDS.items()} == {
        name: field for field, (name, *_) in OPTIONS.items()
    }


def test_every_field_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    documented = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert [field.name for field in dataclasses.fields(Guidance) if field.name not in documented] == []


@pytest.mark.parametrize("field", OPTIONS)
def test_a_field_is_in_commands_manifests_and_cards(field, checkpoint, tmp_path):
    name, words, value = OPTIONS[field]
    assert name in list_options(SweepOptions)
    argv = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "samples")]
    default = parse_options(SamplingOptions, argv)
    options = parse_options(SamplingOptions, [*argv, f"--{name}", *words.split()])
    assert default.guidance.to_guidance() == Guidance()
    assert options.guidance.to_guidance() == Guidance(**{field: value})

    settings = sample_settings(options, tiny_pipeline())
    as_json = list(value) if isinstance(value, tuple) else value
    assert settings[name] == as_json
    captions = []
    for number, found in enumerate((settings, sample_settings(default, tiny_pipeline()))):
        path = tmp_path / f"{number}.json"
        write_results(path, "evaluate", [], {"fid": as_metric(3.0)}, {"name": "samples"}, found, "cpu", checkpoint)
        (entry,) = to_eval_results(read_results(path))
        captions.append(entry.metric_config)
    assert f"{name} {' '.join(map(str, as_json)) if isinstance(as_json, list) else as_json}" in captions[0]
    assert name not in captions[1]  # the default goes without saying


def test_options_have_the_defaults_of_the_fields():
    assert build_guidance({}) == build_guidance(to_values(GuidanceOptions())) == Guidance()
    assert build_guidance({"guidance_scale": 3.0, "guidance_power": 2.0}) == Guidance(power=2.0)


@pytest.mark.parametrize(
    ("values", "error", "fragments"),
    [
        ({"guidance_interval": (0.8, 0.1)}, ValueError, ["`guidance_interval`", "low <= high"]),
        ({"prior_guidance_scale": -1}, ValueError, ["`prior_guidance_scale`", "got -1"]),
        ({"guidance_channels": 1.5}, TypeError, ["`guidance_channels`", "got 1.5"]),
        (
            {"null_condition": "class", "prior_guidance_scale": 2.0},
            ValueError,
            ["Only one of", "`null_condition`", "`prior_guidance_scale`"],
        ),
    ],
)
def test_errors_name_the_options(values, error, fragments):
    with pytest.raises(error, match=says(*fragments)):
        build_guidance(values)


def test_help_says_meaning_and_range_of_every_option():
    text = " ".join(build_parser(SweepOptions).format_help().split())
    for name, field in GUIDANCE_FIELDS.items():
        assert field.metadata["help"] in text and f"--{name} " in text
    assert "--guidance_interval LOW HIGH" in text
