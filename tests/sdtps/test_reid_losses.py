"""Smoothed cross entropy and the batch-hard triplet, against loops over samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from plugins.sdtps.reid_losses import BatchHardTriplet, LabelSmoothedCrossEntropy


@given(b=st.integers(1, 5), p=st.integers(2, 6), epsilon=st.floats(0.0, 0.9), seed=st.integers(0, 99))
def test_smoothed_cross_entropy_equals_its_definition(b, p, epsilon, seed):
    torch.manual_seed(seed)
    scores, identities = 3 * torch.randn(b, p), torch.randint(0, p, (b,))
    total = 0.0
    for row, identity in zip(scores.tolist(), identities.tolist()):
        log_sum = math.log(sum(math.exp(s) for s in row))
        for k in range(p):
            target = (1 - epsilon) * (k == identity) + epsilon / p
            total -= target * (row[k] - log_sum)
    assert LabelSmoothedCrossEntropy(epsilon)(scores, identities).item() == pytest.approx(total / b, rel=1e-4, abs=1e-5)


def test_without_smoothing_it_is_cross_entropy_in_value_and_gradient():
    scores = torch.randn(4, 7, requires_grad=True)
    identities = torch.randint(0, 7, (4,))
    ours = torch.autograd.grad(LabelSmoothedCrossEntropy(0.0)(scores, identities), scores)[0]
    theirs = torch.autograd.grad(F.cross_entropy(scores, identities), scores)[0]
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\), got 1"):
        LabelSmoothedCrossEntropy(1.0)


def triplet_by_hand(features, identities, margin):
    """Anchor by anchor; those without a positive or a negative are left out."""
    losses = []
    for a, anchor in enumerate(identities):
        positives = [math.dist(features[a], features[i]) for i, other in enumerate(identities) if other == anchor and i != a]
        negatives = [math.dist(features[a], features[i]) for i, other in enumerate(identities) if other != anchor]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(losses) / len(losses) if losses else 0.0


@given(
    identities=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    margin=st.sampled_from([None, 0.0, 0.3]),
    d=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_triplet_equals_the_loops_on_ragged_batches(identities, margin, d, seed):
    torch.manual_seed(seed)
    features = torch.randn(len(identities), d, requires_grad=True)
    loss = BatchHardTriplet(margin)(features, torch.tensor(identities))
    assert loss.item() == pytest.approx(triplet_by_hand(features.tolist(), identities, margin), rel=1e-3, abs=1e-4)
    loss.backward()
    assert features.grad.isfinite().all()


def test_triplet_gradient_by_differences():
    torch.manual_seed(4)
    features = torch.randn(7, 3, dtype=torch.float64)
    identities = [0, 0, 1, 1, 1, 2, 3]
    x = features.float().requires_grad_()
    BatchHardTriplet()(x, torch.tensor(identities)).backward()
    for i in range(7):
        for j in range(3):
            step = torch.zeros_like(features)
            step[i, j] = 1e-5
            up, down = (triplet_by_hand((features + s * step).tolist(), identities, None) for s in (1, -1))
            assert x.grad[i, j].item() == pytest.approx((up - down) / 2e-5, abs=1e-3)
    assert x.grad[:5].abs().amax(1).min() > 0


@pytest.mark.parametrize("identities", [[0], [0, 0, 0], [0, 1, 2]])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_a_batch_without_any_anchor_gives_zero_and_no_gradient(identities, margin):
    features = torch.randn(len(identities), 4, requires_grad=True)
    loss = BatchHardTriplet(margin)(features, torch.tensor(identities))
    loss.backward()
    assert loss.item() == 0
    assert (features.grad == 0).all()


@pytest.mark.parametrize("margin", [None, 0.3])
def test_coincident_features_have_a_finite_gradient(margin):
    features = torch.ones(6, 4, requires_grad=True)
    loss = BatchHardTriplet(margin)(features, torch.tensor([0, 0, 0, 1, 1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if margin is None else 0.3, abs=1e-5)
    assert features.grad.isfinite().all()


@given(seed=st.integers(0, 99), shift=st.floats(-3.0, 3.0))
def test_triplet_ignores_order_and_position(seed, shift):
    torch.manual_seed(seed)
    features, identities, order = torch.randn(8, 3), torch.randint(0, 3, (8,)), torch.randperm(8)
    loss = BatchHardTriplet()
    expected = loss(features, identities)
    torch.testing.assert_close(loss(features[order], identities[order]), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss(features + shift, identities), expected, atol=1e-3, rtol=1e-3)


def test_triplet_in_half_precision_is_computed_in_full():
    features, identities = 30 * torch.randn(12, 64), torch.arange(12) // 3
    with torch.autocast("cpu", torch.bfloat16):
        half = BatchHardTriplet()(features.bfloat16(), identities)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, BatchHardTriplet()(features.bfloat16().float(), identities))


def test_triplet_in_double_precision_stays_there():
    torch.manual_seed(0)
    features = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: BatchHardTriplet()(x, torch.tensor([0, 0, 1, 1, 1])), features)


def test_margin_must_not_be_negative():
    with pytest.raises(ValueError, match="margin must be 0 or more"):
        BatchHardTriplet(-0.1)
