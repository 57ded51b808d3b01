"""Run folders read into tables: what `repro report`, `repro compare` and `repro claims` show. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core import record

SEED_KEY = "trainer.train.seed"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder. Small files are read at once, large ones when asked for."""

    path: Path
    info: Mapping[str, Any]
    result: Mapping[str, Any]
    status: record.Status | None

    @property
    def effective(self) -> Mapping[str, str]:
        found = self.info.get("effective")
        return found if isinstance(found, dict) else {}

    @property
    def seed(self) -> str:
        return str(self.effective.get(SEED_KEY, self.info.get("seed", 0)))

    @property
    def config(self) -> str:
        return str(self.info.get("config", "?"))

    @property
    def metrics(self) -> Mapping[str, float | None]:
        found = self.result.get("metrics")
        return found if isinstance(found, dict) else {}

    @property
    def state(self) -> str:
        if self.status is None:
            return "no status"
        return "lost" if self.status.lost else self.status.state

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return record.read_lines(self.path / "metrics.jsonl")

    @cached_property
    def data(self) -> dict[str, Any]:
        return record.read_json(self.path / "data.json")

    @cached_property
    def profile(self) -> dict[str, Any]:
        return record.read_json(self.path / "profile.json")

    def text(self, name: str) -> str:
        """A text file of the folder, empty where it is missing."""
        path = self.path / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read(path: Path) -> Run:
    """One run folder, with gaps where files are missing."""
    return Run(path, record.read_json(path / "run.json"), record.read_json(path / "result.json"), record.status(path))


def collect(places: Iterable[str]) -> list[Run]:
    """Every run below the given folders, each once.

    Raises:
        ValueError: if a place does not exist or none of them holds a run.
    """
    found: dict[Path, Run] = {}
    places = list(places)
    for place in places:
        root = Path(place)
        if not root.is_dir():
            raise ValueError(f"{place} is not a folder; give run folders, or folders of them")
        for path in record.runs(root):
            found.setdefault(path.resolve(), read(path))
    if not found:
        raise ValueError(f"no run folder below {', '.join(places)} (a run folder holds config.gin and status.json)")
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed. `label` says what sets the group apart from the others."""

    label: str
    differing: Mapping[str, str]
    runs: Sequence[Run]

    @property
    def finished(self) -> list[Run]:
        return [r for r in self.runs if r.metrics]

    def values(self, metric: str) -> dict[str, float]:
        """Finite values of a metric by seed."""
        found = {}
        for run in self.finished:
            value = run.metrics.get(metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[run.seed] = float(value)
        return found


_LABELLED = 6  # parameters named in a label


def _varied(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Parameters that do not have one value throughout, sorted."""
    values: dict[str, set[str | None]] = {}
    for number, one in enumerate(settings):
        for key in values.keys() - one.keys():
            values[key].add(None)
        for key, value in one.items():
            values.setdefault(key, set() if number == 0 else {None}).add(value)
    return sorted(k for k, v in values.items() if len(v) > 1)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration, seeds together; labels name only the parameters that differ between groups."""
    keys: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        bindings = tuple(sorted((k, v) for k, v in run.effective.items() if k != SEED_KEY))
        keys.setdefault((bindings, "" if bindings else str(run.path)), []).append(run)
    bound = [dict(bindings) for bindings, _ in keys]
    files = [members[0].config for members in keys.values()]
    varied = _varied(bound)
    # One file a variant needs no list of what it binds; within a file, short names of what varies are enough.
    within = {file: _varied([b for f, b in zip(files, bound) if f == file]) for file in dict.fromkeys(files)}
    made = []
    for members, settings, file in zip(keys.values(), bound, files):
        differing = {k: settings.get(k, "default") for k in varied}
        name = Path(file.rpartition(":")[2]).stem if len(within) > 1 or not differing else ""
        parts = [f"{k.rsplit('.', 1)[-1]} = {differing[k]}" for k in within[file]]
        if len(parts) > _LABELLED:
            parts = [*parts[:_LABELLED], f"… ({len(parts)} differ)"]
        label = "  ".join(filter(None, [name, ", ".join(parts)])) or members[0].path.name
        made.append(Group(label, differing, sorted(members, key=lambda r: r.seed)))
    return sorted(made, key=lambda g: g.label)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one value) and number of values; `missing` runs gave none."""

    mean: float | None
    deviation: float | None
    n: int
    missing: int

    def text(self, digits: int = 4) -> str:
        if self.mean is None:
            return f"– (0 of {self.missing})" if self.missing else "–"
        shown = f"{self.mean:.{digits}f}"
        if self.deviation is not None:
            shown += f" ± {self.deviation:.{digits}f}"
        return shown + (f" (n={self.n}, {self.missing} missing)" if self.missing else f" (n={self.n})" if self.n > 1 else "")


def spread(group: Group, metric: str) -> Spread:
    """A metric over a group's seeds. Runs without it are counted as missing, never silently left out."""
    values = list(group.values(metric).values())
    missing = len(group.runs) - len(values)
    if not values:
        return Spread(None, None, 0, missing)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values), missing)


def headline_metrics(runs: Sequence[Run], most: int = 8) -> list[str]:
    """Metrics to show first: those with a published value, then those named without a prefix, in the order of the results."""
    order: dict[str, int] = {}
    for run in runs:
        for name in run.metrics:
            order.setdefault(name, len(order))
    expected = {n for run in runs for n in (run.result.get("expected") or {})}
    plain = [n for n in order if "/" not in n]
    chosen = [n for n in order if n in expected] + [n for n in plain if n not in expected]
    return (chosen or list(order))[:most]


def paired(a: Group, b: Group, metric: str) -> tuple[float | None, int]:
    """p of a paired t-test over common seeds (two-sided) and the number of pairs; None with fewer than two pairs.

    Pairs without any spread of their differences have p 1 if they are equal and 0 if they all differ by the same amount.
    """
    one, two = a.values(metric), b.values(metric)
    seeds = sorted(one.keys() & two.keys())
    differences = [one[s] - two[s] for s in seeds]
    if len(differences) < 2:
        return None, len(differences)
    deviation = statistics.stdev(differences)
    mean = statistics.fmean(differences)
    if deviation == 0:
        return (1.0 if mean == 0 else 0.0), len(differences)
    from scipy import stats

    t = mean / (deviation / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1)), len(differences)


def lower_is_better(metric: str) -> bool:
    """Losses, errors and calibration figures fall; the field's other metrics rise."""
    name = metric.rsplit("/", 1)[-1].lower()
    return any(name.startswith(p) or f"_{p}" in name for p in ("loss", "error", "nll", "ece", "fpr", "false", "leak"))
