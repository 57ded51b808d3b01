"""Fill the table and draw the curves of a study document from its run folders.

    python docs/make_study.py docs/emoji7.md runs/ablation

The document says in a comment what it wants, and what is made goes between two more:

    <!-- study {"metrics": ["accuracy[twitter]"], "baseline": "off", "curves": ["loss/class"], "digits": 3} -->
    <!-- made --> ... <!-- end -->

Settings are named as the sweep's table names them, or by their gin file; seeds of a setting stand together. `baseline` is the
setting that every other is compared with by a paired t-test over seeds. `each` is a prefix of metrics that get a table of their own, a row
each, a column a setting (`"each": "IoU/"`), means over seeds. Curves go to DOCUMENT.png: the mean over seeds of what
`metrics.jsonl` holds, smoothed by a running mean of `smooth` rows, with the range over seeds shaded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from repro import gather

_WANT = re.compile(r"<!-- study (\{.*?\}) -->", re.DOTALL)
_MADE = re.compile(r"<!-- made -->.*?<!-- end -->", re.DOTALL)


def table(groups: list[gather.Group], want: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds of each metric, and p against the baseline for the first one."""
    metrics, names = want["metrics"], want.get("names", want["metrics"])
    base = next((g for g in groups if g.label == want.get("baseline")), None)
    head = ["setting", *names] + (["p, paired"] if base else []) + ["seeds"]
    rows = [head, ["---"] * len(head)]
    for group in groups:
        cells = [gather.spread(group, metric) for metric in metrics]
        row = [group.label] + [cell.text(want.get("digits", 3), brief=True) for cell in cells]
        if base:
            p = None if group is base else gather.paired(group, base, metrics[0])[0]
            row.append("–" if p is None else f"{p:.2f}" if p >= 0.01 else f"{p:.0e}")
        rows.append([*row, str(cells[0].n)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def each(groups: list[gather.Group], prefix: str, digits: int) -> str:
    """Metrics that begin with the prefix: a row each, a column a setting."""
    names = list(dict.fromkeys(n for g in groups for run in g.runs for n in run.metrics if n.startswith(prefix)))
    rows = [[prefix.strip("/"), *(g.label for g in groups)], ["---"] * (len(groups) + 1)]
    for name in names:
        means = [gather.spread(group, name).mean for group in groups]
        rows.append([name.removeprefix(prefix), *("–" if m is None else f"{m:.{digits}f}" for m in means)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(groups: list[gather.Group], want: dict[str, Any], path: Path) -> None:
    """One panel a curve, one line a setting."""
    from matplotlib.figure import Figure

    curves, smooth = want["curves"], want.get("smooth", 1)
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, curve in zip(panels, curves):
        for number, group in enumerate(groups):  # a setting has its colour in every panel, also in one without some other setting
            by_step: dict[int, list[float]] = {}
            for run in group.runs:
                points = [(r["step"], found) for r in run.rows if (found := value(r, curve)) is not None]
                kept = running_mean(np.array([v for _, v in points], dtype=float), smooth)
                for (step, _), shown in zip(points[len(points) - len(kept) :], kept):
                    by_step.setdefault(step, []).append(float(shown))
            if not by_step:
                continue
            steps = sorted(by_step)
            panel.plot(steps, [np.mean(by_step[s]) for s in steps], color=f"C{number}", label=group.label, lw=1.5)
            low, high = ([f(by_step[s]) for s in steps] for f in (min, max))
            panel.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, lw=0)
        panel.set_title(curve, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def value(row: dict[str, Any], name: str) -> float | None:
    """A finite number of a row of `metrics.jsonl`, evaluations included."""
    found = row.get(name, (row.get("eval") or {}).get(name))
    return float(found) if isinstance(found, (int, float)) and np.isfinite(found) else None


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Means of `width` values in a row; shorter by width - 1."""
    return np.convolve(values, np.ones(width) / width, mode="valid") if len(values) >= width else values[:0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    args = parser.parse_args()
    text = args.document.read_text(encoding="utf-8")
    asked = _WANT.search(text)
    if not asked or not _MADE.search(text):
        print(f"error: {args.document} has no <!-- study {{…}} --> with <!-- made --> and <!-- end --> after it", file=sys.stderr)
        return 2
    want = json.loads(asked[1])
    try:
        groups = gather.settings(gather.collect(args.runs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = table(groups, want)
    if want.get("each"):
        made += "\n\n" + each(groups, want["each"], want.get("digits", 3))
    if want.get("curves"):
        picture = args.document.with_suffix(".png")
        draw(groups, want, picture)
        made += f"\n\n![{', '.join(want['curves'])}]({picture.name})"
    args.document.write_text(_MADE.sub(lambda _: f"<!-- made -->\n{made}\n<!-- end -->", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
