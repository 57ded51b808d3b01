"""Sweeps from the command line: planning, what is wrong with a request, real runs in slots, status, cancel, resume."""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sleepy_plugin
import torch

from core import checkpoint, record
from core import config as configs
from repro import cli as command_line
from repro import status
from slurm import grid, job, sweep

HERE = Path(__file__).parents[2]
GIN = """
SEED = 0
LR = 0.001
trainer.train.seed = %SEED
trainer.train.steps = 100
trainer.train.optimizer = @optim.AdamW
optim.AdamW.lr = %LR
optim.AdamW.weight_decay = 0.1
"""


@pytest.fixture
def gin(tmp_path):
    path = tmp_path / "some.gin"
    path.write_text(GIN)
    return path


def plan(gin, *texts, root=None, overrides=()):
    return sweep.plan(str(gin), overrides, [grid.axis(t) for t in texts], root or gin.parent / "runs")


def cli(verb, *argv, cwd=HERE, environment=None):
    environment = {
        **(environment or os.environ),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), (environment or {}).get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, "-m", f"repro.{verb}", *map(str, argv)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def wait_for(look, within=60.0):
    until = time.monotonic() + within
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            found = look()
            if found:
                return found
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


# --- planning


def test_a_planned_run_is_the_run_that_the_same_overrides_give_alone(gin):
    found = plan(gin, "LR=0.1,1e-2", "SEED=0..1; optim.AdamW.weight_decay=0.0,0.5", overrides=["trainer.train.keep=3"])
    assert len(found.runs) == 4
    for run, bound in zip(found.runs, found.effective):
        alone = configs.read(str(gin), ["trainer.train.keep=3", *run.overrides])
        assert run.name == f"some-{alone.signature}"
        assert bound == alone.effective()
    assert [r.configuration for r in found.runs] == [0, 1, 2, 3]  # weight decay moves with the seed here


def test_the_frozen_config_gives_the_same_runs_whatever_becomes_of_the_file(gin):
    found = plan(gin, "LR=0.1,0.01", "SEED=0..1", overrides=["optim.AdamW.weight_decay=0.7"])
    found.write()
    gin.write_text("SEED = broken")
    again = sweep.read(found.folder)
    assert again.runs == found.runs
    draft = configs.draft(str(again.base(again.files[0])))
    assert [f"some-{draft.config(r.overrides).signature}" for r in again.runs] == [r.name for r in found.runs]
    again.settle_effective()
    assert again.effective == found.effective


def test_a_config_of_a_draft_leaves_the_draft_as_it_was(gin):
    draft = configs.draft(str(gin))
    first = draft.config(["LR=0.5", "trainer.train.seed=4"])
    assert draft.config() == configs.read(str(gin))
    assert draft.config(["LR=0.5", "trainer.train.seed=4"]) == first == configs.read(str(gin), ["LR=0.5", "trainer.train.seed=4"])
    with pytest.raises(configs.ConfigError, match="already set by"):
        draft.config(["LR=0.5", "LR=0.6"])


def test_an_override_may_take_the_place_of_a_binding_written_through_a_macro(gin):
    over = configs.read(str(gin), ["optim.AdamW.lr=0.2"])
    assert over.effective()["optim.AdamW.lr"] == "0.2"
    path = gin.parent / "again.gin"
    path.write_text(over.text())  # the canonical text holds no macro that does nothing
    assert configs.read(str(path)).effective() == over.effective()
    with pytest.raises(configs.ConfigError, match="LR is set and never used"):
        configs.read(str(gin), ["optim.AdamW.lr=0.2", "LR=0.3"])


def test_runs_that_differ_in_the_seed_alone_are_one_configuration(gin):
    assert [r.configuration for r in plan(gin, "LR=0.1,0.2", "SEED=0..2").runs] == [0, 0, 0, 1, 1, 1]


def test_two_combinations_that_are_one_run_are_one_and_it_is_said(gin):
    found = sweep.plan(str(gin), [], [grid.presets({"base": [], "same": ["LR=0.001"], "other": ["LR=0.002"]})], gin.parent / "runs")
    assert len(found.runs) == 2
    assert found.merged == ["preset=same is the same run as preset=base"]


def test_a_preset_may_come_from_a_file_of_its_own(gin, tmp_path):
    (tmp_path / "off.gin").write_text(GIN.replace("optim.AdamW", "optim.SGD").replace("0.1\n", "0.2\n"))
    off = str(tmp_path / "off.gin")
    axes = [grid.presets({"full": [], "off": [off], "slow off": [off, "LR=1e-5"]}), grid.axis("SEED=0..1")]
    found = sweep.plan(str(gin), ["trainer.train.keep=3"], axes, tmp_path / "runs")
    assert [run.name.split("-")[0] for run in found.runs] == ["some"] * 2 + ["off"] * 4
    assert [run.configuration for run in found.runs] == [0, 0, 1, 1, 2, 2]
    for run in found.runs:  # each the run that its file gives alone
        assert run.name.endswith(configs.read(run.gin, ["trainer.train.keep=3", *run.overrides]).signature)
    assert found.effective[2]["optim.SGD.weight_decay"] == "0.2"
    found.write()
    gin.unlink()
    (tmp_path / "off.gin").unlink()
    again = sweep.read(found.folder)
    assert again.runs == found.runs
    again.settle_effective()
    assert again.effective == found.effective
    commands = [made.command for made in sweep.jobs(again, again.runs)]
    assert [Path(c[c.index("--gin") + 1]).name for c in commands] == ["some.gin"] * 2 + ["off.gin"] * 4


def test_presets_that_all_have_a_file_need_no_other(gin, tmp_path):
    found = sweep.plan(None, [], [grid.presets({"a": [str(gin)], "b": [str(gin), "LR=0.1"]})], tmp_path / "runs")
    assert len(found.runs) == 2
    assert found.name.startswith("some-")
    with pytest.raises(grid.GridError, match="which config for preset=b"):
        sweep.plan(None, [], [grid.presets({"a": [str(gin)], "b": ["LR=0.1"]})], tmp_path / "runs")
    twice = [grid.presets({"a": [str(gin)], "b": [f"{gin.parent}/./{gin.name}", "LR=0.1"]})]
    assert len(sweep.plan(None, [], twice, tmp_path / "runs").files) == 1  # one file under two spellings
    (tmp_path / "below").mkdir()
    other = tmp_path / "below" / "some.gin"
    other.write_text(GIN)
    with pytest.raises(grid.GridError, match="have one name"):
        sweep.plan(str(gin), [], [grid.presets({"a": [], "b": [str(other)]})], tmp_path / "runs")


def test_what_is_wrong_with_a_file_of_a_preset_names_the_file(gin, tmp_path):
    (tmp_path / "off.gin").write_text("trainer.train.steps = 100\n")
    axes = [grid.presets({"full": [], "off": [str(tmp_path / "off.gin")]})]
    with pytest.raises(configs.ConfigError) as error:
        sweep.plan(str(gin), ["LR=0.1"], axes, tmp_path / "runs")
    assert len(error.value.problems) == 2  # and that nothing was submitted
    assert str(tmp_path / "off.gin") in error.value.problems[0]
    assert "LR" in error.value.problems[0]
    with pytest.raises(configs.ConfigError, match=r"no gin file 'gin/sap/of\.gin'"):
        sweep.plan(str(gin), [], [grid.presets({"full": [], "off": ["gin/sap/of.gin"]})], tmp_path / "runs")


def test_every_problem_of_every_combination_is_said_once(gin):
    with pytest.raises(configs.ConfigError) as caught:
        plan(gin, "optim.AdamW.lr=0.1,fast", "SEED=0,1.5,2", "optim.AdamW.ep=1e-8")
    *said, last = caught.value.problems
    assert len(said) == 3
    for expected in (
        "optim.AdamW.lr must be float, got 'fast' (str)   (3 runs)",
        "trainer.train.seed must be int, got 1.5 (float) (through %SEED)   (2 runs)",
        "optim.AdamW has no parameter 'ep'; nearest: eps   (6 runs)",
    ):
        assert sum(expected in line for line in said) == 1, said
    assert last == "nothing was submitted"


def test_a_thousand_runs_are_planned_in_two_seconds_without_torch(gin):
    code = """
        import sys
        from repro.cli import verb
        done = verb("sweep")
        assert "torch" not in sys.modules and "submitit" not in sys.modules and "rich" not in sys.modules
        raise SystemExit(done)
    """
    argv = ["--gin", gin, "--grid", "LR=0.01..0.1..0.01", "--grid", "optim.AdamW.weight_decay=0.1..1.0..0.1", "--grid", "SEED=0..9"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), *map(str, argv), "--dry-run", "--runs", gin.parent / "runs"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "1000 runs: 1000 waiting; 1000 to do" in done.stdout
    assert len(set(re.findall(r"^some-\w{8}", done.stdout, flags=re.M))) == 1000
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    assert not (gin.parent / "runs").exists()


def test_a_sweep_file_and_the_command_line_add_up(gin, tmp_path):
    (tmp_path / "ablation.gin").write_text(
        f"GIN = '{gin}'\nSET = ['trainer.train.steps=7']\nGRID = ['SEED=0..1']\nPRESETS = {{'full': [], 'slow': ['LR=1e-5']}}\n"
    )
    done = cli(
        "sweep",
        "--sweep",
        tmp_path / "ablation.gin",
        "--grid",
        "optim.AdamW.weight_decay=0.0,0.2",
        "--runs",
        tmp_path / "runs",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("some-")]
    assert [r[1:4] for r in rows] == [[p, s, w] for p in ("full", "slow") for s in "01" for w in ("0.0", "0.2")]
    (tmp_path / "ablation.gin").write_text("GIN = 'a'\nGRIDS = []\nPRESETS = ['x']\n")
    done = cli("sweep", "--sweep", "gin/sap/sweeps/ablations.gin", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "nearest: gin/sap/sweeps/ablation.gin" in done.stderr
    done = cli("sweep", "--sweep", tmp_path / "ablation.gin", "--dry-run")
    assert done.returncode == 2
    assert "no key 'GRIDS'; nearest: GRID" in done.stderr
    assert "PRESETS must be dict[str, list[str]]" in done.stderr


WRONG = [
    ([], 2, "the grid is empty"),
    (["--grid", ""], 2, "--grid is empty"),
    (["--grid", "SEED="], 2, "there is no value"),
    (["--grid", "optim.AdamW.wieght_decay=0,1"], 2, "nearest: weight_decay"),
    (["--grid", "optim.AdamV.lr=0.1"], 2, "optim.AdamW"),
    (["--grid", "SEEED=0..2"], 2, "did you mean SEED"),
    (["--grid", "SEED=0,1.5"], 2, "trainer.train.seed must be int"),
    (["--grid", "LR=0.1", "--set", "LR=0.2"], 2, "already set by --set LR=0.2"),
    (["--grid", "SEED=0..1", "--first", "0"], 2, "--first must be at least 1"),
    (["--grid", "SEED=0..1", "--slots", "0"], 2, "slots must be at least 1"),
    (["--grid", "SEED=0..1", "--grace", "nan"], 2, "--grace must be 0 or more seconds"),
    (["--grid", "SEED=0..1", "--name", "a/b"], 2, "--name 'a/b' must be one folder name"),
    (["--grid", "SEED=0..1", "--name", ".."], 2, "--name '..' must be one folder name"),
    (["--preset", "a: SEED=1.5"], 2, "preset 'a', SEED=1.5: "),
    (["--grid", "SEED=0..1", "--slots", "2", "--launcher", "slurm"], 2, "--slots has no effect with --launcher slurm"),
    (["--grid", "SEED=0..1", "--slurm", "time=5"], 2, "--slurm has no effect with --launcher local"),
    (["--grid", "SEED=0..1", "--launcher", "slurm", "--cluster", "one_gpus"], 2, "one_gpu"),
    (["--grid", "SEED=0..1", "--launcher", "slurm"], 1, "no sbatch on the path"),
    (["--resume", "some-0"], 2, "--resume takes the sweep as it was planned; drop --gin"),
]


@pytest.mark.parametrize(("argv", "code", "said"), WRONG)
def test_a_wrong_request_is_one_clear_error_and_starts_nothing(gin, argv, code, said):
    environment = {**os.environ, "PATH": str(gin.parent / "empty")}  # a machine without SLURM, whatever this one is
    done = cli("sweep", "--gin", gin, *argv, "--runs", gin.parent / "runs", environment=environment)
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line != "error: nothing was submitted"]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert not (gin.parent / "runs").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error(gin):
    (gin.parent / "file").touch()
    done = cli("sweep", "--gin", gin, "--grid", "SEED=0..1", "--runs", gin.parent / "file")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    for verb in ("status", "cancel"):
        done = cli(verb, "nothing", "--runs", gin.parent)
        assert done.returncode == 2
        assert done.stderr.startswith("error: no sweep 'nothing'; there is none below")


def test_a_sweep_file_that_is_damaged_is_one_clear_error(gin):
    found = plan(gin, "SEED=0..1")
    found.write()
    whole = record.read_json(found.folder / "sweep.json")
    del whole["runs"][0]["cells"]
    record.write_json(found.folder / "sweep.json", whole)
    with pytest.raises(ValueError, match=r"sweep.json is not what `repro sweep` writes \(KeyError: 'cells'\); remove it"):
        sweep.read(found.folder)


def test_among_all_sweeps_one_that_is_damaged_is_one_line_and_the_others_are_shown(gin, capsys):
    for name in ("a", "b", "c"):
        sweep.plan(str(gin), (), [grid.axis("SEED=0..1")], gin.parent / "runs", name=name).write()
    path = gin.parent / "runs" / "sweeps" / "b" / "sweep.json"
    older = record.read_json(path)
    for run in older["runs"]:
        del run["gin"]  # every run's own since presets may have a file
    record.write_json(path, older)
    assert command_line.main(["status", "--runs", str(gin.parent / "runs")]) == 0
    first, damaged, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("a   2 runs: 2 waiting", "c   2 runs: 2 waiting")
    assert re.match(r"b   .*sweep.json is not what `repro sweep` writes \(KeyError: 'gin'\)", damaged)
    assert command_line.main(["status", "b", "--runs", str(gin.parent / "runs")]) == 2
    assert "is not what `repro sweep` writes" in capsys.readouterr().err


def test_a_sweep_under_a_name_that_another_has_is_refused(gin):
    plan(gin, "SEED=0..1").write()
    other = plan(gin, "SEED=0..2")
    other.folder = plan(gin, "SEED=0..1").folder
    with pytest.raises(ValueError, match="holds another sweep"):
        other.write()


# --- how runs stand

# Times are seconds from now.
OWN = {"host": "elsewhere", "pid": 1, "step": 5, "steps": 9}
SLURM = {"launcher": "slurm", "job": "12_3", "submitted": -100, "limit": 3}
LOCAL = {"launcher": "local", "submitted": -100}
STANDINGS = [
    # own status, launcher's note, what the queue says of the job, whether the local controller lives -> state
    (None, {}, None, False, "waiting"),
    ({"state": "finished"}, {}, None, False, "finished"),
    ({"state": "failed", "updated": -50}, SLURM, ("RUNNING", "None"), False, "failed"),
    ({"state": "running", "updated": 0}, {}, None, False, "running"),
    ({"state": "running", "updated": -60}, {}, None, False, "lost"),
    ({"state": "running", "updated": -60}, SLURM, ("RUNNING", "None"), False, "running"),
    ({"state": "running", "updated": -60}, SLURM, "gone", False, "lost"),
    ({"state": "stopped", "updated": -50}, SLURM, "gone", False, "stopped"),
    ({"state": "stopped", "updated": -50}, SLURM, ("PENDING", "BeginTime"), False, "requeued"),
    ({"state": "stopped", "updated": -50}, {**SLURM, "ended": None}, ("COMPLETING", "None"), False, "stopping"),
    ({"state": "stopped", "updated": -50}, {**SLURM, "ended": 0}, ("RUNNING", "None"), False, "stopping"),
    ({"state": "failed", "updated": -200}, SLURM, ("PENDING", "Resources"), False, "queued"),
    ({"state": "failed", "updated": -200}, SLURM, ("RUNNING", "None"), False, "queued"),
    ({"state": "failed", "updated": -200}, SLURM, "unknown", False, "queued"),
    (None, SLURM, ("PENDING", "Resources"), False, "queued"),
    (None, SLURM, ("RUNNING", "None"), False, "queued"),
    (None, SLURM, "unknown", False, "queued"),
    (None, SLURM, "gone", False, "lost"),
    (None, {**SLURM, "ended": 0, "exit": 1}, "gone", False, "failed"),
    (None, {**SLURM, "job": ""}, "gone", False, "waiting"),
    (None, LOCAL, None, True, "queued"),
    (None, {**LOCAL, "started": 0}, None, True, "queued"),
    (None, {**LOCAL, "started": 0}, None, False, "lost"),
    (None, LOCAL, None, False, "waiting"),
    ({"state": "stopped", "updated": -200}, LOCAL, None, True, "queued"),
    ({"state": "stopped", "updated": -50}, {**LOCAL, "started": -80, "ended": -50}, None, True, "stopped"),
]


@pytest.mark.parametrize(("own", "noted", "asked", "alive", "state"), STANDINGS)
def test_a_run_stands_as_its_own_folder_says(tmp_path, own, noted, asked, alive, state):
    times = ("updated", "submitted", "started", "ended")
    own, noted = (d and {k: v + time.time() if k in times and v is not None else v for k, v in d.items()} for d in (own, noted))
    if own is not None:
        record.write_json(tmp_path / "status.json", {**OWN, **own})
    queue = None if asked == "unknown" else {"12_3": asked} if isinstance(asked, tuple) else {}
    found = sweep._standing(sweep.Run("r", "x.gin", (), (), 0), tmp_path, noted, queue, alive)
    assert found.state == state


def test_a_cancelled_run_that_never_started_is_cancelled(tmp_path):
    (tmp_path / job.CANCELLED).touch()
    assert sweep._standing(sweep.Run("r", "x.gin", (), (), 0), tmp_path, {}, {}, False).state == "cancelled"


# --- cost


def finished(found, run, rows, bound=None):
    path = found.path(run)
    path.mkdir(parents=True)
    record.write_json(path / "run.json", {"effective": bound or dict(zip([r.name for r in found.runs], found.effective))[run.name]})
    record.write_json(path / "result.json", {"metrics": {"score": 0.5}})
    (path / "timing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_cost_is_what_finished_runs_of_the_config_took(gin):
    found = plan(gin, "LR=0.1,0.2,0.3", "SEED=0..1")
    assert sweep.costs(found) == {}
    finished(found, found.runs[0], [{"step": 50, "elapsed_s": 10}, {"total_s": 36}])
    # This one was stopped after 30 s and went on: both parts count.
    finished(found, found.runs[2], [{"elapsed_s": 20}, {"elapsed_s": 30}, {"attempt": 2}, {"elapsed_s": 60}, {"total_s": 78}])
    expected = [36, 36, 108, 108, 72, 72]  # its own learning rate where measured, else the mean of all
    assert [sweep.costs(found)[r.name] for r in found.runs] == pytest.approx(expected)
    longer = plan(gin, "LR=0.1,0.2,0.3", "SEED=0..1", overrides=["trainer.train.steps=1000"])
    assert [sweep.costs(longer)[r.name] for r in longer.runs] == pytest.approx([10 * e for e in expected])
    other = plan(gin, "LR=0.1,0.2", overrides=["optim.AdamW.weight_decay=0.9"])
    assert sweep.costs(other) == {}
    (gin.parent / "off.gin").write_text(GIN)  # another file's runs cost what that file's runs took
    both = sweep.plan(str(gin), [], [grid.presets({"full": ["LR=0.1"], "off": [str(gin.parent / "off.gin")]})], gin.parent / "runs")
    assert list(sweep.costs(both)) == [both.runs[0].name]


def test_a_table_of_results_is_the_same_wherever_the_runs_were_done(gin):
    tables = []
    for place in ("here", "there"):
        found = plan(gin, "LR=0.1,0.2", root=gin.parent / place)
        for run in found.runs:
            finished(found, run, [])
        tables.append(status.results_table(found))
    assert tables[0] == tables[1]
    assert tables[0].splitlines()[2].split()[1:] == ["0.1", "0.5000"]


# --- real runs


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A real sweep of three runs of which one fails, and what was said."""
    folder = tmp_path_factory.mktemp("sweep")
    gin = sleepy_plugin.install(folder / "plugins")
    environment = {**sleepy_plugin.environment(folder / "plugins"), "CUDA_VISIBLE_DEVICES": ""}
    argv = ["--gin", gin, "--runs", folder / "runs", "--set", "trainer.train.save_every=5"]
    first = cli(
        "sweep",
        *argv,
        "--name",
        "small",
        "--grid",
        "SEED=0..2; sleepy.Nap.fail_at=-1,-1,7",
        "--slots",
        "2",
        environment=environment,
    )
    gin.write_text(gin.read_text().replace("STEPS = 20", "STEPS = 30"))  # too late for this sweep
    return folder, argv, environment, first


def test_a_sweep_runs_everything_and_says_what_failed(done):
    folder, _, environment, first = done
    assert first.returncode == 1, first.stdout + first.stderr
    assert "3 runs: 2 finished, 1 failed" in first.stdout
    assert re.search(r"failed .* ValueError: asked to fail at step 7$", first.stdout, flags=re.M)
    found = sweep.find("small", folder / "runs")
    rows, _ = sweep.standings(found)
    assert [r.state for r in rows] == ["finished", "finished", "failed"]
    assert rows[2].message.startswith("ValueError: asked to fail at step 7")
    assert "asked to fail at step 7" in (found.path(rows[2].run) / "job.log").read_text()
    told = cli("status", "small", "--runs", folder / "runs", environment=environment)
    assert told.returncode == 1
    assert "3 runs: 2 finished, 1 failed" in told.stdout
    as_json = json.loads(cli("status", "small", "--runs", folder / "runs", "--json", environment=environment).stdout)
    assert [r["state"] for r in as_json["runs"]] == ["finished", "finished", "failed"]
    assert as_json["runs"][0]["cells"] == {"SEED": "0", "sleepy.Nap.fail_at": "-1"}


def test_the_profile_is_made_once_a_configuration_and_stored_with_each_run(done):
    folder, *_ = done
    good = [sweep.find("small", folder / "runs").path(r) for r in sweep.find("small", folder / "runs").runs[:2]]
    assert ["--no-profile" in job.read(p)["command"] for p in good] == [False, True]
    profiles = [(p / "profile.json").read_bytes() for p in good]
    assert profiles[0] == profiles[1]
    assert len(profiles[0]) > 10


def test_only_what_failed_is_done_again_from_the_folder_alone(done):
    folder, _, environment, _ = done
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").glob("*/result.json")}
    again = cli("sweep", "--resume", "small", "--only-failed", "--first", "1", "--runs", folder / "runs", environment=environment)
    assert again.returncode == 1
    assert "1 to do" in again.stdout
    rows, _ = sweep.standings(sweep.find("small", folder / "runs"))
    assert [r.attempts for r in rows] == [1, 1, 2]
    assert [(r.state, r.steps) for r in rows] == [("finished", 20)] * 2 + [("failed", 20)]  # the config as it was planned
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "runs").glob("*/result.json")}


def test_what_is_done_is_not_done_again(done):
    _, argv, environment, _ = done
    again = cli(
        "sweep", *argv, "--set", "STEPS=20", "--set", "sleepy.Nap.fail_at=-1", "--grid", "SEED=0..1", environment=environment
    )
    assert again.returncode == 0, again.stderr
    assert "2 runs: 2 finished\nnothing to do" in again.stdout
    assert "accuracy" in again.stdout


def test_a_killed_run_is_resumed_to_the_same_bits(done):
    folder, argv, environment, _ = done
    argv = [*argv, "--set", "STEPS=20", "--set", "sleepy.Nap.kill_at=12", "--grid", "SEED=0", "--no-profile", "--name", "killed"]
    killed = cli("sweep", *argv, environment=environment)
    assert killed.returncode == 1
    assert "killed by SIGKILL" in killed.stdout
    resumed = cli("sweep", "--resume", "killed", "--no-profile", "--runs", folder / "runs", environment=environment)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    names = [sweep.find(name, folder / "runs").runs[0].name for name in ("small", "killed")]
    places = [folder / "runs" / name for name in names]  # the same seed, one left in peace and one killed
    assert (places[0] / "metrics.jsonl").read_bytes() == (places[1] / "metrics.jsonl").read_bytes()
    whole, again = (checkpoint.load(checkpoint.Store(place / "checkpoints").path(20))["model"] for place in places)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_cancel_stops_with_checkpoints_and_resume_takes_it_up(tmp_path):
    gin = sleepy_plugin.install(tmp_path / "plugins")
    environment = {
        **sleepy_plugin.environment(tmp_path / "plugins"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{tmp_path / 'plugins'}:{HERE}",
    }
    argv = [
        "--gin",
        gin,
        "--set",
        "PAUSE=0.1",
        "--set",
        "STEPS=600",
        "--grid",
        "SEED=0..1",
        "--no-profile",
        "--name",
        "c",
        "--slots",
        "1",
    ]
    with open(tmp_path / "said", "w") as said:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "repro.sweep", *map(str, argv), "--runs", tmp_path / "runs"],
            cwd=HERE,
            env=environment,
            stdout=said,
            stderr=said,
        )
    first, _ = wait_for(lambda: sweep.find("c", tmp_path / "runs").runs)
    path = tmp_path / "runs" / first.name
    wait_for(lambda: record.status(path).step >= 5)
    busy = cli("sweep", "--resume", "c", "--runs", tmp_path / "runs", environment=environment)
    assert "nothing to do" in busy.stdout  # all of it is in somebody's hands
    stopped = cli("cancel", "c", "--runs", tmp_path / "runs", environment=environment)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert keeper.wait(timeout=30) == record.EXIT_STOPPED
    assert "2 runs: 1 stopped, 1 cancelled" in stopped.stdout
    at = record.status(path).step
    assert 5 <= at < 600
    assert any((path / "checkpoints").iterdir())
    dry = cli("sweep", "--resume", "c", "--dry-run", "--runs", tmp_path / "runs", environment=environment)
    assert "2 to do" in dry.stdout
