"""Light Hamburger head: features of three levels, one low-rank reconstruction, one classifier.

Geng et al., Is Attention Better Than Matrix Decomposition?, ICLR 2021 (arXiv 2109.04553), in the light form of SegNeXt that
DFormerv2's released code uses. The reconstruction is a non-negative matrix factorisation X ≈ D C^T by multiplicative updates:

    C <- C · (X^T D) / (C D^T D + eps),   D <- D · (X C) / (D C^T C + eps)

Axes: b batch, c channels, n = h·w positions, r bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from core.registry import register
from plugins.sam.batch_norm import BatchNorm


class ConvNorm(nn.Sequential):
    """1x1 convolution without bias and batch norm, with a ReLU where asked."""

    def __init__(self, dim: int, out_dim: int, *, eps: float, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.norm = BatchNorm(out_dim, eps=eps)
        if relu:
            self.relu = nn.ReLU()


class MatrixDecomposition(nn.Module):
    """Non-negative matrix factorisation of a feature map, without parameters; gradients flow through every update.

    Args:
        dim: channels.
        rank: number of bases r.
        train_steps, eval_steps: updates of coefficients and bases; one more of the coefficients follows.
        eval_seed: seed of the initial bases in evaluation, the same for every sample, so that evaluation is repeatable and
            a sample does not depend on its batch. None draws them anew each time, as released.
        eps: added to each denominator.

    Shapes: (b, c, h, w), non-negative -> (b, c, h, w). Runs in float32 whatever the surrounding precision.
    """

    bases: Tensor

    def __init__(
        self, dim: int, *, rank: int = 64, train_steps: int = 6, eval_steps: int = 7, eval_seed: int | None = 0, eps: float = 1e-6
    ):
        super().__init__()
        for name, value, least in (("rank", rank, 1), ("train_steps", train_steps, 0), ("eval_steps", eval_steps, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.dim, self.rank, self.train_steps, self.eval_steps, self.eps = dim, rank, train_steps, eval_steps, eps
        self.eval_seed = eval_seed
        if eval_seed is not None:
            drawn = torch.rand(dim, rank, generator=torch.Generator("cpu").manual_seed(eval_seed), device="cpu")
            self.register_buffer("bases", torch.empty(dim, rank).copy_(drawn), persistent=False)

    def initial_bases(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c r"]:
        if self.training or self.eval_seed is None:
            drawn = torch.rand(x.shape[0], self.dim, self.rank, device=x.device, dtype=x.dtype)
        else:
            drawn = repeat(self.bases.to(x.dtype), "c r -> b c r", b=x.shape[0])
        return F.normalize(drawn, dim=1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        kind = features.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            x = rearrange(features.float(), "b c h w -> b c (h w)")
            bases = self.initial_bases(x)
            coefficients = einsum(x, bases, "b c n, b c r -> b n r").softmax(dim=-1)
            for _ in range(self.train_steps if self.training else self.eval_steps):
                coefficients = self.update_coefficients(x, bases, coefficients)
                gram = einsum(coefficients, coefficients, "b n r, b n s -> b r s")
                bases = bases * (x @ coefficients) / (bases @ gram + self.eps)
            coefficients = self.update_coefficients(x, bases, coefficients)
            out = einsum(bases, coefficients, "b c r, b n r -> b c n")
        return rearrange(out, "b c (h w) -> b c h w", h=features.shape[2]).to(features.dtype)

    def update_coefficients(
        self, x: Float[Tensor, "b c n"], bases: Float[Tensor, "b c r"], coefficients: Float[Tensor, "b n r"]
    ) -> Float[Tensor, "b n r"]:
        gram = einsum(bases, bases, "b c r, b c s -> b r s")
        return coefficients * einsum(x, bases, "b c n, b c r -> b n r") / (coefficients @ gram + self.eps)


class Hamburger(nn.Module):
    """relu(x + bn(conv(NMF(relu(conv(x)))))). Shapes: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, dim: int, *, rank: int, train_steps: int, eval_steps: int, eval_seed: int | None, bn_eps: float):
        super().__init__()
        self.enter = nn.Conv2d(dim, dim, 1)
        self.decompose = MatrixDecomposition(dim, rank=rank, train_steps=train_steps, eval_steps=eval_steps, eval_seed=eval_seed)
        self.leave = ConvNorm(dim, dim, eps=bn_eps, relu=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.relu(x + self.leave(self.decompose(F.relu(self.enter(x)))))


@register("module", paper="Hamburger (arXiv 2109.04553), light form of DFormerv2's release", equations="alg. 1 (NMF)")
class HamburgerHead(nn.Module):
    """Per-pixel class logits from feature maps of several resolutions.

    Every level is resized to the first, all are concatenated, squeezed, reconstructed at low rank and classified.

    Args:
        in_dims: channels of the levels.
        classes: number of classes.
        dim: width of the classifier (the release's decoder_embed_dim).
        ham_dim: width of the Hamburger: 512 in the DFormer release whatever `dim` is; None follows `dim`, as the text-fusion
            release does (its size L is 1024 wide, with 4.5 instead of 1.8 million parameters).
        rank, train_steps, eval_steps, eval_seed: see MatrixDecomposition (eval_seed is the switch `nmf_eval_seed`).
        dropout: channel dropout before the classifier.
        bn_eps: epsilon of the batch norms. The release sets 1e-3 only where a loss is given, and else evaluates with 1e-5.

    Shapes: maps (b, in_dims[i], h_i, w_i) -> logits (b, classes, h_0, w_0).
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        classes: int,
        dim: int = 512,
        ham_dim: int | None = 512,
        rank: int = 64,
        train_steps: int = 6,
        eval_steps: int = 7,
        eval_seed: int | None = 0,
        dropout: float = 0.1,
        bn_eps: float = 1e-3,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        inner = dim if ham_dim is None else ham_dim
        self.squeeze = ConvNorm(sum(in_dims), inner, eps=bn_eps)
        self.hamburger = Hamburger(
            inner, rank=rank, train_steps=train_steps, eval_steps=eval_steps, eval_seed=eval_seed, bn_eps=bn_eps
        )
        self.align = ConvNorm(inner, dim, eps=bn_eps)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor]) -> Float[Tensor, "b k h w"]:
        size = features[0].shape[-2:]
        levels = [features[0], *(F.interpolate(f, size=size, mode="bilinear", align_corners=False) for f in features[1:])]
        x = self.align(self.hamburger(self.squeeze(torch.cat(levels, dim=1))))
        return self.classify(self.dropout(x))
