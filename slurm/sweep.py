"""A sweep: which runs it is made of, where they are, how each stands, and what they will cost.

A sweep has a folder RUNS/sweeps/NAME; its runs are ordinary run folders in RUNS, named by file and hash as `repro run` names
them, so a run that is done is found whoever did it.

sweep.json         the runs, each with file and overrides       base/STEM.gin   each config as it was when the sweep was planned
controller.json    who runs it on this machine, and since when  jobs/           submitit's files and the sbatch script (SLURM)
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core import config as configs
from core import record
from slurm import grid, job, local_queue, submit

SEED = f"{configs.TRAIN}.seed"
STEPS = f"{configs.TRAIN}.steps"
FILE = "sweep.json"
STATES = {
    "finished": "done",
    "running": "at work",
    "queued": "handed to the launcher, not started",
    "stopping": "stopped with a checkpoint; its job has not ended, and may be requeued",
    "requeued": "stopped with a checkpoint, SLURM starts it again",
    "waiting": "never started",
    "stopped": "stopped between steps, what was trained is kept; --resume goes on",
    "cancelled": "cancelled before it started; --resume takes it up",
    "failed": "ended with an error; its message and job.log say which",
    "lost": "its process or machine died without a word; --resume goes on",
}  # fmt: skip
ACTIVE = ("running", "queued", "stopping", "requeued")
FAILED = ("failed", "lost")
_MOST_PROBLEMS = 12


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep. `cells` is what the table shows of it; runs of one `configuration` differ in the seed alone."""

    name: str
    gin: str
    overrides: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    configuration: int


@dataclasses.dataclass
class Sweep:
    """A planned sweep. `texts` has the canonical text of each gin file."""

    folder: Path
    overrides: tuple[str, ...]
    runs: list[Run]
    texts: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    merged: list[str] = dataclasses.field(default_factory=list)
    effective: list[dict[str, str]] = dataclasses.field(default_factory=list, repr=False)
    allow_imports: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def root(self) -> Path:
        """Where the run folders are."""
        return self.folder.parent.parent

    @property
    def files(self) -> list[str]:
        """The gin files that its runs come from."""
        return list(dict.fromkeys(run.gin for run in self.runs))

    def base(self, gin: str) -> Path:
        """A gin file as it was when the sweep was planned."""
        return self.folder / "base" / f"{_stem(gin)}.gin"

    def path(self, run: Run) -> Path:
        return self.root / run.name

    def settle_effective(self) -> None:
        """The effective bindings of every run, for a sweep read from its folder."""
        drafts = {gin: configs.draft(str(self.base(gin)), allow_imports=self.allow_imports) for gin in self.files}
        self.effective = [drafts[run.gin].config(run.overrides).effective() for run in self.runs]

    def columns(self) -> list[str]:
        """Names of what varies, in order."""
        return list(dict.fromkeys(name for run in self.runs for name, _ in run.cells))

    def write(self) -> None:
        """Put the sweep on disk.

        Raises:
            OSError: if the folder cannot be written.
            ValueError: if the folder holds a sweep of other runs.
        """
        before = record.read_json(self.folder / FILE)
        if before and [r["name"] for r in before["runs"]] != [r.name for r in self.runs]:
            raise ValueError(
                f"{self.folder} holds another sweep ({len(before['runs'])} runs of {before['runs'][0]['gin']}); give another --name"
            )
        try:
            (self.folder / "base").mkdir(parents=True, exist_ok=True)
            if not before:
                asked = "".join(f"  --set {o}" for o in self.overrides)
                for gin, text in self.texts.items():
                    said = f"# {gin}{asked}\n# as it was on {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
                    self.base(gin).write_text(said + text, encoding="utf-8")
            record.write_json(self.folder / FILE, {
                "overrides": self.overrides, "cwd": before.get("cwd", os.getcwd()), "made": before.get("made", time.time()),
                "runs": [dataclasses.asdict(r) for r in self.runs], "allow_imports": self.allow_imports,
            })  # fmt: skip
        except OSError as error:
            raise OSError(f"{self.folder} cannot be written: {error.strerror or error}; give another --runs") from None


def read(folder: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        ValueError: if there is none, or one that cannot be read.
    """
    found = record.read_json(folder / FILE)
    if "runs" not in found:
        raise ValueError(f"{folder} is not a sweep (no {FILE} in it that can be read)")
    try:
        runs = [
            Run(r["name"], r["gin"], tuple(r["overrides"]), tuple((a, b) for a, b in r["cells"]), r["configuration"])
            for r in found["runs"]
        ]
        return Sweep(folder.resolve(), tuple(found["overrides"]), runs, allow_imports=bool(found.get("allow_imports")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / FILE} is not what `repro sweep` writes ({type(error).__name__}: {error}); remove it and give the request again, which finds every run that is done"
        ) from None


def find(name: str, root: Path) -> Sweep:
    """A sweep by its folder, by its name below `root`/sweeps, or by a beginning of that name that only one has.

    Raises:
        ValueError: if there is none, or more than one; lists what there is.
    """
    if (Path(name) / FILE).is_file():
        return read(Path(name))
    home = root / "sweeps"
    known = sorted(p.parent.name for p in home.glob(f"*/{FILE}"))
    matching = [k for k in known if k == name] or [k for k in known if k.startswith(name)]
    if len(matching) == 1:
        return read(home / matching[0])
    if matching:
        raise ValueError(f"{name!r} may be {', '.join(matching)}; write more of the name")
    raise ValueError(f"no sweep {name!r}; {'there are: ' + ', '.join(known) if known else f'there is none below {home}'}")


def plan(
    gin: str | None,
    overrides: Sequence[str],
    axes: Sequence[grid.Axis],
    root: Path,
    *,
    name: str | None = None,
    allow_imports: bool = False,
) -> Sweep:
    """Every run of a sweep, each checked, without importing torch or a plugin and without writing anything.

    Args:
        gin: the file of all runs but those of presets with a file of their own; None if every preset has one.
        overrides: of all runs.
        axes: what varies.
        root: where run folders are made.
        name: of the sweep; made from file and runs if None.
        allow_imports: let the gin files import modules outside the plugins.

    Raises:
        grid.GridError: for an empty or impossible grid, a run without a file, or two files of one name.
        configs.ConfigError: with everything that is wrong in any combination.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name):
        raise ValueError(f"--name {name!r} must be one folder name: letters, digits, and . _ + - after the first")
    drafts: dict[str, configs.Draft] = {}
    problems: dict[str, int] = {}
    runs: dict[str, Run] = {}
    effective: list[dict[str, str]] = []
    merged: list[str] = []
    configurations: dict[tuple[tuple[str, str], ...], int] = {}
    for combination in grid.product(axes):
        file = combination.file or gin
        if file is None:
            raise grid.GridError(
                f"which config for {_shown(combination.cells)}? give --gin FILE, GIN in the sweep file, or a file in the preset"
            )
        if file not in drafts:
            alike = next((other for other in drafts if _stem(other) == _stem(file)), None)
            if alike is not None and configs.locate(alike).resolve() == configs.locate(file).resolve():
                file = alike
            elif alike is not None:
                raise grid.GridError(
                    f"{alike} and {file} have one name, and runs are named by their file; copy one under another name"
                )
            if file not in drafts:
                drafts[file] = configs.draft(file, allow_imports=allow_imports)
        try:
            config = drafts[file].config([*overrides, *combination.overrides])
        except configs.ConfigError as error:
            for problem in error.problems:
                for override in combination.overrides:  # one line a name, however many values it has
                    mine = override in combination.preset
                    asker = (
                        f"preset {dict(combination.cells)['preset']!r}, " + override
                        if mine
                        else f"--grid {override.partition('=')[0]}"
                    )
                    problem = problem.replace(f"--set {override}: ", f"{asker}: ", 1)
                if combination.file and file not in problem:
                    problem = f"{file}: {problem}"
                problems[problem] = problems.get(problem, 0) + 1
            continue
        named = f"{config.stem}-{config.signature}"
        if named in runs:
            merged.append(f"{_shown(combination.cells)} is the same run as {_shown(runs[named].cells)}")
            continue
        bound = config.effective()
        key = tuple(sorted((k, v) for k, v in bound.items() if k != SEED))
        runs[named] = Run(
            named, file, combination.overrides, combination.cells, configurations.setdefault(key, len(configurations))
        )
        effective.append(bound)
    if problems:
        lines = [f"{p}" + (f"   ({n} runs)" if n > 1 else "") for p, n in list(problems.items())[:_MOST_PROBLEMS]]
        if len(problems) > len(lines):
            lines.append(f"… and {len(problems) - len(lines)} more")
        raise configs.ConfigError([*lines, "nothing was submitted"])
    stem = _stem(gin or next(iter(drafts)))
    digest = hashlib.sha256("\n".join(sorted(runs)).encode()).hexdigest()[:8]
    folder = root.resolve() / "sweeps" / (name or f"{stem}-{digest}")
    texts = {file: draft.text(overrides) for file, draft in drafts.items()}
    return Sweep(folder, tuple(overrides), list(runs.values()), texts, merged, effective, allow_imports)


def _stem(gin: str) -> str:
    return Path(gin.rpartition(":")[2]).stem


def _shown(cells: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name}={value}" for name, value in cells)


# --- how runs stand ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Standing:
    """How one run stands, by its own status file first; launcher and queue only fill in what it cannot know."""

    run: Run
    state: str
    step: int = 0
    steps: int = 0
    attempts: int = 0
    requeues: int = 0
    limit: int = 0
    message: str = ""
    job: str = ""
    updated: float = 0.0


def standings(sweep: Sweep) -> tuple[list[Standing], str]:
    """How every run stands, and a remark where the queue could not be asked (states then rest on the run folders alone)."""
    notes = {run.name: job.read(sweep.path(run)) for run in sweep.runs}
    asked: dict[str, tuple[str, str]] | None = None
    remark = ""
    if any(n.get("launcher") == "slurm" for n in notes.values()):
        asked = submit.queue()
        if asked is None:
            remark = "SLURM cannot be asked from here: states are from the run folders alone"
    alive = bool(local_queue.controller(sweep.folder).get("alive"))
    return [_standing(run, sweep.path(run), notes[run.name], asked, alive) for run in sweep.runs], remark


def _standing(run: Run, path: Path, noted: Mapping[str, Any], asked: Mapping[str, tuple[str, str]] | None, alive: bool) -> Standing:
    own = record.status(path)
    identity = str(noted.get("job") or "")
    submitted = float(noted.get("submitted") or 0.0)
    over = noted.get("ended") is not None
    cancelled = (path / job.CANCELLED).exists()
    on_slurm = noted.get("launcher") == "slurm"
    place = (asked or {}).get(identity) if on_slurm else None
    # Whether the launcher will still do something about it by itself.
    pending = (place is not None and place[0] in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED")) if on_slurm else (
        bool(noted) and alive and not over and not noted.get("started")
    )  # fmt: skip
    unsure = on_slurm and asked is None and not over
    message, state = str(noted.get("message") or ""), "waiting"
    if own is not None and own.state == "finished":
        state, message = "finished", own.message
    elif own is not None and own.state == "running" and not own.lost:
        state, message = "running", own.message
    elif cancelled and own is None:
        state = "cancelled"
    elif pending:
        state = "requeued" if own is not None and own.updated > submitted else "queued"
        message = message or (place[1] if place and place[1] != "None" else "")
    elif own is not None:
        state, message = ("lost", "its heartbeat stopped") if own.lost else (own.state, own.message or message)
        if place is not None and own.updated < submitted:
            state = "queued"  # the job has started and the run has not yet said so
        elif place is not None and place[0] == "RUNNING" and own.lost:
            state, message = "running", f"no heartbeat for {time.time() - own.updated:.0f} s"
        elif place is not None and state in ("stopped", "lost") and not cancelled:
            state = "stopping"
        elif unsure and own.updated < submitted:
            state = "queued"
    elif place is not None or unsure:
        state = "queued"
    elif over:
        state = "failed"
    elif not on_slurm and alive and noted.get("started"):
        state = "queued"  # starting: it has not written its status yet
    elif noted and (identity or noted.get("started")):
        state, message = "lost", message or "it left the launcher without a word; see job.log"
    return Standing(
        run, state, own.step if own else 0, own.steps if own else 0, own.attempts if own else 0, int(noted.get("requeues") or 0),
        int(noted.get("limit") or 0), message, identity, own.updated if own else 0.0,
    )  # fmt: skip


def counted(rows: Iterable[Standing]) -> str:
    """`9 runs: 3 finished, 6 waiting`."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    total = sum(counts.values())
    return f"{total} run{'s' if total != 1 else ''}: " + ", ".join(f"{counts[s]} {s}" for s in STATES if s in counts)


# --- what they cost ---------------------------------------------------------------------------------------------------


def costs(sweep: Sweep) -> dict[str, float]:
    """Seconds each run will take, by name, from finished runs of the same config that differ only in what the sweep varies.

    Runs that differ in the seed alone count first, else the mean of all of the file; scaled by the number of steps where both
    state it.
    """
    found: dict[str, float] = {}
    for gin in sweep.files if sweep.effective else ():
        pairs = [(run, bound) for run, bound in zip(sweep.runs, sweep.effective) if run.gin == gin]
        found |= _costs_of_file(sweep.root, _stem(gin), pairs)
    return found


def _costs_of_file(root: Path, stem: str, pairs: Sequence[tuple[Run, Mapping[str, str]]]) -> dict[str, float]:
    first = pairs[0][1]
    fixed = {k: v for k, v in first.items() if k not in (SEED, STEPS) and all(e.get(k) == v for _, e in pairs)}
    keys = set().union(*(e for _, e in pairs))
    varied = sorted(keys - set(fixed) - {SEED, STEPS})
    same: dict[tuple[str | None, ...], list[float]] = {}
    every: list[float] = []
    for path in sorted(root.glob(f"{stem}-*")):
        if not (path / "result.json").is_file():
            continue
        theirs = record.read_json(path / "run.json").get("effective")
        spent = record.seconds(path)
        if spent is None or not isinstance(theirs, dict) or not set(theirs) <= keys | {SEED, STEPS}:
            continue
        if any(theirs.get(k) != v for k, v in fixed.items()):
            continue
        rate = spent / _steps(theirs)
        same.setdefault(tuple(theirs.get(k) for k in varied), []).append(rate)
        every.append(rate)
    found = {}
    for run, bound in pairs:
        rates = same.get(tuple(bound.get(k) for k in varied)) or every
        if rates:
            found[run.name] = sum(rates) / len(rates) * _steps(bound)
    return found


def _steps(effective: Mapping[str, str]) -> int:
    said = effective.get(STEPS, "")
    return max(1, int(said)) if said.isdigit() else 1


# --- jobs -------------------------------------------------------------------------------------------------------------


def jobs(sweep: Sweep, chosen: Sequence[Run], *, flops: bool = True, limit: int = 0, stop_s: float = 30.0) -> list[job.Job]:
    """The chosen runs as command lines. The FLOP profile is made once a configuration, by the first run that needs it."""
    groups: dict[int, list[Run]] = {}
    for run in sweep.runs:
        groups.setdefault(run.configuration, []).append(run)
    source: dict[int, Run] = {}  # the run whose profile the others of its configuration take over
    for configuration, members in groups.items():
        done = next((r for r in members if (sweep.path(r) / "profile.json").is_file()), None)
        if done is not None:
            source[configuration] = done
    kept = {name: os.environ[name] for name in job.ENVIRONMENT if name in os.environ}
    cwd = record.read_json(sweep.folder / FILE).get("cwd", os.getcwd())
    made = []
    for run in chosen:
        path = sweep.path(run)
        command = [sys.executable, "-m", "repro.run", "--gin", str(sweep.base(run.gin))]
        command += ["--allow-import"] if sweep.allow_imports else []
        for override in run.overrides:
            command += ["--set", override]
        command += ["--out", str(path)]
        maker = source.setdefault(run.configuration, run)
        if not flops or maker is not run:
            command.append("--no-profile")
        shared = [r for r in groups[run.configuration] if r is not run] if maker is run else [maker]
        siblings = tuple(str(sweep.path(r)) for r in shared) if flops else ()
        made.append(job.Job(str(path), tuple(command), cwd, kept, siblings, limit, stop_s))
    return made


def results(sweep: Sweep) -> tuple[list[str], list[list[Any]]]:
    """What varies and every final metric, one row a finished run: the same wherever the runs were done."""
    found = [(run, record.read_json(sweep.path(run) / "result.json").get("metrics") or {}) for run in sweep.runs]
    metrics = list(dict.fromkeys(name for _, m in found for name in m))
    columns = sweep.columns()
    rows: list[list[Any]] = []
    for run, values in found:
        if values:
            cells = dict(run.cells)
            rows.append([run.name, *(cells.get(c, "") for c in columns), *(values.get(m) for m in metrics)])
    return ["run", *columns, *metrics], rows
