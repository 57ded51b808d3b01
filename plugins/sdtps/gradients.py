"""Selection and aggregation with hand-written gradients: the same numbers as the composed operations, for less work.

What is saved, per modality, against automatic differentiation of the same formulas:

* Kept tokens' scores reach the loss through nothing (a hard mask is a constant), so the score predictor is differentiated
  at the dropped tokens alone. That halves the backward pass of the module's largest matrix products.
* A token is either kept or dropped, so the token gradient is one zero-filled tensor with two sets of rows added to it,
  not a full-size tensor for each of the gathers and one more for the predictor.
* Gradients that meet in one tensor are accumulated by the matrix product that makes the second one.

Axes: b batch, n tokens, k kept, d dropped, c channels, h hidden. Derivatives are written out in the order of the chain rule.
Second derivatives do not exist here (PyTorch says so if asked); `fusable` decides when these functions may be used.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def fusable(*tensors: Tensor) -> bool:
    """Whether a hand-written gradient is needed (something is to be differentiated) and allowed here.

    Not allowed: half precision and autocast (the composed operations know the casting rules), tracing, compiling and
    exporting (they need to see operations).
    """
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and all(t.dtype == torch.float32 or t.dtype == torch.float64 for t in tensors)
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


class SplitTokens(torch.autograd.Function):
    """Tokens -> (kept tokens, weighted mean of the dropped ones), differentiated also through the dropped tokens' scores.

    The caller has already computed all scores without a graph. Their gradient is rebuilt from what `forward` is given:
    the predictor's hidden layer and output, of which only the dropped rows are stored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        patches: Float[Tensor, "b n c"],
        attention: Float[Tensor, "b n"],
        first_weight: Float[Tensor, "h c"],
        first_bias: Float[Tensor, " h"],
        last_weight: Float[Tensor, "1 h"],
        last_bias: Float[Tensor, " 1"],
        hidden: Float[Tensor, "bn h"],
        activated: Float[Tensor, "bn h"],
        predicted: Float[Tensor, " bd"],
        pooling: Float[Tensor, "b d"],
        kept_rows: Int[Tensor, " bk"],
        dropped_rows: Int[Tensor, " bd"],
        predictor_share: float,
        extra_tau: float,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            attention: the attention part of the scores; only its gradient matters here.
            first_weight … last_bias: the predictor's two linear layers.
            hidden: the first layer's output, before the activation, all tokens in rows.
            activated: the same after the activation.
            predicted: the predictor's output, after the sigmoid, at the dropped tokens.
            pooling: softmax of the dropped tokens' scores over temperature.
            kept_rows, dropped_rows: rows of `patches` flattened to (b·n, c).
            predictor_share: the factor of `predicted` in the score (1 - 2·beta in eq. 3).
            extra_tau: temperature of `pooling`.
        """
        b, n, c = patches.shape
        rows = patches.reshape(b * n, c)
        kept = rows.index_select(0, kept_rows).view(b, -1, c)
        dropped = rows.index_select(0, dropped_rows).view(b, -1, c)
        ctx.save_for_backward(
            dropped, hidden.index_select(0, dropped_rows), activated.index_select(0, dropped_rows), predicted, pooling,
            kept_rows, dropped_rows, first_weight, last_weight,
        )  # fmt: skip
        ctx.n, ctx.predictor_share, ctx.extra_tau = n, predictor_share, extra_tau
        return kept, torch.bmm(pooling[:, None], dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_kept, to_extra = grads
        dropped, hidden, activated, predicted, pooling, kept_rows, dropped_rows, first_weight, last_weight = ctx.saved_tensors
        b, d, c = dropped.shape
        need_patches, need_attention, *need_weights = ctx.needs_input_grad[:6]

        to_pooling = torch.bmm(to_extra, dropped.transpose(1, 2)).squeeze(1)
        to_scores = aten._softmax_backward_data(to_pooling, pooling, -1, pooling.dtype)
        if ctx.extra_tau != 1:
            to_scores = to_scores / ctx.extra_tau
        to_logit = aten.sigmoid_backward(to_scores.view(-1), predicted).mul_(ctx.predictor_share)[:, None]
        to_hidden = aten.gelu_backward(to_logit * last_weight, hidden)

        to_patches = to_attention = to_first_weight = to_first_bias = to_last_weight = to_last_bias = None
        if need_attention:
            to_attention = to_scores.new_zeros(b * ctx.n).index_add_(0, dropped_rows, to_scores.view(-1)).view(b, ctx.n)
        if any(need_weights):
            to_first_weight, to_first_bias = to_hidden.t() @ dropped.view(b * d, c), to_hidden.sum(0)
            to_last_weight, to_last_bias = to_logit.t() @ activated, to_logit.sum(0)
        if need_patches:
            to_dropped = (pooling[:, :, None] * to_extra).view(b * d, c).addmm_(to_hidden, first_weight)
            to_patches = dropped.new_zeros(b * ctx.n, c)
            to_patches.index_add_(0, kept_rows, to_kept.reshape(-1, c)).index_add_(0, dropped_rows, to_dropped)
            to_patches = to_patches.view(b, ctx.n, c)
        weights = (to_first_weight, to_first_bias, to_last_weight, to_last_bias)
        return (to_patches, to_attention, *weights, *(None,) * 8)


class Aggregate(torch.autograd.Function):
    """Kept tokens -> convex combinations of them, whose weights an MLP reads off the normalised tokens (eq. 4)."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Float[Tensor, "b k c"],
        norm_weight: Float[Tensor, " c"],
        norm_bias: Float[Tensor, " c"],
        first_weight: Float[Tensor, "h c"],
        first_bias: Float[Tensor, " h"],
        last_weight: Float[Tensor, "t h"],
        last_bias: Float[Tensor, " t"],
        scale: Float[Tensor, "1 1 1"],
        eps: float,
    ) -> Tensor:
        b, k, c = tokens.shape
        normed, mean, rstd = torch.native_layer_norm(tokens, (c,), norm_weight, norm_bias, eps)
        hidden = torch.addmm(first_bias, normed.view(-1, c), first_weight.t())
        activated = nn.functional.gelu(hidden)
        logits = torch.addmm(last_bias, activated, last_weight.t()).view(b, k, -1).transpose(1, 2)
        weights = (logits * scale).softmax(-1)
        ctx.save_for_backward(
            tokens, normed, mean, rstd, hidden, activated, logits, weights, norm_weight, norm_bias, first_weight, last_weight, scale
        )
        return torch.bmm(weights, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (to_out,) = grads
        tokens, normed, mean, rstd, hidden, activated, logits, weights, norm_weight, norm_bias, first_weight, last_weight, scale = (
            ctx.saved_tensors
        )
        b, k, c = tokens.shape
        to_weights = torch.bmm(to_out, tokens.transpose(1, 2))
        to_scaled = aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        to_scale = (to_scaled * logits).sum().view_as(scale)
        to_logits = (to_scaled * scale).transpose(1, 2).reshape(b * k, -1)
        to_hidden = aten.gelu_backward(to_logits @ last_weight, hidden)
        to_normed = (to_hidden @ first_weight).view(b, k, c)
        to_tokens, to_norm_weight, to_norm_bias = aten.native_layer_norm_backward(
            to_normed, tokens, (c,), mean, rstd, norm_weight, norm_bias, [True, True, True]
        )
        to_tokens = to_tokens.baddbmm_(weights.transpose(1, 2), to_out) if ctx.needs_input_grad[0] else None
        to_first_weight, to_first_bias = to_hidden.t() @ normed.view(-1, c), to_hidden.sum(0)
        to_last_weight, to_last_bias = to_logits.t() @ activated, to_logits.sum(0)
        return (
            to_tokens, to_norm_weight, to_norm_bias, to_first_weight, to_first_bias, to_last_weight, to_last_bias, to_scale, None
        )  # fmt: skip
