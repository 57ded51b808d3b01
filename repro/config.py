"""Check a gin file without running it, say where a value comes from, or compare two runs.

repro config FILE [--set …]            every problem at once, or the effective bindings
repro config FILE --why NAME           file:line, command line or default, and what it shadowed
repro config diff RUN RUN              what was asked differently
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from core import config as configs
from core import record
from repro import cli


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a gin file, or the word diff")
    parser.add_argument("runs", nargs="*", help="with diff: two run folders or gin files")
    cli.config_options(parser, file=False)
    parser.add_argument(
        "--why", action="append", default=[], metavar="NAME", help="where the value of a macro or parameter comes from (repeatable)"
    )


def effective(name: str, *, allow_imports: bool = False) -> dict[str, str]:
    """Effective bindings of a run folder or a gin file.

    Args:
        allow_imports: let the gin file import modules outside the plugins.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(name)
    if path.is_dir():
        found = record.read_json(path / "run.json").get("effective")
        if not isinstance(found, dict):
            raise ValueError(f"{name} is not a run folder (no run.json with bindings)")
        return found
    return configs.read(name, allow_imports=allow_imports).effective()


def main(args: argparse.Namespace) -> int:
    if args.file == "diff":
        if len(args.runs) != 2:
            raise ValueError(f"`repro config diff` takes two run folders or gin files, got {len(args.runs)}")
        for option, given in (("--set", args.overrides), ("--why", args.why)):
            if given:
                raise ValueError(
                    f"{option} has no effect with diff, which compares what two runs or files ask as they are; drop it"
                )
        left, right = (effective(name, allow_imports=args.allow_import) for name in args.runs)
        rows = configs.difference(left, right)
        for key, *values in rows:
            before, after = (value if value is not None else "(not bound)" for value in values)
            print(f"{key}\n  - {before}\n  + {after}")
        if not rows:
            print("no difference")
        return 0
    if args.runs:
        raise ValueError(f"unexpected: {' '.join(args.runs)}; two runs are compared with `repro config diff RUN RUN`")
    config = configs.read(args.file, args.overrides, allow_imports=args.allow_import)
    if args.why:
        for name in args.why:
            print("\n".join(configs.why(config, name)))
        print(f"precedence: {configs.PRECEDENCE}", file=sys.stderr)
        return 0
    print(config.text(), end="")
    print(
        f"# ok: {len(config.bindings)} bindings from {len(config.files)} files, run {config.stem}-{config.signature}; {configs.PRECEDENCE}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.verb("config"))
