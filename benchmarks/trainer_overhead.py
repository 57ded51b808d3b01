"""What a step of the trainer costs over a bare loop: microseconds of CPU a step, on a 64-64-10 MLP, every step logged.

    python benchmarks/trainer_overhead.py

Both sides run in this process, in turns; the figure is the difference of the minima. Limit: 50 µs a step.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import optim, record, trainer
from core.task import DataCard, StepResult, Task

STEPS, REPEATS, LIMIT_US = 2000, 7, 50.0


class Mlp(Task):
    """64-64-10 on a fixed list of batches of 16."""

    marks: list[float] = []

    def prepare(self, workspace: Path) -> DataCard:
        generator = torch.Generator().manual_seed(1)
        self.data = [
            {"x": torch.randn(16, 64, generator=generator), "y": torch.randint(0, 10, (16,), generator=generator)}
            for _ in range(64)
        ]
        return DataCard("random", "-", "0" * 16, True, {})

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        while True:
            yield self.data[start % 64]
            start += 1

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        if step in (101, STEPS):
            self.marks.append(time.process_time())
        return StepResult({"ce": nn.functional.cross_entropy(model(batch["x"]), batch["y"])})

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"done": 1.0}


def bare() -> float:
    """Seconds a step of the shortest loop that trains the same model the same way."""
    torch.manual_seed(0)
    task = Mlp()
    task.prepare(Path())
    net = task.model()
    optimizer = optim.AdamW(net.parameters())
    batches = task.batches(0, 0)
    started = 0.0
    for step in range(1, STEPS + 1):
        if step == 101:
            started = time.process_time()
        batch = next(batches)
        loss = nn.functional.cross_entropy(net(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.process_time() - started) / (STEPS - 100)


def ours() -> float:
    """Seconds a step of the trainer, with metrics.jsonl, TensorBoard and progress."""
    Mlp.marks = []
    with tempfile.TemporaryDirectory() as folder, record.RunFolder(Path(folder) / "run", chatty=False) as run:
        trainer.train(run, lambda *_: None, task=Mlp, steps=STEPS, log_every=50, threads=1)
    return (Mlp.marks[1] - Mlp.marks[0]) / (STEPS - 101)


def main() -> int:
    torch.set_num_threads(1)
    both = [(bare(), ours()) for _ in range(REPEATS)]
    least, most = min(b for b, _ in both) * 1e6, min(o for _, o in both) * 1e6
    print(
        f"bare loop  {least:8.1f} µs a step\ntrainer    {most:8.1f} µs a step\noverhead   {most - least:8.1f} µs (limit {LIMIT_US:.0f})\nratio      {most / least:8.2f}"
    )
    return int(most - least > LIMIT_US)


if __name__ == "__main__":
    sys.exit(main())
