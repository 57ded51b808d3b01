"""Two processes train on an episode as one does: features are gathered before anything couples the rows."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import Encoder, images, silent_task, train
from torch.testing import assert_close

from core import checkpoint
from plugins.sap.dual_stream import DualStreamModel
from plugins.sap.episodes import EpisodeShape

HERE = Path(__file__).parent
SCRIPT = """
    import os, sys
    sys.path.insert(0, {here!r})
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import tiny
    from core import distributed

    tiny.train(Path(sys.argv[2]), tiny.silent_task(Path(sys.argv[1])), steps=3, writes=os.environ["RANK"] == "0")
    distributed.stop()
"""


def test_two_ranks_are_one_process(tmp_path):
    data = images(tmp_path / "pacs", per_cell=6)
    _, model, _ = train(tmp_path / "one", silent_task(data), steps=3)
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(SCRIPT).format(here=str(HERE)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [*start, str(script), str(data), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = checkpoint.Store(tmp_path / "two" / "checkpoints").newest()
    assert found is not None
    for key, value in model.state_dict().items():
        assert_close(found[1]["model"][key], value, atol=2e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_two_calls_of_the_encoder_need_one_process(monkeypatch):
    monkeypatch.setattr("plugins.sap.dual_stream.world", lambda: 2)
    model = DualStreamModel(intrinsic=Encoder, joint_forward=False)
    rows = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="joint_forward = False needs one process"):
        model(torch.zeros(4, 3, 24, 24), rows, rows, shape=EpisodeShape(2, 1, 1))
