"""Semantic segmentation: mean intersection over union, pixel accuracy and F1, from integer counts.

Protocol. Every pixel whose label is not `ignore` counts once. A class that occurs in no label and no prediction has no IoU; the
published numbers of DFormer and its forks count it as 0 (`zero`), most others leave it out of the mean (`ignore`). The rule
is part of each metric's name: `mIoU[ignore]`, `mIoU[zero]`.

Counts are int64. In float32, as the release keeps them, a count stops growing at 2^24 pixels: 55 images of 480x640.

Axes: k true classes, j predicted classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

Absent = Literal["ignore", "zero"]


@dataclasses.dataclass(frozen=True)
class SegmentationResult:
    """What a confusion matrix says. Shares are in 0..1; a class without any pixel has NaN.

    Attributes:
        iou, accuracy, f1: by class.
        pixel_accuracy: correct pixels of all.
        absent: how the means treat classes without any pixel.
    """

    iou: tuple[float, ...]
    accuracy: tuple[float, ...]
    f1: tuple[float, ...]
    pixel_accuracy: float
    absent: Absent

    def _mean(self, values: Sequence[float]) -> float:
        known = [v for v in values if v == v]
        if self.absent == "zero":
            return sum(known) / len(values)
        return sum(known) / len(known) if known else float("nan")

    @property
    def mean_iou(self) -> float:
        return self._mean(self.iou)

    def metrics(self) -> dict[str, float]:
        """Named means: mIoU, mean class accuracy, mean F1 (all with the rule in the name), pixel accuracy."""
        tag = f"[{self.absent}]"
        return {
            f"mIoU{tag}": self.mean_iou,
            f"mAcc{tag}": self._mean(self.accuracy),
            f"mF1{tag}": self._mean(self.f1),
            "pixel accuracy": self.pixel_accuracy,
        }


class Confusion:
    """Counts of (true class, predicted class), added up image by image on the device of the predictions.

    Args:
        classes: number of classes.
        ignore: label that does not count.
    """

    def __init__(self, classes: int, ignore: int = 255):
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        self.classes, self.ignore = classes, ignore
        self.counts: Tensor = torch.zeros(classes, classes, dtype=torch.int64)
        self.strays: Tensor = torch.zeros((), dtype=torch.int64)  # counted pixels whose prediction or label is no class

    def add(self, predicted: Int[Tensor, "..."], labels: Int[Tensor, "..."]) -> None:
        """Count one or more images; both maps have one shape.

        Raises:
            ValueError: if the shapes differ, or a counted prediction or label is no class. An accelerator's counts are not
                read here, and refused by `result`.
        """
        if predicted.shape != labels.shape:
            raise ValueError(f"predictions are {tuple(predicted.shape)}, labels {tuple(labels.shape)}; resize one to the other")
        predicted, labels = predicted.reshape(-1).long(), labels.reshape(-1).long()
        cells = self.classes**2  # and two more: for what is ignored, and for what is no class
        stray = (labels < 0) | (labels >= self.classes) | (predicted < 0) | (predicted >= self.classes)
        cell = torch.where(stray, cells + 1, labels * self.classes + predicted)
        found = torch.bincount(cell.masked_fill(labels == self.ignore, cells), minlength=cells + 2)
        self.counts = self.counts.to(found.device) + found[:cells].view(self.classes, self.classes)
        self.strays = self.strays.to(found.device) + found[cells + 1]
        if found.device.type == "cpu":
            self._refuse_strays()

    def _refuse_strays(self) -> None:
        if strays := int(self.strays):
            raise ValueError(
                f"{strays} pixel{'s' * (strays > 1)} with a prediction or label that is none of the {self.classes} classes, 0 to "
                f"{self.classes - 1}; a label that does not count is the ignored, {self.ignore}"
            )

    def result(self, absent: Absent = "ignore") -> SegmentationResult:
        """IoU, accuracy and F1 by class, and the pixel accuracy, computed in float64 from the integer counts.

        Raises:
            ValueError: if a counted prediction or label was no class.
        """
        self._refuse_strays()
        counts = self.counts.double().cpu()
        hit, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        total = float(counts.sum())
        return SegmentationResult(
            iou=tuple((hit / (true + predicted - hit)).tolist()),
            accuracy=tuple((hit / true).tolist()),
            f1=tuple((2 * hit / (true + predicted)).tolist()),
            pixel_accuracy=float(hit.sum()) / total if total else float("nan"),
            absent=absent,
        )
