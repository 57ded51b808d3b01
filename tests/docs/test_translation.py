"""README.zh-CN.md says what README.md says: the same commands, the same figures, the same links, each part in the same place."""

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@pytest.fixture(scope="module")
def both():
    return [(TOP / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]


def commands(text):
    """Indented lines, without what is said after `#`."""
    return [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines() if line.startswith("    ")]


def tables(text):
    """The numbers of every table row, in order; header rows have those in their titles."""
    return [_NUMBER.findall(line) for line in text.splitlines() if line.startswith("|")]


def links(text):
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("README")]


def test_the_commands_are_the_same(both):
    one, two = map(commands, both)
    assert one == two
    assert len(one) >= 15


def test_the_figures_of_the_tables_are_the_same(both):
    one, two = map(tables, both)
    assert one == two
    assert ["0.464", "0.381", "0.663", "0.856"] in one


def test_what_stands_in_code_and_the_figures_of_each_part_are_the_same(both):
    one, two = (re.split(r"^## ", text, flags=re.MULTILINE) for text in both)
    assert len(one) == len(two)
    for ours, theirs in zip(one, two):
        assert sorted(_NUMBER.findall(ours)) == sorted(_NUMBER.findall(theirs)), ours.splitlines()[0]
        spans = [set(re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", part, flags=re.MULTILINE))) for part in (ours, theirs)]
        spoken = [{s for s in found if s.isascii() and "<" not in s} for found in spans]
        assert spoken[0] == spoken[1], ours.splitlines()[0]


def test_links_are_the_same_lead_somewhere_and_the_two_lead_to_each_other(both):
    one, two = map(links, both)
    assert one == two
    assert all((TOP / target).exists() for target in one)
    assert "(README.zh-CN.md)" in both[0]
    assert "(README.md)" in both[1]
