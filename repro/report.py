"""One self-contained HTML page of runs, and the same tables in Markdown and CSV.

    repro report runs/sdtps_rgbnt-1a2b3c4d            one run
    repro report runs --out report                    every run below a folder, grouped by configuration, seeds together

The page needs no network and no script. What a run folder lacks is shown as a gap. Means are over seeds, with n.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core import record
from repro import gather, show
from repro.gather import Group, Run

DETAILED = 12  # runs whose own tables, pictures and configs are on the page
CURVE_GROUPS = 12
CURVE_POINTS = 400


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
    parser.add_argument("--claims", metavar="FILE", help="outcome of `repro verify --json FILE`, to be shown with verdicts")


@dataclasses.dataclass
class Table:
    """A table of the page. `key` names its CSV file; `best` marks rows."""

    key: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    best: set[int] = dataclasses.field(default_factory=set)

    @property
    def numeric(self) -> set[int]:
        def number(text: str) -> bool:
            return (text[:1] in "0123456789-–+" and any(ch.isdigit() for ch in text)) or text in ("–", "")

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
    runs = gather.collect(args.runs)
    out = Path(args.out)
    page = build(runs, args.metric, record.read_json(Path(args.claims)) if args.claims else {})
    title = args.title or (f"Run {runs[0].path.name}" if len(runs) == 1 else f"{len(runs)} runs")
    command = " ".join(["repro report", *args.runs])
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(render(page, runs, title, command), encoding="utf-8")
    (out / "tables.md").write_text(markdown(page, title), encoding="utf-8")
    tables = [t for s in page for t in s.tables]
    for table in tables:
        (out / f"{table.key}.csv").write_text(as_csv(table), encoding="utf-8")
    print(f"{out / 'index.html'}: {len(runs)} runs, {len(tables)} tables, {sum(len(s.figures) for s in page)} figures")
    return 0


def build(runs: Sequence[Run], metrics: Sequence[str] = (), claims: dict[str, Any] | None = None) -> list[Section]:
    """The sections of a page, without those that would be empty."""
    groups = gather.groups(runs)
    chosen = list(metrics) or gather.headline_metrics(runs)
    known = {n for r in runs for n in r.metrics}
    unknown = [m for m in chosen if known and m not in known]
    if unknown:
        raise ValueError(f"no run has a metric {unknown[0]!r}; there are {', '.join(sorted(known)[:20])}")
    sections = [
        summary(groups, chosen), curves(groups), comparison(groups, chosen), states(runs), own_tables(runs), costs(runs), pictures(runs),
        claimed(claims or {}), asked(runs),
    ]  # fmt: skip
    return [s for s in sections if not s.empty]


# --- sections -----------------------------------------------------------------------------------------------------------


def summary(groups: Sequence[Group], metrics: Sequence[str]) -> Section:
    """Every configuration with mean and spread over its seeds, the published value beside ours, the best marked."""
    section = Section("summary", "Results")
    rows, means = [], []
    for group in groups:
        spreads = [gather.spread(group, m) for m in metrics]
        rows.append([group.label, str(len(group.runs)), *(s.text() for s in spreads)])
        means.append([s.mean for s in spreads])
    best: set[int] = set()
    if len(groups) > 1 and metrics:
        first = [(m[0], i) for i, m in enumerate(means) if m[0] is not None]
        if first:
            best = {(min if gather.lower_is_better(metrics[0]) else max)(first)[1]}
    note = "mean ± sample standard deviation over seeds (n of them); – is a gap, never a zero"
    if best:
        note += f". Marked: best by {metrics[0]}"
    section.tables.append(Table("summary", "", ["configuration", "runs", *metrics], rows, note, best))
    published = []
    for group in groups:
        expected: dict[str, float] = {}
        for run in group.runs:
            expected.update(run.result.get("expected") or {})
        for name, value in expected.items():
            ours = gather.spread(group, name)
            gap = f"{ours.mean - value:+.4f}" if ours.mean is not None else "–"
            published.append([group.label, name, f"{value:.4f}", ours.text(), gap])
    if published:
        section.tables.append(
            Table(
                "published",
                "Published values",
                ["configuration", "metric and protocol", "published", "ours", "difference"],
                published,
                "A metric's protocol stands in brackets; numbers of two protocols are not comparable.",
            )
        )
    return section


def comparison(groups: Sequence[Group], metrics: Sequence[str]) -> Section:
    """Paired tests of every configuration against the best, over common seeds."""
    section = Section("significance", "Differences from the best configuration")
    if len(groups) < 2 or not metrics:
        return section
    metric = metrics[0]
    scored = [(g, gather.spread(g, metric).mean) for g in groups]
    ranked = [(g, m) for g, m in scored if m is not None]
    if len(ranked) < 2:
        return section
    top, mean = (min if gather.lower_is_better(metric) else max)(ranked, key=lambda pair: pair[1])
    rows = []
    for group, value in ranked:
        if group is top:
            continue
        p, pairs = gather.paired(top, group, metric)
        rows.append([group.label, f"{value - mean:+.4f}", str(pairs), "–" if p is None else f"{p:.3g}"])
    section.paragraphs.append(
        f"Best by {metric}: {top.label}. Paired t-test over common seeds, two-sided, not corrected for the number of comparisons."
    )
    section.tables.append(Table("significance", "", ["configuration", f"difference in {metric}", "pairs", "p"], rows))
    return section


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


def own_tables(runs: Sequence[Run]) -> Section:
    """The tables that each run printed."""
    section = Section("runs", "Tables of the runs")
    for run in runs[:DETAILED]:
        for number, found in enumerate(run.result.get("tables") or []):
            rows = [[show.cell(v) for v in row] for row in found["rows"]]
            title = found["title"] if len(runs) == 1 else f"{run.path.name}: {found['title']}"
            section.tables.append(
                Table(f"run-{run.path.name}-{number}", title, [str(c) for c in found["columns"]], rows, found.get("note", ""))
            )
    if len(runs) > DETAILED:
        section.paragraphs.append(f"The first {DETAILED} of {len(runs)} runs; give one run folder to see another's tables.")
    return section


def costs(runs: Sequence[Run]) -> Section:
    """FLOPs, parameters, latency and what token reduction buys, from profile.json."""
    section = Section("cost", "Cost")
    rows: list[list[str]] = []
    seen: set[Any] = set()
    for run in runs:
        model = run.profile.get("model") if len(seen) < 200 else None
        if not model:
            continue
        latency = model.get("latency") or {}
        macs = model["modules"][0]["macs"] if model.get("modules") else None
        key = (run.config, macs, model.get("parameters"))
        if key in seen:
            continue
        seen.add(key)
        rows.append([
            gather.groups([run])[0].label if len(runs) > 1 else run.path.name, f"{macs / 1e9:.4f}" if macs is not None else "–",
            f"{2 * macs / 1e9:.4f}" if macs is not None else "–", f"{model['parameters']:,}", f"{model['activation_bytes'] / 2**20:.1f}",
            f"{1e3 * latency['median_s']:.2f}" if latency else "–", str(model.get("device", "–")), f"{model['coverage']:.1%}",
        ])  # fmt: skip
    if rows:
        section.tables.append(
            Table("cost", "", ["model", "GMACs", "GFLOPs", "parameters", "activations MiB", "latency ms (median)", "device", "coverage"], rows,
                  "1 MAC is 2 FLOPs. Coverage: share of operator calls whose cost is known by formula; an operator that multiplies matrices and has none is an error.")
        )  # fmt: skip
    for run in runs[:DETAILED]:
        found = run.profile.get("compression")
        if not found:
            continue
        lines = [
            [s["scope"], "–" if s["macs_before"] is None else f"{s['macs_before']:,}", "–" if s["macs_after"] is None else f"{s['macs_after']:,}",
             f"{s['macs_after'] / s['macs_before']:.4f}" if s["macs_before"] and s["macs_after"] is not None else "new"]
            for s in found["scopes"]
        ]  # fmt: skip
        section.tables.append(
            Table(
                f"compression-{run.path.name}",
                f"Token reduction: {run.path.name}",
                ["scope", "MACs without", "MACs with", "ratio"],
                lines,
                found.get("verdict", ""),
            )
        )
        if len(runs) > 1:
            break
    return section


def claimed(found: dict[str, Any]) -> Section:
    """Claims with verdicts, as `repro verify --json` wrote them."""
    section = Section("claims", "Claims")
    rows = [[c["id"], c["statement"], c["verdict"], c["measured"], c["why"]] for c in found.get("claims", [])]
    if rows:
        section.tables.append(Table("claims", "", ["claim", "statement", "verdict", "measured", "so"], rows))
    return section


def asked(runs: Sequence[Run]) -> Section:
    """What was asked and what ran, where it ran, and what was not committed."""
    section = Section("provenance", "What was asked, what ran, and where")
    rows = []
    for run in runs[:DETAILED]:
        source, environment = run.info.get("source", {}), run.info.get("environment", {})
        commit = (source.get("commit") or "–")[:12] + (
            "" if source.get("clean") else " with changes" if source.get("clean") is False else ""
        )
        versions = environment.get("versions", {})
        hardware = ", ".join(environment.get("accelerators") or []) or f"CPU, {environment.get('cpu_count', '?')} cores"
        rows.append(
            [
                run.path.name,
                commit,
                run.seed,
                versions.get("torch", "–"),
                hardware,
                str(run.data.get("name", "–")),
                str(run.data.get("fingerprint", "–")),
            ]
        )
        if len(runs) <= 3:
            for name, title in (("config.gin", "asked"), ("operative.gin", "ran"), ("diff.patch", "uncommitted changes")):
                text = run.text(name)
                if text:
                    section.folds.append(
                        Fold(f"{run.path.name}: {title} ({name})", text if len(text) < 200_000 else text[:200_000] + "\n… cut")
                    )
    section.tables.append(Table("provenance", "", ["run", "commit", "seed", "torch", "hardware", "data", "data fingerprint"], rows))
    return section


# --- figures ------------------------------------------------------------------------------------------------------------


def _svg(draw: Callable[[Any], None], width: float = 6.0, height: float = 3.4) -> str:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "repro"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _thinned(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    step = max(1, len(points) // CURVE_POINTS)
    kept = points[::step] + ([points[-1]] if points and (len(points) - 1) % step else [])
    return [x for x, _ in kept], [y for _, y in kept]


def curves(groups: Sequence[Group]) -> Section:
    """Loss and evaluation over steps: one line a configuration (first seed with a log), loss terms for a single run."""
    section = Section("curves", "Curves")
    drawn = [(g.label, next((r for r in g.runs if r.rows), None)) for g in groups[:CURVE_GROUPS]]
    lines = [(label, run) for label, run in drawn if run is not None]
    if not lines:
        return section

    def scalar(name: str) -> list[tuple[str, list[tuple[int, float]]]]:
        found = []
        for label, run in lines:
            points = [(r["step"], r[name]) for r in run.rows if isinstance(r.get(name), (int, float))]
            if len(points) > 1:
                found.append((label, points))
        return found

    def evaluated(name: str) -> list[tuple[str, list[tuple[int, float]]]]:
        found = []
        for label, run in lines:
            points = [
                (r["step"], r["eval"][name]) for r in run.rows if "eval" in r and isinstance(r["eval"].get(name), (int, float))
            ]
            if points:
                found.append((label, points))
        return found

    def plot(series: list[tuple[str, list[tuple[int, float]]]], title: str, *, logarithmic: bool = False, marker: str = "") -> None:
        if not series:
            return

        def draw(axes: Any) -> None:
            for label, points in series:
                axes.plot(*_thinned(points), label=label[:60], linewidth=1.3, marker=marker, markersize=3)
            axes.set_xlabel("step")
            axes.set_ylabel(title)
            if logarithmic and all(y > 0 for _, points in series for _, y in points):
                axes.set_yscale("log")
            if len(series) > 1:
                axes.legend(fontsize=7)

        section.figures.append(Figure(f"{title} over steps", _svg(draw)))

    plot(scalar("loss"), "loss", logarithmic=True)
    single = lines[0][1]
    if len(lines) == 1:
        names = [n for n in (single.rows[0] if single.rows else {}) if n not in ("step", "loss")]
        terms = [
            (n, [(r["step"], r[n]) for r in single.rows if isinstance(r.get(n), (int, float))])
            for n in names
            if n.startswith("loss/")
        ]
        if len(terms) > 1:
            plot([t for t in terms if len(t[1]) > 1], "loss terms")
        for name in [n for n in names if not n.startswith("loss/")][:8]:
            plot([(name, s[0][1]) for s in [scalar(name)] if s], name)
    metrics = gather.headline_metrics([r for _, r in lines], most=4)
    for name in metrics:
        series = evaluated(name)
        if any(len(points) > 1 for _, points in series):
            plot(series, name, marker="o")
    if len(groups) > CURVE_GROUPS:
        section.paragraphs.append(f"The first {CURVE_GROUPS} of {len(groups)} configurations, one seed each.")
    return section


def pictures(runs: Sequence[Run]) -> Section:
    """What the tasks drew, embedded."""
    section = Section("pictures", "Pictures")
    for run in runs[:DETAILED] if len(runs) <= 3 else runs[:1]:
        folder = run.path / "pictures"
        for path in sorted(folder.glob("*.png"))[:12] if folder.is_dir() else []:
            data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            section.figures.append(Figure(f"{run.path.name}: {path.stem}", data))
    return section


# --- the three forms ------------------------------------------------------------------------------------------------------


def render(page: Sequence[Section], runs: Sequence[Run], title: str, command: str) -> str:
    """The HTML page. Everything in it is escaped; nothing is fetched."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    finished = sum(bool(r.metrics) for r in runs)
    said = f"{len(runs)} runs, {finished} with results, from {', '.join(sorted({r.config for r in runs})[:6])}"
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
