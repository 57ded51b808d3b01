"""RGBNT201, RGBNT100 and MSVR310 on disk: the published layouts, read, checked, and told apart from a sample.

A data set is opened whole: every name is parsed and every image paired before the first one is read, so what is wrong is
said at once. Lists are sorted by name, so that order never depends on the file system. Identities keep the numbers that
are on disk; `TriSpectralImages(relabel=True)` numbers those of its split from 0 in sorted order.

Sources of the layouts: the loaders of DeMo's release; counts: its training logs.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from core import data, images
from core.registry import register

SPECTRA = ("rgb", "nir", "tir")
SPLITS = ("train", "query", "gallery")
MANIFEST = "manifest.json"  # what the sample generator leaves at the root; no published set has one

Pixels = UInt8[np.ndarray, "_ _ 3"]


class LayoutError(ValueError):
    """A folder that is not the data set it should be; the message names the file or folder and says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One moment of one identity in three spectra.

    Attributes:
        files: paths under the root, `(rgb, nir, tir)`, or one strip that holds all three side by side.
        identity: as written on disk.
        camera: from 0.
        scene: MSVR310's scene number, -1 elsewhere.
    """

    files: tuple[str, ...]
    identity: int
    camera: int
    scene: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """Size of a split; images are counted as triples."""

    identities: int
    images: int
    cameras: int

    def __str__(self) -> str:
        return f"{self.identities} identities, {self.images} images, {self.cameras} cameras"


@dataclasses.dataclass(frozen=True)
class Split:
    """The records of a split, sorted by name."""

    name: str
    records: tuple[Record, ...]

    @property
    def identities(self) -> tuple[int, ...]:
        return tuple(sorted({record.identity for record in self.records}))

    @property
    def cameras(self) -> tuple[int, ...]:
        return tuple(sorted({record.camera for record in self.records}))

    @property
    def counts(self) -> Counts:
        return Counts(len(self.identities), len(self.records), len(self.cameras))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a layout: the kind of fault, the file or folder, and what was expected there."""

    kind: str
    where: str
    expected: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}; expected {self.expected}"


@dataclasses.dataclass(frozen=True)
class Survey:
    """All that a walk over the folders found, good and bad."""

    splits: Mapping[str, Split]
    problems: tuple[Problem, ...]


def _listing(folder: Path) -> list[str]:
    """Names of the .jpg files in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(".jpg") and not e.name.startswith("."))


class Layout:
    """What the three data sets share. Subclasses say where things stand and how a name reads.

    Attributes:
        root: the folder that holds the splits.
        train, query, gallery: the splits. Where query and gallery are one folder they are one object.
        sample: True if the folder says of itself that it was generated.
    """

    title: ClassVar[str]
    nested: ClassVar[tuple[str, ...]]  # under a parent folder the root may be found at these places
    folders: ClassVar[Mapping[str, str]]  # split -> folder
    camera_range: ClassVar[range]  # as written in file names
    pattern: ClassVar[re.Pattern[str]]
    name_rule: ClassVar[str]
    published: ClassVar[Mapping[str, Counts]]
    junk: ClassVar[Literal["camera", "scene"]]

    def __init__(self, root: str):
        self.root = self.locate(root)
        survey = self.survey(self.root)
        if survey.problems:
            first, more = survey.problems[0], len(survey.problems) - 1
            check = f"`repro data check {type(self).__name__.lower()} --root {root}` lists all" if more else ""
            raise LayoutError(f"{self.title} at {self.root}: {first}" + (f" (and {more} more; {check})" if more else ""))
        self.train, self.query, self.gallery = (survey.splits[name] for name in SPLITS)
        self.sample = (self.root / MANIFEST).is_file()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, record: Record) -> tuple[Pixels, Pixels, Pixels]:
        """RGB, NIR and TIR of a record, uint8 `h w 3` (single-channel files are repeated over three channels).

        Raises:
            core.images.ImageError: naming the file that cannot be read.
        """
        rgb, nir, tir = (images.read_image(self.root / file) for file in record.files)
        return rgb, nir, tir

    @property
    def unseen_cameras(self) -> tuple[int, ...]:
        """Cameras of query and gallery that training never sees, so that a camera embedding has no row for them."""
        return tuple(sorted({*self.query.cameras, *self.gallery.cameras} - set(self.train.cameras)))

    def fingerprint(self, *, contents: bool = False) -> str:
        """A short hash over all image names and sizes, and with `contents` over their bytes."""
        files = {file for split in (self.train, self.query, self.gallery) for record in split.records for file in record.files}
        return data.fingerprint(self.root, [self.root / file for file in files], contents=contents)

    def counts(self) -> dict[str, int]:
        """Identities, images and cameras of each split under flat names, for a run's data card."""
        return {f"{name}_{key}": value for name in SPLITS for key, value in dataclasses.asdict(getattr(self, name).counts).items()}

    # --- surveying ----------------------------------------------------------------------------------------------------

    @classmethod
    def misshapen(cls, width: int, height: int) -> str | None:
        """Why an image file of this size cannot belong to the set, or None."""
        return None

    @classmethod
    def locate(cls, root: str | Path) -> Path:
        """The folder that holds the splits: `root`, or the published folder name under it.

        Raises:
            LayoutError: if there is no such folder.
        """
        given = Path(root).expanduser()
        if not given.is_dir():
            raise LayoutError(f"{cls.title}: no folder {given}; give the folder that holds {cls.wanted()}")
        for place in (given, *(given / name for name in cls.nested)):
            if any((place / folder).is_dir() for folder in cls.folders.values()):
                return place
        found = sorted(p.name for p in given.iterdir())[:8]
        raise LayoutError(
            f"{cls.title}: {given} holds none of {cls.wanted()}; it {'holds ' + ', '.join(found) if found else 'is empty'}"
        )

    @classmethod
    def wanted(cls) -> str:
        """The folders a root must hold, for messages."""
        return ", ".join(f"{folder}/" for folder in dict.fromkeys(cls.folders.values()))

    @classmethod
    def survey(cls, root: Path) -> Survey:
        """Walk all splits and parse all names; collects what is wrong and raises nothing."""
        problems: list[Problem] = []
        by_folder: dict[str, Split] = {}
        for name, folder in cls.folders.items():
            if folder in by_folder:
                continue
            records: list[Record] = []
            if not (root / folder).is_dir():
                problems.append(Problem("missing folder", folder, f"the {name} split of {cls.title}"))
            else:
                before = len(problems)
                records = cls._walk(root, folder, problems)
                if not records and len(problems) == before:
                    problems.append(Problem("holds no image", folder, f"{cls.name_rule} files"))
            by_folder[folder] = Split(name, tuple(sorted(records, key=lambda record: record.files)))
        return Survey({name: by_folder[folder] for name, folder in cls.folders.items()}, tuple(problems))

    @classmethod
    def _walk(cls, root: Path, folder: str, problems: list[Problem]) -> list[Record]:
        raise NotImplementedError

    @classmethod
    def _pair(cls, root: Path, places: Sequence[str], problems: list[Problem]) -> list[Record]:
        """Records of three sister folders (RGB, NIR, TIR) whose files have equal names."""
        listings: list[set[str]] = []
        for spectrum, place in zip(SPECTRA, places):
            if not (root / place).is_dir():
                problems.append(Problem(f"missing folder ({spectrum.upper()})", place, f"one image for each in {places[0]}/"))
                return []
            listings.append(set(_listing(root / place)))
        records = []
        for name in sorted(set.union(*listings)):
            absent = [i for i, listing in enumerate(listings) if name not in listing]
            present = next(i for i, listing in enumerate(listings) if name in listing)
            for i in absent:
                file, twin = f"{places[i]}/{name}", f"{places[present]}/{name}"
                problems.append(Problem(f"missing {SPECTRA[i].upper()} image", file, f"the counterpart of {twin}"))
            if not absent:
                record = cls._parse(name, tuple(f"{place}/{name}" for place in places), problems)
                records += [record] if record else []
        return records

    @classmethod
    def _parse(cls, name: str, files: tuple[str, ...], problems: list[Problem]) -> Record | None:
        match = cls.pattern.match(name)
        if match is None:
            problems.append(Problem("name does not match", files[0], cls.name_rule))
            return None
        group = match.groupdict()
        camera = int(group["camera"])
        if camera not in cls.camera_range:
            first, last = cls.camera_range[0], cls.camera_range[-1]
            problems.append(Problem(f"unknown camera {camera}", files[0], f"a camera from {first} to {last}"))
            return None
        return Record(files, int(group["identity"]), camera - cls.camera_range[0], int(group.get("scene", -1)))


@register("dataset", paper="RGBNT201 (Zheng et al., AAAI 2021)")
class RGBNT201(Layout):
    """Persons in three spectra: `train_171/` and `test/`, each with `RGB/`, `NI/`, `TI/` and equal file names in them.

    Names are `PPPPPP_camX_….jpg`, cameras 1 to 4. Query and gallery are both the whole of `test/`.

    Args:
        root: the folder `RGBNT201`, or its parent.

    Raises:
        LayoutError: if it is missing, empty, unpaired, or has a name that does not read.
    """

    title = "RGBNT201"
    nested = ("RGBNT201",)
    folders = {"train": "train_171", "query": "test", "gallery": "test"}
    camera_range = range(1, 5)
    pattern = re.compile(r"(?P<identity>\d{6})_cam(?P<camera>\d)(?:_.*)?\.jpg$", re.IGNORECASE)
    name_rule = "PPPPPP_camX_*.jpg (six digits of identity, one digit of camera)"
    published = {"train": Counts(171, 3951, 4), "query": Counts(30, 836, 2), "gallery": Counts(30, 836, 2)}
    junk = "camera"

    def __init__(self, root: str):
        super().__init__(root)

    @classmethod
    def _walk(cls, root: Path, folder: str, problems: list[Problem]) -> list[Record]:
        return cls._pair(root, [f"{folder}/{spectrum}" for spectrum in ("RGB", "NI", "TI")], problems)


@register("dataset", paper="RGBNT100 (Li et al., AAAI 2020)")
class RGBNT100(Layout):
    """Vehicles in three spectra: `bounding_box_train/`, `query/`, `bounding_box_test/`, one strip an image.

    A strip holds RGB, NIR and TIR side by side; names are `<identity>_c<camera>….jpg` (as in `0502_c0001_000.jpg`), cameras 1
    to 8, identities 1 to 600; identity -1 marks junk, as in Market-1501, and is left out.

    Args:
        root: the folder `rgbir`, or one of its parents `RGBNT100` and above.
        strip_width: pixels of one spectrum in a strip. None takes a third of the strip and insists that it divides. A number
            crops that many columns, half as many rows, and pads what is missing with black in silence: the release
            does so with 256.

    Raises:
        LayoutError: if it is missing, empty, or has a name that does not read.
    """

    title = "RGBNT100"
    nested = ("rgbir", "RGBNT100/rgbir")
    folders = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    camera_range = range(1, 9)
    pattern = re.compile(r"(?P<identity>-?\d+)_c(?P<camera>-?\d+)(?:\D.*)?\.jpg$", re.IGNORECASE)
    name_rule = "<identity>_c<camera>*.jpg"
    published = {"train": Counts(50, 8675, 8), "query": Counts(50, 1715, 8), "gallery": Counts(50, 8575, 8)}
    junk = "camera"

    def __init__(self, root: str, strip_width: int | None = None):
        if strip_width is not None and strip_width < 2:
            raise ValueError(f"strip_width must be at least 2 pixels, or None for a third of the strip, got {strip_width}")
        super().__init__(root)
        self.strip_width = strip_width

    def read(self, record: Record) -> tuple[Pixels, Pixels, Pixels]:
        """The three thirds of a strip.

        Raises:
            core.images.ImageError: if the strip cannot be read, or its width is not divisible by 3.
        """
        path = self.root / record.files[0]
        strip = images.read_image(path)
        height, total, _ = strip.shape
        if self.strip_width is None:
            odd = self.misshapen(total, height)
            if odd:
                raise images.ImageError(f"{path}: {odd}")
            width = total // 3
        else:
            width = self.strip_width
            canvas = np.zeros((width // 2, 3 * width, 3), np.uint8)
            rows, columns = min(height, width // 2), min(total, 3 * width)
            canvas[:rows, :columns] = strip[:rows, :columns]
            strip = canvas
        return strip[:, :width], strip[:, width : 2 * width], strip[:, 2 * width : 3 * width]

    @classmethod
    def misshapen(cls, width: int, height: int) -> str | None:
        return f"{width} pixels wide, not divisible by 3, so no strip of RGB, NIR and TIR" if width % 3 else None

    @classmethod
    def _walk(cls, root: Path, folder: str, problems: list[Problem]) -> list[Record]:
        records = []
        for name in _listing(root / folder):
            record = cls._parse(name, (f"{folder}/{name}",), problems)
            if record is None or record.identity == -1:
                continue
            if not 1 <= record.identity <= 600:
                problems.append(Problem(f"unknown identity {record.identity}", record.files[0], "an identity from 1 to 600"))
                continue
            records.append(record)
        return records


@register("dataset", paper="MSVR310 (Zheng et al., Information Fusion 2023)")
class MSVR310(Layout):
    """Vehicles in three spectra: `bounding_box_train/`, `query3/`, `bounding_box_test/`, each with `<identity>/{vis,ni,th}/`.

    Names are `PPPP_sSSS_vX_….jpg`: identity, scene, and a camera from 0 to 7. Evaluation leaves out images of the query's own
    scene, not of its camera.

    Args:
        root: the folder `MSVR310`, or its parent.

    Raises:
        LayoutError: if it is missing, empty, unpaired, or has a name that does not read.
    """

    title = "MSVR310"
    nested = ("MSVR310",)
    folders = {"train": "bounding_box_train", "query": "query3", "gallery": "bounding_box_test"}
    camera_range = range(8)
    pattern = re.compile(r"(?P<identity>\d{4})_s(?P<scene>\d{3})_v(?P<camera>\d)(?:_.*)?\.jpg$", re.IGNORECASE)
    name_rule = "PPPP_sSSS_vX_*.jpg (four digits of identity, three of scene, one of camera)"
    published = {"train": Counts(155, 1032, 8), "query": Counts(52, 591, 8), "gallery": Counts(155, 1055, 8)}
    junk = "scene"

    def __init__(self, root: str):
        super().__init__(root)

    @classmethod
    def _walk(cls, root: Path, folder: str, problems: list[Problem]) -> list[Record]:
        records = []
        for person in sorted(p.name for p in (root / folder).iterdir() if p.is_dir() and not p.name.startswith(".")):
            place = f"{folder}/{person}"
            found = cls._pair(root, [f"{place}/{spectrum}" for spectrum in ("vis", "ni", "th")], problems)
            for record in found:
                if person.isdigit() and int(person) != record.identity:
                    problems.append(Problem("stands in another identity's folder", record.files[0], f"identity {person}"))
            records += found
        return records


class TriSpectralImages:
    """A split as a dataset: `sample(index, rng)` gives the three images and who, where and which they are.

    Args:
        layout: the opened data set.
        split: its split to read.
        transform: `resize(image)`, done once an image where images are kept, and `transform(images, rng)`, done every time.
        relabel: number the split's identities from 0 in sorted order (for training). False keeps the numbers on disk.
        cache: keep resized images in memory as uint8, so that each file is read once.
    """

    def __init__(self, layout: Layout, split: Split, transform: Any, *, relabel: bool = False, cache: bool = False):
        self.layout, self.split, self.transform = layout, split, transform
        labels = {identity: label for label, identity in enumerate(split.identities)}
        self.pids = [labels[record.identity] if relabel else record.identity for record in split.records]
        self.cameras = [record.camera for record in split.records]
        self.scenes = [record.scene for record in split.records]
        self._kept: np.ndarray | None = None
        if cache:  # one block, filled as it is read, so that forked loader processes share what is there
            self._kept = np.empty((len(split.records), 3, *transform.size, 3), np.uint8)
            self._known = np.zeros(len(split.records), bool)

    def __len__(self) -> int:
        return len(self.split.records)

    def views(self, index: int) -> tuple[Pixels, ...]:
        """The three resized images, before anything random."""
        if self._kept is not None and self._known[index]:
            return tuple(self._kept[index])
        resized = tuple(self.transform.resize(image) for image in self.layout.read(self.split.records[index]))
        if self._kept is not None:
            for spectrum, image in enumerate(resized):
                self._kept[index, spectrum] = image
            self._known[index] = True
        return resized

    def warm(self, threads: int = 2) -> None:
        """Read all images into the cache now. Pillow decodes outside the interpreter lock, so threads help."""
        if self._kept is None:
            raise ValueError("nothing to warm: this data set keeps no images (cache=False)")
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self.views, range(len(self))):
                pass

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor | int | str]:
        """`rgb`, `nir`, `tir` (float, `3 h w`), `pid`, `camera`, `scene`, and `name` (the first file under the root)."""
        rgb, nir, tir = self.transform(self.views(index), rng)
        return {
            "rgb": rgb,
            "nir": nir,
            "tir": tir,
            "pid": self.pids[index],
            "camera": self.cameras[index],
            "scene": self.scenes[index],
            "name": self.split.records[index].files[0],
        }


# --- checks against what was published --------------------------------------------------------------------------------

_SHOWN = 20  # findings of one kind that are listed one by one


def _damage(path: Path, layout: type[Layout], decode: bool) -> str | None:
    """Why an image file is of no use, or None. JPEGs are decoded at an eighth of their size, all their data still read."""
    try:
        if path.stat().st_size == 0:
            return "empty (0 bytes)"
        if not decode:
            return None
        with Image.open(path) as image:
            odd = layout.misshapen(image.width, image.height)
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return f"unreadable ({str(error).replace(str(path), path.name)})"
    return odd


def _grouped(problems: Iterable[Problem]) -> list[data.Finding]:
    """Each problem as an error; of one kind at most `_SHOWN`, then their number."""
    findings, seen = [], Counter[str]()
    for problem in problems:
        seen[problem.kind] += 1
        if seen[problem.kind] <= _SHOWN:
            findings.append(data.Finding("error", problem.kind, problem.where, problem.expected))
    for kind, count in seen.items():
        if count > _SHOWN:
            findings.append(data.Finding("error", kind, f"{count - _SHOWN} more", "none"))
    return findings


def check(layout: type[Layout], root: str, *, decode: bool = True, threads: int = 2) -> list[data.Finding]:
    """Compare a folder with what was published of a data set, and look for damage.

    Args:
        layout: the data set's class.
        root: its folder.
        decode: also decode every image (minutes for the large sets); else only sizes are looked at.
        threads: images decoded at a time.
    """
    try:
        place = layout.locate(root)
    except LayoutError as error:
        return [data.Finding("error", "root", str(error), layout.wanted())]
    findings = []
    if (place / MANIFEST).is_file():
        findings.append(data.Finding("error", "origin", f"a generated sample ({MANIFEST} is at the root)", layout.title))
    survey = layout.survey(place)
    findings += _grouped(survey.problems)
    for name, split in survey.splits.items():
        expected, found = layout.published[name], split.counts
        for key in ("identities", "images", "cameras"):
            have, want = getattr(found, key), getattr(expected, key)
            findings.append(data.Finding("ok" if have == want else "error", f"{name} {key}", str(have), str(want)))
    train = set(survey.splits["train"].cameras)
    for name in dict.fromkeys(split.name for split in survey.splits.values() if split.name != "train"):
        unseen = sorted(set(survey.splits[name].cameras) - train)
        if unseen:
            text = f"cameras {unseen} (from 0) are not in the training set"
            findings.append(data.Finding("warning", f"{name} cameras", text, "cameras that training saw"))
    shared = set(survey.splits["train"].identities) & set(survey.splits["gallery"].identities)
    if shared:
        findings.append(data.Finding("error", "identities in train and gallery", _some(shared), "none"))
    lost = set(survey.splits["query"].identities) - set(survey.splits["gallery"].identities)
    if lost:
        findings.append(data.Finding("error", "query identities without gallery", _some(lost), "none"))
    files = sorted({file for split in survey.splits.values() for record in split.records for file in record.files})
    with ThreadPoolExecutor(threads) as pool:
        faults = pool.map(lambda file: _damage(place / file, layout, decode), files)
        damage = [Problem("damaged image", f"{file}: {fault}", "a readable image") for file, fault in zip(files, faults) if fault]
    findings += _grouped(damage)
    if not damage:
        findings.append(data.Finding("ok", "readable images" if decode else "non-empty images", str(len(files)), str(len(files))))
    return findings


def _some(numbers: Iterable[int]) -> str:
    listed = sorted(numbers)
    return ", ".join(map(str, listed[:10])) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


@register("dataset_checker", paper="RGBNT201 (Zheng et al., AAAI 2021)")
def rgbnt201(root: str, decode: bool = True) -> list[data.Finding]:
    """Compare the folder `root` with RGBNT201 as published. `decode=False` skips reading the images."""
    return check(RGBNT201, root, decode=decode)


@register("dataset_checker", paper="RGBNT100 (Li et al., AAAI 2020)")
def rgbnt100(root: str, decode: bool = True) -> list[data.Finding]:
    """Compare the folder `root` with RGBNT100 as published. `decode=False` skips reading the images."""
    return check(RGBNT100, root, decode=decode)


@register("dataset_checker", paper="MSVR310 (Zheng et al., Information Fusion 2023)")
def msvr310(root: str, decode: bool = True) -> list[data.Finding]:
    """Compare the folder `root` with MSVR310 as published. `decode=False` skips reading the images."""
    return check(MSVR310, root, decode=decode)
