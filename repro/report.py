"""One self-contained HTML page of runs, and the same tables in Markdown and CSV.

    repro report runs/sdtps_rgbnt-1a2b3c4d            one run
    repro report runs --out report                    every run below a folder, grouped by configuration, seeds together
    repro report runs --baseline off                  every setting of a sweep tested against one of them

The page needs no network and no script. What a run folder lacks is shown as a gap. Means are over seeds, with n. Settings are
named as the sweep that made them names them.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import io
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core import record
from core.console import duration
from repro import gather, show
from repro.gather import Group, Run

DETAILED = 12  # configurations whose own tables, pictures and configs are on the page
CURVE_GROUPS = 12
CURVE_SEEDS = 5  # runs of a configuration behind its curve
CURVE_POINTS = 400
COST_GROUPS = 200
TEXT = 200_000  # characters of a file shown
INK = "#6f7b86"  # of axes and letters in figures: read on white and on black


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument(
        "--out", default="report", metavar="DIR", help="folder for index.html, tables.md and *.csv (default: report)"
    )
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="metrics of the summary (repeatable; default: the headline ones)",
    )
    parser.add_argument("--baseline", metavar="NAME", help="configuration that the others are tested against (default: the best)")
    parser.add_argument("--claims", metavar="FILE", help="outcome of `repro verify --json FILE`, to be shown with verdicts")


_NUMBER = re.compile(r"[-–+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?%?($|[ ×±])")  # and what may stand behind one
_TONES = {"holds": "good", "reproduced": "good", "finished": "good"} | dict.fromkeys(
    ("does not hold", "refuted", "outside tolerance", "check failed", "failed", "lost"), "bad"
)


@dataclasses.dataclass
class Table:
    """A table of the page. `key` names its CSV file; `best` marks rows; a `folded` one opens on a click."""

    key: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    best: set[int] = dataclasses.field(default_factory=set)
    folded: bool = False

    @staticmethod
    def tone(cell: str) -> str:
        """How a verdict is coloured: `good`, `bad`, or not."""
        return _TONES.get(cell, "")

    @cached_property
    def numeric(self) -> set[int]:
        """Columns that hold numbers alone."""

        def number(text: str) -> bool:
            return text in ("–", "") or _NUMBER.match(text) is not None

        return {i for i in range(len(self.columns)) if self.rows and all(i < len(r) and number(r[i]) for r in self.rows)}


@dataclasses.dataclass
class Figure:
    caption: str
    data: str


@dataclasses.dataclass
class Fold:
    title: str
    text: str


@dataclasses.dataclass
class Section:
    """A part of the page: paragraphs, tables, figures, folded texts."""

    id: str
    title: str
    paragraphs: list[str] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    folds: list[Fold] = dataclasses.field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.paragraphs or self.tables or self.figures or self.folds)


def main(args: argparse.Namespace) -> int:
    from repro.claims import verified

    runs = gather.collect(args.runs)
    out = Path(args.out)
    page = build(runs, args.metric, verified(Path(args.claims)) if args.claims else {}, args.baseline)
    title = args.title or (f"Run {runs[0].path.name}" if len(runs) == 1 else f"{len(runs)} runs")
    command = shlex.join(["repro", "report", *args.runs])
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(render(page, runs, title, command), encoding="utf-8")
    (out / "tables.md").write_text(markdown(page, title), encoding="utf-8")
    tables = [t for s in page for t in s.tables]
    for table in tables:
        (out / f"{table.key}.csv").write_text(as_csv(table), encoding="utf-8")
    said = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{out / 'index.html'}: {said}, {len(tables)} tables, {sum(len(s.figures) for s in page)} figures")
    return 0


def build(
    runs: Sequence[Run], metrics: Sequence[str] = (), claims: dict[str, Any] | None = None, baseline: str | None = None
) -> list[Section]:
    """The sections of a page, without those that would be empty.

    Raises:
        ValueError: for a metric that no run has, or a baseline that no configuration is named.
    """
    groups = gather.settings(runs)
    families = [(groups, list(metrics))] if metrics else gather.families(groups)
    known = {n for r in runs for n in r.metrics}
    unknown = [m for m in metrics if known and m not in known]
    if unknown:
        raise ValueError(f"no run has a metric {unknown[0]!r}; there are {', '.join(sorted(known)[:20])}")
    if baseline is not None and all(g.label != baseline for g in groups):
        raise ValueError(f"no configuration is named {baseline!r}; there are {', '.join(repr(g.label) for g in groups[:20])}")
    sections = [
        summary(families), comparison(families, baseline), published(groups), curves(families), states(runs),
        own_tables(groups), costs(groups), pictures(groups), claimed(claims or {}), asked(groups),
    ]  # fmt: skip
    _unique([table for section in sections for table in section.tables])
    return [s for s in sections if not s.empty]


def _unique(tables: Sequence[Table]) -> None:
    """Number the keys that come again: a file a table."""
    seen: dict[str, int] = {}
    for table in tables:
        seen[table.key] = seen.get(table.key, 0) + 1
        if seen[table.key] > 1:
            table.key = f"{table.key}-{seen[table.key]}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", text).strip("-")[:80]


# --- sections -----------------------------------------------------------------------------------------------------------


Families = Sequence[tuple[Sequence[Group], Sequence[str]]]
"""Configurations that are shown together, with the metrics they are shown by."""


def summary(families: Families) -> Section:
    """Every configuration with mean and spread over its seeds, the best marked."""
    section = Section("summary", "Results")
    for groups, metrics in families:
        rows = [[g.label, str(len(g.counted)), *(gather.spread(g, m).text(brief=True) for m in metrics)] for g in groups]
        best: set[int] = set()
        if metrics:
            top = gather.best(groups, metrics[0])
            best = {i for i, g in enumerate(groups) if any(g is t for t in top)}
        note = "– is a gap, never a zero"
        if any(len(g.counted) > 1 for g in groups):
            note = f"mean ± sample standard deviation over seeds, all of the runs unless n is said; {note}"
        if best:
            note += f". Marked: best by {metrics[0]}" + (" (a tie)" if len(best) > 1 else "")
        section.tables.append(Table("summary", "", ["configuration", "runs", *metrics], rows, note, best))
    for group in [g for groups, _ in families for g in groups]:
        for seed, agree in group.repeated.items():
            same = "with the same result" if agree else "with DIFFERENT results"
            section.paragraphs.append(f"{group.label}: seed {seed} was run more than once, {same}; it counts once, by the first.")
    return section


def published(groups: Sequence[Group]) -> Section:
    """Published numbers beside ours: of the ledger with tolerance and source, and those that the task itself states."""
    section = Section("published", "Published values")
    runs = [r for g in groups for r in g.runs]
    rows, noted = _ledger(runs)
    section.paragraphs += noted
    if rows:
        columns = ["number", "metric and protocol", "published ± tolerance", "ours", "difference", "standing", "source"]
        note = "A metric's protocol stands in brackets; numbers of two protocols are not comparable. Ours: finished runs of the number's own configuration on the published data, mean over seeds."
        section.tables.append(Table("ledger", "", columns, rows, note))
    stated = []
    for group in groups:
        expected: dict[str, float] = {}
        for run in group.runs:
            expected.update(run.result.get("expected") or {})
        for name, value in expected.items():
            ours = gather.spread(group, name)
            gap = f"{ours.mean - value:+.4f}" if ours.mean is not None else "–"
            stated.append([group.label, name, f"{value:.4f}", ours.text(), gap])
    if stated:
        section.tables.append(
            Table(
                "published", "Stated by the configuration" if rows else "",
                ["configuration", "metric and protocol", "published", "ours", "difference"], stated,
                "A metric's protocol stands in brackets; numbers of two protocols are not comparable.",
            )
        )  # fmt: skip
    return section


def _ledger(runs: Sequence[Run]) -> tuple[list[list[str]], list[str]]:
    """The ledger's published numbers for the configs of these runs, and what there is to say of the others."""
    named = list(dict.fromkeys(n for r in runs for n in r.info.get("plugins") or {}))
    if not named:
        return [], []
    from core import claims, registry
    from repro import claims as ledger

    rows: list[list[str]] = []
    noted: list[str] = []
    for name in named:
        try:
            numbers = claims.published_of(name)
        except (KeyError, registry.PluginError) as error:
            noted.append(f"The published numbers of {name} cannot be read: {error}")
            continue
        wanted = {gather.canonical(n.config) for n in numbers}
        evidence = [ledger.of_run(r) for r in runs if gather.canonical(r.config) in wanted]
        here = {gather.canonical(e.config) for e in evidence}
        aside: dict[str, str] = {}
        for number in numbers:
            if gather.canonical(number.config) not in here:
                continue
            row = ledger.compared(number, evidence)
            aside |= row.aside
            rows.append([number.id, number.metric, row.expected, row.found or "–", row.note or "–", row.standing, number.source])
        for why, count in Counter(aside.values()).most_common():
            noted.append(f"{count} of the runs {'does' if count == 1 else 'do'} not count: {why}.")
        if numbers and not here:
            files = ", ".join(dict.fromkeys(n.config for n in numbers))
            noted.append(f"No run here is of a configuration that {name} has published numbers for ({len(numbers)}, of {files}).")
    return rows, noted


def comparison(families: Families, baseline: str | None = None) -> Section:
    """Paired tests of every configuration against the baseline, or else the best, over common seeds."""
    section = Section("significance", f"Differences from {baseline or 'the best configuration'}")
    for groups, metrics in families:
        if metrics:
            _compare(section, groups, metrics[0], baseline)
    return section


def _compare(section: Section, groups: Sequence[Group], metric: str, baseline: str | None) -> None:
    """Add the comparison by one metric to a section, where there is one."""
    means = [(g, m) for g in groups if (m := gather.spread(g, metric).mean) is not None]
    if baseline is None:
        found = gather.best(groups, metric)
    else:
        found = [g for g, _ in means if g.label == baseline]
    if len(means) < 2 or not found:
        return
    against = found[0]
    tested = [(g, m, *gather.paired(g, against, metric)) for g, m in means if g is not against]
    values = [p for *_, p, _ in tested if p is not None]
    corrected = iter(gather.holm(values))
    mean = gather.spread(against, metric).mean
    assert mean is not None
    rows = []
    for group, value, p, pairs in tested:
        shown = ["–", "–"] if p is None else [f"{p:.3g}", f"{next(corrected):.3g}"]
        rows.append([group.label, f"{value - mean:+.4f}", str(pairs), *shown])
    section.paragraphs.append(
        f"{'Compared with' if baseline else 'Best by ' + metric + ':'} {against.label}. Two-sided paired t-test over common seeds; "
        "the last column is corrected for the number of comparisons (Holm)."
        + (
            ""
            if baseline
            else " The best of several is best partly by luck: --baseline NAME tests against a configuration of your choice."
        )
        + (" With so few seeds only large and steady differences can show." if all(t[3] < 6 for t in tested) else "")
    )
    columns = ["configuration", f"difference in {metric}", "pairs", "p", "p, corrected"]
    section.tables.append(Table("significance", "", columns, rows))


def states(runs: Sequence[Run]) -> Section:
    """What did not finish, and why."""
    section = Section("states", "States")
    counts = Counter(r.state for r in runs)
    if set(counts) == {"finished"}:
        return section
    section.paragraphs.append(", ".join(f"{n} {state}" for state, n in counts.most_common()))
    rows = [
        [
            r.path.name,
            r.state,
            f"{r.status.step}/{r.status.steps}" if r.status else "–",
            (r.status.message if r.status else "no status.json")[:300],
        ]
        for r in runs
        if r.state != "finished"
    ]
    section.tables.append(
        Table("states", "", ["run", "state", "step", "why"], rows[:200], "" if len(rows) <= 200 else f"{len(rows) - 200} more")
    )
    return section


def own_tables(groups: Sequence[Group]) -> Section:
    """The tables that the runs printed; over seeds each number is a mean with its spread."""
    several = sum(len(g.runs) for g in groups) > 1
    section = Section("runs", "Tables of the runs" if several else "Tables of the run")
    made: dict[str, list[Table]] = {}
    for group in groups[:DETAILED]:
        for number, (title, table) in enumerate(_merged(group).items()):
            table.key = f"run-{_slug(group.label)}-{number}"
            table.title = f"{title}: {group.label}" if len(groups) > 1 else title
            table.folded = len(groups) > 1
            made.setdefault(title, []).append(table)
    section.tables += [table for tables in made.values() for table in tables]
    if not several and groups:
        section.tables += _progress(groups[0].runs[0])
    if any(len(g.counted) > 1 for g in groups) and section.tables:
        section.paragraphs.append("Numbers that differ between seeds are mean ± sample standard deviation.")
    if len(groups) > DETAILED:
        section.paragraphs.append(f"The first {DETAILED} of {len(groups)} configurations; give run folders to see others.")
    return section


def _progress(run: Run) -> list[Table]:
    """The headline metrics before training, at its end, and at the evaluation called best."""
    first, best = run.result.get("first") or {}, run.result.get("best") or {}
    names = [n for n in gather.headline_metrics([run]) if n in first or n in best]
    if not names:
        return []
    rows = [[n, show.cell(first.get(n)), show.cell(run.metrics.get(n)), show.cell(best.get(n))] for n in names]
    chosen = run.effective.get(gather.SELECT_KEY, "None").strip("'\"")
    note = "Best: the last, as no metric selects it." if chosen == "None" else f"Best: by {chosen}, on the evaluation's own data."
    return [
        Table(
            "progress", "progress", ["metric", "untrained", "last", f"best (step {run.result.get('best_step', '–')})"], rows, note
        )
    ]


def _merged(group: Group) -> dict[str, Table]:
    """A group's tables by title: each number as mean ± standard deviation over the runs that have a table of the same form."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for run in group.counted:
        for found in run.result.get("tables") or []:
            by_title.setdefault(found["title"], []).append(found)
    made = {}
    for title, same in by_title.items():
        first = same[0]
        form = (first["columns"], [row[0] if row and isinstance(row[0], str) else len(row) for row in first["rows"]])
        alike = [t for t in same if (t["columns"], [r[0] if r and isinstance(r[0], str) else len(r) for r in t["rows"]]) == form]
        rows = [
            [_over([t["rows"][i][j] if j < len(t["rows"][i]) else None for t in alike]) for j in range(len(row))]
            for i, row in enumerate(first["rows"])
        ]
        notes = [first.get("note", "")]
        if len(alike) < len(group.counted):
            notes.append(f"{len(alike)} of {len(group.counted)} runs.")
        made[title] = Table("", title, [str(c) for c in first["columns"]], rows, " ".join(filter(None, notes)))
    return made


def _over(values: Sequence[Any]) -> str:
    """One cell of several runs: the value where all have it, mean ± standard deviation where numbers differ."""
    if all(v == values[0] for v in values):
        return show.cell(values[0])
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if not numbers:
        return "; ".join(dict.fromkeys(show.cell(v) for v in values))
    deviation = f" ± {show.cell(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
    missing = f" (n={len(numbers)})" if len(numbers) < len(values) else ""
    return show.cell(float(statistics.fmean(numbers))) + deviation + missing


def _digits(value: float, decimals: int) -> str:
    """With that many decimals; what would be cut to fewer than two digits by them has three digits instead."""
    return f"{value:.{decimals}f}" if value == 0 or value >= 10 ** (1 - decimals) else f"{value:.3g}"


def costs(groups: Sequence[Group]) -> Section:
    """FLOPs, parameters, latency and what token reduction buys, from profile.json."""
    section = Section("cost", "Cost")
    rows: list[list[str]] = []
    without: list[str] = []
    profiled: list[tuple[Group, Run]] = []
    for group in groups[:COST_GROUPS]:
        run = next((r for r in group.runs if r.profile.get("model")), None)
        if run is None:
            without.append(group.label)
            continue
        profiled.append((group, run))
        model = run.profile["model"]
        latency, macs = model.get("latency") or {}, model.get("macs")
        timed = f"{1e3 * latency['median_s']:.2f} ({1e3 * latency['low_s']:.2f}–{1e3 * latency['high_s']:.2f})" if latency else "–"
        rows.append([
            group.label if len(groups) > 1 else run.path.name, *((_digits(macs / 1e9, 4), _digits(2 * macs / 1e9, 4)) if macs is not None else ("–", "–")),
            f"{model['parameters']:,}", _digits(model['activation_bytes'] / 2**20, 1), timed, str(latency.get("n", "–")),
            str(model.get("device", "–")), f"{model['coverage']:.1%}",
        ])  # fmt: skip
    if rows:
        columns = ["model", "GMACs", "GFLOPs", "parameters", "activations MiB", "latency ms (quartiles)", "n", "device", "coverage"]
        note = "1 MAC is 2 FLOPs. One input. Coverage: share of operator calls whose cost is known by formula; an operator that multiplies matrices and has none is an error."
        if len(rows) > 1:
            note += " Latencies were measured at the end of each run, whatever else its machine did then: compare MACs, and time again what matters."
        section.tables.append(Table("cost", "", columns, rows, note))
        if without:
            section.paragraphs.append(f"No profile: {', '.join(without[:DETAILED])}" + (" …" if len(without) > DETAILED else ""))
    elif groups:
        section.paragraphs.append("– (no run has a profile; runs are profiled at their end unless --no-profile is given)")
    if len(profiled) == 1:
        section.tables += _anatomy(profiled[0][1].profile["model"])
    seen: set[str] = set()
    for group, run in profiled[:DETAILED]:
        found = run.profile.get("compression")
        kind = json.dumps([found["tokens"], found["scopes"]]) if found else ""
        if found and kind not in seen:
            seen.add(kind)
            section.tables += _compressed(found, group.label if len(groups) > 1 else "")
    return section


def _anatomy(model: dict[str, Any]) -> list[Table]:
    """Where the cost sits: by module (two levels deep) and by operator."""
    whole = model.get("macs") or 0
    modules = [
        [("\u2003" * m["name"].count(".") + m["name"].rpartition(".")[2]) if m["name"] else "(whole)", m["type"], f"{m['calls']:,}", f"{m['macs']:,}",
         f"{m['macs'] / whole:.1%}" if whole else "–", f"{m['parameters']:,}", f"{m['activation_bytes'] / 2**20:.2f}"]
        for m in model.get("modules", []) if m["name"].count(".") < 2 and (m["macs"] or m["parameters"])
    ]  # fmt: skip
    operators = [
        [o["name"], o["kind"], f"{o['calls']:,}", f"{o['macs']:,}", f"{o['elements'] or o['elementwise'] or o['norms']:,}"]
        for o in model.get("operators", [])
    ]
    return [
        Table("modules", "By module", ["module", "type", "calls", "MACs", "share", "parameters", "activations MiB"], modules, folded=True),
        Table("operators", "By operator", ["operator", "class", "calls", "MACs", "elements"], operators,
              "Operators of the comparison class (sort, topk, gather, softmax) are counted by calls and elements, never as MACs.", folded=True),
    ]  # fmt: skip


def _compressed(found: dict[str, Any], label: str) -> list[Table]:
    """Tokens by stage with both ratios, and costs without and with token reduction, with the verdict on the promise."""
    from core.profile import Compression

    read = Compression.from_dict(found)
    name, of = f"-{_slug(label)}" if label else "", f": {label}" if label else ""
    tokens = [[*row[:4], row[4] or "–"] for row in read.token_rows()]
    for module, report in read.tokens.items():
        what = "masked: nothing is dropped" if report.masked else "gathered: the dropped are gone"
        beside = (
            f"{report.ratio_with_class:.1%} with {report.class_tokens} on both sides, {report.ratio_with_class_out:.1%} with it at the end only"
            if report.class_tokens
            else "the same: none passes this module"
        )
        tokens.append([module or "model", f"ratio without class token ({what})", str(report.tokens_out), f"{report.ratio:.1%}", ""])
        tokens.append([module or "model", f"ratio with class token ({beside})", str(report.tokens_out + report.class_tokens), f"{report.ratio_with_class:.1%}", ""])  # fmt: skip
    note = "" if read.over_inputs else "Counted on one input, which stands for all where the path does not depend on the data."
    columns = ["", f"without ({read.before})", f"with ({read.after})", "with / without"]
    costs = [list(row) for row in read.rows()]
    if not read.over_inputs:
        costs.append(["MACs over several inputs (min / mean / max)", "–", "–", "–"])
    return [
        Table(f"tokens{name}", f"Tokens{of}", ["module", "stage", "tokens", "of tokens in", "over several inputs"], tokens, note),
        Table(f"compression{name}", f"Token reduction{of}", columns, costs, read.verdict),
    ]


def claimed(found: dict[str, Any]) -> Section:
    """Claims with verdicts, as `repro verify --json` wrote them."""
    section = Section("claims", "Claims")
    stated = found.get("claims", [])
    if stated:
        counts = Counter(c["verdict"] for c in stated)
        section.paragraphs.append(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
        rows = [[c["id"], c["statement"], c["verdict"], c["measured"], c["why"], c["source"]] for c in stated]
        section.tables.append(Table("claims", "", ["claim", "statement", "verdict", "measured", "so", "source"], rows))
    cases = found.get("golden", [])
    if cases:
        section.paragraphs.append(f"{sum(bool(c['passed']) for c in cases)} of {len(cases)} golden cases agree.")
    return section


def asked(groups: Sequence[Group]) -> Section:
    """What was asked, what ran, where it ran, what sets configurations apart, and what was not committed."""
    section = Section("provenance", "What was asked, what ran, and where")
    runs = [r for g in groups for r in g.runs]
    varied = sorted({k for g in groups for k in g.differing})
    if len(groups) > 1 and varied and len(groups) <= DETAILED:
        rows = [[key, *(g.differing.get(key, "default") for g in groups)] for key in varied[:40]]
        note = f"{len(varied) - 40} more" if len(varied) > 40 else ""
        section.tables.append(
            Table("settings", "What sets the configurations apart", ["parameter", *(g.label for g in groups)], rows, note)
        )
    rows = []
    for group in groups:
        for run in group.runs if len(rows) < 5 * DETAILED else ():
            source, environment = run.info.get("source", {}), run.info.get("environment", {})
            commit = (source.get("commit") or "–")[:12] + (
                "" if source.get("clean") else " with changes" if source.get("clean") is False else ""
            )
            hardware = ", ".join(environment.get("accelerators") or []) or f"CPU, {environment.get('cpu_count', '?')} cores"
            torch = environment.get("versions", {}).get("torch", "–")
            data = [str(run.data.get("name", "–")), str(run.data.get("fingerprint", "–"))]
            rows.append([run.path.name, group.label, run.seed, run.state, _took(run), commit, torch, hardware, *data])
    columns = ["run", "configuration", "seed", "state", "took", "commit", "torch", "hardware", "data", "data fingerprint"]
    if len(groups) == 1:
        columns, rows = [columns[0], *columns[2:]], [[row[0], *row[2:]] for row in rows]
    section.tables.append(
        Table("provenance", "Runs", columns, rows, f"{len(runs) - len(rows)} more" if len(runs) > len(rows) else "")
    )
    for group in groups[:DETAILED]:
        run = group.runs[0]
        whose = f"{group.label}, {run.path.name}" if len(groups) > 1 else run.path.name
        for name, title in (("config.gin", "asked"), ("operative.gin", "ran")):
            text = run.text(name)
            section.folds.append(Fold(f"{whose}: {title} ({name})", _cut(text) if text else "– (the run has no such file)"))
    for text, names in _environments(runs).items():
        section.folds.append(Fold(f"environment of {names}", text))
    changes: dict[str, list[str]] = {}
    for run in runs[: 5 * DETAILED]:
        if text := run.text("diff.patch"):
            changes.setdefault(text, []).append(run.path.name)
    for text, those in list(changes.items())[:DETAILED]:
        section.folds.append(Fold(f"uncommitted changes of {_listed(those)} (diff.patch)", _cut(text)))
    return section


def _took(run: Run) -> str:
    seconds = record.seconds(run.path)
    return "–" if seconds is None else duration(seconds)


def _environments(runs: Sequence[Run]) -> dict[str, str]:
    """Command, versions, machine and plugins as text, with the runs that share them."""
    found: dict[str, list[str]] = {}
    for run in runs[: 5 * DETAILED]:
        environment = run.info.get("environment", {})
        lines = [f"{k:<16} {v}" for k, v in environment.get("versions", {}).items()]
        lines += [f"{k:<16} {environment[k]}" for k in ("platform", "cpu_count", "threads", "accelerators") if k in environment]
        lines += [f"{k:<16} {v}" for k, v in environment.get("variables", {}).items()]
        for name, plugin in (run.info.get("plugins") or {}).items():
            lines.append(f"plugin {name}: {plugin.get('distribution')} {plugin.get('version')}, sha256 {plugin.get('sha256')}")
        if lines:
            if len(runs) == 1:
                lines.insert(0, f"{'command':<16} {shlex.join(run.info.get('command', []))}")
            found.setdefault("\n".join(lines), []).append(run.path.name)
    return {text: _listed(names) for text, names in list(found.items())[:DETAILED]}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _cut(text: str) -> str:
    return text if len(text) < TEXT else text[:TEXT] + "\n… cut"


# --- figures ------------------------------------------------------------------------------------------------------------

Points = list[tuple[int, float]]


def _svg(draw: Callable[[Any], None], width: float = 6.0, height: float = 3.6) -> str:
    """An SVG as a data address: transparent, with letters that are read on white and on black."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    ink: dict[Any, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({"svg.hashsalt": "repro", "font.size": 11, **ink}):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _thinned(points: Points) -> Points:
    step = max(1, len(points) // CURVE_POINTS)
    return points[::step] + ([points[-1]] if points and (len(points) - 1) % step else [])


def _smoothed(points: Points, width: int) -> Points:
    """Running mean over `width` points, each put at the last of them."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    return [(points[i][0], (sums[i + 1] - sums[i + 1 - width]) / width) for i in range(width - 1, len(points))]


def _series(run: Run, name: str, *, evaluated: bool = False) -> Points:
    """Steps and finite values of a name in `metrics.jsonl`: of the training steps, or of the evaluations."""
    rows = [(r["step"], (r.get("eval") or {}) if evaluated else r) for r in run.rows if "step" in r]
    found = [(step, row.get(name)) for step, row in rows]
    return [(s, float(v)) for s, v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]


def _band(runs: Sequence[Points]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that every run has, with mean, smallest and largest value."""
    by_step = [dict(points) for points in runs]
    steps = [s for s, _ in runs[0] if all(s in one for one in by_step)]
    values = [[one[s] for one in by_step] for s in steps]
    return steps, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


_DASHES = ("-", "--", "-.", ":")


def _plot(lines: Sequence[tuple[str, Sequence[Points]]], title: str, *, logarithmic: bool = False) -> Figure | None:
    """One line a label: the mean over its runs with their range shaded. None without a curve of two points."""
    # Numbered before any is left out: a configuration looks the same in every figure.
    looks = {label: (f"C{number}", _DASHES[number % len(_DASHES)]) for number, (label, _) in enumerate(lines)}
    lines = [(label, [p for p in runs if len(p) > 1]) for label, runs in lines]
    lines = [(label, runs) for label, runs in lines if runs]
    if not lines:
        return None
    longest = max(len(p) for _, runs in lines for p in runs)
    rough = any(
        sum(abs(b - a) for a, b in itertools.pairwise(ys)) > 3 * (max(ys) - min(ys))
        for ys in ([y for _, y in p] for _, of in lines for p in of)
    )
    width = longest // 30 if longest > 60 and rough else 1
    caption = f"{title} over steps"
    if any(len(runs) > 1 for _, runs in lines):
        caption += ", mean and range over seeds"
    if width > 1:
        caption += f", running mean of {width} logged steps"

    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        for label, runs in lines:
            colour, dash = looks[label]
            kept = [_thinned(_smoothed(p, width) if len(p) > 2 * width else p) for p in runs]
            steps, mean, low, high = _band(kept)
            axes.plot(
                steps,
                mean,
                color=colour,
                label=label[:60],
                linewidth=1.5,
                linestyle=dash,
                marker="o" if longest < 12 else "",
                markersize=3,
            )
            if len(runs) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            elif len(lines) == 1 and width > 1:
                axes.plot(*zip(*_thinned(runs[0])), color=colour, alpha=0.3, linewidth=0.7)
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        heights = [y for _, runs in lines for p in runs for _, y in p]
        if logarithmic and min(heights) > 0 and max(heights) > 10 * min(heights):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(lines) > 1:
            axes.figure.legend(
                loc="outside lower center", ncols=2 if max(len(n) for n, _ in lines) < 32 else 1, fontsize=9, frameon=False
            )

    return Figure(caption, _svg(draw, height=3.6 + (0.22 * len(lines) if len(lines) > 1 else 0)))


def curves(families: Families) -> Section:
    """Loss, its terms and evaluations over steps: a line a configuration, mean and range over seeds."""
    section = Section("curves", "Curves")
    for groups, _ in families:
        figures = _curves(groups)
        if len(families) > 1:
            figures = [dataclasses.replace(f, caption=f"{f.caption} ({_listed([g.label for g in groups])})") for f in figures]
        section.figures += figures
        if len(groups) > CURVE_GROUPS:
            section.paragraphs.append(f"The first {CURVE_GROUPS} of {len(groups)} configurations.")
    if not section.figures:
        section.paragraphs.append("– (no run has a log)")
    return section


def _curves(groups: Sequence[Group]) -> list[Figure]:
    """The curves of configurations that have metrics in common."""
    drawn = [(g.label, [r for r in g.counted[:CURVE_SEEDS] if r.rows]) for g in groups[:CURVE_GROUPS]]
    drawn = [(label, runs) for label, runs in drawn if runs]
    if not drawn:
        return []

    def lines(name: str, *, evaluated: bool = False) -> list[tuple[str, list[Points]]]:
        return [(label, [_series(run, name, evaluated=evaluated) for run in runs]) for label, runs in drawn]

    first = drawn[0][1][0]
    names = list(dict.fromkeys(n for row in first.rows[:50] for n in row if n not in ("step", "loss", "eval")))
    terms = [n for n in names if n.startswith("loss/")]
    metrics = gather.headline_metrics([r for _, runs in drawn for r in runs], most=4)
    figures = [_plot(lines("loss"), "loss", logarithmic=True)]
    if len(drawn) == 1:
        runs = drawn[0][1]
        figures.append(
            _plot([(n.removeprefix("loss/"), [_series(r, n) for r in runs]) for n in terms], "loss terms", logarithmic=True)
        )
        scores = [(n, [_series(r, n, evaluated=True) for r in runs]) for n in metrics]
        if all(0 <= y <= 1 for _, of in scores for points in of for _, y in points):
            figures.append(_plot(scores, "evaluation"))
        else:
            figures += [_plot([score], f"{score[0]}, evaluated") for score in scores]
    else:
        figures += [_plot(lines(n, evaluated=True), f"{n}, evaluated") for n in metrics]
        figures += [_plot(lines(n), n) for n in terms[:6] if len(terms) > 1]
    figures += [_plot(lines(n), n) for n in [n for n in names if n not in terms][: 8 if len(drawn) == 1 else 4]]
    return [f for f in figures if f is not None]


def pictures(groups: Sequence[Group]) -> Section:
    """What the tasks drew, embedded: of the first run of each configuration."""
    section = Section("pictures", "Pictures")
    for group in groups[:DETAILED]:
        run = next((r for r in group.runs if (r.path / "pictures").is_dir()), None)
        if run is None:
            continue
        for path in sorted((run.path / "pictures").glob("*.png"))[: 12 if len(groups) == 1 else 2]:
            data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            said = f"{path.stem}, {run.path.name}" if len(groups) == 1 else f"{path.stem}: {group.label}, {run.path.name}"
            section.figures.append(Figure(said, data))
    return section


# --- the three forms ------------------------------------------------------------------------------------------------------


def render(page: Sequence[Section], runs: Sequence[Run], title: str, command: str) -> str:
    """The HTML page. Everything in it is escaped; nothing is fetched."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    finished = sum(bool(r.metrics) for r in runs)
    files = sorted({r.config for r in runs})
    said = f"{len(runs)} runs, {finished} with results, from {_listed(files)}"
    if len(runs) == 1:
        run = runs[0]
        steps = f"step {run.status.step} of {run.status.steps}" if run.status else "no status"
        said = ", ".join([run.config, *run.info.get("overrides", []), f"seed {run.seed}", run.state, steps])
    names = sorted({str(r.data.get("name")) for r in runs[:200] if r.data.get("sample")})
    samples = f"Figures of {', '.join(names)} say nothing about the published data sets." if names else ""
    return environment.get_template("report.html.j2").render(
        title=title, summary=said, samples=samples, sections=page, command=command
    )


def markdown(page: Sequence[Section], title: str) -> str:
    """The same tables as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    parts = [f"# {title}", ""]
    for section in page:
        if not (section.tables or section.paragraphs):
            continue
        parts += [f"## {section.title}", "", *(p + "\n" for p in section.paragraphs)]
        for table in section.tables:
            if table.title:
                parts += [f"### {table.title}", ""]
            parts += [line(table.columns), line(["---:" if i in table.numeric else "---" for i in range(len(table.columns))])]
            for i, row in enumerate(table.rows):
                parts.append(line([f"**{c}**" if i in table.best and c else c for c in row]))
            parts += ["", *([table.note, ""] if table.note else [])]
    return "\n".join(parts)


def as_csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return buffer.getvalue()


if __name__ == "__main__":
    from repro.cli import verb

    sys.exit(verb("report"))
