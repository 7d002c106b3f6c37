"""What a smoothed figure averages."""

import json

import pytest
from PIL import Image, ImageChops


pytest.importorskip("matplotlib")
from diffusers_dod.training.plot_metrics import plot_metrics  # noqa: E402


@pytest.mark.parametrize(("name", "is_smoothed"), [("loss", True), ("learning_rate", False)])
def test_a_schedule_is_drawn_as_it_is(tmp_path, name, is_smoothed):
    lines = [{"step": step, name: value} for step, value in enumerate([0.0, 0.5, 1.0, 1.0])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for width in (1, 3):
        plot_metrics([tmp_path], tmp_path / f"{width}.png", smoothing=width)
    one, smooth = (Image.open(tmp_path / f"{width}.png").convert("RGB") for width in (1, 3))
    assert (ImageChops.difference(one, smooth).getbbox() is not None) == is_smoothed
