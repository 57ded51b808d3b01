"""Token aggregation of SDTPS: the kept tokens become fewer, each a convex combination of them.

SEPS, sec. 3 (eq. 4). Axes: b batch, k kept tokens, t output tokens, c channels.

    W = softmax over k of scale · MLP(LayerNorm(v))ᵀ          (t, k)        eq. 4
    out = W v

The normalised tokens feed the weights only; what is combined are the tokens as they came.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from core.options import require_choice, require_fraction, require_idle
from core.registry import register
from plugins.sdtps.token_sparse import Rounding, token_count


@register("module", paper="SEPS, sec. 3", equations="eq. 4")
class TokenAggregation(nn.Module):
    """Combines k kept tokens into t = floor(n · aggr_ratio · sparse_ratio) tokens (eq. 4).

    Args:
        dim: channels c of a token.
        num_patches: n, the tokens before selection (not the k kept ones): t is counted from it.
        sparse_ratio: rho of the selection before it.
        aggr_ratio: alpha, the share of kept tokens that remain, in (0, 1].
        dim_ratio: hidden channels as a share of c, rounded down.
        round_aggregate: how n · alpha · rho becomes t, multiplied in that order; see `token_count`.
        mask_mode: what a mask D given to `forward` does to the logits. `log` adds log D, so that a weight is proportional to
            D and D's gradient is of order 1. `additive` subtracts (1 - D) · mask_penalty, as the release does: the same
            values for a mask of ones, and a gradient multiplied by the penalty. `none` ignores D.
        mask_penalty: the penalty of `additive`.

    Raises:
        ValueError: for a ratio outside (0, 1], ratios that leave no token, or a penalty that cannot take effect.
    """

    def __init__(
        self,
        dim: int,
        num_patches: int = 128,
        sparse_ratio: float = 0.5,
        aggr_ratio: float = 0.4,
        *,
        dim_ratio: float = 0.2,
        round_aggregate: Literal["ceil", "floor", "exact_ceil", "exact_floor"] = "floor",
        mask_mode: Literal["log", "additive", "none"] = "log",
        mask_penalty: float = 1e10,
    ):
        super().__init__()
        require_fraction("sparse_ratio", sparse_ratio)
        require_fraction("aggr_ratio", aggr_ratio)
        require_fraction("dim_ratio", dim_ratio)
        require_choice("round_aggregate", round_aggregate, Rounding)
        require_choice("mask_mode", mask_mode, Literal["log", "additive", "none"])
        if mask_mode != "additive":
            require_idle(TokenAggregation, {"mask_penalty": mask_penalty}, f"mask_mode = {mask_mode!r} has no penalty")
        self.num_out = token_count(num_patches, aggr_ratio, sparse_ratio, rounding=round_aggregate)
        hidden = int(dim * dim_ratio)
        if self.num_out < 1 or hidden < 1:
            raise ValueError(
                f"{num_patches} patches · aggr_ratio {aggr_ratio} · sparse_ratio {sparse_ratio} leave {self.num_out} tokens, "
                f"and dim {dim} · dim_ratio {dim_ratio} leaves {hidden} hidden channels; both must be at least 1"
            )
        self.mask_mode, self.mask_penalty = mask_mode, mask_penalty
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, self.num_out))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    @property
    def layers(self) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear]:
        """The layer norm and the two linear layers of the weights' MLP."""
        norm, first, _, last = self.weight
        return cast(nn.LayerNorm, norm), cast(nn.Linear, first), cast(nn.Linear, last)

    def forward(self, tokens: Float[Tensor, "b k c"], mask: Float[Tensor, "b k"] | None = None) -> Float[Tensor, "b t c"]:
        """Aggregate.

        Args:
            tokens: the kept tokens; their order does not matter.
            mask: D at these tokens, or None for all ones. A sample whose mask is all zero is treated as if it had none:
                the result is finite, and means nothing.
        """
        logits = rearrange(self.weight(tokens), "b k t -> b t k") * self.scale
        if mask is not None and self.mask_mode != "none":
            # In float32 at least: 1e10 is infinite in float16, and infinity minus infinity is not a number.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            mask = rearrange(mask, "b k -> b 1 k").to(logits.dtype)
            if self.mask_mode == "log":
                logits = logits + mask.clamp_min(torch.finfo(mask.dtype).tiny).log()
            else:
                logits = logits - (1 - mask) * self.mask_penalty
        return logits.softmax(-1).to(tokens.dtype) @ tokens
