"""Which query answers for which box (SAM3 training; Carion et al., DETR, ECCV 2020, for the one-to-one matching).

Axes: p image-prompt pairs, q queries, m boxes of a pair (padded), layers decoder layers.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from core.registry import register
from plugins.sam3_fusion.boxes import corners, iou


@register("matcher", paper="SAM 3 (arXiv:2511.16719); DETR (arXiv:2005.12872), eq. 1")
class HungarianMatcher:
    """One query for each box, at least cost: 2·C + 5·L1 − 2·GIoU.

    C = −α (1 − p)^γ log p + (1 − α) p^γ log(1 − p) with p = σ(logit); the logits carry no presence. The assignment itself
    is scipy's, on the CPU: costs of all layers go there in one transfer, the only wait of a step.

    Args:
        class_weight, box_weight, giou_weight: of the three terms.
        alpha, gamma: of the focal class cost.

    Raises:
        ValueError: for a negative weight, or all three zero.
    """

    def __init__(
        self, class_weight: float = 2.0, box_weight: float = 5.0, giou_weight: float = 2.0, alpha: float = 0.25, gamma: float = 2.0
    ):
        if min(class_weight, box_weight, giou_weight) < 0 or class_weight + box_weight + giou_weight == 0:
            raise ValueError(
                f"class_weight, box_weight and giou_weight must be 0 or more and not all 0, got {class_weight}, {box_weight}, {giou_weight}"
            )
        self.class_weight, self.box_weight, self.giou_weight = class_weight, box_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma

    def cost(
        self, logits: Float[Tensor, "layers p q"], boxes: Float[Tensor, "layers p q 4"], targets: Float[Tensor, "p m 4"]
    ) -> Float[Tensor, "layers p q m"]:
        """Cost of each query for each box."""
        p = logits.sigmoid()
        cost = -self.alpha * (1 - p) ** self.gamma * F.logsigmoid(logits) + (1 - self.alpha) * p**self.gamma * F.logsigmoid(-logits)
        theirs = rearrange(targets, "p m four -> 1 p 1 m four")
        ours = rearrange(boxes, "layers p q four -> layers p q 1 four")
        far = (ours - theirs).abs().sum(-1)
        _, giou = iou(corners(ours), corners(theirs))
        return self.class_weight * rearrange(cost, "layers p q -> layers p q 1") + self.box_weight * far - self.giou_weight * giou

    @torch.no_grad()
    def __call__(
        self,
        logits: Float[Tensor, "layers p q"],
        boxes: Float[Tensor, "layers p q 4"],
        targets: Float[Tensor, "p m 4"],
        valid: Bool[Tensor, "p m"],
    ) -> Bool[Tensor, "layers p q m"]:
        """True where a query answers for a box. Of more boxes than queries the cheapest are answered.

        Raises:
            ValueError: if a cost is not finite.
        """
        cost = self.cost(logits.float(), boxes.float(), targets.float()).cpu().numpy()
        real = valid.cpu().numpy()
        if not np.isfinite(cost[:, real.any(1)]).all():
            raise ValueError("the matching cost is not finite: predictions or boxes hold NaN or infinity")
        pairs = np.zeros(cost.shape, dtype=bool)
        for p in np.flatnonzero(real.any(1)):
            columns = np.flatnonzero(real[p])
            for layer in range(cost.shape[0]):
                rows, taken = linear_sum_assignment(cost[layer, p][:, columns])
                pairs[layer, p, rows, columns[taken]] = True
        return torch.from_numpy(pairs).to(logits.device)


@register("matcher", paper="SAM 3 (arXiv:2511.16719), one-to-many rows")
class OneToManyMatcher:
    """Several queries for each box: those with S = w·p + (1 − w)·IoU above a floor and in the top k of the box's queries.

    "In the top k" is S > the (1 − k/q) quantile of S over the q queries, as built. One query may answer for several boxes.

    Args:
        top: k, about how many queries answer for a box.
        score_weight: w.
        floor: least S.

    Raises:
        ValueError: for `top` below 1 or `score_weight` outside [0, 1].
    """

    def __init__(self, top: int = 4, score_weight: float = 0.3, floor: float = 0.4):
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        if not 0 <= score_weight <= 1:
            raise ValueError(f"score_weight must be in [0, 1], got {score_weight}")
        self.top, self.score_weight, self.floor = top, score_weight, floor

    @torch.no_grad()
    def __call__(
        self,
        logits: Float[Tensor, "layers p q"],
        boxes: Float[Tensor, "layers p q 4"],
        targets: Float[Tensor, "p m 4"],
        valid: Bool[Tensor, "p m"],
    ) -> Bool[Tensor, "layers p q m"]:
        """True where a query answers for a box."""
        ours = rearrange(corners(boxes.float()), "layers p q four -> layers p q 1 four")
        overlap, _ = iou(ours, rearrange(corners(targets.float()), "p m four -> 1 p 1 m four"))
        score = (
            self.score_weight * rearrange(logits.float().sigmoid(), "layers p q -> layers p q 1")
            + (1 - self.score_weight) * overlap
        )
        queries = score.shape[2]
        best = torch.quantile(score, max(0.0, 1 - self.top / queries), dim=2, keepdim=True)
        return (score > best) & (score > self.floor) & rearrange(valid, "p m -> 1 p 1 m")
