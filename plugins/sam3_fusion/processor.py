"""From decoder outputs to boxes in pixels (SAM3's image processor, without masks).

A query's probability is σ(score) · σ(presence): the presence logit judges the whole image and no probability exceeds it.
There is no suppression of doubles; queries compete in the decoder's self-attention.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from core.registry import register
from plugins.sam3_fusion.boxes import corners


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found for one prompt in one image, best first.

    Attributes:
        boxes: (x0, y0, x1, y1) in pixels, inside the image.
        scores: probabilities.
    """

    boxes: Float[Tensor, "k 4"]
    scores: Float[Tensor, " k"]


@register("module", paper="SAM 3 (arXiv:2511.16719), image processor")
class Processor:
    """Probabilities, threshold, boxes to pixels.

    Args:
        threshold: keep what is more probable. 0.5 as built; the Hugging Face port has 0.3.
        presence: multiply with the presence probability. False judges queries alone: scores rise and absent prompts are
            no longer rejected, because queries never learn from them.

    Raises:
        ValueError: for a threshold outside [0, 1).
    """

    def __init__(self, threshold: float = 0.5, presence: bool = True):
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}")
        self.threshold, self.presence = threshold, presence

    def probability(self, scores: Float[Tensor, "p q"], presence: Float[Tensor, " p"] | None) -> Float[Tensor, "p q"]:
        """σ(score) · σ(presence), in float32."""
        probability = scores.float().sigmoid()
        return probability * presence.float().sigmoid()[:, None] if self.presence and presence is not None else probability

    def __call__(
        self,
        scores: Float[Tensor, "p q"],
        boxes: Float[Tensor, "p q 4"],
        presence: Float[Tensor, " p"] | None,
        sizes: list[tuple[int, int]],
    ) -> list[Answer]:
        """The answer of each pair.

        Args:
            scores, boxes, presence: of the last decoder layer.
            sizes: (height, width) of each pair's image in pixels.

        Raises:
            ValueError: if there is not one size a pair.
        """
        if len(sizes) != scores.shape[0]:
            raise ValueError(f"{len(sizes)} image sizes for {scores.shape[0]} pairs")
        probability = self.probability(scores, presence)
        edges = corners(boxes.float()).clamp(0, 1)
        answers = []
        for p, b, (height, width) in zip(probability, edges, sizes):
            order = torch.argsort(p, descending=True, stable=True)
            kept = order[p[order] > self.threshold]
            answers.append(Answer(b[kept] * b.new_tensor([width, height, width, height]), p[kept]))
        return answers
