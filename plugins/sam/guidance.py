"""Which text goes with which image: class names, tags of each image, captions, both, or a control that says nothing.

A *guidance* gives every image a fixed number of text tokens, zero-padded: (t, c) float32. Its vectors come from a text
encoder (core.text). Tags and captions are read in the release's JSON forms and cached in its form, below the data set.

Tags computed from label maps (the release ships such a file) tell the model the answer: they are refused, by name and by
looking, unless `GroundTruthTags` is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from core.checkpoint import CheckpointError, write_atomic
from core.options import require_choice
from core.registry import register
from core.text import CLIP_PROMPTS, TextEncoder, WordLlamaText, prompted
from plugins.sam.datasets import Record, RGBDScenes
from plugins.sam.rgbd_sample import ORACLE

_UPSTREAM_ALIASES = {
    "refridgerator": "refrigerator", "night stand": "nightstand", "floor mat": "rug", "television": "tv", "books": "book",
    "clothes": "clothing", "bathtub": "bath tub", "bookshelf": "bookcase", "shelves": "shelf",
}  # fmt: skip
_FIXED_ALIASES = {**_UPSTREAM_ALIASES, "fridge": "refrigerator"}
LabelAlias = Literal["fixed", "upstream", "none"]
LOOKED_AT, TOO_GOOD = 48, 0.9  # images of a split compared with their labels, and the share that makes a file an oracle


def normalise(label: str, rule: LabelAlias = "fixed") -> str:
    """A label as it goes into a prompt: lower case, single spaces, spelled one way.

    `upstream` leaves SUN RGB-D's underscores and its `fridge`, so that the encoder reads "a floor_mat"; `fixed` gives both
    data sets the same words. `none` changes nothing: for a table of vectors by the data set's own names.
    """
    if rule == "none":
        return label
    text = label.replace("_", " ") if rule == "fixed" else label
    text = " ".join(text.lower().split())
    return (_FIXED_ALIASES if rule == "fixed" else _UPSTREAM_ALIASES).get(text, text)


class Guidance:
    """What every source of text offers. Subclasses set `count` and `dim`, and give `tokens` after `open`."""

    count: int
    dim: int

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        """Read what is needed for a data set; returns counts for the data card."""
        raise NotImplementedError

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        """Text tokens of an image, zero rows as padding."""
        raise NotImplementedError

    def words(self, record: Record) -> list[str]:
        """What the tokens say, for pictures, in their order; shorter, or "", where a token is padding or cannot be said."""
        return []


class _Named(Guidance):
    """Guidance whose tokens stand for names: holds the encoder and how names become vectors."""

    def __init__(
        self,
        encoder: Callable[..., TextEncoder],
        prompts: str,
        label_alias: Literal["fixed", "upstream", "none"],
        renorm_text: bool,
    ):
        if prompts not in ("clip", "none"):
            raise ValueError(f"prompts must be clip (three prompts) or none (the bare label), got {prompts!r}")
        require_choice("label_alias", label_alias, LabelAlias)
        self.encoder = encoder()
        self.dim = self.encoder.dim
        self.prompts, self.label_alias, self.renorm_text = prompts, label_alias, renorm_text

    def vectors(self, names: Sequence[str]) -> Float[Tensor, "n c"]:
        prompts = CLIP_PROMPTS if self.prompts == "clip" else ()
        return prompted(self.encoder, names, prompts, renormalise=self.renorm_text)

    def key(self, *more: Any) -> str:
        parts = [self.encoder.fingerprint, self.prompts, self.label_alias, self.renorm_text, *more]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _padded(vectors: Tensor, count: int) -> Tensor:
    out = torch.zeros(count, vectors.shape[1])
    out[: len(vectors)] = vectors[:count]
    return out


def _json(path: Path, what: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{what} file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} file {path} is not UTF-8: {error}; save it as UTF-8") from error
    if not text:
        raise ValueError(f"{what} file {path} is empty")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} file {path} is not JSON: {error}") from error


class _Stored:
    """The release's cache: `<root>/.text_cache/<key>/<source>/embeds.pt` with pad_len, feats and names."""

    def __init__(self, root: Path, key: str, source: str):
        self.path = root / ".text_cache" / key / source / "embeds.pt"

    def load(self, count: int, dim: int) -> dict[str, Tensor] | None:
        if not self.path.is_file():
            return None
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True)
            feats = {str(k): v.float() for k, v in held["feats"].items()}
            fits = held["pad_len"] == count and all(v.shape == (count, dim) for v in feats.values())
        except Exception:  # damaged, or of another form: it is made again
            return None
        return feats if fits else None

    def save(self, feats: Mapping[str, Tensor], names: Mapping[str, list[str]], count: int) -> None:
        buffer = io.BytesIO()
        torch.save({"pad_len": count, "feats": dict(feats), "names": dict(names)}, buffer)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, buffer.getvalue())
        except (OSError, CheckpointError):  # a data set that cannot be written to goes without a cache
            return


class _Matcher:
    """Finds the entry of an image among keys such as `RGB/12.jpg`.

    `exact` takes the path, then the file name, then the stem; a name or stem that several keys have is no key's. `upstream` takes
    the first of these, and falls back on any number in the file name: it can so give an image the entry of another (SUN RGB-D's
    train_7 and test_7).

    Raises:
        ValueError: from `find`, with `exact`, if several entries would fit an image.
    """

    def __init__(self, keys: Sequence[str], rule: Literal["exact", "upstream"], what: str):
        self.keys: dict[str, list[str]] = {}
        self.rule, self.what = rule, what
        for form in (lambda k: k, lambda k: Path(k).name, lambda k: Path(k).stem):
            for key in keys:
                fitting = self.keys.setdefault(form(key), [])
                if key not in fitting and form(key) not in fitting:  # a whole path before the name of another
                    fitting.append(key)
        self.numbers: dict[str, str] = {}
        if rule == "upstream":
            for key in keys:
                for number in re.findall(r"\d+", Path(key).stem):
                    self.numbers.setdefault(str(int(number)), key)

    def find(self, image: str) -> str | None:
        for form in (image, Path(image).name, Path(image).stem):
            if fitting := self.keys.get(form):
                if len(fitting) > 1 and self.rule == "exact":
                    raise ValueError(
                        f"{self.what}: {', '.join(fitting[:3])} all fit the image {image}; name it by its path, {image}, and once"
                    )
                return fitting[0]
        return next((self.numbers[n] for x in re.findall(r"\d+", Path(image).stem) if (n := str(int(x))) in self.numbers), None)


# --- tags from labels -------------------------------------------------------------------------------------------------


def _class_words(classes: Sequence[str]) -> dict[str, int]:
    """Spellings of the classes, lower case: as the data set has them, and as any alias does."""
    known = {normalise(name): k for k, name in enumerate(classes)}
    known.update({name.replace("_", " ").lower(): k for k, name in enumerate(classes)})
    known.update({alias: known[word] for alias, word in _FIXED_ALIASES.items() if word in known and alias not in known})
    return known


def _named_in(sentences: Sequence[str], known: Mapping[str, int]) -> set[int]:
    """Classes that a text names, in the singular or plural; of two that overlap, the longer one."""
    words = "|".join(re.escape(w) for w in sorted(known, key=len, reverse=True))
    text = " . ".join(" ".join(s.replace("_", " ").lower().split()) for s in sentences)
    return {known[found] for found in re.findall(rf"\b({words})(?:s|es)?\b", text)}


def _refuse_oracle(path: Path, scenes: RGBDScenes, told: Mapping[str, set[int]]) -> None:
    """Compare the classes that are told of an image with the largest of its label map, on some images of each split: one split is
    enough to cheat.

    Only classes that are named for some image of the split are ranked, so that leaving some out everywhere hides nothing.
    """
    for split, records in (("train", scenes.train), ("test", scenes.test)):
        vocabulary = set().union(*(told[r.image] for r in records))
        agree, looked = 0, 0
        for record in records[:: max(1, len(records) // LOOKED_AT)][:LOOKED_AT]:
            named, left_out = told[record.image], vocabulary - told[record.image]
            if len(named) < 2 or not left_out:
                continue
            counts = np.bincount(scenes.read(record).label.ravel(), minlength=256)
            smallest = min(int(counts[k]) for k in named)
            looked += 1
            agree += smallest > 0 and smallest >= max(int(counts[k]) for k in left_out)
        if looked >= 8 and agree / looked >= TOO_GOOD:
            raise ValueError(
                _refusal(path, f"on {agree} of {looked} {split} images it names exactly the largest classes of the label map")
            )


# --- sources ----------------------------------------------------------------------------------------------------------


@register("guidance", paper="DFormerv2 with text fusion (released code), source imglabels")
class ImageTags(_Named):
    """Tags of each image, from JSON: {"RGB/<name>.jpg": ["bed", {"label": "lamp"}, …]}.

    Args:
        path: the file; None takes `tags.json` in the data set's folder.
        encoder: constructor of the text encoder.
        max_tags: tokens of an image; repeated tags count once, the first ones stay.
        prompts: `clip` averages three prompts, `none` takes the bare label.
        label_alias: see `normalise`.
        renorm_text: give averaged prompts unit length again (the release does not).
        match: how an image finds its entry, `exact` or `upstream` (any number in its name).
        cache: keep the vectors in the release's cache below the data set.

    Raises:
        ValueError: if the file is missing, empty, of another form, names none of the images, or was computed from labels.
    """

    def __init__(
        self,
        path: str | None = None,
        encoder: Callable[..., TextEncoder] = WordLlamaText,
        max_tags: int = 6,
        prompts: Literal["clip", "none"] = "clip",
        label_alias: Literal["fixed", "upstream", "none"] = "fixed",
        renorm_text: bool = False,
        match: Literal["exact", "upstream"] = "exact",
        cache: bool = True,
    ):
        super().__init__(encoder, prompts, label_alias, renorm_text)
        if max_tags < 1:
            raise ValueError(f"max_tags must be at least 1, got {max_tags}")
        if match not in ("exact", "upstream"):
            raise ValueError(f"match must be exact or upstream, got {match!r}")
        self.path, self.count, self.match, self.cache = path, max_tags, match, cache

    def read(self, path: Path) -> dict[str, list[str]]:
        """Normalised tags by key, in order, each once."""
        loaded = _json(path, "tag")
        if not isinstance(loaded, dict):
            raise ValueError(f"tag file {path} must be a JSON object from image to tags, this is a {type(loaded).__name__}")
        table: dict[str, list[str]] = {}
        for key, entries in loaded.items():
            labels = []
            for entry in entries if isinstance(entries, list) else [entries]:
                if isinstance(entry, dict):
                    entry = next((entry[k] for k in ("label", "name", "text") if k in entry), None)
                if not isinstance(entry, str):
                    raise ValueError(
                        f"tag file {path}: {key} holds {entry!r}; a tag is a string or an object with label, name or text"
                    )
                if entry.strip():
                    labels.append(normalise(entry, self.label_alias))
            table[key] = list(dict.fromkeys(labels))
        if not any(table.values()):
            raise ValueError(f"tag file {path} holds no tags ({len(table)} images)")
        return table

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        path = Path(self.path) if self.path is not None else scenes.root / "tags.json"
        if path.name == ORACLE:
            raise ValueError(_refusal(path, "its name says so"))
        table = self.read(path)
        matcher = _Matcher(list(table), self.match, f"tag file {path}")
        records = (*scenes.train, *scenes.test)
        found = {r.image: matcher.find(r.image) for r in records}
        without = sum(k is None for k in found.values())
        if without == len(records):
            raise ValueError(
                f"tag file {path} names none of the {len(records)} images; its keys look like {next(iter(table))!r}, images like {records[0].image!r}"
            )
        self.names = {image: table[key] if key is not None else [] for image, key in found.items()}
        known = _class_words(scenes.classes)
        for count in (None, self.count):  # all tags of an image, and those that become tokens
            told = {i: {known[w] for n in names[:count] if (w := normalise(n)) in known} for i, names in self.names.items()}
            _refuse_oracle(path, scenes, told)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        stored = _Stored(scenes.root, self.key(scenes.title, self.count, self.match, digest), "imglabels")
        feats = stored.load(self.count, self.dim) if self.cache else None
        if feats is None or not set(self.names) <= set(feats):
            vocabulary = sorted({name for names in self.names.values() for name in names[: self.count]})
            vectors = dict(zip(vocabulary, self.vectors(vocabulary)))
            feats = {
                i: _padded(torch.stack([vectors[n] for n in v[: self.count]]) if v else torch.zeros(0, self.dim), self.count)
                for i, v in self.names.items()
            }
            if self.cache:
                stored.save(feats, self.names, self.count)
        self.feats = feats
        return {"images_without_tags": sum(not n for n in self.names.values())}

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        return self.feats[record.image]

    def words(self, record: Record) -> list[str]:
        return self.names[record.image][: self.count]


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path} was computed from the label maps: {why}. Such tags tell the model the answer; "
        "if that is what you want, ask for it by name: sam.GroundTruthTags"
    )


@register("guidance", paper="DFormerv2 with text fusion (released code), its ground-truth tag file")
class GroundTruthTags(_Named):
    """The largest classes of the label map, of training *and* test images: an upper bound, never a result.

    Args:
        max_tags: tokens of an image.
        encoder, prompts, label_alias, renorm_text: as in ImageTags.
    """

    def __init__(
        self,
        max_tags: int = 5,
        encoder: Callable[..., TextEncoder] = WordLlamaText,
        prompts: Literal["clip", "none"] = "clip",
        label_alias: Literal["fixed", "upstream", "none"] = "fixed",
        renorm_text: bool = False,
    ):
        super().__init__(encoder, prompts, label_alias, renorm_text)
        if max_tags < 1:
            raise ValueError(f"max_tags must be at least 1, got {max_tags}")
        self.count = max_tags

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        names = [normalise(name, self.label_alias) for name in scenes.classes]
        vectors = self.vectors(names)
        self.feats, self.names = {}, {}
        for record in (*scenes.train, *scenes.test):
            counts = np.bincount(scenes.read(record).label.ravel(), minlength=256)[: min(37, len(names))]
            order = [k for k in np.argsort(-counts, kind="stable")[: self.count].tolist() if counts[k]]
            self.feats[record.image], self.names[record.image] = _padded(vectors[order], self.count), [names[k] for k in order]
        return {"images_with_tags_from_labels": len(self.feats)}

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        return self.feats[record.image]

    def words(self, record: Record) -> list[str]:
        return self.names[record.image]


@register("guidance", paper="DFormerv2 with text fusion (released code), source labels")
class ClassNames(_Named):
    """All class names of the data set, the same for every image.

    Args:
        encoder, prompts, label_alias, renorm_text: as in ImageTags.
    """

    def __init__(
        self,
        encoder: Callable[..., TextEncoder] = WordLlamaText,
        prompts: Literal["clip", "none"] = "clip",
        label_alias: Literal["fixed", "upstream", "none"] = "fixed",
        renorm_text: bool = False,
    ):
        super().__init__(encoder, prompts, label_alias, renorm_text)
        self.count = 0  # known once the data set is open

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        self.names = [normalise(name, self.label_alias) for name in scenes.classes]
        self.feats = self.vectors(self.names)
        self.count = len(self.names)
        return {}

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        return self.feats

    def words(self, record: Record) -> list[str]:
        return self.names


@register("guidance", paper="DFormerv2 with text fusion (released code), source captions")
class Captions(_Named):
    """Sentences of a description of each image, from JSON: [{"rgb_path": "RGB/<name>.jpg", "description": "…"}, …].

    Args:
        path: the file; None takes `captions.json` in the data set's folder.
        max_sentences: tokens of an image.
        encoder, renorm_text: as in ImageTags (sentences stand for themselves, without prompts).
        match: as in ImageTags.

    Raises:
        ValueError: if the file is missing, empty, of another form, describes an image twice or none at all, or names just the
            largest classes of the label maps.
    """

    def __init__(
        self,
        path: str | None = None,
        max_sentences: int = 10,
        encoder: Callable[..., TextEncoder] = WordLlamaText,
        renorm_text: bool = False,
        match: Literal["exact", "upstream"] = "exact",
    ):
        super().__init__(encoder, "none", "fixed", renorm_text)
        if max_sentences < 1:
            raise ValueError(f"max_sentences must be at least 1, got {max_sentences}")
        self.path, self.count, self.match = path, max_sentences, match

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        path = Path(self.path) if self.path is not None else scenes.root / "captions.json"
        loaded = _json(path, "caption")
        if not isinstance(loaded, list) or not all(isinstance(e, dict) and {"rgb_path", "description"} <= set(e) for e in loaded):
            raise ValueError(f"caption file {path} must be a JSON list of objects with rgb_path and description")
        table: dict[str, list[str]] = {}
        for number, entry in enumerate(loaded, 1):
            image, description = entry["rgb_path"], entry["description"]
            if not isinstance(image, str) or not isinstance(description, str):
                raise ValueError(f"caption file {path}: entry {number} holds {entry!r}; rgb_path and description are texts")
            if image in table:
                raise ValueError(f"caption file {path} describes {image} twice (again in entry {number}); keep one description")
            table[image] = [s.strip() for s in re.split(r"[.!?;。！？；]+", description) if s.strip()]
        if not any(table.values()):
            raise ValueError(f"caption file {path} holds no sentence ({len(table)} images)")
        matcher = _Matcher(list(table), self.match, f"caption file {path}")  # type: ignore[arg-type]
        records = (*scenes.train, *scenes.test)
        found = {r.image: matcher.find(r.image) for r in records}
        if all(k is None for k in found.values()):
            raise ValueError(f"caption file {path} describes none of the {len(records)} images")
        self.sentences = {image: table[key][: self.count] if key is not None else [] for image, key in found.items()}
        known = _class_words(scenes.classes)
        _refuse_oracle(path, scenes, {image: _named_in(sentences, known) for image, sentences in self.sentences.items()})
        self.feats = {image: _padded(self.vectors(s), self.count) for image, s in self.sentences.items()}
        return {"images_without_caption": sum(not s for s in self.sentences.values())}

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        return self.feats[record.image]

    def words(self, record: Record) -> list[str]:
        return self.sentences[record.image]


@register("guidance", paper="DFormerv2 with text fusion (released code), source both")
class BothTexts(Guidance):
    """Two sources, one after the other; both must be of one width.

    Args:
        first, second: constructors of guidances; as in the release, the class names and then the sentences.
    """

    def __init__(self, first: Callable[..., Guidance] = ClassNames, second: Callable[..., Guidance] = Captions):
        self.parts = (first(), second())
        widths = [part.dim for part in self.parts]
        if widths[0] != widths[1]:
            raise ValueError(f"both sources must give tokens of one width, got {widths[0]} and {widths[1]}; give them one encoder")
        self.dim, self.count = widths[0], 0

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        found: dict[str, int] = {}
        for part in self.parts:
            found.update(part.open(scenes))
        self.count = sum(part.count for part in self.parts)
        return found

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        return torch.cat([part.tokens(record) for part in self.parts])

    def words(self, record: Record) -> list[str]:
        told = [part.words(record) for part in self.parts]
        return [word for part, words in zip(self.parts, told) for word in [*words, *[""] * (part.count - len(words))]]


@register("guidance", paper="control; not in the release")
class ConstantTokens(Guidance):
    """The same random tokens for every image: all the parameters and compute of text guidance, and no information.

    Args:
        max_tags: tokens of an image.
        dim: their width.
        seed: names them.
    """

    def __init__(self, max_tags: int = 6, dim: int = 256, seed: int = 0):
        if max_tags < 1 or dim < 1:
            raise ValueError(f"max_tags and dim must be at least 1, got {max_tags} and {dim}")
        self.count, self.dim = max_tags, dim
        drawn = torch.randn(max_tags, dim, generator=torch.Generator().manual_seed(seed))
        self.feats = drawn / drawn.norm(dim=-1, keepdim=True)

    def open(self, scenes: RGBDScenes) -> dict[str, int]:
        return {}

    def tokens(self, record: Record) -> Float[Tensor, "t c"]:
        return self.feats
