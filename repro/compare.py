"""Two runs side by side: what was asked differently, where they ran, what came of it and what it costs.

repro compare runs/a runs/b
"""

from __future__ import annotations

import argparse
from typing import Any

from core.config import difference
from repro import gather, show
from repro.gather import Run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a run folder")
    parser.add_argument("second", help="a run folder")


FACTS = ("config", "commit", "uncommitted, lines", "torch", "hardware", "data", "data fingerprint")
COSTS = ("MACs", "parameters", "activations, bytes", "latency, ms")


def one(place: str) -> Run:
    """The run at a place.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = gather.collect([place])
    if len(found) > 1:
        raise ValueError(f"{place} holds {len(found)} runs; give one run folder, or put them side by side with `repro report`")
    return found[0]


def facts(run: Run) -> list[Any]:
    """FACTS of a run; None where it does not say."""
    source, environment = run.info.get("source", {}), run.info.get("environment", {})
    hardware = ", ".join(environment.get("accelerators") or []) or f"CPU, {environment.get('cpu_count', '?')} cores"
    return [
        run.config, (source.get("commit") or "")[:12] or None, run.text("diff.patch").count("\n") or None,
        environment.get("versions", {}).get("torch"), hardware, run.data.get("name"), run.data.get("fingerprint"),
    ]  # fmt: skip


def cost(run: Run) -> list[int | float | None]:
    """COSTS of a run; None where they were not measured."""
    model = run.profile.get("model") or {}
    latency = model.get("latency") or {}
    seconds = latency.get("median_s")
    return [model.get("macs"), model.get("parameters"), model.get("activation_bytes"), None if seconds is None else 1e3 * seconds]


def main(args: argparse.Namespace) -> int:
    a, b = (one(place) for place in (args.first, args.second))
    if a.path.resolve() == b.path.resolve():
        raise ValueError(f"{args.first} and {args.second} are the same run")
    settings = gather.labels([a, b])
    names = [" ".join(filter(None, [r.path.name, f"({n})" if (n := settings.get(r.path.resolve())) else ""])) for r in (a, b)]
    changed = difference(dict(a.effective), dict(b.effective))
    if changed:
        show.table("asked differently", ["parameter", *names], [[k, x, y] for k, x, y in changed])
    else:
        print("the same was asked of both")
    apart = [[what, x, y] for what, x, y in zip(FACTS, facts(a), facts(b)) if x != y]
    if apart:
        show.table("run differently", ["", *names], apart)
    rows = []
    for metric in dict.fromkeys([*a.metrics, *b.metrics]):
        x, y = a.metrics.get(metric), b.metrics.get(metric)
        rows.append([metric, x, y, None if x is None or y is None else y - x])
    if rows:
        show.table("results", ["metric", *names, "difference"], rows)
    costs = [[what, x, y, None if x is None or y is None else y - x] for what, x, y in zip(COSTS, cost(a), cost(b))]
    if any(x is not None for row in costs for x in row[1:3]):
        show.table("cost", ["", *names, "difference"], costs)
    same = a.rows and [r for r in a.rows if "loss" in r] == [r for r in b.rows if "loss" in r]
    print("every logged step is identical to the last bit" if same else f"states: {a.state}, {b.state}")
    return 0


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("compare"))
