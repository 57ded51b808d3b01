"""The ledger: real runs of a small plugin, compared with its published numbers; what does not count is named."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from core import claims as entered
from repro import claims, gather

pytest_plugins = ["installed"]

TASK = '''
from pathlib import Path

import torch
from core.registry import register
from core.task import DataCard, StepResult, Task
from torch import nn


@register("task", paper="Scores, table 1")
class Score(Task):
    """Its score is its only weight, which the seed decides; `sample` says what its data are."""

    def __init__(self, root: str, *, sample: bool = False, width: int = 2, workers: int = 0, fails: bool = False):
        self.root, self.sample, self.width, self.fails = root, sample, width, fails

    def prepare(self, workspace):
        return DataCard("scores", self.root, "0", self.sample, {"rows": 1})

    def model(self):
        return nn.Linear(self.width, 1, bias=False)

    def batches(self, start, seed):
        while True:
            yield {"x": torch.ones(1, self.width)}

    def losses(self, model, batch, step):
        if self.fails:
            raise ValueError("no such luck")
        return StepResult({"output": model(batch["x"]).square().sum()})

    def evaluate(self, model):
        return {"score[camera]": float(model.weight.sum()), "nothing": float("nan")}

    def profile_inputs(self, batch=1):
        return (torch.ones(batch, self.width),)
'''
CLAIMS = """
from core.claims import claim, depends, holds, published, untestable

TABLE = dict(plugin="scores", source="table 1", config="scores:real.gin")
published("near", "a score that we reach", metric="score[camera]", value=0.0, tolerance=5.0, **TABLE)
published("far", "a score that we do not reach", metric="score[camera]", value=90.0, tolerance=0.5, **TABLE)
published("wide", "at another width", metric="score[camera]", value=0.0, tolerance=5.0, where={"scores.Score.width": "3"}, **TABLE)
published("nan", "not a number", metric="nothing", value=0.0, tolerance=1.0, **TABLE)
published("cost", "multiply-accumulates", metric="profile/macs", value=2, tolerance=0.5, **TABLE)
published("lost", "of a config that is gone", plugin="scores", source="table 2", config="scores:gone.gin", metric="x", value=1, tolerance=1)


@claim("S-1", "one | two", source="sec. 1")
def first():
    return holds(True, measured="1 | 2")


@claim("S-2", "wrong, and known to be", source="sec. 1", expect="does not hold")
def second():
    return holds(False, measured="2")


@claim("S-3", "sometimes", source="sec. 1", expect="depends")
def third():
    return depends(measured="3", why="so it goes")


@claim("S-4", "far away", source="sec. 1", expect="cannot be tested here")
def fourth():
    return untestable(why="no telescope")


@claim("S-5", "costly", source="sec. 1", cost="slow")
def fifth():
    raise AssertionError("slow checks are not run")
"""
CHANGED = (
    CLAIMS
    + """

@claim("S-6", "was true", source="sec. 2")
def sixth():
    return holds(False, measured="6")


@claim("S-7", "cannot even be asked", source="sec. 2")
def seventh():
    raise RuntimeError("oh")
"""
)
REAL = """
include 'gin/base/train.gin'
ROOT = %gin.REQUIRED
STEPS = 3
TASK = @scores.Score
trainer.train.select = 'score[camera]'
trainer.train.optimizer = @optim.AdamW
optim.AdamW.lr = 0.1
scores.Score.root = %ROOT
"""


@pytest.fixture
def scores(install, tmp_path):
    """The plugin; `run` trains it into runs/NAME, `ledger` is `repro claims` with its rows, its output and its Markdown."""
    install("scores", {"task.py": TASK, "claims.py": CLAIMS, "gin/real.gin": REAL})

    def run(name, *settings, gin="scores:real.gin", root=tmp_path, extra=("--no-profile",), status=0):
        words = [w for s in (f"ROOT={root}", *settings) for w in ("--set", s)]
        done = install.repro("run", "--gin", gin, *words, "--out", tmp_path / "runs" / name, *extra)
        assert done.status == status, done.err
        return str(tmp_path / "runs" / name)

    def ledger(*words, status=0):
        done = install.repro(
            "claims", "--plugin", "scores", *words, "--json", tmp_path / "ledger.json", "--markdown", tmp_path / "ledger.md"
        )
        assert done.status == status, done.out + done.err
        found = json.loads((tmp_path / "ledger.json").read_text())
        return {row["id"]: row for row in found["rows"]}, done.out, (tmp_path / "ledger.md").read_text()

    install.run, install.ledger = run, ledger
    return install


def result(run):
    return json.loads((Path(run) / "result.json").read_text())


def test_with_nothing_to_go_by_everything_is_not_run(scores):
    rows, out, markdown = scores.ledger()
    assert {row["standing"] for row in rows.values()} == {"not run"}
    assert len(rows) == 6 + 5
    assert rows["near"]["n"] == 0
    assert rows["near"]["mean"] is None
    assert "its config cannot be read: no gin file 'scores:gone.gin'" in rows["lost"]["note"]
    assert "| scores | 11 |" in markdown
    assert "A run on a generated sample never counts." in markdown
    assert "not run" in out


def test_numbers_are_means_over_the_seeds_of_real_runs_with_the_folders_behind_them(scores, tmp_path):
    runs = [scores.run(f"seed{i}", f"SEED={i}") for i in range(3)]
    runs.append(
        scores.run(
            "by path",
            "SEED=3",
            "DEVICE='cpu'",
            "trainer.train.threads=1",
            "scores.Score.workers=2",
            gin=tmp_path / "scores/gin/real.gin",
            extra=(),
        )
    )
    rows, out, markdown = scores.ledger(tmp_path / "runs")
    values = [result(run)["metrics"]["score[camera]"] for run in runs]
    assert len(set(values)) == 4
    near, far = rows["near"], rows["far"]
    assert near["standing"] == "reproduced"
    assert near["n"] == 4
    assert near["mean"] == pytest.approx(statistics.fmean(values))
    assert near["deviation"] == pytest.approx(statistics.stdev(values))
    assert sorted(near["runs"]) == sorted(runs)
    assert near["aside"] == {}
    assert far["standing"] == "outside tolerance"
    assert far["note"] == f"{statistics.fmean(values) - 90:+.4f}"
    assert f"{near['mean']:.4f} ± {near['deviation']:.4f} (n=4)" in out
    assert f"{near['mean']:.4f} ± {near['deviation']:.4f} (n=4)" in markdown
    assert all(run in out and run in markdown for run in runs)
    assert rows["wide"]["standing"] == rows["nan"]["standing"] == "not run"
    assert rows["wide"]["aside"][runs[0]] == "scores.Score.width is not bound, not 3"
    assert rows["nan"]["aside"][runs[0]] == "no nothing"
    assert rows["cost"]["standing"] == "reproduced"
    assert rows["cost"]["mean"] == 2
    assert rows["cost"]["runs"] == runs[3:]  # the one that was profiled
    single, _, _ = scores.ledger(runs[0])
    assert single["near"]["note"].endswith("; one seed")
    assert single["near"]["deviation"] is None
    best, _, _ = scores.ledger("--best", *runs)
    assert best["near"]["mean"] == pytest.approx(statistics.fmean(result(run)["best"]["score[camera]"] for run in runs))


def test_what_does_not_count_is_set_aside_with_the_reason(scores, tmp_path):
    counted = scores.run("wider", "scores.Score.width=3")
    sample = scores.run("sample", "scores.Score.sample=True")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "manifest.json").write_text('{"generated": true}')
    hidden = scores.run("hidden sample", root=tmp_path / "made")
    longer = scores.run("longer", "STEPS=4")
    failed = scores.run("failed", "scores.Score.fails=True", status=2)
    (tmp_path / "other.gin").write_text("include 'scores/gin/real.gin'\n")
    other = scores.run("other", gin=tmp_path / "other.gin")
    rows, out, markdown = scores.ledger(tmp_path / "runs")
    assert rows["near"]["standing"] == "not run"
    assert rows["near"]["runs"] == []
    assert rows["near"]["aside"] == {
        counted: "it differs: scores.Score.width = 3 (the file: unbound)",
        sample: "a generated sample, which never counts",
        hidden: "a generated sample, which never counts",
        longer: "it differs: trainer.train.steps = 4 (the file: 3)",
        failed: "not finished (failed)",
    }
    assert rows["wide"]["runs"] == [counted]
    assert rows["wide"]["standing"] == "reproduced"
    for text in (out, markdown):
        assert all(run in text and why in text for run, why in rows["near"]["aside"].items() if run != counted)
        assert other not in text


def test_a_profile_file_of_the_config_is_compared_too(scores, tmp_path):
    done = scores.repro("profile", "--gin", "scores:real.gin", "--set", "ROOT=x", "--count", "--json", tmp_path / "p.json")
    assert done.status == 0, done.err
    rows, _, _ = scores.ledger(tmp_path / "p.json")
    assert rows["cost"]["standing"] == "reproduced"
    assert rows["cost"]["runs"] == [str(tmp_path / "p.json")]
    assert rows["near"]["standing"] == "not run"


def test_verdicts_come_from_a_file_or_from_checking_now(scores, tmp_path):
    done = scores.repro("verify", "scores", "--json", tmp_path / "v.json")
    assert done.status == 0, done.out + done.err
    standings = {"S-1": "reproduced", "S-2": "refuted", "S-3": "depends", "S-4": "cannot be tested here", "S-5": "not run"}
    for words, behind in (((tmp_path / "v.json",), str(tmp_path / "v.json")), (("--check",), "checked now")):
        rows, out, markdown = scores.ledger(*words)
        assert {k: r["standing"] for k, r in rows.items() if r["kind"] == "claim"} == standings
        assert [rows[f"S-{i}"]["runs"] for i in (1, 2, 3, 4, 5)] == [[behind]] * 4 + [[]]
        assert rows["S-3"]["note"] == "so it goes"
        assert "| S-1 | one \\| two | sec. 1 | reproduced | 1 \\| 2 | – |" in markdown
        assert "CHANGED" not in out + markdown


def test_a_verdict_that_changed_is_marked_and_fails_the_check(scores, tmp_path):
    (tmp_path / "scores" / "claims.py").write_text(CHANGED)
    rows, out, markdown = scores.ledger("--check", status=1)
    assert rows["S-6"]["standing"] == "refuted"
    assert rows["S-6"]["note"] == "CHANGED: the ledger states that it holds."
    assert rows["S-7"]["standing"] == "check failed"
    assert rows["S-7"]["found"] == "RuntimeError: oh"
    assert "refuted (CHANGED)" in out
    assert "CHANGED: the ledger states that it holds." in markdown


def test_a_plugin_with_broken_claims_is_one_line_and_the_others_go_on(scores, install, tmp_path):
    install("broken", {"claims.py": "import nothing_of_that_name\n"})
    done = scores.repro("claims", "--plugin", "broken", "--plugin", "scores", "--json", tmp_path / "l.json")
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert "broken-dist" in line
    assert "No module named 'nothing_of_that_name'" in line
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["rows"]) == 11
    assert "nothing_of_that_name" in found["problems"]["broken"]


def test_golden_outcomes_are_counted(scores, tmp_path):
    rows = [
        {"case": f"{i}.safetensors", "module": "M", "passed": i > 0, "worst_output": 0.0, "worst_gradient": 0.0} for i in range(3)
    ]
    (tmp_path / "v.json").write_text(json.dumps({"golden": rows, "claims": []}))
    _, out, markdown = scores.ledger(tmp_path / "v.json")
    assert f"2 of 3 golden cases agree ({tmp_path / 'v.json'})" in out
    assert "2 of 3 golden cases agree" in markdown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere is not a folder"),
        (("--plugin", "sdpts"), "no plugin 'sdpts'; nearest: sdtps"),
        (("other.json",), "other.json is no outcome of"),
        ((".",), "no run folder below ."),
    ],
)
def test_mistakes_are_one_clear_line(command, tmp_path, words, said):
    (tmp_path / "other.json").write_text("{}")
    done = command("claims", *words, folder=tmp_path)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_help_imports_no_torch():
    code = "import sys; from repro import cli; cli.parser_of('claims').format_help(); print('TORCH', 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TORCH False" in done.stdout


def test_one_gin_file_has_one_name():
    assert gather.canonical("gin/sdtps/rgbnt201.gin") == "gin/sdtps/rgbnt201.gin"
    assert gather.canonical("sdtps:rgbnt201.gin") == "gin/sdtps/rgbnt201.gin"
    assert gather.canonical("/somewhere/else/gin/sdtps/rgbnt201.gin") == "gin/sdtps/rgbnt201.gin"
    assert gather.canonical("/opt/lib/site-packages/repro/configs/sdtps/rgbnt201.gin") == "gin/sdtps/rgbnt201.gin"
    assert gather.canonical("their_paper:table1.gin") == "their_paper:table1.gin"
    assert gather.canonical("/somewhere/rgbnt201.gin") == "/somewhere/rgbnt201.gin"


def number(value, tolerance):
    return entered.Published("sdtps", "n", "a number", "table", "gin/sdtps_rgbnt.gin", "m", value, tolerance)


def evidence(path, seed, value, **changes):
    effective = {**claims.requested("gin/sdtps_rgbnt.gin"), **changes}
    return claims.Evidence(path, "sdtps:sdtps_rgbnt.gin", effective, seed, {"m": value})


@pytest.mark.parametrize(
    ("values", "standing"),
    [
        ((0.80,), "reproduced"),
        ((0.78,), "reproduced"),
        ((0.801,), "outside tolerance"),
        ((0.7, 0.88), "reproduced"),
        ((), "not run"),
    ],
)
def test_the_mean_decides_and_the_edge_of_the_tolerance_belongs_to_it(values, standing):
    row = claims.compared(number(0.79, 0.01), [evidence(f"r{i}", str(i), v) for i, v in enumerate(values)])
    assert row.standing == standing


def test_a_seed_run_twice_is_one_seed():
    row = claims.compared(number(0.5, 0.2), [evidence("a", "0", 0.4), evidence("b", "0", 0.6), evidence("c", "1", 0.8)])
    assert (row.n, row.mean) == (2, pytest.approx(0.65))
    assert row.runs == ["a", "b", "c"]


def test_how_a_run_was_done_is_free_and_what_it_was_is_not():
    ratio = "sdtps.TokenSparse.sparse_ratio"
    free = {
        "trainer.train.seed": "9",
        "trainer.train.precision": "'bf16'",
        "sdtps.ReID.root": "'/data'",
        "sdtps.ReID.workers": "16",
    }
    row = claims.compared(number(0.5, 0.2), [evidence("a", "9", 0.5, **free), evidence("b", "0", 0.5, **{ratio: "0.7"})])
    assert row.runs == ["a"]
    assert row.aside == {"b": f"it differs: {ratio} = 0.7 (the file: 0.5)"}


def test_our_own_published_numbers_can_all_be_read(command, tmp_path):
    """Each names a config that exists, and a metric with its protocol."""
    done = command("claims", "--json", str(tmp_path / "l.json"))
    assert done.status == 0, done.err
    rows = [r for r in json.loads((tmp_path / "l.json").read_text())["rows"] if r["kind"] == "published"]
    assert {r["plugin"] for r in rows} >= {"sdtps"}
    for row in rows:
        assert not row["note"], row
        assert claims.requested(row["config"])
        assert claims.configs.locate(row["config"]).is_file()
