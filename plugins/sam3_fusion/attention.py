"""Multi-head attention with separate query, key and value, and the two small networks that stand beside it.

Axes: b batch, n queries, m keys, h heads, e channels of one head, d channels.

Projections are separate linears (the release packs q, k and v in one tensor; `keys.py` splits and joins it) but start
as the packed tensor does: Xavier over (3d, d), so with bound sqrt(6 / 4d).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
FFN_ROWS = 648  # tokens of the hidden layer that exist at one time in inference; 5 MB at width 2048


def inference() -> bool:
    """Whether eager inference runs, where in-place and blockwise arithmetic is allowed (no gradient, no tracing)."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class Heads(NamedTuple):
    """Keys and values, projected and cut into heads."""

    key: Float[Tensor, "b h m e"]
    value: Float[Tensor, "b h m e"]


class Attention(nn.Module):
    """Scaled dot-product attention with separate query, key and value inputs.

    A batch row whose keys are all padding attends to nothing: its attention result is zero (so the module gives the
    bias of the out projection), with zero gradient to the keys; never NaN.

    Args:
        dim: channels of every input and of the output.
        heads: number of heads; divides `dim`.
        dropout: dropout of the attention weights, in training only.

    Raises:
        ValueError: for `heads` that does not divide `dim`, or a `dropout` outside [0, 1).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim}, heads={heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(proj.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(proj.bias)

    def split(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n e"]:
        """Cut channels into heads; each head's rows lie together, which attention reads faster than strided ones."""
        return rearrange(x, "b n (h e) -> b h n e", h=self.heads).contiguous()

    def project(self, key: Float[Tensor, "b m d"], value: Float[Tensor, "b m d"]) -> Heads:
        """Keys and values for `attend`, so that they can be computed once and used again."""
        return Heads(self.split(self.k_proj(key)), self.split(self.v_proj(value)))

    def attend(
        self,
        query: Float[Tensor, "b n d"],
        given: Heads,
        pad: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "b h n m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attention to keys and values already projected. `pad` is True at keys to leave out; `bias` adds to the logits."""
        mask: Tensor | None = bias
        if pad is not None:
            empty = pad.all(dim=1)
            keep = rearrange(~pad | rearrange(empty, "b -> b 1"), "b m -> b 1 1 m")
            mask = keep if bias is None else bias.masked_fill(~keep, -math.inf)
        q = self.split(self.q_proj(query))
        out = F.scaled_dot_product_attention(q, *given, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        if pad is not None:
            out = out.masked_fill(rearrange(empty, "b -> b 1 1 1"), 0.0)
        return self.out_proj(rearrange(out, "b h n e -> b n (h e)"))

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"],
        value: Float[Tensor, "b m d"],
        pad: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "b h n m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend from `query` to `key` and `value` (positions are the caller's business).

        Raises:
            ValueError: if there are no keys at all.
        """
        if key.shape[1] == 0:
            raise ValueError(f"attention needs at least one key, got key of shape {tuple(key.shape)}")
        return self.attend(query, self.project(key, value), pad, bias)


class FeedForward(nn.Module):
    """W2 · dropout(activation(W1 x)). In inference long inputs go through in blocks of tokens, which stay in the cache."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, activation: Activation = "relu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.up, self.down, self.drop, self.activation = (
            nn.Linear(dim, hidden),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
            activation,
        )
        for proj in (self.up, self.down):
            nn.init.xavier_uniform_(proj.weight)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if inference() and x.shape[1] > FFN_ROWS:
            return torch.cat([self._block(part) for part in x.split(FFN_ROWS, dim=1)], dim=1)
        return self._block(x)

    def _block(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = hidden.relu_() if self.activation == "relu" and inference() else ACTIVATIONS[self.activation](hidden)
        return self.down(self.drop(hidden))


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
