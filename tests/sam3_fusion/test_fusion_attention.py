import math

import fusion_by_hand as by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from core.layers import Attention
from plugins.sam3_fusion.feed_forward import ROWS, BlockwiseFeedForward, Mlp


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


def test_attention_matches_the_equations_with_padding_and_bias():
    module, b, n, m = randomised(Attention(6, 2)), 2, 3, 4
    q, k, v, bias = torch.randn(b, n, 6), torch.randn(b, m, 6), torch.randn(b, m, 6), torch.randn(b, 2, n, m)
    pad = torch.tensor([[False, True, False, False], [False, False, False, True]])
    ours = module(q, k, v, pad, bias)
    for i in range(b):
        weights = {"a." + name: p for name, p in module.state_dict().items()}
        theirs = by_hand.attention(weights, "a", 2, q[i], k[i], v[i], pad[i], bias[i])
        assert_close(ours[i], torch.stack(theirs))


def test_equals_torchs_own_attention_value_and_gradient():
    ours, theirs = randomised(Attention(8, 4)), nn.MultiheadAttention(8, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    q, k, v = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[0, 3:] = True
    a, b = ours(q, k, v, pad), theirs(q, k, v, key_padding_mask=pad, need_weights=False)[0]
    assert_close(a, b)
    assert_close(torch.autograd.grad(a.square().sum(), q)[0], torch.autograd.grad(b.square().sum(), q)[0])


@given(n=st.integers(1, 4), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_padding_is_as_good_as_absence(n, m, seed):
    torch.manual_seed(seed)
    module = randomised(Attention(4, 2))
    q, k, v = torch.randn(1, n, 4), torch.randn(1, m, 4), torch.randn(1, m, 4)
    more = torch.randn(1, 2, 4) * 100
    pad = torch.arange(m + 2)[None] >= m
    assert_close(module(q, torch.cat((k, more), 1), torch.cat((v, more), 1), pad), module(q, k, v))


def test_a_row_of_padding_gives_the_output_bias_and_no_gradient_to_keys():
    module = randomised(Attention(4, 2))
    q, k = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    pad = torch.tensor([[True] * 5, [False] * 5])
    out = module(q, k, k, pad)
    assert_close(out[0], module.out_proj.bias.expand(3, 4))
    out.square().sum().backward()
    assert torch.isfinite(q.grad).all()
    assert (k.grad[0] == 0).all()
    assert (k.grad[1] != 0).any()


def test_no_key_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one key"):
        Attention(4, 2)(torch.randn(1, 2, 4), torch.randn(1, 0, 4), torch.randn(1, 0, 4))


@pytest.mark.parametrize(("options", "match"), [((6, 4), "divide dim"), ((6, 0), "divide dim"), ((6, 2, 1.0), "dropout")])
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Attention(*options)


def test_projections_start_as_the_packed_tensor_does():
    weight = Attention(256, 8).q_proj.weight
    bound = math.sqrt(6 / (256 + 768))
    assert 0.98 * bound < weight.abs().max() <= bound


def test_feed_forward_in_blocks_equals_the_whole_and_keeps_its_input():
    module = randomised(BlockwiseFeedForward(4, 9))
    x = torch.randn(2, 2 * ROWS + 5, 4)
    kept = x.clone()
    with torch.no_grad():
        blocks = module(x)
    whole = module(x)  # with gradient: one block
    assert_close(blocks, whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(x, kept)
    weights = {"f." + k: v for k, v in module.state_dict().items()}
    assert_close(whole[1, 7], by_hand.ffn(weights, "f", x[1, 7]))


def test_gelu_is_an_option_and_others_are_errors():
    module = BlockwiseFeedForward(4, 6, activation="gelu")
    x = torch.randn(1, 3, 4)
    assert_close(module(x), module.contract(nn.functional.gelu(module.expand(x))))
    with pytest.raises((ValueError, TypeError), match="activation"):
        BlockwiseFeedForward(4, 6, activation="swish")  # type: ignore[arg-type]


def test_mlp_by_hand_and_zero_start():
    module = randomised(Mlp(3, 5, 5, 2))
    x = torch.randn(4, 3)
    weights = {"m." + k: v for k, v in module.state_dict().items()}
    assert_close(module(x), torch.stack([by_hand.mlp(weights, "m", row) for row in x]))
    module.start_at_zero()
    assert (module(x) == 0).all()
    assert (module[0].weight != 0).any()
