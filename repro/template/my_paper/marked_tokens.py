"""A small task on generated data: of a set of tokens, one is marked, and its class is asked for.

Every token shows a class; the unmarked ones show random classes. A plain mean over the tokens cannot tell which one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core import data
from core.registry import register
from core.task import DataCard, StepResult, Task
from torch import Tensor, nn
from torch.nn import functional as F

from my_paper.classifier import PooledClassifier

MARK, SHOWN, NOISE = 4.0, 3.0, 0.5  # strength of the mark and of a class, standard deviation of the noise


class MarkedSets:
    """Sets of tokens, made from a seed. Channel 0 holds the mark, channel 1 + k shows class k."""

    def __init__(self, count: int, tokens: int, dim: int, classes: int, rng: np.random.Generator):
        shown = rng.integers(classes, size=(count, tokens))
        marked = rng.integers(tokens, size=count)
        x = NOISE * rng.standard_normal((count, tokens, dim))
        x[np.arange(count)[:, None], np.arange(tokens)[None], 1 + shown] += SHOWN
        x[np.arange(count), marked, 0] += MARK
        self.x = torch.from_numpy(x.astype(np.float32))
        self.y = torch.from_numpy(shown[np.arange(count), marked])

    def __len__(self) -> int:
        return len(self.y)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"tokens": self.x[index], "class": int(self.y[index])}


@register("task", paper="generated data")
class MarkedTokens(Task):
    """Classify sets of tokens by their marked token.

    Args:
        network: constructor of the model, called with `dim=, classes=`.
        tokens: tokens of a set.
        dim: channels of a token, at least one more than classes.
        classes: number of classes.
        train, test: number of sets.
        batch: sets a step.
        data_seed: names the generated data.
    """

    def __init__(
        self,
        *,
        network: Callable[..., nn.Module] = PooledClassifier,
        tokens: int = 16,
        dim: int = 16,
        classes: int = 4,
        train: int = 1024,
        test: int = 1000,
        batch: int = 64,
        data_seed: int = 0,
    ):
        if dim < classes + 1:
            raise ValueError(f"dim must be at least classes + 1 = {classes + 1}, got {dim}")
        self.network, self.tokens, self.dim, self.classes = network, tokens, dim, classes
        self.counts, self.batch, self.data_seed = {"train": train, "test": test}, batch, data_seed

    def prepare(self, workspace: Path) -> DataCard:
        shape = (self.tokens, self.dim, self.classes)
        self.train, self.test = (
            MarkedSets(count, *shape, data.generator(self.data_seed, purpose)) for purpose, count in enumerate(self.counts.values())
        )
        return DataCard("marked tokens", "generated", f"seed {self.data_seed}, {shape}", True, self.counts)

    def model(self) -> nn.Module:
        return self.network(dim=self.dim, classes=self.classes)

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        return data.Stream(self.train, data.Shuffled(len(self.train), self.batch), seed).batches(start)

    def steps_per_epoch(self) -> int:
        return self.counts["train"] // self.batch

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        scores = model(batch["tokens"])
        accuracy = (scores.argmax(-1) == batch["class"]).float().mean()
        return StepResult({"class": F.cross_entropy(scores, batch["class"])}, {"accuracy": accuracy})

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        scores: Tensor = model(self.test.x.to(device))
        return {"accuracy": float((scores.argmax(-1).cpu() == self.test.y).float().mean())}

    def profile_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        return (torch.randn(batch, self.tokens, self.dim),)
