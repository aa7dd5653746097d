"""Encoded images of any format to one uint8 array of one size."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageError
from .progress import progress_bar

AUTOMATIC_SIZES = (16, 32, 64)  # image_size=None takes the smallest that holds the images, or shrinks to the last
BEHIND_TRANSPARENT = "white"  # what viewers and printers show there; the colours stored below are nobody's choice
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"}
ALPHA_MODES = {"LA", "RGBA", "PA"}
ORIENTATION_SOURCES = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow looks for it
# What Pillow raises for files that are cut off, garbled or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, Image.DecompressionBombError)


class Decoded(NamedTuple):
    """Images of one size, and what became of theirs.

    pixels    uint8 [n, channels, size, size]
    resized   words on how they were brought to that size; empty where they had it
    """

    pixels: np.ndarray
    resized: str


def decode_images(encoded: Sequence[tuple[str, Any]], image_size: int | None) -> Decoded:
    """Decodes, converts and fits images.

    They are turned upright as their EXIF orientation says, and transparent pixels are laid on white. Images are grey if
    all of them are, else RGB. Those at most half the target size are enlarged, those that fit are centred with their
    edges repeated, larger ones lose their longer side's ends and are shrunk. A progress bar shows when it takes more
    than two seconds.

    Arguments:
        encoded: pairs (origin, content); content is a path, bytes of an image file, or uint8 pixels [height, width]
            or [height, width, 3].
        image_size: pixels a side, or None to choose from `AUTOMATIC_SIZES`; then all images must be of one size.

    Raises:
        ImageError: an image cannot be read, or sizes differ and `image_size` is None.
    """
    if image_size is not None and (image_size < 8 or image_size > 256 or image_size & (image_size - 1)):
        raise ImageError(f"--image-size must be 8, 16, 32, 64, 128 or 256, got {image_size}")
    fitted, first_size, any_colour, sizes = [], None, False, set()
    all_numbers, largest = True, 0
    for origin, content in progress_bar(encoded, desc="reading images", unit="image", delay=2, leave=False):
        image = _open(origin, content)
        if first_size is None:
            first_size, first_origin = image.size, origin
        if image_size is None and image.size != first_size:
            a, b = first_size, image.size
            raise ImageError(
                f"images differ in size: {a[0]}x{a[1]} in {first_origin}, {b[0]}x{b[1]} in {origin}; "
                "pass --image-size to bring them to one"
            )
        all_numbers = all_numbers and isinstance(content, list | np.ndarray)
        if all_numbers:
            largest = max(largest, int(np.asarray(image).max()))
        sizes.add(image.size)
        size = image_size or _automatic_size(first_size)
        any_colour = any_colour or image.mode == "RGB"
        fitted.append(np.asarray(_fit(image, size)))
    if all_numbers and largest == 1:
        raise ImageError(
            "all pixels are 0 or 1, which of 0 to 255 is black and nearly black: multiply them by 255, or give booleans"
        )
    if any_colour:
        fitted = [np.repeat(p[:, :, None], 3, axis=2) if p.ndim == 2 else p for p in fitted]
        pixels = np.ascontiguousarray(np.stack(fitted).transpose(0, 3, 1, 2))
    else:
        pixels = np.stack(fitted)[:, None]
    return Decoded(pixels, _resized(sizes, pixels.shape[-1]))


def _resized(sizes: set[tuple[int, int]], size: int) -> str:
    """What `_fit` did to images of these sizes (width, height)."""
    if len(sizes) > 1:
        small, large = (f"{w} x {h}" for w, h in (f(sizes, key=lambda s: (s[0] * s[1], s)) for f in (min, max)))
        return f"brought to one size from {small} to {large}"
    ((width, height),) = sizes
    if (width, height) == (size, size):
        return ""
    if max(width, height) > size:
        shrunk = "shrunk" if min(width, height) > size else "enlarged" if min(width, height) < size else ""
        words = shrunk if width == height else f"cut to squares and {shrunk}" if shrunk else "cut to squares"
    else:
        words = "enlarged" if max(width, height) * 2 <= size else "edges repeated"
    return f"{words} from {width} x {height}"


def _open(origin: str, content: Any) -> Image.Image:
    """A fully read image of mode "L" or "RGB"."""
    if isinstance(content, list | np.ndarray):
        return Image.fromarray(_pixels(origin, content))
    is_file = isinstance(content, str | os.PathLike)
    if not is_file and not isinstance(content, bytes):
        raise ImageError(f"{origin} must be an image file's bytes or path, or pixels, got {content!r:.40}")
    if not is_file and len(content) == 0:
        raise ImageError(f"{origin} is an empty image")
    try:
        if is_file and os.path.getsize(content) == 0:
            raise ImageError(f"{origin} is an empty image file")
        with Image.open(content if is_file else io.BytesIO(content)) as image:
            image.load()
            if image.mode not in GREY_MODES | COLOUR_MODES:
                raise ImageError(f'{origin} has pixel format "{image.mode}", need 8 bits per channel: convert it first')
            return _opaque(_upright(image))
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # names a file once more, or an object of Python's
            reason = "its content is in no image format that Pillow knows"
        elif isinstance(error, OSError) and error.strerror:  # without the number, and the name once more
            reason = error.strerror
        raise ImageError(f"cannot read image {origin}: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says, which cameras write instead of turning the pixels."""
    # nearly all small images have none, and looking for it costs a tenth of reading them
    if image.info.keys().isdisjoint(ORIENTATION_SOURCES) and not hasattr(image, "tag_v2"):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except UNREADABLE:  # the pixels are whole; EXIF that nobody can read says nothing about them, to viewers as to us
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """Mode "L" or "RGB", transparent pixels as what shows through them."""
    mode = "L" if image.mode in GREY_MODES else "RGB"
    if not (image.mode in ALPHA_MODES or "transparency" in image.info):
        return image.convert(mode)
    image = image.convert("LA" if mode == "L" else "RGBA")
    opaque = Image.new(mode, image.size, BEHIND_TRANSPARENT)
    opaque.paste(image.convert(mode), mask=image.getchannel("A"))
    return opaque


def _pixels(origin: str, content: Any) -> np.ndarray:
    """Pixel values that a table holds as numbers, or black and white as booleans, as uint8 [height, width] or
    [height, width, 3]."""
    try:
        pixels = np.asarray(content)
        numbers = pixels.astype(np.float64) * (255 if pixels.dtype == bool else 1)
    except (ValueError, TypeError) as error:  # rows of different lengths, or words
        raise ImageError(f"{origin} is no rectangle of numbers") from error
    if pixels.ndim not in (2, 3) or pixels.size == 0 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ImageError(f"{origin} must be pixels [height, width] or [height, width, 3], got {list(pixels.shape)}")
    if not np.isfinite(numbers).all():
        raise ImageError(f"{origin} has pixels that are NaN or infinite")
    if numbers.min() < 0 or numbers.max() > 255 or (numbers != np.round(numbers)).any():
        low, high = numbers.min(), numbers.max()
        raise ImageError(f"{origin} must have pixels that are integers from 0 to 255, got {low:g} to {high:g}")
    return numbers.astype(np.uint8)


def _automatic_size(size: tuple[int, int]) -> int:
    if max(size) * 2 <= AUTOMATIC_SIZES[0]:
        return AUTOMATIC_SIZES[0]
    return next((s for s in AUTOMATIC_SIZES if s >= max(size)), AUTOMATIC_SIZES[-1])


def _fit(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if max(width, height) > size:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    if max(width, height) * 2 <= size:
        scale = size / max(width, height)
        width, height = round(width * scale), round(height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if (width, height) == (size, size):
        return image
    left, top = (size - width) // 2, (size - height) // 2
    pixels = np.asarray(image)
    margins = [(top, size - height - top), (left, size - width - left)] + [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, margins, mode="edge"))
