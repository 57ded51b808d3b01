"""Attention pooling: by hand, in the limit, under permutation, against the golden case, and its cost."""

from pathlib import Path

import pytest
import torch
from core import golden
from core.profile import profile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from my_paper.attention_pool import AttentionPool

from by_hand import pooled


def made(dim=6, seed=0, **options):
    torch.manual_seed(seed)
    pool = AttentionPool(dim, **options)
    torch.nn.init.normal_(pool.query)
    return pool


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_matches_the_equations_by_hand(temperature):
    pool, tokens = made(temperature=temperature), torch.randn(3, 5, 6)
    assert_close(pool(tokens), torch.tensor(pooled(tokens.tolist(), pool.query.tolist(), temperature)))


def test_a_query_of_zero_is_the_mean_in_value_and_gradient():
    pool, tokens = AttentionPool(6), torch.randn(3, 5, 6, requires_grad=True)
    assert_close(pool(tokens), tokens.mean(1))
    weight = torch.randn(3, 6)
    (pool(tokens) * weight).sum().backward()
    assert_close(tokens.grad, (weight / 5)[:, None].expand(3, 5, 6))


@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 12), seed=st.integers(0, 100))
def test_the_order_of_the_tokens_does_not_matter(tokens, seed):
    pool = made(seed=seed)
    x = torch.randn(2, tokens, 6)
    assert_close(pool(x[:, torch.randperm(tokens)]), pool(x))
    assert_close(pool.weights(x).sum(-1), torch.ones(2))


def test_golden_case():
    import my_paper.golden  # noqa: F401  # registers the adapter

    outcome = golden.compare(golden.read(Path(__file__).parent / "golden" / "attention_pool.safetensors"))
    assert outcome.passed, outcome.failures
    assert outcome.compared == 3


@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 16, 16), (3, 7, 5)])
def test_costs_two_multiply_accumulates_a_number(batch, tokens, dim):
    counted = profile(AttentionPool(dim), (torch.randn(batch, tokens, dim),), timed=False)
    assert counted.macs == 2 * batch * tokens * dim


def test_a_bad_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        AttentionPool(4, temperature=0.0)
