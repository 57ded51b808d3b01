"""A job under submitit's own job process, with signals and requeues; only `scontrol` is a script that notes its calls."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import submitit

from core import record
from slurm import submit
from slurm.job import CANCELLED, Job, ending, note, read

HERE = str(Path(__file__).parents[2])
# A run that stops with a checkpoint's exit status at SIGTERM, 0.3 s later; told to, it also stands a second SIGUSR2.
RUN = """
    import os, signal, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.append(1))
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "seen").write_text(" ".join(os.environ.get(n, "-") for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")))
    while not asked and not (folder / "go").exists():
        time.sleep(0.02)
    if (folder / "go").exists():
        sys.exit(int((folder / "go").read_text()))
    time.sleep(0.3)
    (folder / "checkpoint").touch()
    sys.exit(75)
"""


def wait_for(look, within=30.0):
    until = time.monotonic() + within
    while True:
        with contextlib.suppress(OSError):
            found = look()
            if found:
                return found
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


class Task:
    """A SLURM task as submitit starts it: `python -m submitit.core._submit FOLDER` in the environment sbatch gives."""

    def __init__(self, folder, *, limit=3, restarts=0, scontrol="exit 0", tasks=1, rank=0, stop_s=20.0):
        self.folder, self.run, self.jobs, self.bin = folder, folder / "run", folder / "jobs", folder / "bin"
        for path in (self.run, self.jobs, self.bin):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "run.py").write_text(textwrap.dedent(RUN))
        if scontrol is not None:
            (self.bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{scontrol}\n')
            (self.bin / "scontrol").chmod(0o755)
        self.job = Job(
            str(self.run),
            (sys.executable, str(folder / "run.py"), str(self.run)),
            HERE,
            {"PYTHONPATH": HERE},
            limit=limit,
            stop_s=stop_s,
        )
        delayed = submitit.core.utils.DelayedSubmission(self.job)
        delayed.set_timeout(1, limit + 1)
        delayed.dump(self.jobs / "77_3_submitted.pkl")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{self.bin}:/bin:/usr/bin" if scontrol is not None else str(self.bin), "PYTHONPATH": HERE, "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": "1", "SLURM_RESTART_COUNT": str(restarts),
        }  # fmt: skip

    def start(self):
        with open(self.folder / "out", "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "submitit.core._submit", str(self.jobs)],
                env=self.environment,
                cwd=HERE,
                stdout=out,
                stderr=out,
            )
        return self

    def running(self):
        self.child = int(wait_for(lambda: (self.run / "pid").read_text()))
        return self

    def signal(self, number):
        """To every process of the task, as SLURM does."""
        for pid in (self.child, self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self):
        self.process.wait(timeout=40)
        assert not record._alive(self.child) if hasattr(self, "child") else True
        return (self.folder / "out").read_text()


def test_a_time_limit_or_preemption_stops_the_run_and_requeues_it(tmp_path):
    task = Task(tmp_path).start().running()
    task.signal(signal.SIGUSR2)
    task.wait()
    assert (task.run / "checkpoint").exists()
    assert task.calls() == ["requeue 77_3"]
    found = read(task.run)
    assert (found["requeues"], found["limit"], found["ended"]) == (1, 3, None)
    again = pickle.loads((task.jobs / "77_3_submitted.pkl").read_bytes())
    assert again.function == task.job  # the requeued job is the same command line


@pytest.mark.parametrize("already", [False, True])
def test_a_run_that_comes_to_its_end_as_the_signal_arrives_is_not_requeued(tmp_path, already):
    task = Task(tmp_path)
    if not already:  # it ends in the grace time
        (tmp_path / "run.py").write_text(textwrap.dedent(RUN).replace("sys.exit(75)", "sys.exit(0)"))
    task.start().running()
    if already:  # its job has not ended yet
        os.kill(task.process.pid, signal.SIGSTOP)
        (task.run / "go").write_text("0")
        wait_for(lambda: "State:\tZ" in Path(f"/proc/{task.child}/status").read_text())
        os.kill(task.process.pid, signal.SIGUSR2)
        os.kill(task.process.pid, signal.SIGCONT)
    else:
        task.signal(signal.SIGUSR2)
    said = task.wait()
    assert task.process.returncode == 0, said
    assert task.calls() == []
    found = read(task.run)
    assert found["exit"] == 0
    assert found["ended"] is not None
    assert found["requeues"] == 0


def test_a_second_signal_while_the_first_is_handled_changes_nothing(tmp_path):
    task = Task(tmp_path).start().running()
    task.signal(signal.SIGUSR2)
    for _ in range(20):
        time.sleep(0.01)
        task.signal(signal.SIGUSR2)
        task.signal(signal.SIGTERM)
    assert task.wait().count("Caught signal SIGUSR2") <= 3  # of 21; one may come before the first is at work
    assert task.calls() == ["requeue 77_3"]


def test_sigterm_first_and_the_preemption_signal_a_moment_later_requeues(tmp_path):
    task = Task(tmp_path).start().running()
    task.signal(signal.SIGTERM)
    wait_for(lambda: read(task.run).get("exit") == record.EXIT_STOPPED)
    os.kill(task.process.pid, signal.SIGUSR2)
    task.wait()
    assert task.calls() == ["requeue 77_3"]
    assert read(task.run)["ended"] is None


def test_what_an_interrupted_write_left_behind_is_no_obstacle(tmp_path):
    task = Task(tmp_path)
    (task.jobs / "77_3_submitted.pkl.save_tmp").write_bytes(b"half")
    (task.jobs / "77_3_0_result.pkl.save_tmp").write_bytes(b"half")
    task.start().running().signal(signal.SIGUSR2)
    task.wait()
    assert task.calls() == ["requeue 77_3"]
    (task.run / "go").write_text("0")
    task.start()
    said = task.wait()
    assert "completed successfully" in said
    assert read(task.run)["exit"] == 0


def test_requeues_are_bounded_and_the_bound_is_said(tmp_path):
    task = Task(tmp_path, limit=2, restarts=2).start().running()
    task.signal(signal.SIGUSR2)
    task.wait()
    assert (task.run / "checkpoint").exists()
    assert task.calls() == []
    assert "requeued 2 times, the limit" in read(task.run)["message"]


@pytest.mark.parametrize(("scontrol", "said"), [(None, "no scontrol on the node"), ("exit 1", "requeue 1 of 3")])
def test_where_a_requeue_is_impossible_the_checkpoint_is_there_all_the_same(tmp_path, scontrol, said):
    task = Task(tmp_path, scontrol=scontrol).start().running()
    task.signal(signal.SIGUSR2)
    task.wait()
    assert task.process.returncode != 0
    assert (task.run / "checkpoint").exists()
    assert said in read(task.run)["message"]


def test_a_run_that_does_not_stop_is_killed_and_requeued(tmp_path):
    task = Task(tmp_path, stop_s=6.0)
    (tmp_path / "run.py").write_text(
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        "open(sys.argv[1] + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(300)\n"
    )
    task.start().running().signal(signal.SIGUSR2)
    task.wait()
    assert task.calls() == ["requeue 77_3"]


def test_a_failed_run_fails_its_job_and_its_log_is_named(tmp_path):
    task = Task(tmp_path).start().running()
    (task.run / "go").write_text("3")
    said = task.wait()
    assert task.process.returncode != 0
    assert "exit status 3; see" in said
    assert read(task.run)["message"] == "exit status 3"


def test_ranks_get_what_the_process_group_needs(tmp_path):
    seen = []
    for rank in (0, 1):
        task = Task(tmp_path / str(rank), tasks=2, rank=rank)
        (task.run / "go").write_text("0")
        task.start().wait()
        seen.append((task.run / "seen").read_text().split())
    assert [s[:3] for s in seen] == [["0", "2", "127.0.0.1"], ["1", "2", "127.0.0.1"]]
    assert seen[0][3] == seen[1][3]
    assert 20000 <= int(seen[0][3]) < 60000
    task = Task(tmp_path / "alone")
    (task.run / "go").write_text("0")
    task.start().wait()
    assert (task.run / "seen").read_text().split()[:2] == ["-", "-"]


def test_a_job_that_cannot_work_here_says_so_before_it_starts(tmp_path):
    task = Task(tmp_path, limit=1, restarts=2)
    task.environment.update(SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="")
    said = task.start().wait()
    assert "restarted 2 times, the limit is 1" in said
    assert "SLURM gave 2 GPUs" in said
    assert "none is visible" in said
    assert not (task.run / "pid").exists()
    assert "restarted 2 times" in read(task.run)["message"]


def test_a_cancelled_job_that_slurm_starts_again_does_not_run(tmp_path):
    task = Task(tmp_path)
    (task.run / CANCELLED).touch()
    task.start().wait()
    assert task.process.returncode == 0
    assert not (task.run / "pid").exists()


def test_the_profile_goes_to_every_finished_run_of_the_configuration(tmp_path):
    folders = [tmp_path / n for n in "abc"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "profile.json").write_text('{"macs": 7}')
    for folder in folders[:2]:
        (folder / "result.json").write_text("{}")
    Job(str(folders[1]), ("x",), ".", {}, (str(folders[0]),)).settle(1, 0)  # takes it over
    assert record.read_json(folders[1] / "profile.json") == {"macs": 7}
    Job(str(folders[0]), ("x",), ".", {}, tuple(map(str, folders[1:]))).settle(1, 0)  # hands it out, to finished runs only
    assert not (folders[2] / "profile.json").exists()


@pytest.mark.parametrize(
    ("code", "state"), [(-signal.SIGKILL, "failed"), (1, "failed"), (-signal.SIGTERM, "stopped"), (-signal.SIGUSR2, "stopped")]
)
def test_a_status_that_says_running_is_corrected_when_its_process_has_ended(tmp_path, code, state):
    child = subprocess.Popen(["true"])
    child.wait()
    with record.RunFolder(tmp_path, chatty=False) as run:
        own = {**run._status, "pid": child.pid}
    record.write_json(tmp_path / "status.json", {**own, "state": "running"})
    Job(str(tmp_path), ("true",), ".", {}).settle(child.pid, code)
    assert record.status(tmp_path).state == state
    assert record.status(tmp_path).message == ending(code)
    record.write_json(tmp_path / "status.json", {**own, "state": "running", "pid": os.getpid()})
    Job(str(tmp_path), ("true",), ".", {}).settle(child.pid, code)
    assert record.status(tmp_path).state == "running", "another process has the run now"


def test_a_job_is_strings_and_small(tmp_path):
    job = Job(str(tmp_path), ("python", "-m", "repro.run"), "/x", {"A": "b"}, ("/y",), 3, 30.0)
    job._child = object()
    again = pickle.loads(pickle.dumps(job))
    assert again == job
    assert again._child is None
    assert len(pickle.dumps(job)) < 1000


def test_a_signal_that_interrupts_a_note_may_write_its_own(tmp_path, monkeypatch):
    def requeue(*_):
        monkeypatch.undo()
        note(tmp_path, message="requeue 1 of 3")
        sys.exit(1)  # as submitit does

    monkeypatch.setattr(record, "write_json", lambda *_: signal.raise_signal(signal.SIGUSR2))
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit):
            note(tmp_path, ended=1)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert read(tmp_path) == {"message": "requeue 1 of 3"}


def test_notes_of_two_writers_are_both_kept(tmp_path):
    code = f"from slurm.job import note; from pathlib import Path\nfor i in range(100): note(Path({str(tmp_path)!r}), **{{f'b{{i}}': i}})"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
    mine = 0
    while other.poll() is None:
        note(tmp_path, **{f"a{mine}": mine})
        mine += 1
    assert other.returncode == 0
    assert len(read(tmp_path)) == mine + 100


def test_the_job_folder_is_ours_alone(tmp_path):
    assert submit.job_folder(tmp_path / "jobs").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o777)
    assert submit.job_folder(tmp_path / "open").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(submit.SlurmError, match="is not a folder"):
        submit.job_folder(tmp_path / "link")
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        with pytest.raises(submit.SlurmError, match="belongs to user 65534, not to you"):
            submit.job_folder(tmp_path / "theirs")
