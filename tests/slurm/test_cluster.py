"""On a real SLURM (slurm/local_cluster.sh start): arrays, time limits, preemption, cancelled jobs, lost nodes, ranks."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sleepy_plugin
import tiny_job
import torch
from filelock import FileLock, Timeout

from core import checkpoint, record
from slurm import job, submit, sweep

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parents[2]
PLACE = ("--launcher", "slurm", "--cluster", "local")
NAPS = ("--set", "STEPS=120", "--set", "trainer.train.save_every=10", "--no-profile")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A SLURM that answers; True where it is the one of slurm/local_cluster.sh, which one test run uses at a time."""
    if shutil.which("sbatch") is None:
        pytest.skip("no sbatch on the path; install slurmctld slurmd slurm-client munge")
    said = subprocess.run([HERE / "slurm" / "local_cluster.sh", "env"], capture_output=True, text=True, check=True).stdout
    own = Path(said.split("'")[1])
    before = os.environ.get("SLURM_CONF")
    if before is None and own.exists():
        os.environ["SLURM_CONF"] = str(own)
    mine = os.environ.get("SLURM_CONF") == str(own)
    lock = FileLock(str(own.parent / "tests.lock")) if mine else contextlib.nullcontext()
    try:
        try:
            submit._ask("sinfo", "--noheader")
            with lock.acquire(timeout=240) if mine else lock:
                if mine:  # what a test run that was killed has left
                    subprocess.run(["scancel", "--name=main,limit,dropped,node,ranks"], check=False)
                    subprocess.run(["scontrol", "update", "NodeName=ALL", "State=resume"], check=False, capture_output=True)
                yield mine
        except submit.SlurmError as error:
            pytest.skip(f"{error}; slurm/local_cluster.sh start")
        except Timeout:
            pytest.skip("another test run has the cluster")
    finally:
        if before is None:
            os.environ.pop("SLURM_CONF", None)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    sleepy_plugin.install(folder / "plugins")
    yield folder
    for path in (folder / "runs" / "sweeps").glob(f"*/{sweep.FILE}"):  # whatever a failed test has left in the queue
        submit.cancel([r.job for r in rows(sweep.read(path.parent)) if r.job and r.state in sweep.ACTIVE])


@pytest.fixture(scope="module")
def straight(home):
    """The same training, undisturbed, on this machine."""
    done = cli(home, "sweep", "--gin", home / "plugins" / "nap.gin", *NAPS, "--grid", "SEED=0..1", "--name", "straight")
    assert done.returncode == 0, done.stdout + done.stderr
    return sweep.find("straight", home / "runs")


def cli(home, verb, *argv, **environment):
    known = {**sleepy_plugin.environment(home / "plugins"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    known["PYTHONPATH"] = f"{HERE}:{known['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "-m", f"repro.{verb}", *map(str, argv), "--runs", str(home / "runs")],
        cwd=HERE, env=known, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def start(home, name, *argv, pause=0.1):
    """Submit a sweep whose runs nap at every step, which is no part of their numbers; returns it. Another nap is another run."""
    naps = (*NAPS, "--set", f"PAUSE={pause}", "--name", name)
    done = cli(home, "sweep", "--gin", home / "plugins" / "nap.gin", *naps, *PLACE, *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted" in done.stdout
    return sweep.find(name, home / "runs")


def rows(found):
    return sweep.standings(found)[0]


def states(found):
    return [r.state for r in rows(found)]


def wait_for(look, within=200.0):
    until = time.monotonic() + within
    while True:
        with contextlib.suppress(OSError, AttributeError, KeyError):
            found = look()
            if found:
                return found
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.2)


def stepped(found, number, step):
    """Wait until a run has done so many steps."""
    path = found.path(found.runs[number])
    return wait_for(lambda: record.status(path).step >= step)


def finish(found):
    """Wait until all runs are over, and see that they are finished.

    A requeued job would wait for two minutes. Two seconds are enough; at once, its node may refuse the job that it has just ended.
    """
    since = {}

    def over():
        for row in rows(found):
            if row.state == "requeued" and time.monotonic() - since.setdefault((row.job, row.requeues), time.monotonic()) > 2:
                subprocess.run(["scontrol", "update", f"JobId={row.job}", "StartTime=now"], check=False, capture_output=True)
        return not any(s in sweep.ACTIVE for s in states(found))

    wait_for(over)
    assert states(found) == ["finished"] * len(found.runs), [(r.state, r.message) for r in rows(found)]


def assert_same(straight, found):
    """Both sweeps' runs have the same metrics file and the same weights, bit for bit."""
    for a, b in zip(straight.runs, found.runs):
        a, b = straight.path(a), found.path(b)
        assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
        first, second = (checkpoint.load(checkpoint.Store(p / "checkpoints").path(120))["model"] for p in (a, b))
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_an_array_of_the_main_job_gives_the_table_that_this_machine_gives(tmp_path):
    data = tiny_job.sample(tmp_path / "RGBNT201")
    tiny = ("STEPS=4", f"ROOT={data}", *tiny_job.OVERRIDES)
    argv = ["--gin", "gin/sdtps_rgbnt.gin", *(w for t in tiny for w in ("--set", t)), "--no-profile", "--name", "main"]
    argv += ["--grid", "sdtps.TokenSparse.sparse_ratio=0.3,0.5,0.7"]
    sleepy_plugin.install(tmp_path / "here" / "plugins")
    sleepy_plugin.install(tmp_path / "there" / "plugins")
    here = cli(tmp_path / "here", "sweep", *argv)
    assert here.returncode == 0, here.stdout + here.stderr
    began = time.monotonic()
    there = cli(tmp_path / "there", "sweep", *argv, *PLACE)
    assert there.returncode == 0, there.stdout + there.stderr
    assert time.monotonic() - began < 20  # submitted, not waited for
    found = sweep.find("main", tmp_path / "there" / "runs")
    script = next((found.folder / "jobs").glob("*_submission.sh")).read_text()
    assert "#SBATCH --array=0-2%2" in script
    assert (found.folder / "jobs").stat().st_mode & 0o777 == 0o700
    working = []

    def over():
        working.append(states(found).count("running"))
        return not any(s in sweep.ACTIVE for s in states(found))

    wait_for(over)
    assert max(working) <= 2
    again = cli(tmp_path / "there", "sweep", *argv, *PLACE)
    assert "3 runs: 3 finished\nnothing to do" in again.stdout
    assert sweep.results(found) == sweep.results(sweep.find("main", tmp_path / "here" / "runs"))
    assert len(sweep.results(found)[1]) == 3
    assert len(sweep.results(found)[0]) > 4

    # One of them again as two tasks, at the same global batch.
    sleepy_plugin.install(tmp_path / "two" / "plugins")
    two = cli(tmp_path / "two", "sweep", *argv, "--first", "1", *PLACE, "--slurm", "tasks=2")
    assert two.returncode == 0, two.stdout + two.stderr
    both = sweep.find("main", tmp_path / "two" / "runs")
    wait_for(lambda: states(both)[0] not in sweep.ACTIVE)
    assert states(both)[0] == "finished", rows(both)[0].message
    one, other = (record.read_lines(s.path(s.runs[0]) / "metrics.jsonl") for s in (found, both))
    assert [r["step"] for r in one] == [r["step"] for r in other]
    for a, b in zip(one, other):
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), rel=1e-4)
        assert a.get("eval", {}) == pytest.approx(b.get("eval", {}), abs=1e-3)


def test_a_job_that_reaches_its_time_limit_is_requeued_and_ends_with_the_same_bits(home, straight):
    # SLURM looks at time limits twice a minute: the signal comes half a minute to a minute after the start, never at once.
    found = start(home, "limit", "--grid", "SEED=0", "--slurm", "time=2", "--slurm", "signal_s=30", pause=0.6)
    wait_for(lambda: "requeued" in states(found))
    told = cli(home, "status", "limit")
    assert told.returncode == 0
    assert "1 of 20" in told.stdout
    finish(found)
    assert all(1 <= r.requeues <= 20 and r.attempts >= 2 for r in rows(found))
    assert_same(straight, found)


def test_requeues_are_bounded_a_cancelled_job_stops_and_both_are_picked_up_from_the_folder(home, straight):
    found = start(home, "dropped", "--grid", "SEED=0..1", "--slurm", "requeues=0", pause=0.08)
    stepped(found, 0, 15)
    stepped(found, 1, 15)
    first, second = rows(found)
    subprocess.run(["scancel", "--signal=USR2", first.job], check=True)  # what preemption sends
    stopped = cli(home, "cancel", "dropped", second.run.name)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_for(lambda: states(found) == ["stopped", "stopped"] and submit.queue() == {})
    assert "requeued 0 times, the limit" in job.read(found.path(first.run))["message"]
    done = cli(home, "sweep", "--resume", "dropped", "--no-profile", *PLACE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs: 2 stopped" in done.stdout
    twice = cli(home, "sweep", "--resume", "dropped", "--no-profile", *PLACE)
    assert "nothing to do" in twice.stdout  # they are in SLURM's hands now
    finish(found)
    assert_same(straight, found)


def test_a_drained_node_holds_jobs_back_and_a_lost_one_gives_them_back(home, straight, cluster):
    if not cluster:
        pytest.skip("drains a node, so it works on the one of slurm/local_cluster.sh alone")
    (node,) = submit._ask("sinfo", "--noheader", "--format=%N").split()

    def node_is(state):
        subprocess.run(["scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test"], check=True)

    found = start(home, "node", "--grid", "SEED=0..1", "--slurm", "parallel=1", pause=0.06)
    try:
        stepped(found, 0, 15)
        node_is("drain")
        time.sleep(1)
        assert states(found) == ["running", "queued"]  # what runs goes on, what waits waits
        node_is("down")
        wait_for(lambda: states(found) == ["requeued", "queued"])
    finally:
        node_is("resume")
    finish(found)
    assert rows(found)[0].requeues == 1
    assert_same(straight, found)


def test_two_ranks_stop_and_go_on_together_and_give_what_one_process_gives(home):
    argv = ["--gin", home / "plugins" / "nap.gin", *NAPS, "--set", "sleepy.Nap.dropout=0.0", "--set"]
    found = start(home, "ranks", "--set", "sleepy.Nap.dropout=0.0", "--grid", "SEED=0", "--slurm", "tasks=2", pause=0.06)
    stepped(found, 0, 10)
    subprocess.run(["scancel", "--signal=USR2", rows(found)[0].job], check=True)
    wait_for(lambda: states(found) == ["requeued"])
    finish(found)
    assert rows(found)[0].requeues == 1
    two, one = found.path(found.runs[0]), home / "one" / "run"
    assert json.loads((two / "run.json").read_text())["environment"]["variables"]["WORLD_SIZE"] == "2"
    assert (two / "job.rank1.log").exists()
    (home / "one").mkdir()
    done = cli(home, "run", *argv, "SEED=0", "--out", one)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (record.read_lines(path / "metrics.jsonl") for path in (one, two))
    assert [r["step"] for r in first if "loss" in r] == list(range(1, 121))
    assert [r["step"] for r in first] == [r["step"] for r in second]
    for a, b in zip(first, second):
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), rel=1e-4)
        assert a.get("eval") == b.get("eval")


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--slurm", "partition=fast"), 2, "no partition 'fast'; this cluster has: "),
        (("--slurm", "memory_gb=900000"), 1, "sbatch: "),
        (("--slurm", "account=x", "--slurm", "extra={'no-such-option': 1}"), 1, "sbatch: "),
    ],
)
def test_what_slurm_refuses_is_one_clear_error(home, argv, code, said):
    done = cli(home, "sweep", "--gin", home / "plugins" / "nap.gin", "--grid", "SEED=70..71", *PLACE, *argv)
    assert done.returncode == code, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr
    (found,) = [sweep.read(p.parent) for p in (home / "runs" / "sweeps").glob("nap-*/sweep.json")] or [None]
    assert found is None or states(found) == ["waiting", "waiting"]
    assert found is None or list((found.folder / "jobs").iterdir()) == []


def test_the_cluster_script_starts_and_stops_only_its_own_as_often_as_asked(tmp_path):
    script = HERE / "slurm" / "local_cluster.sh"
    environment = {**os.environ, "SLURM_LOCAL_DIR": str(tmp_path / "other"), "SLURM_LOCAL_PORT": "16917"}

    def call(verb):
        return subprocess.run([script, verb], env=environment, capture_output=True, text=True, check=False, timeout=100)

    before = submit._ask("scontrol", "ping")
    assert call("status").returncode == 1
    assert call("stop").stdout == "not running\n"
    try:
        first = call("start")
        assert first.returncode == 0, first.stdout + first.stderr
        assert call("start").stdout.startswith("runs already")
        assert call("status").returncode == 0
    finally:
        stopped = call("stop")
    assert stopped.stdout == "stopped\n"
    assert call("status").returncode == 1
    assert submit._ask("scontrol", "ping") == before  # the one that the other tests use is as it was


def test_without_an_answer_from_slurm_states_come_from_the_folders(home, straight):
    path = straight.path(straight.runs[0])
    before = (path / job.NOTE).read_bytes()
    job.note(path, launcher="slurm", job="999999_0")
    told = cli(home, "status", "straight", PATH="/nowhere")
    (path / job.NOTE).write_bytes(before)
    assert "2 runs: 2 finished" in told.stdout
    assert "SLURM cannot be asked from here" in told.stdout
