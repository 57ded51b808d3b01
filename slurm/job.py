"""One run of a sweep as a job: a command line, the run folder it works in, and what a launcher notes there.

A job is submitted as strings only. Whether its run is done is the run's own word (status.json); `job.json` beside it says
what the launcher knows: which job, since when, how it ended, how often it was requeued.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from core import record

LOG, NOTE, CANCELLED = "job.log", "job.json", "cancelled"
ENVIRONMENT = (
    "PYTHONPATH", "PYTHONHASHSEED", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "REPRO_TRACEBACK",
)  # fmt: skip
LEAST_DISK_BYTES = 200 * 2**20
_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def read(run: Path) -> dict[str, Any]:
    """What the launcher noted about a run; {} where it never saw it."""
    return record.read_json(run / NOTE)


def note(run: Path, **changes: Any) -> None:
    """Change the launcher's note. The submitter and the job may do so at the same time, and a signal's handler inside of it."""
    with FileLock(str(run / ".job.lock"), timeout=30, is_singleton=True):
        record.write_json(run / NOTE, {**read(run), **changes})


@dataclasses.dataclass
class Job:
    """One run to do.

    Args:
        run: the run folder, absolute.
        command: the command line.
        cwd: where it runs.
        environment: variables it needs, beside what the launcher's own environment holds.
        siblings: run folders of the same configuration under other seeds; they share one FLOP profile.
        limit: how often it may be requeued.
        stop_s: on SLURM, seconds from the signal to the end of the job.
    """

    run: str
    command: tuple[str, ...]
    cwd: str
    environment: dict[str, str]
    siblings: tuple[str, ...] = ()
    limit: int = 0
    stop_s: float = 30.0
    _child: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def path(self) -> Path:
        return Path(self.run)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    # --- what both launchers do

    def start(self, environment: Mapping[str, str], label: str, log: str = LOG, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command with its output appended to the run's log."""
        if shutil.which(self.command[0]) is None:
            raise FileNotFoundError(f"{self.command[0]} does not exist or cannot be executed on {socket.gethostname()}")
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / log, "ab") as output:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            output.write(f"--- {when}  {label} on {socket.gethostname()}: {shlex.join(self.command)}\n".encode())
            output.flush()
            return subprocess.Popen(
                list(self.command),
                cwd=self.cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                **options,
            )

    def settle(self, pid: int, code: int) -> None:
        """After the process has ended: note how, correct a status that still says running, share the FLOP profile."""
        said = ending(code)
        own = record.status(self.path)
        if own is not None and own.state == "running" and own.pid == pid and own.host == socket.gethostname():
            asked = code in (record.EXIT_STOPPED, *(-s for s in _ASKED_TO_STOP))
            found = record.read_json(self.path / "status.json")
            found.update(state="stopped" if asked else "failed", message=said, updated=time.time())
            with contextlib.suppress(OSError):
                record.write_json(self.path / "status.json", found)
        note(self.path, ended=time.time(), exit=code, message=said)
        if code == 0:
            self._share_profile()

    def _share_profile(self) -> None:
        folders = [self.path, *map(Path, self.siblings)]
        source = next((f / "profile.json" for f in folders if (f / "profile.json").is_file()), None)
        if source is None:
            return
        for folder in folders:
            if (folder / "result.json").is_file() and not (folder / "profile.json").is_file():
                with contextlib.suppress(OSError):
                    record.write_json(folder / "profile.json", record.read_json(source))

    # --- on SLURM, called by submitit

    def __call__(self) -> str:
        """Run to the end inside a SLURM task. Returns the state; a run that fails raises, so SLURM shows it as failed."""
        import submitit

        place = submitit.JobEnvironment()
        rank, restarts = place.global_rank, _restarts()
        if rank == 0:
            if (self.path / CANCELLED).exists():
                note(self.path, ended=time.time(), exit=record.EXIT_STOPPED, message="cancelled before it started")
                return "cancelled"
            note(
                self.path,
                job=place.job_id,
                host=socket.gethostname(),
                started=time.time(),
                requeues=restarts,
                limit=self.limit,
                ended=None,
            )
            problems = self._preflight(restarts)
            if problems:
                note(self.path, ended=time.time(), exit=1, message="; ".join(problems))
                raise RuntimeError("; ".join(problems))
        _drop_stale(place.paths.result_pickle)
        environment = {**os.environ, **self.environment}
        environment.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        if place.num_tasks > 1:
            environment.update(rendezvous(place, restarts))
        label = f"SLURM job {place.job_id}" + (f" rank {rank}" if rank else "") + (f", requeue {restarts}" if restarts else "")
        self._child = child = self.start(environment, label, LOG if rank == 0 else f"job.rank{rank}.log")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # holds no lock: submitit's signal handler may wait for it too
        code = child.wait()
        if rank == 0:
            self.settle(child.pid, code)
        if code == record.EXIT_STOPPED or -code in _ASKED_TO_STOP:
            # The run got its signal before this process did: a requeue follows at once, or nobody wants one.
            time.sleep(min(10.0, self.stop_s / 2))
        if code not in (0, record.EXIT_STOPPED):
            raise RuntimeError(f"{shlex.join(self.command)}: {ending(code)}; see {self.path / LOG}")
        return "finished" if code == 0 else "stopped"

    def checkpoint(self) -> Any:
        """Called by submitit when the time limit nears or the job is preempted: stop the run at its next step, then requeue.

        Returns None, which means no requeue, when the limit is reached.

        Raises:
            SystemExit: with status 0, if the run came to its end while the signal was on its way: nothing is left to requeue.
        """
        import submitit

        for number in (*_ASKED_TO_STOP, signal.SIGCONT):  # one is enough: a second one must not break the first's work
            signal.signal(number, signal.SIG_IGN)
        if self._stop_child(time.monotonic() + max(1.0, self.stop_s - 5.0)) == 0:
            raise SystemExit(0)
        restarts = _restarts()
        if restarts >= self.limit:
            note(self.path, message=f"requeued {restarts} times, the limit; `repro sweep --resume` goes on")
            return None
        if shutil.which("scontrol") is None:
            note(self.path, message="no scontrol on the node, so it cannot requeue itself; `repro sweep --resume` goes on")
            return None
        note(self.path, requeues=restarts + 1, limit=self.limit, ended=None, message=f"requeue {restarts + 1} of {self.limit}")
        place = submitit.JobEnvironment()
        _drop_stale(place.paths.submitted_pickle)
        return submitit.helpers.DelayedSubmission(self)

    def _stop_child(self, until: float) -> int | None:
        """Ask the run to stop, and kill it if it has not by then. Returns how it ended, None if it cannot be known."""
        child = self._child
        if child is None:
            return None
        code: int | None = child.returncode
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            ended, options = None, os.WEXITED | os.WNOWAIT | os.WNOHANG
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitid(os.P_PID, child.pid, options)) is None and time.monotonic() < until:
                    time.sleep(0.05)
                if ended is None:
                    os.kill(child.pid, signal.SIGKILL)
                    ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            if ended is not None:
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        if code is not None:
            self.settle(child.pid, code)
        return code

    def _preflight(self, restarts: int) -> list[str]:
        """What would make this job fail here, said before it starts."""
        problems = []
        if restarts > self.limit:
            problems.append(f"restarted {restarts} times, the limit is {self.limit}; `repro sweep --resume` goes on")
        if not os.access(self.path, os.W_OK):
            problems.append(f"{self.path} cannot be written on {socket.gethostname()}; is it on a shared file system?")
        elif (free := shutil.disk_usage(self.path).free) < LEAST_DISK_BYTES:
            problems.append(f"only {free / 2**20:.0f} MiB are free in {self.path}; want {LEAST_DISK_BYTES / 2**20:.0f}")
        wanted, given = os.environ.get("SLURM_GPUS_ON_NODE", ""), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if wanted.isdigit() and int(wanted) > 0 and not given.strip():
            problems.append(
                f"SLURM gave {wanted} GPUs on {socket.gethostname()} and none is visible (CUDA_VISIBLE_DEVICES is {given!r})"
            )
        if shutil.which("scontrol") is None:
            print("warning: no scontrol on this node: the job cannot requeue itself", file=sys.stderr)
        return problems


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code == 0:
        return ""
    if code == record.EXIT_STOPPED:
        return "stopped with a checkpoint"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def rendezvous(place: Any, restarts: int = 0) -> dict[str, str]:
    """What core.distributed reads, from submitit's view of a job with several tasks."""
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    address = "127.0.0.1" if place.num_nodes == 1 else found.master_addr
    return {
        "MASTER_ADDR": address, "MASTER_PORT": str(20000 + (found.master_port + 7 * restarts) % 40000), "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size), "LOCAL_RANK": str(found.local_rank), "LOCAL_WORLD_SIZE": str(found.local_world_size),
    }  # fmt: skip


def _restarts() -> int:
    """How often SLURM has started this job again, for whatever reason."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)


def _drop_stale(path: Path) -> None:
    """Remove what an interrupted write of submitit left behind; it refuses to write while that exists."""
    path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
