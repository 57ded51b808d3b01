"""Prototypes and the nearest-prototype classifier."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from synchronisation import NoWaiting
from torch.nn import functional as F
from torch.testing import assert_close

from plugins.sap.prototype_head import PrototypeHead, check_support, class_means


@given(n=st.integers(1, 6), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_class_means_are_means_of_classes(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(n), torch.randint(n, (n * (k - 1),), generator=g)])  # uneven counts, no class empty
    features = torch.randn(len(labels), 7, generator=g)
    expected = torch.stack([torch.stack([f for f, c in zip(features, labels) if c == j]).mean(0) for j in range(n)])
    assert_close(class_means(features, labels, n), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_logits_by_hand(metric):
    features, support, labels = torch.randn(6, 8), torch.randn(4, 8), torch.tensor([0, 1, 1, 0])
    logits, prototypes = PrototypeHead(metric, logit_temperature=0.5)(features, support, labels, n_way=2)
    for c in range(2):
        rows = [s / s.norm() for s, label in zip(support, labels) if label == c]
        prototype = sum(rows) / len(rows)
        assert_close(prototypes[c], prototype)
        for i, f in enumerate(features):
            unit = f / f.norm()
            expected = -((unit - prototype) ** 2).sum() if metric == "euclidean" else unit @ prototype / prototype.norm()
            assert_close(logits[i, c], expected / 0.5, atol=1e-5, rtol=1e-5)


def test_cross_entropy_cannot_fall_below_the_simplex():
    """The best five unit prototypes are a simplex at squared distance 2.5: cross entropy ln(1 + 4 exp(-2.5)) = 0.284."""
    corners = torch.eye(5) - 0.2
    logits, _ = PrototypeHead()(corners, corners, torch.arange(5), n_way=5)
    loss = F.cross_entropy(logits, torch.arange(5))
    assert float(loss) == pytest.approx(math.log(1 + 4 * math.exp(-2.5)), abs=1e-5)
    sharper, _ = PrototypeHead(logit_temperature=0.1)(corners, corners, torch.arange(5), n_way=5)
    assert float(F.cross_entropy(sharper, torch.arange(5))) < 1e-9


def test_logits_do_not_depend_on_feature_size_and_bounds_hold():
    features, support, labels = torch.randn(30, 8), torch.randn(10, 8), torch.arange(5).repeat(2)
    head = PrototypeHead()
    a, _ = head(features, support, labels, n_way=5)
    b, _ = head(features * 7, support * 3, labels, n_way=5)
    assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert float(a.min()) >= -4
    assert float(a.max()) <= 1e-6


def test_missing_classes_and_foreign_labels_are_errors_where_labels_are_made():
    check_support(torch.tensor([1, 0, 2]), 3)
    with pytest.raises(ValueError, match=r"class \[1\] of 3 has no support row"):
        check_support(torch.tensor([0, 2, 2]), 3)
    with pytest.raises(ValueError, match=r"0..2 .*got \[0, 3\]"):
        check_support(torch.tensor([0, 3]), 3)
    with pytest.raises(RuntimeError, match="no support row"):
        PrototypeHead()(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 2, 2]), n_way=3)


def test_no_waiting_and_no_parameters():
    head = PrototypeHead()
    assert not list(head.parameters())
    features = torch.randn(6, 8, requires_grad=True)
    with NoWaiting():
        head(features, features[:4], torch.tensor([0, 1, 0, 1]), n_way=2)[0].sum().backward()
