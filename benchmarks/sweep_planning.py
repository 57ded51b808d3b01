"""What a sweep costs: planning 1,000 runs, the local queue's overhead a job, and how soon a killed worker is noticed.

    python benchmarks/sweep_planning.py

Limits: 2 s of CPU for planning (the command from start to end, without importing torch), 0.3 s a job, 5 s. submitit's own
local executor, measured in the same process on the same job, is the peer of the last two.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import submitit

from slurm.job import Job
from slurm.local_queue import LocalQueue, slots

PLANNING_S, JOB_S, NOTICE_S = 2.0, 0.3, 5.0
JOBS, REPEATS = 20, 3
GRID = ["sdtps.TokenSparse.sparse_ratio=0.05..0.5..0.05", "optim.AdamW.weight_decay=0.01..0.1..0.01", "SEED=0..9"]


def planning(folder: Path) -> tuple[float, float]:
    """CPU seconds of a dry run of 1,000 runs of the main job, and of starting Python alone."""
    code = "import sys; from repro.cli import verb; done = verb('sweep'); assert 'torch' not in sys.modules; raise SystemExit(done)"
    argv = [
        "--gin",
        "gin/sdtps_rgbnt.gin",
        *(word for axis in GRID for word in ("--grid", axis)),
        "--runs",
        str(folder),
        "--dry-run",
    ]
    best = [float("inf"), float("inf")]
    for _ in range(REPEATS):
        for position, command in enumerate([[sys.executable, "-c", code, *argv], [sys.executable, "-c", "pass"]]):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best[position] = min(best[position], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert position or "1000 to do" in done.stdout, done.stdout[-300:]
    return best[0], best[1]


def overhead(folder: Path) -> float:
    """Seconds a job of nothing, one slot, the start of its own process included."""
    best = float("inf")
    for attempt in range(REPEATS):
        jobs = [Job(str(folder / f"{attempt}-{i}"), ("/bin/true",), str(folder), {}) for i in range(JOBS)]
        began = time.perf_counter()
        assert set(LocalQueue(folder, jobs, slots(1)).run().values()) == {0}
        best = min(best, (time.perf_counter() - began) / JOBS)
    return best


def peer_round_trip(folder: Path) -> float:
    """Seconds of one such job through submitit's local executor, submission to result."""
    executor = submitit.LocalExecutor(folder / "submitit")
    executor.update_parameters(timeout_min=1)
    began = time.perf_counter()
    executor.submit(os.getpid).result()
    return time.perf_counter() - began


def notice(folder: Path) -> float:
    """Seconds from SIGKILL of a worker to the queue's word on it."""
    worst = 0.0
    for attempt in range(REPEATS):
        job = Job(str(folder / f"killed-{attempt}"), ("/bin/sleep", "60"), str(folder), {})
        at: dict[str, float] = {}

        def show(queue: LocalQueue, at: dict[str, float] = at) -> None:
            if queue.exits:
                at.setdefault("noticed", time.perf_counter())
            elif queue.workers and "armed" not in at:
                at["armed"] = 1.0
                pid = next(iter(queue.workers))

                def kill() -> None:
                    at["killed"] = time.perf_counter()
                    os.kill(pid, signal.SIGKILL)

                threading.Timer(0.4, kill).start()

        LocalQueue(folder, [job], slots(1), show=show).run()
        worst = max(worst, at["noticed"] - at["killed"])
    return worst


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan, bare = planning(folder / "runs")
        job, noticed, peer = overhead(folder), notice(folder), peer_round_trip(folder)
    print(f"planning 1,000 runs: {plan:.2f} s of CPU (Python alone {bare:.2f} s), limit {PLANNING_S} s, torch not imported")
    print(
        f"queue: {job * 1000:.0f} ms a job, limit {JOB_S * 1000:.0f} ms; submitit's local executor {peer:.2f} s a job: {job / peer:.3f}x"
    )
    print(f"killed worker noticed after {noticed * 1000:.0f} ms at worst of {REPEATS}, limit {NOTICE_S:g} s")
    return int(plan > PLANNING_S or job > JOB_S or noticed > NOTICE_S)


if __name__ == "__main__":
    raise SystemExit(main())
