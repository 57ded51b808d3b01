"""A reproduction's page names every switch with its real default and values, and every published number that the ledger has.

A switch is an option of a registered component that is a yes or no, or one of several words: a parameter annotated with `bool`
or a `Literal`. It stands in the table "Every switch" of `plugins/<name>/README.md`, as `Component.option`.
"""

import ast
import re
from pathlib import Path

import pytest

from core import claims, registry

TOP = Path(__file__).parents[2]
PLUGINS = ("sam", "sap", "sdtps")
FILES = ("py", "txt", "gin", "json")
_SPAN = re.compile(r"`([^`]+)`")


def choices(annotation):
    """What an annotation lets one choose from, or None where it is no switch."""
    found, plain = [], False
    for node in ast.walk(ast.parse(annotation or "None", mode="eval")):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
            found += [ast.literal_eval(e) for e in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])]
        plain |= isinstance(node, ast.Name) and node.id == "bool"
    return [*found, *([True, False] if plain else [])] or None


def switches(plugin):
    """`Component.option` -> (default, the other values), as texts."""
    found = {}
    for component in registry.index().values():
        for parameter in component.parameters if component.plugin == plugin else ():
            values = choices(parameter.annotation)
            if values:
                default = ast.literal_eval(parameter.default) if parameter.default is not None else None
                others = {str(v) for v in values if v != default or type(v) is not type(default)}
                found[f"{component.name.partition('.')[2]}.{parameter.name}"] = (str(default), others)
    return found


def page(plugin):
    return (TOP / "plugins" / plugin / "README.md").read_text(encoding="utf-8")


def rows(text, title):
    """Cells of the table below a heading."""
    part = re.split(r"^## ", text.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def stated(text):
    return {
        name: (_SPAN.findall(default)[0], set(_SPAN.findall(also)))
        for names, default, also, _ in rows(text, "Every switch")
        for name in _SPAN.findall(names)
    }


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_switch_is_on_the_page_with_its_default_and_values(plugin):
    assert stated(page(plugin)) == switches(plugin)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_switch_says_what_the_other_value_does(plugin):
    for names, _, _, effect in rows(page(plugin), "Every switch"):
        assert len(effect.split()) >= 2, names


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_page_names_no_option_that_is_not_there(plugin):
    """Wherever the page writes `Component.option`, that component has that option."""
    ordered = sorted(registry.index().values(), key=lambda c: c.plugin == plugin)  # its own last: of two of a name its own counts
    there = {c.name.partition(".")[2]: {p.name for p in c.parameters} for c in ordered}
    named = 0
    for span in _SPAN.findall(page(plugin)):
        found = re.match(rf"(?:{plugin}\.)?(\w+)\.(\w+)(?: = .*)?$", span)
        if found and found[1] in there and found[2] not in FILES:
            named += 1
            assert found[2] in there[found[1]], span
    assert named >= len(switches(plugin))


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_published_numbers_stand_beside_their_recipes(plugin):
    """Recipe, metric with protocol, value and tolerance as in the claims, no more and no fewer."""
    told = [tuple(row[:3]) for row in rows(page(plugin), "On the real data")]
    wanted = [(f"`{n.config}`", n.metric, f"{n.value:g} ± {n.tolerance:g}") for n in claims.published_of(plugin)]
    assert told == wanted
    commands = page(plugin).partition("## On the real data\n")[2]
    assert any(f"--gin {n.config}" in commands for n in claims.published_of(plugin))


def test_the_reader_of_annotations():
    assert choices("bool") == [True, False]
    assert choices("Literal['a', 'b'] | None") == ["a", "b"]
    assert choices("float | None") is None
    assert choices(None) is None
