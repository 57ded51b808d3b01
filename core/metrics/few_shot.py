"""Accuracy over episodes, with its 95 % interval.

The field reports the mean over episodes and 1.96 standard errors. Episodes drawn from one pool share images, so the interval
says how well these episodes measure *this* model on *this* pool; it says nothing of other seeds or other data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over episodes.

    Attributes:
        mean: of the episodes' values.
        half_width: 1.96 standard errors, 0 for a single episode.
        std: over episodes (divided by their number, as the field does).
        count: number of episodes.
    """

    mean: float
    half_width: float
    std: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f} ({self.count} episodes)"

    def metrics(self, name: str) -> dict[str, float]:
        """Flat metrics: the mean under `name` and the half width under `name ±`."""
        return {name: self.mean, f"{name} ±": self.half_width}


def interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % interval of one value an episode.

    Raises:
        ValueError: if there is no episode, or a value is not finite.
    """
    found = np.asarray(list(values), dtype=np.float64)
    if found.size == 0:
        raise ValueError("an accuracy over episodes needs at least one episode")
    if not np.isfinite(found).all():
        raise ValueError(f"episode {int(np.flatnonzero(~np.isfinite(found))[0])} has a value that is not finite")
    std = float(found.std())
    return Interval(float(found.mean()), 1.96 * std / math.sqrt(found.size), std, int(found.size))


def accuracy(logits: Float[Tensor, "b n"], labels: Int[Tensor, "b"]) -> float:
    """Share of rows whose largest logit is their label's. Reads the values: for evaluation, not for a training step.

    Raises:
        ValueError: for an empty batch.
    """
    if labels.numel() == 0:
        raise ValueError("accuracy of no rows is undefined")
    right: Bool[Tensor, "b"] = logits.argmax(-1) == labels
    return float(right.double().mean())
