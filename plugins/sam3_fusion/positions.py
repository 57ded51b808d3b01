"""Sine codes of image cells and of boxes (SAM3; DETR's code with interleaved sine and cosine).

A coordinate c in [0, 1] becomes `dim` numbers: with angle_k = 2π c / 10000^(2⌊k/2⌋ / dim), sin(angle_k) at even k and
cos(angle_k) at odd k.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 10000.0


def sine_code(coordinate: Float[Tensor, "*n"], dim: int) -> Float[Tensor, "*n {dim}"]:
    """The sine code of each coordinate.

    Raises:
        ValueError: if `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"a sine code needs an even number of channels, got {dim}")
    pair = torch.arange(dim // 2, dtype=coordinate.dtype, device=coordinate.device)
    angle = coordinate[..., None] * (2 * math.pi) / TEMPERATURE ** (2 * pair / dim)
    return rearrange(torch.stack((angle.sin(), angle.cos()), dim=-1), "... k two -> ... (k two)")


def cell_positions(height: int, width: int, dim: int, like: Tensor) -> Float[Tensor, "{dim} {height} {width}"]:
    """Code of an image grid, y half first; cell i of n stands at (i + 1) / (n + 1e-6). Device and dtype follow `like`."""

    def axis(n: int) -> Tensor:
        return sine_code((torch.arange(n, dtype=like.dtype, device=like.device) + 1) / (n + 1e-6), dim // 2)

    y = repeat(axis(height), "h c -> c h w", w=width)
    x = repeat(axis(width), "w c -> c h w", h=height)
    return torch.cat((y, x))


def box_positions(boxes: Float[Tensor, "*n 4"], dim: int) -> Float[Tensor, "*n {dim}"]:
    """Code of boxes (cx, cy, w, h): a quarter of the channels each for y, x, w, h, in this order."""
    order = boxes[..., [1, 0, 2, 3]]
    return rearrange(sine_code(order, dim // 4), "... side c -> ... (side c)")
