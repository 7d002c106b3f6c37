"""Settings of visitors of the demo: a link restores them, and the server refuses what is out of its limits."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
import yaml
from helpers import says, tiny_pipeline

from diffusers_dod import demo
from diffusers_dod.demo import main
from diffusers_dod.demo.settings import (
    DemoOptions,
    default_settings,
    from_query,
    open_pipeline,
    parse_numbers,
    to_query,
)
from diffusers_dod.evaluation.gallery import MODES, Limits, check_settings, count_images
from diffusers_dod.options import parse_options
from diffusers_dod.results import checkpoint_sha256


ROOT = Path(__file__).parents[2]
LIMITS = Limits()


def restore(pipe, query):
    return default_settings(pipe, LIMITS, **from_query(dict(parse_qsl(query.removeprefix("?"), strict_parsing=True))))


def test_visitors_see_no_path_of_the_server(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    _, identity = open_pipeline(DemoOptions(checkpoint=str(tmp_path / "tiny"), device="cpu"))
    assert identity == {"path": "tiny", "sha256": checkpoint_sha256(tmp_path / "tiny")}


@pytest.mark.parametrize("mode", MODES)
def test_a_link_restores_all_that_a_mode_depends_on(pipe, mode):
    own = {
        "between": {"num_between": 9},
        "grid": {"grid_scales": (0.0, 1.5, 7.25), "first_scales": (1.0, 4.0)},
    }
    settings = default_settings(
        pipe,
        LIMITS,
        mode=mode,
        classes=(9, 0, 3),
        num_images=5,
        num_stages=3,
        steps=7,
        solver="heun",
        scales=(1.0, 2.5, 3.125),
        size=32,
        seed=2**32 - 1,
        **own.get(mode, {}),
    )
    assert restore(pipe, to_query(settings)) == settings


def test_a_link_is_short_and_ignores_what_is_no_setting(pipe):
    settings = default_settings(pipe, LIMITS)
    assert to_query(settings) == (
        "?mode=classes&classes=3,5&num_images=2&num_stages=2&steps=2&solver=euler&scales=1,2&seed=0"
    )
    assert restore(pipe, to_query(settings) + "&utm_source=x&__theme=dark") == settings
    assert restore(pipe, "?seed=5") == replace(settings, seed=5)


@pytest.mark.parametrize(
    "query, fragments",
    [
        ({"seed": "x"}, ["`seed`", "an integer", "'x'"]),
        ({"seed": "1.5"}, ["`seed`", "an integer"]),
        ({"scales": "1,big"}, ["`scales`", "a number", "'big'"]),
        ({"classes": "1" * 1001}, ["`classes`", "1000 characters", "1001"]),
    ],
)
def test_a_text_of_a_link_that_is_no_value_is_refused(query, fragments):
    with pytest.raises(ValueError, match=says(*fragments)):
        from_query(query)


@pytest.mark.parametrize(
    "values, fragments",
    [
        ({"mode": "all"}, ["`mode`", "'all'"]),
        ({"classes": ()}, ["`classes`", "at least one"]),
        ({"classes": (10,)}, ["`classes`", "9", "10"]),
        ({"classes": (1, 1)}, ["`classes`", "different"]),
        ({"classes": (1.5,)}, ["`classes`", "1.5"]),
        ({"num_images": 17}, ["at most 32 images", "34"]),
        ({"num_images": 0}, ["`num_images`", "0"]),
        ({"num_images": 2.5}, ["`num_images`", "2.5"]),
        ({"num_images": 10**30}, ["`num_images`"]),
        ({"mode": "grid", "grid_scales": tuple(float(scale) for scale in range(9))}, ["at most 32 images", "36"]),
        ({"mode": "between", "num_between": 33}, ["at most 32 images", "33"]),
        ({"num_stages": 5, "scales": (1.0,) * 5}, ["`num_stages`", "4", "5"]),
        ({"mode": "variations", "num_stages": 1, "scales": (1.0,)}, ["`num_stages`", "2", "1"]),
        ({"scales": (1.0,)}, ["`scales`", "2 stages"]),
        ({"scales": (1.0, 21.0)}, ["`scales`", "20", "21"]),
        ({"scales": (1.0, float("nan"))}, ["`scales`", "nan"]),
        ({"steps": 101}, ["`steps`", "100", "101"]),
        ({"solver": "dopri5"}, ["`solver`", "dopri5"]),
        ({"size": 64}, ["`size`", "32", "64"]),
        ({"seed": 2**32}, ["`seed`", str(2**32)]),
        ({"seed": -1}, ["`seed`", "-1"]),
        ({"seed": None}, ["`seed`", "None"]),
    ],
)
def test_what_is_out_of_range_or_above_the_limits_is_refused(pipe, values, fragments):
    with pytest.raises((TypeError, ValueError), match=says(*fragments)):
        check_settings(default_settings(pipe, LIMITS, **values), LIMITS, pipe)


def test_without_a_latent_embedder_there_is_one_stage():
    pipe = tiny_pipeline(latent_embedder=None)
    settings = default_settings(pipe, LIMITS)
    check_settings(settings, LIMITS, pipe)
    assert (settings.num_stages, settings.scales) == (1, (2.0,))
    with pytest.raises(ValueError, match=says("`num_stages`", "1", "2")):
        check_settings(replace(settings, num_stages=2, scales=(1.0, 1.0)), LIMITS, pipe)


@pytest.mark.parametrize("max_images", [1, 2, 3, 4])
def test_first_settings_keep_small_limits(pipe, max_images):
    limits = Limits(max_stages=1, max_inference_steps=1, max_images=max_images)
    settings = default_settings(pipe, limits)
    check_settings(settings, limits, pipe)
    assert 1 <= count_images(settings) <= max_images


def test_numbers_are_separated_by_commas_or_spaces():
    assert parse_numbers("scales", " 1, 2.5  3,") == (1.0, 2.5, 3.0)
    assert parse_numbers("scales", "") == ()


def test_the_command_refuses_a_wrong_port(capsys):
    with pytest.raises(SystemExit):
        main(["--port", "65536"])
    assert "`port` must be" in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=re.escape('pip install "diffusers-dod[demo]"')):
        main([])


def test_the_space_has_the_pinned_gradio_and_options_of_the_demo(monkeypatch):
    space = ROOT / "space"
    about = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert f"gradio=={about['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert len(about["short_description"]) <= 60 and (space / about["app_file"]).is_file()
    (wheel,) = re.findall(
        r"^\./diffusers_dod-(.*)-py3-none-any\.whl\[demo\]$", (space / "requirements.txt").read_text(), re.M
    )
    assert f'version = "{wheel}"' in (ROOT / "pyproject.toml").read_text()
    calls = []
    monkeypatch.setattr(demo, "main", calls.append)
    runpy.run_path(str(space / "app.py"), run_name="__main__")
    assert parse_options(DemoOptions, calls[0]).host == "0.0.0.0"
