"""The run folder: one folder a run, and the only place that a number in a document may come from.

config.gin        what was asked (canonical, checked)      operative.gin    what ran, defaults included
run.json          commit, versions, hardware, seed, data   diff.patch       uncommitted changes, if any
status.json       state, step, heartbeat: what launchers and `repro status` read
metrics.jsonl     one line a step and one an evaluation; a function of the config alone, so two runs can be compared
timing.jsonl      seconds and rates: the part that differs from run to run
events…           TensorBoard                              checkpoints/     see core.checkpoint
profile.json      FLOPs, parameters, latency               result.json      final, best and first metrics
pictures/         what the task drew                       log.txt          everything that was printed
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# What a run writes into its folder: no more than this is cleared without being asked.
WRITTEN = (
    "config.gin", "operative.gin", "run.json", "diff*.patch", "metrics.jsonl", "timing.jsonl", "data.json", "result.json", "profile.json",
    "log.txt", "events.out.tfevents*", "checkpoints", "pictures",
)  # fmt: skip
STATES = ("running", "finished", "failed", "stopped")
HEARTBEAT_S = 2.0
LOST_AFTER_S = 15.0
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with a checkpoint written; the same command goes on

_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "WORLD_SIZE", "RANK", "LOCAL_RANK",
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG",
)  # fmt: skip


class Signals:
    """While active, SIGTERM, SIGUSR1 and SIGUSR2 only set a flag; the loop looks at it at step boundaries.

    One inside another begins with what that one has received.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
                outer = getattr(self._before[number], "__self__", None)
                if isinstance(outer, Signals):
                    self.received = self.received or outer.received
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: Any) -> None:
        self.received = self.received or signum


class RunBusy(RuntimeError):
    """Another process holds this run folder; the message says which, where and since when."""


def _clean(value: Any) -> Any:
    """JSON without NaN and infinities (they become null, and a report shows a gap)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_clean(value), ensure_ascii=False, indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old or the new file, never half of one."""
    write_text(path, dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong inside becomes an OSError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space and give the same command again" if full else "check the folder, then the same command again"
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}; {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never half of one.

    Raises:
        OSError: if it cannot be written; the message names the file and what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    with _writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines. A last line cut by a kill is dropped; so is any other that does not parse."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def seconds(path: Path) -> float | None:
    """What a finished run took, all its attempts together; None if its timing says too little."""
    total, last, ended = 0.0, 0.0, None
    for row in read_lines(path / "timing.jsonl"):
        if "total_s" in row:
            ended = float(row["total_s"])
        now = 0.0 if "attempt" in row else float(row.get("elapsed_s", last))
        if now < last:  # another attempt, its clock from the start
            total += last
        last = now
    return None if ended is None else total + ended


@dataclasses.dataclass(frozen=True)
class Status:
    """A run's own word on itself."""

    state: str
    step: int = 0
    steps: int = 0
    message: str = ""
    pid: int = 0
    host: str = ""
    since: float = 0.0
    updated: float = 0.0
    attempts: int = 1
    job: str = ""

    @property
    def lost(self) -> bool:
        """It says running, but its heart has stopped: the process was killed, or its machine died."""
        if self.state != "running":
            return False
        if self.host == socket.gethostname() and not _alive(self.pid):
            return True
        return time.time() - self.updated > LOST_AFTER_S


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] != "Z"
    return True


def status(folder: Path) -> Status | None:
    """The status of a run folder, None where it has none yet."""
    found = read_json(folder / "status.json")
    if "state" not in found:
        return None
    kinds: dict[str, Any] = {
        f.name: {"str": str, "int": int, "float": (int, float)}[str(f.type)] for f in dataclasses.fields(Status)
    }
    fitting = {k: v for k, v in found.items() if k in kinds and isinstance(v, kinds[k])}
    return Status(**fitting) if "state" in fitting else None


def environment() -> dict[str, Any]:
    """Versions, hardware and the few environment variables that bear on results (never the whole environment)."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("ginrepro", "einops", "gin-config", "numpy", "fvcore", "submitit", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": versions,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "variables": {k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
    }


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def provenance() -> tuple[dict[str, Any], str]:
    """Commit and state of the source tree, and the text of its uncommitted changes.

    Installed from a wheel, this file may lie inside somebody else's repository, whose commit would say nothing.
    """
    ours = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("rev-parse", "HEAD") if ours else None
    if commit is None:
        return {"commit": None, "clean": None}, ""
    diff = _git("diff", "HEAD") or ""
    untracked = [p for p in (_git("ls-files", "--others", "--exclude-standard") or "").splitlines() if p.endswith((".py", ".gin"))]
    return {"commit": commit.strip(), "clean": not diff and not untracked, "untracked": untracked[:50]}, diff


class RunFolder:
    """An open run folder. One process writes it; use it as a context manager.

    Args:
        path: the folder; made if it does not exist.
        writes: False on ranks other than 0, which then only read.

    Raises:
        RunBusy: if another process has it open.
    """

    def __init__(self, path: Path, *, writes: bool = True, chatty: bool = True):
        self.path, self.writes = path, writes
        self._lock = FileLock(str(path / ".lock")) if writes else None
        self._status: dict[str, Any] = {}
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._metrics: Any = None
        self._timing: Any = None
        self._board: Any = None
        self._mirror: Any = None
        self.chatty = chatty

    # --- opening and closing

    def __enter__(self) -> RunFolder:
        if not self.writes:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        before = status(self.path)
        assert self._lock is not None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = (
                f"pid {before.pid} on {before.host} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(before.since))}"
                if before
                else "another process"
            )
            raise RunBusy(f"{self.path} is in use by {holder}; wait for it, stop it, or give another --out") from None
        attempts = before.attempts + 1 if before and before.state != "finished" else 1
        now = time.time()
        self._status = {
            "state": "running", "step": before.step if before else 0, "steps": before.steps if before else 0, "message": "starting",
            "pid": os.getpid(), "host": socket.gethostname(), "since": now, "updated": now, "attempts": attempts,
            "job": os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "")),
        }  # fmt: skip
        write_json(self.path / "status.json", self._status)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.writes:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for handle in (self._metrics, self._timing, self._board):
            if handle is not None:
                with contextlib.suppress(OSError):  # a checkpoint counts on no more than `flush` brought to disk
                    handle.close()
        if self._mirror is not None:
            self._mirror.finish(exit_code=int(kind is not None))
        if self._status.get("state") == "running":
            self._status["state"] = "failed"
            self._status["message"] = f"{kind.__name__}: {error}" if kind else "ended without a result"
        self._status["updated"] = time.time()
        with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
            write_json(self.path / "status.json", self._status)
        assert self._lock is not None
        self._lock.release()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with self._mutex, contextlib.suppress(OSError):
                self._status["updated"] = time.time()
                write_json(self.path / "status.json", self._status)

    def say(self, **changes: Any) -> None:
        """Change fields of the status; on disk at the next heartbeat, at once where the state changes."""
        if not self.writes:
            return
        with self._mutex:
            self._status.update(changes)
            if "state" in changes:
                self._status["updated"] = time.time()
                write_json(self.path / "status.json", self._status)

    @property
    def attempts(self) -> int:
        return int(self._status.get("attempts", 1))

    # --- files

    def write(self, name: str, value: Any) -> None:
        """Write a file of the folder: text as it is, anything else as JSON."""
        if not self.writes:
            return
        if isinstance(value, str):
            write_text(self.path / name, value)
        else:
            write_json(self.path / name, value)

    def open_metrics(self, offset: int) -> None:
        """Go on with metrics.jsonl from a byte offset; what stood behind it (a lost part of an earlier try) is cut off."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        with _writing(path):
            path.touch()
        held = path.stat().st_size
        if held < offset:
            raise ValueError(
                f"{path} has {held} bytes, the checkpoint was written at {offset}: the file was changed; restore it or start over with --fresh"
            )
        with _writing(path):
            os.truncate(path, offset)
            self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed in __exit__
        with _writing(self.path / "timing.jsonl"):
            self._timing = open(self.path / "timing.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to metrics.jsonl. They hold nothing that depends on the clock or the machine."""
        if self._metrics is not None:
            with _writing(self.path / "metrics.jsonl"):
                self._metrics.write("".join(dumps(row) + "\n" for row in rows))

    def timing(self, row: Mapping[str, Any]) -> None:
        if self._timing is not None:
            with _writing(self.path / "timing.jsonl"):
                self._timing.write(dumps(row) + "\n")
                self._timing.flush()

    def flush(self) -> int:
        """Bring metrics.jsonl to disk; returns its length in bytes, which a checkpoint stores."""
        if self._metrics is None:
            return 0
        with _writing(self.path / "metrics.jsonl"):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        return int(self._metrics.tell())

    def mirror_to(self, project: str, config: Mapping[str, Any]) -> None:
        """Send scalars to Weights & Biases too, under the run folder's name (extra `wandb`; WANDB_MODE=offline keeps them here).

        Raises:
            ValueError: if wandb is not installed.
        """
        if not self.writes:
            return
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--wandb needs the package wandb; pip install 'ginrepro[wandb]'") from error
        self._mirror = wandb.init(
            project=project, dir=str(self.path), name=self.path.name, id=self.path.name, resume="allow", config=dict(config)
        )

    def board(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars to TensorBoard, and to Weights & Biases where asked for."""
        if not self.writes:
            return
        if self._mirror is not None:
            self._mirror.log(dict(values), step=step)
        with _writing(self.path / "events.out.tfevents…"):
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.path), purge_step=step)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def log(self, text: str) -> None:
        """A line for people: printed, and kept in log.txt."""
        if not self.writes:
            return
        if self.chatty:
            with unread():
                print(text)
        with contextlib.suppress(OSError), open(self.path / "log.txt", "a", encoding="utf-8") as handle:
            handle.write(text + "\n")


def nested(path: Path) -> Path | None:
    """A run folder below `path`, itself not counted; None if there is none."""
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            found = next(runs(entry), None)
            if found is not None:
                return found
    return None


def runs(root: Path) -> Iterator[Path]:
    """Run folders below `root` (a folder with a config.gin or a status.json), sorted by name."""
    if not root.is_dir():
        return
    entries = sorted(os.scandir(root), key=lambda e: e.name)
    names = {e.name for e in entries}
    if "status.json" in names or "config.gin" in names:
        yield root
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from runs(Path(entry.path))


def silence() -> None:
    """Send standard output nowhere from here on: its reader is gone, and what is in the buffer would fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Around what long work prints: a reader that goes away (`| head`) silences standard output and does not end the work."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
    except SystemExit as ended:  # what rich makes of it
        if not isinstance(ended.__context__, BrokenPipeError):
            raise


def interactive() -> bool:
    """Whether a person watches (a terminal, and not a log file)."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
