"""From pixels to what the encoders see.

As in the SAP release: random resized crop, flip and colour jitter in training, a plain resize in evaluation.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from core import images
from core.registry import register

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def colour_jitter(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, *, strength: float, hue: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, contrast and saturation each times U(1 - strength, 1 + strength), hue turned by U(-hue, hue), in random order."""
    low = max(0.0, 1 - strength)
    factors = rng.uniform(low, 1 + strength, 3)
    turn = rng.uniform(-hue, hue)
    for operation in rng.permutation(4):
        if operation == 3:
            if hue:
                planes = np.array(Image.fromarray(image).convert("HSV"))
                planes[..., 0] += np.uint8(round(turn * 256) % 256)  # hue is a circle of 256: overflow is meant
                image = np.asarray(Image.fromarray(planes, "HSV").convert("RGB"))
            continue
        values = image.astype(np.float32)
        factor = np.float32(factors[operation])
        if operation == 0:
            values *= factor
        else:
            gray = values @ LUMA
            anchor = np.full_like(gray, gray.mean()) if operation == 1 else gray
            values = anchor[..., None] + factor * (values - anchor[..., None])
        image = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    return image


def random_resized_crop(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, *, size: int, area: tuple[float, float]
) -> UInt8[np.ndarray, "s s 3"]:
    """A window of a share of the area in `area` and an aspect ratio log-uniform in 3/4 .. 4/3, resized to a square."""
    height, width = image.shape[:2]
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            image = images.crop(image, top, left, (h, w))
            break
    return images.resize(np.ascontiguousarray(image), (size, size))


@register("transform", paper="SAP release")
class TrainTransform:
    """Random resized crop, horizontal flip, colour jitter, ImageNet normalisation.

    Args:
        size: side of the output in pixels.
        area: share of the image that the crop keeps.
        flip: probability of a mirror image.
        jitter: strength of brightness, contrast and saturation changes.
        hue: largest turn of the hue, in turns. 0.4 (release) makes almost any hue of any other.
    """

    def __init__(
        self, size: int = 84, area: tuple[float, float] = (0.8, 1.0), flip: float = 0.5, jitter: float = 0.4, hue: float = 0.4
    ):
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area must be two ascending shares in (0, 1], got {area}")
        if not 0 <= hue <= 0.5 or jitter < 0:
            raise ValueError(f"hue must be in [0, 0.5] and jitter 0 or more, got {hue} and {jitter}")
        self.size, self.area, self.flip, self.jitter, self.hue = size, area, flip, jitter, hue

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> Float32[np.ndarray, "3 s s"]:
        image = random_resized_crop(image, rng, size=self.size, area=self.area)
        (image,) = images.random_flip(rng, image, p=self.flip)
        if self.jitter or self.hue:
            image = colour_jitter(np.ascontiguousarray(image), rng, strength=self.jitter, hue=self.hue)
        return images.normalize(images.to_float(image), MEAN, STD)


@register("transform", paper="SAP release")
class EvalTransform:
    """Resize to a square and normalise as ImageNet.

    Args:
        size: side of the output in pixels.
    """

    def __init__(self, size: int = 84):
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        self.size = size

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> Float32[np.ndarray, "3 s s"]:
        return images.normalize(images.to_float(images.resize(image, (self.size, self.size))), MEAN, STD)
