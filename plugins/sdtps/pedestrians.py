"""Walking persons in three spectra, drawn: what they wear, the cameras that see them, and the image that comes of it.

Each person has three looks that know nothing of each other: visible (RGB), reflected (NIR) and thermal (TIR). A figure is
painted once on a canvas of five channels (red, green, blue, NIR, TIR), part by part from back to front with anti-aliased
edges, and three sensors with faults of their own make images of it. Everything is numpy; randomness comes from the
generator that is handed in.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Field = NDArray[np.floating[Any]]  # h w, or 5 h w: red, green, blue, NIR, TIR

# --- persons ----------------------------------------------------------------------------------------------------------

PRINTS = ("plain", "hoops", "stripes", "checks", "yoke", "panel")
BANDS = ("plain", "belt", "double", "yoke", "panel", "hem")
PACKS = ("plain", "core", "belt", "collar", "hem", "half")


@dataclasses.dataclass(frozen=True)
class Visible:
    """What a colour camera sees. Colours are linear RGB in 0..1; cap and shoulder bag may be absent."""

    upper: tuple[float, float, float]
    second: tuple[float, float, float]
    lower: tuple[float, float, float]
    shoes: tuple[float, float, float]
    hair: tuple[float, float, float]
    skin: tuple[float, float, float]
    cap: tuple[float, float, float] | None
    bag: tuple[float, float, float] | None
    print: str


@dataclasses.dataclass(frozen=True)
class Reflected:
    """Reflectance in near infrared, 0..1, whatever the visible colour: dyes are mostly transparent there."""

    upper: float
    sleeves: float
    lower: float
    shoes: float
    hair: float
    band: float
    where: str


@dataclasses.dataclass(frozen=True)
class Thermal:
    """Surface temperature, 0 (coldest) to 1 (bare skin); `pocket` is a warm or cold thing on the hip."""

    trunk: float
    sleeves: float
    lower: float
    shoes: float
    hair: float
    slope: float
    pack: float
    pocket: float | None
    where: str


@dataclasses.dataclass(frozen=True)
class Person:
    visible: Visible
    reflected: Reflected
    thermal: Thermal
    short_sleeves: bool
    height: float
    girth: float


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))


def _visible(rng: np.random.Generator) -> Visible:
    upper = _colour(rng, (0.55, 0.95), (0.35, 0.9)) if rng.random() < 0.75 else _colour(rng, (0.0, 0.08), (0.06, 0.95))
    tan, dark = rng.uniform(0.25, 0.8), rng.uniform(0.04, 0.5)
    return Visible(
        upper=upper,
        second=_colour(rng, (0.0, 0.9), (0.1, 0.95)),
        lower=_colour(rng, (0.05, 0.6), (0.06, 0.7)),
        shoes=_colour(rng, (0.0, 0.7), (0.05, 0.8)),
        hair=(dark, dark * rng.uniform(0.55, 0.9), dark * rng.uniform(0.25, 0.7)),
        skin=(tan, 0.68 * tan, 0.52 * tan),
        cap=_colour(rng, (0.3, 0.95), (0.3, 0.95)) if rng.random() < 0.35 else None,
        bag=_colour(rng, (0.1, 0.95), (0.1, 0.95)) if rng.random() < 0.4 else None,
        print=str(rng.choice(PRINTS)),
    )


def _reflected(rng: np.random.Generator) -> Reflected:
    upper = rng.uniform(0.1, 0.9)
    band = upper + 0.5 if upper < 0.45 else upper - 0.45
    sleeves = upper if rng.random() < 0.5 else rng.uniform(0.1, 0.9)
    lower, shoes, hair = rng.uniform(0.08, 0.9), rng.uniform(0.05, 0.9), rng.uniform(0.1, 0.7)
    return Reflected(upper, sleeves, lower, shoes, hair, band, str(rng.choice(BANDS)))


def _thermal(rng: np.random.Generator) -> Thermal:
    trunk = rng.uniform(0.3, 0.8)
    pack = trunk + 0.4 if rng.random() < 0.5 else trunk - 0.35
    sleeves, lower = rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.8)
    shoes, hair, slope = rng.uniform(0.2, 0.7), rng.uniform(0.4, 0.8), rng.uniform(-0.25, 0.25)
    pocket = float(rng.choice([0.05, 1.0])) if rng.random() < 0.4 else None
    return Thermal(trunk, sleeves, lower, shoes, hair, slope, pack, pocket, str(rng.choice(PACKS)))


def _vector(look: Any) -> NDArray[np.float64]:
    """A look as a point, so that looks can be chosen far apart; a differing print counts 0.3, what is absent as middling."""
    numbers: list[float] = []
    for field in dataclasses.fields(look):
        value, weight = getattr(look, field.name), 2.0 if field.name in ("upper", "lower", "trunk") else 1.0
        if isinstance(value, str):
            numbers += [0.3 * (value == kind) for kind in (*PRINTS, *BANDS, *PACKS)]
        elif value is None:
            numbers += [0.5] * (1 if field.name == "pocket" else 3)
        else:
            numbers += [weight * x for x in (value if isinstance(value, tuple) else (value,))]
    return np.array(numbers)


def _apart(draw: Any, count: int, rng: np.random.Generator) -> list[Any]:
    """`count` looks out of forty times as many, each the farthest from those already taken."""
    candidates = [draw(rng) for _ in range(40 * count)]
    points = np.stack([_vector(look) for look in candidates])
    chosen, distance = [0], np.linalg.norm(points - points[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return [candidates[i] for i in rng.permutation(chosen)]


def persons(count: int, sharing: int, rng: np.random.Generator) -> list[Person]:
    """`count` persons of whom up to `sharing` have each look of a spectrum, and no two share two looks.

    With g looks a spectrum, person i = g q + r wears visible look r, reflected look r + q and thermal look r + 2 q (mod g);
    fewer share a look where `count` is too small for that to keep any two persons apart in two spectra.
    """
    looks = max(2, 2 * -(-count // (2 * sharing)))  # even, so that r and r + 2 q agree on short sleeves
    while 2 * (-(-count // looks) - 1) >= looks:
        looks += 2
    visible, reflected, thermal = (_apart(draw, looks, rng) for draw in (_visible, _reflected, _thermal))
    people = []
    for i in range(count):
        q, r = divmod(i, looks)
        height, girth = rng.uniform(0.95, 1.03), rng.uniform(1.0, 1.2)
        person = Person(visible[r], reflected[(r + q) % looks], thermal[(r + 2 * q) % looks], r % 2 == 0, height, girth)
        people.append(person)
    return [people[i] for i in rng.permutation(count)]


# --- cameras ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Camera:
    """Where a camera stands and what light it has.

    Attributes:
        scene: what its background is built of.
        facing: degrees between the walker's front and the camera; 180 sees backs.
        height: of a person in the image, as a share of the image's.
        tilt: vertical foreshortening of a camera that looks down.
        exposure, balance, colour_noise: of the colour sensor; the balance is its gain on red, green, blue.
        light: direction of the light from left (-1) to right (1).
        infrared, falloff: gain of NIR, and how much of it fades from the centre (a lamp on the camera).
        ambient, contrast: temperature of the surroundings and gain of the thermal sensor.
    """

    scene: str
    facing: float
    height: float
    tilt: float
    exposure: float
    balance: tuple[float, float, float]
    colour_noise: float
    light: float
    infrared: float
    falloff: float
    ambient: float
    contrast: float


CAMERAS = (
    Camera("street", 10, 0.94, 1.0, 1.0, (1.03, 1.0, 0.93), 0.015, 0.5, 0.95, 0.0, 0.40, 0.9),
    Camera("gate", 175, 0.89, 0.97, 0.42, (1.12, 0.95, 0.75), 0.04, -0.3, 1.05, 0.4, 0.20, 1.0),
    Camera("hall", 80, 0.96, 0.94, 0.75, (0.88, 1.0, 1.07), 0.025, 0.0, 0.85, 0.2, 0.34, 0.92),
    Camera("park", 300, 0.91, 1.0, 0.6, (0.96, 0.92, 1.12), 0.03, -0.6, 1.1, 0.1, 0.27, 0.95),
)


def _clouds(rng: np.random.Generator, height: int, width: int, cell: int) -> Field:
    """Smooth noise in 0..1 with features of `cell` pixels."""
    grid = rng.random((max(2, height // cell + 2), max(2, width // cell + 2)), np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _leaves(rng: np.random.Generator, height: int, width: int) -> Field:
    """Foliage: clumps with ragged edges, about 0..1."""
    return 0.6 * _clouds(rng, height, width, 24) + 0.4 * _clouds(rng, height, width, 4)


def _grow(canvas: Field, where: NDArray[np.bool_], camera: Camera, rng: np.random.Generator) -> None:
    """Leaves: green, bright in NIR, a little colder than the surroundings."""
    _, height, width = canvas.shape
    sunlit = (0.5 + _clouds(rng, height, width, 3))[where]
    canvas[:, where] = np.array([0.11, 0.26, 0.09, 0.75, 0.0], np.float32)[:, None] * sunlit
    canvas[4, where] = camera.ambient - 0.1 + 0.04 * sunlit


class _Place:
    """Builds a background wider than an image, out of which each image takes a window: the camera stands, people walk by."""

    def __init__(self, camera: Camera, height: int, width: int, rng: np.random.Generator):
        self.camera, self.height, self.width, self.rng = camera, height, width, rng
        self.canvas: Field = np.empty((5, height, width), np.float32)
        self.floor = int(height * rng.uniform(0.7, 0.8))
        wall, ground = rng.uniform(0.25, 0.7), rng.uniform(0.2, 0.5)
        tint = rng.uniform(-0.08, 0.08, (2, 3))
        for top, bottom, level, colour in ((0, self.floor, wall, tint[0]), (self.floor, height, ground, tint[1])):
            self.canvas[:3, top:bottom] = (level + colour)[:, None, None]
            self.canvas[3, top:bottom], self.canvas[4, top:bottom] = rng.uniform(0.3, 0.7), camera.ambient + rng.uniform(-0.06, 0.1)
        self.canvas[:4] *= 1 + 0.25 * (_clouds(rng, height, width, 5) - 0.5)
        self.canvas[4] += 0.06 * (_clouds(rng, height, width, 30) - 0.5)
        {"street": self.street, "gate": self.gate, "hall": self.hall, "park": self.park}[camera.scene]()

    def block(self, top: int, bottom: int, left: int, right: int, values: Sequence[float]) -> None:
        """A rectangle of one value a channel; the last is its temperature above the surroundings."""
        self.canvas[:, max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = np.array(values, np.float32)[:, None, None]
        self.canvas[4, max(0, top) : max(0, bottom), max(0, left) : max(0, right)] += self.camera.ambient

    def blocks(self, count: int, tall: tuple[float, float], wide: tuple[float, float], warmer: tuple[float, float]) -> None:
        """Rectangles of random colour on the wall, sizes as shares of the image's height."""
        rng = self.rng
        for _ in range(count):
            rows, columns = int(self.height * rng.uniform(*tall)), int(self.height * rng.uniform(*wide))
            top, left = int(rng.uniform(0, max(1, self.floor - rows))), int(rng.uniform(-columns, self.width))
            colour = _colour(rng, (0.0, 0.6), (0.1, 0.9))
            self.block(top, top + rows, left, left + columns, (*colour, rng.uniform(0.1, 0.9), rng.uniform(*warmer)))

    def street(self) -> None:
        """Shop windows and a hedge, which is bright in NIR."""
        self.blocks(14, (0.2, 0.5), (0.08, 0.3), (-0.15, 0.1))
        rows = np.arange(self.height)[:, None]
        hedge = (_leaves(self.rng, self.height, self.width) > 0.5) & (_clouds(self.rng, self.height, self.width, 60) > 0.45)
        _grow(self.canvas, hedge & (rows > self.floor - 0.25 * self.height) & (rows < self.floor + 5), self.camera, self.rng)

    def gate(self) -> None:
        """Fence bars and warm lamps."""
        for left in range(int(self.rng.uniform(0, 14)), self.width, 14):
            self.block(int(0.2 * self.height), self.floor + 6, left, left + 3, (0.25, 0.26, 0.3, 0.35, -0.04))
        self.blocks(6, (0.05, 0.15), (0.05, 0.1), (0.1, 0.35))

    def hall(self) -> None:
        """Tiles, doors, radiators."""
        for top in range(self.floor, self.height, 12):
            self.block(top, top + 1, 0, self.width, (0.2, 0.2, 0.2, 0.3, 0.0))
        self.blocks(8, (0.45, 0.7), (0.12, 0.2), (-0.02, 0.04))
        self.blocks(5, (0.08, 0.16), (0.15, 0.3), (0.2, 0.4))

    def park(self) -> None:
        """Parked cars, some still warm, under trees."""
        rng, floor = self.rng, self.floor
        sill, roof = floor - int(0.22 * self.height), floor - int(0.33 * self.height)
        for _ in range(7):
            left, wide = int(rng.uniform(-40, self.width)), int(self.height * rng.uniform(0.3, 0.5))
            paint = (*_colour(rng, (0.2, 0.9), (0.15, 0.8)), rng.uniform(0.1, 0.8), rng.uniform(-0.05, 0.25))
            self.block(sill, floor - 4, left, left + wide, paint)
            self.block(roof, sill, left + wide // 5, left + wide - wide // 5, paint)
            for wheel in (left + wide // 6, left + wide - wide // 4):
                self.block(floor - 12, floor + 3, wheel, wheel + 14, (0.05, 0.05, 0.05, 0.1, 0.15))
        crowns = (_leaves(rng, self.height, self.width) > 0.52) & (np.arange(self.height)[:, None] < 0.35 * self.height)
        _grow(self.canvas, crowns, self.camera, rng)


def background(camera: Camera, height: int, width: int, rng: np.random.Generator) -> Field:
    """What stands before a camera, five channels, usually wider than the images that are cut from it."""
    return _Place(camera, height, width, rng).canvas


# --- drawing a figure -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cloth:
    """A surface in five channels: two values in each spectrum and what decides between them."""

    visible: tuple[Sequence[float], Sequence[float], str]
    nir: tuple[float, float, str]
    tir: tuple[float, float, str]
    slope: float = 0.0


def _plain(visible: Sequence[float], nir: float, tir: float) -> Cloth:
    return Cloth((visible, visible, "plain"), (nir, nir, "plain"), (tir, tir, "plain"))


def _soft(distance: Field) -> Field:
    """1 where the distance is positive, 0 where negative, with an edge about two pixels wide."""
    return np.clip(0.5 + 25 * distance, 0, 1)


def _motif(kind: str, u: Field, v: Field) -> Field | float:
    """Share of the second value at (u, v): u runs from collar (0) to hem (1), v across from -1 to 1."""
    if kind == "plain":
        return 0.0
    wrap = np.arcsin(np.clip(v, -1, 1))
    if kind == "hoops":
        return np.clip(0.5 + 3 * np.sin(2 * np.pi * 4.5 * u), 0, 1)
    if kind == "stripes":
        return np.clip(0.5 + 3 * np.sin(5 * wrap), 0, 1)
    if kind == "checks":
        return np.clip(0.5 + 4 * np.sin(2 * np.pi * 3.5 * u) * np.sin(5 * wrap), 0, 1)
    if kind in ("yoke", "collar"):
        return _soft(0.36 - u)
    if kind == "panel":
        return _soft(0.4 - np.abs(wrap))
    if kind == "belt":
        return _soft(0.09 - np.abs(u - 0.62))
    if kind == "double":
        return _soft(0.07 - np.abs(np.abs(u - 0.5) - 0.17))
    if kind == "hem":
        return _soft(u - 0.72)
    if kind == "half":
        return _soft(u - 0.5)
    assert kind == "core", kind
    return np.clip(1.3 - 2.4 * np.hypot(u - 0.4, 0.45 * v), 0, 1)


class _Figure:
    """Paints body parts on a canvas, back to front, anti-aliased at their edges."""

    def __init__(self, canvas: Field, light: float, folds: Field):
        self.canvas, self.light, self.folds = canvas, light, folds
        self.height, self.width = canvas.shape[1:]

    @staticmethod
    def _grid(window: tuple[slice, slice]) -> tuple[Field, Field]:
        rows, columns = window
        return np.arange(rows.start, rows.stop, dtype=np.float32)[:, None], np.arange(columns.start, columns.stop, dtype=np.float32)

    def _window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice] | None:
        rows = slice(max(0, int(top)), min(self.height, int(bottom) + 2))
        columns = slice(max(0, int(left)), min(self.width, int(right) + 2))
        return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None

    def paint(self, window: tuple[slice, slice], cover: Field, u: Field, v: Field, cloth: Cloth, bend: float = 1.0) -> None:
        """Blend a surface into the canvas; `bend` tells how round the part is."""
        colour = np.empty((5, *cover.shape), np.float32)
        one, two, kind = cloth.visible
        share = _motif(kind, u, v)
        for i in range(3):
            colour[i] = one[i] + (two[i] - one[i]) * share
        colour[3] = cloth.nir[0] + (cloth.nir[1] - cloth.nir[0]) * _motif(cloth.nir[2], u, v)
        across = np.clip(v, -1, 1)
        shade = 0.72 + 0.28 * np.sqrt(1 - across * across) + 0.2 * bend * self.light * across + self.folds[window]
        colour[:4] *= shade
        colour[4] = cloth.tir[0] + (cloth.tir[1] - cloth.tir[0]) * _motif(cloth.tir[2], u, v)
        colour[4] += cloth.slope * (0.5 - u) - 0.08 * across * across + 0.3 * self.folds[window]
        self.canvas[:, *window] += cover * (colour - self.canvas[:, *window])

    def limb(
        self, a: NDArray[Any], b: NDArray[Any], radii: tuple[float, ...], cloth: Cloth, along: tuple[float, float] = (0, 1)
    ) -> None:
        """A tapered capsule from a to b (x, y in pixels), its two end radii; u runs between the ends of `along`."""
        reach = max(radii) + 1
        lowest, highest = np.minimum(a, b) - reach, np.maximum(a, b) + reach
        window = self._window(lowest[0], lowest[1], highest[0], highest[1])
        if window is None:
            return
        y, x = self._grid(window)
        x, y = x - np.float32(a[0]), y - np.float32(a[1])
        dx, dy = float(b[0] - a[0]), float(b[1] - a[1])
        length = max(1e-3, float(np.hypot(dx, dy)))
        t = np.clip((x * dx + y * dy) / length**2, 0, 1)
        radius = radii[0] + (radii[1] - radii[0]) * t
        cover = np.clip(radius - np.hypot(x - t * dx, y - t * dy) + 0.5, 0, 1)
        v = (x * dy - y * dx) / (length * radius)
        self.paint(window, cover, along[0] + (along[1] - along[0]) * t, v, cloth)

    def trunk(self, top: NDArray[Any], bottom: NDArray[Any], outline: Sequence[tuple[float, float]], cloth: Cloth) -> None:
        """The body between two points, its half width given at shares of the way."""
        widest = max(width for _, width in outline) + 2
        left, right = min(top[0], bottom[0]) - widest, max(top[0], bottom[0]) + widest
        window = self._window(left, top[1] - 1, right, bottom[1] + 1)
        if window is None:
            return
        y, x = self._grid(window)
        u = (y - np.float32(top[1])) / np.float32(bottom[1] - top[1])
        half = np.interp(u, [s for s, _ in outline], [w for _, w in outline]).astype(np.float32)
        offset = x - (np.float32(top[0]) + np.float32(bottom[0] - top[0]) * u)
        cover = np.clip(half - np.abs(offset) + 0.5, 0, 1)
        cover *= np.clip(y - np.float32(top[1] - 0.5), 0, 1) * np.clip(np.float32(bottom[1] + 0.5) - y, 0, 1)
        self.paint(window, cover, np.broadcast_to(np.clip(u, 0, 1), cover.shape), offset / np.maximum(half, 1), cloth, bend=0.7)

    def ball(self, centre: NDArray[Any], radii: tuple[float, ...], cloth: Cloth, face: tuple[float, float] | None = None) -> None:
        """An ellipse; or of a head turned by (cosine, sine) only the face: below the hairline, on the camera's side."""
        (cx, cy), (rx, ry) = centre, radii
        window = self._window(cx - rx - 1, cy - ry - 1, cx + rx + 1, cy + ry + 1)
        if window is None:
            return
        y, x = self._grid(window)
        x, y = (x - np.float32(cx)) / np.float32(rx), (y - np.float32(cy)) / np.float32(ry)
        cover = np.clip((1 - np.hypot(x, y)) * min(rx, ry) + 0.5, 0, 1)
        if face is not None:
            cover *= np.clip(np.minimum(y + 0.35, 1.1 * face[0] + 1.6 * face[1] * x) * min(rx, ry) + 0.5, 0, 1)
        flat = np.broadcast_to(np.float32(0.5), cover.shape)
        self.paint(window, cover, flat, np.broadcast_to(x, cover.shape), cloth)


_TRUNK = (  # share of the way from the collar to the hem, half width seen from the front, and from the side
    (0.0, 0.05, 0.05),
    (0.07, 0.115, 0.07),
    (0.35, 0.12, 0.082),
    (0.65, 0.105, 0.075),
    (1.0, 0.115, 0.085),
)


class _Walker(_Figure):
    """A person in a random stride, `size` pixels tall, standing at (x, feet). Lengths of the body are shares of its height."""

    def __init__(self, canvas: Field, person: Person, camera: Camera, rng: np.random.Generator, x: float, feet: float, size: float):
        self.turn = np.deg2rad(camera.facing + rng.normal(0, 22))
        self.phase, self.stride = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.5)
        self.lean, self.sway = rng.normal(0, 0.02), rng.uniform(0.1, 0.7)
        super().__init__(canvas, camera.light, 0.1 * (_clouds(rng, canvas.shape[1], canvas.shape[2], 9) - 0.5))
        self.person, self.tilt, self.x, self.feet, self.tall = person, camera.tilt, x, feet, size * person.height
        seen, nir, tir = person.visible, person.reflected, person.thermal
        self.upper = Cloth(
            (seen.upper, seen.second, seen.print), (nir.upper, nir.band, nir.where), (tir.trunk, tir.pack, tir.where), tir.slope
        )
        print_on_sleeves = seen.print if seen.print in ("hoops", "yoke") else "plain"
        plain = _plain(seen.upper, nir.sleeves, tir.sleeves)
        self.sleeve = dataclasses.replace(plain, visible=(seen.upper, seen.second, print_on_sleeves))
        self.trousers = _plain(seen.lower, nir.lower, tir.lower)
        self.shoe = _plain(seen.shoes, nir.shoes, tir.shoes)
        self.skin = _plain(seen.skin, 0.68, 0.98)
        self.hair = _plain(seen.cap or seen.hair, nir.hair, tir.hair)
        self.draw()

    def at(self, side: float, up: float, ahead: float) -> NDArray[np.float64]:
        """A point of the body in pixels."""
        across = side * np.cos(self.turn) + (ahead + self.lean * up) * np.sin(self.turn)
        return np.array([self.x + self.tall * across, self.feet - self.tall * self.tilt * up])

    def thick(self, *radii: float) -> tuple[float, ...]:
        """Radii in pixels."""
        return tuple(self.tall * self.person.girth * radius for radius in radii)

    def leg(self, side: float) -> None:
        phase = self.phase + (np.pi if side > 0 else 0)
        swing = self.stride * np.sin(phase)
        flex = 0.25 + 0.5 * self.stride * max(0.0, float(np.cos(phase)))
        knee_ahead = 0.24 * np.sin(swing)
        ankle_ahead = knee_ahead + 0.24 * np.sin(swing - flex * 0.5)
        lift = 0.05 * max(0.0, -swing)
        hip, knee = self.at(0.055 * side, 0.52, 0), self.at(0.06 * side, 0.285, knee_ahead)
        ankle, toe = self.at(0.06 * side, 0.045 + lift, ankle_ahead), self.at(0.065 * side, 0.018 + lift, ankle_ahead + 0.08)
        self.limb(ankle, toe, self.thick(0.026, 0.02), self.shoe)
        self.limb(knee, ankle, self.thick(0.043, 0.031), self.trousers)
        self.limb(hip, knee, self.thick(0.066, 0.046), self.trousers)

    def arm(self, side: float) -> None:
        swing = self.sway * np.sin(self.phase + (0 if side > 0 else np.pi))
        out, drop, ahead = self.person.girth * side, 0.795 - 0.17 * np.cos(swing), 0.17 * np.sin(swing)
        shoulder, elbow = self.at(0.105 * out, 0.795, 0), self.at(0.138 * out, drop, ahead)
        wrist = self.at(0.144 * out, drop - 0.15 * np.cos(swing + 0.35), ahead + 0.15 * np.sin(swing + 0.35))
        bare = self.person.short_sleeves
        self.ball(wrist + (wrist - elbow) * 0.13, self.thick(0.024, 0.028), self.skin)
        self.limb(elbow, wrist, self.thick(0.032, 0.024), self.skin if bare else self.sleeve, (0.45, 0.9))
        self.limb(shoulder, elbow, self.thick(0.038, 0.031), self.skin if bare else self.sleeve, (0, 0.45))
        if bare:
            self.limb(shoulder, shoulder + 0.5 * (elbow - shoulder), self.thick(0.041, 0.042), self.sleeve, (0, 0.2))

    def draw(self) -> None:
        front, aside = float(np.cos(self.turn)), float(np.sin(self.turn))
        near = 1.0 if aside < 0 else -1.0  # the body's side that is closer to the camera
        seen, nir, tir = self.person.visible, self.person.reflected, self.person.thermal
        self.arm(-near)
        self.leg(-near)
        self.leg(near)
        if tir.pocket is not None:  # something warm or cold in a trouser pocket
            self.ball(
                self.at(-0.072, 0.41, 0),
                self.thick(0.03, 0.045),
                dataclasses.replace(self.trousers, tir=(tir.pocket, tir.pocket, "plain")),
            )
        self.limb(self.at(0, 0.87, 0.01), self.at(0, 0.80, 0), self.thick(0.03, 0.034), self.skin)
        outline = [(share, self.thick(float(np.hypot(wide * front, deep * aside)))[0]) for share, wide, deep in _TRUNK]
        self.trunk(self.at(0, 0.838, 0), self.at(0, 0.485, 0), outline, self.upper)
        if seen.bag is not None:  # cloth on the body: in NIR and TIR much as the garment beneath
            bag = _plain(seen.bag, nir.upper, tir.trunk)
            self.limb(self.at(-0.075, 0.82, 0), self.at(0.1, 0.56, 0), self.thick(0.011, 0.011), bag)
            self.limb(self.at(0.1, 0.56, 0), self.at(0.11, 0.47, 0), self.thick(0.05, 0.058), bag)
        head, wide, high = self.at(0, 0.925, 0.012), 0.05 * self.tall, 0.066 * self.tall * self.tilt
        self.ball(head, (wide, high), self.hair)
        self.ball(head, (0.9 * wide, 0.95 * high), self.skin, face=(front, aside))
        if seen.cap is not None:  # its peak points ahead
            self.limb(self.at(0, 0.95, 0.03), self.at(0, 0.945, 0.075), self.thick(0.014, 0.008), self.hair)
        self.arm(near)


# --- one image --------------------------------------------------------------------------------------------------------


def _occlude(canvas: Field, camera: Camera, rng: np.random.Generator) -> None:
    """A post, a box or a bush in front of the person."""
    _, height, width = canvas.shape
    kind = rng.integers(3)
    values = np.array(
        [*_colour(rng, (0, 0.5), (0.1, 0.8)), rng.uniform(0.1, 0.9), camera.ambient + rng.uniform(-0.1, 0.15)], np.float32
    )
    if kind == 0:
        left = int(rng.uniform(0.15, 0.8) * width)
        canvas[:, :, left : left + int(width * rng.uniform(0.06, 0.14))] = values[:, None, None]
    elif kind == 1:
        top, left = int(height * rng.uniform(0.62, 0.8)), int(width * rng.uniform(-0.2, 0.4))
        canvas[:, top:, max(0, left) : left + int(width * rng.uniform(0.4, 0.7))] = values[:, None, None]
    else:
        bush = (
            _leaves(rng, height, width) + (np.arange(height, dtype=np.float32)[:, None] / height - rng.uniform(0.72, 0.9)) * 4 > 0.5
        )
        _grow(canvas, bush, camera, rng)


def _sensors(canvas: Field, camera: Camera, rng: np.random.Generator) -> tuple[NDArray[np.uint8], ...]:
    """What the three sensors make of a scene: uint8 `h w 3` each, NIR and TIR grey."""
    _, height, width = canvas.shape
    colour = canvas[:3] * (camera.exposure * rng.uniform(0.85, 1.15) * np.array(camera.balance) * rng.normal(1, 0.04, 3))[
        :, None, None
    ].astype(np.float32)
    colour *= 1 + 0.15 * rng.normal() * np.linspace(-1, 1, width, dtype=np.float32)
    colour = gaussian_filter(colour, (0, *([rng.uniform(0.3, 1.0)] * 2)), truncate=2.5)
    colour += (camera.colour_noise * (0.5 + np.sqrt(np.clip(colour, 0, 1)))) * rng.standard_normal(colour.shape, np.float32)
    colour = np.sqrt(np.clip(colour, 0, 1))
    colour *= np.sqrt(colour)  # tone curve: to the power 0.75

    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    lamp = 1 - camera.falloff * np.clip((x - rng.uniform(-0.3, 0.3)) ** 2 + (y - rng.uniform(-0.3, 0.3)) ** 2, 0, 1.2) / 1.2
    nir = gaussian_filter(canvas[3] * lamp, rng.uniform(0.4, 1.1), truncate=2.5) * np.float32(
        camera.infrared * rng.uniform(0.85, 1.15)
    )
    nir += np.float32(0.03) * rng.standard_normal(nir.shape, np.float32)

    coarse = canvas[4].reshape(height // 2, 2, width // 2, 2).mean((1, 3))  # thermal sensors have fewer pixels
    coarse += np.float32(0.02) * rng.standard_normal(coarse.shape, np.float32)
    tir = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    tir = 0.5 + (tir - 0.5) * np.float32(camera.contrast * rng.uniform(0.88, 1.12)) + np.float32(rng.normal(0, 0.03))

    grey = [np.repeat((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)[:, :, None], 3, axis=2) for image in (nir, tir)]
    return ((colour.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8), *grey)


def render(
    person: Person, others: Sequence[Person], camera: Camera, scenery: Field, size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], ...]:
    """One moment: RGB, NIR and TIR of a person walking past a camera, uint8 `h w 3`."""
    height, width = size
    left = int(rng.integers(scenery.shape[2] - width + 1))
    canvas = scenery[:, :, left : left + width].copy()
    tall, x = height * camera.height * rng.normal(1, 0.03), width * rng.normal(0.5, 0.05)
    feet = height * (0.5 + 0.5 * camera.height + rng.normal(0, 0.012))
    if others and rng.random() < 0.15:  # somebody passes behind
        other = others[int(rng.integers(len(others)))]
        where = x + width * rng.choice([-1, 1]) * rng.uniform(0.38, 0.6)
        _Walker(canvas, other, camera, rng, where, feet - 0.04 * height, 0.93 * tall)
    top = max(0, int(feet - 0.04 * tall))  # a soft shadow at the feet
    across, y = np.arange(width, dtype=np.float32), np.arange(top, height, dtype=np.float32)[:, None]
    shadow = np.clip(1.2 - np.hypot((across - x - 0.08 * tall * camera.light) / (0.17 * tall), (y - feet) / (0.03 * tall)), 0, 1)
    canvas[:4, top:] *= 1 - 0.45 * shadow
    _Walker(canvas, person, camera, rng, x, feet, tall)
    if rng.random() < 0.2:
        _occlude(canvas, camera, rng)
    return _sensors(canvas, camera, rng)
