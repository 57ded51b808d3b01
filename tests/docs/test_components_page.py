"""docs/components.md names every option of every registered constructor, with its default and a meaning."""

import inspect
import re
import sys
from pathlib import Path

import make_components
import pytest

from core import registry

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page():
    return (DOCS / "components.md").read_text(encoding="utf-8")


def rows(page, component):
    """Default, meaning and what the gin files bind, by option, of a component's table."""
    section = re.search(rf"^### {re.escape(component)}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, f"{component} is not on the page"
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in section[1].splitlines() if line.startswith("| `")]
    return {c[0].strip("`"): (c[1], c[3], c[4]) for c in cells}


def test_the_page_is_up_to_date(page):
    assert page == make_components.page(), "stale: run python docs/make_components.py"


@pytest.mark.parametrize("plugin", make_components.PLUGINS)
def test_it_has_what_the_imported_constructors_take(page, plugin):
    """Not from source text but from the classes themselves: a constructor that the text hides would be missing here."""
    named = [c for c in registry.index().values() if c.plugin == plugin]
    assert named
    for component in named:
        registry.load_component(component.name)
        taken = inspect.signature(registry.registered()[component.name].cls).parameters
        options = {n: p for n, p in taken.items() if n not in (*component.denied, "self")}
        found = rows(page, component.name)
        assert list(found) == list(options), component.name
        for name, parameter in options.items():
            default, meaning, _ = found[name]
            assert (default == "required") == (parameter.default is inspect.Parameter.empty), (component.name, name)
            if default != "required":
                module = vars(sys.modules[component.module])
                written = eval(default.strip("`").replace("\\|", "|"), dict(module))  # source text of this repository
                assert written is parameter.default or written == parameter.default, (component.name, name)
            assert meaning.strip("– "), f"{component.name}.{name} has no description: say under Args: of its docstring what it does"


def test_an_entry_of_a_docstring_may_speak_of_several_options_and_run_over_lines():
    doc = "Summary.\n\nUses `c` twice. Nothing else.\n\nArgs:\n    a, b: of both,\n        at length: here.\n    d: last.\n\nAfter."
    assert make_components.described(doc) == {"a": "of both, at length: here.", "b": "of both, at length: here.", "d": "last."}
    assert make_components.mentions(doc, "c") == "Uses `c` twice."
    assert make_components.described("No list.") == {}


def test_a_gin_file_that_binds_another_value_is_named(page):
    assert rows(page, "sdtps.TokenSparse")["use_gumbel"][2] == "`True` (sdtps/tokens/gumbel.gin)"
    assert rows(page, "sdtps.PKPlan")["instances"][2] == "`4` (sdtps/msvr310.gin), `16` (sdtps/rgbnt100.gin)"


def test_a_stale_page_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_components, "PAGE", tmp_path / "components.md")
    assert make_components.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert make_components.main([]) == 0
    assert make_components.main(["--check"]) == 0
