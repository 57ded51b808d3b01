"""mAP and CMC against slow loops written from the definition, and every way to ask for a number that does not exist."""

from __future__ import annotations

import importlib
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import golden
from core.metrics import reid
from core.metrics.reid import Labels, evaluate_distances, evaluate_features

GOLDEN = Path(__file__).parents[1] / "golden"


def by_hand(distances, query, gallery, junk, max_rank):
    """Average precisions and first ranks (None where skipped), CMC and mAP, one gallery image at a time."""
    precisions, firsts = [], []
    for q in range(len(query)):
        order = sorted(range(len(gallery)), key=lambda g: (float(distances[q][g]), g))
        rank, hits, total, first = 0, 0, 0.0, None
        for g in order:
            same = gallery.ids[g] == query.ids[q]
            if same and junk == "camera" and gallery.cameras[g] == query.cameras[q]:
                continue
            if same and junk == "scene" and gallery.scenes[g] == query.scenes[q]:
                continue
            rank += 1
            if same:
                hits += 1
                total += hits / rank
                first = first or rank
        precisions.append(total / hits if hits else None)
        firsts.append(first)
    some = [f for f in firsts if f]
    cmc = [sum(f <= k for f in some) / len(some) for k in range(1, max_rank + 1)] if some else None
    return precisions, firsts, cmc, sum(p for p in precisions if p is not None) / len(some) if some else None


@st.composite
def problems(draw):
    """Small problems with many ties, missing identities, and zeros, negatives and infinities among the distances."""
    queries, gallery = draw(st.integers(1, 5)), draw(st.integers(1, 90))
    ids, cameras = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["continuous", "few values", "signed zeros", "infinite", "negative"]))
    shape = (queries, gallery)
    if kind == "continuous":
        distances = random.random(shape)
    elif kind == "signed zeros":
        distances = random.choice([-0.0, 0.0, 1.0], shape)
    elif kind == "infinite":
        distances = random.choice([0.5, 1.0, np.inf, -np.inf] if draw(st.booleans()) else [0.5, 1.0, np.inf], shape)
    else:
        distances = random.integers(0, 4, shape) / 4 - (2 if kind == "negative" else 0)
    distances = distances.astype(draw(st.sampled_from([np.float32, np.float64])))

    def side(n):
        return Labels(random.integers(0, ids, n), random.integers(0, cameras, n), random.integers(0, cameras, n))

    return distances, side(queries), side(gallery), draw(st.sampled_from(["camera", "scene", "none"]))


@pytest.mark.parametrize("sorted_from", [1, 400])
@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_equals_the_definition(sorted_from, problem):
    distances, query, gallery, junk = problem
    before, reid._SORTED_FROM = reid._SORTED_FROM, sorted_from  # both ways of finding ranks
    try:
        precisions, firsts, cmc, mean = by_hand(distances, query, gallery, junk, 7)
        if cmc is None:
            with pytest.raises(ValueError, match="none of the"):
                evaluate_distances(distances, query, gallery, junk=junk, max_rank=7)
            return
        ours = evaluate_distances(distances, query, gallery, junk=junk, max_rank=7)
    finally:
        reid._SORTED_FROM = before
    assert list(ours.first_rank) == [f or 0 for f in firsts]
    np.testing.assert_allclose(ours.average_precision, [math.nan if p is None else p for p in precisions], rtol=1e-12)
    np.testing.assert_allclose(ours.cmc, cmc, rtol=1e-12)
    assert ours.mAP == pytest.approx(mean, rel=1e-12)
    assert ours.evaluated + ours.skipped == len(query)
    assert ours.skipped == firsts.count(None)


def test_many_matches_and_wide_galleries_take_the_same_numbers():
    """More matches than are compared at once, more columns than one lane of the count can hold, and a good model."""
    random = np.random.default_rng(3)
    for gallery_size, ids, spread in ((5000, 20, 1.0), (5000, 20, 0.0), (17000, 2, 1.0), (2100, 400, 0.02)):
        gallery = Labels(random.integers(0, ids, gallery_size), random.integers(0, 3, gallery_size))
        query = Labels(random.integers(0, ids, 3), random.integers(0, 3, 3))
        other = gallery.ids[None] != query.ids[:, None]
        distances = (other * 0.5 + spread * random.random((3, gallery_size))).astype(np.float32)
        _, firsts, cmc, mean = by_hand(distances, query, gallery, "camera", 50)
        ours = evaluate_distances(distances, query, gallery, junk="camera")
        assert list(ours.first_rank) == [f or 0 for f in firsts]
        assert ours.mAP == pytest.approx(mean, rel=1e-12)
        np.testing.assert_allclose(ours.cmc, cmc, rtol=1e-12)


def test_ties_stand_in_gallery_order():
    query, equal = Labels([7]), np.ones((1, 4), np.float32)
    for place in range(4):
        ids = [1, 1, 1, 1]
        ids[place] = 7
        assert evaluate_distances(equal, query, Labels(ids), junk="none").first_rank[0] == place + 1
        zeros = np.array([[0.0, -0.0, -0.0, 0.0]], np.float32)  # equal, whatever their sign
        assert evaluate_distances(zeros, query, Labels(ids), junk="none").first_rank[0] == place + 1
        assert evaluate_distances(-equal, query, Labels(ids), junk="none").first_rank[0] == place + 1


def test_worked_example():
    """Nearest first: junk, match, other, match, so precision 1/1 and 2/3."""
    query, gallery = Labels([1], [0]), Labels([1, 1, 2, 1], [0, 1, 0, 2])
    result = evaluate_distances([[0.1, 0.2, 0.3, 0.4]], query, gallery, junk="camera")
    assert result.mAP == pytest.approx((1 + 2 / 3) / 2)
    assert result.metrics() == {
        "mAP[camera]": pytest.approx(5 / 6), "rank-1[camera]": 1.0, "rank-5[camera]": 1.0, "rank-10[camera]": 1.0,
    }  # fmt: skip
    plain = evaluate_distances([[0.1, 0.2, 0.3, 0.4]], query, gallery, junk="none")
    assert plain.mAP == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert set(plain.metrics((1,), prefix="both/")) == {"both/mAP[none]", "both/rank-1[none]"}
    with pytest.raises(ValueError, match="rank 51 is outside"):
        plain.metrics((51,))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 1000), scale=st.floats(0.01, 100.0))
def test_features_in_any_chunks_and_at_any_scale_equal_distances(rows, seed, scale):
    random = np.random.default_rng(seed)
    features = random.standard_normal((70, 8))
    query, gallery = Labels(random.integers(0, 5, 30)), Labels(random.integers(0, 5, 40))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = ((unit[:30, None] - unit[None, 30:]) ** 2).sum(-1)
    expected = evaluate_distances(distances, query, gallery, junk="none")
    tensors = torch.from_numpy(features * scale)
    ours = evaluate_features(tensors[:30], tensors[30:], query, gallery, junk="none", rows=rows)
    np.testing.assert_allclose(ours.average_precision, expected.average_precision, rtol=1e-12)
    single = evaluate_features(
        (features[:30] * scale).astype(np.float32), tensors[30:].float(), query, gallery, junk="none", rows=rows
    )
    assert single.mAP == pytest.approx(expected.mAP, abs=1e-6)


def test_without_normalising_length_matters():
    query, gallery = Labels([1]), Labels([1, 2])
    features = torch.tensor([[1.0, 0.0], [100.0, 0.0], [0.9, 0.3]])
    assert evaluate_features(features[:1], features[1:], query, gallery, junk="none").first_rank[0] == 1
    assert evaluate_features(features[:1], features[1:], query, gallery, junk="none", normalise=False).first_rank[0] == 2


def test_leaves_its_input_alone():
    random = np.random.default_rng(0)
    distances = random.random((4, 30)).astype(np.float32)
    copy = distances.copy()
    evaluate_distances(distances, Labels([0] * 4, [0] * 4), Labels([0, 1] * 15, [0, 1, 1] * 10), junk="camera")
    assert (distances == copy).all()


def test_memory_grows_with_the_gallery_not_with_the_queries():
    random = np.random.default_rng(0)
    gallery_size = 4000
    features = torch.from_numpy(random.standard_normal((4000 + gallery_size, 4)).astype(np.float32))
    gallery = Labels(random.integers(0, 500, gallery_size))

    def peak(queries):
        labels = Labels(random.integers(0, 500, queries))
        tracemalloc.start()
        evaluate_features(features[:queries], features[-gallery_size:], labels, gallery, junk="none")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    few, many = peak(100), peak(2000)
    assert many < few + 1900 * 1000  # ranks of the matches: some hundred bytes a query; a row of distances is 16,000
    assert many < 2000 * gallery_size * 4 / 8


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: evaluate_distances([[1.0]], Labels([1]), Labels([1]), junk="camera"), "needs the camera of each query image"),
        (
            lambda: evaluate_distances([[1.0]], Labels([1], scenes=[1]), Labels([1]), junk="scene"),
            "needs the scene of each gallery",
        ),
        (
            lambda: evaluate_distances([[1.0, 2.0]], Labels([1]), Labels([1]), junk="none"),
            r"shape \(1, 2\); 1 queries and 1 gallery",
        ),
        (
            lambda: evaluate_distances([[math.nan, 1.0]], Labels([1]), Labels([1, 2]), junk="none"),
            "distances of query 0 are not all",
        ),
        (lambda: evaluate_distances([[1.0]], Labels([1]), Labels([1]), junk="none", max_rank=0), "max_rank must be at least 1"),
        (lambda: evaluate_distances(np.ones((0, 1)), Labels([]), Labels([1]), junk="none"), "0 query and 1 gallery"),
        (lambda: evaluate_distances([[1.0]], Labels([1]), Labels([2]), junk="none"), "none of the 1 queries has a match"),
        (lambda: Labels([1.5]), "ids must be a list of integers"),
        (lambda: Labels([1, 2], [1]), "1 cameras for 2 ids"),
        (
            lambda: evaluate_distances(
                [[1.0, 2.0]] * 2, Labels([2, 1], [0, 3]), Labels([2, 1], [1, 3]), junk="camera", strict=True
            ),
            r"query 1 \(identity 1\) has no match: the identity has only camera junk",
        ),
        (
            lambda: evaluate_distances([[1.0]] * 2, Labels([2, 5]), Labels([2]), junk="none", strict=True),
            r"query 1 \(identity 5\) has no match: the identity has none in the gallery",
        ),
        (
            lambda: evaluate_features(
                torch.ones(1, 2), torch.tensor([[1.0, 1.0], [math.inf, 1.0]]), Labels([1]), Labels([1, 1]), junk="none"
            ),
            "the feature of gallery image 1 holds a NaN",
        ),
        (
            lambda: evaluate_features(torch.ones(1, 2), torch.ones(1, 3), Labels([1]), Labels([1]), junk="none"),
            "query features have 2 ch",
        ),
        (lambda: evaluate_features(torch.ones(2, 2), torch.ones(1, 2), Labels([1]), Labels([1]), junk="none"), r"need \(1, d\)"),
    ],
)
def test_says_what_is_wrong(problem, message):
    with pytest.raises(ValueError, match=message):
        problem()


def test_an_unknown_protocol_is_refused():
    with pytest.raises(
        (ValueError, TypeError), match=r"(?s)junk.*view|view.*junk"
    ):  # TypeError where annotations are checked first
        evaluate_distances([[1.0]], Labels([1]), Labels([1]), junk="view")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("reid_eval_*.safetensors")), ids=lambda p: p.stem)
def test_golden(path):
    importlib.import_module("core.golden_cases")
    result = golden.compare(golden.read(path))
    assert result.passed, result.failures


@given(problems())
def test_labels_alone_say_which_queries_are_evaluated(problem):
    distances, query, gallery, junk = problem[:4]
    has_match = [f is not None for f in by_hand(distances, query, gallery, junk, 1)[1]]
    assert reid.matched(query, gallery, junk=junk).tolist() == has_match


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_distances(dtype):
    """Evaluation runs where training does, inside autocast; with half-precision distances these features rank differently."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (200,), generator=random)
    features = 0.4 * torch.randn(20, 64, generator=random)[ids] + torch.randn(200, 64, generator=random) + 5
    labels = Labels(ids, torch.arange(200) % 4)
    plain = evaluate_features(features, features, labels, labels, junk="camera").metrics()
    with torch.autocast("cpu", dtype):
        assert evaluate_features(features, features, labels, labels, junk="camera").metrics() == plain
        assert torch.is_autocast_enabled("cpu")
