"""Detection: COCO's average precision, exactly, and what presence scores are worth.

Average precision follows COCO's protocol for boxes without crowd regions: per image the highest `limit` detections in
order of score (equal scores in the order given); each takes the unmatched truth with the largest IoU, if that reaches the
threshold (a later truth wins among equals, as in COCO's own code); precision is made monotone from the right and read at
101 recalls; AP is the mean over thresholds 0.50, 0.55, …, 0.95. For text-prompted detection an "image" is an image-prompt
pair, so that boxes found for an absent prompt count as false.

Presence is judged as a binary decision on pairs: area under the ROC curve (which no monotone change of the scores can move),
negative log-likelihood and expected calibration error of the probability, and Matthews' correlation of the decision at 0.5.

Axes: d detections, g truths, n pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0.0, 1.0, 101)
LIMIT = 100


@dataclasses.dataclass(frozen=True)
class Found:
    """Detections of one image, or of one image-prompt pair.

    Args:
        boxes: (x0, y0, x1, y1), in the unit of the truths.
        scores: of the same length.

    Raises:
        ValueError: if lengths differ or something is not finite.
    """

    boxes: Float[np.ndarray, "d 4"]
    scores: Float[np.ndarray, " d"]

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.scores), 4):
            raise ValueError(f"boxes must be {(len(self.scores), 4)} for {len(self.scores)} scores, got {self.boxes.shape}")
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("detections must be finite")


def box_iou(a: Float[np.ndarray, "d 4"], b: Float[np.ndarray, "g 4"]) -> Float[np.ndarray, "d g"]:
    """IoU of every pair of boxes (x0, y0, x1, y1); 0 where the union is empty."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match(
    found: Found, truth: Float[np.ndarray, "g 4"], thresholds: Sequence[float], limit: int = LIMIT
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores of the first `limit` detections in order, and per threshold whether each took a truth: (d,) and (t, d)."""
    order = np.argsort(-found.scores, kind="stable")[:limit]
    scores = found.scores[order].astype(np.float64)
    hit = np.zeros((len(thresholds), len(order)), dtype=bool)
    if len(truth) and len(order):
        overlaps = box_iou(found.boxes[order].astype(np.float64), truth.astype(np.float64))
        for t, threshold in enumerate(thresholds):
            free = np.ones(len(truth), dtype=bool)
            for d, row in enumerate(overlaps):
                open_ = np.where(free, row, -1.0)
                best = len(truth) - 1 - int(np.argmax(open_[::-1]))
                if open_[best] >= min(threshold, 1 - 1e-10):
                    hit[t, d], free[best] = True, False
    return scores, hit


@dataclasses.dataclass(frozen=True)
class Precision:
    """Average precision.

    Attributes:
        by_threshold: AP at each IoU threshold.
        recall: share of truths found at each threshold, whatever the score.
        truths: number of truths; without any, every figure is NaN.
    """

    thresholds: tuple[float, ...]
    by_threshold: tuple[float, ...]
    recall: tuple[float, ...]
    truths: int

    @property
    def ap(self) -> float:
        return float(np.mean(self.by_threshold))

    def at(self, threshold: float) -> float:
        """AP at one of the thresholds."""
        return self.by_threshold[int(np.argmin(np.abs(np.array(self.thresholds) - threshold)))]


def average_precision(
    found: Sequence[Found], truth: Sequence[Float[np.ndarray, "_ 4"]], thresholds: Sequence[float] = THRESHOLDS, limit: int = LIMIT
) -> Precision:
    """COCO's average precision over images (or image-prompt pairs) of one class.

    Raises:
        ValueError: if there are not as many truths as detections.
    """
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} images with detections and {len(truth)} with truths")
    count = sum(len(t) for t in truth)
    if count == 0:
        nothing = (math.nan,) * len(thresholds)
        return Precision(tuple(thresholds), nothing, nothing, 0)
    matched = [match(f, t, thresholds, limit) for f, t in zip(found, truth)]
    scores = np.concatenate([s for s, _ in matched]) if matched else np.zeros(0)
    hits = np.concatenate([h for _, h in matched], axis=1)[:, np.argsort(-scores, kind="stable")]
    by_threshold, recalls = [], []
    for hit in hits:
        true, false = np.cumsum(hit), np.cumsum(~hit)
        recall = true / count
        precision = np.maximum.accumulate((true / np.maximum(true + false, np.spacing(1)))[::-1])[::-1]
        at = np.searchsorted(recall, RECALLS, side="left")
        by_threshold.append(
            float(np.where(at < len(precision), precision[np.minimum(at, len(precision) - 1)], 0.0).mean()) if len(hit) else 0.0
        )
        recalls.append(float(recall[-1]) if len(hit) else 0.0)
    return Precision(tuple(thresholds), tuple(by_threshold), tuple(recalls), count)


def _no_gaps(name: str, values: Float[np.ndarray, " n"]) -> None:
    """NaN has no place in an order and is no probability: a figure made of it would be a wrong figure."""
    gaps = np.flatnonzero(np.isnan(values))
    if len(gaps):
        raise ValueError(f"{name} must be numbers, got NaN at {len(gaps)} of {len(values)}, first at index {gaps[0]}")


def auroc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN without either.

    Raises:
        ValueError: for a score that is NaN (infinities have their place in the order).
    """
    _no_gaps("scores", scores)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    upto = np.cumsum(counts)
    ranks = (upto - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(logits: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Mean negative log-likelihood of σ(logits), in nats.

    Raises:
        ValueError: for a logit that is NaN.
    """
    _no_gaps("logits", logits)
    signed = np.where(positive, logits, -logits).astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, -signed)))


def calibration_error(probability: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], bins: int = 10) -> float:
    """Expected calibration error: |mean probability − share of positives| over equal-width bins, weighted by their size.

    Raises:
        ValueError: for a probability outside [0, 1] or NaN.
    """
    _no_gaps("probability", probability)
    if len(probability) and not 0 <= probability.min() <= probability.max() <= 1:
        raise ValueError(f"probability must be in [0, 1], got values from {probability.min():.3g} to {probability.max():.3g}")
    index = np.minimum((probability * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs(float(probability[inside].mean()) - float(positive[inside].mean()))
    return float(error)


def matthews(predicted: Bool[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Matthews' correlation coefficient of a binary decision; 0 where a row or column of the confusion matrix is empty."""
    tp, tn = float((predicted & positive).sum()), float((~predicted & ~positive).sum())
    fp, fn = float((predicted & ~positive).sum()), float((~predicted & positive).sum())
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / scale if scale else 0.0
