"""Segmentation metrics against counting by hand, and the two rules for classes that do not occur."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.metrics.segmentation import Confusion


def by_hand(predicted, labels, classes, ignore=255):
    pairs = [(p, t) for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist()) if t != ignore]
    iou, accuracy, f1 = [], [], []
    for k in range(classes):
        hit = sum(p == t == k for p, t in pairs)
        true, said = sum(t == k for _, t in pairs), sum(p == k for p, _ in pairs)
        iou.append(hit / (true + said - hit) if true + said else math.nan)
        accuracy.append(hit / true if true else math.nan)
        f1.append(2 * hit / (true + said) if true + said else math.nan)
    return iou, accuracy, f1, sum(p == t for p, t in pairs) / len(pairs) if pairs else math.nan


@given(seed=st.integers(0, 999), classes=st.integers(1, 5), parts=st.integers(1, 3))
def test_counts_by_hand_in_any_number_of_parts(seed, classes, parts):
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, classes, (3, 4, 5), generator=generator)
    labels = torch.randint(0, classes + 1, (3, 4, 5), generator=generator)
    labels[labels == classes] = 255
    confusion = Confusion(classes)
    for p, t in zip(predicted.chunk(parts), labels.chunk(parts)):
        confusion.add(p, t)
    result = confusion.result()
    iou, accuracy, f1, pixels = by_hand(predicted, labels, classes)
    for ours, expected in ((result.iou, iou), (result.accuracy, accuracy), (result.f1, f1), ([result.pixel_accuracy], [pixels])):
        assert ours == pytest.approx(expected, nan_ok=True)


def test_a_class_that_never_occurs_is_left_out_or_counted_as_zero():
    confusion = Confusion(4)
    confusion.add(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 255]))
    ignore, zero = confusion.result("ignore").metrics(), confusion.result("zero").metrics()
    assert ignore["mIoU[ignore]"] == pytest.approx(0.5)
    assert zero["mIoU[zero]"] == pytest.approx(0.25)
    assert ignore["pixel accuracy"] == zero["pixel accuracy"] == pytest.approx(2 / 3)


def test_counts_are_exact_where_float32_stops_growing():
    confusion = Confusion(2)
    confusion.counts[0, 0] = 2**24
    confusion.add(torch.tensor([0]), torch.tensor([0]))
    assert int(confusion.counts[0, 0]) == 2**24 + 1
    assert int(torch.tensor(2.0**24) + 1) == 2**24  # what the release's counts do


def test_a_perfect_and_a_constant_prediction():
    labels = torch.arange(3).repeat(4)
    perfect, constant = Confusion(3), Confusion(3)
    perfect.add(labels, labels)
    constant.add(torch.zeros_like(labels), labels)
    assert perfect.result().mean_iou == 1.0
    assert constant.result().iou == (pytest.approx(1 / 3), 0.0, 0.0)


@pytest.mark.parametrize(("predicted", "label"), [(4, 0), (-1, 1), (0, 3), (2, -1), (3, 0), (0, 254)])
def test_what_is_no_class_is_refused_and_never_counted_as_another(predicted, label):
    """Without the check, predicted 4 of 3 classes with label 0 is cell 4: a hit of class 1."""
    confusion = Confusion(3)
    with pytest.raises(ValueError, match=r"1 pixel with .*0 to 2.*label .*ignored, 255"):
        confusion.add(torch.tensor([1, predicted]), torch.tensor([1, label]))
    confusion = Confusion(3)
    confusion.add(torch.tensor([1, 99]), torch.tensor([1, 255]))  # what is predicted where nothing counts is nobody's business
    assert confusion.result().metrics()["pixel accuracy"] == 1.0


def test_the_result_refuses_what_an_accelerator_counted():
    """There `add` reads nothing back; here its counter stands for what it would have found."""
    confusion = Confusion(3)
    confusion.strays += 2
    with pytest.raises(ValueError, match="2 pixels"):
        confusion.result()


def test_nothing_to_count_is_not_a_number_and_shapes_must_agree():
    assert math.isnan(Confusion(2).result().mean_iou)
    with pytest.raises(ValueError, match=r"predictions are \(2, 3\), labels \(3, 2\)"):
        Confusion(2).add(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes must be at least 1"):
        Confusion(0)
