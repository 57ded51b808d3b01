"""Accuracy over episodes and its interval."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from core.metrics.few_shot import accuracy, interval


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_by_hand(values):
    found = interval(values)
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std, abs=1e-12)
    assert found.half_width == pytest.approx(1.96 * std / math.sqrt(len(values)), abs=1e-12)
    assert found.count == len(values)


def test_the_release_s_own_case():
    """150 episodes with a deviation of 0.10 give ± 1.6 points."""
    values = [0.6, 0.8] * 75
    assert interval(values).half_width == pytest.approx(0.016, abs=5e-5)
    assert str(interval(values)) == "0.700 ± 0.016 (150 episodes)"
    assert interval(values).metrics("accuracy") == {"accuracy": pytest.approx(0.7), "accuracy ±": pytest.approx(0.016, abs=5e-5)}


def test_one_episode_and_none():
    assert interval([0.5]).half_width == 0.0
    with pytest.raises(ValueError, match="at least one episode"):
        interval([])
    with pytest.raises(ValueError, match="episode 1 has a value that is not finite"):
        interval([0.5, math.nan])


def test_accuracy_counts_rows():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no rows"):
        accuracy(logits[:0], torch.tensor([], dtype=torch.int64))
