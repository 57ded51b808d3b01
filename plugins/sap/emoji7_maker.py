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
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from core.registry import register
from plugins.sap.datasets import MANIFEST, Emoji7, LayoutError, read_manifest

VERSION = "16.0.0"
SIZE = 64
DOWNLOAD_LIMIT_S = 900.0
SHA256 = {  # first 16 digits, of the archives as published
    "apple": "b34d1665e136f163",
    "google": "fb5fd131b362aab7",
    "twitter": "f64a530c63bca463",
    "facebook": "017038cf5a4e7fcf",
}
RIGHTS = {
    "apple": "(c) Apple, no commercial use",
    "google": "Noto Emoji, Apache-2.0",
    "twitter": "Twemoji, CC BY 4.0",
    "facebook": "(c) Facebook, unclear",
}
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


def npm_pack(package: str, folder: Path, limit_s: float = DOWNLOAD_LIMIT_S) -> Path:
    """Download a package's archive with npm.

    Args:
        package: `name@version`.
        folder: where the archive goes.
        limit_s: how long it may take.

    Raises:
        RuntimeError: if npm is not installed, cannot reach its registry, or takes too long.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            "emoji7 is built from npm packages and npm is not installed: install Node.js, or use repro data make pacs-sample"
        )
    try:
        done = subprocess.run(
            [npm, "pack", package, "--pack-destination", str(folder), "--ignore-scripts", "--silent"],
            cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"npm pack {package} took longer than {limit_s:g} s; try again") from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or not archives:
        said = [line for line in done.stderr.splitlines() if "npm error" in line] or done.stderr.splitlines() or ["no message"]
        raise RuntimeError(f"npm pack {package} failed: {said[0].strip()}. The registry must be reachable to build emoji7")
    return archives[-1]


def read_archive(archive: Path, vendor: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The emoji table and the 64-pixel images by file name, streamed out of an archive (the rest of it is skipped).

    Raises:
        LayoutError: if the archive is damaged or holds no table or images.
    """
    table: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    place = f"package/img/{vendor}/{SIZE}/"
    try:
        with tarfile.open(archive, "r|gz") as stream:
            for member in stream:
                wanted = member.name == "package/emoji.json" or (member.name.startswith(place) and member.name.endswith(".png"))
                file = stream.extractfile(member) if wanted and member.isfile() else None
                if file is None:
                    continue
                if member.name == "package/emoji.json":
                    table = json.load(file)
                else:
                    pictures[member.name.removeprefix(place)] = file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise LayoutError(f"{archive.name} is damaged ({error}); download it again") from error
    if not table or not pictures:
        raise LayoutError(f"{archive.name} holds no emoji.json or no {place}*.png; it is not emoji-datasource-{vendor}")
    return table, pictures


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


def _composite(png: bytes, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def build(
    made: Path,
    archives: Mapping[str, Path],
    asked: dict[str, Any],
    classes: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = CLASSES,
) -> None:
    """Write the set into the folder `made`, vendor by vendor, from archives on disk."""
    chosen: dict[str, dict[str, str]] = {}
    for vendor in Emoji7.domains:
        table, pictures = read_archive(archives[vendor], vendor)
        chosen = chosen or choose(table, classes)
        for cls, names in chosen.items():
            folder = made / vendor / cls
            folder.mkdir(parents=True)
            for name, file in names.items():
                if file not in pictures:
                    raise LayoutError(f"{vendor} has no image {file} of {name}, though the table says so")
                _composite(pictures[file], BACKGROUNDS[asked["background"]]).save(folder / f"{name}.png")
    identities = {cls: split(names, cls, asked["test_share"]) for cls, names in chosen.items()}
    subcategories = {cls: {"subcategories": list(a), "left out": list(b)} for cls, (a, b) in classes.items()}
    manifest = {**asked, "classes": subcategories, "identities": identities}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@register("dataset_maker", paper="emoji-datasource 16.0.0 (npm), four vendors")
def emoji7(
    root: str, background: Literal["white", "grey", "imagenet_mean"] = "white", test_share: float = 0.5, keep_archives: str = ""
) -> None:
    """Download four npm packages (338 MB, temporarily) and build the seven-class, four-vendor set: real images, 64 pixels.

    A folder that already holds the asked set is left as it is.

    Args:
        root: the folder to fill; it must be absent, empty, or hold an earlier emoji7.
        background: what transparent pixels become. `imagenet_mean` is 0 after normalisation, so that zero-padded filters see no
            frame around the image.
        test_share: share of the emoji of each class that training never sees, in any vendor.
        keep_archives: a folder in which downloaded archives are kept and found again; empty keeps none.

    Raises:
        RuntimeError: if npm is missing or cannot download.
        LayoutError: if the folder holds something else, or an archive is not the published one.
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), got {test_share}")
    place = Path(root)
    asked: dict[str, Any] = {
        "kind": "built", "maker": "emoji7", "statement": STATEMENT, "background": background, "size": SIZE, "test_share": test_share,
    }  # fmt: skip
    if place.exists():
        there = read_manifest(place) if place.is_dir() else {}
        if {key: there.get(key) for key in asked} == asked:
            return
        if there.get("maker") != "emoji7" and (not place.is_dir() or any(place.iterdir())):
            raise LayoutError(f"{place} exists and is no emoji7; give an empty or new folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as held:
        store = Path(keep_archives) if keep_archives else Path(held) / "archives"
        archives, packages = {}, {}
        for vendor in Emoji7.domains:
            package = f"emoji-datasource-{vendor}@{VERSION}"
            folder = store / vendor
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(folder.glob("*.tgz"))
            archive = archives[vendor] = found[-1] if found else npm_pack(package, folder)
            with archive.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not digest.startswith(SHA256[vendor]):
                raise LayoutError(
                    f"{archive.name} has sha256 {digest[:16]}…, published is {SHA256[vendor]}…; remove it and download again"
                )
            packages[vendor] = {"package": package, "bytes": archive.stat().st_size, "sha256": digest, "rights": RIGHTS[vendor]}
        made = Path(held) / "set"
        build(made, archives, {**asked, "packages": packages})
        if place.exists():
            shutil.rmtree(place)
        made.rename(place)
