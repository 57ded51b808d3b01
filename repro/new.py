"""A third-party plugin package that works before the first edit.

    repro new my_paper                   ./my_paper: package, gin file, golden case, claim, tests, README
    repro new my_paper --into papers     papers/my_paper

It passes its own tests, lint, types and cost contract as it is; replace its parts by the paper's one at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import os
import re
import shutil
import tempfile
from pathlib import Path

from core import registry

TEMPLATE = Path(__file__).parent / "template"
PLACEHOLDER = "my_paper"
TAKEN = ("by_hand", "conftest", "golden", "tests")  # what the package itself calls something else
LONGEST = 40  # characters of a name: with it, the package's lines stay within its own line length


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the plugin and of its Python package, in lower case with underscores")
    parser.add_argument("--into", default=".", metavar="DIR", help="the folder to make it in (default: here)")


def main(args: argparse.Namespace) -> int:
    into = Path(args.into)
    check(args.name, into)
    target = write(args.name, into)
    print(f"{target}: {sum(p.is_file() for p in target.rglob('*'))} files. Next:\n")
    print(f"    python -m pip install -e '{target}[dev]'")
    print(f"    python -m repro.run --gin {args.name}:base.gin")
    print(f"    cd '{target}' && python -m pytest && ruff check . && mypy\n")
    print(f"{target / 'README.md'} says what to replace by what.")
    return 0


def check(name: str, into: Path) -> None:
    """Refuse a name under which the package could not be made, installed or imported.

    Raises:
        ValueError: with the reason and what to do.
    """
    if keyword.iskeyword(name) or not re.fullmatch(r"[a-z](_?[a-z0-9])*", name):
        near = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")
        near = f"{near}_paper" if keyword.iskeyword(near) else f"paper_{near}" if near[:1].isdigit() else near
        why = (
            "is a word of the language" if keyword.iskeyword(name) else "must be lower-case letters, digits and single underscores"
        )
        raise ValueError(f"plugin name {name!r} {why}" + (f"; try {near}" if near else ""))
    if len(name) > LONGEST:
        raise ValueError(f"plugin name {name!r} has {len(name)} characters; choose one of at most {LONGEST}")
    if not into.is_dir():
        raise ValueError(f"--into {into}: no such folder")
    if (into / name).exists():
        raise ValueError(f"{into / name} exists already; choose another name or another --into")
    owner = registry.plugins().get(name)
    if owner is not None:
        raise ValueError(f"a plugin {name!r} is installed already, by {owner.distribution} {owner.version}; choose another name")
    if name in TAKEN or importlib.util.find_spec(name) is not None:
        raise ValueError(
            f"there is a Python module called {name!r} already, which the new package would shadow; choose another name"
        )


def write(name: str, into: Path) -> Path:
    """The template under its new name: whole, or not at all. Returns its folder."""
    target = into / name
    draft = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=into))
    try:
        for source in sorted(TEMPLATE.rglob("*")):
            inside = source.relative_to(TEMPLATE)
            if source.is_dir() or any(part.startswith("__pycache__") or part.endswith("_cache") for part in inside.parts):
                continue
            goal = draft / renamed(str(inside), name)
            goal.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".safetensors":
                _golden(source, goal, name)
            else:
                goal.write_text(renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")
        draft.chmod(0o755)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def renamed(text: str, name: str) -> str:
    """A text of the template with the placeholder, in each of its spellings, replaced by the name."""
    for spelling in (str.lower, str.upper, lambda s: s.replace("_", "-")):
        text = text.replace(spelling(PLACEHOLDER), spelling(name))
    return text


def _golden(source: Path, goal: Path, name: str) -> None:
    """A golden case under the name; only its description is text."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(str(source), framework="np") as file:
        meta = {key: renamed(value, name) for key, value in (file.metadata() or {}).items()}
    save_file(load_file(source), goal, meta)


if __name__ == "__main__":
    from repro.cli import verb

    raise SystemExit(verb("new"))
