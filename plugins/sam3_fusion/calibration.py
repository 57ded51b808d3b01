"""Affine corrections of a presence logit and of a trunk's features: how they are fitted, and how they vanish into the weights.

A student whose image features differ a little from its teacher's can give presence logits z that are far from the teacher's.
What is fitted here is z → a·z + b, or per channel x → a·x + b on features; both are absorbed by the linear layer before, so
that the corrected model has the same keys, the same shapes and the same cost.

An affine map with a > 0 keeps the order of the logits: it cannot change presence AUROC. Where AUROC has fallen, only what
acts before the presence token (features, weights) can help.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from plugins.sam3_fusion.decoder import Presence

Logits = Float[np.ndarray, " n"]
STEPS, TOLERANCE = 100, 1e-10


class Affine(NamedTuple):
    """z → scale · z + shift."""

    scale: float
    shift: float

    def __call__(self, z: Logits) -> NDArray[np.float64]:
        return self.scale * z + self.shift


def _finite(**named: NDArray[np.float64]) -> None:
    for name, values in named.items():
        if len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite and hold at least one value, got {len(values)}")


def mean_match(student: Logits, teacher: Float[np.ndarray, " m"]) -> Affine:
    """Shift to the teacher's mean. No labels: pairs of image and prompt that both have judged, or two samples of such.

    Raises:
        ValueError: for no values, or one that is not finite.
    """
    _finite(student=student, teacher=teacher)
    return Affine(1.0, float(np.mean(teacher) - np.mean(student)))


def moment_match(student: Logits, teacher: Float[np.ndarray, " m"]) -> Affine:
    """Mean and standard deviation of the teacher. No labels. A student without spread is only shifted.

    Raises:
        ValueError: for no values, or one that is not finite.
    """
    _finite(student=student, teacher=teacher)
    spread = float(np.std(student))
    scale = float(np.std(teacher)) / spread if spread > 0 else 1.0
    scale = scale if scale > 0 else 1.0
    return Affine(scale, float(np.mean(teacher) - scale * np.mean(student)))


def regression(student: Logits, teacher: Float[np.ndarray, " m"]) -> Affine:
    """Least squares of the teacher's logits on the student's, pair by pair. No labels.

    Raises:
        ValueError: for other lengths, no values, one that is not finite, or a slope of 0 or less, which would turn the order.
    """
    _finite(student=student, teacher=teacher)
    if len(student) != len(teacher):
        raise ValueError(f"want the same pairs from both, got {len(student)} and {len(teacher)} logits")
    spread = float(np.var(student))
    scale = float(np.mean((student - student.mean()) * (teacher - teacher.mean()))) / spread if spread > 0 else 1.0
    if scale <= 0:
        raise ValueError(f"the student's logits do not rise with the teacher's (slope {scale:.3g}); an affine map cannot help")
    return Affine(scale, float(teacher.mean() - scale * student.mean()))


def platt(z: Logits, present: Bool[np.ndarray, " m"], ridge: float = 0.0) -> Affine:
    """Platt's scaling: the (a, b) of least cross-entropy of σ(a·z + b), by Newton's method with halved steps.

    Targets are his, (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2), so that separable logits have a finite optimum. Logits
    may be of any size; if all are equal they are only shifted.
    Platt, Probabilistic outputs for support vector machines, 1999; Lin, Lin & Weng, A note on Platt's outputs, 2007.

    Args:
        z: presence logits of labelled pairs.
        present: their labels.
        ridge: weight of (a − 1)² + b², for a handful of pairs.

    Raises:
        ValueError: without both labels, for values that are not finite, or where the best slope is 0 or less.
    """
    _finite(z=z)
    positives = int(present.sum())
    negatives = len(present) - positives
    if len(z) != len(present) or not positives or not negatives:
        raise ValueError(f"want present and absent pairs, one label a logit; got {positives}, {negatives}, {len(z)} logits")
    target = np.where(present, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    # In units of the logits' own spread, and from a flat start (Lin, Lin & Weng): where σ is saturated there is no slope to follow.
    mean, spread = float(np.mean(z)), float(np.std(z))
    unit = spread if spread > 0 else 1.0
    back = np.array([[1 / unit, 0.0], [-mean / unit, 1.0]])  # (a, b) = back · (slope, shift) of (z − mean) / unit
    x = np.stack(((z - mean) / unit, np.ones(len(z))))

    def cost(w: NDArray[np.float64]) -> float:
        s = w @ x
        return float(np.sum(np.logaddexp(0.0, s) - target * s) + ridge * np.sum((back @ w - [1.0, 0.0]) ** 2))

    w = np.array([0.0 if spread > 0 else 1.0, math.log((positives + 1) / (negatives + 1))])
    now = cost(w)
    for _ in range(STEPS):
        p = np.exp(-np.logaddexp(0.0, -(w @ x)))
        gradient = x @ (p - target) + 2 * ridge * back.T @ (back @ w - [1.0, 0.0])
        if np.abs(gradient).max() < TOLERANCE * len(z):
            break
        hessian = (x * (p * (1 - p))) @ x.T + 2 * ridge * back.T @ back + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and cost(w - size * step) > now - 1e-4 * size * float(gradient @ step):
            size /= 2
        if size <= 1e-10:
            break
        w = w - size * step
        now = cost(w)
    if np.abs(gradient).max() > 1e-6 * len(z):
        raise ValueError(f"no minimum found for logits between {z.min():.3g} and {z.max():.3g}; the gradient is still {gradient}")
    w = back @ w
    if w[0] <= 0:
        raise ValueError(f"absent pairs have the higher logits (best slope {w[0]:.3g}); an affine map cannot help")
    return Affine(float(w[0]), float(w[1]))


def offset(z: Logits, present: Bool[np.ndarray, " m"]) -> Affine:
    """The shift of least cross-entropy, with Platt's targets: one parameter, slope 1. By halving an interval.

    Raises:
        ValueError: as `platt`.
    """
    _finite(z=z)
    positives = int(present.sum())
    negatives = len(present) - positives
    if len(z) != len(present) or not positives or not negatives:
        raise ValueError(f"want present and absent pairs, one label a logit; got {positives}, {negatives}, {len(z)} logits")
    aim = positives * (positives + 1) / (positives + 2) + negatives / (negatives + 2)
    low, high = -float(np.max(z)) - 40.0, -float(np.min(z)) + 40.0
    for _ in range(200):  # Σσ(z + b) rises with b; halving finds where it is the sum of the targets
        middle = (low + high) / 2
        total = float(np.sum(np.exp(-np.logaddexp(0.0, -(z + middle)))))
        low, high = (middle, high) if total < aim else (low, middle)
    return Affine(1.0, (low + high) / 2)


def discriminant(z: Logits, present: Bool[np.ndarray, " m"], prior: float = 0.5) -> Affine:
    """Linear discriminant: the log-odds of two normal distributions of one variance.

    Args:
        z: presence logits of labelled pairs.
        present: their labels.
        prior: share of present pairs where the model will be used, not in this sample.

    Raises:
        ValueError: without both labels, without spread, for a prior outside (0, 1), or where absent pairs score higher.
    """
    _finite(z=z)
    if not 0 < prior < 1:
        raise ValueError(f"prior must be in (0, 1), got {prior}")
    if len(z) != len(present) or present.all() or not present.any():
        raise ValueError(f"want present and absent pairs, one label a logit; got {int(present.sum())} of {len(present)} present")
    high, low = z[present], z[~present]
    spread = (np.sum((high - high.mean()) ** 2) + np.sum((low - low.mean()) ** 2)) / max(1, len(z) - 2)
    if not spread > 0 or high.mean() <= low.mean():
        raise ValueError(f"means {high.mean():.3g} (present) and {low.mean():.3g} (absent), variance {spread:.3g}: no discriminant")
    shift = -(high.mean() ** 2 - low.mean() ** 2) / (2 * spread) + math.log(prior / (1 - prior))
    return Affine(float((high.mean() - low.mean()) / spread), float(shift))


# --- into the weights -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_presence(presence: Presence, map: Affine) -> None:
    """Put z → a·z + b into the last linear layer of a presence head: W ← a·W, β ← a·β + b. In place.

    Raises:
        ValueError: for a head that clamps its logit, where this is not the same map; or a or b that are not finite.
    """
    if presence.clamp != "none":
        raise ValueError(f"a head with presence_clamp={presence.clamp!r} clamps after its last layer; build it with 'none' to fold")
    if not (math.isfinite(map.scale) and math.isfinite(map.shift)):
        raise ValueError(f"scale and shift must be finite, got {map.scale}, {map.shift}")
    last = presence.head[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(map.scale)
    last.bias.mul_(map.scale).add_(map.shift)


class Moments(NamedTuple):
    """Mean and standard deviation of each channel."""

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]


def moments(features: list[Float[Tensor, "_ c h w"]]) -> Moments:
    """Of feature maps, over images and cells, in float64.

    Raises:
        ValueError: for no maps.
    """
    if not features:
        raise ValueError("moments need at least one feature map")
    x = torch.cat([f.double() for f in features])
    return Moments(x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3), correction=0))


def feature_match(student: Moments, teacher: Moments) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Per channel (a, b) with which a·x + b has the teacher's mean and standard deviation. Dead channels are only shifted."""
    alive = student.std > 1e-6 * student.std.max().clamp(min=1e-30)
    scale = torch.where(alive, teacher.std / student.std.clamp(min=1e-30), torch.ones_like(student.std))
    return scale, teacher.mean - scale * student.mean


@torch.no_grad()
def fold_channels(conv: nn.Conv2d, scale: Float[Tensor, " c"], shift: Float[Tensor, " c"]) -> None:
    """Put x → a·x + b per output channel into a convolution: W ← a·W, β ← a·β + b. In place; exact, borders included.

    Raises:
        ValueError: for a convolution without bias, another number of channels, or values that are not finite.
    """
    if conv.bias is None:
        raise ValueError("a convolution without bias cannot take a shift")
    if scale.shape != conv.bias.shape or shift.shape != conv.bias.shape:
        raise ValueError(
            f"want one scale and shift for each of {conv.out_channels} channels, got {tuple(scale.shape)}, {tuple(shift.shape)}"
        )
    if not (scale.isfinite().all() and shift.isfinite().all()):
        raise ValueError("scale and shift must be finite")
    conv.weight.mul_(scale.to(conv.weight).reshape(-1, 1, 1, 1))
    conv.bias.mul_(scale.to(conv.bias)).add_(shift.to(conv.bias))
