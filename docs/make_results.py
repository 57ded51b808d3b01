"""Write docs/results.md from the ledger, and quote its head wherever a README asks for it.

    repro verify --json verify.json                              every quick claim of every plugin, and tests/golden
    repro claims verify.json RUNS… --json docs/results.json      the ledger; RUNS are folders of runs on the published data
    python docs/make_results.py                                  the page, and the quotes
    python docs/make_results.py --check                          say whether all of it is up to date (exit status 1 if not)

A README asks for the head by two lines, `<!-- ledger -->` and `<!-- end ledger -->`; what stands between them is made here.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import generated

from core import claims, config, registry
from repro.claims import STANDINGS

DOCS = Path(__file__).resolve().parent
LEDGER, PAGE = DOCS / "results.json", DOCS / "results.md"
QUOTING = (DOCS.parent / "README.md", DOCS.parent / "README.zh-CN.md")
_QUOTE = re.compile(r"(<!-- ledger -->\n).*?(<!-- end ledger -->)", re.DOTALL)

HEAD = """# Results: what papers and notes state, and what stands here

Written by `python docs/make_results.py` from `docs/results.json`, which `repro claims` writes. To make all of it again:

```bash
repro verify --json verify.json
repro claims verify.json --json docs/results.json
python docs/make_results.py
```

With folders of finished runs after `verify.json`, the published numbers are compared with them: mean over seeds at the end of training,
runs that differ from the recipe in nothing but data place and seed; a run on a generated sample never counts. A statement is
*reproduced* or *refuted* by a check with a measured figure; it *depends* where it is true in some settings only.
"""

PUBLISHED = """## Published numbers

`Not run` is what it says: the data sets are not here. `repro data check NAME --root DIR` compares a copy with the published counts; then
run the recipe, with `--set` for each name that it wants, and `repro claims RUN…` says where you stand.
"""

STUDIES = """## What was trained here instead

On data that are here, with seeds and paired tests: [SAP on real emoji](emoji7.md), [text guidance in generated rooms](text_guidance.md),
[presence after distillation](sam3_presence.md); what the full recipes compute: [profiles](profiles.md). None of it is a published number.
"""


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def head(ledger: dict[str, Any]) -> str:
    """Counts by plugin and standing, and how the golden cases stand."""
    rows = ledger["rows"]
    used = [s for s in STANDINGS if any(r["standing"] == s for r in rows)]
    plugins = list(dict.fromkeys(r["plugin"] for r in rows))
    counts = [[f"`{p}`", *(sum(r["plugin"] == p and r["standing"] == s for r in rows) for s in used)] for p in plugins]
    return table(["", *used], counts)


def golden(cases: list[dict[str, Any]]) -> str:
    """One sentence: how many agree, and how far the worst is off."""
    if not cases:
        return "No golden case was replayed."
    # A case that cannot be read or replayed has no difference, and one that is not finite is null in JSON.
    measured = [c for c in cases if c["worst_output"] is not None and c["worst_gradient"] is not None]
    worst = [max((c[k] for c in measured), default=float("nan")) for k in ("worst_output", "worst_gradient")]
    over = "all of them" if len(measured) == len(cases) else f"the {len(measured)} with finite differences"
    agree = sum(bool(c["passed"]) for c in cases)
    return (
        f"{agree} of {len(cases)} golden cases agree with the released implementations; over {over} the largest difference of an output is "
        f"{worst[0]:.1e}, of a gradient {worst[1]:.1e} of its tensor's maximum (`repro verify --golden tests/golden`)."
    )


def wants(recipe: str) -> str:
    """The names that a recipe leaves to its user."""
    bindings = config.draft(recipe).bindings.values()
    return ", ".join(
        f"`{b.key}`" for b in bindings if b.is_macro and isinstance(b.value, config.Macro) and b.value.name == config.REQUIRED
    )


def page(ledger: dict[str, Any]) -> str:
    """The whole page."""
    rows = ledger["rows"]
    numbers = [r for r in rows if r["kind"] == "published"]
    parts = [HEAD, "## Where it stands", head(ledger), golden(ledger["golden"]), PUBLISHED]
    parts.append(
        table(
            ["number", "what", "source", "metric and protocol", "published ± tolerance", "ours", "standing"],
            [
                [r["id"], r["statement"], r["source"], f"`{r['metric']}`", r["expected"], r["found"] or "–", r["standing"]]
                for r in numbers
            ],
        )
    )
    recipes = Counter(r["config"] for r in numbers)
    parts.append(table(["recipe", "numbers", "wants"], [[f"`{c}`", n, wants(c) or "nothing"] for c, n in recipes.items()]))
    for standing, title in (("refuted", "Refuted"), ("depends", "True in some settings only")):
        found = [r for r in rows if r["kind"] == "claim" and r["standing"] == standing]
        if found:
            parts.append(f"## {title}")
            parts.append(table(["claim", "statement", "measured", "so"], [[r["id"], r["statement"], r["found"], r["note"] or "–"] for r in found]))  # fmt: skip
    left = [r for r in rows if r["kind"] == "claim" and r["standing"] not in ("reproduced", "refuted", "depends")]
    if left:
        parts.append("## Not decided here")
        parts.append(table(["claim", "statement", "standing", "why"], [[r["id"], r["statement"], r["standing"], r["note"] or "a check marked slow: `repro verify --slow`"] for r in left]))  # fmt: skip
    parts.append(STUDIES)
    parts.append("What is reproduced has no table here: `repro verify PLUGIN` prints every claim with its figure.")
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def quoted(text: str, ledger: dict[str, Any]) -> str:
    """A README with the ledger's head between its markers."""
    return _QUOTE.sub(lambda m: f"{m[1]}{head(ledger)}\n{m[2]}", text)


def behind(ledger: dict[str, Any]) -> list[str]:
    """Where the stored ledger is not what the plugins state now: claims and numbers that came, went or changed."""
    stored = {(r["kind"], r["plugin"], r["id"]): (r["statement"], r["expected"]) for r in ledger["rows"]}
    now: dict[tuple[str, str, str], tuple[str, str]] = {}
    for plugin in registry.plugins():
        if registry.plugins()[plugin].distribution == "ginrepro":
            now |= {
                ("published", plugin, p.id): (p.statement, f"{p.value:g} ± {p.tolerance:g}") for p in claims.published_of(plugin)
            }
            now |= {("claim", plugin, c.id): (c.statement, c.expect) for c in claims.of(plugin)}
    return [" ".join(key) for key in sorted(stored.keys() | now.keys()) if stored.get(key) != now.get(key)]


def main(argv: list[str] | None = None) -> int:
    ledger = json.loads(LEDGER.read_text(encoding="utf-8"))
    pages = {PAGE: page(ledger)} | {p: quoted(p.read_text(encoding="utf-8"), ledger) for p in QUOTING if p.is_file()}
    status = generated.main(__file__, __doc__ or "", lambda: pages, argv)
    changed = behind(ledger)
    for name in changed:
        print(
            f"error: docs/results.json is stale ({name}); python docs/make_results.py --help says how it is made", file=sys.stderr
        )
    return int(bool(status or changed))


if __name__ == "__main__":
    raise SystemExit(main())
