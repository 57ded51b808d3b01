"""Images of the same classes in several domains: PACS and emoji7, read from `root/<domain>/<class>/<file>`.

A data set is opened whole: folders are walked in sorted order, so nothing depends on the file system, and what is missing is
said at once. Each image belongs to an *identity*: in emoji7 the same emoji drawn by four vendors is one identity; in PACS
every file is its own. Identities, never files, are split into training and held-out ones, so that no held-out object was
seen in training in another rendering.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from core import data, images, samples
from core.registry import register

MANIFEST = "manifest.json"  # left at the root by what was generated or built here; published sets have none
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")

Level = Literal["ok", "warning", "error"]
Pixels = UInt8[np.ndarray, "_ _ 3"]


class LayoutError(ValueError):
    """A folder that is not the data set it should be; the message names what is missing and says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One image: its file under the root, the numbers of its domain and class, its identity, and whether that is held out."""

    file: str
    domain: int
    cls: int
    identity: str
    held_out: bool


def _listing(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(ENDINGS) and not e.name.startswith("."))


class DomainFolders:
    """What the data sets share. Subclasses name their domains and classes.

    Attributes:
        root: the folder that holds the domains.
        domains, classes: names, in the order of their numbers.
        records: every image, sorted by domain, class and name.
        sample: True if the folder says of itself that it was generated.
    """

    title: ClassVar[str]
    nested: ClassVar[tuple[str, ...]] = ()
    domains: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]]
    how_to_get: ClassVar[str]

    def __init__(self, root: str, holdout: float):
        if not 0 < holdout < 1:
            raise ValueError(f"holdout must be in (0, 1), got {holdout}: the share of identities that training never sees")
        self.root = self.locate(root)
        self.sample = self.generated and samples.read_manifest(self.root) is not None
        missing = [f"{d}/{c}" for d in self.domains for c in self.classes if not (self.root / d / c).is_dir()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LayoutError(f"{self.title} at {self.root}: missing folder {missing[0]}{more}. {self.how_to_get}")
        found = [
            (f"{domain}/{cls}/{name}", d, c, self.identity(domain, cls, name))
            for d, domain in enumerate(self.domains)
            for c, cls in enumerate(self.classes)
            for name in _listing(self.root / domain / cls)
        ]
        cells = Counter((d, c) for _, d, c, _ in found)
        empty = [
            f"{self.domains[d]}/{self.classes[c]}"
            for d in range(len(self.domains))
            for c in range(len(self.classes))
            if not cells[d, c]
        ]
        if empty:
            raise LayoutError(f"{self.title} at {self.root}: no image in {', '.join(empty[:4])}. {self.how_to_get}")
        held = self.held_out({(d if self.single_domain else -1, c, i) for _, d, c, i in found}, holdout)
        self.records = tuple(Record(f, d, c, i, i in held) for f, d, c, i in found)

    single_domain: ClassVar[bool] = True  # whether an identity lives in one domain, so that the split is stratified by domain too
    generated: ClassVar[bool] = True  # whether a manifest at the root says that the images were generated

    @classmethod
    def locate(cls, root: str) -> Path:
        """The folder that holds the domains: `root`, or a published folder name under it.

        Raises:
            LayoutError: if there is no such folder.
        """
        given = Path(root).expanduser()
        if not given.is_dir():
            raise LayoutError(f"{cls.title}: no folder {given}. {cls.how_to_get}")
        for place in (given, *(given / name for name in cls.nested)):
            if any((place / domain).is_dir() for domain in cls.domains):
                return place
        found = ", ".join(sorted(p.name for p in given.iterdir())[:6]) or "nothing"
        raise LayoutError(f"{cls.title}: {given} holds none of {', '.join(cls.domains)} but {found}. {cls.how_to_get}")

    @classmethod
    def identity(cls, domain: str, name_of_class: str, file: str) -> str:
        """The object an image shows."""
        return f"{domain}/{name_of_class}/{file}"

    def held_out(self, identities: set[tuple[int, int, str]], share: float) -> set[str]:
        """Which identities training never sees: the first `share` of each class (and domain) in the order of a fixed hash.

        The order of a hash of the name is as good as random and does not move when files are added elsewhere.
        """
        groups: dict[tuple[int, int], list[str]] = {}
        for domain, cls, identity in identities:
            groups.setdefault((domain, cls), []).append(identity)
        held: set[str] = set()
        for members in groups.values():
            order = sorted(members, key=lambda name: hashlib.sha256(name.encode()).digest())
            held.update(order[: round(share * len(order))])
        return held

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, index: int) -> Pixels:
        """The pixels of an image, uint8 `h w 3`.

        Raises:
            core.images.ImageError: naming the file that cannot be read.
        """
        return images.read_image(self.root / self.records[index].file)

    def fingerprint(self, *, contents: bool = False) -> str:
        """A short hash over all image names and sizes, and with `contents` over their bytes."""
        return data.fingerprint(self.root, [self.root / record.file for record in self.records], contents=contents)

    def counts(self) -> dict[str, int]:
        """Images by domain, identities and held-out identities, for a run's data card."""
        by_domain = Counter(record.domain for record in self.records)
        return {
            **{name: by_domain[d] for d, name in enumerate(self.domains)},
            "classes": len(self.classes),
            "identities": len({record.identity for record in self.records}),
            "held-out identities": len({record.identity for record in self.records if record.held_out}),
        }


@register("dataset", paper="PACS (Li et al., ICCV 2017)")
class PACS(DomainFolders):
    """Photo, art painting, cartoon and sketch of seven classes: `root/<domain>/<class>/*.{jpg,png}`.

    Args:
        root: the folder that holds the four domains, or its parent (`PACS/kfold` as published, `kfold`, `PACS`).
        holdout: share of the images of each domain and class that training never sees. The release has no such split: there
            training and test read the same files.

    Raises:
        LayoutError: if a domain or class is missing or empty.
    """

    title = "PACS"
    nested = ("kfold", "PACS/kfold", "PACS", "pacs")
    domains = ("photo", "art_painting", "cartoon", "sketch")
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    how_to_get = "Give PACS's own folder, or make a generated sample: repro data make pacs-sample --root DIR"
    published: ClassVar[Mapping[str, tuple[int, ...]]] = {  # images by class; totals 1670, 2048, 2344, 3929
        "photo": (189, 202, 182, 186, 199, 280, 432),
        "art_painting": (379, 255, 285, 184, 201, 295, 449),
        "cartoon": (389, 457, 346, 135, 324, 288, 405),
        "sketch": (772, 740, 753, 608, 816, 80, 160),
    }

    def __init__(self, root: str, holdout: float = 0.2):
        super().__init__(root, holdout)


@register("dataset", paper="emoji-datasource 16.0.0, four vendors")
class Emoji7(DomainFolders):
    """Seven classes of emoji as four vendors draw them: `root/<vendor>/<class>/<short name>.png`, made by `emoji7`.

    An identity is an emoji; it exists in all four domains. The split is the manifest's.

    Args:
        root: the folder that `repro data make emoji7` filled.

    Raises:
        LayoutError: if it is not there, or a domain or class is missing, or the manifest does not fit the files.
    """

    title = "emoji7"
    single_domain = False
    generated = False
    domains = ("apple", "google", "twitter", "facebook")
    classes = ("animal", "vehicle", "clothing", "food", "face", "person", "weather")
    how_to_get = "Build it from the npm packages: repro data make emoji7 --root DIR"

    def __init__(self, root: str):
        super().__init__(root, 0.5)

    @classmethod
    def identity(cls, domain: str, name_of_class: str, file: str) -> str:
        return f"{name_of_class}/{Path(file).stem}"

    def held_out(self, identities: set[tuple[int, int, str]], share: float) -> set[str]:
        try:
            stated = json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))["identities"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise LayoutError(f"emoji7 at {self.root}: no {MANIFEST} with identities and their split. {self.how_to_get}") from error
        split = {f"{cls}/{name}": part for cls, parts in stated.items() for part, names in parts.items() for name in names}
        strange = sorted({identity for _, _, identity in identities} ^ split.keys())
        if strange:
            raise LayoutError(
                f"emoji7 at {self.root}: {strange[0]} is in the files or in the manifest, not in both. {self.how_to_get}"
            )
        return {identity for identity, part in split.items() if part == "test"}


class DomainImages:
    """The images of a layout as samples: `image` (float32 `c h w`), `class`, `domain`.

    Args:
        layout: an opened data set.
        transform: from uint8 pixels and a generator to a normalised float32 array.
        cache: keep decoded pixels in memory (PACS: 1.5 GB; emoji7: 28 MB).
    """

    def __init__(self, layout: DomainFolders, transform: Any, cache: bool = False):
        self.layout, self.transform = layout, transform
        self._kept: dict[int, Pixels] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.layout.records)

    def pixels(self, index: int) -> Pixels:
        """Decoded pixels of an image, from memory where it is kept."""
        if self._kept is None:
            return self.layout.read(index)
        if index not in self._kept:
            self._kept[index] = self.layout.read(index)
        return self._kept[index]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        record = self.layout.records[index]
        return {"image": torch.from_numpy(self.transform(self.pixels(index), rng)), "class": record.cls, "domain": record.domain}


# --- checkers ---------------------------------------------------------------------------------------------------------


def _unreadable(layout: DomainFolders, indices: Sequence[int]) -> list[str]:
    bad = []
    for index in indices:
        try:
            layout.read(index)
        except images.ImageError as error:
            bad.append(str(error))
    return bad


def _check_images(layout: DomainFolders, thorough: bool) -> list[data.Finding]:
    step = 1 if thorough else max(1, len(layout.records) // 500)
    looked_at = range(0, len(layout.records), step)
    bad = _unreadable(layout, looked_at)
    found = [data.Finding("error", "unreadable image", message) for message in bad]
    return found or [data.Finding("ok", "images decoded", f"{len(looked_at)} of {len(layout.records)}")]


@register("dataset_checker", paper="PACS (Li et al., ICCV 2017)")
def pacs(root: str, thorough: bool = False) -> list[data.Finding]:
    """Check a PACS folder: every domain and class there, published counts, images readable.

    Args:
        root: the folder.
        thorough: decode every image instead of about 500.
    """
    try:
        layout = PACS(root)
    except LayoutError as error:
        return [data.Finding("error", "layout", str(error))]
    found: list[data.Finding] = []
    if layout.sample:
        found.append(data.Finding("warning", "origin", "a generated sample in PACS's layout", "the published images"))
    counts = Counter((r.domain, r.cls) for r in layout.records)
    for d, domain in enumerate(layout.domains):
        there = tuple(counts[d, c] for c in range(len(layout.classes)))
        expected = layout.published[domain]
        level: Level = "ok" if there == expected or layout.sample else "warning"
        wanted = "" if layout.sample else f"{sum(expected)} in all: {', '.join(map(str, expected))}"
        found.append(data.Finding(level, f"{domain} images", f"{sum(there)} in all: {', '.join(map(str, there))}", wanted))
    return found + _check_images(layout, thorough)


@register("dataset_checker", paper="emoji-datasource 16.0.0, four vendors")
def emoji7_folder(root: str, thorough: bool = True) -> list[data.Finding]:
    """Check an emoji7 folder: every vendor and class there, files and manifest agree, images readable, split disjoint.

    Args:
        root: the folder.
        thorough: decode every image instead of about 500.
    """
    try:
        layout = Emoji7(root)
    except LayoutError as error:
        return [data.Finding("error", "layout", str(error))]
    found: list[data.Finding] = []
    counts = layout.counts()
    for domain in layout.domains:
        level: Level = "ok" if counts[domain] == counts["identities"] else "error"
        found.append(data.Finding(level, f"{domain} images", str(counts[domain]), f"{counts['identities']}, one for each identity"))
    smallest = min(
        (sum(r.held_out == part for r in layout.records if r.cls == c and r.domain == 0), f"{name}, {'test' if part else 'train'}")
        for c, name in enumerate(layout.classes)
        for part in (False, True)
    )
    level = "ok" if smallest[0] >= 20 else "warning"
    found.append(
        data.Finding(
            level, "smallest class and split", f"{smallest[0]} identities ({smallest[1]})", "20 for 5 shots and 15 queries"
        )
    )
    return found + _check_images(layout, thorough)
