"""A generated sample in NYUDepthv2's layout, for where the real set is absent: furnished rooms, ray-cast with true depth.

It is no substitute for NYUDepthv2 and its figures say nothing of the papers': it is there so that the whole pipeline runs on
real files and has something to learn. A room has a kind (bedroom, living room, kitchen, office), walls hung with things,
furniture along them, and clutter; the camera stands in it and sees a part, one thing before another. Colour is lit by a
lamp and a window, shaded, textured, blurred and noisy; depth is the exact distance along the optical axis; labels use the
numbers of NYU's 40 classes, 0 is void.

Some classes look alike and differ by the company they keep (table and desk, cabinet and dresser, window, picture and mirror):
that is where text can help. The tags of an image are its room's inventory, largest things first, with omissions and
mistakes: what somebody who furnished the room might tell. They are never computed from labels or pixels, so they name things
that the camera does not see.

An image is a function of (seed, split, number, size) alone. Equal bytes need equal versions of Pillow and numpy.
"""

from __future__ import annotations

import colorsys
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from core import data, samples
from core.registry import register
from plugins.sam.classes import NYU40

VERSION = 1  # of what is drawn
STATEMENT = (
    "Generated rooms in the layout of NYUDepthv2. No photograph and no part of NYUDepthv2 is in it; results on it are not "
    "comparable with published ones."
)
QUALITY = 92
ORACLE = "top5_labels_per_image.json"  # the release's name for tags that were computed from the label maps

Vector = NDArray[Any]
Colour = tuple[float, float, float]
NUMBER = {name: i + 1 for i, name in enumerate(NYU40)}  # as in the label files: 0 is void


@dataclasses.dataclass(frozen=True)
class Solid:
    """A box that stands upright: centre and half sizes in metres, turned about the vertical axis.

    Attributes:
        label: NYU's number of its class, 0 for void.
        pattern: what its surface looks like, see `_surface`.
        glow: share of the colour that does not depend on light.
    """

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: float
    label: int
    colour: Colour
    second: Colour
    pattern: str = "plain"
    glow: float = 0.0
    salt: int = 0


# --- furnishing a room ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Room:
    """Size in metres (x right, y up, z away from the camera's wall), what stands in it, and what was bought for it."""

    width: float
    height: float
    length: float
    solids: list[Solid] = dataclasses.field(default_factory=list)
    inventory: dict[str, float] = dataclasses.field(default_factory=dict)  # class name -> size in square metres, roughly


class _Furnisher:
    """Builds things in a room, relative to a place: `at(right, up, front)` in metres from the middle of the place's back edge."""

    def __init__(self, room: Room, rng: np.random.Generator):
        self.room, self.rng = room, rng
        self.origin, self.turn = (0.0, 0.0, 0.0), 0.0

    def place(self, x: float, z: float, turn: float, y: float = 0.0) -> None:
        self.origin, self.turn = (x, y, z), turn

    def solid(
        self,
        name: str,
        right: float,
        up: float,
        front: float,
        size: tuple[float, float, float],
        colour: Colour,
        pattern: str = "plain",
        second: Colour | None = None,
        glow: float = 0.0,
    ) -> None:
        """A box of `size` (width, height, depth) whose bottom middle is at (right, up, front)."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        x, z = right, -front  # the front looks towards -z before turning
        ox, oy, oz = self.origin
        centre = (ox + c * x + s * z, oy + up + size[1] / 2, oz - s * x + c * z)
        if second is None:
            second = (colour[0] * 0.6, colour[1] * 0.6, colour[2] * 0.6)
        half = (size[0] / 2, size[1] / 2, size[2] / 2)
        number = NUMBER.get(name, 0)
        self.room.solids.append(
            Solid(centre, half, self.turn, number, colour, second, pattern, glow, int(self.rng.integers(1 << 20)))
        )
        if number:
            area = max(size[0] * size[1], size[0] * size[2], size[1] * size[2])
            self.room.inventory[name] = max(self.room.inventory.get(name, 0.0), area)

    def wood(self) -> Colour:
        value = float(self.rng.uniform(0.3, 0.8))
        return (value, value * float(self.rng.uniform(0.6, 0.85)), value * float(self.rng.uniform(0.35, 0.65)))

    def paint(self, saturation: tuple[float, float] = (0.0, 0.35), value: tuple[float, float] = (0.35, 0.95)) -> Colour:
        return colorsys.hsv_to_rgb(float(self.rng.random()), float(self.rng.uniform(*saturation)), float(self.rng.uniform(*value)))

    def front(self) -> Colour:
        """What carcasses are made of, cabinet, dresser, desk and counter alike."""
        return self.wood() if self.rng.random() < 0.6 else self.paint((0.0, 0.15), (0.55, 0.95))

    # Things. Each is called with its width along the wall; it stands with its back on the place's edge.

    def bed(self, w: float) -> None:
        cover = self.paint((0.1, 0.7), (0.3, 0.9))
        self.solid("bed", 0, 0, 1.0, (w, 0.3, 2.0), self.wood(), "wood")
        self.solid("bed", 0, 0.3, 1.0, (w - 0.04, 0.22, 1.95), cover, str(self.rng.choice(["fabric", "stripes"])), self.paint())
        self.solid("bed", 0, 0, 0.03, (w, float(self.rng.uniform(0.8, 1.1)), 0.06), self.wood(), "wood")
        for side in (-1, 1) if w > 1.1 else (0,):
            self.solid("pillow", side * w / 4, 0.52, 0.33, (0.55, 0.14, 0.36), self.paint((0.0, 0.25), (0.7, 1.0)), "fabric")

    def drawers(self, name: str, w: float, height: float, depth: float) -> None:
        self.solid(name, 0, 0, depth / 2, (w, height, depth), self.front(), "drawers")

    def dresser(self, w: float) -> None:
        self.drawers("dresser", w, float(self.rng.uniform(0.75, 1.2)), 0.48)
        if self.rng.random() < 0.4:
            self.solid("mirror", 0, 1.25, 0.03, (w * 0.7, 0.7, 0.04), (0.7, 0.76, 0.8), "mirror", self.wood())

    def cabinet(self, w: float) -> None:
        tall = float(self.rng.choice([0.8, 1.0, 1.9]))
        self.solid("cabinet", 0, 0, 0.24, (w, tall, 0.48), self.front(), str(self.rng.choice(["drawers", "doors"])))

    def night_stand(self, w: float) -> None:
        self.drawers("night stand", w, 0.5, 0.4)
        if self.rng.random() < 0.7:
            self.lamp(0.5)

    def lamp(self, up: float) -> None:
        stem = 0.25 if up else 1.3
        self.solid("lamp", 0, up, 0.2, (0.04, stem, 0.04), (0.3, 0.28, 0.26))
        self.solid("lamp", 0, up + stem, 0.2, (0.26, 0.22, 0.26), (1.0, 0.93, 0.72), "fabric", glow=0.75)

    def table(self, w: float, name: str = "table", height: float = 0.74) -> None:
        depth = float(self.rng.uniform(0.6, 0.85))
        top = self.front()
        self.solid(name, 0, height - 0.05, depth / 2, (w, 0.05, depth), top, "wood")
        if self.rng.random() < 0.5:
            for x in (-1, 1):
                for z in (0.06, depth - 0.06):
                    self.solid(name, x * (w / 2 - 0.06), 0, z, (0.06, height - 0.05, 0.06), top)
        else:
            for x in (-1, 1):
                self.solid(name, x * (w / 2 - 0.04), 0, depth / 2, (0.06, height - 0.05, depth - 0.08), top, "wood")
        for _ in range(int(self.rng.integers(0, 3))):
            self.clutter(float(self.rng.uniform(-0.4, 0.4)) * w, height, float(self.rng.uniform(0.2, 0.8)) * depth)

    def desk(self, w: float) -> None:
        self.table(w, "desk")
        if self.rng.random() < 0.6:
            self.solid(
                "television" if self.rng.random() < 0.15 else "otherprop",
                0,
                0.78,
                0.2,
                (0.55, 0.36, 0.05),
                (0.07, 0.07, 0.08),
                "screen",
            )
        x, z = self._out(0.0, float(self.rng.uniform(0.9, 1.15)))
        self._chair_at(x, z, self.turn + math.pi + float(self.rng.normal(0, 0.4)))

    def _out(self, right: float, front: float) -> tuple[float, float]:
        c, s = math.cos(self.turn), math.sin(self.turn)
        return self.origin[0] + c * right - s * front, self.origin[2] - s * right - c * front

    def _chair_at(self, x: float, z: float, turn: float) -> None:
        kept = self.origin, self.turn
        self.place(x, z, turn)
        self.chair()
        self.origin, self.turn = kept

    def chair(self) -> None:
        colour = self.front() if self.rng.random() < 0.6 else self.paint((0.2, 0.8), (0.2, 0.8))
        pattern = "wood" if self.rng.random() < 0.5 else "fabric"
        self.solid("chair", 0, 0.43, 0.0, (0.44, 0.06, 0.44), colour, pattern)
        self.solid("chair", 0, 0.49, -0.2, (0.42, 0.42, 0.05), colour, pattern)
        for x in (-0.18, 0.18):
            for z in (-0.18, 0.18):
                self.solid("chair", x, 0, z, (0.05, 0.43, 0.05), colour)

    def sofa(self, w: float) -> None:
        colour = self.paint((0.05, 0.6), (0.2, 0.8))
        pattern = str(self.rng.choice(["fabric", "stripes"]))
        second = self.paint((0.05, 0.6), (0.2, 0.8))
        self.solid("sofa", 0, 0, 0.45, (w, 0.42, 0.9), colour, pattern, second)
        self.solid("sofa", 0, 0.42, 0.12, (w, 0.42, 0.24), colour, pattern, second)
        for x in (-1, 1):
            self.solid("sofa", x * (w / 2 - 0.1), 0.42, 0.45, (0.2, 0.2, 0.9), colour, pattern, second)
        for x in self.rng.uniform(-0.3, 0.3, int(self.rng.integers(0, 3))):
            self.solid("pillow", float(x) * w, 0.44, 0.38, (0.42, 0.36, 0.13), self.paint((0.1, 0.8), (0.4, 1.0)), "fabric")

    def bookshelf(self, w: float) -> None:
        tall, colour = float(self.rng.uniform(1.5, 2.1)), self.wood()
        self.solid("bookshelf", 0, 0, 0.02, (w, tall, 0.04), colour, "wood")
        for x in (-1, 1):
            self.solid("bookshelf", x * (w / 2 - 0.02), 0, 0.15, (0.04, tall, 0.3), colour, "wood")
        rows = int(tall / 0.38)
        for row in range(rows + 1):
            up = row * (tall - 0.04) / rows
            self.solid("bookshelf", 0, up, 0.15, (w, 0.04, 0.3), colour, "wood")
            if row < rows and self.rng.random() < 0.8:
                full = float(self.rng.uniform(0.4, 0.95)) * (w - 0.1)
                self.solid(
                    "books",
                    (full - w + 0.1) / 2,
                    up + 0.04,
                    0.15,
                    (full, float(self.rng.uniform(0.2, 0.27)), 0.2),
                    self.paint(),
                    "books",
                )

    def counter(self, w: float) -> None:
        self.solid("cabinet", 0, 0, 0.3, (w, 0.85, 0.58), self.front(), str(self.rng.choice(["drawers", "doors"])))
        self.solid("counter", 0, 0.85, 0.31, (w, 0.06, 0.64), self.paint((0.0, 0.15), (0.3, 0.9)), "stone")
        if self.rng.random() < 0.75:
            self.solid("cabinet", 0, 1.45, 0.17, (w, 0.7, 0.34), self.front(), "doors")
        if w > 1.2 and self.rng.random() < 0.6:
            self.solid("sink", -w / 4, 0.9, 0.31, (0.5, 0.03, 0.4), (0.75, 0.77, 0.8))
        for _ in range(int(self.rng.integers(0, 3))):
            self.clutter(float(self.rng.uniform(-0.4, 0.4)) * w, 0.91, 0.3)

    def refridgerator(self, w: float) -> None:
        self.solid("refridgerator", 0, 0, 0.33, (min(w, 0.75), 1.75, 0.66), self.paint((0.0, 0.06), (0.7, 0.97)), "fridge")

    def television(self, w: float) -> None:
        self.drawers("cabinet", w, 0.45, 0.42)
        self.solid("television", 0, 0.5, 0.2, (min(w, 1.1), 0.62, 0.06), (0.05, 0.05, 0.06), "screen")

    def shelves(self, w: float) -> None:
        colour = self.wood()
        for up in (1.3, 1.65):
            self.solid("shelves", 0, up, 0.12, (w, 0.035, 0.24), colour, "wood")
            full = float(self.rng.uniform(0.3, 0.8)) * w
            self.solid("books", 0, up + 0.035, 0.12, (full, 0.22, 0.18), self.paint(), "books")

    def clutter(self, right: float, up: float, front: float) -> None:
        """Small things; a part of them is void, as unlabelled things are in the real set."""
        size = tuple(float(v) for v in self.rng.uniform(0.08, 0.24, 3))
        name = str(self.rng.choice(["box", "otherprop", "void"], p=[0.4, 0.35, 0.25]))
        self.solid(
            name,
            right,
            up,
            front,
            (size[0], size[1], size[2]),
            self.paint((0.2, 0.9), (0.3, 0.95)),
            "label" if name == "box" else "plain",
        )

    # Things on a wall: width, height, bottom.

    def hang(self, name: str, right: float) -> None:
        w, h, up, pattern = {
            "window": (1.2, 1.1, 1.0, "window"), "picture": (0.7, 0.55, 1.35, "picture"), "mirror": (0.6, 0.9, 1.1, "mirror"),
            "whiteboard": (1.5, 0.95, 1.0, "board"), "door": (0.9, 2.02, 0.0, "door"),
        }[name]  # fmt: skip
        w, h = w * float(self.rng.uniform(0.85, 1.25)), h * float(self.rng.uniform(0.85, 1.15)) if name != "door" else h
        colour = {"window": (0.8, 0.9, 1.0), "mirror": (0.7, 0.76, 0.8), "whiteboard": (0.95, 0.95, 0.96)}.get(name)
        self.solid(
            name,
            right,
            up,
            0.02,
            (w, h, 0.04),
            colour or self.paint((0.1, 0.8), (0.3, 0.95)),
            pattern,
            self.wood(),
            0.55 if name == "window" else 0.0,
        )
        if name == "window" and self.rng.random() < 0.6:
            cloth = self.paint((0.1, 0.7), (0.3, 0.9))
            for side in (-1, 1):
                self.solid("curtain", right + side * (w / 2 + 0.12), 0.35, 0.06, (0.4, 2.0, 0.08), cloth, "folds")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a room of a kind holds: things that are always there and things that may be, by range of widths; wall hangings."""

    always: dict[str, tuple[float, float]]
    perhaps: dict[str, tuple[float, float]]
    hung: tuple[str, ...]
    middle: str = "table"


KINDS = {
    "bedroom": Kind(
        {"bed": (1.0, 1.8), "dresser": (0.9, 1.4)},
        {"night_stand": (0.4, 0.5), "bookshelf": (0.7, 1.0), "desk": (1.0, 1.3)},
        ("window", "picture", "mirror", "door"),
        middle="",
    ),
    "living room": Kind(
        {"sofa": (1.6, 2.2), "cabinet": (0.8, 1.3)},
        {"television": (1.1, 1.6), "bookshelf": (0.8, 1.4), "table": (1.0, 1.4)},
        ("window", "picture", "picture", "door"),
    ),
    "kitchen": Kind(
        {"counter": (1.4, 2.4)},
        {"refridgerator": (0.7, 0.75), "cabinet": (0.7, 1.1), "table": (1.0, 1.4)},
        ("window", "picture", "door"),
    ),
    "office": Kind(
        {"desk": (1.2, 1.6), "cabinet": (0.7, 1.2)},
        {"bookshelf": (0.8, 1.3), "shelves": (0.8, 1.2), "sofa": (1.5, 1.8)},
        ("whiteboard", "window", "picture", "door"),
        middle="desk",
    ),
}


def furnish(rng: np.random.Generator) -> Room:
    """A furnished room of a random kind."""
    room = Room(float(rng.uniform(3.0, 4.8)), float(rng.uniform(2.4, 2.8)), float(rng.uniform(3.2, 5.2)))
    f = _Furnisher(room, rng)
    w, h, d = room.width, room.height, room.length
    wall, floor, ceiling = f.paint((0.0, 0.3), (0.6, 0.95)), f.wood(), f.paint((0.0, 0.05), (0.82, 0.97))
    for x, z, turn, wide in (
        (w / 2, d, 0.0, w),
        (0.0, d / 2, -math.pi / 2, d),
        (w, d / 2, math.pi / 2, d),
        (w / 2, 0.0, math.pi, w),
    ):
        f.place(x, z, turn)
        f.solid("wall", 0, 0, -0.05, (wide + 0.4, h, 0.1), wall, "plaster")
    f.place(w / 2, d / 2, 0.0, -0.1)
    f.solid("floor", 0, 0, 0, (w, 0.1, d), floor, str(rng.choice(["planks", "tiles", "fabric"])))
    f.place(w / 2, d / 2, 0.0, h)
    f.solid("ceiling", 0, 0, 0, (w, 0.1, d), ceiling, "plaster")

    name = str(rng.choice(list(KINDS)))
    kind = KINDS[name]
    widths = {**kind.always, **kind.perhaps}
    things = [*kind.always, *(str(x) for x in rng.permutation(list(kind.perhaps))[: int(rng.integers(1, 4))])]
    walls = [(w / 2, d, 0.0, w), (0.0, d / 2, -math.pi / 2, d), (w, d / 2, math.pi / 2, d)]
    order = [walls[int(i)] for i in rng.permutation(3)]
    # Along the side walls, one end is beside the camera and stays free.
    free = {0.0: (0.1, 0.1), -math.pi / 2: (0.9, 0.6), math.pi / 2: (0.6, 0.9)}
    cursor = [-wide / 2 + free[turn][0] + float(rng.uniform(0.0, 0.4)) for _, _, turn, wide in order]
    for i, thing in enumerate(things):
        wide = float(rng.uniform(*widths[thing]))
        for side in ((i + j) % 3 for j in range(3)):
            x, z, turn, length = order[side]
            if cursor[side] + wide > length / 2 - free[turn][1]:
                continue
            along = cursor[side] + wide / 2
            cursor[side] += wide + float(rng.uniform(0.1, 0.5))
            c, s = math.cos(turn), math.sin(turn)
            f.place(x + c * along, z - s * along, turn)
            getattr(f, thing)(wide)
            break
    for thing in rng.permutation(kind.hung)[: int(rng.integers(2, 4))]:
        x, z, turn, length = walls[int(rng.integers(3))]
        f.place(x, z, turn)
        f.hang(str(thing), float(rng.uniform(-0.3, 0.3)) * length)
    if kind.middle and rng.random() < 0.75:
        f.place(w * float(rng.uniform(0.35, 0.65)), d * float(rng.uniform(0.55, 0.75)), float(rng.uniform(-0.5, 0.5)))
        f.table(float(rng.uniform(0.8, 1.2)), kind.middle, height=0.45 if name == "living room" else 0.74)
    for _ in range(int(rng.integers(1, 4))):
        f.place(float(rng.uniform(0.3, w - 0.3)), float(rng.uniform(0.45, 0.85)) * d, float(rng.uniform(0, 6.3)))
        if rng.random() < 0.5:
            f.chair()
        else:
            f.clutter(0, 0, 0)
    return room


# --- casting rays -----------------------------------------------------------------------------------------------------


def _hash(a: Vector, b: Vector | float, salt: int) -> Vector:
    """A number in 0..1 for each pair of integers."""
    x = np.sin(a * 127.1 + b * 311.7 + salt * 0.137) * 43758.5453
    return x - np.floor(x)


def _grain(u: Vector, v: Vector, cell: float, salt: int) -> Vector:
    """Smooth noise of feature size `cell`, 0..1."""
    x, y = u / cell, v / cell
    i, j = np.floor(x), np.floor(y)
    a, b = x - i, y - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    top = _hash(i, j, salt) * (1 - a) + _hash(i + 1, j, salt) * a
    below = _hash(i, j + 1, salt) * (1 - a) + _hash(i + 1, j + 1, salt) * a
    return top * (1 - b) + below * b


def _surface(solid: Solid, u: Vector, v: Vector, half: tuple[float, float], front: NDArray[np.bool_]) -> Vector:
    """Colour (n, 3) at surface coordinates u (across) and v (up) in metres from the middle of a face."""
    one, two = np.array(solid.colour), np.array(solid.second)
    salt, kind = solid.salt, solid.pattern
    fine = 0.9 + 0.2 * _grain(u, v, 0.03, salt)

    def mix(share: Vector | NDArray[np.bool_]) -> Vector:
        return one + (two - one) * np.clip(np.asarray(share, float), 0, 1)[:, None]

    x, y = np.abs(u) / half[0], np.abs(v) / half[1]
    frame = (half[0] - np.abs(u) < 0.05) | (half[1] - np.abs(v) < 0.05)
    if kind == "wood":
        colour = mix(0.35 * _grain(u, v, 0.2, salt) + 0.3 * _grain(u * 0.15, v, 0.02, salt))
    elif kind == "planks":
        row = np.floor(v / 0.12)
        gap = (np.abs(v / 0.12 - row - 0.5) > 0.45) | (np.abs((u + row * 0.37) % 0.9) < 0.02)
        colour = mix(0.4 * _hash(row, np.floor((u + row * 0.37) / 0.9), salt) + 0.6 * gap)
    elif kind == "tiles":
        grout = (np.abs(u / 0.33 % 1 - 0.5) > 0.46) | (np.abs(v / 0.33 % 1 - 0.5) > 0.46)
        colour = mix(0.15 * _hash(np.floor(u / 0.33), np.floor(v / 0.33), salt) + 0.6 * grout)
    elif kind == "stone":
        colour = mix(0.6 * _grain(u, v, 0.015, salt) + 0.3 * _grain(u, v, 0.06, salt))
    elif kind == "stripes":
        colour = mix(np.sin(2 * np.pi * u / (0.1 + 0.08 * (salt % 5) / 4)) > 0.2)
    elif kind == "folds":
        colour = one * (0.7 + 0.3 * np.sin(2 * np.pi * u / 0.09 + 2 * _grain(u, v, 0.4, salt)))[:, None]
    elif kind in ("drawers", "doors"):
        step = (
            half[1] * 2 / max(1, round(half[1] * 2 / 0.24))
            if kind == "drawers"
            else half[0] * 2 / max(1, round(half[0] * 2 / 0.42))
        )
        along = (v + half[1] if kind == "drawers" else u + half[0]) / step % 1
        across = u if kind == "drawers" else v
        line, knob = (
            np.abs(along - 0.5) > 0.47,
            (np.abs(across) < 0.07) & (np.abs(along - (0.5 if kind == "drawers" else 0.85)) < 0.07),
        )
        colour = mix(0.25 * _grain(u * 0.2, v, 0.04, salt) + front * (0.8 * line + 0.9 * knob))
    elif kind == "books":
        book = np.floor(u / 0.045)
        hue = np.stack([_hash(book, float(k), salt) for k in range(3)], -1)
        colour = 0.25 + 0.65 * hue * (np.abs(u / 0.045 - book - 0.5) < 0.45)[:, None]
    elif kind == "window":
        bar = (np.abs(u) < 0.03) | (np.abs(v) < 0.025) | frame
        colour = np.where(bar[:, None], two, one * (0.8 + 0.2 * v / half[1] + 0.15 * _grain(u, v, 0.3, salt) - 0.1)[:, None])
    elif kind == "picture":
        blobs = np.stack([_grain(u, v, 0.25, salt + 7 * k) for k in range(3)], -1)
        colour = np.where(frame[:, None], two, 0.4 * one + 0.7 * blobs)
    elif kind == "mirror":
        colour = np.where(
            frame[:, None], two, one * (0.75 + 0.3 * _grain(u, v, 0.5, salt) + 0.1 * (np.abs(u - v) % 0.4 < 0.08))[:, None]
        )
    elif kind == "board":
        ink = (_grain(u * 0.5, v, 0.03, salt) > 0.72) & (np.sin(v * 40 + salt) > 0.5) & (x < 0.8) & (y < 0.75)
        colour = np.where((frame & (y > 0.9))[:, None], 0.6, one - 0.5 * ink[:, None])
    elif kind == "screen":
        colour = mix(0.5 * frame) + 0.06 * np.clip(u + v, 0, 1)[:, None]
    elif kind == "door":
        panel = (np.abs(x - 0.55) < 0.06) & (y < 0.8) | (np.abs(y - 0.8) < 0.02) & (x < 0.55)
        colour = mix(0.4 * panel + 0.9 * ((np.abs(u - 0.35) < 0.03) & (np.abs(v) < 0.04)))
    elif kind == "fridge":
        colour = mix(
            0.7 * (front & (np.abs(v - 0.25) < 0.012))
            + 0.7 * (front & (np.abs(u + half[0] * 0.8) < 0.02) & (np.abs(v - 0.25) < 0.3))
        )
    elif kind == "label":
        colour = mix(0.7 * ((x < 0.5) & (y < 0.4)))
    elif kind == "fabric":
        colour = mix(0.3 * _grain(u, v, 0.02, salt) + 0.25 * _grain(u, v, 0.15, salt))
    elif kind == "plaster":
        colour = mix(0.06 * _grain(u, v, 0.3, salt))
        return colour
    else:
        colour = mix(np.zeros_like(u))
    return colour * fine[:, None]


def _turn(angle: float) -> Vector:
    """From a solid's frame to the room's, for columns; rows go the other way with @."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def cast(origin: Vector, rays: Vector, solids: Sequence[Solid]) -> tuple[Vector, NDArray[np.int64]]:
    """First hit of each ray: distance in ray lengths (infinite for none), and which solid (-1 for none).

    Args:
        origin: (1, 3) or (n, 3).
        rays: directions (n, 3), not of unit length.
    """
    nearest, which = np.full(len(rays), np.inf, np.float32), np.full(len(rays), -1)
    turned: dict[float, tuple[Vector, Vector, Vector, Vector]] = {}
    for number, solid in enumerate(solids):
        if solid.turn not in turned:  # a handful of directions in a room
            turn = _turn(solid.turn)
            direction = rays @ turn
            inverse = (1 / np.where(np.abs(direction) < 1e-9, 1e-9, direction)).T.astype(np.float32)
            turned[solid.turn] = turn, inverse, np.abs(inverse), (origin @ turn).T.astype(np.float32) * inverse
        turn, inverse, size, start = turned[solid.turn]
        enter: Any = np.float32(1e-6)
        leave: Any = np.float32(np.inf)
        centre = (np.array(solid.centre) @ turn).astype(np.float32)
        for k in range(3):  # between two parallel planes, three times
            middle, reach = centre[k] * inverse[k] - start[k], np.float32(solid.half[k]) * size[k]
            enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
        hit = (enter < leave) & (enter < nearest) & (enter > 1e-6)
        nearest[hit], which[hit] = enter[hit], number
    return nearest.astype(np.float64), which


@dataclasses.dataclass(frozen=True)
class View:
    """What a camera in a room sees: colour uint8 (h, w, 3), depth in metres (h, w), labels uint8 (h, w)."""

    colour: NDArray[np.uint8]
    depth: NDArray[np.float64]
    labels: NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Camera:
    """Where a camera stands and looks.

    Attributes:
        eye: position in the room, metres.
        yaw, pitch: to the right and down, radians.
        field: horizontal field of view, radians.
    """

    eye: tuple[float, float, float]
    yaw: float
    pitch: float
    field: float


def camera_in(room: Room, rng: np.random.Generator) -> Camera:
    """A camera at eye height near the wall z = 0, looking into the room."""
    eye = (room.width * rng.uniform(0.3, 0.7), rng.uniform(1.15, 1.7), rng.uniform(0.15, 0.4))
    return Camera(eye, rng.uniform(-0.4, 0.4), rng.uniform(0.06, 0.34), math.radians(rng.uniform(58, 68)))


def render(room: Room, camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> View:
    """One picture of a room in random light."""
    height, width = size
    eye, yaw, pitch = np.array(camera.eye), camera.yaw, camera.pitch
    focal = 0.5 * width / math.tan(camera.field / 2)
    y, x = np.mgrid[:height, :width].reshape(2, -1) + 0.5
    rays = np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, np.ones(height * width)], -1)  # z along the optical axis
    tilt = np.array([[1, 0, 0], [0, math.cos(pitch), math.sin(pitch)], [0, -math.sin(pitch), math.cos(pitch)]])
    swing = np.array([[math.cos(yaw), 0, -math.sin(yaw)], [0, 1, 0], [math.sin(yaw), 0, math.cos(yaw)]])
    rays = rays @ tilt @ swing
    distance, which = cast(eye[None], rays, room.solids)
    assert (which >= 0).all(), "a ray left the room"
    hits = eye + distance[:, None] * rays

    colour, normal = np.zeros((len(rays), 3)), np.zeros((len(rays), 3))
    glow = np.zeros(len(rays))
    for number in np.unique(which):
        solid, seen = room.solids[number], np.flatnonzero(which == number)
        turn = _turn(solid.turn)
        point = (hits[seen] - solid.centre) @ turn
        axis = np.argmin(np.abs(np.abs(point) - solid.half), axis=1)
        for face, (across, up) in enumerate(((2, 1), (0, 2), (0, 1))):
            on = axis == face
            if not on.any():
                continue
            front = point[on, 2] < 0 if face == 2 else np.zeros(int(on.sum()), bool)
            half = (solid.half[across], solid.half[up])
            colour[seen[on]] = _surface(solid, point[on, across], point[on, up], half, front)
            normal[seen[on]] = np.sign(point[on, face])[:, None] * turn[:, face]
        glow[seen] = solid.glow

    lamp = np.array([room.width * rng.uniform(0.35, 0.65), room.height - 0.35, room.length * rng.uniform(0.35, 0.65)])
    where = hits + 2e-3 * normal
    towards = lamp - where
    far = np.linalg.norm(towards, axis=1)
    facing = np.clip((towards * normal).sum(1) / far, 0, 1)
    lit = np.zeros(len(rays), bool)
    candidates = facing > 0
    lit[candidates] = cast(where[candidates], towards[candidates], room.solids)[0] > 1
    window = np.array([math.sin(bearing := rng.uniform(0, 2 * math.pi)), 0.4, math.cos(bearing)])
    light = 0.42 + 0.14 * np.clip(normal @ window, 0, 1) + lit * facing * 1.1 / (0.6 + 0.22 * far**2)
    colour *= (light * (1 - glow) + glow * 1.05)[:, None]

    image = colour.reshape(height, width, 3) * rng.uniform(0.75, 1.15) * rng.normal(1, 0.05, 3)
    corner = ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2).reshape(height, width, 1)
    image = gaussian_filter(image * (1 - 0.35 * corner), (rng.uniform(0.3, 0.7),) * 2 + (0,), truncate=2.5)
    image += rng.normal(0, rng.uniform(0.008, 0.025), image.shape)
    labels = np.array([solid.label for solid in room.solids], np.uint8)[which]
    pixels = (np.clip(image, 0, 1) ** 0.85 * 255 + 0.5).astype(np.uint8)
    return View(pixels, distance.reshape(height, width), labels.reshape(height, width))


def tags(room: Room, rng: np.random.Generator) -> list[str]:
    """The room's inventory, largest first and without its shell; one in ten is forgotten, and one room in five has a mistake."""
    listed = sorted(
        (name for name in room.inventory if name not in ("wall", "floor", "ceiling")), key=lambda n: (-room.inventory[n], n)
    )
    listed = [name for name in listed if rng.random() < 0.9]
    if rng.random() < 0.2:
        vocabulary = sorted({name for kind in KINDS.values() for name in (*kind.always, *kind.perhaps, *kind.hung)})
        listed.insert(int(rng.integers(len(listed) + 1)), str(rng.choice(vocabulary)).replace("_", " "))
    return list(dict.fromkeys(listed))


# --- a data set on disk -----------------------------------------------------------------------------------------------

_SPLITS = {"train": 0, "test": 1}


def encode_depth(metres: NDArray[np.float64], encoding: Literal["gray8", "millimetres"]) -> NDArray[Any]:
    """`gray8` as released: stretched from nearest (0) to farthest (255) of each image, so that the scale is lost; or uint16."""
    if encoding == "millimetres":
        return np.clip(metres * 1000 + 0.5, 0, 65535).astype(np.uint16)
    low, high = metres.min(), metres.max()
    return ((metres - low) / max(high - low, 1e-9) * 255 + 0.5).astype(np.uint8)


@register("dataset_maker", paper="layout of NYUDepthv2 (Silberman et al., ECCV 2012); rooms are generated")
def rgbd_sample(
    root: str,
    seed: int = 0,
    train: int = 144,
    test: int = 48,
    height: int = 96,
    width: int = 128,
    depth: Literal["gray8", "millimetres"] = "gray8",
) -> None:
    """Write a generated sample in NYUDepthv2's layout, with tags for every image.

    If `root` already holds this very sample, nothing is done.

    Args:
        root: folder to make: `RGB/*.jpg`, `Depth/*.png`, `Label/*.png`, `train.txt`, `test.txt`, and `tags.json` in the release's
            form ({"RGB/<name>.jpg": [label, …]}); also `top5_labels_per_image.json`, which is computed from the label maps and
            is there to be refused.
        seed: everything follows from it.
        train, test: images of each split; every image is another room.
        height, width: pixels; NYUDepthv2 has 480 x 640.
        depth: `gray8`, the release's encoding, or `millimetres` (16-bit), see `encode_depth`.

    Raises:
        ValueError: for options out of range, or a `root` that holds anything else.
    """
    options = {"train": train, "test": test, "height": height, "width": width, "depth": depth}
    for name, value in options.items():
        if isinstance(value, int) and value < (16 if name in ("height", "width") else 1):
            raise ValueError(f"{name} must be at least {16 if name in ('height', 'width') else 1}, got {value}")
    if depth not in ("gray8", "millimetres"):
        raise ValueError(f"depth must be gray8 or millimetres, got {depth!r}")

    def write(folder: Path) -> dict[str, Any]:
        for part in ("RGB", "Depth", "Label"):
            (folder / part).mkdir()
        told: dict[str, list[str]] = {}
        largest: dict[str, list[str]] = {}
        number = 0
        for split, count in (("train", train), ("test", test)):
            lines = []
            for i in range(count):
                rng = data.generator(seed, _SPLITS[split], i)
                room = furnish(rng)
                view = render(room, camera_in(room, rng), (height, width), rng)
                stem, number = f"{number:04d}", number + 1
                Image.fromarray(view.colour).save(folder / "RGB" / f"{stem}.jpg", quality=QUALITY)
                Image.fromarray(encode_depth(view.depth, depth)).save(folder / "Depth" / f"{stem}.png")
                Image.fromarray(view.labels).save(folder / "Label" / f"{stem}.png")
                told[f"RGB/{stem}.jpg"] = tags(room, rng)
                counts = np.bincount(view.labels.ravel(), minlength=41)[1:38]
                largest[f"RGB/{stem}.jpg"] = [NYU40[k] for k in np.argsort(-counts, kind="stable")[:5] if counts[k]]
                lines.append(f"RGB/{stem}.jpg Label/{stem}.png")
            (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tags.json").write_text(json.dumps(told, indent=0) + "\n", encoding="utf-8")
        (folder / ORACLE).write_text(json.dumps(largest, indent=0) + "\n", encoding="utf-8")
        return {"pillow": PIL.__version__, "numpy": np.__version__}

    samples.make(root, generator="sam.rgbd_sample", version=VERSION, seed=seed, options=options, statement=STATEMENT, write=write)
