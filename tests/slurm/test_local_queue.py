"""The queue of one machine: slots, killed workers, a killed controller, signals. All processes are real."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from core import record
from slurm.job import CANCELLED, Job, read
from slurm.local_queue import LocalQueue, Slot, controller, slots

# A worker with a run folder and a heartbeat, as a run has, that stops with a checkpoint's exit status when asked to.
WORKER = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from core import record

    asked = []
    if "stubborn" not in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    child = subprocess.Popen(["sleep", "300"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    with record.RunFolder(folder, chatty=False) as run:
        until = time.monotonic() + float(sys.argv[2])
        while time.monotonic() < until:
            time.sleep(0.02)
            if asked:
                child.kill()
                child.wait()
                run.say(state="stopped", message="asked")
                os._exit(75)
        run.say(state="finished")
    child.kill()
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(WORKER))
    here = str(Path(__file__).parents[2])

    def make(name, seconds, *words):
        folder = tmp_path / name
        folder.mkdir()
        return Job(str(folder), (sys.executable, str(path), str(folder), str(seconds), *words), here, {"PYTHONPATH": here})

    return make


def shell(folder, name, text):
    return Job(str(folder / name), ("/bin/sh", "-c", text), str(folder), {})


def pids(job, within=20.0):
    """The worker's process and its child, once they are there."""
    return [int(p) for p in wait_for(lambda: (job.path / "pids").read_text().split() or None, within)]


def wait_for(look, within=20.0):
    until = time.monotonic() + within
    while True:
        with contextlib.suppress(OSError):
            found = look()
            if found:
                return found
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def alive(pid):
    return record._alive(pid)


def test_no_more_runs_than_slots_and_none_left_out(tmp_path):
    jobs = [
        shell(tmp_path, f"r{i}", f"date +%s%N > {tmp_path}/r{i}/began; sleep 0.3; date +%s%N > {tmp_path}/r{i}/ended")
        for i in range(6)
    ]
    exits = LocalQueue(tmp_path, jobs, slots(2)).run()
    assert exits == {j.run: 0 for j in jobs}
    spans = [(int((j.path / "began").read_text()), int((j.path / "ended").read_text())) for j in jobs]
    overlaps = [sum(b <= moment < e for b, e in spans) for moment, _ in spans]
    assert max(overlaps) == 2
    assert all(read(j.path)["exit"] == 0 for j in jobs)


def test_each_slot_has_its_own_gpu_or_its_share_of_the_cpus(tmp_path):
    places = slots(gpus=["3", "5"], cpus=8)
    assert places == [Slot(0, "3", 4), Slot(1, "5", 4)]
    text = 'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS" > {0}/r{1}/seen; sleep 0.2'
    jobs = [shell(tmp_path, f"r{i}", text.format(tmp_path, i)) for i in range(2)]
    before = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        LocalQueue(tmp_path, jobs, places).run()
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    assert sorted((j.path / "seen").read_text() for j in jobs) == ["3 4\n", "5 4\n"]
    assert [s.device for s in slots(3, gpus=["0", "1"], cpus=6)] == ["0", "1", "0"]
    assert slots(gpus=[], cpus=8, threads=2) == [Slot(i, None, 2) for i in range(4)]
    with pytest.raises(ValueError, match="slots must be at least 1"):
        slots(0)


def test_a_killed_worker_is_noticed_at_once_and_the_others_go_on(tmp_path, worker):
    victim, other = worker("victim", 300), worker("other", 1.0)
    seen = {}

    def show(queue):
        if victim.run in queue.exits:
            seen.setdefault("noticed", time.monotonic())

    def kill():
        seen["killed"] = time.monotonic()
        os.kill(pids(victim)[0], signal.SIGKILL)

    threading.Thread(target=lambda: (wait_for(lambda: record.status(victim.path)), kill()), daemon=True).start()
    exits = LocalQueue(tmp_path, [victim, other], slots(2), show=show).run()
    assert exits == {victim.run: -signal.SIGKILL, other.run: 0}
    assert seen["noticed"] - seen["killed"] < 5.0
    assert record.status(victim.path).state == "failed"
    assert record.status(victim.path).message == "killed by SIGKILL"
    assert not alive(pids(victim)[1]), "its child process was left behind"


CONTROLLER = """
    import json, sys
    from pathlib import Path
    from slurm.job import Job
    from slurm.local_queue import LocalQueue, slots
    given = json.loads(sys.argv[1])
    jobs = [Job(run, tuple(command), cwd, environment) for run, command, cwd, environment in given["jobs"]]
    exits = LocalQueue(Path(given["folder"]), jobs, slots(2), grace_s=given["grace"]).run()
    print(json.dumps(exits))
"""


def control(folder, jobs, grace=20.0):
    given = {"folder": str(folder), "grace": grace, "jobs": [[j.run, list(j.command), j.cwd, j.environment] for j in jobs]}
    here = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CONTROLLER), json.dumps(given)],
        cwd=here, env={**os.environ, "PYTHONPATH": here}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_controller_leaves_no_orphan(tmp_path, worker):
    jobs = [worker("a", 300), worker("b", 300, "stubborn"), worker("c", 300)]
    keeper = control(tmp_path, jobs, grace=2.0)
    everyone = pids(jobs[0]) + pids(jobs[1])
    wait_for(lambda: all(record.status(j.path) for j in jobs[:2]))
    assert controller(tmp_path)["alive"]
    keeper.kill()
    keeper.wait()
    wait_for(lambda: not any(map(alive, everyone)), within=15)
    assert record.status(jobs[0].path).state == "stopped"  # it was asked first, and wrote what it had
    assert record.status(jobs[1].path).lost  # it did not listen
    assert not (jobs[2].path / "pids").exists()
    assert not controller(tmp_path)["alive"]


def guardian_of(controller):
    """The guardian among a controller's children."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == controller.pid and b"guardian.py" in (path / "cmdline").read_bytes():
                return int(path.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds the guardian in /proc")
def test_a_killed_guardian_is_replaced_and_the_new_one_knows_everybody(tmp_path, worker):
    jobs = [worker("a", 300), worker("b", 1.0), worker("c", 300)]
    keeper = control(tmp_path, jobs, grace=2.0)
    everyone = pids(jobs[0])
    wait_for(lambda: record.status(jobs[0].path))
    first = wait_for(lambda: guardian_of(keeper))
    os.kill(first, signal.SIGKILL)
    second = wait_for(lambda: (found := guardian_of(keeper)) != first and found)
    everyone += pids(jobs[2])  # b has ended and c begun, under the new one
    assert read(jobs[1].path)["exit"] == 0
    assert second
    wait_for(lambda: record.status(jobs[2].path))
    keeper.kill()
    keeper.wait()
    wait_for(lambda: not any(map(alive, everyone)), within=15)
    assert record.status(jobs[0].path).state == record.status(jobs[2].path).state == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_controller_is_passed_on_and_nothing_new_starts(tmp_path, worker, number):
    jobs = [worker(name, 300) for name in "abc"]
    keeper = control(tmp_path, jobs)
    wait_for(lambda: all(record.status(j.path) for j in jobs[:2]))
    keeper.send_signal(number)
    exits = json.loads(keeper.communicate(timeout=30)[0])
    assert exits == {jobs[0].run: record.EXIT_STOPPED, jobs[1].run: record.EXIT_STOPPED}
    assert [record.status(j.path).state for j in jobs[:2]] == ["stopped", "stopped"]
    assert record.status(jobs[2].path) is None
    assert not any(map(alive, pids(jobs[0]) + pids(jobs[1])))


def test_a_second_signal_or_the_end_of_grace_kills_what_does_not_stop(tmp_path, worker):
    hard, timed = worker("hard", 300, "stubborn"), worker("timed", 300, "stubborn")
    keeper = control(tmp_path, [hard])
    wait_for(lambda: record.status(hard.path))
    keeper.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    keeper.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert json.loads(keeper.communicate(timeout=30)[0]) == {hard.run: -signal.SIGKILL}
    assert time.monotonic() - began < 10  # not the 20 s of grace
    keeper = control(tmp_path, [timed], grace=0.5)
    wait_for(lambda: record.status(timed.path))
    keeper.send_signal(signal.SIGTERM)
    assert json.loads(keeper.communicate(timeout=30)[0]) == {timed.run: -signal.SIGKILL}


def test_a_command_that_does_not_exist_ends_its_run_alone(tmp_path):
    bad, good = Job(str(tmp_path / "bad"), ("/no/such/program",), str(tmp_path), {}), shell(tmp_path, "good", "exit 0")
    assert LocalQueue(tmp_path, [bad, good], slots(1)).run() == {bad.run: 1, good.run: 0}
    assert "/no/such/program does not exist" in read(bad.path)["message"]


def test_how_a_run_ended_is_noted_and_its_words_are_in_its_log(tmp_path):
    jobs = [shell(tmp_path, "a", "echo spoken; echo complained >&2; exit 3"), shell(tmp_path, "b", "kill -SEGV $$")]
    assert LocalQueue(tmp_path, jobs, slots(2)).run() == {jobs[0].run: 3, jobs[1].run: -11}
    assert (read(jobs[0].path)["exit"], read(jobs[0].path)["message"]) == (3, "exit status 3")
    assert (read(jobs[1].path)["exit"], read(jobs[1].path)["message"]) == (-11, "killed by SIGSEGV")
    said = (jobs[0].path / "job.log").read_text()
    assert "spoken\n" in said
    assert "complained\n" in said
    assert "slot 0" in said


def test_a_run_cancelled_before_its_turn_does_not_start(tmp_path):
    first = shell(tmp_path, "first", f"touch {tmp_path}/second/{CANCELLED}")
    second = shell(tmp_path, "second", f"touch {tmp_path}/second/started")
    exits = LocalQueue(tmp_path, [first, second], slots(1)).run()
    assert exits[second.run] == record.EXIT_STOPPED
    assert not (second.path / "started").exists()


def test_the_queue_costs_a_job_less_than_three_tenths_of_a_second(tmp_path):
    jobs = [shell(tmp_path, f"r{i}", ":") for i in range(20)]
    began = time.perf_counter()
    LocalQueue(tmp_path, jobs, slots(1)).run()
    assert (time.perf_counter() - began) / len(jobs) < 0.3
