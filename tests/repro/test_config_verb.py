"""`repro config diff` refuses what would have no effect, and lets files import what they are allowed to."""

import pytest

from repro import cli
from slurm import grid, sweep


@pytest.fixture
def ask(capsys):
    def call(*argv):
        status = cli.main(["config", *map(str, argv)])
        return status, *capsys.readouterr()

    return call


def test_diff_takes_no_set_and_no_why_and_passes_on_the_permission_to_import(ask, tmp_path):
    a, b = tmp_path / "a.gin", tmp_path / "b.gin"
    a.write_text("import json\ntrainer.train.seed = 1\n")
    b.write_text("trainer.train.seed = 2\n")
    for option, value in (("--set", "train.seed=2"), ("--why", "train.seed")):
        status, said, error = ask("diff", a, b, option, value)
        assert (status, said) == (2, "")
        assert f"{option} has no effect with diff" in error
    status, said, error = ask("diff", a, b)
    assert (status, said) == (2, "")
    assert "would execute it" in error
    assert ask("diff", a, b, "--allow-import") == (0, "trainer.train.seed\n  - 1\n  + 2\n", "")


def test_a_sweep_s_runs_may_import_what_its_plan_may(tmp_path):
    (tmp_path / "a.gin").write_text("import json\ntrainer.train.seed = 1\n")
    plan = sweep.plan(str(tmp_path / "a.gin"), [], [grid.axis("train.steps=1,2")], tmp_path / "runs", allow_imports=True)
    plan.write()
    again = sweep.read(plan.folder)
    again.settle_effective()
    assert [e["trainer.train.steps"] for e in again.effective] == ["1", "2"]
    for made in sweep.jobs(again, again.runs):
        assert "--allow-import" in made.command
