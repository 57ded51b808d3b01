"""How the runs of a sweep stand, from their own folders. Needs neither the process that started them nor accounting.

repro status SWEEP             one line a run; SWEEP is a folder, a name below RUNS/sweeps, or the beginning of one
repro status                   every sweep below RUNS

Exit status 1 where a run failed or was lost, else 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import record
from repro.show import cell
from slurm import local_queue, sweep

_COLOURS = {
    "finished": 32,
    "running": 36,
    "queued": 33,
    "stopping": 33,
    "requeued": 33,
    "stopped": 35,
    "cancelled": 35,
    "failed": 31,
    "lost": 31,
}
_MESSAGE = 60


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="a sweep's folder or name")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are (default: runs)")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=2.0, metavar="S", help="show again every S seconds until nothing is active"
    )
    parser.add_argument("--metrics", action="store_true", help="the final metrics of the finished runs")
    parser.add_argument("--json", action="store_true", help="as JSON")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows in aligned columns, numbers to the right; fast for thousands of rows."""
    shown = [[value if isinstance(value, str) else cell(value) for value in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] in (None, "") for row in rows) for i in range(len(columns))
    ]
    widths = [max([len(name), *(len(row[i]) for row in shown)]) for i, name in enumerate(columns)]
    lines = ["  ".join(n.rjust(w) if r else n.ljust(w) for n, w, r in zip(columns, widths, right)).rstrip()]
    lines.append("  ".join("─" * w for w in widths))
    for row in shown:
        lines.append("  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(row, widths, right)).rstrip())
    text = "\n".join(lines)
    if record.interactive() and not os.environ.get("NO_COLOR"):
        for state, colour in _COLOURS.items():
            text = text.replace(f"  {state}", f"  \033[{colour}m{state}\033[0m")
    return text


def short(names: Sequence[str]) -> list[str]:
    """Last parts of dotted names where they stay distinct."""
    tails = [name.rsplit(".", 1)[-1] for name in names]
    return [tail if tails.count(tail) == 1 else name for tail, name in zip(tails, names)]


def standing_table(found: sweep.Sweep, rows: Sequence[sweep.Standing], costs: dict[str, float] | None = None) -> str:
    """The table of a sweep's runs."""
    names = found.columns()
    headings = ["run", *short(names), "state"]
    progress = any(row.step for row in rows)
    tries = any(row.attempts > 1 or row.requeues for row in rows)
    said = any(row.message for row in rows)
    headings += ["step"] * progress + ["tries", "requeues"] * tries + ["hours"] * bool(costs) + ["message"] * said
    lines = []
    for row in rows:
        cells = dict(row.run.cells)
        line: list[Any] = [row.run.name, *(cells.get(n, "") for n in names), row.state]
        line += [f"{row.step}/{row.steps}" if row.steps else ""] * progress
        if tries:
            line += [row.attempts or "", f"{row.requeues} of {row.limit}" if row.requeues else ""]
        if costs:
            line.append(f"{costs[row.run.name] / 3600:.3f}" if row.run.name in costs and row.state != "finished" else "")
        if said:
            first = row.message.partition("\n")[0]
            line.append(first if len(first) <= _MESSAGE else first[: _MESSAGE - 1] + "…")
        lines.append(line)
    return table(headings, lines)


def results_table(found: sweep.Sweep) -> str:
    """Final metrics of the finished runs."""
    columns, rows = sweep.results(found)
    return table([columns[0], *short(columns[1:])], rows)


def _show(found: sweep.Sweep, args: argparse.Namespace) -> list[sweep.Standing]:
    rows, remark = sweep.standings(found)
    if args.json:
        listed = [{**dataclasses.asdict(r), "run": r.run.name, "cells": dict(r.run.cells)} for r in rows]
        print(record.dumps({"sweep": str(found.folder), "remark": remark, "runs": listed}, indent=2))
        return rows
    print(f"sweep {found.folder}   ({', '.join(found.files)})\n")
    print(standing_table(found, rows))
    print(f"\n{sweep.counted(rows)}")
    keeper = local_queue.controller(found.folder)
    if keeper.get("alive"):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(keeper["since"]))
        print(f"run by pid {keeper['pid']} on {keeper['host']} in {keeper['slots']} slots since {began}")
    if remark:
        print(f"note: {remark}")
    if args.metrics or all(r.state == "finished" for r in rows):
        print(f"\n{results_table(found)}")
    return rows


def main(args: argparse.Namespace) -> int:
    root = Path(args.runs)
    if args.sweep is None:
        folders = sorted(p.parent for p in (root / "sweeps").glob(f"*/{sweep.FILE}"))
        if not folders:
            raise ValueError(f"there is no sweep below {root / 'sweeps'}; start one with `repro sweep`")
        for folder in folders:
            try:
                rows, _ = sweep.standings(sweep.read(folder))
                said = sweep.counted(rows)
            except ValueError as error:  # one that cannot be read hides no other
                said = str(error)
            print(f"{folder.name}   {said}")
        return 0
    found = sweep.find(args.sweep, root)
    while True:
        if args.watch and record.interactive() and not args.json:
            print("\033[H\033[2J", end="")
        rows = _show(found, args)
        sys.stdout.flush()
        if not args.watch or not any(r.state in sweep.ACTIVE for r in rows):
            break
        time.sleep(args.watch)
    return 1 if any(r.state in sweep.FAILED for r in rows) else 0


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("status"))
