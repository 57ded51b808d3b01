"""Training losses of SAM3's detector: boxes, IoU-aware query scores, presence; on every layer and both kinds of rows.

Axes: layers, p image-prompt pairs, q queries, r rows (q one-to-one, then while training q one-to-many), m boxes of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from core import distributed
from core.registry import register
from plugins.sam3_fusion.boxes import corners, iou
from plugins.sam3_fusion.matching import HungarianMatcher, OneToManyMatcher


def box_losses(
    boxes: Float[Tensor, "p q 4"], targets: Float[Tensor, "p m 4"], pairs: Bool[Tensor, "p q m"], count: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Σ |box − target| and Σ (1 − GIoU) over matched pairs, both divided by `count`."""
    ours, theirs = rearrange(boxes, "p q four -> p q 1 four"), rearrange(targets, "p m four -> p 1 m four")
    _, giou = iou(corners(ours), corners(theirs))
    weight = pairs.to(boxes.dtype) / count
    return ((ours - theirs).abs().sum(-1) * weight).sum(), ((1 - giou) * weight).sum()


def query_loss(
    logits: Float[Tensor, "p q"],
    overlap: Float[Tensor, "p q"],
    matched: Bool[Tensor, "p q"],
    keep: Bool[Tensor, " p"],
    alpha: float,
    gamma: float,
    positive_weight: float,
    least_rows: int,
) -> Float[Tensor, ""]:
    """IoU-aware binary cross-entropy.

    A matched query aims at t = max(p^α · IoU^(1−α), 0.01), without gradient, with weight `positive_weight`; any other at 0
    with weight p^γ, where p keeps its gradient. Pairs without a visible box count nothing. Mean over pairs × rows, and over
    `least_rows` rows where there are fewer.
    """
    p = logits.sigmoid()
    aim = (p.detach() ** alpha * overlap.clamp(min=0) ** (1 - alpha)).clamp(min=0.01)
    found = positive_weight * F.binary_cross_entropy_with_logits(logits, aim, reduction="none")
    other = p**gamma * F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    each = torch.where(matched, found, other) * rearrange(keep, "p -> p 1")
    return each.sum() / (logits.shape[0] * max(logits.shape[1], least_rows))


def presence_loss(presence: Float[Tensor, "layers p"], seen: Bool[Tensor, " p"]) -> Float[Tensor, ""]:
    """Half the binary cross-entropy of each layer's presence logit, mean over pairs, sum over layers.

    That is focal loss at α = 0.5, γ = 0, written as what it is: the release's kernel for γ = 0 gives NaN gradients at
    saturated logits.
    """
    aim = seen.to(presence.dtype).expand_as(presence)
    return 0.5 * F.binary_cross_entropy_with_logits(presence, aim, reduction="none").mean(dim=1).sum()


def covered(targets: Float[Tensor, "p m 4"], valid: Bool[Tensor, "p m"], size: tuple[int, int]) -> Bool[Tensor, "p h w"]:
    """Whether the centre of a cell lies in a target of the pair."""
    edges = rearrange(corners(targets), "p m four -> four p m 1 1")
    down = (torch.arange(size[0], device=targets.device) + 0.5) / size[0]
    across = (torch.arange(size[1], device=targets.device) + 0.5) / size[1]
    y, x = rearrange(down, "h -> h 1"), rearrange(across, "w -> 1 w")
    inside = (x > edges[0]) & (x < edges[2]) & (y > edges[1]) & (y < edges[3])
    return (inside & rearrange(valid, "p m -> p m 1 1")).any(dim=1)


@register("loss", paper="SAM 3 (arXiv:2511.16719); release configuration of detector training")
class DetectionLoss:
    """All loss terms, weighted. Layers add up; the one-to-many rows come again with their own weight.

    One-to-many rows are matched one-to-many in the last layer and by the Hungarian matcher in the others, as built.

    Args:
        matcher, many_matcher: constructors.
        box_weight, giou_weight, query_weight, presence_weight: of the terms.
        many_weight: of all terms of the one-to-many rows.
        cell_weight: of the binary cross-entropy of the detector's cell head, mean over cells and pairs, absent ones too.
            0 as built, where a mask head learns from masks instead.
        alpha, gamma, positive_weight: of the query term (see `query_loss`).
        least_rows: the query term divides by at least so many rows; 200 as built, whatever the number of queries.
        prompt_scale: multiply everything by √(number of pairs), as built.

    Raises:
        ValueError: for a negative weight.
    """

    def __init__(
        self,
        matcher: Callable[..., Any] = HungarianMatcher,
        many_matcher: Callable[..., Any] = OneToManyMatcher,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        query_weight: float = 20.0,
        presence_weight: float = 20.0,
        many_weight: float = 2.0,
        cell_weight: float = 0.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        positive_weight: float = 10.0,
        least_rows: int = 200,
        prompt_scale: bool = True,
    ):
        for name, value in (
            ("box_weight", box_weight), ("giou_weight", giou_weight), ("query_weight", query_weight),
            ("presence_weight", presence_weight), ("many_weight", many_weight), ("cell_weight", cell_weight), ("least_rows", least_rows),
        ):  # fmt: skip
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        self.matcher, self.many_matcher = matcher(), many_matcher()
        self.box_weight, self.giou_weight, self.query_weight = box_weight, giou_weight, query_weight
        self.presence_weight, self.many_weight, self.cell_weight = presence_weight, many_weight, cell_weight
        self.alpha, self.gamma, self.positive_weight = alpha, gamma, positive_weight
        self.least_rows, self.prompt_scale = least_rows, prompt_scale

    def __call__(
        self,
        scores: Float[Tensor, "layers p r"],
        boxes: Float[Tensor, "layers p r 4"],
        presence: Float[Tensor, "layers p"] | None,
        queries: int,
        targets: Float[Tensor, "p m 4"],
        valid: Bool[Tensor, "p m"],
        cells: Float[Tensor, "p h w"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms box, giou, query, presence, cells, and with one-to-many rows many_box, many_giou, many_query.

        Args:
            scores: query logits, without presence.
            boxes: refined boxes (cx, cy, w, h).
            presence: presence logits; None drops the term.
            queries: number of one-to-one rows, which come first.
            targets: boxes in parts of the image.
            valid: True where a target is one.
            cells: logits of the cell head; None drops the term.

        Raises:
            ValueError: if there are cell logits and no weight for them, or a weight and no logits.
        """
        if (cells is None) != (self.cell_weight == 0):
            have = "no" if cells is None else "a"
            raise ValueError(f"cell_weight is {self.cell_weight:g} and the detector has {have} cell head; set both or neither")
        total = distributed.gather(valid.sum().float().reshape(1)).sum() / distributed.world()
        count = total.clamp(min=1)
        scale = scores.shape[1] ** 0.5 if self.prompt_scale else 1.0
        rows = {"": (scores[..., :queries], boxes[:, :, :queries])}
        if scores.shape[2] > queries:
            rows["many_"] = (scores[..., queries:], boxes[:, :, queries:])
        losses: dict[str, Tensor] = {}
        for prefix, (logits, given) in rows.items():
            pairs = self.matcher(logits, given, targets, valid)
            if prefix:
                pairs = torch.cat((pairs[:-1], self.many_matcher(logits[-1:], given[-1:], targets, valid)))
            weight = scale * (self.many_weight if prefix else 1.0)
            for name, value in self._terms(logits, given, targets, valid, pairs, count).items():
                losses[prefix + name] = weight * value
        if presence is not None:
            losses["presence"] = scale * self.presence_weight * presence_loss(presence, valid.any(dim=1))
        if cells is not None:
            aim = covered(targets, valid, (cells.shape[1], cells.shape[2])).to(cells.dtype)
            losses["cells"] = scale * self.cell_weight * F.binary_cross_entropy_with_logits(cells, aim)
        return losses

    def _terms(
        self,
        logits: Float[Tensor, "layers p q"],
        boxes: Float[Tensor, "layers p q 4"],
        targets: Float[Tensor, "p m 4"],
        valid: Bool[Tensor, "p m"],
        pairs: Bool[Tensor, "layers p q m"],
        count: Float[Tensor, ""],
    ) -> dict[str, Tensor]:
        terms: dict[str, list[Tensor]] = {"box": [], "giou": [], "query": []}
        theirs = rearrange(corners(targets), "p m four -> p 1 m four")
        for z, b, m in zip(logits, boxes, pairs):
            far, apart = box_losses(b, targets, m, count)
            with torch.no_grad():
                overlap, _ = iou(rearrange(corners(b), "p q four -> p q 1 four"), theirs)
                best = torch.where(m, overlap, torch.zeros_like(overlap)).amax(dim=2)
            query = query_loss(
                z, best, m.any(dim=2), valid.any(dim=1), self.alpha, self.gamma, self.positive_weight, self.least_rows
            )
            terms["box"].append(self.box_weight * far)
            terms["giou"].append(self.giou_weight * apart)
            terms["query"].append(self.query_weight * query)
        return {name: torch.stack(values).sum() for name, values in terms.items()}
