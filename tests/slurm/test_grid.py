"""The grammar of a sweep."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm import grid


def overrides(*texts):
    return [c.overrides for c in grid.product([grid.axis(t) for t in texts])]


def test_a_product_of_axes_the_last_fastest():
    assert overrides("a.B.c=0.3,0.5", "SEED=0..2") == [
        (f"a.B.c={ratio}", f"SEED={seed}") for ratio in ("0.3", "0.5") for seed in (0, 1, 2)
    ]


def test_what_stands_in_one_axis_moves_together():
    assert overrides("A=1,2,3; B=x,y,z", "C=7") == [("A=1", "B=x", "C=7"), ("A=2", "B=y", "C=7"), ("A=3", "B=z", "C=7")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0..3", ["0", "1", "2", "3"]),
        ("-2..2..2", ["-2", "0", "2"]),
        ("0.1..0.3..0.1", ["0.1", "0.2", "0.3"]),  # in decimals: 0.1 + 0.1 + 0.1 is 0.3 here
        ("5..5", ["5"]),
        ("1,4..6,9", ["1", "4", "5", "6", "9"]),
        ("(1, 2),(3, 4)", ["(1, 2)", "(3, 4)"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("@optim.SGD,@optim.AdamW", ["@optim.SGD", "@optim.AdamW"]),
        ("{'k': [1, 2]},None", ["{'k': [1, 2]}", "None"]),
        ("1e-3,1e-4", ["1e-3", "1e-4"]),
    ],
)
def test_values(text, expected):
    assert grid.values(text) == expected


def test_presets_are_one_axis_of_named_groups():
    groups = dict(map(grid.preset, ["full:", "no gate: a.B.gate=False; a.B.c=(1, 2)"]))
    found = list(grid.product([grid.presets(groups), grid.axis("SEED=0,1")]))
    assert [c.overrides for c in found] == [
        ("SEED=0",), ("SEED=1",), ("a.B.gate=False", "a.B.c=(1, 2)", "SEED=0"), ("a.B.gate=False", "a.B.c=(1, 2)", "SEED=1"),
    ]  # fmt: skip
    assert [dict(c.cells) for c in found][2] == {"preset": "no gate", "SEED": "0"}
    assert {c.file for c in found} == {None}


def test_a_preset_may_name_a_file():
    groups = dict(map(grid.preset, ["full:", "off: gin/off.gin", "less: my_paper:less.gin; a.B.names='x.gin'"]))
    found = list(grid.product([grid.presets(groups), grid.axis("SEED=0,1")]))
    assert [c.file for c in found] == [None, None, *["gin/off.gin"] * 2, *["my_paper:less.gin"] * 2]
    assert found[2].overrides == ("SEED=0",)
    assert found[4].overrides == ("a.B.names='x.gin'", "SEED=0")
    with pytest.raises(grid.GridError, match=r"'two' names 2 files, a\.gin and b\.gin"):
        grid.presets({"two": ["a.gin", "b.gin"]})


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([""], "--grid is empty"),
        ([], "the grid is empty"),
        (["SEED"], "is not NAME=VALUES"),
        (["SEED="], "there is no value"),
        (["=3"], "is not NAME=VALUES"),
        (["SEED=1,,2"], "empty value"),
        (["SEED=1,2,"], "empty value"),
        (["SEED=1,1"], "comes twice"),
        (["SEED=3..1"], "range 3..1 is empty"),
        (["A=0.1..0.5"], "need a step"),
        (["A=0..5..0"], "the step must be positive"),
        (["A=0..1000000"], "has 1,000,001 values"),
        (["A=1,2; B=1"], "A has 2, B has 1"),
        (["A=1; A=2"], "A comes twice"),
        (["A=(1,2"], "a bracket is not closed"),
        (["A='x"], "a quote is not closed"),
        (["A=1,2", "A=3,4"], "A is varied by two axes"),
        (["A=0..999", "B=0..999"], "1,000,000 combinations"),
    ],
)
def test_what_is_wrong_with_a_grid_is_one_line(texts, said):
    with pytest.raises(grid.GridError) as caught:
        overrides(*texts)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["no colon", ": A=1", "A=1: B"])
def test_a_preset_needs_a_label(text):
    with pytest.raises(grid.GridError, match="is not LABEL"):
        grid.preset(text)


def test_a_preset_and_an_axis_cannot_vary_the_same_name():
    with pytest.raises(grid.GridError, match="SEED is varied by two axes"):
        list(grid.product([grid.presets({"a": ["SEED=1"]}), grid.axis("SEED=1,2")]))


@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=3, unique=True), min_size=1, max_size=3))
def test_a_product_is_itertools_product(columns):
    texts = [f"N{i}=" + ",".join(map(str, column)) for i, column in enumerate(columns)]
    expected = [tuple(f"N{i}={v}" for i, v in enumerate(row)) for row in itertools.product(*columns)]
    assert overrides(*texts) == expected
