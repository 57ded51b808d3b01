"""Losses of the re-identification baseline that SDTPS stands on (DeMo, AAAI 2025, sec. 3.4; BoT, Luo et al. 2019).

Axes: b batch, d feature channels, p identities.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from core.registry import register


@register("loss", paper="Szegedy et al. 2016, sec. 7")
class LabelSmoothedCrossEntropy(nn.Module):
    """Cross entropy against (1 - ε) one-hot + ε / p, mean over the batch.

    Args:
        epsilon: share of the target that is spread over all identities.
    """

    def __init__(self, epsilon: float = 0.1):
        super().__init__()
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1), got {epsilon}")
        self.epsilon = epsilon

    def forward(self, scores: Float[Tensor, "b p"], identities: Int[Tensor, "b"]) -> Float[Tensor, ""]:
        return F.cross_entropy(scores, identities, label_smoothing=self.epsilon)


@register("loss", paper="Hermans et al. 2017", equations="eq. 5")
class BatchHardTriplet(nn.Module):
    """The hardest positive and the hardest negative of each anchor, on Euclidean distances of un-normalised features.

    Masked maxima and minima, so that identities may have any number of samples in the batch. An anchor without a positive
    or without a negative is left out; a batch without any anchor gives 0, with gradient 0.

    Args:
        margin: None is the soft margin, log(1 + exp(d_ap - d_an)), which the released runs use; a number is the hinge.
    """

    def __init__(self, margin: float | None = None):
        super().__init__()
        if margin is not None and margin < 0:
            raise ValueError(f"margin must be 0 or more, or None for the soft margin, got {margin}")
        self.margin = margin

    def forward(self, features: Float[Tensor, "b d"], identities: Int[Tensor, "b"]) -> Float[Tensor, ""]:
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(torch.promote_types(features.dtype, torch.float32))
            square = x.square().sum(1)
            squared = (square[:, None] + square[None, :]).addmm(x, x.t(), alpha=-2)
            # The root has no slope at 0, so coincident samples must not reach it.
            distance = squared.clamp(min=1e-12).sqrt()
        same = identities[:, None] == identities[None, :]
        positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        farthest = distance.masked_fill(~positive, -torch.inf).amax(1)
        nearest = distance.masked_fill(same, torch.inf).amin(1)
        used = positive.any(1) & (~same).any(1)
        # Infinities of anchors that are left out are replaced before the difference: 0 · inf would be NaN backwards.
        gap = torch.where(used, farthest, 0.0) - torch.where(used, nearest, 0.0)
        each = F.softplus(gap) if self.margin is None else F.relu(gap + self.margin)
        return (each * used).sum() / used.sum().clamp(min=1)
