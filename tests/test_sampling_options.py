# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Options of the pipeline's call, in manifests and on cards: both have all of them."""

import pytest
from helpers import tiny_pipeline

from diffusers_dod.cards import to_eval_results
from diffusers_dod.evaluation.sample import SamplingOptions, sample_settings
from diffusers_dod.options import list_options, parse_options
from diffusers_dod.results import as_metric
from diffusers_dod.sampling_options import CallOptions


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder)
    argv = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(folder / "samples")]
    return sample_settings(parse_options(SamplingOptions, argv), pipeline)


@pytest.mark.parametrize("name", list_options(CallOptions))
def test_an_option_of_the_call_is_in_manifests_and_on_cards(name, settings):
    assert name in settings
    results = {"task": "evaluate", "data": {"name": "samples"}, "metrics": {"fid": as_metric(3.0)}}
    for value, shown in ((7, "7"), ([7, 8], "7 8")):
        (of_command,) = to_eval_results(results | {"settings": {name: value}})
        assert of_command.metric_config == f"{name} {shown}"
        samples = {"samples": {"manifest": {"settings": {name: value}}}}
        (of_samples,) = to_eval_results(results | {"settings": {}, "data": results["data"] | samples})
        assert of_samples.metric_config == f"{name} {shown}"
