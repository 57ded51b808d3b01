"""Run folders read into tables: what `repro report`, `repro compare` and `repro claims` show. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import Any

from core import config as configs
from core import record, registry

SEED_KEY = "trainer.train.seed"
SELECT_KEY = "trainer.train.select"
MODE_KEY = "trainer.train.select_mode"

# What a folder's files must hold where a report looks; anything else there is a gap.
_NUMBERS = {"*": (int, float)}
_INFO = {
    "config": str, "seed": int, "overrides": [str], "command": [str], "effective": {"*": str}, "source": {"commit": str, "clean": bool},
    "environment": {"versions": {"*": str}, "variables": {"*": str}, "accelerators": [str], "cpu_count": int, "threads": int, "platform": str},
    "plugins": {"*": {"distribution": str, "version": str, "sha256": str}},
}  # fmt: skip
_RESULT = {
    "step": int, "best_step": int, "metrics": _NUMBERS, "best": _NUMBERS, "first": _NUMBERS, "expected": _NUMBERS,
    "tables": [{"title": str, "columns": [str], "rows": [list], "note": str}],
}  # fmt: skip


def _shaped(value: Any, form: Any) -> Any:
    """A value without what is not of its form, None where the whole is not. Names that a form does not know stay as they are."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return None
        kept = {k: _shaped(v, form.get(k, form.get("*", object))) for k, v in value.items()}
        return kept if form is _NUMBERS else {k: v for k, v in kept.items() if v is not None}  # a metric without a number is a gap
    if isinstance(form, list):
        return [v for one in value if (v := _shaped(one, form[0])) is not None] if isinstance(value, list) else None
    return value if isinstance(value, form) else None


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

    @cached_property
    def config(self) -> str:
        """The gin file that was asked for; of a run of a sweep the file of the sweep, not the sweep's own copy of it."""
        found = str(self.info.get("config", "?"))
        parts = Path(found).parts
        if parts[-2:-1] == ("base",) and parts[-4:-3] == ("sweeps",):
            asked = (r["gin"] for r in _sweep(self.path.parent / "sweeps" / parts[-3] / "sweep.json"))
            return next((gin for gin in asked if _stem(gin) == parts[-1].removesuffix(".gin")), found)
        return found

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
        """What metrics.jsonl says, row by row; a row without a step, or whose evaluation is no table of metrics, is a gap."""
        found = record.read_lines(self.path / "metrics.jsonl")
        return [r for r in found if isinstance(r.get("step"), int) and isinstance(r.get("eval", {}), dict)]

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
    """One run folder, with gaps where files or entries are missing or of another form."""
    info, result = (_shaped(record.read_json(path / f"{name}.json"), form) for name, form in (("run", _INFO), ("result", _RESULT)))
    result["tables"] = [t for t in result.get("tables") or [] if {"title", "columns", "rows"} <= t.keys()]
    return Run(path, info, result, record.status(path))


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

    @cached_property
    def counted(self) -> list[Run]:
        """The runs that count, one a seed: the first that has results, else the first."""
        found: dict[str, Run] = {}
        for run in self.runs:
            if run.seed not in found or (run.metrics and not found[run.seed].metrics):
                found[run.seed] = run
        return list(found.values())

    def values(self, metric: str) -> dict[str, float]:
        """Finite values of a metric by seed."""
        found = {run.seed: run.metrics.get(metric) for run in self.counted}
        return {s: float(v) for s, v in found.items() if isinstance(v, (int, float)) and math.isfinite(v)}

    @property
    def repeated(self) -> dict[str, bool]:
        """Seeds that were run more than once, and whether the results agree."""
        results: dict[str, list[Mapping[str, float | None]]] = {}
        for run in self.runs:
            results.setdefault(run.seed, []).append(run.metrics)
        return {seed: all(m == given[0] for m in given if m) for seed, given in results.items() if len(given) > 1}


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


def _stem(gin: str) -> str:
    return Path(gin.rpartition(":")[2]).stem


def canonical(config: str) -> str:
    """One name for a gin file, however it was asked for: `gin/sdtps/rgbnt201.gin`, `my_paper:base.gin`, or a path."""
    try:
        path = configs.locate(config).resolve()
    except configs.ConfigError:
        if config.partition(":")[0].isidentifier() and ":" in config:
            return config
        parts = PurePath(config).parts  # of another machine: what stands below its config folder
        roots = [i for i, part in enumerate(parts) if part in ("gin", "configs")]
        return "/".join(("gin", *parts[roots[-1] + 1 :])) if roots else config
    root = configs.config_root().resolve()
    if path.is_relative_to(root):
        return f"gin/{path.relative_to(root).as_posix()}"
    for owner in registry.plugins().values():
        inside = owner.folder.resolve() / "gin" if owner.folder else None
        if inside and path.is_relative_to(inside):
            return f"{owner.name}:{path.relative_to(inside).as_posix()}"
    return str(path)


def _names(files: Iterable[str]) -> dict[str, str]:
    """What to call each gin file: its stem, with as much of its path as sets it apart from the others."""
    parts = {file: PurePath(canonical(file).replace(":", "/")).with_suffix("").parts for file in files}
    often = Counter(p[-k:] for p in set(parts.values()) for k in range(1, len(p) + 1))
    return {file: "/".join(next((p[-k:] for k in range(1, len(p) + 1) if often[p[-k:]] == 1), p)) for file, p in parts.items()}


def _apart(groups: Sequence[Group]) -> list[Group]:
    """The groups, with the folder of the first run in the label of those that would be called alike."""
    often = Counter(g.label for g in groups)
    return [dataclasses.replace(g, label=f"{g.label} [{g.runs[0].path}]") if often[g.label] > 1 else g for g in groups]


@cache
def _sweep(path: Path) -> list[dict[str, Any]]:
    """The runs of a sweep's plan, those that say all that is asked of them here."""
    found = _shaped(record.read_json(path), {"runs": [{"name": str, "gin": str, "cells": [list]}]})
    return [r for r in found.get("runs", []) if {"name", "gin", "cells"} <= r.keys()]


def labels(runs: Iterable[Run]) -> dict[Path, str]:
    """Name of the setting of every run that a sweep made, as the sweep's table has it, by resolved run folder.

    A cell of the sweep's grid reads `NAME = value`, a preset its own name; a sweep over seeds alone is named after its gin file.
    """
    found: dict[Path, str] = {}
    for parent in dict.fromkeys(run.path.resolve().parent for run in runs):
        for path in sorted(parent.glob("sweeps/*/sweep.json")):
            planned: dict[Path, dict[str, None]] = {}
            for run in _sweep(path):
                cells = [value if name == "preset" else f"{name} = {value}" for name, value in run["cells"] if name != "SEED"]
                planned.setdefault(parent / run["name"], {})[", ".join(cells) or _stem(run["gin"])] = None
            found |= {folder: " = ".join(names) for folder, names in planned.items()}
    return found


def settings(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration as `groups` makes them, named and ordered as their sweeps name and order them.

    A configuration that no sweep made keeps the label of `groups` and comes last; so does one whose name another has too. One
    that was planned under several names, as a preset that changes nothing is, has them all: `file = baseline`.
    """
    named = labels(runs)
    order = {name: position for position, name in enumerate(dict.fromkeys(named.values()))}
    made = []
    for group in groups(runs):
        names = dict.fromkeys(named[run.path.resolve()] for run in group.runs if run.path.resolve() in named)
        made.append((" = ".join(names), min(map(order.__getitem__, names), default=len(order)), group))
    often = Counter(name for name, _, _ in made)
    ranked = [(name, group) for name, _, group in sorted(made, key=lambda one: one[1])]
    return _apart([dataclasses.replace(g, label=name) if name and often[name] == 1 else g for name, g in ranked])


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration, seeds together; labels name only the parameters that differ between groups."""
    keys: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        bindings = tuple(sorted((k, v) for k, v in run.effective.items() if k != SEED_KEY))
        keys.setdefault((bindings, "" if bindings else str(run.path)), []).append(run)
    bound = [dict(bindings) for bindings, _ in keys]
    names = _names({members[0].config for members in keys.values()})
    files = [names[members[0].config] for members in keys.values()]
    varied = _varied(bound)
    # One file a variant needs no list of what it binds; within a file, short names of what varies are enough.
    within = {file: _varied([b for f, b in zip(files, bound) if f == file]) for file in dict.fromkeys(files)}
    made = []
    for members, settings, file in zip(keys.values(), bound, files):
        differing = {k: settings.get(k, "default") for k in varied}
        name = file if len(within) > 1 or not differing else ""
        parts = [f"{k.rsplit('.', 1)[-1]} = {differing[k]}" for k in within[file]]
        if len(parts) > _LABELLED:
            parts = [*parts[:_LABELLED], f"… ({len(parts)} differ)"]
        label = "  ".join(filter(None, [name, ", ".join(parts)])) or members[0].path.name
        made.append(Group(label, differing, sorted(members, key=lambda r: r.seed)))
    return sorted(_apart(made), key=lambda g: g.label)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one value) and number of values; `missing` runs gave none."""

    mean: float | None
    deviation: float | None
    n: int
    missing: int

    def text(self, digits: int = 4, *, brief: bool = False) -> str:
        """`0.4100 ± 0.0100 (n=3)`; `brief` leaves the number of values out where none is missing."""
        if self.mean is None:
            return f"– (0 of {self.missing})" if self.missing else "–"
        shown = f"{self.mean:.{digits}f}"
        if self.deviation is not None:
            shown += f" ± {self.deviation:.{digits}f}"
        if brief and not self.missing:
            return shown
        return shown + (f" (n={self.n}, {self.missing} missing)" if self.missing else f" (n={self.n})" if self.n > 1 else "")


def spread(group: Group, metric: str) -> Spread:
    """A metric over a group's seeds. Seeds without it are counted as missing, never silently left out."""
    values = list(group.values(metric).values())
    missing = len(group.counted) - len(values)
    if not values:
        return Spread(None, None, 0, missing)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values), missing)


def headline_metrics(runs: Sequence[Run], most: int = 6) -> list[str]:
    """Metrics to show first: what the runs were selected by, those with a published value, then those named without a prefix.

    Within each kind the order is that of the results. An interval of another metric (`NAME ±`) is none of its own.
    """
    order: dict[str, int] = {}
    for run in runs:
        for name in run.metrics:
            order.setdefault(name, len(order))
    selected = {run.effective.get(SELECT_KEY, "").strip("'\"") for run in runs}
    expected = {n for run in runs for n in (run.result.get("expected") or {})}
    plain = [n for n in order if "/" not in n and not n.endswith("±")]
    kinds = ([n for n in order if n in selected], [n for n in order if n in expected], plain)
    chosen = list(dict.fromkeys(n for kind in kinds for n in kind))
    return (chosen or list(order))[:most]


def families(groups: Sequence[Group]) -> list[tuple[list[Group], list[str]]]:
    """Groups with the metrics to show of them: apart where they have none in common, as runs of two reproductions have not.

    A group without results stands with the first of its gin file, else with the first family.
    """
    found: list[tuple[list[Group], set[str]]] = []
    empty: list[Group] = []
    for group in groups:
        names = set(headline_metrics(group.runs))
        if not names:
            empty.append(group)
            continue
        kin = [family for family in found if family[1] & names]
        found = [family for family in found if family not in kin]
        found.append(([*(g for members, _ in kin for g in members), group], names.union(*(n for _, n in kin))))
    members = [family for family, _ in found] or [[]]
    for group in empty:
        near = [m for m in members if any(g.runs[0].config == group.runs[0].config for g in m)]
        (near or members)[0].append(group)
    place = {id(g): position for position, g in enumerate(groups)}
    for family in members:
        family.sort(key=lambda g: place[id(g)])
    members.sort(key=lambda family: place[id(family[0])] if family else 0)
    return [(family, headline_metrics([r for g in family for r in g.runs])) for family in members]


def best(groups: Sequence[Group], metric: str) -> list[Group]:
    """The groups whose mean is the best one: several where they tie, none where fewer than two have the metric."""
    means = [(g, m) for g in groups if (m := spread(g, metric).mean) is not None]
    if len(means) < 2:
        return []
    top = (min if lower_is_better(metric, [r for g in groups for r in g.runs]) else max)(m for _, m in means)
    return [g for g, m in means if m == top]


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the order given."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


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


_FALLING = re.compile(  # whole words, or the beginning of one
    r"(?<![a-z])((loss|error|false|leak|perplexity|brier)|abs_rel(?![a-z])|(nll|ece|fpr|rmse|mse|mae|fid|eer|wer|cer|lpips)(?![a-z]))"
)


def lower_is_better(metric: str, runs: Sequence[Run] = ()) -> bool:
    """What the runs say of the metric that they select by; else losses, errors and calibration figures fall, and others rise."""
    modes = {
        run.effective.get(MODE_KEY, "'max'").strip("'\"")
        for run in runs
        if run.effective.get(SELECT_KEY, "").strip("'\"") == metric
    }
    if len(modes) == 1:
        return modes == {"min"}
    return _FALLING.search(metric.lower()) is not None
