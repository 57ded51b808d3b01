"""Selection and aggregation of all modalities as one differentiable step: the numbers of the composed operations, for less.

`MultiModalSDTPS` trains through this function wherever the formulas allow (`fusable`). What is saved, against automatic
differentiation of the same formulas:

* Kept tokens' scores reach the loss through nothing (a hard mask is a constant), so the score predictor is differentiated
  at the dropped tokens alone. That halves the backward pass of the module's largest matrix products.
* A token is either kept or dropped, so its gradient is one zero-filled tensor with two sets of rows added, not a full-size
  tensor for each gather and one more for the predictor.
* Gathered and normalised tokens are made again in the backward pass instead of stored: gathering is cheaper than touching
  fresh memory, and the step holds an eighth of the activations (1.7 of 13.6 MiB at b = 8: benchmarks/token_selection.py).
* The gradient of a cosine's tokens is one tensor, not one for the product, one for the length and their sum (`CosineMaps`).
* What has no parameters runs once for all modalities, and gradients that meet are added by the product that makes the last.

Axes: m modalities, b batch, n tokens, k kept, d dropped, t aggregated, c channels, h hidden. `to_x` is the derivative of the
loss with respect to x. There is no second derivative; asking for one is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as hooks

aten = torch.ops.aten


class Weights(NamedTuple):
    """Parameters of one modality: the score predictor's (eq. 1), then the aggregation's (eq. 4)."""

    score_in: Float[Tensor, "h c"]
    score_in_bias: Float[Tensor, " h"]
    score_out: Float[Tensor, "1 h"]
    score_out_bias: Float[Tensor, " 1"]
    norm: Float[Tensor, " c"]
    norm_bias: Float[Tensor, " c"]
    mix_in: Float[Tensor, "a c"]
    mix_in_bias: Float[Tensor, " a"]
    mix_out: Float[Tensor, "t a"]
    mix_out_bias: Float[Tensor, " t"]
    scale: Float[Tensor, "1 1 1"]


class Settings(NamedTuple):
    """What the step needs beside tensors.

    Attributes:
        modalities: m.
        kept: k.
        predictor_share: factor of the predictor in the score, 1 - 2 beta.
        extra_tau: temperature of the extra token's weights.
        norm_eps: epsilon of the layer norm.
    """

    modalities: int
    kept: int
    predictor_share: float
    extra_tau: float
    norm_eps: float


def listened(module: nn.Module) -> bool:
    """Whether somebody hooked the module and waits for its call."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


PREDICTOR = (nn.Linear, nn.GELU, nn.Linear, nn.Sigmoid)  # what the step computes for eq. 1
COMBINER = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)  # and for eq. 4


def consists_of(network: object, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a network is a plain `nn.Sequential` of exactly these layers, all with weight and bias, the GELUs exact."""
    return (
        type(network) is nn.Sequential
        and tuple(map(type, network)) == tuple(kinds)
        and all(getattr(layer, "bias", 0) is not None and getattr(layer, "weight", 0) is not None for layer in network)
        and all(layer.approximate == "none" for layer in network if isinstance(layer, nn.GELU))
    )


def fusable(tensors: Sequence[Tensor], layers: Sequence[nn.Module]) -> bool:
    """Whether a hand-written gradient is wanted (something is to be differentiated) and may stand for these layers.

    It may not in half precision or under autocast (the composed operations know the casting rules), while tracing,
    compiling or exporting (they need to see operations), under a transform of `torch.func` or in forward mode (which have
    no rule for it), or when a layer is not plain or is listened to by a hook.
    """
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and any(t.requires_grad for t in tensors)
        and all(t.dtype == torch.float32 or t.dtype == torch.float64 for t in tensors)
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and not hooks._has_any_global_hook()
        and all(type(layer) in (nn.Linear, nn.LayerNorm) and not listened(layer) for layer in layers)
    )


class CosineMaps(torch.autograd.Function):
    """Patches (b, n, c) and unit directions (b, g, c) -> cosines (b, g, n), as `attention_maps` has them (eq. 2).

    The gradient of the patches is written once, by one scaling and one product; composed, it is made of three tensors of
    their size. What is stored has n entries a guide.
    """

    @staticmethod
    def forward(ctx: Any, patches: Float[Tensor, "b n c"], directions: Float[Tensor, "b g c"]) -> Float[Tensor, "b g n"]:
        lengths = torch.linalg.vector_norm(patches, dim=-1, keepdim=True).clamp_min_(1e-12)
        cosines = torch.bmm(patches, directions.transpose(1, 2)).div_(lengths)
        ctx.save_for_backward(patches, directions, lengths, cosines)
        return cosines.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, to_maps: Float[Tensor, "b g n"]) -> tuple[Tensor | None, Tensor | None]:
        _no_second_derivative()
        patches, directions, lengths, cosines = ctx.saved_tensors
        to_products = to_maps.transpose(1, 2) / lengths
        to_patches = to_directions = None
        if ctx.needs_input_grad[0]:
            along = (to_products * cosines).sum(-1, keepdim=True).div_(lengths)
            to_patches = torch.mul(patches, along.neg_()).baddbmm_(to_products, directions)
        if ctx.needs_input_grad[1]:
            to_directions = torch.bmm(to_products.transpose(1, 2), patches)
        return to_patches, to_directions


def _no_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("the fused step has no second derivative; build MultiModalSDTPS with fused = False to get one")


class SelectAndAggregate(torch.autograd.Function):
    """Patches of all modalities -> aggregated tokens with the extra token last, and what was kept (eq. 1, 3 and 4).

    Inputs: settings; the attention part of the scores (m·b, n), differentiable; the patches of each modality; the weights of
    each, in the order of `Weights`. Outputs: tokens (b, t + 1, c) of each modality; then, without gradient, the mask (m·b, n)
    and all positions by descending score (m·b, n).
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, attention: Float[Tensor, "mb n"], *tensors: Tensor) -> tuple[Tensor, ...]:
        m, k, share, extra_tau, eps = settings
        patches = tensors[:m]
        weights = [Weights(*tensors[i : i + len(Weights._fields)]) for i in range(m, len(tensors), len(Weights._fields))]
        b, n, c = patches[0].shape
        rows = [p.reshape(b * n, c) for p in patches]

        hidden = [torch.addmm(w.score_in_bias, r, w.score_in.t()) for r, w in zip(rows, weights)]
        logits = [torch.addmm(w.score_out_bias, F.gelu(h), w.score_out.t()) for h, w in zip(hidden, weights)]
        predicted = torch.cat(logits).sigmoid_().view(m * b, n)  # eq. 1
        scores = torch.add(attention, predicted, alpha=share)  # eq. 3
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(scores).scatter_(1, order[:, :k], 1.0)
        pooling = (ranked[:, k:] / extra_tau).softmax(-1).view(m, b, 1, n - k)
        dropped_predicted = predicted.gather(1, order[:, k:]).view(m, b, n - k)
        row = order.view(m, b, n) + torch.arange(0, b * n, n, device=order.device)[:, None]
        kept_rows, dropped_rows = row[:, :, :k].reshape(m, b * k), row[:, :, k:].reshape(m, b * (n - k))

        outputs, saved = [], []
        for i, w in enumerate(weights):
            kept = rows[i].index_select(0, kept_rows[i])
            normed, _, _ = torch.native_layer_norm(kept, (c,), w.norm, w.norm_bias, eps)
            mixing = torch.addmm(w.mix_in_bias, normed, w.mix_in.t())
            mix = torch.addmm(w.mix_out_bias, F.gelu(mixing), w.mix_out.t()).view(b, k, len(w.mix_out)).transpose(1, 2)
            combining = (mix * w.scale).softmax(-1)  # eq. 4
            aggregated = torch.bmm(combining, kept.view(b, k, c))
            del kept, normed
            extra = torch.bmm(pooling[i], rows[i].index_select(0, dropped_rows[i]).view(b, n - k, c))
            outputs.append(torch.cat([aggregated, extra], 1))
            saved += [
                patches[i], kept_rows[i], dropped_rows[i], hidden[i].index_select(0, dropped_rows[i]), dropped_predicted[i],
                pooling[i], mixing, mix, combining, *w,
            ]  # fmt: skip
        ctx.save_for_backward(*saved)
        ctx.settings = settings
        ctx.mark_non_differentiable(mask, order)
        ctx.set_materialize_grads(False)
        return (*outputs, mask, order)

    @staticmethod
    def backward(ctx: Any, *to_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        _no_second_derivative()
        settings: Settings = ctx.settings
        m = settings.modalities
        stored, each = ctx.saved_tensors, len(ctx.saved_tensors) // m
        to_attention: list[Tensor | None] = []
        to_patches: list[Tensor | None] = []
        to_weights: list[Tensor | None] = []
        for i in range(m):
            to_output = to_outputs[i]
            if to_output is None:  # this modality's output was not used
                to_attention.append(None)
                to_patches.append(None)
                to_weights += [None] * len(Weights._fields)
                continue
            of_attention, of_patches, of_weights = _backward_of_one(
                settings, ctx.needs_input_grad[1], ctx.needs_input_grad[2 + i], to_output, *stored[i * each : (i + 1) * each]
            )
            to_attention.append(of_attention)
            to_patches.append(of_patches)
            to_weights += of_weights
        joined = None
        if ctx.needs_input_grad[1]:
            zeros = stored[0].new_zeros(stored[0].shape[:2])
            joined = torch.cat([zeros if t is None else t for t in to_attention])
        return (None, joined, *to_patches, *to_weights)


def _backward_of_one(
    settings: Settings,
    need_attention: bool,
    need_patches: bool,
    to_output: Float[Tensor, "b o c"],
    patches: Float[Tensor, "b n c"],
    kept_rows: Int[Tensor, " bk"],
    dropped_rows: Int[Tensor, " bd"],
    hidden: Float[Tensor, "bd h"],
    predicted: Float[Tensor, "b d"],
    pooling: Float[Tensor, "b 1 d"],
    mixing: Float[Tensor, "bk a"],
    mix: Float[Tensor, "b t k"],
    combining: Float[Tensor, "b t k"],
    *weights: Tensor,
) -> tuple[Tensor | None, Tensor | None, Weights]:
    """The chain rule for one modality, last operation first: aggregation, then extra token, then scores."""
    _, k, share, extra_tau, eps = settings
    w = Weights(*weights)
    b, n, c = patches.shape
    d, rows = n - k, patches.reshape(b * n, c)
    to_aggregated, to_extra = to_output[:, :-1], to_output[:, -1:]

    kept = rows.index_select(0, kept_rows)
    to_combining = torch.bmm(to_aggregated, kept.view(b, k, c).transpose(1, 2))
    to_scaled = aten._softmax_backward_data(to_combining, combining, -1, combining.dtype)
    to_scale = (to_scaled * mix).sum().view_as(w.scale)
    to_mix = (to_scaled * w.scale).transpose(1, 2).reshape(b * k, len(w.mix_out))
    to_mix_out, to_mix_out_bias = to_mix.t() @ F.gelu(mixing), to_mix.sum(0)
    to_mixing = aten.gelu_backward(to_mix @ w.mix_out, mixing)
    normed, mean, rstd = torch.native_layer_norm(kept, (c,), w.norm, w.norm_bias, eps)
    to_mix_in, to_mix_in_bias = to_mixing.t() @ normed, to_mixing.sum(0)
    to_normed = torch.mm(to_mixing, w.mix_in, out=normed)  # the values are not needed any more, their memory is
    to_kept, to_norm, to_norm_bias = aten.native_layer_norm_backward(
        to_normed, kept, (c,), mean, rstd, w.norm, w.norm_bias, [need_patches, True, True]
    )
    to_patches = None
    if need_patches:
        to_kept.view(b, k, c).baddbmm_(combining.transpose(1, 2), to_aggregated)
        to_patches = rows.new_zeros(b * n, c).index_add_(0, kept_rows, to_kept)
    del kept, normed, to_normed, to_kept

    dropped = rows.index_select(0, dropped_rows)
    to_pooling = torch.bmm(to_extra, dropped.view(b, d, c).transpose(1, 2))
    to_scores = aten._softmax_backward_data(to_pooling, pooling, -1, pooling.dtype).view(b, d)
    if extra_tau != 1:
        to_scores = to_scores / extra_tau
    to_logit = aten.sigmoid_backward(to_scores, predicted).mul_(share).view(b * d, 1)
    to_score_out, to_score_out_bias = to_logit.t() @ F.gelu(hidden), to_logit.sum(0)
    to_hidden = aten.gelu_backward(to_logit * w.score_out, hidden)
    to_score_in, to_score_in_bias = to_hidden.t() @ dropped, to_hidden.sum(0)
    if to_patches is not None:
        to_dropped = torch.mul(pooling.transpose(1, 2), to_extra, out=dropped.view(b, d, c)).view(b * d, c)
        to_patches = to_patches.index_add_(0, dropped_rows, to_dropped.addmm_(to_hidden, w.score_in)).view(b, n, c)
    to_attention = None
    if need_attention:
        to_attention = to_scores.new_zeros(b * n).index_add_(0, dropped_rows, to_scores.reshape(-1)).view(b, n)
    return to_attention, to_patches, Weights(
        to_score_in, to_score_in_bias, to_score_out, to_score_out_bias, to_norm, to_norm_bias,
        to_mix_in, to_mix_in_bias, to_mix_out, to_mix_out_bias, to_scale,
    )  # fmt: skip
