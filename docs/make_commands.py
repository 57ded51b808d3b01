"""Write docs/commands.md from the parsers of the command line.

python docs/make_commands.py             write it
python docs/make_commands.py --check     say whether it is up to date (exit status 1 if not)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import generated

from repro import cli

PAGE = Path(__file__).with_name("commands.md")
HEAD = """# Commands

Written by `python docs/make_commands.py` from the parsers themselves; edit those. Each verb runs as `repro VERB` or as
`python -m repro.VERB`. `repro --version` prints the version, `repro completion bash|zsh|tcsh` a completion script.

Exit status: 0 done; 1 failed; 2 the request cannot be carried out as asked; 75 stopped by a signal with a checkpoint written, the
same command goes on; 130 interrupted. Errors are lines on standard error, each with what to do; `REPRO_TRACEBACK=1` adds the
traceback.
"""


def page() -> str:
    """The whole page."""
    verbs = cli.available()
    parts = [HEAD, "| verb | what it does |\n|---|---|"]
    parts[-1] += "".join(f"\n| [{name}](#{name}) | {cell(said)} |" for name, said in verbs.items())
    for name in verbs:
        parts.append(section(name, cli.parser_of(name)))
    return "\n".join(parts[:1]) + "\n" + "\n\n".join(parts[1:]) + "\n"


def section(name: str, parser: argparse.ArgumentParser) -> str:
    """One verb: what its file says, and a table of its arguments."""
    rows = [row(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    text = f"## {name}\n\n```text\n{(parser.description or '').strip()}\n```"
    return text + ("\n\n| argument | |\n|---|---|\n" + "\n".join(rows) if rows else "")


def row(action: argparse.Action) -> str:
    """One argument: how it is written, what it means, what it must be and may be."""
    value = "" if action.nargs == 0 else str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))
    if action.choices and not action.metavar:
        value = "|".join(map(str, action.choices))
    if not action.option_strings:
        shown = {"*": f"[{value} …]", "+": f"{value} …", "?": f"[{value}]"}.get(str(action.nargs), value)
    else:
        shown = f"{', '.join(action.option_strings)} {value}".strip()
    said = [str(action.help or "") % vars(action) if action.help else ""]
    if action.required and action.option_strings:
        said.append("required")
    if action.default not in (None, False, argparse.SUPPRESS, []) and "default" not in said[0]:
        said.append(f"default: {action.default}")
    return f"| `{cell(shown)}` | {cell('; '.join(filter(None, said)))} |"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(argv: list[str] | None = None) -> int:
    return generated.main(__file__, __doc__ or "", lambda: {PAGE: page()}, argv)


if __name__ == "__main__":
    raise SystemExit(main())
