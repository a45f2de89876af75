"""Pixels, however they are stored, against the same arithmetic by hand."""

import io
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from proxbit.errors import DataError
from proxbit.training.pixels import as_rgb, extensions, read_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EndProlog\nshowpage\n%%EOF\n"
RAMP = np.tile(np.arange(256, dtype=np.uint16), (16, 1))


def stored(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def shown(image, form, **options):
    return np.asarray(read_image(stored(image, form, **options)))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_become_their_high_byte(form):
    values = Image.fromarray(RAMP * 256 + 255 - RAMP)
    assert np.array_equal(shown(values, form), np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize("scale", [1, 1 / 255])
def test_floats_are_shown_by_their_range(scale):
    values = Image.fromarray((RAMP * scale).astype(np.float32))
    assert np.array_equal(shown(values, "TIFF"), np.stack([RAMP] * 3, -1))


def test_long_integers_of_8_bits():
    assert np.array_equal(shown(Image.fromarray(RAMP.astype(np.int32)), "TIFF")[..., 1], RAMP)


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 300), (np.nan, 1), (0, np.inf)])
def test_numbers_of_an_unknown_range_are_refused(low, high):
    with pytest.raises(DataError, match="floats from .* white is not known"):
        read_image(stored(Image.fromarray(np.float32([[low, high], [0, 0.5]])), "TIFF"))
    if np.isfinite(low + high):
        with pytest.raises(DataError, match="integers from"):
            read_image(stored(Image.fromarray(np.int32([[low, 999 * high]])), "TIFF"))


def on_white(colors, alpha):
    part = alpha[..., None] / 255
    return colors * part + 255 * (1 - part)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_lie_on_white(form):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 4), np.uint8)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    found = shown(Image.fromarray(pixels), form, **options)
    assert np.abs(found - on_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    pixels[..., 3] = 0
    assert (shown(Image.fromarray(pixels), form, **options) == 255).all()


def test_other_kinds_of_transparency():
    grey = np.random.default_rng(0).integers(0, 256, (9, 8, 2), np.uint8)
    found = shown(Image.fromarray(grey, "LA"), "PNG")
    assert np.abs(found[..., :1] - on_white(grey[..., :1], grey[..., 1])).max() <= 1
    ramp = Image.fromarray(RAMP.astype(np.uint8))
    for image, clear, form in (
        (ramp, 7, "PNG"),
        (ramp.convert("P"), 7, "PNG"),
        (ramp.convert("P"), 7, "GIF"),
        (ramp.convert("RGB"), (7, 7, 7), "PNG"),
        (Image.fromarray(RAMP * 257), 7 * 257, "PNG"),
    ):
        expected = np.where(RAMP == 7, 255, RAMP)
        assert np.array_equal(shown(image, form, transparency=clear)[..., 0], expected), image.mode


def test_exif_turns_pictures_of_every_depth():
    exif = Image.Exif()
    exif[0x0112] = 6
    for values in (RAMP.astype(np.uint8), RAMP * 257):
        assert np.array_equal(shown(Image.fromarray(values), "PNG", exif=exif)[..., 0], np.rot90(RAMP, -1))


def test_two_colors_palette_and_inks():
    black = np.random.default_rng(0).random((9, 8)) < 0.5
    assert np.array_equal(shown(Image.fromarray(~black), "PNG")[..., 2], np.where(black, 0, 255))
    inks = Image.new("CMYK", (9, 8), (255, 0, 51, 0))
    assert np.abs(shown(inks, "TIFF")[0, 0].astype(int) - [0, 255, 204]).max() <= 1


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_is_shown(form):
    first, second = (Image.new("RGB", (9, 8), color) for color in ("red", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    found = shown(first, form, save_all=True, append_images=[second], **options)
    assert (found == [255, 0, 0]).all()


def bomb(side):
    """A PNG of some kB."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bomb(9_500), "more than 89,478,485 pixels"),
        (bomb(13_300), "more than 89,478,485 pixels"),
        (EPS, "not an image"),
        (b"text", "not an image"),
        (b"", "not an image"),
        (stored(Image.new("RGB", (900, 4)), "PNG"), "900 x 4 pixels, too narrow"),
        (stored(Image.new("LAB", (9, 9)), "TIFF"), "CIE Lab"),
        (stored(Image.new("RGB", (99, 99)), "BMP")[:900], "truncated"),
    ],
    ids=["warned of", "bomb", "eps", "text", "empty", "narrow", "lab", "cut"],
)
def test_what_is_not_shown_has_a_reason(content, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=words) as refused:
            read_image(content)
    assert "\n" not in str(refused.value)


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow reads EPS with the Ghostscript of PATH."""
    (tmp_path / "gs").write_text("#!/bin/sh\ntouch $0.ran\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "x.jpg").write_bytes(EPS)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    for read, ran in ((read_image, False), (lambda file: Image.open(file).load(), True)):
        with pytest.raises(Exception):  # noqa: B017
            read(tmp_path / "x.jpg")
        assert (tmp_path / "gs.ran").exists() is ran


def test_pictures_in_memory_are_shown_alike():
    image = Image.fromarray(RAMP * 257)
    assert np.array_equal(np.asarray(as_rgb(image))[..., 0], RAMP) and image.mode == "I;16"
    with pytest.raises(DataError):
        as_rgb(Image.new("LAB", (9, 9)))


def test_extensions_are_those_of_the_formats():
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".gif", ".bmp"} <= extensions()
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".h5", ".mpg", ""} & extensions()
    assert (".heic" in extensions()) is (find_spec("pillow_heif") is not None)
