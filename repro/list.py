"""Components: name, kind, distribution and version, file, paper. Nothing is imported unless asked for.

A plugin that cannot be imported is listed with its distribution and the cause.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from core import registry


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", help="only this kind (task, module, dataset, …)")
    parser.add_argument("--plugin", help="only this plugin (or core)")
    parser.add_argument(
        "--imports", action="store_true", help="import every plugin: import time, source hash, and what fails only then"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(args: argparse.Namespace) -> int:
    kinds = {c.kind for c in registry.index().values()}
    for what, asked, known in (("plugin", args.plugin, {"core", *registry.plugins()}), ("kind", args.kind, kinds)):
        if asked is not None and asked not in known:
            near = registry.nearest(asked, known) or sorted(known)
            raise ValueError(f"no {what} {asked!r}; {'nearest' if len(near) <= 3 else 'there are'}: {', '.join(near)}")
    found = [c for c in registry.index().values() if args.kind in (None, c.kind) and args.plugin in (None, c.plugin)]
    problems = dict(registry.plugin_problems())
    passports: dict[str, registry.Passport] = {}
    if args.imports:
        for name in registry.plugins() if args.plugin is None else {args.plugin} & registry.plugins().keys():
            try:
                passports[name] = registry.load_plugin(name)
            except registry.PluginError as error:
                problems[name] = error.cause
    plugins = registry.plugins()
    versions, own = {p.name: p.version for p in plugins.values()}, version("ginrepro")
    if args.json:
        print(json.dumps({
            "components": [
                {"name": c.name, "kind": c.kind, "plugin": c.plugin, "paper": c.paper, "equations": c.equations,
                 "distribution": c.distribution, "version": versions.get(c.plugin, own), "file": c.file, "line": c.line} for c in found
            ],
            "plugins": [
                {"name": p.name, "package": p.package, "distribution": p.distribution, "version": p.version, "problem": problems.get(p.name),
                 **({"import_s": passports[p.name].seconds, "sha256": passports[p.name].sha256} if p.name in passports else {})}
                for p in plugins.values()
            ],
        }, indent=1))  # fmt: skip
        return 0
    rows = []
    for c in sorted(found, key=lambda c: (c.plugin != "core", c.plugin, c.kind, c.name)):
        cited = " ".join(filter(None, (c.paper, c.equations))) or c.summary
        rows.append((c.name, c.kind, f"{c.distribution} {versions.get(c.plugin, own)}", f"{_short(c.file)}:{c.line}", cited))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    for row in rows:
        print("  ".join([f"{text:<{width}}" for text, width in zip(row, widths)] + [row[4]]))
    print()
    for p in plugins.values():
        if args.plugin not in (None, p.name):
            continue
        line = f"plugin {p.name:<14} {p.distribution} {p.version}  {p.folder or '(missing)'}"
        if p.name in passports:
            line += f"  import {passports[p.name].seconds:.2f} s  sha256 {passports[p.name].sha256[:12]}"
        print(line)
        if p.name in problems:
            print(f"plugin {p.name}: BROKEN ({p.distribution} {p.version}): {problems[p.name]}", file=sys.stderr)
    return 0


def _short(file: str) -> str:
    """A path as seen from here, where it is below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("list"))
