"""Class prototypes of an episode, and the nearest-prototype classifier over them.

Prototypical networks (Snell et al., NeurIPS 2017, eq. 1-2) on row-normalised features.

Axes: s support rows, b rows to classify, n classes of the episode, d feature channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from core.registry import register


def check_support(labels: Int[Tensor, "s"], n_way: int) -> None:
    """Make sure that every class has support. Call it where labels are made, on the CPU: it reads their values.

    Raises:
        ValueError: if a label lies outside 0 .. n_way-1, or a class has no row.
    """
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= n_way):
        found = sorted(set(labels.tolist()))
        raise ValueError(
            f"support labels must be in 0..{n_way - 1} (n_way = {n_way}), got {found}; renumber them within the episode"
        )
    counts = torch.bincount(labels, minlength=n_way)
    if bool((counts == 0).any()):
        missing = torch.nonzero(counts == 0).flatten().tolist()
        raise ValueError(
            f"class {missing} of {n_way} has no support row, so it has no prototype; draw at least one image of each class"
        )


def class_means(features: Float[Tensor, "s d"], labels: Int[Tensor, "s"], n_way: int) -> Float[Tensor, "n d"]:
    """Mean feature of each class, by one matrix product with the normalised one-hot matrix.

    A class without rows stops the program instead of giving NaN. The check is an asynchronous assertion: on an
    accelerator it costs no synchronisation (`check_support` gives the readable message where the labels are made, and
    finds labels outside the episode, whose rows would count for no class here).

    Raises:
        RuntimeError: if a class has no row (on the CPU; a device assertion elsewhere).
    """
    member = labels == torch.arange(n_way, device=labels.device).unsqueeze(1)  # n s
    counts = member.sum(1, keepdim=True)
    torch._assert_async(counts.amin(), "a class has no support row; plugins.sap.prototype_head.check_support says which")
    return (member / counts).to(features.dtype) @ features


@register(
    "module",
    paper="Prototypical networks, Snell et al. 2017; SAP release",
    equations="Snell eq. 1-2; the release's PrototypeNetwork",
)
class PrototypeHead(nn.Module):
    """Logits by similarity to class prototypes of row-normalised features. Holds no parameters.

    The prototype is the mean of normalised support features and is not normalised again, as in the release.

    With squared distances between unit vectors the logits lie in [-4, 0]: even a perfect 5-way simplex has cross entropy
    ln(1 + 4 exp(-2.5)) = 0.284, and gradients are small. `logit_temperature` below 1 sharpens them.

    Args:
        metric: "euclidean" gives minus the squared distance (release), "cosine" the cosine.
        logit_temperature: divides the logits. 1 as in the release.
    """

    def __init__(self, metric: Literal["euclidean", "cosine"] = "euclidean", logit_temperature: float = 1.0):
        super().__init__()
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
        if logit_temperature <= 0:
            raise ValueError(f"logit_temperature must be above 0, got {logit_temperature}")
        self.metric = metric
        self.logit_temperature = logit_temperature

    def forward(
        self, features: Float[Tensor, "b d"], support: Float[Tensor, "s d"], support_labels: Int[Tensor, "s"], *, n_way: int
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "n d"]]:
        """Logits of each row, and the prototypes.

        Args:
            features: rows to classify, not yet normalised.
            support: support features, not yet normalised.
            support_labels: class of each support row, 0 .. n_way-1; every class present (see `class_means`).
            n_way: number of classes of the episode.
        """
        prototypes = class_means(F.normalize(support, dim=-1), support_labels, n_way)
        rows = F.normalize(features, dim=-1)
        if self.metric == "cosine":
            logits = einsum(rows, F.normalize(prototypes, dim=-1), "b d, n d -> b n")
        else:  # -||q - p||^2, the square written out so that no b x n x d tensor is made
            cross = einsum(rows, prototypes, "b d, n d -> b n")
            logits = 2 * cross - rearrange(rows.square().sum(-1), "b -> b 1") - prototypes.square().sum(-1)
        return logits / self.logit_temperature, prototypes
