"""Two runs side by side: what was asked differently, and what came of it.

repro compare runs/a runs/b
"""

from __future__ import annotations

import argparse
from pathlib import Path

from core.config import difference
from repro import gather, show


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a run folder")
    parser.add_argument("second", help="a run folder")


def main(args: argparse.Namespace) -> int:
    a, b = (gather.collect([place])[0] for place in (args.first, args.second))
    if a.path.resolve() == b.path.resolve():
        raise ValueError(f"{args.first} and {args.second} are the same run")
    names = [Path(args.first).name, Path(args.second).name]
    changed = difference(dict(a.effective), dict(b.effective))
    if changed:
        show.table("asked differently", ["parameter", *names], [[k, x, y] for k, x, y in changed])
    else:
        print("the same was asked of both")
    rows = []
    for metric in dict.fromkeys([*a.metrics, *b.metrics]):
        x, y = a.metrics.get(metric), b.metrics.get(metric)
        rows.append([metric, x, y, None if x is None or y is None else y - x])
    if rows:
        show.table("results", ["metric", *names, "difference"], rows)
    same = a.rows and [r for r in a.rows if "loss" in r] == [r for r in b.rows if "loss" in r]
    print("every logged step is identical to the last bit" if same else f"states: {a.state}, {b.state}")
    return 0


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("compare"))
