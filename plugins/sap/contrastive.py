"""The two supervised contrastive losses of SAP, and their temperatures over training.

SAP release, after Khosla et al., NeurIPS 2020, eq. 2.

Both compare all rows of an episode through a small projection head. They differ in who attracts whom and how much:

    L_i = -1/|P(i)| sum_{p in P(i)} w_ip (S_ip - ln(sum_{a != i} v_ia exp S_ia + 1e-8)),    S = z z^T / tau - row maximum

and the loss is the mean over rows that have a positive. The pair weights w do not cancel in the denominator and the sum is
divided by the count of positives, so the size of the loss depends on the mix of classes and domains in the batch.

Axes: b rows and j the same rows again, d feature channels, e projected channels.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from core.registry import register
from plugins.sap.leakage import pair_cosines, pair_relations
from plugins.sap.precision import full_precision


def piecewise_linear(epoch: float | int, knots: tuple[tuple[float | int, float], ...]) -> float:
    """The value at `epoch` of the line through `knots` (epoch, value), constant before the first and after the last.

    Raises:
        ValueError: if the knots' epochs do not ascend strictly.
    """
    if any(a[0] >= b[0] for a, b in itertools.pairwise(knots)):
        raise ValueError(f"the epochs of a temperature schedule must ascend strictly, got {[k[0] for k in knots]}")
    if epoch <= knots[0][0]:
        return knots[0][1]
    for (e0, v0), (e1, v1) in itertools.pairwise(knots):
        if epoch <= e1:
            return v0 + (v1 - v0) * (epoch - e0) / (e1 - e0)
    return knots[-1][1]


class Contrast(NamedTuple):
    """A contrastive loss and what it looked at.

    Attributes:
        loss: scalar, unweighted.
        projections: unit rows, b e.
        temperature: tau of this epoch.
        monitors: detached scalars on the device: mean cosines of the kinds of pairs (see `leakage.PairCosines`); NaN for a
            kind that the batch has none of.
    """

    loss: Tensor
    projections: Tensor
    temperature: float
    monitors: dict[str, Tensor]


class ProjectionHead(nn.Module):
    """Linear, GELU, dropout, Linear, then unit length."""

    def __init__(self, in_dim: int, hidden_dim: int, proj_dim: int, dropout: float):
        super().__init__()
        first, last = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, proj_dim)
        for layer in (first, last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.projector = nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), last)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return F.normalize(self.projector(features), dim=-1)


def weighted_contrast(
    projections: Float[Tensor, "b e"],
    temperature: float,
    positive: Bool[Tensor, "b j"],
    pair_weight: Float[Tensor, "b j"],
    denominator_weight: Float[Tensor, "b j"],
) -> Float[Tensor, ""]:
    """The weighted contrastive loss of the module docstring.

    Args:
        projections: unit rows.
        temperature: tau.
        positive: pairs that attract; the diagonal is ignored.
        pair_weight: w, read where `positive`.
        denominator_weight: v.
    """
    other = ~torch.eye(projections.shape[0], dtype=torch.bool, device=projections.device)
    similarity = einsum(projections, projections, "b e, j e -> b j") / temperature
    similarity = similarity - similarity.detach().masked_fill(~other, -torch.inf).amax(1, keepdim=True)
    denominator = (similarity.masked_fill(~other, -torch.inf).exp() * denominator_weight).sum(1, keepdim=True)
    log_share = similarity - (denominator + 1e-8).log()
    positive = positive & other
    count = positive.sum(1)
    per_row = -(positive * pair_weight * log_share).sum(1) / count.clamp(min=1)
    return per_row.sum() / (count > 0).sum().clamp(min=1)


@register("loss", paper="SAP release; after Khosla et al. 2020, eq. 2")
class IntrinsicSupCon(nn.Module):
    """Pull rows of one class together, harder across domains than within one.

    Temperature by 0-based epoch: `phase1_temp` up to `phase1_end`, linear to `phase2_temp` at `phase2_start`, flat to
    `phase2_end`, linear to `phase3_temp` at `total_epochs`.

    Args:
        in_dim, hidden_dim, proj_dim, dropout: of the projection head.
        cross_domain_weight: weight of a positive from another domain.
        same_domain_weight: weight of a positive from the same domain.
        cross_domain_neg_weight: weight in the denominator of another class in another domain. 1.0 is the recipe (the
            release's class default is 1.2).
    """

    def __init__(
        self,
        in_dim: int = 640,
        hidden_dim: int = 256,
        proj_dim: int = 128,
        dropout: float = 0.2,
        phase1_temp: float = 0.5,
        phase2_temp: float = 0.3,
        phase3_temp: float = 0.2,
        phase1_end: int = 10,
        phase2_start: int = 30,
        phase2_end: int = 50,
        total_epochs: int = 60,
        cross_domain_weight: float = 1.5,
        same_domain_weight: float = 0.7,
        cross_domain_neg_weight: float = 1.0,
    ):
        super().__init__()
        self.projection_head = ProjectionHead(in_dim, hidden_dim, proj_dim, dropout)
        self.knots = (
            (phase1_end, phase1_temp),
            (phase2_start, phase2_temp),
            (phase2_end, phase2_temp),
            (total_epochs, phase3_temp),
        )
        self.cross_domain_weight, self.same_domain_weight = cross_domain_weight, same_domain_weight
        self.cross_domain_neg_weight = cross_domain_neg_weight
        _check_schedule(self.knots)

    def temperature(self, epoch: float | int) -> float:
        """tau at a 0-based epoch."""
        return piecewise_linear(epoch, self.knots)

    def forward(
        self, features: Float[Tensor, "b d"], class_labels: Int[Tensor, "b"], domain_labels: Int[Tensor, "b"], epoch: float | int
    ) -> Contrast:
        """Loss over the rows of an episode at a 0-based epoch."""
        with full_precision(features):
            z = self.projection_head(features.float())
            same_class, same_domain = pair_relations(class_labels, domain_labels)
            weight = torch.where(same_domain, self.same_domain_weight, self.cross_domain_weight)
            denominator = torch.where(~same_class & ~same_domain, self.cross_domain_neg_weight, 1.0)
            loss = weighted_contrast(z, self.temperature(epoch), same_class, weight, denominator)
        cosines = pair_cosines(z.detach(), class_labels, domain_labels)
        return Contrast(loss, z, self.temperature(epoch), cosines.named())


@register("loss", paper="SAP release; after Khosla et al. 2020, eq. 2")
class DomainSupCon(nn.Module):
    """Pull rows of one domain together, harder across classes than within one, and push a class's domains apart.

    Temperature by 0-based epoch: `early_temp` up to `early_epochs`, linear to `mid_temp` at `mid_epochs`, linear to
    `final_temp` at `total_epochs`.

    Args:
        in_dim, hidden_dim, proj_dim, dropout: of the projection head.
        cross_class_weight: weight of a positive of another class.
        same_class_weight: weight of a positive of the same class.
        cdsc_neg_weight: weight in the denominator of the same class in another domain (CDSC pairs); at least 1. 1.5 is the
            recipe (the release's class default is 1.0).
    """

    def __init__(
        self,
        in_dim: int = 64,
        hidden_dim: int = 32,
        proj_dim: int = 32,
        dropout: float = 0.2,
        early_temp: float = 0.5,
        mid_temp: float = 0.6,
        final_temp: float = 0.3,
        early_epochs: int = 15,
        mid_epochs: int = 40,
        total_epochs: int = 60,
        cross_class_weight: float = 1.2,
        same_class_weight: float = 0.3,
        cdsc_neg_weight: float = 1.5,
    ):
        super().__init__()
        if cdsc_neg_weight < 1:
            raise ValueError(
                f"cdsc_neg_weight must be at least 1, got {cdsc_neg_weight}; below 1 it would pull a class's domains together"
            )
        self.projection_head = ProjectionHead(in_dim, hidden_dim, proj_dim, dropout)
        self.knots = ((early_epochs, early_temp), (mid_epochs, mid_temp), (total_epochs, final_temp))
        self.cross_class_weight, self.same_class_weight, self.cdsc_neg_weight = (
            cross_class_weight,
            same_class_weight,
            cdsc_neg_weight,
        )
        _check_schedule(self.knots)

    def temperature(self, epoch: float | int) -> float:
        """tau at a 0-based epoch."""
        return piecewise_linear(epoch, self.knots)

    def forward(
        self, features: Float[Tensor, "b d"], class_labels: Int[Tensor, "b"], domain_labels: Int[Tensor, "b"], epoch: float | int
    ) -> Contrast:
        """Loss over the rows of an episode at a 0-based epoch."""
        with full_precision(features):
            z = self.projection_head(features.float())
            same_class, same_domain = pair_relations(class_labels, domain_labels)
            weight = torch.where(same_class, self.same_class_weight, self.cross_class_weight)
            denominator = torch.where(same_class & ~same_domain, self.cdsc_neg_weight, 1.0)
            loss = weighted_contrast(z, self.temperature(epoch), same_domain, weight, denominator)
        cosines = pair_cosines(z.detach(), class_labels, domain_labels)
        return Contrast(loss, z, self.temperature(epoch), cosines.named())


def _check_schedule(knots: tuple[tuple[float | int, float], ...]) -> None:
    piecewise_linear(0, knots)
    if min(value for _, value in knots) <= 0:
        raise ValueError(f"temperatures must be above 0, got {[value for _, value in knots]}")
