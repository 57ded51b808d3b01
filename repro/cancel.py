"""Stop the runs of a sweep, here or on SLURM. What is at work writes a checkpoint first; `repro sweep --resume` goes on.

repro cancel SWEEP             all of it
repro cancel SWEEP RUN…        these runs (names, or beginnings of them)
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from pathlib import Path

from core import record
from repro import status
from slurm import job, local_queue, submit, sweep


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep's folder or name")
    parser.add_argument("run", nargs="*", metavar="RUN", help="these runs alone")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are (default: runs)")
    parser.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait for them to stop (default: 60)")


def chosen(found: sweep.Sweep, names: list[str]) -> list[sweep.Run]:
    """The runs meant.

    Raises:
        ValueError: for a name that no run, or more than one, begins with.
    """
    if not names:
        return list(found.runs)
    picked = []
    for name in names:
        matching = [r for r in found.runs if r.name == name] or [
            r for r in found.runs if r.name.startswith(name) or r.name.endswith(name)
        ]
        if len(matching) != 1:
            raise ValueError(
                f"{name!r} is {'no run' if not matching else f'{len(matching)} runs'} of {found.name}; `repro status` lists them"
            )
        picked += matching
    return picked


def main(args: argparse.Namespace) -> int:
    found = sweep.find(args.sweep, Path(args.runs))
    picked = {run.name for run in chosen(found, args.run)}
    rows, _ = sweep.standings(found)
    mine = [r for r in rows if r.run.name in picked]
    active = [r for r in mine if r.state in sweep.ACTIVE]
    for row in mine:
        if row.state in (*sweep.ACTIVE, "waiting"):
            folder = found.path(row.run)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / job.CANCELLED).touch()
    submit.cancel([r.job for r in active if r.job])
    _stop_here(found, [r for r in active if not r.job], everything=len(picked) == len(found.runs))
    until = time.monotonic() + args.wait
    while any(r.state in sweep.ACTIVE for r in mine) and time.monotonic() < until:
        time.sleep(0.2)
        rows, _ = sweep.standings(found)
        mine = [r for r in rows if r.run.name in picked]
    print(status.standing_table(found, mine))
    print(f"\n{sweep.counted(mine)}")
    left = [r for r in mine if r.state in sweep.ACTIVE]
    if left:
        print(f"{len(left)} still active after {args.wait:g} s; `repro status {found.name}` shows when they have stopped")
    return 1 if left else 0


def _stop_here(found: sweep.Sweep, rows: list[sweep.Standing], *, everything: bool) -> None:
    """Signal the controller of a local queue, or single runs of it.

    Raises:
        ValueError: if they are on another machine.
    """
    keeper = local_queue.controller(found.folder)
    if everything and keeper.get("alive"):
        if keeper["host"] != socket.gethostname():
            raise ValueError(f"the queue runs on {keeper['host']} (pid {keeper['pid']}); cancel it there")
        os.kill(keeper["pid"], signal.SIGTERM)
        return
    for row in rows:
        own = record.status(found.path(row.run))
        if row.state != "running" or own is None:
            continue
        if own.host != socket.gethostname():
            raise ValueError(f"{row.run.name} runs on {own.host} (pid {own.pid}); cancel it there")
        os.kill(own.pid, signal.SIGTERM)


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("cancel"))
