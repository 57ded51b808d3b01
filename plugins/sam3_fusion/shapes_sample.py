"""A generated detection sample: coloured shapes on textured grounds, asked for by attributes, half of the time in vain.

Prompts name a colour and a shape ("red circle"), a shape ("star") or a colour ("blue shape"). Absent prompts are half of
all; hard ones among them share the colour or the shape with something in the scene, so that neither word alone tells.
It is there to test and to try things without network; its figures say nothing of any published data set.

A scene is a function of (seed, split, number, side): asking for more images changes none of the others. Equal bytes need
equal versions of Pillow and numpy, which the manifest states.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw

from core import data, samples
from core.registry import register
from plugins.sam3_fusion import scenes
from plugins.sam3_fusion.scenes import Kind, Prompt, Scene

VERSION = 1
STATEMENT = "Generated detection sample of coloured shapes. No photograph; results on it are not comparable with published ones."
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "yellow": (238, 214, 62),
    "green": (62, 160, 74),
    "blue": (50, 96, 208),
}
SHAPES = ("circle", "square", "triangle", "cross")
FINE = 4  # supersampling of what is drawn
OVERLAP = 0.15  # share of the smaller box that two things may share


def _polygon(points: list[tuple[float, float]], angle: float, centre: float, radius: float) -> list[tuple[float, float]]:
    c, s = math.cos(angle), math.sin(angle)
    return [(centre + radius * (c * x - s * y), centre + radius * (s * x + c * y)) for x, y in points]


def _stencil(shape: str, side: int, angle: float) -> Image.Image:
    """A filled shape in a square of `side` pixels."""
    fine = side * FINE
    mask = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(mask)
    half, r = fine / 2, fine / 2 - 1
    if shape in ("circle", "ring"):
        draw.ellipse([half - r, half - r, half + r, half + r], fill=255)
        if shape == "ring":
            hole = 0.55 * r
            draw.ellipse([half - hole, half - hole, half + hole, half + hole], fill=0)
    else:
        w = 0.32
        arm = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
        spikes = [(1.0 if i % 2 == 0 else 0.42, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        points = {
            "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
            "triangle": [(math.cos(a), math.sin(a)) for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)],
            "star": [(k * math.cos(a), k * math.sin(a)) for k, a in spikes],
            "cross": arm,
        }[shape]
        draw.polygon(_polygon(points, angle, half, r * (1.0 if shape in ("triangle", "star") else 0.82)), fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A dull ground: a gradient between two greys with a tint, and coarse noise."""
    y, x = np.mgrid[0:side, 0:side] / side
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5) + 0.5)[..., None]
    low, high = (rng.uniform(60, 200) + rng.uniform(-18, 18, 3) for _ in range(2))
    coarse = rng.normal(0, 1, (max(2, side // 8), max(2, side // 8), 1)).astype(np.float32)[..., 0]
    blotches = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))[..., None]
    return low + (high - low) * ramp + 9 * blotches


def draw_scene(rng: np.random.Generator, side: int) -> tuple[Image.Image, list[tuple[str, str, list[float]]]]:
    """A picture, and (colour, shape, box) of everything in it, from back to front."""
    canvas = ground(rng, side)
    things: list[tuple[str, str, list[float]]] = []
    for _ in range(int(rng.integers(2, 5))):
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if things and rng.random() < 0.4:  # something like what is there: the same thing, or one attribute of it
            other = things[int(rng.integers(len(things)))]
            colour, shape = (other[0], other[1] if rng.random() < 0.4 else shape) if rng.random() < 0.5 else (colour, other[1])
        for _ in range(20):
            extent = int(rng.integers(round(side * 0.2), round(side * 0.42) + 1))
            left, top = (int(rng.integers(0, side - extent + 1)) for _ in range(2))
            mask = np.asarray(_stencil(shape, extent, rng.uniform(-0.35, 0.35)), np.float32) / 255
            ys, xs = np.nonzero(mask > 0.5)
            box = [float(left + xs.min()), float(top + ys.min()), float(left + xs.max() + 1), float(top + ys.max() + 1)]
            if all(shared(box, other[2]) <= OVERLAP for other in things):
                paint = np.array(COLOURS[colour]) * rng.uniform(0.82, 1.12) + rng.normal(0, 7, 3)
                shade = 1 + rng.uniform(-0.18, 0.18) * np.linspace(-1, 1, extent)[:, None, None]
                patch = canvas[top : top + extent, left : left + extent]
                patch += mask[..., None] * (paint * shade - patch)
                things.append((colour, shape, box))
                break
    canvas = canvas + rng.normal(0, 5, canvas.shape)
    return Image.fromarray(np.clip(canvas, 0, 255).round().astype(np.uint8)), things


def shared(a: list[float], b: list[float]) -> float:
    """Overlap of two boxes over the smaller one's area."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return max(w, 0) * max(h, 0) / smaller


def ask(rng: np.random.Generator, things: list[tuple[str, str, list[float]]], prompts: int) -> list[Prompt]:
    """Prompts of a scene: half present, half absent, and half of the absent hard where the scene allows it."""
    meaning: dict[str, Callable[[str, str], bool]] = {}
    for colour in COLOURS:
        meaning[f"{colour} shape"] = lambda c, s, colour=colour: c == colour  # type: ignore[misc]
        for shape in SHAPES:
            meaning[f"{colour} {shape}"] = lambda c, s, colour=colour, shape=shape: (c, s) == (colour, shape)  # type: ignore[misc]
    for shape in SHAPES:
        meaning[shape] = lambda c, s, shape=shape: s == shape  # type: ignore[misc]
    colours, shapes = {c for c, _, _ in things}, {s for _, s, _ in things}
    groups: dict[Kind, list[str]] = {"present": [], "absent": [], "hard": []}
    for text, means in meaning.items():
        colour, _, shape = text.rpartition(" ")
        if any(means(c, s) for c, s, _ in things):
            groups["present"].append(text)
        elif colour in colours or shape in shapes:
            groups["hard"].append(text)
        else:
            groups["absent"].append(text)
    wanted: dict[Kind, int] = {"present": min(len(groups["present"]), prompts - prompts // 2)}
    wanted["hard"] = min(len(groups["hard"]), (prompts // 2 + 1) // 2)
    wanted["absent"] = min(len(groups["absent"]), prompts // 2 - wanted["hard"])
    chosen = []
    for kind, count in wanted.items():
        weights = np.array([_weight(t, colours, shapes) for t in groups[kind]])
        for text in rng.choice(groups[kind], count, replace=False, p=weights / weights.sum()) if count else []:
            boxes = [box for c, s, box in things if meaning[str(text)](c, s)]
            chosen.append(Prompt(str(text), kind, np.array(boxes, np.float32).reshape(-1, 4)))
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _weight(text: str, colours: set[str], shapes: set[str]) -> float:
    """How often a prompt is asked: pairs of words more than single ones, and most of all where both words fit something."""
    colour, _, shape = text.rpartition(" ")
    if not colour or shape == "shape":
        return 1.0
    return 12.0 if colour in colours and shape in shapes else 4.0


def write_scenes(
    root: Path, splits: Mapping[str, int], make: Callable[[np.random.Generator], tuple[Image.Image, list[Prompt]]], seed: int
) -> dict[str, int]:
    """Draw and write the scenes of all splits; scene n of a split comes from its own random stream."""
    counts: dict[str, int] = {}
    for split, number in splits.items():
        folder = root / "images" / split
        folder.mkdir(parents=True)
        listed = []
        for n in range(number):
            picture, prompts = make(data.generator(seed, zlib.crc32(split.encode()), n))
            name = f"{n:06d}.png"
            picture.save(folder / name, compress_level=1)
            listed.append(Scene(f"images/{split}/{name}", picture.height, picture.width, tuple(prompts)))
        counts |= scenes.write(root, split, listed)
    return counts


@register("dataset_maker", paper="generated: coloured shapes asked for by attributes")
def shapes_sample(root: str, *, seed: int = 0, train: int = 1000, test: int = 200, side: int = 64, prompts: int = 8) -> None:
    """Make the shapes sample under `root`, or find it there.

    Args:
        root: its folder.
        seed: names the scenes.
        train, test: images of the two splits.
        side: of an image, in pixels.
        prompts: prompts an image, half of them absent.

    Raises:
        ValueError: for fewer than 1 image a split, a side under 32 or fewer than 2 prompts, or if `root` holds anything else.
    """
    if train < 1 or test < 1 or side < 32 or prompts < 2:
        raise ValueError(f"want train and test of at least 1, side 32, prompts 2; got {train}, {test}, {side}, {prompts}")

    def scene(rng: np.random.Generator) -> tuple[Image.Image, list[Prompt]]:
        picture, things = draw_scene(rng, side)
        return picture, ask(rng, things, prompts)

    samples.make(
        root, generator="sam3_fusion.shapes_sample", version=VERSION, seed=seed,
        options={"train": train, "test": test, "side": side, "prompts": prompts}, statement=STATEMENT,
        write=lambda folder: {
            "counts": write_scenes(folder, {"train": train, "test": test}, scene, seed),
            "libraries": {"numpy": np.__version__, "pillow": PIL.__version__},
        },
    )  # fmt: skip
