"""Intrinsic ("physical") encoder of SAP: an edge-aware ResNet-12 whose feature map carries the class.

After the release's IntrinsicEncoder. BlurPool: Zhang, ICML 2019. Weight standardisation: Qiao et al. 2019. DropBlock: Ghiasi et
al., NeurIPS 2018, alg. 1. MixStyle: Zhou et al., ICLR 2021, eq. 1-5.

Axes: b images, c channels, h w map.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from core.options import require_idle
from core.registry import register
from plugins.sap.precision import full_precision

LUMA = (0.2989, 0.5870, 0.1140)


def pad_and_correlate(x: Tensor, kernel: Tensor, padding_mode: Literal["zeros", "replicate"]) -> Tensor:
    """Correlate with a fixed bank of odd square kernels at the input's size."""
    margin = kernel.shape[-1] // 2
    if padding_mode == "zeros":
        return F.conv2d(x, kernel, padding=margin)
    return F.conv2d(F.pad(x, (margin,) * 4, mode="replicate"), kernel)


class SobelEdges(nn.Module):
    """Append the Sobel gradient magnitude of the luma as a fourth channel."""

    rgb2gray: Tensor
    sobel_x: Tensor
    sobel_y: Tensor

    def __init__(self, padding_mode: Literal["zeros", "replicate"]):
        super().__init__()
        self.padding_mode = padding_mode
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        self.register_buffer("rgb2gray", torch.tensor(LUMA).view(1, 3, 1, 1))
        self.register_buffer("sobel_x", across.view(1, 1, 3, 3))
        self.register_buffer("sobel_y", across.t().reshape(1, 1, 3, 3))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 4 h w"]:
        with full_precision(images):
            gray = (images.float() * self.rgb2gray).sum(1, keepdim=True)
            slope = pad_and_correlate(gray, torch.cat([self.sobel_x, self.sobel_y]), self.padding_mode)
            edges = (slope.square().sum(1, keepdim=True) + 1e-6).sqrt()
        return torch.cat([images, edges.to(images.dtype)], 1)


class BlurPool(nn.Module):
    """Halve the map after a binomial 3x3 blur, zero padded."""

    kernel: Tensor

    def __init__(self, dim: int):
        super().__init__()
        binomial = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", repeat(torch.outer(binomial, binomial) / 16, "h w -> c 1 h w", c=dim).clone())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=x.shape[1])


class StandardizedConv2d(nn.Conv2d):
    """Convolution whose filters have zero mean and unit (biased) deviation over input channels and taps."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (variance.sqrt() + 1e-5), self.bias)


class DropBlock(nn.Module):
    """Zero contiguous squares of the map, the same in all channels, and rescale by what is kept over the batch.

    Centres fall where the whole square fits. On a small map the square shrinks to the largest odd size that leaves something
    of it (the release divides by zero below 5 x 5, and at 5 x 5 drops the whole map). A map of which several squares would
    leave nothing is left whole: a feature of exactly 0 has no direction, and normalising it a gradient of 1e12.

    Args:
        rate: expected share of dropped positions, before overlaps.
        size: side of the square, odd.
    """

    def __init__(self, rate: float, size: int = 5):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop rate must be in [0, 1), got {rate}")
        self.rate, self.size = rate, size

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, _, h, w = x.shape
        fits = min(h - 1, w - 1, self.size)
        if not self.training or self.rate == 0 or fits < 1:
            return x
        size = fits - 1 + fits % 2
        inside = (h - size + 1, w - size + 1)
        gamma = self.rate * h * w / size**2 / (inside[0] * inside[1])
        centres = (torch.rand(b, 1, *inside, device=x.device) < gamma).float()
        keep = 1 - F.max_pool2d(F.pad(centres, (size - 1,) * 4), size, stride=1)
        keep = torch.where(keep.amax((2, 3), keepdim=True) > 0, keep, torch.ones_like(keep))
        return x * (keep * (keep.numel() / keep.sum().clamp(min=1))).to(x.dtype)


class MixStyle(nn.Module):
    """Exchange channel mean and deviation between random pairs of images, in training, for half of the batches.

    Args:
        probability: share of batches that are mixed.
        alpha: parameter of Beta(alpha, alpha), from which the mixing share of each image is drawn.
        detach: treat the statistics as constants, as published. The SAP release lets gradients through them.
    """

    def __init__(self, probability: float, alpha: float = 0.1, detach: bool = True):
        super().__init__()
        self.probability, self.alpha, self.detach = probability, alpha, detach

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training or self.probability == 0:
            return x
        b = x.shape[0]
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=1, keepdim=True)
        deviation = (variance + 1e-6).sqrt()
        if self.detach:
            mean, deviation = mean.detach(), deviation.detach()
        draw = torch.full((b, 1, 1, 1), self.alpha, device=x.device, dtype=torch.float32)
        share = torch.distributions.Beta(draw, draw, validate_args=False).sample().to(x.dtype)
        other = torch.rand(b, device=x.device).argsort()
        new_mean = share * mean + (1 - share) * mean[other]
        new_deviation = share * deviation + (1 - share) * deviation[other]
        mixed = (x - mean) / deviation * new_deviation + new_mean
        # The coin is tossed on the device: a branch would wait for it.
        return torch.where(torch.rand(1, 1, 1, 1, device=x.device) < self.probability, mixed, x)


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions and a projected shortcut. Attribute names are the release's (`bn*` hold no batch norm).

    Args:
        dim_in: channels in.
        dim: channels out.
        standardized: weight-standardised convolutions with group norm; otherwise plain ones with instance norm.
        stride: 2 blurs and halves the map, 1 keeps it.
        dilation: of the 3x3 convolutions.
        drop_rate: of DropBlock at the end.
        groups: group count of the group norm, where the channels divide by it; else the greatest common divisor.
    """

    def __init__(self, dim_in: int, dim: int, *, standardized: bool, stride: int, dilation: int, drop_rate: float, groups: int):
        super().__init__()
        conv = StandardizedConv2d if standardized else nn.Conv2d
        # Instance norm is group norm with one channel a group: same keys, 7 % faster here.
        count = math.gcd(groups, dim) if standardized else dim
        self.conv1 = conv(dim_in, dim, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.GroupNorm(count, dim)
        self.conv2 = conv(dim, dim, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.GroupNorm(count, dim)
        self.conv3 = conv(dim, dim, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn3 = nn.GroupNorm(count, dim)
        shortcut: list[nn.Module] = [conv(dim_in, dim, 1, bias=False), nn.GroupNorm(count, dim)]
        if stride == 2:
            self.blur_pool = BlurPool(dim)
            shortcut.append(BlurPool(dim))
        self.stride = stride
        self.downsample = nn.Sequential(*shortcut)
        self.drop_block = DropBlock(drop_rate)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        y = F.leaky_relu(self.bn2(self.conv2(y)), 0.1)
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            y = self.blur_pool(y)
        return self.drop_block(F.leaky_relu(y + self.downsample(x), 0.1))


@register(
    "backbone",
    paper="SAP release; BlurPool, MixStyle, DropBlock, weight standardisation",
    equations="DropBlock alg. 1; MixStyle eq. 1-5",
)
class IntrinsicEncoder(nn.Module):
    """Edge-aware ResNet-12 variant: Sobel stem, four residual stages, no batch norm anywhere.

    An image of H x W gives a map of about H/8 x W/8 (84 -> 11, 64 -> 8, 224 -> 28); its mean over the map is the feature.
    State-dict keys are the release's.

    Args:
        widths: channels of the stem (the first) and the four stages. The last is the feature width.
        drop_rate: DropBlock rate d; the stages use 0, min(0.1, d), min(0.15, d), min(0.15, d).
        dilated: the last stage keeps its size and dilates by 2 (release); otherwise it halves the map.
        groups: group norm groups of the two last stages.
        mixstyle: share of training batches whose styles are mixed after the first stage. That stage ends in an instance
            norm (plus shortcut), so little style is left to mix there.
        mixstyle_detach: MixStyle statistics as constants, as published; False is the SAP release.
        padding_mode: border of the Sobel filter. "zeros" (release) draws a frame around an image with a bright background,
            since pixels are already normalised; "replicate" does not.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (64, 160, 320, 640),
        drop_rate: float = 0.2,
        dilated: bool = True,
        groups: int = 32,
        mixstyle: float = 0.5,
        mixstyle_detach: bool = True,
        padding_mode: Literal["zeros", "replicate"] = "zeros",
    ):
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths must be four positive channel counts, got {widths}")
        if padding_mode not in ("zeros", "replicate"):
            raise ValueError(f"padding_mode must be 'zeros' (release) or 'replicate', got {padding_mode!r}")
        if not 0 <= mixstyle <= 1:
            raise ValueError(f"mixstyle must be in [0, 1], got {mixstyle}")
        if mixstyle == 0:
            require_idle(IntrinsicEncoder, {"mixstyle_detach": mixstyle_detach}, "mixstyle = 0 mixes nothing")
        self.dim = widths[3]
        self.sobel = SobelEdges(padding_mode)
        self.stem_conv = nn.Sequential(
            nn.Conv2d(4, widths[0], 3, padding=1, bias=False), nn.GroupNorm(widths[0], widths[0]), nn.LeakyReLU(0.1)
        )
        rates = (0.0, min(0.1, drop_rate), min(0.15, drop_rate), min(0.15, drop_rate))
        self.layer1 = ResidualBlock(
            widths[0], widths[0], standardized=False, stride=2, dilation=1, drop_rate=rates[0], groups=groups
        )
        self.mix_style = MixStyle(mixstyle, detach=mixstyle_detach)
        self.layer2 = ResidualBlock(
            widths[0], widths[1], standardized=False, stride=2, dilation=1, drop_rate=rates[1], groups=groups
        )
        self.layer3 = ResidualBlock(
            widths[1], widths[2], standardized=True, stride=2, dilation=1, drop_rate=rates[2], groups=groups
        )
        self.layer4 = ResidualBlock(
            widths[2],
            widths[3],
            standardized=True,
            stride=1 if dilated else 2,
            dilation=2 if dilated else 1,
            drop_rate=rates[3],
            groups=groups,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # gain sqrt 2

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d h8 w8"]:
        """Feature map of normalised images."""
        x = self.mix_style(self.layer1(self.stem_conv(self.sobel(images))))
        return self.layer4(self.layer3(self.layer2(x)))
