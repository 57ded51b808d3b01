"""Feed-forward networks of the fusion modules, and how they run in inference.

Axes: b batch, n tokens, d channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from core.layers import FeedForward

Activation = Literal["relu", "gelu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
ROWS = 648  # tokens of the hidden layer that exist at one time in inference; 5 MB at width 2048


def inference() -> bool:
    """Whether eager inference runs, where in-place and blockwise arithmetic is allowed (no gradient, no tracing)."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class BlockwiseFeedForward(FeedForward):
    """W2 · dropout(activation(W1 x)). In inference long inputs go through in blocks of tokens, which stay in the cache."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, activation: Activation = "relu"):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        super().__init__(dim, hidden, ACTIVATIONS[activation], dropout)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.contract.weight)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if not inference():
            return super().forward(x)
        return torch.cat([self._block(part) for part in x.split(ROWS, dim=1)], dim=1)

    def _block(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        hidden = hidden.relu_() if isinstance(self.activation, nn.ReLU) else self.activation(hidden)
        return self.contract(self.dropout(hidden))


class Mlp(nn.ModuleList):
    """Linear layers of the given widths with ReLU between them: `Mlp(256, 256, 4)` has layers 256→256→4."""

    def __init__(self, *widths: int):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        super().__init__(layers)

    def start_at_zero(self) -> None:
        """Take torch's own start for the layers and zeros for the last, so that the output is zero until it has learned."""
        linears = [layer for layer in self if isinstance(layer, nn.Linear)]
        for layer in linears:
            layer.reset_parameters()
        nn.init.zeros_(linears[-1].weight)
        nn.init.zeros_(linears[-1].bias)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        *inner, last = self
        for layer in inner:
            x = F.relu(layer(x))
        return last(x)
