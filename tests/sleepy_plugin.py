"""A small third-party plugin for tests of sweeps: a real task whose steps can wait, fail, or kill their process.

`install(folder)` writes the package and its entry point there; with the folder on PYTHONPATH it is a plugin like any other.
"""

import os
import textwrap
from pathlib import Path

TASK = '''
    """A classifier with dropout on fixed points."""

    import os
    import signal
    import time
    from pathlib import Path

    import torch
    from torch import nn

    from core import data
    from core.distributed import gather
    from core.registry import register
    from core.task import DataCard, StepResult, Task


    class Points:
        def __init__(self):
            generator = torch.Generator().manual_seed(11)
            self.x = torch.randn(48, 8, generator=generator)
            self.y = self.x[:, :3].argmax(1).tolist()

        def __len__(self):
            return len(self.y)

        def sample(self, index, rng):
            return {"x": self.x[index] + 0.1 * torch.from_numpy(rng.standard_normal(8)).float(), "y": self.y[index]}


    @register("task", paper="none")
    class Nap(Task):
        """Trains in naps."""

        def __init__(
            self, width: int = 12, dropout: float = 0.1, pause_s: float = 0.0, fail_at: int = -1, kill_at: int = -1, kind: str = "plain",
            workers: int = 0,
        ):
            self.width, self.dropout, self.pause_s, self.fail_at, self.kill_at, self.kind = width, dropout, pause_s, fail_at, kill_at, kind
            self.workers = workers

        def prepare(self, workspace: Path) -> DataCard:
            self.data = Points()
            self.flag = workspace / "killed-once"
            return DataCard("points", "-", "0" * 16, True, {"samples": len(self.data)})

        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, self.width), nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(self.width, 3))

        def batches(self, start, seed):
            return data.Stream(self.data, data.Shuffled(len(self.data), 16), seed, workers=self.workers).batches(start)

        def losses(self, model, batch, step) -> StepResult:
            time.sleep(self.pause_s)
            if step == self.fail_at:
                raise ValueError(f"asked to fail at step {step}")
            if step == self.kill_at and not self.flag.exists():
                self.flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            scores, target = gather(model(batch["x"])), gather(batch["y"])
            return StepResult({"ce": nn.functional.cross_entropy(scores, target)})

        def evaluate(self, model):
            return {"accuracy": float((model(self.data.x).argmax(1) == torch.tensor(self.data.y)).float().mean())}

        def steps_per_epoch(self):
            return 3

        def profile_inputs(self, batch: int = 1):
            return (self.data.x[:batch],)
'''

GIN = """
SEED = 0
STEPS = 20
PAUSE = 0.0
trainer.train.task = @sleepy.Nap
trainer.train.seed = %SEED
trainer.train.steps = %STEPS
trainer.train.threads = 1
trainer.train.log_every = 5
trainer.train.device = 'cpu'
sleepy.Nap.pause_s = %PAUSE
"""


def install(folder: Path) -> Path:
    """Write the plugin into a folder and a config beside it; returns the config."""
    package = folder / "sleepy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Naps."""\n__plugin__ = "sleepy"\n__interface__ = 1\n')
    (package / "task.py").write_text(textwrap.dedent(TASK))
    info = folder / "sleepy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sleepy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[repro.plugins]\nsleepy = sleepy\n")
    (folder / "nap.gin").write_text(GIN)
    return folder / "nap.gin"


def environment(folder: Path) -> dict[str, str]:
    """The environment in which the plugin is installed."""
    known = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(known)}
