"""Write docs/components.md: every registered component with every option of its constructor, from the source text itself.

python docs/make_components.py             write it
python docs/make_components.py --check     say whether it is up to date (exit status 1 if not)

An option's meaning is what the docstring says of it under `Args:`; what the gin files bind to it stands beside its default.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import generated

from core import config, registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("components.md")
PLUGINS = ("sdtps", "sap", "sam", "sam3_fusion", "core")
MOST = 3  # values of one option that are quoted from the gin files

HEAD = """# Components and their options

Written by `python docs/make_components.py` from the constructors and their docstrings; edit those. `sdtps.TokenSparse.beta` is how a
gin file or `--set` names an option. "Elsewhere" is what the gin files of this repository bind to it
and is not the default, with one file for each value; left out for the core, whose options say how a run is made.
"""

_NAMED = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def described(doc: str) -> dict[str, str]:
    """What a docstring says of each argument: the entries below `Args:` by name, lines joined. `a, b: …` speaks of both."""
    lines = doc.splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip() == "Args:"]
    if not starts:
        return {}
    margin = len(lines[starts[0]]) - len(lines[starts[0]].lstrip())
    found: dict[str, str] = {}
    current: list[str] = []
    for line in lines[starts[0] + 1 :]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= margin:
            break
        entry = _NAMED.match(line.strip()) if depth == margin + 4 else None
        if entry:
            current = entry[1].split(", ")
            found |= dict.fromkeys(current, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def documents(component: registry.Component) -> Iterator[str]:
    """Docstrings that may speak of its options: its own, its constructor's, and those of the classes it stands on in its file."""
    nodes = {n.name: n for n in tree(component.file).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    waiting = [component.name.rpartition(".")[2]]
    while waiting:
        node = nodes.get(waiting.pop(0))
        if node is None:
            continue
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        for one in [node, *inner]:
            yield ast.get_docstring(one) or ""
        if isinstance(node, ast.ClassDef):
            waiting += [b.id for b in node.bases if isinstance(b, ast.Name)]


def meanings(component: registry.Component) -> dict[str, str]:
    """What is said of each of its options: below `Args:`, else in the sentences that name it, else where they say "as for"."""
    found: dict[str, str] = {}
    for doc in documents(component):
        found = described(doc) | found
        for option in component.parameters:
            said = mentions(doc, option.name)
            if said:
                found.setdefault(option.name, said)
        alike = re.search(r"[Aa]rguments as for `(\w+)`", doc)
        other = registry.index().get(f"{component.name.rpartition('.')[0]}.{alike[1]}") if alike else None
        if other is not None:
            found = meanings(other) | found
    return found


def mentions(doc: str, name: str) -> str:
    """The sentences of a docstring's text, without its lists, that have the name in backquotes."""
    text = " ".join(doc.partition("\nArgs:")[0].split())
    return " ".join(s for s in re.split(r"(?<=\.) (?=[A-Z`])", text) if re.search(rf"`{name}\b", s))


def bound() -> dict[str, dict[str, str]]:
    """What the gin files bind to each option: value and the first file that has it, by full name."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / "gin").rglob("*.gin")):
        if "sweeps" in path.parts:
            continue
        name = path.relative_to(ROOT).as_posix()
        draft = config.draft(str(path))
        if draft.problems:
            raise ValueError(f"{name}: {draft.problems[0]}")
        made = config.Config(draft.file, (), draft.bindings, draft.shadowed, draft.files)
        for key, value in made.effective().items():
            if not value.startswith("%"):  # a macro that another file has to bind
                found.setdefault(key, {}).setdefault(value, name)
    return found


def row(component: registry.Component, option: registry.Parameter, said: dict[str, str], elsewhere: dict[str, str]) -> str:
    """An option: name, default, type, meaning, and what the gin files say."""
    others = {v: f for v, f in elsewhere.items() if not same(v, option.default)}
    quoted = [
        f"{'required' if config.REQUIRED in v else f'`{short(v)}`'} ({f.removeprefix('gin/')})"
        for v, f in list(others.items())[:MOST]
    ]
    more = f", {len(others) - MOST} more" if len(others) > MOST else ""
    default = "required" if option.default is None else f"`{option.default}`"
    cells = [f"`{option.name}`", default, f"`{option.annotation}`" if option.annotation else "–", said.get(option.name, "–"), ", ".join(quoted) + more or "–"]  # fmt: skip
    return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"


def same(value: str, default: str | None) -> bool:
    """Whether a bound value is the default, however it is spelled."""
    if default is None:
        return False
    try:
        return bool(ast.literal_eval(value) == ast.literal_eval(default))
    except (ValueError, SyntaxError):
        return value.rpartition(".")[2] == default or value == default


def short(value: str) -> str:
    """A bound value for a cell."""
    value = " ".join(value.split())
    return value if len(value) <= 60 else value[:57] + "…"


def section(component: registry.Component, elsewhere: dict[str, dict[str, str]]) -> str:
    file = Path(component.file).relative_to(ROOT).as_posix()
    cited = " ".join(filter(None, (component.paper, component.equations)))
    lines = [
        f"### {component.name}",
        "",
        f"{component.kind}, [{file}](../{file})" + (f". {cited}" if cited else ""),
        "",
        component.summary,
    ]
    options = [p for p in component.parameters if p.name not in component.denied]
    if options:
        said = meanings(component)
        lines += ["", "| option | default | type | meaning | elsewhere |", "|---|---|---|---|---|"]
        lines += [row(component, p, said, elsewhere.get(f"{component.name}.{p.name}", {})) for p in options]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    components = [c for c in registry.index().values() if c.plugin in PLUGINS]
    elsewhere = bound()
    parts = [HEAD]
    for plugin in PLUGINS:
        own = sorted((c for c in components if c.plugin == plugin), key=lambda c: (c.kind, c.name))
        count = sum(len(c.parameters) for c in own)
        parts.append(f"## {plugin}\n\n{len(own)} components, {count} options.")
        parts += [section(c, elsewhere if plugin != "core" else {}) for c in own]  # how a run is made stands in its recipe
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    return generated.main(__file__, __doc__ or "", lambda: {PAGE: page()}, argv)


if __name__ == "__main__":
    raise SystemExit(main())
