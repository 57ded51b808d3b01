"""A queue on this machine: so many slots, one run a slot.

submitit's own local executor starts everything at once, gives all runs the same GPU, takes 16 s to notice a killed worker
and leaves workers behind when its controller is killed. Here a slot has its own GPU or its share of the CPUs; an ended
worker is noticed at once (SIGCHLD); and a guardian process stops the workers of a controller that died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core import record
from slurm import guardian
from slurm.job import CANCELLED, Job, ending, note

CONTROLLER = "controller.json"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one run. `device` is its CUDA_VISIBLE_DEVICES, None on a machine without GPUs."""

    number: int
    device: str | None
    threads: int

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment of a run in this slot. A thread count the user has set stays."""
        found = dict(base)
        found.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.device is not None:
            found["CUDA_VISIBLE_DEVICES"] = self.device
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            found.pop(name, None)
        return found


def visible_gpus() -> list[str]:
    """The GPUs this process may use, without importing torch: CUDA_VISIBLE_DEVICES where set, else what nvidia-smi lists."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [d.strip() for d in given.split(",") if d.strip() and d.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.split() if done.returncode == 0 else []


def slots(count: int | None = None, *, threads: int = 1, gpus: Sequence[str] | None = None, cpus: int | None = None) -> list[Slot]:
    """The slots of this machine: one a GPU, or where there is none as many as the CPUs give with `threads` each.

    Args:
        count: another number of slots; more than GPUs share them in turn.
        threads: CPU threads a run, on a machine without GPUs.
        gpus, cpus: what is there; found out where not given.

    Raises:
        ValueError: if count or threads is below 1.
    """
    for name, value in (("slots", count), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    gpus = visible_gpus() if gpus is None else list(gpus)
    if cpus is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if gpus:
        count = count or len(gpus)
        return [Slot(i, gpus[i % len(gpus)], max(1, cpus // count)) for i in range(count)]
    return [Slot(i, None, threads) for i in range(count or max(1, cpus // threads))]


@dataclasses.dataclass
class _Worker:
    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    started: float


class LocalQueue:
    """Runs jobs in slots until all have ended. Use in the main thread; it handles signals.

    SIGTERM, SIGINT and SIGHUP are passed on: the runs stop at their next step with a checkpoint, nothing new starts. A
    second one, or `grace_s`, kills what is left.

    Args:
        folder: the sweep's folder; `controller.json` there says who runs it.
        jobs: in order.
        places: the slots.
        grace_s: how long a run that is asked to stop may take.
        show: called once a second and at every start and end, with the queue.
    """

    def __init__(
        self, folder: Path, jobs: Sequence[Job], places: Sequence[Slot], *, grace_s: float = 120.0,
        show: Callable[[LocalQueue], None] | None = None,
    ):  # fmt: skip
        if not places:
            raise ValueError("a queue needs at least one slot")
        self.folder, self.waiting, self.free, self.grace_s, self.show = folder, list(jobs), list(places), grace_s, show
        self.size = len(places)
        self.workers: dict[int, _Worker] = {}
        self.exits: dict[str, int] = {}
        self.signals: list[int] = []
        self.since = time.time()
        self._kill_at: float | None = None
        self._beat_at = 0.0
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def stopping(self) -> bool:
        return bool(self.signals)

    def run(self) -> dict[str, int]:
        """Work until nothing is left. Returns exit statuses by run folder; runs that never started have none."""
        for job in self.waiting:
            job.path.mkdir(parents=True, exist_ok=True)
            note(
                job.path,
                launcher="local",
                job="",
                command=list(job.command),
                submitted=self.since,
                started=None,
                ended=None,
                exit=None,
                message="",
            )
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        os.set_blocking(readable, False)
        before: dict[int, Any] = {s: signal.signal(s, self._asked) for s in _STOPPING}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it wakes the wait below
        wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        try:
            while self.workers or (self.waiting and not self.stopping):
                self._reap()
                self._guard()
                self._fill()
                self._press()
                self._beat()
                if self.workers:
                    select.select([readable], [], [], 1.0)
                    with contextlib.suppress(BlockingIOError):
                        os.read(readable, 4096)
        finally:
            for worker in self.workers.values():  # an error of ours: leave nobody behind
                self._kill(worker)
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(readable)
            os.close(writable)
            if self._keeper is not None and self._keeper.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._keeper.stdin.close()
                self._keeper.wait()
            self._beat("ended")
        return self.exits

    def _asked(self, signum: int, frame: Any) -> None:
        self.signals.append(signum)

    def _guard(self) -> None:
        """See that there is a guardian, and that it knows every worker: one that was killed is replaced."""
        if self._keeper is not None and self._keeper.poll() is None:
            return
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(self.grace_s)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        for pid in self.workers:
            self._tell(b"+%d\n" % pid)

    def _tell(self, line: bytes) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        os.write(self._keeper.stdin.fileno(), line)

    def _fill(self) -> None:
        while self.free and self.waiting and not self.stopping:
            job = self.waiting.pop(0)
            if (job.path / CANCELLED).exists():
                note(job.path, ended=time.time(), exit=record.EXIT_STOPPED, message="cancelled before it started")
                self.exits[job.run] = record.EXIT_STOPPED
                continue
            slot = self.free.pop(0)
            place = f"slot {slot.number}" + (f" (GPU {slot.device})" if slot.device is not None else "")
            now = time.time()
            try:
                process = job.start(
                    slot.environment({**os.environ, **job.environment}),
                    place,
                    process_group=0,
                    preexec_fn=self._announced,
                )
            except OSError as error:
                self.free.insert(0, slot)
                note(job.path, started=now, ended=now, exit=1, message=f"did not start: {error}")
                self.exits[job.run] = 1
                continue
            note(job.path, started=now, pid=process.pid, host=socket.gethostname(), slot=slot.number)
            self.workers[process.pid] = _Worker(job, slot, process, now)
            self._shown()

    def _announced(self) -> None:
        """In the new process, before it becomes the run: tell the guardian, so that there is no moment without one."""
        self._tell(b"+%d\n" % os.getpid())

    def _reap(self) -> None:
        for pid, worker in list(self.workers.items()):
            code = worker.process.poll()
            if code is None:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # data loaders and the like that outlived their run
            with contextlib.suppress(OSError):
                self._tell(b"-%d\n" % pid)
            del self.workers[pid]
            self.free.append(worker.slot)
            self.free.sort(key=lambda s: s.number)
            self.exits[worker.job.run] = code
            with contextlib.suppress(OSError):  # a full disk must not end the queue
                worker.job.settle(pid, code)
            self._shown()

    def _press(self) -> None:
        """Pass a signal on, and kill what does not stop."""
        if not self.stopping:
            return
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self.grace_s
            for worker in self.workers.values():
                worker.process.send_signal(signal.SIGTERM)  # to the run alone: its data loaders end with it
            self._shown()
        if len(self.signals) > 1 or time.monotonic() > self._kill_at:
            for worker in self.workers.values():
                self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)

    def _beat(self, state: str = "running") -> None:
        if state == "running" and time.monotonic() - self._beat_at < record.HEARTBEAT_S / 2:
            return
        self._beat_at = time.monotonic()
        with contextlib.suppress(OSError):
            record.write_json(self.folder / CONTROLLER, {
                "state": state, "pid": os.getpid(), "host": socket.gethostname(), "since": self.since, "updated": time.time(), "slots": self.size,
            })  # fmt: skip
        self._shown()

    def _shown(self) -> None:
        if self.show is not None:
            self.show(self)

    def summary(self) -> str:
        """One line on how the queue stands."""
        bad = [code for code in self.exits.values() if code not in (0, record.EXIT_STOPPED)]
        done = sum(code == 0 for code in self.exits.values())
        said = f"{done} done, {len(self.workers)} running, {len(self.waiting)} waiting"
        return said + (f", {len(bad)} failed ({ending(bad[-1])})" if bad else "") + (", stopping" if self.stopping else "")


def controller(folder: Path) -> dict[str, Any]:
    """Who runs a sweep on a machine's slots, with `alive`; {} where nobody ever did."""
    found = record.read_json(folder / CONTROLLER)
    if not found:
        return {}
    shadow = record.Status("running", pid=found.get("pid", 0), host=found.get("host", ""), updated=found.get("updated", 0.0))
    return {**found, "alive": found.get("state") == "running" and not shadow.lost}
