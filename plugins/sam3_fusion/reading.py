"""What a detector says of every image-prompt pair of a split, and the metrics of that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.data import to_device
from core.metrics import detection
from core.metrics.detection import Found
from plugins.sam3_fusion.boxes import corners
from plugins.sam3_fusion.processor import Processor
from plugins.sam3_fusion.scenes import PromptedScenes, collate

Tokens = Callable[..., tuple[Tensor, Tensor]]
NO_PRESENCE = math.inf  # the presence logit of a detector without presence token: σ is 1


@dataclasses.dataclass(frozen=True)
class Reading:
    """Answers to every pair, in the order of the split's prompts.

    Attributes:
        boxes: (x0, y0, x1, y1) of every query, in pixels of the squared image, clipped to it.
        scores: query logits.
        presence: presence logits.
        truth: true boxes of each pair.
        kinds: present, absent or hard.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    presence: NDArray[np.float64]
    truth: list[NDArray[np.float64]]
    kinds: NDArray[Any]

    @property
    def present(self) -> NDArray[np.bool_]:
        return self.kinds == "present"

    def probability(self, processor: Processor) -> NDArray[np.float64]:
        """Probability of every query, (pairs, queries), with or without presence as the processor has it."""
        return processor.probability(torch.from_numpy(self.scores), torch.from_numpy(self.presence)).numpy().astype(np.float64)

    def moved(self, scale: float, shift: float) -> Reading:
        """The same with presence logits z replaced by scale · z + shift."""
        return dataclasses.replace(self, presence=scale * self.presence + shift)


def read(model: nn.Module, split: PromptedScenes, tokens: Tokens, batch: int) -> Reading:
    """Ask a detector every prompt of a split. The model's mode is left as it is; no random number is drawn.

    Args:
        model: maps (image, tokens, pad, image_of) to `Detected`.
        split: with all prompts of an image (`per_image=None`).
        tokens: vectors of texts.
        batch: images a forward pass.
    """
    device = next(model.parameters()).device
    never = np.random.default_rng(0)
    parts: dict[str, list[Tensor]] = {"boxes": [], "scores": [], "presence": []}
    with torch.inference_mode():
        for first in range(0, len(split), batch):
            samples = [split.sample(i, never) for i in range(first, min(first + batch, len(split)))]
            given = to_device(collate(samples, tokens), device)
            out = model(given["image"], given["tokens"], given["pad"], given["image_of"])
            parts["boxes"].append(corners(out.boxes[-1].float()).clamp(0, 1).cpu() * split.size)
            parts["scores"].append(out.scores[-1].float().cpu())
            parts["presence"].append(
                out.presence[-1].float().cpu() if out.presence is not None else torch.full((len(given["texts"]),), NO_PRESENCE)
            )
    whole = {k: torch.cat(v).double().numpy() for k, v in parts.items()}
    prompts = [(scene, prompt) for scene in split.scenes for prompt in scene.prompts]
    truth = [p.boxes.astype(np.float64) * split.size / np.array([s.width, s.height] * 2) for s, p in prompts]
    return Reading(whole["boxes"], whole["scores"], whole["presence"], truth, np.array([p.kind for _, p in prompts]))


def measure(reading: Reading, processor: Processor) -> dict[str, float]:
    """Metrics of a reading.

    AP is COCO's over pairs, so that what is found for an absent prompt counts as false; recall is the share of boxes of present
    prompts found (IoU of at least 0.5) above the threshold; false positives the share of absent prompts with anything above
    it. With a presence token: its decision by itself, and SA-Co's summary cgF1 = 100 · MCC of presence at 0.5 · pmF1, where
    pmF1 is the F1 of boxes over present prompts, mean over IoU 0.5 … 0.95.

    Raises:
        ValueError: for a score, box or presence logit that is NaN.
    """
    present, truths = reading.present, sum(map(len, reading.truth))
    probability = reading.probability(processor)
    found = [Found(b, p) for b, p in zip(reading.boxes, probability)]
    precision = detection.average_precision(found, reading.truth)
    kept = [Found(f.boxes[f.scores > processor.threshold], f.scores[f.scores > processor.threshold]) for f in found]
    true = np.zeros(len(detection.THRESHOLDS))
    for k, t in zip(kept, reading.truth):
        if len(t):
            true += detection.match(k, t, detection.THRESHOLDS)[1].sum(axis=1)
    said = sum(len(k.scores) for k, p in zip(kept, present) if p)
    any_found = np.array([len(k.scores) > 0 for k in kept])
    f1 = float(np.mean(2 * true / (said + truths))) if said + truths else math.nan
    metrics = {
        "AP": precision.ap,
        "AP50": precision.at(0.5),
        "recall": float(true[0]) / truths if truths else math.nan,
        "false positives": mean(any_found[~present]),
        "false positives, hard": mean(any_found[reading.kinds == "hard"]),
        "pmF1": 100 * f1,
    }
    if (reading.presence == NO_PRESENCE).all():
        return metrics
    z, near = reading.presence, reading.kinds != "absent"
    decided = detection.matthews(z > 0, present)
    return metrics | {
        "presence AUROC": detection.auroc(z, present),
        "presence AUROC, hard": detection.auroc(z[near], present[near]),
        "presence NLL": detection.log_loss(z, present),
        "presence ECE": detection.calibration_error(1 / (1 + np.exp(-np.clip(z, -60, 60))), present),
        "presence MCC": decided,
        "presence logit, present": mean(z[present]),
        "presence logit, absent": mean(z[~present]),
        "cgF1": 100 * decided * f1,
    }


def mean(values: NDArray[Any]) -> float:
    """The mean, NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan
