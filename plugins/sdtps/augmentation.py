"""What happens to the three images of a sample between the disk and the network (DeMo's released pipeline).

Train: resize (bicubic), flip, pad, crop, scale to [-1, 1], erase. Evaluation: resize (bilinear), scale. The resize is apart
(`resize`), because it is the same every time: a data set keeps its result in memory and only the rest is done per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from core import images
from core.registry import register


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width), both at least 1, got {size}")
    return height, width


class _Transform:
    """Size, resize filter and scaling, which training and evaluation share."""

    def __init__(self, size: tuple[int, int], interpolation: images.Filter, mean: float, std: float):
        if std <= 0:
            raise ValueError(f"std must be above 0, got {std}")
        self.size, self.interpolation = _check_size(size), interpolation
        self.mean, self.std = mean, std

    def resize(self, image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
        """The deterministic first step, still uint8 (as Pillow leaves it)."""
        return images.resize(image, self.size, self.interpolation)

    def scale(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "3 h w"]:
        """0..255 to (0..1 - mean) / std, channels first."""
        return images.normalize(images.to_float(image), (self.mean,) * 3, (self.std,) * 3)


@register("transform", paper="DeMo (AAAI 2025), released training transform; Zhong et al. 2020 for the erasing")
class TrainTransform(_Transform):
    """Flip, shift and erase at random.

    Args:
        size: (height, width) of the network's input.
        interpolation: filter of the resize.
        flip: probability of a left-right flip.
        padding: zero pixels (black before scaling) put around the resized image before the random crop back to `size`.
        erase: probability of random erasing.
        erase_area: smallest and largest share of the image that is erased.
        erase_aspect: smallest and largest height / width of the erased rectangle.
        mean, std: scaling, the same for all channels (the release scales CLIP's input so too, not by CLIP's statistics).
        sync_modalities: one draw for all three images of a sample. The release draws anew for each (default), although
            the three are views of one moment.
    """

    def __init__(
        self,
        size: tuple[int, int] = (256, 128),
        interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic",
        flip: float = 0.5,
        padding: int = 10,
        erase: float = 0.5,
        erase_area: tuple[float, float] = (0.02, 1 / 3),
        erase_aspect: tuple[float, float] = (0.3, 1 / 0.3),
        mean: float = 0.5,
        std: float = 0.5,
        sync_modalities: bool = False,
    ):
        super().__init__(size, interpolation, mean, std)
        for name, probability in (("flip", flip), ("erase", erase)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {probability}")
        for name, (low, high) in (("erase_area", erase_area), ("erase_aspect", erase_aspect)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest, got {(low, high)}")
        if padding < 0:
            raise ValueError(f"padding must be 0 or more pixels, got {padding}")
        self.flip, self.padding, self.erase = flip, padding, erase
        self.erase_area, self.erase_aspect, self.sync_modalities = erase_area, erase_aspect, sync_modalities

    def __call__(
        self, views: Sequence[UInt8[np.ndarray, "_ _ 3"]], rng: np.random.Generator
    ) -> tuple[Float32[Tensor, "3 h w"], ...]:
        """Resized uint8 images to network inputs."""
        if self.sync_modalities:
            return self._together(views, rng)
        return tuple(self._together((view,), rng)[0] for view in views)

    def _together(
        self, views: Sequence[UInt8[np.ndarray, "_ _ 3"]], rng: np.random.Generator
    ) -> tuple[Float32[Tensor, "3 h w"], ...]:
        views = images.random_flip(rng, *views, p=self.flip)
        if self.padding:
            views = images.random_crop(rng, *(images.pad(view, self.padding) for view in views), size=self.size)
        scaled = images.random_erase(
            rng, *(self.scale(view) for view in views), p=self.erase, area=self.erase_area, aspect=self.erase_aspect
        )
        return tuple(torch.from_numpy(view) for view in scaled)


@register("transform", paper="DeMo (AAAI 2025), released test transform")
class EvalTransform(_Transform):
    """Resize and scale; nothing random.

    Args:
        size: (height, width) of the network's input.
        interpolation: filter of the resize. The release trains with bicubic and tests with bilinear; so do we.
        mean, std: as in training.
    """

    def __init__(
        self,
        size: tuple[int, int] = (256, 128),
        interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear",
        mean: float = 0.5,
        std: float = 0.5,
    ):
        super().__init__(size, interpolation, mean, std)

    def __call__(
        self, views: Sequence[UInt8[np.ndarray, "_ _ 3"]], rng: np.random.Generator
    ) -> tuple[Float32[Tensor, "3 h w"], ...]:
        """Resized uint8 images to network inputs; `rng` is not used."""
        return tuple(torch.from_numpy(self.scale(view)) for view in views)
