"""The shared layers against loops written from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from core.layers import DropPath, FeedForward, QuickGELU, SelfAttention, TransformerBlock, resize_positions


def test_quick_gelu():
    x = torch.linspace(-4, 4, 33)
    expected = torch.tensor([v / (1 + math.exp(-1.702 * v)) for v in x.tolist()])
    torch.testing.assert_close(QuickGELU()(x), expected)


@torch.no_grad()
def attention_by_hand(layer, x, keep=None):
    """Token by token, head by head."""
    b, n, c = x.shape
    d = c // layer.heads
    out = torch.zeros_like(x)
    for sample in range(b):
        packed = x[sample] @ layer.qkv.weight.T + layer.qkv.bias
        q, k, v = packed[:, :c], packed[:, c : 2 * c], packed[:, 2 * c :]
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(n):
                logits = [float(q[i, part] @ k[j, part]) / math.sqrt(d) for j in range(n)]
                allowed = [keep is None or bool(keep[sample, j]) for j in range(n)]
                weights = [math.exp(s) if ok else 0.0 for s, ok in zip(logits, allowed)]
                out[sample, i, part] = sum(w / sum(weights) * v[j, part] for j, w in enumerate(weights))
    return out @ layer.out.weight.T + layer.out.bias


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_the_loops(masked):
    layer, x = SelfAttention(6, 3), torch.randn(2, 5, 6)
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool() if masked else None
    torch.testing.assert_close(layer(x, keep).detach(), attention_by_hand(layer, x, keep), atol=1e-5, rtol=1e-5)


def test_self_attention_is_what_torch_computes_with_the_same_weights():
    ours, theirs = SelfAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x, y = (torch.randn(2, 7, 8).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    a, b = ours(x), theirs(y, y, y, need_weights=False)[0]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.qkv.weight.grad, theirs.in_proj_weight.grad, atol=1e-5, rtol=1e-4)


@given(n=st.integers(1, 6), seed=st.integers(0, 99))
def test_attention_does_not_care_for_order_and_masked_tokens_do_not_count(n, seed):
    torch.manual_seed(seed)
    layer, x, order = SelfAttention(4, 2), torch.randn(1, n, 4), torch.randperm(n)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-5)
    more = torch.cat([x, torch.randn(1, 3, 4)], 1)
    keep = torch.arange(n + 3)[None] < n
    torch.testing.assert_close(layer(more, keep)[:, :n], layer(x), atol=1e-5, rtol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide dim, got dim 6 and heads 4"):
        SelfAttention(6, 4)


def test_block_is_pre_norm():
    block, x = TransformerBlock(8, 2, mlp_ratio=2.0, activation=QuickGELU), torch.randn(2, 3, 8)
    y = x + block.attention(F.layer_norm(x, (8,), block.norm_attention.weight, block.norm_attention.bias))
    hidden = F.layer_norm(y, (8,), block.norm_mlp.weight, block.norm_mlp.bias) @ block.mlp.expand.weight.T + block.mlp.expand.bias
    expected = y + (hidden * torch.sigmoid(1.702 * hidden)) @ block.mlp.contract.weight.T + block.mlp.contract.bias
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    assert block.mlp.expand.out_features == 16


def test_block_with_silent_branches_is_the_identity():
    block, x = TransformerBlock(8, 2), torch.randn(2, 3, 8)
    for last in (block.attention.out, block.mlp.contract):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    assert torch.equal(block(x), x)


def test_feed_forward_acts_on_each_token_alone():
    layer, x = FeedForward(4, 9), torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = layer(x)
    per_sample = dropped.reshape(4000, -1)
    assert per_sample.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (per_sample == per_sample[:, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1"):
        DropPath(1.0)


def bilinear_by_hand(grid, height, width):
    """Sample positions at pixel centres: source = (target + 0.5) · scale - 0.5, held at the border."""
    rows, columns, _ = grid.shape
    out = torch.zeros(height, width, grid.shape[2])
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * rows / height - 0.5, 0.0)
            u = max((x + 0.5) * columns / width - 0.5, 0.0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = v - top, u - left
            out[y, x] = (1 - a) * ((1 - b) * grid[top, left] + b * grid[top, right]) + a * (
                (1 - b) * grid[bottom, left] + b * grid[bottom, right]
            )
    return out


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5), height=st.integers(1, 6), width=st.integers(1, 6), prefix=st.integers(0, 2)
)
def test_resized_positions_are_bilinear_and_the_prefix_stays(rows, columns, height, width, prefix):
    positions = torch.randn(prefix + rows * columns, 3)
    resized = resize_positions(positions, (rows, columns), (height, width), prefix)
    assert torch.equal(resized[:prefix], positions[:prefix])
    expected = bilinear_by_hand(positions[prefix:].reshape(rows, columns, 3), height, width)
    torch.testing.assert_close(resized[prefix:], expected.reshape(-1, 3), atol=1e-5, rtol=1e-5)


def test_positions_of_the_same_grid_are_untouched_and_a_wrong_count_is_an_error():
    positions = torch.randn(1 + 6, 3)
    assert resize_positions(positions, (2, 3), (2, 3)) is positions
    with pytest.raises(ValueError, match="7 positions are not 1 \\+ 2 × 2"):
        resize_positions(positions, (2, 2), (4, 4))
