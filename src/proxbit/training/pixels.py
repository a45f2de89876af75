"""Images as a model is shown them: 8-bit RGB, upright, on white. One rule for each way in which pixels are stored.

| stored | shown |
|---|---|
| 8-bit grey, RGB, YCbCr, HSV, palette, 1 bit (black and white) | the same colors |
| CMYK | the complement of its inks, without its color profile |
| transparent pixels: alpha, or one transparent color | on white, as far as they are transparent |
| EXIF orientation | turned and mirrored as it says |
| several frames or pages | the first one |
| 16 bits | the high byte: 65535 is white |
| 32-bit integers | as they are, if all are in [0, 255] |
| floats | 255 times as much if all are in [0, 1], as they are if all are in [0, 255] |
| other integers and floats, NaN, CIE Lab | not at all: what is white is not known |
| more pixels than Pillow takes for harmless, or one side 200 times the other | not at all |
"""

import logging
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from proxbit.errors import DataError

__all__ = ["HEIC", "as_rgb", "extensions", "read_image"]

# Formats that Pillow decodes in this process. Others of its formats start a program (EPS: Ghostscript), are read on one
# system only, or hold measurements instead of colors.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
HEIC = frozenset({".heic", ".heif", ".heics", ".heifs", ".hif"})
NARROW = 200
# What Pillow's readers log of damaged files comes as an error, too, whose text is the reason.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@cache
def _formats() -> tuple[str, ...]:
    """The formats that can be opened here: of HEIC, where `pillow-heif` is installed."""
    Image.init()
    if find_spec("pillow_heif") is None:
        return tuple(each for each in FORMATS if each in Image.OPEN)
    import_module("pillow_heif").register_heif_opener()
    return (*(each for each in FORMATS if each in Image.OPEN), "HEIF")


@cache
def extensions() -> frozenset[str]:
    """The extensions of files that are opened, in lower case and with their dot."""
    known = {*_formats(), "MPO"}
    return frozenset(each for each, kind in Image.registered_extensions().items() if kind in known)


def read_image(source: str | Path | bytes) -> Image.Image:
    """An image from a file, or from its content, as a model is shown it.

    Raises:
        DataError: if it cannot be shown truly; its text is the reason, in a few words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that Pillow goes on from: what it cannot read is an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(opened, formats=_formats()) as image:
                return as_rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not an image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise DataError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, too many for an image") from error
    except Exception as error:  # Pillow's many readers raise whatever they meet in a damaged file.
        raise DataError(str(error).partition("\n")[0] or type(error).__name__) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An image, at the frame where it stands, by the rules in the table of this module.

    Returns:
        A new image of mode RGB.

    Raises:
        DataError: if its pixels cannot be shown truly; its text is the reason.
    """
    short, long = sorted(image.size)
    if long > NARROW * short:
        raise DataError(f"{image.width} x {image.height} pixels, too narrow for an image")
    upright = _in_8_bits(ImageOps.exif_transpose(image), image.format)
    if not upright.has_transparency_data:
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    shown = Image.new("RGBA", upright.size, "white")
    shown.alpha_composite(upright.convert("LA" if upright.mode == "La" else "RGBA").convert("RGBA"))
    return shown.convert("RGB")


def _in_8_bits(image: Image.Image, form: str | None) -> Image.Image:
    """An image of one channel whose numbers are longer than 8 bits, as grey; any other one as it is."""
    if image.mode == "LAB":
        raise DataError("its colors are CIE Lab, which are not read")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and form == "PPM"):
        grey = values >> 8  # Pillow reads PGM of 16 bits into 32.
    else:
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 255:  # NaN is not, either.
            kind = "integers" if image.mode == "I" else "floats"
            raise DataError(f"its pixels are {kind} from {low:g} to {high:g}, of which white is not known")
        grey = np.rint(values * 255 if image.mode == "F" and high <= 1 else values)
    made = Image.fromarray(grey.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made
