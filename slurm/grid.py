"""The grammar of a sweep: axes, and their product.

    NAME=0.3,0.5,0.7          values, as `--set` takes them (strings need no quotes; commas in brackets or quotes stay)
    NAME=0..2                 whole numbers, both ends included;  0..10..5 with a step;  0.1..0.3..0.1 too
    A=1,2,3; B=x,y,z          one axis on which A and B move together
    LABEL: A=1; B=2           a preset: a named group of overrides; all presets are one axis
    LABEL: gin/x.gin; A=1     a preset from a file of its own, instead of the sweep's

Several axes make a product; the last one varies fastest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

LARGEST = 100_000
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:\.\.({_NUMBER}))?")
_NAME = re.compile(r"[A-Za-z_][\w./]*")
_OPEN, _CLOSE = "([{", ")]}"


class GridError(ValueError):
    """What is wrong with a grid, in one line."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """What varies together: `names`, and `points` with one value (as text) a name. Presets also have `labels` and `files`."""

    names: tuple[str, ...]
    points: tuple[tuple[tuple[str, str], ...], ...]
    labels: tuple[str, ...] = ()
    files: tuple[str | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Combination:
    """One point of the product: overrides for `--set`, the cells of its row in a table, its gin file if not the sweep's, and which
    of the overrides are its preset's."""

    overrides: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    file: str | None = None
    preset: tuple[str, ...] = ()


def split(text: str, separator: str) -> list[str]:
    """Split at a separator outside brackets and quotes; parts are stripped.

    Raises:
        GridError: for a bracket or quote that is never closed.
    """
    parts, depth, quote, start = [], 0, "", 0
    escaped = False
    for position, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    if quote or depth:
        raise GridError(f"{text!r}: {'a quote' if quote else 'a bracket'} is not closed")
    return [*parts, text[start:].strip()]


def _range(text: str) -> list[str] | None:
    """The values of `A..B` or `A..B..STEP`, None for anything else."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return None
    first, last = Decimal(found[1]), Decimal(found[2])
    whole = first == first.to_integral_value() and "." not in found[1] and "." not in found[2]
    if found[3] is None and not whole:
        raise GridError(f"range {text}: fractions need a step, e.g. {found[1]}..{found[2]}..0.1")
    step = Decimal(found[3] or 1)
    if step <= 0:
        raise GridError(f"range {text}: the step must be positive")
    if last < first:
        raise GridError(f"range {text} is empty: {found[2]} is below {found[1]}")
    count = int((last - first) / step) + 1
    if count > LARGEST:
        raise GridError(f"range {text} has {count:,} values; at most {LARGEST:,}")
    return [str(first + i * step) for i in range(count)]


def values(text: str) -> list[str]:
    """The values on the right of an `=`.

    Raises:
        GridError: if there is none, or one is empty.
    """
    if not text.strip():
        raise GridError("there is no value")
    found: list[str] = []
    for part in split(text, ","):
        if not part:
            raise GridError(f"{text!r} has an empty value; is there a comma too many?")
        found += _range(part) or [part]
    return found


def _assignment(text: str) -> tuple[str, str]:
    name, equals, right = text.partition("=")
    if not equals or not _NAME.fullmatch(name.strip()):
        raise GridError(f"{text!r} is not NAME=VALUES, e.g. SEED=0..2 or sdtps.TokenSparse.sparse_ratio=0.3,0.5")
    return name.strip(), right


def axis(text: str) -> Axis:
    """One axis from `NAME=VALUES`, or from several joined by `;` that move together.

    Raises:
        GridError: what does not parse, no values, a name or a point twice, or lists of different length.
    """
    if not text.strip():
        raise GridError("--grid is empty; want NAME=VALUES, e.g. SEED=0..2")
    columns: dict[str, list[str]] = {}
    for part in split(text, ";"):
        try:
            name, right = _assignment(part)
            if name in columns:
                raise GridError(f"{name} comes twice")
            columns[name] = values(right)
        except GridError as error:
            raise GridError(f"--grid {text!r}: {error}") from None
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise GridError(f"--grid {text!r}: what moves together needs equally many values; {said}")
    points = tuple(tuple(zip(columns, row)) for row in zip(*columns.values()))
    twice = next((point for point, times in Counter(points).items() if times > 1), None)
    if twice is not None:  # within one column of several a value may well come again
        raise GridError(f"--grid {text!r}: {', '.join(f'{name} = {value}' for name, value in twice)} comes twice")
    return Axis(tuple(columns), points)


def preset(text: str) -> tuple[str, list[str]]:
    """`LABEL: A=1; B=2` as a label and its overrides.

    Raises:
        GridError: if there is no label.
    """
    label, colon, right = text.partition(":")
    if not colon or not label.strip() or "=" in label:
        raise GridError(f"--preset {text!r} is not LABEL: A=1; B=2 or LABEL: FILE.gin; A=1")
    return label.strip(), [part for part in split(right, ";") if part]


def presets(groups: Mapping[str, Sequence[str]]) -> Axis:
    """One axis from named groups of overrides, each with a gin file of its own if it names one; an empty group is the base config.

    Raises:
        GridError: for an override that does not parse, or a name twice or two files in one group.
    """
    points = []
    files: list[str | None] = []
    for label, overrides in groups.items():
        point: list[tuple[str, str]] = []
        own = [text.strip() for text in overrides if text.strip().endswith(".gin") and "=" not in text]
        if len(own) > 1:
            raise GridError(f"preset {label!r} names {len(own)} files, {' and '.join(own)}; it can come from one")
        files.append(own[0] if own else None)
        for override in (text for text in overrides if text.strip() not in own):
            try:
                name, right = _assignment(override)
            except GridError as error:
                raise GridError(f"preset {label!r}: {error}") from None
            if name in dict(point):
                raise GridError(f"preset {label!r} sets {name} twice")
            point.append((name, right.strip()))
        points.append(tuple(point))
    names = tuple(dict.fromkeys(name for point in points for name, _ in point))
    return Axis(names, tuple(points), tuple(groups), tuple(files))


def product(axes: Sequence[Axis]) -> Iterator[Combination]:
    """Every combination of the axes.

    Raises:
        GridError: if there is nothing to vary, two axes vary one name, or the product is larger than `LARGEST`.
    """
    if not axes or not all(a.points for a in axes):
        raise GridError("the grid is empty: give --grid NAME=VALUES, --preset LABEL:… or --sweep FILE (one run alone: repro run)")
    owners: dict[str, int] = {}
    for number, one in enumerate(axes):
        for name in one.names:
            if owners.setdefault(name, number) != number:
                raise GridError(f"{name} is varied by two axes; join what moves together with `;` or drop one")
    size = math.prod(len(a.points) for a in axes)
    if size > LARGEST:
        raise GridError(f"the grid has {size:,} combinations; at most {LARGEST:,}")
    for chosen in itertools.product(*(range(len(a.points)) for a in axes)):
        overrides: list[str] = []
        cells: list[tuple[str, str]] = []
        file: str | None = None
        preset: tuple[str, ...] = ()
        for one, position in zip(axes, chosen):
            point = one.points[position]
            own = tuple(f"{name}={value}" for name, value in point)
            overrides += own
            preset = own if one.labels else preset
            cells += [("preset", one.labels[position])] if one.labels else point
            file = one.files[position] if one.files else file
        yield Combination(tuple(overrides), tuple(cells), file, preset)
