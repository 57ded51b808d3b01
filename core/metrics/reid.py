"""Re-identification: mean average precision and cumulative matching characteristic (CMC), by the data set's protocol.

Protocol. The gallery is ordered by distance to a query, nearest first. Gallery images that show the query's identity
under the query's own camera (Market-1501, RGBNT201, RGBNT100) or in the query's own scene (MSVR310) are *junk*: they
are taken out of the list and count neither as hit nor as miss. Average precision is the mean, over a query's matches,
of the precision at each; CMC at rank k is the share of queries whose first match stands at rank k or before. A query
all of whose matches are junk, or who has none, is skipped and counted. Numbers of two protocols must not be compared,
so the protocol is part of each metric's name: `mAP[camera]`, `rank-1[scene]`.

Ties. Gallery images at equal distance stand in gallery order (what a stable sort gives), so the result of given distances
(`evaluate_distances`) depends on them alone and is the same on every machine, for any chunk size. Distances that are computed
here from features (`evaluate_features`) are rounded as the machine's matrix product rounds them, which may differ with the
machine and the chunk size: equal features can come out an ulp apart and then do not tie.

Precision. Distances are computed in the features' own precision, float32 at least, under `torch.autocast` too.

Method. Only the ranks of the matches are needed, never the order of the whole gallery: see `_Ranker`. Rows are handled
in chunks, so memory grows with the gallery and not with query × gallery.

Axes: q queries, g gallery images, d feature channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

Junk = Literal["camera", "scene", "none"]
CHUNK_ROWS = 64
_COMPARED_AT_ONCE = 32  # matches
_SORTED_FROM = 400  # matches; putting an item in order takes about the time of so many comparisons


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _integers(values: Any, what: str) -> NDArray[np.int64]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{what} must be a list of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Who, and under which camera or in which scene, for each image of one side (query or gallery).

    Args:
        ids: identities, (n,) integers.
        cameras: camera of each image, needed by the protocol `camera`.
        scenes: scene of each image, needed by the protocol `scene`.

    Raises:
        ValueError: if lengths differ or something is not an integer.
    """

    ids: Any
    cameras: Any = None
    scenes: Any = None

    def __post_init__(self) -> None:
        for name in ("ids", "cameras", "scenes"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _integers(values, name))
        for name in ("cameras", "scenes"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"{len(values)} {name} for {len(self.ids)} ids; there must be one for each image")

    def __len__(self) -> int:
        return len(self.ids)

    def groups(self, junk: Junk, side: str) -> NDArray[np.int64] | None:
        """The labels that make a match junk when query and gallery share them; None where nothing is junk."""
        if junk == "none":
            return None
        values: NDArray[np.int64] | None = self.cameras if junk == "camera" else self.scenes
        if values is None:
            raise ValueError(f"protocol {junk!r} needs the {junk} of each {side} image; Labels has none")
        return values


@dataclasses.dataclass(frozen=True)
class ReIDResult:
    """The outcome of one evaluation.

    Attributes:
        junk: the protocol.
        average_precision: per query, NaN where it was skipped.
        first_rank: per query the rank (from 1) of its nearest match, 0 where it was skipped.
        cmc: share of evaluated queries whose nearest match is at rank 1, 2, …, max_rank or before.
        mAP: mean of `average_precision` over evaluated queries.
    """

    junk: Junk
    average_precision: NDArray[np.float64]
    first_rank: NDArray[np.int64]
    cmc: NDArray[np.float64]
    mAP: float

    @property
    def evaluated(self) -> int:
        """Queries that had a match."""
        return int((self.first_rank > 0).sum())

    @property
    def skipped(self) -> int:
        """Queries without one."""
        return len(self.first_rank) - self.evaluated

    def rank(self, k: int) -> float:
        """CMC at rank k, from 1.

        Raises:
            ValueError: if k lies outside what was computed.
        """
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"rank {k} is outside the computed ranks 1 to {len(self.cmc)}; raise max_rank")
        return float(self.cmc[k - 1])

    def metrics(self, ranks: Sequence[int] = (1, 5, 10), prefix: str = "") -> dict[str, float]:
        """mAP and CMC in [0, 1], named with their protocol: `{prefix}mAP[camera]`, `{prefix}rank-1[camera]`, …"""
        named = {f"{prefix}mAP[{self.junk}]": self.mAP}
        return named | {f"{prefix}rank-{k}[{self.junk}]": self.rank(k) for k in ranks}


class _Matches:
    """Gallery positions by identity, split for each query into matches and junk."""

    def __init__(self, query: Labels, gallery: Labels, junk: Junk):
        if junk not in ("camera", "scene", "none"):
            raise ValueError(f"junk must be 'camera', 'scene' or 'none', got {junk!r}")
        self.ids = query.ids
        self.query_groups = query.groups(junk, "query")
        self.gallery_groups = gallery.groups(junk, "gallery")
        self.by_id = np.argsort(gallery.ids, kind="stable")
        ordered = gallery.ids[self.by_id]
        self.first = np.searchsorted(ordered, query.ids, side="left")
        self.last = np.searchsorted(ordered, query.ids, side="right")

    def of(self, q: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gallery positions, ascending, of query q's matches and of its junk."""
        same = self.by_id[self.first[q] : self.last[q]]
        if self.query_groups is None or self.gallery_groups is None:
            return same, same[:0]
        is_junk = self.gallery_groups[same] == self.query_groups[q]
        return same[~is_junk], same[is_junk]


def matched(query: Labels, gallery: Labels, *, junk: Junk) -> NDArray[np.bool_]:
    """Which queries have a match that counts, (q,). Labels alone decide it: the others are skipped by every evaluation.

    Raises:
        ValueError: if labels of the protocol are missing.
    """
    found = _Matches(query, gallery, junk)
    return np.array([len(found.of(q)[0]) > 0 for q in range(len(query))], np.bool_)


class _Ranker:
    """Exact ranks of a query's matches in its gallery list, from one row of distances and without ordering the row.

    A rank is one more than the count of what stands before. Nothing behind the farthest match matters and is dropped
    first; then the matches are compared with what is left. A float32 leaves 29 bits of a float64 free: they take the
    gallery position, so that one comparison of such keys compares distance and then position, and no two are equal.
    """

    def __init__(self, gallery: int):
        # Whole cache lines; what is beyond the items is NaN, which is less than nothing.
        width = _padded(gallery)
        self.gallery = gallery
        self.places = np.arange(gallery)
        self.key = np.full(width, np.nan)
        self.near = np.full(width, np.nan)
        self.mask = np.zeros((_COMPARED_AT_ONCE, width), np.bool_)
        self.parts = np.arange(0, width // 8, 255)

    def ranks(self, query: int, distances: NDArray[Any], matches: NDArray[np.int64], junk: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks (from 1, ascending) of the matches in the list without junk; ties in gallery order.

        Args:
            query: its number, for the error.
            distances: of the query to the gallery, (g,).
            matches, junk: gallery positions, ascending.

        Raises:
            ValueError: if a distance is NaN.
        """
        least = distances.min()
        if np.isnan(least):
            raise ValueError(f"distances of query {query} are not all numbers; look for a NaN in its feature or in the gallery's")
        if distances.dtype != np.float32 or least == -np.inf or len(matches) >= _SORTED_FROM:
            return self._sort(distances, matches, junk)
        key = self.key[: self.gallery]
        key[:] = distances
        if least > 0:
            key.view(np.int64)[:] += self.places
        else:  # zeros of either sign are equal, and the bits of negative numbers count downwards
            key += 0.0
            key.view(np.int64)[:] += np.where(key < 0, -self.places, self.places)
        key[junk] = np.nan
        last = key[matches].max()
        if np.isnan(last):  # an infinite distance
            return self._sort(distances, matches, junk)
        within = np.less_equal(self.key, last, out=self.mask[0])
        count = int(np.count_nonzero(within))
        key = self.key
        if 4 * count < self.gallery:
            places = np.flatnonzero(within)
            matches = np.searchsorted(places, matches)
            key = self.near[: _padded(count)]
            key[:count] = self.key[places]
            key[count:] = np.nan
        parts = [self._compare(key, matches[i : i + _COMPARED_AT_ONCE]) for i in range(0, len(matches), _COMPARED_AT_ONCE)]
        ranks = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ranks.sort()
        return ranks

    def _compare(self, key: NDArray[np.float64], matches: NDArray[np.int64]) -> NDArray[np.int64]:
        """1 + how many keys are less, for each match."""
        mask = np.less(key, key[matches, None], out=self.mask[: len(matches), : len(key)])
        # Count the true bytes of each line: add them eight lanes at a time, at most 255 deep, so that no lane overflows.
        parts = self.parts[: -(-len(key) // (8 * 255))]
        lanes = np.add.reduceat(mask.view(np.uint64), parts, axis=1).view(np.uint8)
        ranks: NDArray[np.int64] = np.add.reduce(lanes, axis=1, dtype=np.int64, initial=1)
        return ranks

    def _sort(self, distances: NDArray[Any], matches: NDArray[np.int64], junk: NDArray[np.int64]) -> NDArray[np.int64]:
        """The plain way, for hundreds of matches and for what does not fit the keys."""
        role = np.zeros(self.gallery, np.int8)
        role[matches], role[junk] = 1, 2
        role = role[distances.argsort(kind="stable")]
        return np.flatnonzero(role[role < 2]) + 1


def _evaluate(rows: Iterable[NDArray[Any]], query: Labels, gallery: Labels, junk: Junk, max_rank: int, strict: bool) -> ReIDResult:
    """`rows` gives chunks (some queries, g) of distances, in query order."""
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    if not len(query) or not len(gallery):
        raise ValueError(f"nothing to evaluate: {len(query)} query and {len(gallery)} gallery images")
    found = _Matches(query, gallery, junk)
    ranks: list[NDArray[np.int64]] = []
    ranker = _Ranker(len(gallery))
    q = 0
    for chunk in rows:
        for row in chunk:
            matches, junk_at = found.of(q)
            ranks.append(ranker.ranks(q, row, matches, junk_at) if len(matches) else matches)
            if strict and not len(matches):
                where = "has none in the gallery" if found.first[q] == found.last[q] else f"has only {junk} junk in the gallery"
                raise ValueError(
                    f"query {q} (identity {query.ids[q]}) has no match: the identity {where}. Set strict=False to skip it."
                )
            q += 1
    if q != len(query):
        raise ValueError(f"{q} rows of distances for {len(query)} queries")
    count = np.array([len(r) for r in ranks])
    evaluated = count > 0
    total = int(evaluated.sum())
    if not total:
        raise ValueError(
            f"none of the {len(query)} queries has a match in the gallery under protocol {junk!r}; nothing can be measured"
        )
    start, rank = np.cumsum(count) - count, np.concatenate(ranks)
    precision_at_match = (np.arange(len(rank)) - np.repeat(start, count) + 1) / rank
    precision = np.full(len(query), np.nan)
    precision[evaluated] = np.add.reduceat(precision_at_match, start[evaluated]) / count[evaluated]
    first_rank = np.zeros(len(query), np.int64)
    first_rank[evaluated] = rank[start[evaluated]]
    hits = np.bincount(np.minimum(first_rank[evaluated], max_rank + 1), minlength=max_rank + 2)[1 : max_rank + 1]
    return ReIDResult(junk, precision, first_rank, np.cumsum(hits) / total, float(precision[evaluated].mean()))


def evaluate_distances(
    distances: ArrayLike | Tensor, query: Labels, gallery: Labels, *, junk: Junk, max_rank: int = 50, strict: bool = False
) -> ReIDResult:
    """Evaluate given distances.

    Args:
        distances: (q, g), smaller is nearer.
        query, gallery: labels of rows and columns.
        junk: the protocol: matches of the same `camera` or the same `scene` are taken out, or `none`.
        max_rank: length of the CMC curve.
        strict: a query without a match is an error which names it, instead of being skipped.

    Raises:
        ValueError: if shapes do not fit, a distance is NaN, labels of the protocol are missing, no query has a match,
            or with `strict` some query has none.
    """
    matrix = distances.detach().cpu().numpy() if isinstance(distances, Tensor) else np.asarray(distances)
    if matrix.shape != (len(query), len(gallery)):
        raise ValueError(
            f"distances have shape {matrix.shape}; {len(query)} queries and {len(gallery)} gallery images need {(len(query), len(gallery))}"
        )
    chunks = (matrix[start : start + CHUNK_ROWS] for start in range(0, len(query), CHUNK_ROWS))
    return _evaluate(chunks, query, gallery, junk, max_rank, strict)


def squared_distances(query: Tensor, gallery: Tensor, rows: int = CHUNK_ROWS) -> Iterator[NDArray[Any]]:
    """Chunks (up to `rows`, g) of squared Euclidean distances between (q, d) and (g, d), computed on their device."""
    gallery_square = gallery.square().sum(1)
    for part in query.split(rows):
        # In half precision thousands of a gallery's distances would be equal, and bfloat16 is nothing numpy knows.
        with torch.autocast(part.device.type, enabled=False):
            product = part @ gallery.T
        yield product.mul_(-2).add_(gallery_square).add_(part.square().sum(1, keepdim=True)).cpu().numpy()


@torch.no_grad()
def evaluate_features(
    query_features: ArrayLike | Tensor,
    gallery_features: ArrayLike | Tensor,
    query: Labels,
    gallery: Labels,
    *,
    junk: Junk,
    max_rank: int = 50,
    normalise: bool = True,
    strict: bool = False,
    rows: int = CHUNK_ROWS,
) -> ReIDResult:
    """Evaluate features by squared Euclidean distance.

    Args:
        query_features, gallery_features: (q, d) and (g, d); arrays, or tensors of one device. Half precision is
            raised to float32 first, and autocast does not lower the distances.
        query, gallery: their labels.
        junk: the protocol: matches of the same `camera` or the same `scene` are taken out, or `none`.
        max_rank: length of the CMC curve.
        normalise: divide each feature by its Euclidean norm first.
        strict: a query without a match is an error which names it, instead of being skipped.
        rows: queries handled at a time; memory is about `rows` × g distances, twice.

    Raises:
        ValueError: as `evaluate_distances`; a feature that is not finite is named.
    """
    sides: list[Tensor] = []
    for name, given, labels in (("query", query_features, query), ("gallery", gallery_features, gallery)):
        features = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
        if features.ndim != 2 or len(features) != len(labels):
            raise ValueError(
                f"{name} features have shape {tuple(features.shape)}; {len(labels)} {name} labels need ({len(labels)}, d)"
            )
        if features.dtype != torch.float64:
            features = features.float()
        finite = features.isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(f"the feature of {name} image {int(finite.logical_not().nonzero()[0])} holds a NaN or infinity")
        sides.append(F.normalize(features, dim=1) if normalise else features)
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"query features have {sides[0].shape[1]} channels, gallery features {sides[1].shape[1]}")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return _evaluate(squared_distances(sides[0], sides[1], rows), query, gallery, junk, max_rank, strict)
