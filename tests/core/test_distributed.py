"""Two processes compute what one computes at the same global batch."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = """
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    import torch
    torch.set_num_threads(1)
    from toy import Toy
    from core import distributed, optim, record, trainer
    from core.distributed import gather
    from core.task import StepResult

    class Even(Toy):
        dropout = 0.0

    class Normed(Even):
        # the trunk sees a shard, the norm and the loss see the whole batch
        def model(self):
            from torch import nn
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.trunk, self.norm, self.head = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)
                def forward(self, x):
                    hidden = self.trunk(x)
                    return self.head(self.norm(gather(hidden) if self.training else hidden))
            return Net()
        def losses(self, model, batch, step):
            target = gather(batch["y"])
            return StepResult({{"ce": torch.nn.functional.cross_entropy(model(batch["x"]), target)}})

    rank = int(os.environ.get("RANK", "0"))
    with record.RunFolder(Path(sys.argv[1]), writes=rank == 0, chatty=False) as run:
        out = trainer.train(run, lambda *_: None, task=Normed if sys.argv[2] == "normed" else Even, steps=12, log_every=3, accumulate=int(sys.argv[3]),
                            optimizer=lambda g: optim.SGD(g, lr=0.2), save_every=4, device="cpu")
        run.say(state="finished")
    distributed.stop()
"""


def launch(folder, kind, processes, accumulate=1, script=SCRIPT):
    path = folder.parent / "work.py"
    path.write_text(textwrap.dedent(script).format(here=str(HERE)))
    argv = [str(path), str(folder), kind, str(accumulate)]
    if processes == 1:
        command = [sys.executable, *argv]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)


@pytest.mark.parametrize(("kind", "accumulate"), [("normed", 1), ("plain", 2)])
def test_two_ranks_are_one_process_at_the_same_global_batch(tmp_path, kind, accumulate):
    from core import checkpoint

    for name, processes in (("one", 1), ("two", 2)):
        done = launch(tmp_path / name, kind, processes, accumulate)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.Store(tmp_path / n / "checkpoints").newest()[1]["model"] for n in ("one", "two"))
    assert all(torch.allclose(v, two[k], atol=1e-5) for k, v in one.items() if v.is_floating_point())
    rows = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 13
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) < 1e-5
        else:
            assert a == b


DYING = SCRIPT.replace("rank = int(", "import datetime\n    rank = int(").replace(
    "class Even(Toy):\n        dropout = 0.0\n",
    "class Even(Toy):\n        dropout = 0.0\n        def losses(self, model, batch, step):\n"
    "            if step == 6 and distributed.rank() == 1: os._exit(9)\n"
    "            return super().losses(model, batch, step)\n",
)


def test_a_dead_rank_ends_the_others_and_no_partial_checkpoint_counts(tmp_path):
    from core import checkpoint

    done = launch(tmp_path / "two", "plain", 2, script=DYING)
    assert done.returncode != 0
    assert "rank" in done.stderr
    step, _, complaints = checkpoint.Store(tmp_path / "two" / "checkpoints").newest()
    assert (step, complaints) == (4, [])
    assert not list((tmp_path / "two" / "checkpoints").glob(".*.tmp"))


def test_one_process_needs_nothing_of_it():
    from core import distributed

    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather(x) is x
    assert (distributed.rank(), distributed.world(), distributed.shard([1, 2])) == (0, 1, (0, [1, 2]))
    assert distributed.any_rank(True)


def test_an_incomplete_environment_is_an_error(monkeypatch):
    from core import distributed

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        distributed.start(torch.device("cpu"))
