"""Many runs of one config, here or on SLURM. The same request finds what is done and does the rest.

repro sweep --gin FILE --grid "sdtps.TokenSparse.sparse_ratio=0.3,0.5,0.7" --grid "SEED=0..2"
repro sweep --gin FILE --preset "full:" --preset "mean: sdtps.TokenSparse.score='mean'" --grid "SEED=0..2"
repro sweep --gin gin/sam_nyu.gin --preset "text:" --preset "none: gin/sam/variants/no_text.gin"
repro sweep --gin FILE --grid "LR=4e-3,2e-3; STEPS=120,240"         LR and STEPS move together
repro sweep --sweep FILE                                            the request from a file of keys (below)
repro sweep … --dry-run                                             the table of runs and their cost; nothing starts
repro sweep … --launcher slurm --cluster one_gpu --slurm time=120   one array; returns when it is submitted
repro sweep --resume SWEEP [--only-failed]                          what is not finished, from the sweep's folder

A sweep file: GIN = 'gin/x.gin'; SET = ['STEPS=100']; GRID = ['SEED=0..2']; PRESETS = {'full': [], 'mean': ["a.B.score='mean'"]}
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core import config as configs
from core import record
from core.console import duration
from repro import cli, status
from slurm import grid, job, local_queue, profile, submit, sweep

_KEYS = {"GIN": "str", "SET": "list[str]", "GRID": "list[str]", "PRESETS": "dict[str, list[str]]", "NAME": "str"}


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    cli.config_options(what, required=False, told="override for every run")
    what.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="one axis: 0.1,0.2 or 0..2; A=…; B=… together (repeatable)",
    )
    what.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="LABEL: A=1; B=2",
        help="a named group of overrides, and a gin file of its own if it names one; all presets are one axis",
    )
    what.add_argument(
        "--sweep", metavar="FILE", help="a file with GIN, SET, GRID, PRESETS, found as --gin is; options here come on top"
    )
    what.add_argument("--resume", metavar="SWEEP", help="a sweep's folder or name: what is not finished in it")
    what.add_argument("--only-failed", action="store_true", help="of these, the failed and lost runs alone")
    what.add_argument("--first", type=int, metavar="N", help="of these, the first N alone")
    what.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)")
    what.add_argument("--name", metavar="NAME", help="name of the sweep (default: file and hash)")
    what.add_argument("--dry-run", action="store_true", help="show the table of runs and their cost; write and start nothing")
    what.add_argument("--no-profile", action="store_true", help="no FLOP profile (else it is made once a configuration)")
    here = parser.add_argument_group("where")
    here.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="a queue on this machine, or SLURM (default: local)"
    )
    here.add_argument("--slots", type=int, metavar="N", help="local: runs at a time (default: one a GPU, else by CPUs)")
    here.add_argument("--threads", type=int, metavar="N", help="local without GPUs: CPU threads a run (default: 1)")
    here.add_argument(
        "--grace", type=float, default=120.0, metavar="S", help="local: how long a run may take to stop (default: 120)"
    )
    here.add_argument("--cluster", metavar="PROFILE", help="slurm: a profile's name or file (slurm/profiles)")
    here.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="slurm: change of the profile, e.g. time=60 (repeatable)"
    )


def request(args: argparse.Namespace) -> sweep.Sweep:
    """The sweep that the command line and its file ask for.

    Raises:
        ValueError: for what contradicts itself or is wrong in file, grid or config.
    """
    if args.resume is not None:
        given = [f"--{n}" for n in ("gin", "grid", "preset", "sweep", "overrides", "name") if getattr(args, n)]
        if given:
            raise ValueError(f"--resume takes the sweep as it was planned; drop {', '.join(given).replace('--overrides', '--set')}")
        return sweep.find(args.resume, Path(args.runs))
    keys = configs.read_keys(configs.locate(args.sweep), _KEYS) if args.sweep else {}
    axes = [grid.axis(text) for text in [*keys.get("GRID", []), *args.grid]]
    presets = dict(keys.get("PRESETS", {}))
    for label, overrides in map(grid.preset, args.preset):
        if label in presets:
            raise ValueError(f"preset {label!r} is given twice")
        presets[label] = overrides
    if presets:
        axes.insert(0, grid.presets(presets))
    if not axes and not (args.gin or keys.get("GIN")):
        raise ValueError("which config? give --gin FILE (or GIN in the sweep file, or --resume SWEEP)")
    return sweep.plan(
        args.gin or keys.get("GIN"),
        [*keys.get("SET", []), *args.overrides],
        axes,
        Path(args.runs),
        name=args.name or keys.get("NAME"),
        allow_imports=args.allow_import,
    )


def todo(rows: Sequence[sweep.Standing], args: argparse.Namespace) -> list[sweep.Run]:
    """The runs to do: not finished, not in somebody's hands."""
    wanted = [
        r.run for r in rows if r.state in (sweep.FAILED if args.only_failed else (*sweep.FAILED, "waiting", "stopped", "cancelled"))
    ]
    return wanted[: args.first] if args.first else wanted


def main(args: argparse.Namespace) -> int:
    if args.first is not None and args.first < 1:
        raise ValueError(f"--first must be at least 1, got {args.first}")
    if not 0 <= args.grace < math.inf:
        raise ValueError(f"--grace must be 0 or more seconds, got {args.grace}")
    for name, other in (("slots", "slurm"), ("threads", "slurm"), ("cluster", "local"), ("slurm", "local")):
        if getattr(args, name) not in (None, []) and args.launcher == other:
            raise ValueError(f"--{name} has no effect with --launcher {other}")
    asks = profile.read(args.cluster, args.slurm)
    found = request(args)
    rows, remark = sweep.standings(found)
    chosen = todo(rows, args)
    places = local_queue.slots(args.slots, threads=1 if args.threads is None else args.threads) if args.launcher == "local" else []
    if args.dry_run:
        _dry_run(found, rows, chosen, len(places) or asks.parallel)
        return 0
    print(f"sweep {found.folder}\n{sweep.counted(rows)}")
    if remark:
        print(f"note: {remark}")
    for line in found.merged:
        print(f"note: {line}")
    if not chosen:
        found.write()  # its runs were done by others: `repro status` and the labels of reports know it all the same
        print("nothing to do")
        if all(r.state == "finished" for r in rows):
            print(f"\n{status.results_table(found)}")
        return 0
    if args.launcher == "slurm":
        submit.check(asks)
    found.write()
    _frozen(found)
    with _alone(found):
        for run in chosen:
            (found.path(run) / job.CANCELLED).unlink(missing_ok=True)
        jobs = sweep.jobs(found, chosen, flops=not args.no_profile, limit=asks.requeues, stop_s=asks.signal_s)
        if args.launcher == "slurm":
            ids = submit.submit(jobs, found.folder / "jobs", asks, found.name)
            print(
                f"submitted {len(ids)} jobs, {ids[0]} to {ids[-1]}, at most {asks.parallel} at a time, up to {asks.requeues} requeues each"
            )
            print(f"repro status {_named(found, args)}      repro cancel {_named(found, args)}")
            return 0
        return _local(found, jobs, places, args)


def _named(found: sweep.Sweep, args: argparse.Namespace) -> str:
    return found.name + ("" if Path(args.runs) == Path("runs") else f" --runs {args.runs}")


def _frozen(found: sweep.Sweep) -> None:
    """The jobs read each config as it was planned, whatever becomes of the file: make sure that it is the same."""
    for gin in found.files:
        run = next(run for run in found.runs if run.gin == gin)
        config = configs.draft(str(found.base(gin)), allow_imports=found.allow_imports).config(run.overrides)
        if f"{config.stem}-{config.signature}" != run.name:
            raise RuntimeError(
                f"{found.base(gin)} does not give {run.name} any more; was it edited? Restore it, or plan the sweep again under another --name"
            )


@contextlib.contextmanager
def _alone(found: sweep.Sweep) -> Iterator[None]:
    """One launcher at a time for a sweep.

    Raises:
        record.RunBusy: if another process has it.
    """
    lock = FileLock(str(found.folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        keeper = local_queue.controller(found.folder)
        holder = f"pid {keeper['pid']} on {keeper['host']}" if keeper.get("alive") else "another process"
        raise record.RunBusy(f"{found.folder} is being worked on by {holder}; `repro status {found.name}` shows it") from None
    try:
        yield
    finally:
        lock.release()


def _dry_run(found: sweep.Sweep, rows: Sequence[sweep.Standing], chosen: Sequence[sweep.Run], parallel: int) -> None:
    if not found.effective:
        found.settle_effective()
    costs = sweep.costs(found)
    print(f"sweep {found.folder}   ({', '.join(found.files)})\n")
    print(status.standing_table(found, rows, costs))
    for line in found.merged:
        print(f"note: {line}")
    total = [costs[run.name] for run in chosen if run.name in costs]
    print(f"\n{sweep.counted(rows)}; {len(chosen)} to do")
    if total:
        # Runs start in order as slots fall free: no worse than an even split plus the longest run.
        wall = min(sum(total), sum(total) / parallel + max(total)) if len(total) > parallel else max(total)
        print(
            f"cost: {sum(total) / 3600:.3f} hours of work, at most {wall / 3600:.3f} hours with {parallel} at a time (from finished runs of this config)"
        )
    elif chosen:
        print("cost: not known yet; `--first 1` measures it")
    print("nothing is submitted (--dry-run)")


def _local(found: sweep.Sweep, jobs: Sequence[job.Job], places: Sequence[local_queue.Slot], args: argparse.Namespace) -> int:
    gpus = sorted({p.device for p in places if p.device is not None})
    where = f"GPUs {', '.join(gpus)}" if gpus else f"{places[0].threads} CPU thread{'s' if places[0].threads > 1 else ''} a run"
    print(f"{len(jobs)} to do in {len(places)} slots ({where}); ^C stops them with checkpoints")
    queue = local_queue.LocalQueue(found.folder, jobs, places, grace_s=args.grace, show=_shower(found, len(jobs)))
    began = time.perf_counter()
    exits = queue.run()
    rows, _ = sweep.standings(found)
    with record.unread():
        print(f"\n{status.standing_table(found, rows)}\n\n{sweep.counted(rows)}   ({duration(time.perf_counter() - began)})")
        if all(r.state == "finished" for r in rows):
            print(f"\n{status.results_table(found)}")
    if queue.stopping:
        return record.EXIT_STOPPED
    if any(code not in (0, record.EXIT_STOPPED) for code in exits.values()):
        return 1
    return record.EXIT_STOPPED if any(exits.values()) else 0


def _shower(found: sweep.Sweep, total: int) -> Callable[[local_queue.LocalQueue], None]:
    """Says what starts and ends; in a terminal also a line that changes. A reader that goes away does not end the queue."""
    said: set[str] = set()
    live = record.interactive()
    state: dict[str, Any] = {"line": ""}

    def show(queue: local_queue.LocalQueue) -> None:
        with record.unread():
            clear = "\r\033[K" if live and state["line"] else ""
            for path, code in queue.exits.items():
                if path not in said:
                    said.add(path)
                    spoken = "finished" if code == 0 else job.ending(code)
                    hint = f"; see {path}/{job.LOG}" if code not in (0, record.EXIT_STOPPED) else ""
                    print(f"{clear}[{len(queue.exits)}/{total}] {os.path.basename(path)} {spoken}{hint}", flush=True)
                    clear = ""
            if queue.stopping and "stopping" not in said:
                said.add("stopping")
                print(f"{clear}stopping: {len(queue.workers)} runs write their checkpoints (once more to kill them)", flush=True)
            if live:
                steps = [s for s in (record.status(w.job.path) for w in queue.workers.values()) if s is not None and s.steps]
                state["line"] = queue.summary() + "".join(f"  {s.step}/{s.steps}" for s in steps[:8])
                sys.stdout.write(f"\r\033[K{state['line'][: shutil.get_terminal_size().columns - 1]}")
                sys.stdout.flush()

    return show


if __name__ == "__main__":
    raise SystemExit(cli.verb("sweep"))
