"""Images on disk to float arrays: reading with clear errors, resizing as Pillow does, and random geometry.

Arrays are `h w c` or `h w` (label and depth maps) until `to_float`, and `c h w` float32 after it, as tensors have it.
Random functions take a numpy Generator first and any number of arrays after it: all of them get the same draw, so that
an image, its depth map and its label map stay aligned. Call once per array for independent draws.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Filter = Literal["nearest", "bilinear", "bicubic"]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names it."""


def read_image(path: str | Path, mode: Literal["RGB", "L", "raw"] = "RGB") -> Array:
    """The pixels of an image file: `h w 3` for "RGB", `h w` for "L".

    Args:
        path: the file.
        mode: "RGB" and "L" convert to uint8 colour or grey; "raw" keeps what the file stores, which is what label maps
            (palette indices) and 16-bit depth maps need.

    Raises:
        ImageError: if the file is missing, empty, no image, or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.array(image if mode == "raw" else image.convert(mode))
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image file") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        file = Path(path)
        empty = file.is_file() and file.stat().st_size == 0
        raise ImageError(f"{path}: " + ("the file is empty (0 bytes)" if empty else f"unreadable as an image ({error})")) from error


def resize(image: Array, size: tuple[int, int], how: Filter = "bilinear") -> Array:
    """An image or map at `size` (height, width), through Pillow, whose shrinking filters are anti-aliased.

    uint8 colour and any single-channel map of uint8, int32 or float32 are resized as they are. Use "nearest" for labels.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if image.ndim == 2 and image.dtype not in (np.uint8, np.int32, np.float32):
        wide = np.float32 if image.dtype.kind == "f" else np.int32
        return np.asarray(Image.fromarray(image.astype(wide)).resize((width, height), _FILTERS[how])).astype(image.dtype)
    return np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[how]))


def to_float(image: UInt8[np.ndarray, "h w c"]) -> Float32[np.ndarray, "c h w"]:
    """Channels first, and 0..255 to 0..1."""
    return image.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)


def normalize(image: Float32[np.ndarray, "c h w"], mean: Sequence[float], std: Sequence[float]) -> Float32[np.ndarray, "c h w"]:
    """(image - mean) / std per channel."""
    return (image - np.asarray(mean, np.float32)[:, None, None]) / np.asarray(std, np.float32)[:, None, None]


def pad(image: Array, margin: int, fill: float = 0.0) -> Array:
    """`margin` pixels of `fill` on all four sides of an `h w` or `h w c` array."""
    height, width = image.shape[:2]
    out = np.full((height + 2 * margin, width + 2 * margin, *image.shape[2:]), fill, image.dtype)
    out[margin : margin + height, margin : margin + width] = image
    return out


def crop(image: Array, top: int, left: int, size: tuple[int, int]) -> Array:
    """The window of `size` (height, width) at (top, left); a view. The window must lie inside the image."""
    height, width = size
    inside = top >= 0 and top + height <= image.shape[0] and left >= 0 and left + width <= image.shape[1]
    assert inside, f"window {size} at {(top, left)} leaves the image {image.shape[:2]}"
    return image[top : top + height, left : left + width]


def random_flip(rng: np.random.Generator, *images: Array, p: float = 0.5) -> tuple[Array, ...]:
    """All arrays mirrored left to right with probability `p`, or none."""
    return tuple(image[:, ::-1] for image in images) if rng.random() < p else images


def random_crop(rng: np.random.Generator, *images: Array, size: tuple[int, int]) -> tuple[Array, ...]:
    """The same window of `size`, uniformly placed, out of every array.

    Raises:
        ValueError: if the window is larger than the arrays, or the arrays differ in height and width.
    """
    shapes = {image.shape[:2] for image in images}
    if len(shapes) > 1:
        raise ValueError(f"arrays cropped together must share height and width, got {sorted(shapes)}")
    (height, width) = shapes.pop()
    if size[0] > height or size[1] > width:
        raise ValueError(f"cannot crop {size} out of {(height, width)}: pad or resize first")
    top, left = int(rng.integers(height - size[0] + 1)), int(rng.integers(width - size[1] + 1))
    return tuple(crop(image, top, left, size) for image in images)


def random_erase(
    rng: np.random.Generator,
    *images: Float32[np.ndarray, "_ _ _"],
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    tries: int = 10,
) -> tuple[Float32[np.ndarray, "_ _ _"], ...]:
    """Random erasing (Zhong et al., AAAI 2020) with N(0, 1) noise in every pixel of one random rectangle, in place.

    The rectangle's share of the image is uniform in `area`, its height / width log-uniform in `aspect`; one that does not
    fit is drawn again, up to `tries` times, and then nothing is erased. Arrays are `c h w` and normalised (the noise is
    meant for that scale). All arrays get the same rectangle and noise of their own.
    """
    if rng.random() >= p:
        return images
    _, height, width = images[0].shape
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(tries):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            for image in images:
                image[:, top : top + h, left : left + w] = rng.standard_normal((image.shape[0], h, w), np.float32)
            break
    return images
