"""How far apart classes lie, against how wide they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plugins.sap.prototype_head import class_means


def separation_ratio(features: Float[Tensor, "b d"], labels: Int[Tensor, "b"], classes: int) -> Float[Tensor, ""]:
    """Mean distance between prototypes over the mean (over classes) of the mean distance to the own prototype.

    Features and prototypes are both of normalised rows. The release divides distances of raw features by those of
    prototypes of normalised ones, after the optimiser step and with dropout on, so its curve is not comparable.

    Args:
        features: rows.
        labels: 0 .. classes-1, each present.
        classes: their number.
    """
    rows = F.normalize(features.float(), dim=-1)
    prototypes = class_means(rows, labels, classes)
    between = torch.pdist(prototypes).mean()
    own = torch.linalg.vector_norm(rows - prototypes[labels], dim=-1, keepdim=True)
    return between / class_means(own, labels, classes).mean()
