"""What the scripts of this folder that write a page from other files have in common: `python docs/make_X.py [--check]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def main(script: str, said: str, pages: Callable[[], Mapping[Path, str]], argv: Sequence[str] | None = None) -> int:
    """Write the pages, or with `--check` only say which of them are not as they would be written; the exit status.

    Args:
        script: `__file__` of the script that makes them.
        said: its docstring, for `--help`.
        pages: makes the text by file.
        argv: the command line without the program; that of the process if None.
    """
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    check = parser.parse_args(argv).check
    wanted = pages()
    if not check:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"error: {path.name} is stale; run python docs/{Path(script).name}", file=sys.stderr)
    return int(bool(stale))
