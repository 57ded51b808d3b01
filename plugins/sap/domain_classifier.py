"""Domain classifier of SAP, as in its release."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from core.registry import register


@register("module", paper="SAP release")
class DomainClassifier(nn.Module):
    """Which domain a feature comes from: Linear, ReLU, dropout, Linear.

    There is no gradient reversal: the release calls it adversarial, and trains it and its features to agree. The logit of a
    held-out domain never sees a positive.

    Args:
        dim: width of the domain feature and of the hidden layer.
        n_domains: number of domains, the held-out one included.
        dropout: 0.3 is the release's recipe (its class default is 0.5).
    """

    def __init__(self, dim: int = 64, n_domains: int = 4, dropout: float = 0.3):
        super().__init__()
        if n_domains < 2:
            raise ValueError(f"n_domains must be at least 2, got {n_domains}")
        self.net = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, n_domains))

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.net(features)
