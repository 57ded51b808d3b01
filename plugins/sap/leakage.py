"""How much class there is in domain features: mean cosines by kind of pair, and the leak index.

After the diagnostics that the SAP release logs in training.

Axes: b rows and j the same rows again, d channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


def pair_relations(
    class_labels: Int[Tensor, "b"], domain_labels: Int[Tensor, "b"]
) -> tuple[Bool[Tensor, "b j"], Bool[Tensor, "b j"]]:
    """Which pairs share their class, and which their domain."""
    same_class = rearrange(class_labels, "b -> b 1") == rearrange(class_labels, "j -> 1 j")
    same_domain = rearrange(domain_labels, "b -> b 1") == rearrange(domain_labels, "j -> 1 j")
    return same_class, same_domain


class PairCosines(NamedTuple):
    """Mean cosines over pairs of different rows; NaN where there is no such pair. Scalars on the device.

    Attributes:
        cdsc: cross domain, same class.
        cddc: cross domain, different class.
        sdsc: same domain, same class.
        sddc: same domain, different class.
    """

    cdsc: Tensor
    cddc: Tensor
    sdsc: Tensor
    sddc: Tensor

    @property
    def leak_index(self) -> Tensor:
        """CDSC - CDDC: how much more alike across domains features are for being of one class."""
        return self.cdsc - self.cddc

    @property
    def normalised_leak_index(self) -> Tensor:
        """(CDSC - CDDC) / (1 - CDDC): the share of the room above CDDC that the class takes."""
        return self.leak_index / (1 - self.cddc + 1e-8)

    @property
    def leak_intensity(self) -> Tensor:
        """max(0, leak index)."""
        return self.leak_index.clamp(min=0)

    def named(self) -> dict[str, Tensor]:
        """The four cosines and the leak index by name."""
        return {**self._asdict(), "leak_index": self.leak_index}


@torch.no_grad()
def pair_cosines(features: Float[Tensor, "b d"], class_labels: Int[Tensor, "b"], domain_labels: Int[Tensor, "b"]) -> PairCosines:
    """Mean cosines of the four kinds of pairs."""
    unit = F.normalize(features.float(), dim=-1)
    cosine = einsum(unit, unit, "b d, j d -> b j")
    same_class, same_domain = pair_relations(class_labels, domain_labels)
    other = ~torch.eye(features.shape[0], dtype=torch.bool, device=features.device)

    def mean(pairs: Tensor) -> Tensor:
        pairs = pairs & other
        return (cosine * pairs).sum() / pairs.sum()

    return PairCosines(
        mean(same_class & ~same_domain),
        mean(~same_class & ~same_domain),
        mean(same_class & same_domain),
        mean(~same_class & same_domain),
    )
