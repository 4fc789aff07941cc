"""Image files: what is opened, and that it is read as a person sees it."""
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from official import images
from official.images import open_image


def half_and_half(mode: str = "RGB", size=(40, 20)) -> Image.Image:
    """red on the left, blue on the right"""
    image = Image.new("RGB", size, "blue")
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2 - 1, size[1]), fill="red")
    return image.convert(mode)


def mean(image: Image.Image) -> float:
    return np.asarray(image, dtype=float).mean()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_formats(tmp_path, suffix):
    half_and_half().save(tmp_path / f"x.{suffix}")
    image = open_image(tmp_path / f"x.{suffix}")
    left, right = image.getpixel((5, 10)), image.getpixel((35, 10))
    assert image.mode == "RGB" and left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]


@pytest.mark.parametrize("form", ["EPS", "PDF"])
def test_a_format_that_starts_a_program_is_refused(tmp_path, monkeypatch, form):
    """Pillow runs Ghostscript on EPS, whatever the file is called."""
    monkeypatch.setenv("PATH", str(tmp_path))
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\n: > {started}\n")
    (tmp_path / "gs").chmod(0o755)
    half_and_half().save(tmp_path / "x.png", format=form)
    with pytest.raises(ValueError, match="x.png: not a readable image"):
        open_image(tmp_path / "x.png")
    assert not started.exists()


def test_orientation_is_applied(tmp_path):
    """Cameras store the sensor's pixels and, in EXIF, how to turn them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    half_and_half().save(tmp_path / "x.jpg", exif=exif)
    image = open_image(tmp_path / "x.jpg")
    assert image.size == (20, 40) and image.getpixel((10, 5))[0] > 200 and image.getpixel((10, 35))[2] > 200


def test_deep_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "x.tiff")
    for name in ("x.png", "x.tiff"):
        assert abs(mean(open_image(tmp_path / name)) - 127.5) < 1, name


def test_transparency_is_white(tmp_path):
    clear = half_and_half("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "alpha.png")
    palette = half_and_half("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((5, 10)))  # red becomes transparent
    half_and_half().save(tmp_path / "rgb.png", transparency=(255, 0, 0))
    assert mean(open_image(tmp_path / "alpha.png")) == 255
    for name in ("palette.png", "rgb.png"):
        image = open_image(tmp_path / name)
        assert image.getpixel((5, 10)) == (255, 255, 255) and image.getpixel((35, 10))[2] > 200, name


def test_what_is_no_image_is_one_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "none.png", "."):
        with pytest.raises(FileNotFoundError, match="no such image file"):
            open_image(tmp_path / name)
    half_and_half().save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for k in range(8, len(content) - 24, 7):
        (tmp_path / "cut.png").write_bytes(content[:k])
        with pytest.raises(ValueError, match="cut.png: not a readable image"):
            open_image(tmp_path / "cut.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 700)
    with pytest.raises(ValueError, match="40 x 20 pixels, at most 700"):
        open_image(tmp_path / "x.png")
