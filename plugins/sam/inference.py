"""From a model to class probabilities of a picture: one pass, several scales with mirroring, or a sliding window.

DFormer's released evaluation. Axes: b batch, h height, w width, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from core.registry import register

MULTIPLE = 32  # scaled sizes are rounded up to it


def resized(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Bilinear, corners aligned, as the release resizes inputs and outputs in evaluation."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


@register("inference", paper="DFormer's released evaluation")
class Predictor:
    """Class probabilities of pictures.

    Args:
        scales: factors on the picture's size, each rounded up to a multiple of 32; their softmax outputs are averaged. (1.0,)
            alone, without mirroring, is one pass at the picture's own size. The release's multi-scale evaluation has
            0.5, 0.75, 1.0, 1.25, 1.5 and mirrors, whatever its config says.
        flip: average with the mirrored picture's output.
        window: height and width of a sliding window; None passes the whole picture.
        stride: step of the window over its size.
        small: what becomes of a picture smaller than the window: `pad` fills it up, `resize` (release) stretches it to the
            window, whatever its shape.

    The same text goes with every scale, mirror image and window.
    """

    def __init__(
        self,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: tuple[int, int] | None = None,
        stride: float = 2 / 3,
        small: Literal["pad", "resize"] = "pad",
    ):
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be positive and at least one, got {tuple(scales)}")
        if window is not None and min(window) < 1:
            raise ValueError(f"window must be at least (1, 1), got {tuple(window)}; None passes the whole picture")
        if not 0 < stride <= 1:
            raise ValueError(f"stride must be in (0, 1], got {stride}")
        if small not in ("pad", "resize"):
            raise ValueError(f"small must be pad or resize, got {small!r}")
        self.scales, self.flip, self.window, self.stride, self.small = tuple(scales), flip, window, stride, small

    def __call__(
        self, model: nn.Module, image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b m h w"], text: Tensor | None
    ) -> Float[Tensor, "b k h w"]:
        size = (image.shape[2], image.shape[3])
        if self.scales == (1.0,) and not self.flip:
            return self._logits(model, image, depth, text).float().softmax(dim=1)
        total, passes = torch.zeros(()), 0
        for scale in self.scales:
            scaled = tuple(math.ceil(n * scale / MULTIPLE) * MULTIPLE for n in size)
            at_scale = [resized(x, (scaled[0], scaled[1])) for x in (image, depth)]
            for mirrored in (False, True) if self.flip else (False,):
                a, b = (x.flip(-1) if mirrored else x for x in at_scale)
                logits = self._logits(model, a, b, text)
                logits = resized(logits.flip(-1) if mirrored else logits, size)
                total, passes = total.to(logits.device) + logits.float().softmax(dim=1), passes + 1
        return total / passes

    def _logits(self, model: nn.Module, image: Tensor, depth: Tensor, text: Tensor | None) -> Tensor:
        if self.window is None:
            return model(image, depth, text)
        size = (image.shape[2], image.shape[3])
        if size[0] < self.window[0] or size[1] < self.window[1]:
            larger = (max(size[0], self.window[0]), max(size[1], self.window[1]))
            if self.small == "resize":
                return resized(self._slide(model, resized(image, self.window), resized(depth, self.window), text), size)
            margin = (0, larger[1] - size[1], 0, larger[0] - size[0])
            return self._slide(model, F.pad(image, margin), F.pad(depth, margin), text)[..., : size[0], : size[1]]
        return self._slide(model, image, depth, text)

    def _slide(self, model: nn.Module, image: Tensor, depth: Tensor, text: Tensor | None) -> Tensor:
        assert self.window is not None
        rows, columns = (self._starts(n, w) for n, w in zip(image.shape[-2:], self.window))
        h, w = self.window
        total: Tensor | None = None
        hits = torch.zeros(image.shape[-2:], device=image.device)
        for top in rows:
            for left in columns:
                cut = (..., slice(top, top + h), slice(left, left + w))
                logits = model(image[cut], depth[cut], text)
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
                total[cut] += logits
                hits[top : top + h, left : left + w] += 1
        assert total is not None
        return total / hits

    def _starts(self, length: int, window: int) -> list[int]:
        """First pixels of the windows along one axis; the last window ends at the border."""
        step = math.ceil(window * self.stride)
        count = math.ceil((length - window) / step) + 1
        return [min(i * step, length - window) for i in range(count)]
