"""A small real task for tests of the trainer: a classifier with dropout on fixed random data."""

from pathlib import Path

import torch
from torch import nn

from core import data, record, trainer
from core.distributed import gather
from core.task import DataCard, StepResult, Task


class Points:
    def __init__(self, count=48, width=8, noise=0.1):
        self.noise = noise
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(count, width, generator=generator)
        self.y = (self.x[:, :3].argmax(1)).tolist()

    def __len__(self):
        return len(self.y)

    def sample(self, index, rng):
        return {
            "x": self.x[index] + self.noise * torch.from_numpy(rng.standard_normal(self.x.shape[1])).float(),
            "y": self.y[index],
        }


class Toy(Task):
    """Options are class attributes, so that a test makes a variant by subclassing."""

    dropout = 0.2
    batch = 16
    norm = False
    noise = 0.1

    def prepare(self, workspace: Path) -> DataCard:
        self.data = Points(noise=self.noise)
        return DataCard("toy", "-", "0" * 16, True, {"samples": len(self.data)})

    def model(self) -> nn.Module:
        middle = nn.BatchNorm1d(12) if self.norm else nn.Identity()
        return nn.Sequential(nn.Linear(8, 12), middle, nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(12, 3))

    def batches(self, start, seed):
        return data.Stream(self.data, data.Shuffled(len(self.data), self.batch), seed).batches(start)

    def losses(self, model, batch, step) -> StepResult:
        scores = gather(model(batch["x"]))
        target = gather(batch["y"])
        loss = nn.functional.cross_entropy(scores, target)
        return StepResult(
            {"ce": loss, "size": 1e-3 * scores.square().mean()}, {"accuracy": (scores.argmax(1) == target).float().mean()}
        )

    def evaluate(self, model):
        torch.rand(3)  # an evaluation that draws random numbers must not change training
        right = (model(self.data.x).argmax(1) == torch.tensor(self.data.y)).float().mean()
        return {"accuracy": float(right)}

    def steps_per_epoch(self):
        return 3


def train(path, task=Toy, **options):
    """Train in a run folder, as `repro run` does, without gin."""
    with record.RunFolder(Path(path), chatty=False) as run:
        outcome = trainer.train(run, lambda *_: None, task=task, **{"steps": 30, "log_every": 4, "threads": 1, **options})
        run.say(state="finished")
        return outcome
