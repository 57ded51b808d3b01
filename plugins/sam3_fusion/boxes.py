"""Boxes as (cx, cy, w, h) in parts of the image, and what is computed from them. Differentiable, no host synchronisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LOGIT_FLOOR = 1e-3  # the release's epsilon: logits of box coordinates stay within ±6.908


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(cx, cy, w, h) to (x0, y0, x1, y1)."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def centres(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(x0, y0, x1, y1) to (cx, cy, w, h)."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def logit(x: Float[Tensor, "*n"], floor: float = LOGIT_FLOOR) -> Float[Tensor, "*n"]:
    """log(x / (1 - x)) with x first clamped to [0, 1] and both terms kept at or above `floor`; finite for any finite x."""
    # one clamp a term: ONNX's optimiser (onnxscript 0.7) breaks the graph where it joins two
    return torch.log(x.clamp(floor, 1.0) / (1 - x).clamp(floor, 1.0))


def iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """IoU and generalised IoU of boxes given by corners, pair by pair with broadcasting.

    Boxes without area (or inverted ones, whose area counts as zero) have IoU 0 with everything; nothing divides by zero.
    """
    size_a, size_b = (a[..., 2:] - a[..., :2]).clamp(min=0), (b[..., 2:] - b[..., :2]).clamp(min=0)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - shared
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    tiny = torch.finfo(a.dtype).tiny
    overlap = shared / union.clamp(min=tiny)
    return overlap, overlap - (hull - union) / hull.clamp(min=tiny)
