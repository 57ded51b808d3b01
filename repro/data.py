"""Build a sample data set, or check a real one against its published counts.

repro data list
repro data make rgbnt-sample --root DIR [--set train_identities=32]
repro data check rgbnt201 --root DIR
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from core import registry
from core.config import accepts


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "make", "check"))
    parser.add_argument("name", nargs="?", help="a maker or checker; `repro data list` shows all")
    parser.add_argument("--root", metavar="DIR", help="the data set's folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="options",
        help="an option of the maker or checker (repeatable)",
    )


def _of(kind: str) -> dict[str, registry.Component]:
    """Makers or checkers by the shortest name that is theirs alone: in full where two plugins have one of that name."""
    found = [c for c in registry.index().values() if c.kind == kind]
    short = Counter(c.name.split(".", 1)[1] for c in found)
    return {own if short[own := c.name.split(".", 1)[1]] == 1 else c.name: c for c in found}


def main(args: argparse.Namespace) -> int:
    if args.action == "list":
        for kind in ("maker", "checker"):
            for name, component in sorted(_of(f"dataset_{kind}").items()):
                print(f"{kind:<8} {name.replace('_', '-'):<18} {component.summary}")
        return 0
    kind = {"make": "dataset_maker", "check": "dataset_checker"}[args.action]
    known = _of(kind)
    if args.name is None or args.root is None:
        raise ValueError(
            f"repro data {args.action} wants NAME and --root DIR; known names: {', '.join(n.replace('_', '-') for n in sorted(known))}"
        )
    wanted = args.name.replace("-", "_")
    known |= {c.name: c for c in known.values()}
    if wanted not in known:
        near = registry.nearest(wanted, known) or sorted(known)
        raise KeyError(f"nothing called {args.name!r} to {args.action}; nearest: {', '.join(n.replace('_', '-') for n in near)}")
    component = known[wanted]
    options = _options(component, args.options)
    registry.load_component(component.name)
    function = registry.registered()[component.name].cls
    if args.action == "make":
        function(args.root, **options)
        files = [p for p in Path(args.root).rglob("*") if p.is_file()]
        print(f"{args.root}: {len(files)} files, {sum(p.stat().st_size for p in files):,} bytes. {_statement(Path(args.root))}")
        return 0
    findings = function(args.root, **options)
    for finding in findings:
        expected = f"   (expected {finding.expected})" if finding.expected else ""
        print(f"{finding.level:<8} {finding.what}: {finding.found}{expected}")
    errors = sum(f.level == "error" for f in findings)
    print(f"{args.root}: {errors} errors, {sum(f.level == 'warning' for f in findings)} warnings", file=sys.stderr)
    return 1 if errors else 0


def _statement(root: Path) -> str:
    """What the made folder's manifest says it is."""
    try:
        return str(json.loads((root / "manifest.json").read_text(encoding="utf-8"))["statement"])
    except (OSError, ValueError, LookupError, TypeError):
        return "A generated sample, not the published data set."


def _options(component: registry.Component, given: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    own = [p.name for p in component.parameters[1:]]  # the first is the folder, which is --root
    for text in given:
        name, equals, value = text.partition("=")
        parameter = component.parameter(name) if name in own else None
        if name in options:
            raise ValueError(f"--set {name} is given twice, as {options[name]!r} and as {value}; give it once")
        if not equals or parameter is None:
            near = registry.nearest(name, own)
            raise ValueError(
                f"{component.name} has no option {name!r}; it has {', '.join(own) or 'none'}"
                + (f"; nearest: {near[0]}" if near else "")
            )
        try:
            parsed: Any = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        if not accepts(parameter.annotation, parsed):
            raise ValueError(f"{component.name}.{name} must be {parameter.annotation}, got {value}")
        options[name] = parsed
    return options


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("data"))
