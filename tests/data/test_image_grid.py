"""Grids: places of the images, and captions."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from diffusers_dod.data.image_grid import FONT_SIZE, LINE, _shorten, make_grid


ROWS = [[Image.new("RGB", (20, 10), (60 * i, 80 * j, 9)) for j in range(3 - i)] for i in range(2)]
CAPTIONS = [{}, {"title": "step 3"}, {"column_names": ["a, b", "c", "d"]}, {"row_names": ["stage 1", "stage 2"]}]
CAPTIONS.append({name: value for captions in CAPTIONS for name, value in captions.items()})


@pytest.mark.parametrize("captions", CAPTIONS)
def test_images_lie_in_the_lower_right_corner(captions):
    grid = make_grid(ROWS, scale=2, gap=4, **captions)
    left, top = grid.width - (3 * 44 - 4), grid.height - (2 * 24 - 4)
    assert top == LINE * len({"title", "column_names"} & captions.keys()) and (left > 0) == ("row_names" in captions)
    pixels = np.asarray(grid)
    for i, row in enumerate(ROWS):
        for j in range(len(row)):
            tile = pixels[top + 24 * i : top + 24 * i + 20, left + 44 * j : left + 44 * j + 40]
            assert (tile == (60 * i, 80 * j, 9)).all()
    for part in (pixels[:top], pixels[:, :left]):  # dark letters on white
        assert part.size == 0 or (part.min() < 100 and (part == 255).mean() > 0.5)


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("tench", 64, "tench"),
        ("tench, Tinca tinca", 64, "tench"),
        ("goldfish, Carassius auratus", 500, "goldfish, Carassius auratus"),
        ("W", 1, ""),
    ],
)
def test_captions_are_cut_to_their_width(text, width, expected):
    assert _shorten(text, ImageFont.load_default(FONT_SIZE), width) == expected


def test_a_long_name_keeps_its_start():
    font = ImageFont.load_default(FONT_SIZE)
    short = _shorten("hippopotamus amphibius", font, 64)
    assert short.endswith(".") and "hippopotamus".startswith(short[:-1][:8]) and font.getlength(short) <= 64
