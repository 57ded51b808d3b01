"""The network: a pooling module and a linear classifier on what it leaves. Axes: b batch, n tokens, c channels, k classes."""

from __future__ import annotations

from collections.abc import Callable

from core.registry import register
from jaxtyping import Float
from torch import Tensor, nn

from my_paper.attention_pool import AttentionPool


@register("model", paper="authors, venue year, sec. 3")
class PooledClassifier(nn.Module):
    """Tokens to class scores.

    Args:
        dim: channels c.
        classes: number of classes k.
        pool: constructor of the pooling module, called with `dim=`.
    """

    def __init__(self, dim: int, classes: int, *, pool: Callable[..., nn.Module] = AttentionPool):
        super().__init__()
        self.pool = pool(dim=dim)
        self.classify = nn.Linear(dim, classes)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b k"]:
        scores: Tensor = self.classify(self.pool(tokens))
        return scores
