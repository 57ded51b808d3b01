"""From a view on disk to tensors: DFormer's augmentation for training, and the plain transform for evaluation.

Order of the release: flip, random scale, normalise, crop with a margin where the image is too small. Channels are
normalised with ImageNet's mean and deviation, depth with 0.48 and 0.28; a margin is 0 after that, and 255 in the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from core import images
from core.registry import register
from plugins.sam.datasets import IGNORE, View

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTH_MEAN, DEPTH_DEVIATION = 0.48, 0.28


def tensors(view: View, channel_order: Literal["rgb", "bgr"]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Normalised image (3, h, w) and depth (1, h, w), and labels (h, w)."""
    pixels = view.image if channel_order == "rgb" else view.image[:, :, ::-1]
    image = images.normalize(images.to_float(pixels), MEAN, DEVIATION)
    return image, (view.depth[None] - np.float32(DEPTH_MEAN)) / np.float32(DEPTH_DEVIATION), view.label


def _checked(channel_order: str) -> None:
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f"channel_order must be rgb or bgr, got {channel_order!r}")


@register("transform", paper="DFormer's released training recipe")
class TrainTransform:
    """Flip, random scale, normalise, random crop.

    Args:
        crop: height and width of what the model sees.
        scales: one is drawn for each image (bilinear; nearest for labels).
        flip: probability of mirroring left to right.
        channel_order: `rgb`; or `bgr`, which the release reads for NYUDepthv2 and normalises with the statistics of rgb: its
            checkpoints of that data set want it.
        crop_offset: `fixed` places the crop inside the image; `upstream` may place it one pixel beyond, and pads.
    """

    def __init__(
        self,
        crop: tuple[int, int] = (480, 640),
        scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        flip: float = 0.5,
        channel_order: Literal["rgb", "bgr"] = "rgb",
        crop_offset: Literal["fixed", "upstream"] = "fixed",
    ):
        if min(crop) < 1 or not scales or min(scales) <= 0:
            raise ValueError(f"crop and scales must be positive, got {crop} and {tuple(scales)}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be in [0, 1], got {flip}")
        if crop_offset not in ("fixed", "upstream"):
            raise ValueError(f"crop_offset must be fixed or upstream, got {crop_offset!r}")
        _checked(channel_order)
        self.crop, self.scales, self.flip, self.channel_order, self.crop_offset = (
            tuple(crop),
            tuple(scales),
            flip,
            channel_order,
            crop_offset,
        )

    def __call__(self, view: View, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        image, depth, label = images.random_flip(rng, view.image, view.depth, view.label, p=self.flip)
        scale = float(rng.choice(self.scales))
        size = (max(1, int(label.shape[0] * scale)), max(1, int(label.shape[1] * scale)))
        image, depth = images.resize(np.ascontiguousarray(image), size), images.resize(np.ascontiguousarray(depth), size)
        label = images.resize(np.ascontiguousarray(label), size, "nearest")
        colours, distance, label = tensors(View(image, depth, label), self.channel_order)
        window = [self._place(rng, have, want) for have, want in zip(size, self.crop)]
        return {
            "image": torch.from_numpy(self._cut(colours, window, 0.0)),
            "depth": torch.from_numpy(self._cut(distance, window, 0.0)),
            "label": torch.from_numpy(self._cut(label, window, IGNORE)).long(),
        }

    def _place(self, rng: np.random.Generator, have: int, want: int) -> tuple[int, int]:
        """(first pixel, number of pixels) to take along one axis."""
        if have <= want:
            return 0, have
        last = have - want + (1 if self.crop_offset == "upstream" else 0)
        first = int(rng.integers(last + 1))
        return first, min(want, have - first)

    def _cut(self, array: NDArray[Any], window: Sequence[tuple[int, int]], fill: float) -> NDArray[Any]:
        """The window, in the middle of a margin where it is smaller than the crop."""
        (top, rows), (left, columns) = window
        height, width = self.crop
        out = np.full((*array.shape[:-2], height, width), fill, array.dtype)
        y, x = (height - rows) // 2, (width - columns) // 2
        out[..., y : y + rows, x : x + columns] = array[..., top : top + rows, left : left + columns]
        return out


@register("transform", paper="DFormer's released evaluation")
class EvalTransform:
    """Normalise; nothing is drawn.

    Args:
        channel_order: as in TrainTransform.
        pad_to: height and width to which smaller images are padded below and on the right, with black before
            normalisation (the release does so for SUN RGB-D, 531 x 730); the margin is void. None leaves sizes alone.
    """

    def __init__(self, channel_order: Literal["rgb", "bgr"] = "rgb", pad_to: tuple[int, int] | None = None):
        _checked(channel_order)
        self.channel_order, self.pad_to = channel_order, pad_to

    def __call__(self, view: View, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        if self.pad_to is not None:
            (h, w), (height, width) = view.label.shape, self.pad_to
            if h > height or w > width:
                raise ValueError(f"pad_to is {self.pad_to}, but an image is {(h, w)}")
            margin = ((0, height - h), (0, width - w))
            view = View(
                np.pad(view.image, (*margin, (0, 0))),
                np.pad(view.depth, margin),
                np.pad(view.label, margin, constant_values=IGNORE),
            )
        image, depth, label = tensors(view, self.channel_order)
        return {"image": torch.from_numpy(image), "depth": torch.from_numpy(depth), "label": torch.from_numpy(label).long()}
