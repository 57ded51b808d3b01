"""Attention pooling: many tokens become one, the mean under scores that a learned query gives.

    a = softmax over n of (x_n · q / (T · sqrt(c)))     eq. 1
    y = sum over n of a_n x_n                           eq. 2

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

import torch
from core.registry import register
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn


@register("module", paper="authors, venue year, sec. 3", equations="eq. 1-2")
class AttentionPool(nn.Module):
    """One query over all tokens. It costs 2·n·c multiply-accumulates a sample.

    Args:
        dim: channels c.
        temperature: T. The larger, the nearer to a plain mean.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, dim: int, *, temperature: float = 1.0):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.scale = 1 / (temperature * dim**0.5)
        self.query = nn.Parameter(torch.zeros(dim))  # a plain mean to begin with

    def weights(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        """a of eq. 1; they sum to 1 over the tokens."""
        return (einsum(tokens, self.query, "b n c, c -> b n") * self.scale).softmax(-1)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return einsum(self.weights(tokens), tokens, "b n, b n c -> b c")  # eq. 2
