"""Domain encoder of SAP: what an image's rendering style is, read off the statistics of a fixed filter bank.

After the release's StyleStatDomainEncoder.

Axes: b images, f filters, h w pixels, r Gram rank, d domain channels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from core.options import require_idle
from core.registry import register
from plugins.sap.intrinsic_encoder import LUMA, pad_and_correlate
from plugins.sap.precision import full_precision

SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))
LAPLACIAN = ((1.0, 1.0, 1.0), (1.0, -8.0, 1.0), (1.0, 1.0, 1.0))
DOG_SIGMAS = ((0.6, 1.0), (1.0, 1.6), (0.6, 1.6))
GABOR_DEGREES = (0, 45, 90, 135)
GABOR_WAVELENGTHS = (2.0, 3.0)


def gaussian(sigma: float, size: int) -> Float[Tensor, "h w"]:
    """An isotropic Gaussian that sums to 1."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-axis.square() / (2 * sigma**2))
    plane = torch.outer(line, line)
    return plane / plane.sum()


def gabor(degrees: float, wavelength: float, size: int) -> Float[Tensor, "h w"]:
    """An even Gabor patch: sigma 0.56 wavelengths, aspect 0.5."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    theta = math.radians(degrees)
    along, across = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
    sigma = 0.56 * wavelength
    return torch.exp(-(along.square() + 0.25 * across.square()) / (2 * sigma**2)) * torch.cos(2 * math.pi * along / wavelength)


def filter_bank(size: int, *, use_dog: bool, use_gabor: bool) -> Float[Tensor, "f 1 h w"]:
    """Scharr x and y, Laplacian, differences of Gaussians, Gabor patches; each sums to 0 and has L1 norm 1.

    The third difference of Gaussians is a combination of the two before it: the full bank of 14 has rank 13.
    """
    margin = (size - 3) // 2
    scharr, laplacian = torch.tensor(SCHARR, dtype=torch.float64), torch.tensor(LAPLACIAN, dtype=torch.float64)
    bank = [F.pad(k, (margin,) * 4) for k in (scharr, scharr.t(), laplacian)]
    if use_dog:
        bank += [gaussian(a, size) - gaussian(b, size) for a, b in DOG_SIGMAS]
    if use_gabor:
        bank += [gabor(degrees, wavelength, size) for degrees in GABOR_DEGREES for wavelength in GABOR_WAVELENGTHS]
    kernels = torch.stack(bank)
    kernels = kernels - kernels.mean((1, 2), keepdim=True)
    kernels = kernels / kernels.abs().sum((1, 2), keepdim=True)
    return rearrange(kernels.float(), "f h w -> f 1 h w")


class FilterBank(nn.Module):
    """Responses of the luma to the fixed filters, each times its gain."""

    rgb2gray: Tensor
    base_weight: Tensor

    def __init__(
        self, size: int, *, use_dog: bool, use_gabor: bool, trainable_gain: bool, padding_mode: Literal["zeros", "replicate"]
    ):
        super().__init__()
        self.padding_mode = padding_mode
        self.register_buffer("rgb2gray", torch.tensor(LUMA))
        self.register_buffer("base_weight", filter_bank(size, use_dog=use_dog, use_gabor=use_gabor))
        self.gain = nn.Parameter(torch.ones(self.base_weight.shape[0]), requires_grad=trainable_gain)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f h w"]:
        gray = einsum(images, self.rgb2gray, "b c h w, c -> b h w")
        kernels = self.base_weight * rearrange(self.gain, "f -> f 1 1 1")
        return pad_and_correlate(rearrange(gray, "b h w -> b 1 h w"), kernels, self.padding_mode)


class FilterEnergy(nn.Module):
    """Magnitude of the responses, normalised over filters and pixels of each image."""

    def __init__(self, filters: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, filters)

    def forward(self, responses: Float[Tensor, "b f h w"]) -> Float[Tensor, "b f h w"]:
        return self.norm((responses.square() + 1e-6).sqrt())


class StyleStatistics(nn.Module):
    """Mean and log deviation of each filter energy at scales 1, 1/2, 1/4, and a compressed Gram matrix at full scale.

    Where height and width divide by 4 the three means are the same numbers: of 148 statistics 28 are copies.

    Args:
        filters: number of energy maps.
        gram_rank: rows of the fixed projection before the Gram matrix, and
        gram_dim: of the one after it. Both None leaves the Gram part out.
    """

    gram_proj_in: Tensor
    gram_proj_out: Tensor

    def __init__(self, filters: int, gram_rank: int | None, gram_dim: int | None):
        super().__init__()
        self.dim = 6 * filters
        self.gram_rank = gram_rank
        if gram_rank is not None and gram_dim is not None:
            self.dim += gram_dim
            fixed = torch.Generator().manual_seed(0)  # the projections are constants of the method, the same in every run
            upper = gram_rank * (gram_rank + 1) // 2
            self.register_buffer("gram_proj_in", F.normalize(torch.randn(gram_rank, filters, generator=fixed), dim=1))
            self.register_buffer("gram_proj_out", F.normalize(torch.randn(gram_dim, upper, generator=fixed), dim=1))
            self.gram_gain = nn.Parameter(torch.ones(gram_rank))
            rows, columns = torch.triu_indices(gram_rank, gram_rank)
            self.register_buffer("upper", rows * gram_rank + columns, persistent=False)

    def forward(self, energy: Float[Tensor, "b f h w"]) -> Float[Tensor, "b s"]:
        means, deviations = [], []
        for scale in (1, 2, 4):
            pooled = energy if scale == 1 else F.avg_pool2d(energy, scale)
            variance, mean = torch.var_mean(pooled, dim=(2, 3), correction=0)
            means.append(mean)
            deviations.append((variance + 1e-6).sqrt().log())
        parts = [part for pair in zip(means, deviations) for part in pair]
        if self.gram_rank is not None:
            mixed = einsum(self.gram_proj_in * rearrange(self.gram_gain, "r -> r 1"), energy, "r f, b f h w -> b r h w")
            gram = einsum(mixed, mixed, "b r h w, b q h w -> b r q") / (energy.shape[2] * energy.shape[3])
            parts.append(rearrange(gram, "b r q -> b (r q)")[:, self.get_buffer("upper")] @ self.gram_proj_out.t())
        return torch.cat(parts, 1)


class TokenHead(nn.Module):
    """Statistics to one bounded domain feature: LN, Linear 256, GELU, dropout, Linear, tanh, a learned scale."""

    def __init__(self, dim_in: int, dim: int, *, hidden: int, dropout: float, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.ln = nn.LayerNorm(dim_in)
        self.fc1 = nn.Linear(dim_in, hidden)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, statistics: Float[Tensor, "b s"]) -> Float[Tensor, "b d"]:
        hidden = self.drop(F.gelu(self.fc1(self.ln(statistics))))
        return self.fc2(hidden).tanh() * self.scale.clamp(0.1, 10.0)


@register("backbone", paper="SAP release")
class StyleStatDomainEncoder(nn.Module):
    """Domain feature of an image from first and second order statistics of a fixed bank of 14 filters.

    State-dict keys are the release's.

    Args:
        domain_dim: width d of the domain feature.
        kernel_size: side of the filters, odd, at least 3.
        use_gabor: the 8 Gabor patches.
        use_dog: the 3 differences of Gaussians.
        trainable_gain: learn a gain for each filter.
        token_dropout: dropout of the head; 0.2 is the release's recipe (its class default is 0.4).
        token_scale_init: first value of the head's output scale.
        use_gram_stats: append the compressed Gram matrix.
        gram_rank: its fixed projection's rows; 16, as released, is more than the 14 filters.
        gram_out_dim: numbers it is compressed to.
        hidden_dim: width of the head's hidden layer.
        padding_mode: border of the filters: "zeros" (release) or "replicate", see `IntrinsicEncoder`.
    """

    def __init__(
        self,
        domain_dim: int = 64,
        kernel_size: int = 7,
        use_gabor: bool = True,
        use_dog: bool = True,
        trainable_gain: bool = True,
        token_dropout: float = 0.2,
        token_scale_init: float = 1.0,
        use_gram_stats: bool = True,
        gram_rank: int = 16,
        gram_out_dim: int = 64,
        hidden_dim: int = 256,
        padding_mode: Literal["zeros", "replicate"] = "zeros",
    ):
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        if padding_mode not in ("zeros", "replicate"):
            raise ValueError(f"padding_mode must be 'zeros' (release) or 'replicate', got {padding_mode!r}")
        if not use_gram_stats:
            require_idle(StyleStatDomainEncoder, {"gram_rank": gram_rank, "gram_out_dim": gram_out_dim}, "use_gram_stats = False")
        self.dim = domain_dim
        self.filter_bank = FilterBank(
            kernel_size, use_dog=use_dog, use_gabor=use_gabor, trainable_gain=trainable_gain, padding_mode=padding_mode
        )
        filters = self.filter_bank.base_weight.shape[0]
        self.energy = FilterEnergy(filters)
        self.stat_pool = StyleStatistics(filters, gram_rank if use_gram_stats else None, gram_out_dim if use_gram_stats else None)
        self.token_head = TokenHead(
            self.stat_pool.dim, domain_dim, hidden=hidden_dim, dropout=token_dropout, scale=token_scale_init
        )

    def statistics(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b s"]:
        """The style statistics before the head, in float32: 6 a filter, then the Gram part."""
        with full_precision(images):
            return self.stat_pool(self.energy(self.filter_bank(images.float())))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Domain features of normalised images, each entry within plus or minus the head's scale."""
        return self.token_head(self.statistics(images))
