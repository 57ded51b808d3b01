"""emoji7: real images of seven classes in four styles, built from the emoji that four vendors publish through npm.

Sources: emoji-datasource-{apple,google,twitter,facebook} 16.0.0. The pictures are downloaded when the set is built and are never
part of this repository: Google's are Apache-2.0 and Twitter's CC BY 4.0, Apple's and Facebook's belong to those companies
(no commercial use, no redistribution).

The same emoji exists in all four domains. So the split is one of emoji ("identities"): a test emoji is in no vendor's
training images, and an episode never shows one emoji as support and as query unless told to.

The domain gap is milder than from photo to sketch; accuracies on emoji7 are not comparable with PACS.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from core import npm
from core.emoji import RIGHTS, SHA256, SIZE, VERSION, package
from core.registry import register
from plugins.sap.datasets import MANIFEST, Emoji7, LayoutError

STATEMENT = "Images of four vendors from emoji-datasource 16.0.0, for research on this machine; do not redistribute them."
BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "imagenet_mean": (124, 116, 104)}

CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # subcategories, and short names that are left out
    "animal": (
        ("animal-mammal", "animal-bird", "animal-marine", "animal-bug", "animal-reptile", "animal-amphibian"),
        ("feet", "pig_nose", "feather", "wing", "coral", "shell", "spider_web", "microbe"),
    ),
    "vehicle": (
        ("transport-ground", "transport-air", "transport-water"),
        (
            "traffic_light", "vertical_traffic_light", "construction", "rotating_light", "octagonal_sign", "oil_drum", "motorway",
            "railway_track", "fuelpump", "busstop", "station", "wheel", "seat", "ring_buoy", "anchor", "roller_skate", "parachute",
            "satellite",
        ),
    ),
    "clothing": (("clothing",), ()),
    "food": (("food-prepared", "food-asian", "food-sweet", "food-fruit", "food-vegetable"), ()),
    "face": (
        (
            "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy", "face-unwell",
            "face-hat", "face-glasses", "face-concerned",
        ),
        (),
    ),
    "person": (("person", "person-role"), ()),
    "weather": (("sky & weather",), ()),
}  # fmt: skip


def choose(
    table: list[dict[str, Any]], classes: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
) -> dict[str, dict[str, str]]:
    """Class -> short name -> image file: base emoji of its subcategories, in all four vendors, not replaced by a newer one.

    Raises:
        LayoutError: if an exclusion names an emoji that is not there, or two names become one file name.
    """
    chosen: dict[str, dict[str, str]] = {}
    for cls, (subcategories, left_out) in classes.items():
        rows = [row for row in table if row["subcategory"] in subcategories]
        strange = set(left_out) - {row["short_name"] for row in rows}
        if strange:
            raise LayoutError(
                f"class {cls} leaves out {sorted(strange)[0]!r}, which the table does not have; another version of the packages?"
            )
        kept = [
            row for row in rows
            if row["short_name"] not in left_out and not row.get("obsoleted_by") and all(row[f"has_img_{v}"] for v in Emoji7.domains)
        ]  # fmt: skip
        chosen[cls] = {re.sub(r"[^A-Za-z0-9_-]", "_", row["short_name"]): row["image"] for row in kept}
        if len(chosen[cls]) != len(kept):
            raise LayoutError(f"class {cls}: two emoji have one file name")
    return chosen


def split(names: Mapping[str, Any], cls: str, test: float) -> dict[str, list[str]]:
    """Train and test names of a class, in the order of a fixed hash, so that the split is the same everywhere."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"{cls}/{name}".encode()).digest())
    count = round(test * len(order))
    return {"train": sorted(order[count:]), "test": sorted(order[:count])}


def _composite(picture: Path, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.open(picture).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def write_vendor(
    made: Path, vendor: str, package: npm.Package, background: str, chosen: dict[str, dict[str, str]] | None
) -> dict[str, dict[str, str]]:
    """Write one vendor's images into the folder `made`.

    Args:
        made: root of the set.
        vendor: one of the domains.
        package: its package.
        background: name of the colour under transparent pixels.
        chosen: what `choose` gave for the first vendor, None for that one itself. The tables of all vendors are the same bytes.

    Raises:
        npm.NpmError: if the archive is damaged or holds no images.
        LayoutError: if an image is missing that the table promises.
    """
    place = f"img/{vendor}/{SIZE}/"
    with tempfile.TemporaryDirectory(dir=made.parent) as held:
        folder = Path(held)
        package.extract(lambda path: path == "emoji.json" or (path.startswith(place) and path.endswith(".png")), folder)
        chosen = chosen or choose(json.loads((folder / "emoji.json").read_text(encoding="utf-8")), CLASSES)
        for cls, names in chosen.items():
            cell = made / vendor / cls
            cell.mkdir(parents=True)
            for name, file in names.items():
                picture = folder / place / file
                if not picture.is_file():
                    raise LayoutError(f"{vendor} has no image {file} of {name}, though the table says so")
                _composite(picture, BACKGROUNDS[background]).save(cell / f"{name}.png")
    return chosen


@register("dataset_maker", paper="emoji-datasource 16.0.0 (npm), four vendors")
def emoji7(root: str, background: Literal["white", "grey", "imagenet_mean"] = "white", test_share: float = 0.5) -> None:
    """Download four npm packages (338 MB, temporarily) and build the seven-class, four-vendor set: real images, 64 pixels.

    A folder that already holds the asked set is left as it is.

    Args:
        root: the folder to fill, absent or empty.
        background: what transparent pixels become. `imagenet_mean` is 0 after normalisation, so that zero-padded filters see no
            frame around the image.
        test_share: share of the emoji of each class that training never sees, in any vendor.

    Raises:
        npm.NpmError: if npm is missing or cannot download, or an archive is not the published one.
        LayoutError: if the folder holds something else.
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), got {test_share}")
    target = Path(root).expanduser().resolve()
    asked: dict[str, Any] = {"built_by": "sap.emoji7", "background": background, "size": SIZE, "test_share": test_share}
    if _holds(target, asked):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as held:
        made = Path(held) / "set"
        made.mkdir()
        chosen: dict[str, dict[str, str]] | None = None
        facts = {}
        for vendor in Emoji7.domains:  # one at a time: an archive has 60 to 100 MB
            name = package(vendor)
            with npm.packages({name: VERSION}, {name: SHA256[vendor]}) as fetched:
                chosen = write_vendor(made, vendor, fetched[name], background, chosen)
                facts[vendor] = {**fetched[name].facts(), "rights": RIGHTS[vendor]}
        assert chosen is not None
        manifest = {
            **asked,
            "statement": STATEMENT,
            "packages": facts,
            "classes": {cls: {"subcategories": list(a), "left out": list(b)} for cls, (a, b) in CLASSES.items()},
            "identities": {cls: split(names, cls, test_share) for cls, names in chosen.items()},
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()  # it is empty
        made.rename(target)


def _holds(target: Path, asked: dict[str, Any]) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        there = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = {}
    if not isinstance(there, dict) or there.get("built_by") != asked["built_by"]:
        raise LayoutError(f"{target} exists and is no emoji7; give an empty or new folder")
    found = {key: there.get(key) for key in asked}
    if found != asked:
        raise LayoutError(f"{target} holds another emoji7 ({found}); remove it or choose another root")
    Emoji7(str(target))  # raises where files and manifest differ
    return True
