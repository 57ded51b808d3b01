"""Images with prompts: the layout on disk, its reader and its check.

    root/images/<split>/<name>      the pictures
    root/<split>.json               what is asked of them, in the manner of COCO
        images       {id, file_name (under root), height, width}
        prompts      {id, image_id, text, kind}      kind: "present", "absent", or "hard" (absent, but nearly there)
        annotations  {id, image_id, prompt_id, bbox [x, y, width, height] in pixels, area, iscrowd 0}

Each prompt belongs to one image; its annotations are all the things in that image which the text means. A thing that two
prompts mean stands under both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from core import data, images
from core.data import Finding, Sample
from core.registry import register

Kind = Literal["present", "absent", "hard"]
KINDS: tuple[Kind, ...] = ("present", "absent", "hard")
SLACK = 0.5  # pixels by which a box may leave its image


class SceneError(ValueError):
    """A folder that does not follow the layout; the message names the file and the entry and says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text asked of an image.

    Attributes:
        boxes: what it means there, (x0, y0, x1, y1) in pixels; none unless `kind` is "present".
    """

    text: str
    kind: Kind
    boxes: Float32[np.ndarray, "m 4"]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and what is asked of it."""

    file: str
    height: int
    width: int
    prompts: tuple[Prompt, ...]


def write(root: Path, split: str, scenes: Sequence[Scene]) -> dict[str, int]:
    """Write `<split>.json` (the pictures are the caller's to write); returns the counts."""
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "prompts": [], "annotations": []}
    for number, scene in enumerate(scenes):
        listed["images"].append({"id": number, "file_name": scene.file, "height": scene.height, "width": scene.width})
        for prompt in scene.prompts:
            prompt_id = len(listed["prompts"])
            listed["prompts"].append({"id": prompt_id, "image_id": number, "text": prompt.text, "kind": prompt.kind})
            for x0, y0, x1, y1 in prompt.boxes.tolist():
                listed["annotations"].append({
                    "id": len(listed["annotations"]), "image_id": number, "prompt_id": prompt_id,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
                })  # fmt: skip
    (root / f"{split}.json").write_text(json.dumps(listed, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return {f"{split} {name}": len(entries) for name, entries in listed.items()}


def read(root: Path, split: str) -> list[Scene]:
    """The scenes of a split, checked.

    Raises:
        SceneError: at the first thing that is not as the layout has it.
    """
    path = root / f"{split}.json"
    if not path.is_file():
        there = sorted(p.stem for p in root.glob("*.json") if p.stem != "manifest") if root.is_dir() else []
        raise SceneError(f"{path} does not exist; {root} has {', '.join(there) or 'no split'}")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        entries = {name: list(listed[name]) for name in ("images", "prompts", "annotations")}
    except (ValueError, KeyError, TypeError) as error:
        raise SceneError(f"{path} is not a split: want a JSON object with images, prompts and annotations ({error!r})") from error
    pictures = _by_id(path, "images", entries["images"])
    prompts = _by_id(path, "prompts", entries["prompts"])
    boxes: dict[int, list[list[float]]] = {number: [] for number in prompts}
    for a in entries["annotations"]:
        where = f"{path}: annotation {a.get('id')}"
        prompt = prompts.get(a.get("prompt_id"))
        if prompt is None or a.get("image_id") != prompt.get("image_id"):
            raise SceneError(
                f"{where} names prompt {a.get('prompt_id')} and image {a.get('image_id')}, which do not belong together"
            )
        boxes[a["prompt_id"]].append(_corners(where, a.get("bbox"), pictures[a["image_id"]]))
    asked: dict[int, list[Prompt]] = {number: [] for number in pictures}
    for number, p in prompts.items():
        where = f"{path}: prompt {number}"
        if p.get("image_id") not in pictures:
            raise SceneError(f"{where} names image {p.get('image_id')}, which is not listed")
        if p.get("kind") not in KINDS or (p["kind"] == "present") != bool(boxes[number]):
            raise SceneError(
                f"{where} is {p.get('kind')!r} and has {len(boxes[number])} boxes; want 'present' with boxes, or 'absent' or 'hard' without"
            )
        if not isinstance(p.get("text"), str) or not p["text"].strip():
            raise SceneError(f"{where} has no text")
        asked[p["image_id"]].append(Prompt(p["text"], p["kind"], np.array(boxes[number], np.float32).reshape(-1, 4)))
    return [Scene(str(i["file_name"]), int(i["height"]), int(i["width"]), tuple(asked[n])) for n, i in pictures.items()]


def _by_id(path: Path, what: str, entries: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found = {e.get("id"): e for e in entries}
    if None in found or len(found) < len(entries):
        raise SceneError(f"{path}: {what} need one id each, all different")
    return found  # type: ignore[return-value]


def _corners(where: str, bbox: Any, picture: dict[str, Any]) -> list[float]:
    try:
        x, y, w, h = (float(v) for v in bbox)
        height, width = int(picture["height"]), int(picture["width"])
    except (TypeError, ValueError, KeyError) as error:
        raise SceneError(f"{where}: bbox must be [x, y, width, height] in an image of known size, got {bbox}") from error
    inside = x >= -SLACK and y >= -SLACK and x + w <= width + SLACK and y + h <= height + SLACK
    if not (w > 0 and h > 0 and inside):  # also false for NaN
        raise SceneError(f"{where}: bbox {bbox} is empty or leaves its image of {width}×{height}")
    return [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]


class PromptedScenes:
    """Scenes of one split as samples: a picture squashed to a square, and some of its prompts.

    Args:
        root: folder in the layout above.
        split: name of the split.
        size: side of the square in pixels; aspect is not kept.
        per_image: prompts a sample, drawn anew each time; half of them absent where there are enough. None gives all, in order.
        flip: mirror left to right with probability one half. Leave it off where texts say left or right.
        cache: keep the resized pictures in memory.
        mean, std: of the normalisation, alike for the three channels; 0.5 and 0.5 as in the release.

    Raises:
        SceneError: if the folder does not follow the layout, or an image has no prompts.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        size: int,
        per_image: int | None = None,
        flip: bool = False,
        cache: bool = True,
        mean: float = 0.5,
        std: float = 0.5,
    ):
        if per_image is not None and per_image < 1:
            raise ValueError(f"per_image must be at least 1 or None, got {per_image}")
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.root, self.split, self.size, self.per_image, self.flip = root, split, size, per_image, flip
        self.mean, self.std = mean, std
        self.scenes = read(root, split)
        without = [s.file for s in self.scenes if not s.prompts]
        if without or not self.scenes:
            raise SceneError(f"{root / split}.json: {without[0] if without else 'it'} has no {'prompts' if without else 'images'}")
        self._cache: dict[int, Any] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.scenes)

    def part(self, first: int, last: int) -> PromptedScenes:
        """The same of images `first` up to `last` alone."""
        other = copy.copy(self)
        other.scenes = self.scenes[first:last]
        other._cache = None if self._cache is None else {}
        return other

    def pixels(self, index: int) -> Any:
        """The squashed picture, uint8 (h, w, 3)."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        array = images.resize(images.read_image(self.root / self.scenes[index].file), (self.size, self.size))
        if self._cache is not None:
            self._cache[index] = array
        return array

    def chosen(self, index: int, rng: np.random.Generator) -> list[Prompt]:
        """Prompts of one sample."""
        prompts = self.scenes[index].prompts
        if self.per_image is None:
            return list(prompts)
        groups: list[list[Prompt]] = [[p for p in prompts if p.kind == "present"], [p for p in prompts if p.kind != "present"]]
        wanted = min(self.per_image, len(prompts))
        present = min(len(groups[0]), max(wanted - wanted // 2, wanted - len(groups[1])))
        counts = (present, wanted - present)
        return [g[i] for g, n in zip(groups, counts) for i in rng.permutation(len(g))[:n]]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """image (3, size, size), texts, and per text its boxes (cx, cy, w, h) in parts of the image."""
        scene, pixels, prompts = self.scenes[index], self.pixels(index), self.chosen(index, rng)
        scale = np.array([scene.width, scene.height] * 2, np.float32)
        boxes = [p.boxes / scale for p in prompts]
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
            boxes = [np.stack((1 - b[:, 2], b[:, 1], 1 - b[:, 0], b[:, 3]), axis=1) for b in boxes]
        image = images.normalize(images.to_float(pixels), [self.mean] * 3, [self.std] * 3)
        return {
            "image": torch.from_numpy(image),
            "texts": [p.text for p in prompts],
            "boxes": [torch.from_numpy(np.concatenate(((b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]), axis=1)) for b in boxes],
        }

    def fingerprint(self) -> str:
        """Hash over the names and sizes of all files of the split."""
        return data.fingerprint(self.root, [self.root / f"{self.split}.json", *(self.root / s.file for s in self.scenes)])

    def counts(self) -> dict[str, int]:
        kinds = Counter(p.kind for s in self.scenes for p in s.prompts)
        return {f"{self.split} images": len(self), **{f"{self.split} {k} prompts": kinds[k] for k in KINDS}}


def collate(samples: Sequence[Sample], tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Samples to a batch of pairs: image (b, 3, s, s), image_of (p), tokens (p, l, c), pad (p, l), boxes (p, m, 4), valid (p, m).

    Args:
        tokens: vectors of texts and True where one is real (`TextEncoder.tokens`).
    """
    texts = [t for s in samples for t in s["texts"]]
    boxes = [b for s in samples for b in s["boxes"]]
    longest = max([1, *(len(b) for b in boxes)])
    padded, valid = torch.zeros(len(boxes), longest, 4), torch.zeros(len(boxes), longest, dtype=torch.bool)
    for row, (keep, b) in enumerate(zip(valid, boxes)):
        padded[row, : len(b)], keep[: len(b)] = b, True
    vectors, real = tokens(texts)
    image_of: Int[Tensor, " p"] = torch.tensor([i for i, s in enumerate(samples) for _ in s["texts"]])
    return {
        "image": torch.stack([s["image"] for s in samples]), "image_of": image_of, "texts": texts,
        "tokens": vectors, "pad": ~real, "boxes": padded, "valid": valid,
    }  # fmt: skip


@register("dataset_checker", paper="prompted scenes in a COCO-like layout")
def prompted_scenes(root: str) -> list[Finding]:
    """Check the folder `root` of prompted scenes: every split, every box, every picture."""
    folder = Path(root)
    splits = sorted(p.stem for p in folder.glob("*.json") if p.stem != "manifest") if folder.is_dir() else []
    if not splits:
        return [Finding("error", "splits", "none", "<split>.json files in the folder")]
    findings = []
    for split in splits:
        try:
            scenes = read(folder, split)
        except SceneError as error:
            findings.append(Finding("error", split, str(error)))
            continue
        kinds = Counter(p.kind for s in scenes for p in s.prompts)
        absent = kinds["absent"] + kinds["hard"]
        shown = f"{len(scenes)} images, {kinds['present']} present and {absent} absent prompts ({kinds['hard']} hard)"
        findings.append(Finding("ok" if absent else "warning", split, shown, "" if absent else "absent prompts, for presence"))
        for scene in scenes:
            try:
                shape = images.read_image(folder / scene.file).shape[:2]
            except images.ImageError as error:
                findings.append(Finding("error", scene.file, str(error)))
                continue
            if shape != (scene.height, scene.width):
                findings.append(Finding("error", scene.file, f"{shape[0]}×{shape[1]}", f"{scene.height}×{scene.width}"))
    return findings
