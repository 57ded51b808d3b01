"""Layers that plugins share, the only copies: attention, feed-forward, pre-norm block, stochastic depth, positions.

Axes: b batch, n tokens, m keys, h heads, d channels of a head, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), CLIP's approximation of GELU."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x * torch.sigmoid(1.702 * x)


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the whole branch of a sample with probability `rate`, else scale it up.

    Huang et al., Deep Networks with Stochastic Depth, ECCV 2016; scaled by 1 / (1 - rate) so that the mean stays.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection to queries, keys and values.

    Args:
        dim: channels.
        heads: number of heads; divides `dim`.
        dropout: of the attention weights, in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim {dim} and heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], keep: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """`keep` is True for tokens that may be attended to; a sample needs at least one."""
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        mask = None if keep is None else rearrange(keep, "b n -> b 1 1 n")
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        projected: Tensor = self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        return projected


class Heads(NamedTuple):
    """Keys and values, projected and cut into heads."""

    key: Float[Tensor, "b h m d"]
    value: Float[Tensor, "b h m d"]


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value inputs and projections, padding and an additive bias.

    Projections start as the packed tensor of `nn.MultiheadAttention` does: Xavier over (3d, d), so bound sqrt(6 / 4d).
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

    def split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        """Cut channels into heads; each head's rows lie together, which attention reads faster than strided ones."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads).contiguous()

    def project(self, key: Float[Tensor, "b m c"], value: Float[Tensor, "b m c"]) -> Heads:
        """Keys and values for `attend`, so that they can be computed once and used again."""
        return Heads(self.split(self.k_proj(key)), self.split(self.v_proj(value)))

    def attend(
        self,
        query: Float[Tensor, "b n c"],
        given: Heads,
        pad: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "b h n m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
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
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))

    def forward(
        self,
        query: Float[Tensor, "b n c"],
        key: Float[Tensor, "b m c"],
        value: Float[Tensor, "b m c"],
        pad: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "b h n m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend from `query` to `key` and `value` (positions are the caller's business).

        Raises:
            ValueError: if there are no keys at all.
        """
        if key.shape[1] == 0:
            raise ValueError(f"attention needs at least one key, got key of shape {tuple(key.shape)}")
        return self.attend(query, self.project(key, value), pad, bias)


class FeedForward(nn.Module):
    """Linear, activation, linear, on each token."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU, dropout: float = 0.0):
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.activation = activation()
        self.contract = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        projected: Tensor = self.contract(self.dropout(self.activation(self.expand(x))))
        return projected


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        dim: channels.
        heads: attention heads; divides `dim`.
        mlp_ratio: hidden width of the feed-forward over `dim`.
        activation: constructor of the feed-forward's activation.
        drop_path: rate of stochastic depth on both branches.
        dropout: of attention weights and of the feed-forward's hidden units.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Callable[[], nn.Module] = nn.GELU,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, dropout)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, round(dim * mlp_ratio), activation, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], keep: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.attention(self.norm_attention(x), keep))
        x = x + self.drop_path(self.mlp(self.norm_mlp(x)))
        return x


def resize_positions(
    positions: Float[Tensor, "n c"],
    source: tuple[int, int],
    target: tuple[int, int],
    prefix: int = 1,
    mode: Literal["bilinear", "bicubic"] = "bilinear",
) -> Float[Tensor, "m c"]:
    """Positional embeddings of a grid, resampled to another grid. Embeddings of equal grids are returned as they are.

    Args:
        positions: `prefix` embeddings that belong to no place (the class token's), then one for each place, row by row.
        source, target: rows and columns of the grids.
        prefix: how many of the first are kept as they are.
        mode: interpolation; corners are not aligned, no anti-aliasing.

    Raises:
        ValueError: if the source grid does not have as many places as there are embeddings.
    """
    if positions.shape[0] != prefix + source[0] * source[1]:
        raise ValueError(f"{positions.shape[0]} positions are not {prefix} + {source[0]} × {source[1]}")
    if source == target:
        return positions
    fixed, places = positions[:prefix], positions[prefix:]
    grid = rearrange(places, "(y x) c -> 1 c y x", y=source[0])
    resized = F.interpolate(grid.float(), size=target, mode=mode, align_corners=False).to(grid.dtype)
    return torch.cat([fixed, rearrange(resized, "1 c y x -> (y x) c")])
