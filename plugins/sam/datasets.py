"""NYUDepthv2 and SUN RGB-D on disk, in the layout of DFormer's release: read, checked, and told apart from a sample.

    <root>/RGB/<name>.jpg   Depth/<name>.png   Label/<name>.png (SUN RGB-D: labels/)   train.txt   test.txt

A line of a list is the path of an image relative to the root (a second column, the label, is tolerated); its depth and label have
the same name. Labels count from 1 and 0 is void; read, classes count from 0 and void is 255. A data set is opened whole: every
line is parsed and every partner looked for before the first image is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from core import data, images, samples
from core.registry import register
from plugins.sam.classes import NYU40, SUN37

SPLITS = ("train", "test")
IGNORE = 255


class LayoutError(ValueError):
    """A folder that is not the data set it should be; the message names the file or folder and says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One image with depth and labels: paths relative to the root."""

    image: str
    depth: str
    label: str

    @property
    def name(self) -> str:
        return Path(self.image).stem


@dataclasses.dataclass(frozen=True)
class View:
    """What is read of a record: colour uint8 (h, w, 3), depth float32 (h, w) in 0..1, labels uint8 (h, w) with 255 for void."""

    image: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    label: UInt8[np.ndarray, "h w"]


class RGBDScenes:
    """What both data sets share. Subclasses say where the labels stand and what they mean.

    Attributes:
        root: the folder.
        train, test: records of the splits, in the order of the lists.
        classes: names, in the order of the labels.
        sample: True if the folder says of itself that it was generated.
    """

    title: ClassVar[str]
    labels: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    published: ClassVar[Mapping[str, int]]

    def __init__(self, root: str, depth_encoding: Literal["gray8", "millimetres"], depth_range_m: float):
        if depth_encoding not in ("gray8", "millimetres"):
            raise ValueError(f"depth_encoding must be gray8 or millimetres, got {depth_encoding!r}")
        if depth_range_m <= 0:
            raise ValueError(f"depth_range_m must be positive, got {depth_range_m}")
        self.depth_encoding, self.depth_range_m = depth_encoding, depth_range_m
        self.root = Path(root).expanduser()
        splits, problems = self.survey(self.root)
        if problems:
            more = f" (and {len(problems) - 1} more; `repro data check {type(self).__name__.lower()} --root {root}` lists all)"
            raise LayoutError(f"{self.title} at {self.root}: {problems[0]}" + (more if len(problems) > 1 else ""))
        self.train, self.test = splits["train"], splits["test"]
        self.sample = samples.read_manifest(self.root) is not None

    @classmethod
    def survey(cls, root: Path) -> tuple[dict[str, tuple[Record, ...]], list[str]]:
        """Records of both lists, and everything that is wrong with them."""
        if not root.is_dir():
            return dict.fromkeys(SPLITS, ()), [f"no such folder; give the one that holds RGB/, Depth/, {cls.labels}/ and the lists"]
        problems: list[str] = []
        present: dict[str, set[str]] = {}
        for folder in ("RGB", "Depth", cls.labels):
            present[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
            if not present[folder]:
                problems.append(f"{folder}/ is missing or empty")
        splits: dict[str, tuple[Record, ...]] = {}
        for split in SPLITS:
            path, records = root / f"{split}.txt", []
            if not path.is_file():
                problems.append(f"the list {split}.txt is missing")
            else:
                try:
                    lines = path.read_text(encoding="utf-8").splitlines()
                except UnicodeDecodeError as error:
                    problems.append(f"the list {split}.txt is not UTF-8 text ({error.reason} at byte {error.start})")
                    splits[split] = ()
                    continue
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    file = line.split()[0]
                    name = Path(file).stem
                    if Path(file).parent.name not in ("RGB", ""):
                        problems.append(
                            f"{file} (line {number} of {split}.txt) does not lie in RGB/ itself, where images are looked for"
                        )
                    record = Record(f"RGB/{Path(file).name}", f"Depth/{name}.png", f"{cls.labels}/{name}.png")
                    gaps = [
                        f for f in (record.image, record.depth, record.label) if f.split("/")[1] not in present[f.split("/")[0]]
                    ]
                    problems += [f"{gap} is missing, the partner of {file} (line {number} of {split}.txt)" for gap in gaps]
                    records.append(record)
                if not records:
                    problems.append(f"the list {split}.txt is empty")
            splits[split] = tuple(records)
        return splits, problems

    def read(self, record: Record) -> View:
        """The three maps of a record.

        Raises:
            core.images.ImageError: naming the file, if one cannot be read, if sizes differ, or if a label is out of range.
        """
        image = images.read_image(self.root / record.image)
        depth = self._depth(record)
        label = images.read_image(self.root / record.label, "raw")
        if label.ndim != 2 or label.dtype.kind not in "ui":
            raise images.ImageError(
                f"{self.root / record.label}: a label map has one channel of integers, this one is {label.dtype} {label.shape}"
            )
        for what, array in ((record.depth, depth), (record.label, label)):
            if array.shape != image.shape[:2]:
                raise images.ImageError(
                    f"{self.root / what} is {array.shape[0]}x{array.shape[1]} and {record.image} {image.shape[0]}x{image.shape[1]}; "
                    "image, depth and labels must be aligned pixel by pixel"
                )
        highest = int(label.max()) if label.size else 0
        if highest > len(self.classes) or int(label.min()) < 0:
            raise images.ImageError(
                f"{self.root / record.label} holds label {highest}; {self.title} has {len(self.classes)} classes (0 is void, "
                f"1 to {len(self.classes)})"
            )
        return View(image, depth, label.astype(np.uint8) - np.uint8(1))  # void wraps to 255

    def _depth(self, record: Record) -> Float32[np.ndarray, "h w"]:
        if self.depth_encoding == "gray8":
            gray = images.read_image(self.root / record.depth, "L")
            with Image.open(self.root / record.depth) as image:  # the header only
                mode = image.mode
            if mode.startswith(("I", "F")):  # Pillow clips these to 255
                raw = images.read_image(self.root / record.depth, "raw")
                raise images.ImageError(
                    f"{self.root / record.depth}: depth_encoding 'gray8' wants the release's maps of 8 bits, this one holds {mode} "
                    f"values from {raw.min()} to {raw.max()}; if they are millimetres, set depth_encoding = 'millimetres'"
                )
            return gray.astype(np.float32) / np.float32(255)
        raw = images.read_image(self.root / record.depth, "raw")
        if raw.ndim != 2 or raw.dtype == np.uint8:
            raise images.ImageError(
                f"{self.root / record.depth}: depth_encoding 'millimetres' wants a 16-bit map, this one is {raw.dtype} {raw.shape}; "
                "the release's 8-bit maps are 'gray8'"
            )
        return np.clip(raw.astype(np.float32) / np.float32(1000 * self.depth_range_m), 0, 1)

    def fingerprint(self, *, contents: bool = False) -> str:
        """A short hash over all file names and sizes, and with `contents` over their bytes."""
        records = (*self.train, *self.test)
        files = {self.root / f for r in records for f in (r.image, r.depth, r.label)}
        return data.fingerprint(self.root, [*files, *(self.root / f"{s}.txt" for s in SPLITS)], contents=contents)

    def counts(self) -> dict[str, int]:
        """Images of each split and classes, for a run's data card."""
        return {"train_images": len(self.train), "test_images": len(self.test), "classes": len(self.classes)}


@register("dataset", paper="NYUDepthv2 (Silberman et al., ECCV 2012), 40 classes, layout of DFormer's release")
class NYUDepthv2(RGBDScenes):
    """795 training and 654 test images of rooms, 480 x 640, labels in `Label/`.

    Args:
        root: the folder `NYUDepthv2`.
        depth_encoding: `gray8`, the release's maps: stretched from near to far per image, so that metres are lost; or
            `millimetres`, 16-bit.
        depth_range_m: with `millimetres`, the distance that becomes 1.

    Raises:
        LayoutError: if it is missing, or a list or a partner is.
    """

    title, labels, classes = "NYUDepthv2", "Label", NYU40
    published = {"train": 795, "test": 654}

    def __init__(self, root: str, depth_encoding: Literal["gray8", "millimetres"] = "gray8", depth_range_m: float = 10.0):
        super().__init__(root, depth_encoding, depth_range_m)


@register("dataset", paper="SUN RGB-D (Song et al., CVPR 2015), 37 classes, layout of DFormer's release")
class SUNRGBD(RGBDScenes):
    """5285 training and 5050 test images of rooms, of sizes up to 531 x 730, labels in `labels/`.

    Args:
        root: the folder `SUNRGBD`.
        depth_encoding, depth_range_m: as for NYUDepthv2.

    Raises:
        LayoutError: if it is missing, or a list or a partner is.
    """

    title, labels, classes = "SUN RGB-D", "labels", SUN37
    published = {"train": 5285, "test": 5050}

    def __init__(self, root: str, depth_encoding: Literal["gray8", "millimetres"] = "gray8", depth_range_m: float = 10.0):
        super().__init__(root, depth_encoding, depth_range_m)


# --- checking ---------------------------------------------------------------------------------------------------------


def check(
    layout: type[RGBDScenes], root: str, *, decode: bool = True, depth_encoding: Literal["gray8", "millimetres"] = "gray8"
) -> list[data.Finding]:
    """Compare a folder with the data set as published; `decode` reads every image too."""
    folder = Path(root).expanduser()
    splits, problems = layout.survey(folder)
    findings = [data.Finding("error", "layout", problem, "") for problem in problems[:50]]
    if len(problems) > 50:
        findings.append(data.Finding("error", "layout", f"{len(problems) - 50} more like these", ""))
    sample = folder.is_dir() and samples.read_manifest(folder) is not None
    if sample:
        findings.append(data.Finding("warning", "origin", "a generated sample", f"{layout.title} itself"))
    for split, records in splits.items():
        level: Literal["ok", "warning"] = "ok" if len(records) == layout.published[split] else "warning"
        findings.append(data.Finding(level, f"{split} images", str(len(records)), str(layout.published[split])))
        twice = sorted(image for image, times in Counter(r.image for r in records).items() if times > 1)
        if twice:
            more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
            findings.append(data.Finding("error", f"images twice in {split}.txt", ", ".join(twice[:5]) + more, "none"))
    doubled = {r.image for r in splits["train"]} & {r.image for r in splits["test"]}
    if doubled:
        findings.append(data.Finding("error", "images in both lists", ", ".join(sorted(doubled)[:5]), "none"))
    if problems or not decode:
        return findings
    opened = layout(root, depth_encoding, 10.0)
    seen = np.zeros(256, np.int64)
    bad = 0
    for record in (*opened.train, *opened.test):
        try:
            seen += np.bincount(opened.read(record).label.ravel(), minlength=256)
        except images.ImageError as error:
            bad += 1
            if bad <= 20:
                findings.append(data.Finding("error", "image", str(error), "readable, aligned, labels in range"))
    found = int((seen[: len(layout.classes)] > 0).sum())
    level = "ok" if found == len(layout.classes) else "warning"
    findings.append(data.Finding(level, "classes that occur", str(found), str(len(layout.classes))))
    void = float(seen[IGNORE] / max(1, seen.sum()))
    findings.append(
        data.Finding("ok" if not bad else "error", "readable records", str(len(opened.train) + len(opened.test) - bad), "")
    )
    findings.append(data.Finding("ok", "void pixels", f"{void:.1%}", ""))
    return findings


@register("dataset_checker", paper="NYUDepthv2, layout of DFormer's release")
def nyudepthv2(root: str, decode: bool = True, depth_encoding: Literal["gray8", "millimetres"] = "gray8") -> list[data.Finding]:
    """Compare the folder `root` with NYUDepthv2 as published. `decode=False` skips reading the images.

    `depth_encoding` says how its depth is stored, as for the data set.
    """
    return check(NYUDepthv2, root, decode=decode, depth_encoding=depth_encoding)


@register("dataset_checker", paper="SUN RGB-D, layout of DFormer's release")
def sunrgbd(root: str, decode: bool = True, depth_encoding: Literal["gray8", "millimetres"] = "gray8") -> list[data.Finding]:
    """Compare the folder `root` with SUN RGB-D as published. `decode=False` skips reading the images.

    `depth_encoding` says how its depth is stored, as for the data set.
    """
    return check(SUNRGBD, root, decode=decode, depth_encoding=depth_encoding)
