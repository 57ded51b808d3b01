"""A generated sample in PACS's layout, for where the real set is absent: seven classes drawn in four styles from a seed.

It is no substitute for PACS and figures on it say nothing of the paper's: it is there so that the whole pipeline runs on real
files with a real domain gap. Each image has its own figure (proportions, pose, view side, size, place); its style decides
everything else:

* photo: shaded bodies under a light, texture, shadow, blurred surroundings, sensor noise;
* art_painting: the same kind of scene in a limited palette, laid down as oriented brush strokes on canvas;
* cartoon: flat saturated colours, black outlines, big eyes, a flat set;
* sketch: grey wavering lines on white paper, sometimes hatched.

An image is a function of (seed, style, class, number, size) alone: asking for more images changes none of the others.
"""

from __future__ import annotations

import colorsys
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from core import samples
from core.data import generator
from core.registry import register
from plugins.sap.datasets import PACS

VERSION = 1  # of what is drawn: another number means other images from the same seed
STATEMENT = (
    "Generated sample in the layout of PACS. No part of PACS is in it; results on it are not comparable with published ones."
)
SUPERSAMPLE = 2

Points = NDArray[np.float64]  # n 2, x right and y down, the figure within about -1 .. 1
Colour = tuple[float, float, float]
Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Part:
    """A filled outline. `role` picks its colour: main, second, dark, light, accent, eye, nose."""

    outline: Points
    role: str


# --- shapes -----------------------------------------------------------------------------------------------------------


def _ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Points:
    t = np.linspace(0, 2 * math.pi, 36, endpoint=False)
    px, py = rx * np.cos(t), ry * np.sin(t)
    c, s = math.cos(turn), math.sin(turn)
    return np.stack([x + c * px - s * py, y + s * px + c * py], 1)


def _limb(*path: tuple[float, float], widths: tuple[float, float]) -> Points:
    """A tapering tube along a smooth curve through `path`."""
    knots = np.array(path)
    at = np.linspace(0, 1, len(knots))
    fine = np.linspace(0, 1, 24)
    if len(knots) == 2:
        line = knots[0] + fine[:, None] * (knots[1] - knots[0])
    else:
        degree = min(3, len(knots) - 1)
        line = np.stack([np.polyval(np.polyfit(at, knots[:, i], degree), fine) for i in range(2)], 1)
    ahead = np.gradient(line, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-9
    side = np.stack([-ahead[:, 1], ahead[:, 0]], 1) * np.linspace(*widths, 24)[:, None]
    cap = widths[1]
    t = np.linspace(-math.pi / 2, math.pi / 2, 9)[1:-1]
    end = line[-1] + cap * (np.cos(t)[:, None] * ahead[-1] - np.sin(t)[:, None] * np.array([-ahead[-1, 1], ahead[-1, 0]]))
    return np.concatenate([line + side, end, (line - side)[::-1]])


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _legs(
    rng: Rng, xs: tuple[float, float], top: float, foot: float, widths: tuple[float, float], swing: float
) -> tuple[list[Part], list[Part]]:
    """Far legs (drawn behind) and near legs of an animal that stands or walks."""
    far: list[Part] = []
    near: list[Part] = []
    for side, parts in ((0.06, far), (0.0, near)):
        for x in xs:
            step = rng.uniform(-swing, swing)
            knee = (x + side + 0.5 * step + rng.uniform(-0.03, 0.03), (top + foot) / 2)
            parts.append(
                Part(_limb((x + side, top), knee, (x + side + step, foot), widths=widths), "dark" if parts is far else "main")
            )
    return far, near


# --- the seven classes ------------------------------------------------------------------------------------------------


def _dog(rng: Rng) -> list[Part]:
    length, fat, leg = rng.uniform(0.42, 0.56), rng.uniform(0.16, 0.24), rng.uniform(0.34, 0.46)
    hx, hy = length + rng.uniform(0.02, 0.12), -0.3 - rng.uniform(0, 0.15)
    far, near = _legs(rng, (-length + 0.1, length - 0.12), 0.05, 0.1 + leg, (0.08, 0.05), 0.14)
    snout = rng.uniform(0.14, 0.24)
    ear = _limb((hx - 0.06, hy - 0.1), (hx - 0.12, hy + 0.04), (hx - 0.1, hy + 0.16), widths=(0.04, 0.07))
    if rng.random() < 0.5:
        ear = _polygon((hx - 0.14, hy - 0.06), (hx - 0.1, hy - 0.32), (hx + 0.02, hy - 0.12))
    tail = _limb((-length + 0.02, -0.08), (-length - 0.16, -0.2), (-length - rng.uniform(0.08, 0.3), -0.46), widths=(0.06, 0.025))
    return [
        *far, Part(tail, "main"), Part(_ellipse(0, 0, length, fat), "main"), *near,
        Part(_limb((length - 0.1, -0.04), (hx - 0.02, hy + 0.06), widths=(0.17, 0.12)), "main"),
        Part(_ellipse(hx, hy, 0.17, 0.15), "main"),
        Part(_limb((hx + 0.06, hy + 0.04), (hx + 0.08 + snout, hy + 0.07), widths=(0.09, 0.06)), "second"),
        Part(_ellipse(hx + 0.12 + snout, hy + 0.04, 0.035, 0.03), "nose"),
        Part(ear, "dark"), Part(_ellipse(hx + 0.05, hy - 0.05, 0.026, 0.03), "eye"),
    ]  # fmt: skip


def _elephant(rng: Rng) -> list[Part]:
    length, fat, leg = rng.uniform(0.5, 0.58), rng.uniform(0.34, 0.42), rng.uniform(0.3, 0.38)
    hx, hy = length + 0.1, -0.16 - rng.uniform(0, 0.1)
    far, near = _legs(rng, (-length + 0.2, length - 0.2), 0.1, 0.3 + leg, (0.13, 0.12), 0.08)
    curl = rng.uniform(-0.25, 0.3)
    trunk = _limb(
        (hx + 0.14, hy + 0.06),
        (hx + 0.3, hy + 0.3),
        (hx + 0.26 + 0.3 * curl, hy + 0.56),
        (hx + 0.26 + curl, hy + 0.72 - abs(curl)),
        widths=(0.12, 0.045),
    )
    big = rng.uniform(0.2, 0.3)
    return [
        *far, Part(_limb((-length + 0.02, -0.1), (-length - 0.08, 0.1), (-length - 0.06, 0.3), widths=(0.03, 0.02)), "dark"),
        Part(_ellipse(0, 0, length, fat), "main"), *near, Part(trunk, "main"), Part(_ellipse(hx, hy, 0.25, 0.26), "main"),
        Part(_limb((hx + 0.12, hy + 0.16), (hx + 0.3, hy + 0.28), (hx + 0.42, hy + 0.22), widths=(0.045, 0.012)), "light"),
        Part(_ellipse(hx - 0.16, hy, big * 0.85, big * 1.25, rng.uniform(-0.3, 0.3)), "second"),
        Part(_ellipse(hx + 0.12, hy - 0.06, 0.028, 0.03), "eye"),
    ]  # fmt: skip


def _giraffe(rng: Rng) -> list[Part]:
    length, fat, leg = rng.uniform(0.3, 0.36), rng.uniform(0.15, 0.19), rng.uniform(0.52, 0.62)
    lean, rise = rng.uniform(0.1, 0.34), rng.uniform(0.75, 0.92)
    hx, hy = length + lean, -rise
    far, near = _legs(rng, (-length + 0.06, length - 0.06), 0.1, 0.18 + leg, (0.06, 0.035), 0.08)
    neck = _limb((length - 0.1, 0.02), (length - 0.02 + 0.4 * lean, -0.45 * rise), (hx, hy), widths=(0.14, 0.065))
    parts = [
        *far, Part(_limb((-length, -0.06), (-length - 0.07, 0.12), (-length - 0.05, 0.3), widths=(0.03, 0.02)), "dark"),
        Part(_ellipse(0, 0, length, fat, -0.15), "main"), *near, Part(neck, "main"),
        Part(_limb((hx - 0.03, hy - 0.12), (hx - 0.05, hy - 0.24), widths=(0.018, 0.025)), "dark"),
        Part(_limb((hx + 0.03, hy - 0.12), (hx + 0.03, hy - 0.24), widths=(0.018, 0.025)), "dark"),
        Part(_limb((hx - 0.04, hy - 0.04), (hx + 0.2, hy + 0.08), widths=(0.1, 0.06)), "main"),
        Part(_ellipse(hx - 0.12, hy - 0.06, 0.08, 0.035, -0.5), "second"), Part(_ellipse(hx + 0.04, hy - 0.04, 0.024, 0.027), "eye"),
    ]  # fmt: skip
    for _ in range(int(rng.integers(9, 15))):
        if rng.random() < 0.55:
            x, y = rng.uniform(-0.85, 0.85) * length, rng.uniform(-0.65, 0.65) * fat - 0.1 * fat
        else:
            t = rng.uniform(0.1, 0.85)
            x, y = length - 0.06 + t * (lean - 0.0) * 0.85, -t * rise
        parts.append(Part(_ellipse(x, y, rng.uniform(0.03, 0.055), rng.uniform(0.03, 0.055), rng.uniform(0, 3)), "accent"))
    return parts


def _guitar(rng: Rng) -> list[Part]:
    lower, upper, waist = rng.uniform(0.32, 0.4), rng.uniform(0.22, 0.29), rng.uniform(0.16, 0.22)
    neck = rng.uniform(0.75, 0.95)
    y = np.linspace(-0.28, 0.62, 40)
    bulge = lower * np.exp(-(((y - 0.32) / 0.27) ** 4)) + upper * np.exp(-(((y + 0.08) / 0.2) ** 4))
    half = np.maximum(bulge, waist * ((y > -0.26) & (y < 0.6)))
    half = gaussian_filter(half, 1.2)
    body = np.concatenate([np.stack([half, y], 1), np.stack([-half[::-1], y[::-1]], 1)])
    parts = [
        Part(body, "main"), Part(_ellipse(0, 0.02, 0.12, 0.12), "eye"),
        Part(_polygon((-0.05, 0.1), (0.05, 0.1), (0.045, -neck), (-0.045, -neck)), "dark"),
        Part(_polygon((-0.08, -neck), (0.08, -neck), (0.1, -neck - 0.22), (-0.1, -neck - 0.22)), "second"),
        Part(_polygon((-0.13, 0.38), (0.13, 0.38), (0.13, 0.44), (-0.13, 0.44)), "dark"),
    ]  # fmt: skip
    parts += [
        Part(_polygon((x - 0.006, 0.4), (x + 0.006, 0.4), (x + 0.006, -neck), (x - 0.006, -neck)), "light")
        for x in (-0.03, -0.01, 0.01, 0.03)
    ]
    for side in (-1, 1):
        parts += [Part(_ellipse(side * 0.13, -neck - 0.05 - 0.07 * i, 0.03, 0.02), "light") for i in range(3)]
    turn = rng.uniform(-0.9, 0.9)
    c, s = math.cos(turn), math.sin(turn)
    return [
        Part(
            np.stack([c * p.outline[:, 0] - s * (p.outline[:, 1] + 0.15), s * p.outline[:, 0] + c * (p.outline[:, 1] + 0.15)], 1),
            p.role,
        )
        for p in parts
    ]


def _horse(rng: Rng) -> list[Part]:
    length, fat, leg = rng.uniform(0.46, 0.54), rng.uniform(0.19, 0.24), rng.uniform(0.46, 0.54)
    hx, hy = length + rng.uniform(0.14, 0.26), -0.52 - rng.uniform(-0.04, 0.1)
    far, near = _legs(rng, (-length + 0.1, length - 0.1), 0.06, 0.14 + leg, (0.085, 0.04), 0.16)
    tail = _limb((-length + 0.02, -0.1), (-length - 0.2, 0.04), (-length - rng.uniform(0.08, 0.22), 0.42), widths=(0.05, 0.07))
    dip = rng.uniform(0.16, 0.3)
    return [
        *far, Part(tail, "dark"), Part(_ellipse(0, 0, length, fat), "main"), *near,
        Part(_limb((length - 0.14, -0.06), (hx - 0.08, hy + 0.12), (hx - 0.02, hy), widths=(0.2, 0.11)), "main"),
        Part(_limb((length - 0.24, -0.18), (hx - 0.2, hy + 0.12), (hx - 0.08, hy - 0.1), widths=(0.05, 0.06)), "dark"),
        Part(_limb((hx - 0.06, hy - 0.02), (hx + 0.24, hy + dip), widths=(0.12, 0.075)), "main"),
        Part(_ellipse(hx + 0.24, hy + dip, 0.085, 0.075), "second"),
        Part(_polygon((hx - 0.1, hy - 0.08), (hx - 0.07, hy - 0.26), (hx + 0.01, hy - 0.1)), "main"),
        Part(_ellipse(hx + 0.05, hy, 0.025, 0.028), "eye"),
    ]  # fmt: skip


def _house(rng: Rng) -> list[Part]:
    w, h, roof, over = rng.uniform(0.45, 0.7), rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.55), rng.uniform(0.06, 0.14)
    base, top = 0.6, 0.6 - 2 * h
    flat = rng.uniform(0, 0.5) * w
    cx = rng.uniform(0.2, 0.6) * w
    parts = [
        Part(_polygon((cx, top - roof * 0.95), (cx + 0.14, top - roof * 0.95), (cx + 0.14, top), (cx, top)), "dark"),
        Part(_polygon((-w, base), (w, base), (w, top), (-w, top)), "main"),
        Part(_polygon((-w - over, top), (w + over, top), (flat, top - roof), (-flat, top - roof)), "second"),
    ]
    door = rng.uniform(-0.5, 0.5) * w
    parts.append(
        Part(_polygon((door - 0.1, base), (door + 0.1, base), (door + 0.1, base - 0.34), (door - 0.1, base - 0.34)), "accent")
    )
    for x in (-0.62 * w, 0.62 * w, 0.0):
        for y in (top + 0.22 * h, top + 1.15 * h):
            if y > base - 0.5 and abs(x - door) < 0.24:
                continue
            s = 0.1
            parts.append(Part(_polygon((x - s, y), (x + s, y), (x + s, y + 2 * s), (x - s, y + 2 * s)), "light"))
            parts.append(Part(_polygon((x - 0.012, y), (x + 0.012, y), (x + 0.012, y + 2 * s), (x - 0.012, y + 2 * s)), "dark"))
    return parts


def _person(rng: Rng) -> list[Part]:
    shoulder, hip, torso, leg = rng.uniform(0.17, 0.24), rng.uniform(0.12, 0.18), rng.uniform(0.42, 0.5), rng.uniform(0.6, 0.72)
    neck = -0.42
    waist = neck + torso
    parts: list[Part] = []
    arms = []
    for side in (-1, 1):
        stride = side * rng.uniform(0.03, 0.2)
        parts.append(
            Part(
                _limb(
                    (side * hip * 0.55, waist - 0.04),
                    (side * hip * 0.6 + 0.5 * stride, waist + leg / 2),
                    (side * 0.1 + stride, waist + leg),
                    widths=(0.095, 0.055),
                ),
                "second",
            )
        )
        parts.append(Part(_ellipse(side * 0.1 + stride + 0.05, waist + leg + 0.02, 0.1, 0.05), "dark"))
        lift = rng.uniform(-0.6, 0.9)
        elbow = (side * (shoulder + 0.12 + 0.1 * abs(lift)), neck + 0.26 - 0.16 * max(lift, 0))
        hand = (side * (shoulder + 0.1 + rng.uniform(-0.12, 0.24)), neck + 0.5 - 0.75 * max(lift, 0))
        arms += [
            Part(_limb((side * shoulder, neck + 0.06), elbow, hand, widths=(0.07, 0.045)), "main"),
            Part(_ellipse(*hand, 0.055, 0.055), "light"),
        ]
    head = rng.uniform(0.14, 0.18)
    parts.append(Part(_polygon((-shoulder, neck), (shoulder, neck), (hip, waist), (-hip, waist)), "main"))
    parts += arms
    parts.append(Part(_limb((0, neck + 0.04), (0, neck - 0.08), widths=(0.06, 0.06)), "light"))
    if rng.random() < 0.4:
        parts.append(Part(_ellipse(0, neck - 0.14, head * 1.15, head * 1.7), "dark"))
    parts.append(Part(_ellipse(0, neck - 0.08 - head, head * 0.86, head), "light"))
    t = np.linspace(math.pi, 2 * math.pi, 20)
    cap = np.stack([head * 0.95 * np.cos(t), neck - 0.1 - head + head * 1.05 * np.sin(t)], 1)
    parts.append(Part(cap, "dark"))
    parts += [Part(_ellipse(side * 0.055, neck - 0.07 - head, 0.018, 0.022), "eye") for side in (-1, 1)]
    return parts


FIGURES: dict[str, Callable[[Rng], list[Part]]] = {
    "dog": _dog, "elephant": _elephant, "giraffe": _giraffe, "guitar": _guitar, "horse": _horse, "house": _house, "person": _person,
}  # fmt: skip

NATURAL: dict[
    str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
] = {  # hue, saturation, value of the main colour
    "dog": ((0.04, 0.11), (0.2, 0.7), (0.25, 0.9)),
    "elephant": ((0.02, 0.65), (0.02, 0.18), (0.35, 0.65)),
    "giraffe": ((0.09, 0.13), (0.45, 0.7), (0.7, 0.9)),
    "guitar": ((0.03, 0.12), (0.5, 0.9), (0.4, 0.85)),
    "horse": ((0.03, 0.1), (0.3, 0.8), (0.2, 0.75)),
    "house": ((0.0, 0.16), (0.05, 0.5), (0.5, 0.95)),
    "person": ((0.0, 1.0), (0.2, 0.8), (0.25, 0.85)),
}


def _palette(rng: Rng, cls: str, style: str) -> dict[str, Colour]:
    hues, saturations, values = NATURAL[cls]
    h, s, v = rng.uniform(*hues), rng.uniform(*saturations), rng.uniform(*values)
    if style == "art_painting":
        h, s = (h + rng.normal(0, 0.12)) % 1, min(1, s * rng.uniform(0.7, 1.3) + 0.1)
    if style == "cartoon":
        h, s, v = (h + rng.normal(0, 0.08)) % 1, min(1, s * 0.6 + 0.45), 0.65 + 0.35 * v

    def colour(hue: float, saturation: float, value: float) -> Colour:
        return colorsys.hsv_to_rgb(hue % 1, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0, 1)))

    skin = colour(rng.uniform(0.04, 0.08), rng.uniform(0.3, 0.6), rng.uniform(0.45, 0.95))
    return {
        "main": colour(h, s, v),
        "second": colour(
            h + (rng.uniform(0, 1) if cls in ("house", "person") else rng.uniform(-0.03, 0.03)),
            s * 0.9,
            v * rng.uniform(0.75, 1.15),
        ),
        "dark": colour(h, s, v * 0.5),
        "light": skin if cls == "person" else colour(h, s * 0.15, 0.95),
        "accent": colour(h - 0.05, min(1, s + 0.2), v * 0.5),
        "eye": (0.05, 0.04, 0.04),
        "nose": (0.05, 0.04, 0.04),
    }


# --- styles -----------------------------------------------------------------------------------------------------------


def _mask(outline: Points, side: int) -> NDArray[Any]:
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    return np.asarray(image, dtype=np.float32) / 255


def _surroundings(rng: Rng, side: int, hues: tuple[float, float], smooth: float) -> NDArray[Any]:
    """Sky above ground, or one wall, with soft blotches."""
    rows = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    top = np.array(colorsys.hsv_to_rgb(rng.uniform(*hues), rng.uniform(0.05, 0.5), rng.uniform(0.5, 0.95)), np.float32)
    low = np.array(colorsys.hsv_to_rgb(rng.uniform(0.06, 0.38), rng.uniform(0.15, 0.6), rng.uniform(0.25, 0.7)), np.float32)
    horizon = rng.uniform(0.35, 0.75)
    share = 1 / (1 + np.exp(-(rows - horizon) * rng.choice([6.0, 40.0])))
    field = top * (1 - share) + low * share + np.zeros((side, side, 1), np.float32)
    rough = rng.standard_normal((side, side, 4)).astype(np.float32)
    blotches = np.stack([gaussian_filter(rough[..., i], (smooth, 1.6 * smooth)) for i in range(4)], 2)
    blotches /= blotches.std() + 1e-6
    return field * (1 + 0.16 * blotches[..., :1]) + 0.025 * blotches[..., 1:]


def _shaded(rng: Rng, parts: list[Part], palette: dict[str, Colour], canvas: NDArray[Any], texture: float) -> NDArray[Any]:
    """Paint the parts as rounded bodies under one light."""
    side = canvas.shape[0]
    angle = rng.uniform(-2.4, -0.7)
    light = (math.cos(angle), math.sin(angle))
    feet = max(float(p.outline[:, 1].max()) for p in parts)
    middle = float(np.mean([p.outline[:, 0].mean() for p in parts]))
    spread = max(float(np.ptp(p.outline[:, 0])) for p in parts)
    shadow = gaussian_filter(_mask(_ellipse(middle, feet, 0.7 * spread, 0.05 * side), side), 0.02 * side)
    canvas = canvas * (1 - 0.55 * shadow[..., None])
    grain = gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), (0.6, 1.4))
    grain /= grain.std()
    for part in parts:
        mask = _mask(part.outline, side)
        size = math.sqrt(mask.sum())
        round_off = max(0.8, 0.16 * size)
        reach = 4 * round_off + 3
        low = np.maximum(part.outline.min(0) - reach, 0).astype(int)
        high = np.minimum(part.outline.max(0) + reach + 1, side).astype(int)
        if size == 0 or (high <= low).any():
            continue
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        mask = mask[window]
        height = gaussian_filter(mask, round_off)
        dy, dx = np.gradient(height * size)
        slope = np.sqrt(dx**2 + dy**2 + 0.25)
        shade = 0.72 + 0.5 * (-(dx * light[0] + dy * light[1]) / slope) + texture * grain[window]
        colour = np.array(palette[part.role], np.float32) * np.clip(shade, 0.1, 1.5)[..., None]
        soft = gaussian_filter(mask, 0.7)[..., None]
        canvas[window] = canvas[window] * (1 - soft) + colour * soft
    return canvas


def _photo(rng: Rng, parts: list[Part], cls: str, side: int) -> NDArray[Any]:
    background = _surroundings(rng, side, (0.5, 0.62), rng.uniform(3, 9))
    canvas = _shaded(rng, parts, _palette(rng, cls, "photo"), background, 0.05)
    canvas = np.stack([gaussian_filter(canvas[..., i], rng.uniform(0.4, 1.0)) for i in range(3)], 2)
    canvas = canvas * rng.uniform(0.8, 1.15) + rng.normal(0, 0.03, 3).astype(np.float32)
    return canvas + rng.standard_normal(canvas.shape).astype(np.float32) * rng.uniform(0.02, 0.05)


def _art_painting(rng: Rng, parts: list[Part], cls: str, side: int) -> NDArray[Any]:
    scene = _shaded(rng, parts, _palette(rng, cls, "art_painting"), _surroundings(rng, side, (0.0, 1.0), 6), 0.0)
    tone = np.array(colorsys.hsv_to_rgb(rng.random(), 0.4, 0.8), np.float32)
    scene = np.clip(0.78 * scene + 0.22 * tone * scene.mean(2, keepdims=True) * 1.6, 0, 1)
    gray = gaussian_filter(scene.mean(2), 2)
    dy, dx = np.gradient(gray)
    image = Image.fromarray((np.clip(scene, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for width, count in ((0.045, 260), (0.024, 600), (0.013, 900)):
        at = rng.uniform(0, side, (count, 2))
        rows, columns = at[:, 1].astype(int), at[:, 0].astype(int)
        across, down = dx[rows, columns], dy[rows, columns]
        turn = np.where(np.abs(across) + np.abs(down) > 0.004, np.arctan2(across, -down), 0.6) + rng.normal(0, 0.35, count)
        reach = side * width * rng.uniform(0.8, 2.2, count)
        colours = scene[rows, columns] + rng.normal(0, 0.04, (count, 1)) + rng.normal(0, 0.015, (count, 3))
        fills = (255 * np.clip(colours, 0, 1)).astype(int).tolist()
        half = np.stack([reach * np.cos(turn), reach * np.sin(turn)], 1)
        for line, fill in zip(np.concatenate([at - half, at + half], 1).tolist(), fills):
            pen.line(line, fill=tuple(fill), width=max(2, int(side * width)))
    weave = 1 + 0.05 * gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), (0.5, 1.0))[..., None]
    return np.asarray(image, np.float32) / 255 * weave


def _cartoon(rng: Rng, parts: list[Part], cls: str, side: int) -> NDArray[Any]:
    palette = _palette(rng, cls, "cartoon")

    def rgb(colour: Colour) -> tuple[int, ...]:
        return tuple(int(255 * c) for c in colour)

    image = Image.new("RGB", (side, side), rgb(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.5), 1.0)))
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.6:
        level = rng.uniform(0.6, 0.85) * side
        hill = [(float(x), level + 0.06 * side * math.sin(x / side * rng.uniform(3, 7))) for x in np.linspace(0, side, 12)]
        pen.polygon([*hill, (side, side), (0, side)], fill=rgb(colorsys.hsv_to_rgb(rng.uniform(0.2, 0.42), 0.7, 0.85)))
    line = max(2, round(side * rng.uniform(0.012, 0.022)))
    for part in parts:
        corners = [(float(x), float(y)) for x, y in part.outline]
        if part.role == "eye":
            (cx, cy), radius = part.outline.mean(0).tolist(), 0.5 * float(np.ptp(part.outline, axis=0).max())
            if radius < 0.03 * side:
                corners = [(float(x), float(y)) for x, y in _ellipse(cx, cy, 2.2 * radius, 2.5 * radius)]
                pen.polygon(corners, fill=(255, 255, 255))
                pen.line([*corners, corners[0]], fill=(10, 10, 10), width=max(1, line // 2))
                corners = [(float(x), float(y)) for x, y in _ellipse(cx, cy, 1.1 * radius, 1.2 * radius)]
        pen.polygon(corners, fill=rgb(palette[part.role]))
        thin = part.role in ("light", "accent") and float(np.ptp(part.outline, axis=0).min()) < 0.05 * side
        if not thin:
            pen.line([*corners, corners[0]], fill=(10, 10, 10), width=line, joint="curve")
    return np.asarray(image, np.float32) / 255


def _sketch(rng: Rng, parts: list[Part], cls: str, side: int) -> NDArray[Any]:
    image = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(image)
    width, ink = max(1, round(side * rng.uniform(0.006, 0.012))), int(rng.integers(10, 90))
    wobble, passes = side * rng.uniform(0.002, 0.007), int(rng.integers(1, 3))
    hatched = rng.random() < 0.35
    for part in parts:
        corners = [(float(x), float(y)) for x, y in part.outline]
        pen.polygon(corners, fill=255)
        closed = np.concatenate([part.outline, part.outline[:1]])
        steps = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
        along = np.linspace(0, steps[-1], max(8, int(steps[-1] / (0.03 * side))))
        path = np.stack([np.interp(along, steps, closed[:, i]) for i in range(2)], 1)
        for _ in range(passes):
            drawn = path + gaussian_filter(rng.standard_normal(path.shape), (1.0, 0)) * 1.6 * wobble
            start = int(rng.integers(len(drawn)))
            drawn = np.roll(drawn[:-1], start, axis=0)
            pen.line([(float(x), float(y)) for x, y in drawn] + [(float(drawn[0, 0]), float(drawn[0, 1]))], fill=ink, width=width)
        if part.role in ("eye", "accent") or (hatched and part.role == "dark"):
            mask = Image.fromarray((_mask(part.outline, side) * 255).astype(np.uint8))
            lines = Image.new("L", (side, side), 255)
            stroke = ImageDraw.Draw(lines)
            for offset in np.arange(-side, side, side * (0.012 if part.role == "eye" else 0.03)):
                stroke.line((offset, 0, offset + side, side), fill=ink + 30, width=width)
            image.paste(lines, (0, 0), mask)
            pen = ImageDraw.Draw(image)
    gray = np.asarray(image, np.float32) / 255
    return np.repeat(gray[..., None], 3, 2)


STYLES = {"photo": _photo, "art_painting": _art_painting, "cartoon": _cartoon, "sketch": _sketch}


def draw(seed: int, domain: int, cls: int, number: int, size: int) -> Image.Image:
    """One image: a figure of its own, placed, and drawn in the domain's style."""
    style, name = PACS.domains[domain], PACS.classes[cls]
    rng = generator(seed, VERSION, domain, cls, number)
    parts = FIGURES[name](rng)
    corners = np.concatenate([p.outline for p in parts])
    low, high = corners.min(0), corners.max(0)
    side = SUPERSAMPLE * size
    scale = side * rng.uniform(0.62, 0.92) / float((high - low).max())
    room = side - scale * (high - low)
    shift = room * rng.uniform(0.15, 0.85, 2)
    mirror = rng.random() < 0.5
    turn = rng.normal(0, 0.06)
    c, s = math.cos(turn), math.sin(turn)
    placed = []
    for part in parts:
        points = (part.outline - low) * scale + shift
        if mirror:
            points = np.stack([side - points[:, 0], points[:, 1]], 1)
        centred = points - side / 2
        placed.append(
            Part(np.stack([c * centred[:, 0] - s * centred[:, 1], s * centred[:, 0] + c * centred[:, 1]], 1) + side / 2, part.role)
        )
    pixels = np.clip(STYLES[style](rng, placed, name, side), 0, 1)
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)


@register("dataset_maker", paper="layout of PACS (Li et al., ICCV 2017)")
def pacs_sample(root: str, seed: int = 0, per_cell: int = 30, size: int = 64) -> None:
    """Generate a sample in PACS's layout: 4 styles, 7 classes, `per_cell` images of each.

    Args:
        root: the folder to fill, absent or empty; one that holds the asked sample already is left as it is.
        seed: names the sample.
        per_cell: images of each domain and class.
        size: side of the images in pixels (PACS: 227).

    Raises:
        ValueError: if the folder holds something else, or for a size or count that makes no data set.
    """
    if per_cell < 2 or size < 16:
        raise ValueError(f"per_cell must be at least 2 and size at least 16, got {per_cell} and {size}")

    def write(folder: Path) -> dict[str, Any]:
        for d, domain in enumerate(PACS.domains):
            for c, cls in enumerate(PACS.classes):
                cell = folder / domain / cls
                cell.mkdir(parents=True)
                for number in range(per_cell):
                    image = draw(seed, d, c, number, size)
                    if domain == "sketch":
                        image.save(cell / f"{number + 1}.png")
                    else:
                        image.save(cell / f"pic_{number + 1:03d}.jpg", quality=92)
        return {"images": len(PACS.domains) * len(PACS.classes) * per_cell}

    options = {"per_cell": per_cell, "size": size}
    samples.make(root, generator="sap.pacs_sample", version=VERSION, seed=seed, options=options, statement=STATEMENT, write=write)
