import math

import fusion_by_hand as by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from plugins.sam3_fusion.scoring import PromptScorer


def small(**options):
    scorer = PromptScorer(**{"dim": 6, "hidden": 9, "dropout": 0.0, **options})
    for p in scorer.parameters():
        nn.init.normal_(p, std=0.5)
    return scorer


def scores_by_hand(scorer, hidden, prompt, pad):
    weights = scorer.state_dict()
    out = torch.empty(hidden.shape[:3])
    for b in range(prompt.shape[0]):
        moved = [
            by_hand.norm(
                weights, "norm", t + by_hand.ffn({"f." + k[4:]: v for k, v in weights.items() if k.startswith("mlp.")}, "f", t)
            )
            for t in prompt[b]
        ]
        kept = [t for t, p in zip(moved, pad[b]) if not p]
        mean = sum(kept) / len(kept)
        for layer in range(hidden.shape[0]):
            for r in range(hidden.shape[2]):
                dot = by_hand.linear(weights, "prompt_proj", mean) @ by_hand.linear(weights, "query_proj", hidden[layer, b, r])
                out[layer, b, r] = min(max(float(dot) / math.sqrt(6), -12.0), 12.0)
    return out


def test_matches_the_equations():
    scorer = small()
    hidden, prompt = torch.randn(2, 2, 3, 6), torch.randn(2, 4, 6)
    pad = torch.tensor([[False, False, True, True], [False] * 4])
    assert_close(scorer(hidden, prompt, pad), scores_by_hand(scorer, hidden, prompt, pad), atol=1e-5, rtol=1e-4)


def test_clamp_works_and_can_be_left_out():
    hard, free = small(), small(clamp="none")
    free.load_state_dict(hard.state_dict())
    hidden, prompt = 200 * torch.randn(1, 2, 3, 6), torch.randn(2, 4, 6)
    kept = hidden.clone()
    unclamped = free(hidden, prompt)
    assert unclamped.abs().max() > 12
    assert_close(hard(hidden, prompt), unclamped.clamp(-12, 12))
    assert torch.equal(hidden, kept)


@given(seed=st.integers(0, 999))
def test_padding_and_order_of_tokens_do_not_matter(seed):
    torch.manual_seed(seed)
    scorer = small()
    hidden, prompt = torch.randn(1, 1, 3, 6), torch.randn(1, 4, 6)
    pad = torch.tensor([[False, True, False, False]])
    order = torch.randperm(4)
    out = scorer(hidden, prompt, pad)
    assert_close(scorer(hidden, prompt[:, order], pad[:, order]), out, atol=1e-5, rtol=1e-4)
    assert_close(scorer(hidden, prompt[:, [0, 2, 3]]), out, atol=1e-5, rtol=1e-4)


def test_padding_alone_is_finite_and_says_nothing_of_the_tokens():
    scorer = small()
    hidden, prompt = torch.randn(1, 1, 3, 6), torch.randn(1, 4, 6, requires_grad=True)
    pad = torch.ones(1, 4, dtype=torch.bool)
    out = scorer(hidden, prompt, pad)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert (prompt.grad == 0).all()
    assert_close(out, scorer(hidden, torch.randn(1, 4, 6), pad))


def test_another_clamp_is_an_error():
    with pytest.raises((ValueError, TypeError), match="clamp"):
        PromptScorer(6, 9, clamp="soft")
