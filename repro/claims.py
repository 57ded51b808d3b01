"""The ledger: what is reproduced, what is not, what nobody has run.

    repro claims                                 every claim and published number of every plugin; nothing is run
    repro claims runs verify.json profile.json   with run folders, and what `repro verify` and `repro profile` wrote by --json
    repro claims runs --check                    run the quick checks now
    repro claims runs --markdown LEDGER.md --json ledger.json

A published number is compared with the finished runs of its config file, by its metric: the mean over seeds, at the end of
training. A run counts if it differs from the config in nothing but where its data are and how it was run (seed, device, …).
A run on a generated sample never counts. Every run that was set aside is named, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import config as configs
from core import record, registry
from repro import gather, show

if TYPE_CHECKING:
    from core.claims import Claim, Published

STANDINGS = ("reproduced", "outside tolerance", "refuted", "depends", "cannot be tested here", "check failed", "not run")
_BY_VERDICT = {"holds": "reproduced", "does not hold": "refuted"}

# Parameters that say how a run was done and not what it was, by component and name or by name alone.
HOW = {
    f"{configs.TRAIN}.{name}"
    for name in ("seed", "device", "precision", "compile", "deterministic", "threads", "eval_every", "eval_first", "save_every", "keep", "log_every")
}  # fmt: skip
WHERE = {"root", "weights", "workers", "cache", "eval_batch"}
SAMPLE = "a generated sample, which never counts"
# What `repro verify --json` writes: the parts, and what an entry of each says at the least.
VERIFIED = {
    "claims": {"plugin", "id", "statement", "source", "verdict", "measured", "why"},
    "golden": {"case", "passed"},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", help="run folders, folders of them, and files that `repro verify --json` or `repro profile --json` wrote"
    )
    parser.add_argument("--plugin", action="append", default=[], metavar="NAME", help="only this plugin (repeatable; default: all)")
    parser.add_argument("--check", action="store_true", help="run the quick checks of claims that no given file has")
    parser.add_argument(
        "--best",
        action="store_true",
        help="take the best evaluation of each run (train.select) instead of the last, as papers do that select on the test set",
    )
    parser.add_argument("--markdown", metavar="FILE", help="also write the ledger as Markdown")
    parser.add_argument("--json", metavar="FILE", help="also write the ledger as JSON")


def main(args: argparse.Namespace) -> int:
    names = _plugins(args.plugin)
    evidence, verdicts, golden = read(args.runs, best=args.best)
    ledger = Ledger([], golden, {}, [e.path for e in evidence], args.best)
    changed = False
    from core import claims

    for name in names:
        try:
            numbers, statements = claims.published_of(name), claims.of(name)
        except registry.PluginError as error:
            ledger.problems[name] = error.cause
            print(f"error: {error}", file=sys.stderr)
            continue
        ledger.rows += [compared(number, evidence) for number in numbers]
        for one in statements:
            found = verdicts.get((name, one.id))
            if found is None and args.check and one.cost == "quick":
                checked = claims.run(one)
                found = checked.row() | {"file": "checked now"}
                changed |= not checked.as_expected
            ledger.rows.append(stated(one, found))
    ledger.show()
    if args.markdown:
        Path(args.markdown).write_text(ledger.markdown(), encoding="utf-8")
    if args.json:
        record.write_json(Path(args.json), ledger.to_dict())
    return int(changed or bool(set(args.plugin) & ledger.problems.keys()))


def _plugins(asked: Sequence[str]) -> list[str]:
    known = registry.plugins()
    for name in asked:
        if name not in known:
            near = registry.nearest(name, known) or sorted(known)
            raise KeyError(f"no plugin {name!r}; nearest: {', '.join(near)}")
    return list(dict.fromkeys(asked)) or list(known)


# --- what was found ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A run folder or a profile, with what a published number is compared with.

    Attributes:
        path: where it comes from.
        config: the gin file as it was asked for.
        effective: every binding it had; empty where it does not say.
        seed: of the run.
        values: finite metrics by name; costs under `profile/`.
        flaw: why it counts for nothing, empty where it does.
    """

    path: str
    config: str
    effective: Mapping[str, str]
    seed: str
    values: Mapping[str, float]
    flaw: str = ""


def read(
    places: Iterable[str], *, best: bool = False
) -> tuple[list[Evidence], dict[tuple[str, str], dict[str, Any]], list[dict[str, Any]]]:
    """Runs and profiles, verdicts by plugin and claim, and golden outcomes, from folders and JSON files.

    Raises:
        ValueError: if a place does not exist, or holds neither runs nor an outcome.
    """
    folders, evidence = [], []
    verdicts: dict[tuple[str, str], dict[str, Any]] = {}
    golden: list[dict[str, Any]] = []
    for place in places:
        path = Path(place)
        if not path.is_file():
            folders.append(place)
            continue
        found = record.read_json(path)
        if "model" in found and "effective" in found:
            evidence.append(Evidence(place, str(found.get("config", "?")), found["effective"], "–", _costs(found)))
        else:
            outcome = verified(path, "`repro verify --json` or `repro profile --json`")
            verdicts |= {(row["plugin"], row["id"]): {**row, "file": place} for row in outcome.get("claims", [])}
            golden += [{**row, "file": place} for row in outcome.get("golden", [])]
    runs = gather.collect(folders) if folders else []
    return evidence + [of_run(run, best=best) for run in runs], verdicts, golden


def verified(path: Path, wanted: str = "`repro verify --json`") -> dict[str, Any]:
    """What `repro verify --json` wrote: rows of `claims`, of `golden`, or of both.

    Args:
        path: the file.
        wanted: what a file of this place may come from, for the error.

    Raises:
        ValueError: if the file is missing or damaged, or was written by something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no outcome of {wanted}: there is no such file")
    found = record.read_json(path)
    if not found or not found.keys() <= VERIFIED.keys():
        raise ValueError(f"{path} is no outcome of {wanted}")
    for part, rows in found.items():
        whole = isinstance(rows, list) and all(isinstance(row, dict) and VERIFIED[part] <= row.keys() for row in rows)
        if not whole:
            wants = ", ".join(sorted(VERIFIED[part]))
            raise ValueError(
                f"{path} is no outcome of {wanted}: {part!r} must be a list of entries with {wants}; write the file again"
            )
    return found


def of_run(run: gather.Run, *, best: bool = False) -> Evidence:
    """What a run folder has to say."""
    chosen = run.result.get("best") if best else run.metrics
    values = {k: float(v) for k, v in (chosen or {}).items() if isinstance(v, (int, float)) and math.isfinite(v)}
    if not run.metrics or run.state != "finished":
        flaw = f"not finished ({run.state})"
    elif not run.data:
        flaw = "it does not say what data it saw"
    elif run.data.get("sample") or _is_sample(str(run.data.get("root", ""))):
        flaw = SAMPLE
    else:
        flaw = ""
    return Evidence(str(run.path), run.config, run.effective, run.seed, values | _costs(run.profile), flaw)


def _is_sample(root: str) -> bool:
    """Whether the data folder, where it is still there, says of itself that it was generated."""
    from core import samples

    return bool(root) and record.read_json(Path(root) / samples.MANIFEST).get("generated") is True


def _costs(profile: Mapping[str, Any]) -> dict[str, float]:
    model = profile.get("model")
    found = model.items() if isinstance(model, dict) else ()
    return {f"profile/{k}": float(v) for k, v in found if isinstance(v, (int, float)) and not isinstance(v, bool)}


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A line of the ledger.

    Attributes:
        kind: `published` number or `claim`.
        expected: the published number with its tolerance, or the verdict the ledger states.
        found: our number as mean ± standard deviation over seeds, or the measured figure.
        standing: one of STANDINGS.
        runs: what is behind it.
        aside: what was of the same config and does not count, with the reason.
        note: anything else a reader has to know.
    """

    kind: str
    plugin: str
    id: str
    statement: str
    source: str
    expected: str
    found: str
    standing: str
    runs: list[str]
    aside: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    config: str = ""
    metric: str = ""
    value: float | None = None
    tolerance: float | None = None
    mean: float | None = None
    deviation: float | None = None
    n: int = 0


def stated(claim: Claim, found: Mapping[str, Any] | None) -> Row:
    """A claim with the verdict on it, if there is one."""
    row = Row("claim", claim.plugin, claim.id, claim.statement, claim.source, claim.expect, "", "not run", [])
    if found is None:
        return row
    verdict = str(found["verdict"])
    row.standing = _BY_VERDICT.get(verdict, verdict)
    row.found, row.runs = str(found.get("measured", "")), [str(found["file"])]
    row.note = str(found.get("why", ""))
    if verdict != claim.expect:
        row.note = f"CHANGED: the ledger states that it {claim.expect}. {row.note}".strip()
    return row


def compared(number: Published, evidence: Sequence[Evidence]) -> Row:
    """A published number with the runs of its config: mean over seeds, and whether that is within the tolerance."""
    row = Row(
        "published", number.plugin, number.id, number.statement, number.source, f"{number.value:g} ± {number.tolerance:g}", "", "not run", [],
        config=number.config, metric=number.metric, value=number.value, tolerance=number.tolerance,
    )  # fmt: skip
    try:
        wanted = requested(number.config)
    except configs.ConfigError as error:
        row.note = f"its config cannot be read: {error.problems[0]}"
        return row
    by_seed: dict[str, list[float]] = {}
    for one in evidence:
        if gather.canonical(one.config) != gather.canonical(number.config):
            continue
        reason = (
            one.flaw or unlike(one, wanted, dict(number.where)) or ("" if number.metric in one.values else f"no {number.metric}")
        )
        if reason:
            row.aside[one.path] = reason
            continue
        row.runs.append(one.path)
        by_seed.setdefault(one.seed, []).append(one.values[number.metric])
    if not by_seed:
        return row
    values = [statistics.fmean(v) for v in by_seed.values()]  # a seed that was run twice is still one seed
    row.n, row.mean = len(values), statistics.fmean(values)
    row.deviation = statistics.stdev(values) if len(values) > 1 else None
    row.found = gather.Spread(row.mean, row.deviation, row.n, 0).text()
    # A hair of slack: 0.80 is within 0.01 of 0.79, which the difference of the two floats is not.
    row.standing = "reproduced" if abs(row.mean - number.value) <= number.tolerance * (1 + 1e-9) else "outside tolerance"
    row.note = f"{row.mean - number.value:+.4f}" + ("; one seed" if row.n == 1 else "")
    return row


@cache
@cache
def requested(config: str) -> Mapping[str, str]:
    """What a gin file binds, as text; values that it leaves to the command line are `%gin.REQUIRED`."""
    draft = configs.draft(config)
    if draft.problems:
        raise configs.ConfigError(draft.problems)
    return configs.Config(draft.file, (), draft.bindings, draft.shadowed, draft.files).effective()


def unlike(one: Evidence, wanted: Mapping[str, str], where: Mapping[str, str]) -> str:
    """How a run differs from what its config asks for, in words; empty where it does not."""
    if not one.effective:
        return "it does not say its bindings"
    for key, value in where.items():
        if one.effective.get(key) not in (value, repr(value)):
            return f"{key} is {one.effective.get(key, 'not bound')}, not {value}"
    differing = []
    for key, asked, had in configs.difference(dict(wanted), dict(one.effective)):
        free = key in HOW or key in where or key.rsplit(".", 1)[-1] in WHERE or configs.REQUIRED in (asked or "")
        if not free:
            differing.append(
                f"{key} = {had if had is not None else 'unbound'} (the file: {asked if asked is not None else 'unbound'})"
            )
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"it differs: {'; '.join(differing[:3])}{more}" if differing else ""


# --- showing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ledger:
    """All rows, the golden outcomes, the plugins that failed, and what was looked at."""

    rows: list[Row]
    golden: list[dict[str, Any]]
    problems: dict[str, str]
    looked: list[str]
    best: bool = False

    def _of(self, kind: str) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.kind == kind:
                found.setdefault(row.plugin, []).append(row)
        return found

    def summary(self) -> tuple[list[str], list[list[Any]]]:
        """Counts by plugin and standing; standings that nothing has are left out."""
        used = [s for s in STANDINGS if any(r.standing == s for r in self.rows)]
        plugins = dict.fromkeys(r.plugin for r in self.rows)
        counts = [[p, *(sum(r.plugin == p and r.standing == s for r in self.rows) for s in used)] for p in plugins]
        return ["plugin", *used], counts

    def aside(self) -> dict[str, str]:
        """Runs of a published config that count for none of its numbers, with the reason."""
        behind = {path for row in self.rows for path in row.runs}
        return {path: why for row in self.rows for path, why in row.aside.items() if path not in behind}

    def _numbers(self, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
        columns = ["number", "published", "best" if self.best else "ours", "difference", "standing"]
        return columns, [[r.id, r.expected, r.found or "–", r.note or "–", r.standing] for r in rows]

    def _golden_line(self) -> str:
        agree = sum(bool(row.get("passed")) for row in self.golden)
        return f"{agree} of {len(self.golden)} golden cases agree ({', '.join(dict.fromkeys(r['file'] for r in self.golden))})"

    def show(self) -> None:
        for plugin, rows in self._of("claim").items():
            show.table(f"{plugin}: claims", ["claim", "standing", "statement", "measured"], [
                [r.id, r.standing + (" (CHANGED)" if r.note.startswith("CHANGED") else ""), r.statement, r.found or "–"] for r in rows
            ])  # fmt: skip
        for plugin, rows in self._of("published").items():
            show.table(f"{plugin}: published numbers", *self._numbers(rows))
            for runs, ids in _behind(rows).items():
                print(f"  {', '.join(ids)}: {', '.join(runs)}")
        if self.golden:
            print(self._golden_line())
        if self.rows:
            show.table("the ledger", *self.summary())
        else:
            print("no claims and no published numbers")
        for path, why in self.aside().items():
            print(f"set aside  {path}: {why}")

    def markdown(self) -> str:
        """The ledger for a document."""
        lines = ["# Ledger of claims", "", *_table(*self.summary()), ""]
        if self.golden:
            lines += [self._golden_line() + ".", ""]
        for plugin in dict.fromkeys(r.plugin for r in self.rows):
            lines += [f"## {plugin}", ""]
            numbers, claims = self._of("published").get(plugin, []), self._of("claim").get(plugin, [])
            if numbers:
                columns, cells = self._numbers(numbers)
                more = [[r.source, f"`{r.config}`, {r.metric}", ", ".join(r.runs) or "–"] for r in numbers]
                lines += [*_table([*columns, "source", "config and metric", "runs"], [a + b for a, b in zip(cells, more)]), ""]
            if claims:
                cells = [[r.id, r.statement, r.source, r.standing, r.found or "–", r.note or "–"] for r in claims]
                lines += [*_table(["claim", "statement", "source", "standing", "measured", "so"], cells), ""]
        for plugin, cause in self.problems.items():
            lines += [f"Plugin {plugin} could not be read: {cause}", ""]
        aside = self.aside()
        if aside:
            lines += ["Set aside:", "", *(f"* `{path}`: {why}" for path, why in aside.items()), ""]
        lines += [
            "Published numbers are compared with finished runs of their config on the published data; "
            f"{'the best evaluation' if self.best else 'the end of training'}, mean ± standard deviation over seeds. "
            "A run on a generated sample never counts.",
        ]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "golden": self.golden,
            "problems": self.problems,
            "looked_at": self.looked,
            "evaluation": "best" if self.best else "last",
        }


def _behind(rows: Sequence[Row]) -> dict[tuple[str, ...], list[str]]:
    """Ids of rows by the runs behind them."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.runs:
            found.setdefault(tuple(row.runs), []).append(row.id)
    return found


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; what would end a cell or a row is escaped."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(show.cell(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("claims"))
