"""The one reader of pictures, for every command and the Python API: read alike, or refused alike."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

# Pillow reads more, some by running other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Processors bring the shorter side to that of the model before they crop: of longer pictures they make gigabytes.
LONGEST = 200


def read_picture(picture: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """A picture as models are shown it: upright, in RGB, of an animation the first frame; transparency goes.

    Args:
        picture: its file, the content of it, or what Pillow made of it.
        name: what an error calls it; the file's path if left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged or of another format than `FORMATS`, with more pixels than Pillow allows,
            with more than 8 bits a channel, or with a side more than `LONGEST` times the other.
    """
    if name is None:
        name = f"{picture}:" if isinstance(picture, str | Path) else "the picture"
    if isinstance(picture, Image.Image):
        return _shown(picture, name)
    if not isinstance(picture, bytes) and not Path(picture).is_file():
        raise FileNotFoundError(f"{picture}: no such file.")
    try:
        with warnings.catch_warnings():
            # Between its limit and twice its limit Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS) as image:
                return _shown(image, name)
    except _RefusedError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that Pillow allows (Image.MAX_IMAGE_PIXELS)."
        ) from error
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to.
        raise ValueError(f"{name} cannot be decoded; a readable picture is allowed ({', '.join(FORMATS)}).") from error


class _RefusedError(ValueError):
    """For a picture that can be decoded."""


def _shown(image: Image.Image, name: str) -> Image.Image:
    """Nothing is decoded, and nothing large made, before what the file's head says has been checked."""
    width, height = image.size
    if not 0 < max(width, height) <= LONGEST * min(width, height):
        raise _RefusedError(
            f"{name} is {width:,} × {height:,} pixels; sides of at most {LONGEST} times the other are allowed: crop it."
        )
    if image.mode.startswith(("I", "F")):
        # Pillow makes every value above 255 white.
        raise _RefusedError(
            f"{name} has more than 8 bits a channel (mode {image.mode}); 8 bits are allowed: convert it first."
        )
    return ImageOps.exif_transpose(image).convert("RGB")
