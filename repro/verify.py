"""Golden cases and claims, each with a measured figure.

repro verify sdtps                     every quick claim of a plugin (--slow for all)
repro verify --golden DIR              replay every golden case of a folder
repro verify                           the claims of every plugin and the cases in tests/golden, where there are any
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core import record, registry
from repro import show

if TYPE_CHECKING:
    from core.claims import Claim


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plugins", nargs="*", help="whose claims to check (default: all, unless --golden is given without --id)")
    parser.add_argument("--golden", metavar="DIR", help="replay the golden cases of this folder")
    parser.add_argument("--slow", action="store_true", help="run the checks marked slow too")
    parser.add_argument("--id", action="append", default=[], metavar="CLAIM", help="only these claims (repeatable)")
    parser.add_argument("--json", metavar="FILE", help="also write the outcome as JSON")


def main(args: argparse.Namespace) -> int:
    known = registry.plugins()
    for name in args.plugins:
        if name not in known:
            near = registry.nearest(name, known) or sorted(known)
            raise KeyError(f"no plugin {name!r}; nearest: {', '.join(near)}")
    outcome: dict[str, object] = {}
    stated: dict[str, Sequence[Claim] | None] = {}
    if args.plugins or args.id or not args.golden:
        stated = ledgers(args.plugins or list(known))
        _require_ids(args.id, stated)
    good = None not in stated.values()
    if args.golden:
        good &= golden(Path(args.golden), outcome)
    elif not args.plugins and Path("tests/golden").is_dir():
        good &= golden(Path("tests/golden"), outcome)
    if stated:
        good &= claims(stated, args, outcome)
    if args.json:
        record.write_json(Path(args.json), outcome)
    return 0 if good else 1


def golden(folder: Path, outcome: dict[str, object]) -> bool:
    """Replay every case; prints the worst differences of each and returns whether all agree."""
    from core import golden as replaying

    paths = replaying.cases(folder)
    for name, cause in replaying.load_adapters().items():
        print(f"plugin {name} (distribution {registry.plugins()[name].distribution}): {cause}", file=sys.stderr)
    rows: list[dict[str, object]] = []
    for path in paths:
        try:
            result = replaying.compare(replaying.read(path))
        except ValueError as error:
            print(f"FAIL  {path.name}: {error}")
            rows.append({
                "case": path.name, "module": None, "passed": False, "worst_output": None, "worst_gradient": None, "error": str(error)
            })  # fmt: skip
            continue
        rows.append({
            "case": path.name, "module": result.module, "passed": result.passed,
            "worst_output": result.worst_output, "worst_gradient": result.worst_gradient,
        })  # fmt: skip
        verdict = "ok  " if result.passed else "FAIL"
        print(
            f"{verdict}  {path.name:<38} {result.module:<28} {result.compared:>4} tensors  worst output {result.worst_output:.2e}  worst gradient {result.worst_gradient:.2e}"
        )
        for failure in result.failures or ([] if result.passed else ["nothing was compared"]):
            print(f"      {failure}")
    agree = sum(bool(row["passed"]) for row in rows)
    print(f"{agree} of {len(paths)} golden cases agree ({folder})")
    outcome["golden"] = rows
    return agree == len(paths)


def ledgers(names: Sequence[str]) -> dict[str, Sequence[Claim] | None]:
    """The claims of each plugin; None, and a line on standard error, where they cannot be read."""
    from core import claims as ledger

    found: dict[str, Sequence[Claim] | None] = {}
    for name in names:
        try:
            found[name] = ledger.of(name)
        except registry.PluginError as error:
            print(f"error: {error}", file=sys.stderr)
            found[name] = None
    return found


def _require_ids(asked: Sequence[str], stated: Mapping[str, Sequence[Claim] | None]) -> None:
    """ValueError that names every id which no claim has, with the nearest."""
    known = [one.id for found in stated.values() for one in found or ()]
    problems = []
    for id in dict.fromkeys(asked):
        if id not in known:
            near = registry.nearest(id, known)
            advice = f"nearest: {', '.join(near)}" if near else "`repro claims` lists them"
            problems.append(f"--id {id}: no claim of {', '.join(stated) or 'any plugin'} has this id; {advice}")
    if problems:
        raise ValueError("\n".join(problems))


def claims(stated: Mapping[str, Sequence[Claim] | None], args: argparse.Namespace, outcome: dict[str, object]) -> bool:
    """Check the claims of the plugins; returns whether every verdict is the one the ledger states."""
    from core import claims as ledger

    good, rows = True, []
    for name, found in stated.items():
        if found is None:
            continue
        wanted = [c for c in found if (not args.id or c.id in args.id) and (args.slow or args.id or c.cost == "quick")]
        for one in wanted:
            checked = ledger.run(one)
            row = checked.row()
            rows.append(row)
            mark = "" if checked.as_expected else f"   <-- the ledger says: {one.expect}"
            print(f"{row['id']}  [{row['verdict'].upper()}]  {row['statement']}{mark}")
            print(f"      source    {row['source']}")
            print(f"      measured  {row['measured']}")
            if row["why"]:
                print(f"      so        {row['why']}")
            good &= checked.as_expected
        left = len(found) - len(wanted)
        if wanted:
            counts: dict[str, int] = {}
            for r in rows:
                if r["plugin"] == name:
                    counts[str(r["verdict"])] = counts.get(str(r["verdict"]), 0) + 1
            show.table(f"{name}: verdicts", ["verdict", "claims"], [[k, v] for k, v in counts.items()])
        if left:
            print(f"{name}: {left} checks not run" + (" (--slow runs them)" if not args.id else ""))
        if not found:
            print(f"{name}: no claims")
    outcome["claims"] = rows
    return good


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("verify"))
