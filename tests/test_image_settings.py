"""Settings in PNG files: what is written is read, and nothing else is taken for it."""

import io
import json

import pytest
from helpers import noise_image, says
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_dod.image_settings import SETTINGS_KEY, pixels_sha256, read_image_settings, save_with_settings


CHECKPOINT = {"path": "folder", "sha256": "0" * 64}


def save(path, **options):
    save_with_settings(noise_image(8, 6), path, "sample", options, checkpoint=CHECKPOINT, device="cpu")
    return path


def test_settings_come_back(tmp_path):
    path = save(tmp_path / "image.png", class_labels=["grès, \u2028"], scale=[1.0, 5.5], image=None)
    settings = read_image_settings(path)
    assert settings["options"] == {"class_labels": ["grès, \u2028"], "scale": [1.0, 5.5], "image": None}
    assert settings["checkpoint"] == CHECKPOINT and settings["versions"]["torch"]
    with Image.open(path) as image:
        assert settings["pixels_sha256"] == pixels_sha256(image) == pixels_sha256(noise_image(8, 6))
        assert list(image.info) == [SETTINGS_KEY]
    assert pixels_sha256(noise_image(6, 8)) != pixels_sha256(noise_image(8, 6))
    file = io.BytesIO()
    save(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "image.png"
    noise_image(8, 8).save(path)
    with pytest.raises(ValueError, match=says("`like` must be a PNG file", "without any")):
        read_image_settings(path, "like")
    content = save(path).read_bytes()
    path.write_bytes(content[:60])
    with pytest.raises(ValueError, match="must be a PNG file"):
        read_image_settings(path)
    noise_image(8, 8).save(path, "JPEG")
    with pytest.raises(ValueError, match="must be a PNG file"):
        read_image_settings(path)
    with pytest.raises(FileNotFoundError):
        read_image_settings(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "`format`"),
        ({"checkpoint": {"path": "folder", "sha256": "0"}}, "`checkpoint.sha256`"),
        ({"options": []}, "`options`"),
        ({"versions": {"torch": 2}}, "`versions.torch`"),
    ],
)
def test_settings_of_another_form_are_refused(tmp_path, change, message):
    path = save(tmp_path / "image.png")
    settings = read_image_settings(path) | change
    text = PngInfo()
    text.add_text(SETTINGS_KEY, json.dumps(settings))
    noise_image(8, 8).save(path, pnginfo=text)
    with pytest.raises(ValueError, match=says("must be a PNG file", message)):
        read_image_settings(path)
