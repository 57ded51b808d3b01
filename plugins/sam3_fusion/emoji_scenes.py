"""Scenes of real pictures with real names: emoji of two vendors on drawn grounds, asked for by the names Unicode gives them.

Half of the prompts are of emoji that are not there; half of those are hard, where the scene allows it: they come from the same
subcategory as something in it (a red apple is asked for where a green apple lies). Pictures are Google's (Apache-2.0) and Twitter's
(CC BY 4.0), from emoji-datasource 16.0.0, downloaded when the set is made and never part of this repository.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from core import emoji, npm, samples
from core.registry import register
from plugins.sam3_fusion.scenes import Kind, Prompt, SceneError
from plugins.sam3_fusion.shapes_sample import OVERLAP, ground, shared, write_scenes

VERSION = 1
VENDORS = ("google", "twitter")
STATEMENT = (
    "Scenes composed of emoji by Google (Apache-2.0) and Twitter (CC BY 4.0); for research, not comparable with published results."
)
GROUPS = (  # subcategories whose pictures show a thing
    "animal-mammal", "animal-bird", "animal-marine", "animal-bug", "food-fruit", "food-vegetable", "food-prepared", "food-sweet",
    "transport-ground", "transport-air", "clothing", "musical-instrument", "sport", "household", "tool",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sprite:
    """An emoji: its name, its subcategory and its pictures (RGBA), one a vendor."""

    name: str
    group: str
    pictures: tuple[Image.Image, ...]


def choose(table: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` emoji of the groups, in the order of a fixed hash: base emoji that both vendors draw and no newer one replaces.

    Raises:
        ValueError: if there are not so many.
    """
    rows = [
        row for row in table
        if row["subcategory"] in GROUPS and not row.get("obsoleted_by") and all(row[f"has_img_{v}"] for v in VENDORS)
    ]  # fmt: skip
    if count > len(rows):
        raise ValueError(f"emoji must be at most {len(rows)}, got {count}")
    return sorted(rows, key=lambda row: hashlib.sha256(str(row["name"]).encode()).digest())[:count]


def fetch(count: int) -> tuple[list[Sprite], dict[str, Any]]:
    """Sprites and the facts of their packages, downloaded.

    Raises:
        npm.NpmError: if npm is missing or cannot download, or an archive is not the published one.
    """
    pictures: dict[str, list[Image.Image]] = {}
    chosen: list[dict[str, Any]] = []
    facts = {}
    for vendor in VENDORS:
        name = emoji.package(vendor)
        with npm.packages({name: emoji.VERSION}, {name: emoji.SHA256[vendor]}) as fetched, tempfile.TemporaryDirectory() as held:
            chosen = chosen or choose(json.loads(fetched[name].read("emoji.json")), count)
            place = f"img/{vendor}/{emoji.SIZE}/"
            wanted = {place + row["image"]: str(row["name"]) for row in chosen}
            fetched[name].extract(wanted.__contains__, Path(held))
            for path, called in wanted.items():
                file = Path(held) / path
                if not file.is_file():
                    raise SceneError(f"{vendor} has no picture of {called}, though the table says so")
                pictures.setdefault(called, []).append(Image.open(file).convert("RGBA"))
            facts[vendor] = {**fetched[name].facts(), "rights": emoji.RIGHTS[vendor]}
    return [Sprite(r["name"].lower(), r["subcategory"], tuple(pictures[r["name"]])) for r in chosen], facts


def draw_scene(
    rng: np.random.Generator, side: int, sprites: Sequence[Sprite]
) -> tuple[Image.Image, list[tuple[Sprite, list[float]]]]:
    """A picture, and (sprite, box) of everything in it, from back to front; boxes end where alpha falls below one half."""
    canvas = Image.fromarray(np.clip(ground(rng, side), 0, 255).astype(np.uint8)).convert("RGBA")
    things: list[tuple[Sprite, list[float]]] = []
    for _ in range(int(rng.integers(2, 5))):
        sprite = sprites[int(rng.integers(len(sprites)))]
        if things and rng.random() < 0.3:  # the same again, by whichever vendor
            sprite = things[int(rng.integers(len(things)))][0]
        picture = sprite.pictures[int(rng.integers(len(sprite.pictures)))]
        for _ in range(20):
            extent = int(rng.integers(round(side * 0.24), round(side * 0.45) + 1))
            left, top = (int(rng.integers(0, side - extent + 1)) for _ in range(2))
            small = picture.resize((extent, extent), Image.Resampling.LANCZOS)
            ys, xs = np.nonzero(np.asarray(small)[..., 3] > 127)
            if not len(xs):
                continue
            box = [float(left + xs.min()), float(top + ys.min()), float(left + xs.max() + 1), float(top + ys.max() + 1)]
            if all(shared(box, other) <= OVERLAP for _, other in things):
                canvas.alpha_composite(small, (left, top))
                things.append((sprite, box))
                break
    return canvas.convert("RGB"), things


def ask(
    rng: np.random.Generator, things: Sequence[tuple[Sprite, list[float]]], sprites: Sequence[Sprite], prompts: int
) -> list[Prompt]:
    """Prompts of a scene: what is there, as many that are not, and half of these of a group that is there."""
    there = {s.name: s for s, _ in things}
    groups = {s.group for s in there.values()}
    absent = [s for s in sprites if s.name not in there]
    near, far = ([s.name for s in absent if (s.group in groups) is hard] for hard in (True, False))
    wanted = min(len(there), prompts - prompts // 2)
    hard = min(len(near), (wanted + 1) // 2)
    counts: dict[Kind, tuple[list[str], int]] = {
        "present": (list(there), wanted), "hard": (near, hard), "absent": (far, min(len(far), wanted - hard)),
    }  # fmt: skip
    chosen = []
    for kind, (names, count) in counts.items():
        for i in rng.permutation(len(names))[:count]:
            boxes = [box for s, box in things if s.name == names[i]] if kind == "present" else []
            chosen.append(Prompt(names[i], kind, np.array(boxes, np.float32).reshape(-1, 4)))
    return [chosen[i] for i in rng.permutation(len(chosen))]


@register("dataset_maker", paper="scenes composed of emoji-datasource 16.0.0 (npm), two vendors")
def emoji_scenes(
    root: str, *, seed: int = 0, train: int = 1500, test: int = 300, side: int = 96, prompts: int = 8, emoji: int = 48
) -> None:
    """Download two npm packages (160 MB, temporarily) and compose prompted scenes of real pictures under `root`, or find them there.

    Args:
        root: its folder.
        seed: names the scenes.
        train, test: images of the two splits. Both show the same emoji, in other scenes.
        side: of an image, in pixels.
        prompts: most prompts an image, half of them absent.
        emoji: how many different ones.

    Raises:
        ValueError: for counts that are too small or more emoji than there are, or if `root` holds anything else.
        npm.NpmError: if npm is missing or cannot download, or an archive is not the published one.
    """
    if train < 1 or test < 1 or side < 48 or prompts < 2 or emoji < 8:
        raise ValueError(
            f"want train and test of at least 1, side 48, prompts 2, emoji 8; got {train}, {test}, {side}, {prompts}, {emoji}"
        )

    def write(folder: Path) -> dict[str, Any]:
        sprites, facts = fetch(emoji)

        def scene(rng: np.random.Generator) -> tuple[Image.Image, list[Prompt]]:
            picture, things = draw_scene(rng, side, sprites)
            return picture, ask(rng, things, sprites, prompts)

        return {
            "counts": write_scenes(folder, {"train": train, "test": test}, scene, seed),
            "packages": facts,
            "names": {s.name: s.group for s in sprites},
            "libraries": {"numpy": np.__version__, "pillow": PIL.__version__},
        }

    samples.make(
        root, generator="sam3_fusion.emoji_scenes", version=VERSION, seed=seed,
        options={"train": train, "test": test, "side": side, "prompts": prompts, "emoji": emoji}, statement=STATEMENT, write=write,
    )  # fmt: skip
