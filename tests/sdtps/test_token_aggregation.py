"""Token aggregation against eq. 4 in slow loops, its masks, its limits and properties, and its hand-written gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from plugins.sdtps.token_aggregation import TokenAggregation

B, K, C, N = 2, 6, 10, 12


def aggregation(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    module = TokenAggregation(C, N, **{"aggr_ratio": 0.5, "dim_ratio": 0.4, **options})
    with torch.no_grad():  # so that nothing hides behind a one or a zero
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.to(dtype)


def tokens(seed=1, dtype=torch.float32, k=K):
    torch.manual_seed(seed)
    return torch.randn(B, k, C, dtype=dtype, requires_grad=True)


def by_hand(module, tokens, mask=None):
    """Eq. 4, one scalar at a time; `mask` (b, k) multiplies the exponentials."""
    norm, first, _, last = module.weight
    out = []
    for b, sample in enumerate(tokens.tolist()):
        logits = []
        for v in sample:
            mean = sum(v) / len(v)
            var = sum((x - mean) ** 2 for x in v) / len(v)
            normed = [(x - mean) / math.sqrt(var + 1e-5) * w + s for x, w, s in zip(v, norm.weight.tolist(), norm.bias.tolist())]
            hidden = []
            for row, bias in zip(first.weight.tolist(), first.bias.tolist()):
                h = sum(w * x for w, x in zip(row, normed)) + bias
                hidden.append(0.5 * h * (1 + math.erf(h / math.sqrt(2))))
            logits.append(
                [
                    module.scale.item() * (sum(w * h for w, h in zip(row, hidden)) + bias)
                    for row, bias in zip(last.weight.tolist(), last.bias.tolist())
                ]
            )
        rows = []
        for t in range(len(logits[0])):
            weights = [math.exp(logits[i][t]) * (1 if mask is None else mask[b][i].item()) for i in range(len(sample))]
            rows.append([sum(w * v[c] for w, v in zip(weights, sample)) / sum(weights) for c in range(len(sample[0]))])
        out.append(rows)
    return torch.tensor(out)


@pytest.mark.parametrize("grad", [True, False])
def test_matches_equation_4(grad):
    module, x = aggregation(), tokens()
    with torch.set_grad_enabled(grad):
        assert_close(module(x), by_hand(module, x), atol=1e-5, rtol=1e-4)


def test_published_parameter_counts():
    assert sum(p.numel() for p in TokenAggregation(512, 128).parameters()) == 55_926
    assert TokenAggregation(512, 128).num_out == 25
    assert TokenAggregation(512, 196).num_out == 39
    assert TokenAggregation(512, 128, 0.7, 0.5).num_out == 44


def test_gradient_is_the_derivative():
    module, x = aggregation(dtype=torch.float64), tokens(dtype=torch.float64)
    names, weights = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in module.named_parameters()])
    assert torch.autograd.gradcheck(
        lambda x, *w: torch.func.functional_call(module, dict(zip(names, w)), (x,)), (x, *weights), eps=1e-6, atol=1e-6
    )


# --- masks ----------------------------------------------------------------------------------------------------------


def test_log_mask_weighs_by_the_mask():
    module, x, mask = aggregation(), tokens(), torch.rand(B, K)
    assert_close(module(x, mask), by_hand(module, x, mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["log", "additive"])
def test_a_masked_token_might_as_well_be_absent(mode):
    module, x = aggregation(mask_mode=mode), tokens()
    mask = torch.ones(B, K)
    mask[:, 4:] = 0
    assert_close(module(x, mask), module(x[:, :4]))


def test_a_mask_of_ones_changes_no_value_and_the_penalty_multiplies_its_gradient():
    x, grads = tokens(), {}
    for mode in ("log", "additive", "none"):
        module, mask = aggregation(mask_mode=mode), torch.ones(B, K, requires_grad=True)
        out = module(x, mask)
        assert_close(out, module(x), rtol=0, atol=1e-6)
        out.square().sum().backward()
        grads[mode] = mask.grad
    assert grads["none"] is None
    assert grads["log"].norm() < 1e2
    assert_close(grads["additive"], 1e10 * grads["log"], rtol=1e-3, atol=1e4)


@pytest.mark.parametrize("mode", ["log", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fully_masked_samples_are_finite_in_any_precision(mode, dtype):
    module, x = aggregation(mask_mode=mode, dtype=dtype), tokens(dtype=dtype)
    mask = torch.tensor([[0.0] * K, [1.0] * (K - 1) + [0.0]], dtype=dtype, requires_grad=True)
    out = module(x, mask)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(mask.grad.float()).all() or (mode, dtype) == ("additive", torch.float16)  # 1e10 is no float16


# --- limits and properties ------------------------------------------------------------------------------------------


def test_zero_scale_is_the_mean():
    module, x = aggregation(), tokens()
    with torch.no_grad():
        module.scale.zero_()
    assert_close(module(x), x.mean(1, keepdim=True).expand(-1, module.num_out, -1))


@given(k=st.integers(1, 9), seed=st.integers(0, 99))
def test_outputs_are_convex_combinations_whatever_the_order(k, seed):
    module, x = aggregation(seed), tokens(seed + 1, k=k)
    out = module(x)
    assert out.shape == (B, 3, C)
    assert (out <= x.amax(1, keepdim=True) + 1e-5).all()
    assert (out >= x.amin(1, keepdim=True) - 1e-5).all()
    assert_close(module(x[:, torch.randperm(k)]), out, atol=1e-5, rtol=1e-4)
    assert_close(module(x[:1]), out[:1], atol=1e-6, rtol=1e-5)


def test_equal_tokens_stay():
    module, one = aggregation(), torch.randn(B, 1, C)
    assert_close(module(one.expand(-1, K, -1)), one.expand(-1, 3, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggr_ratio": 0.0}, "aggr_ratio must be in"),
        ({"sparse_ratio": -1.0}, "sparse_ratio must be in"),
        ({"aggr_ratio": 0.1, "sparse_ratio": 0.1}, "leave 0 tokens"),
        ({"dim_ratio": 0.01}, "leaves 0 hidden"),
        ({"mask_penalty": 1e4}, "mask_penalty = 10000.0 would have no effect"),
        ({"mask_mode": "none", "mask_penalty": 1e4}, "mask_penalty"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        aggregation(**options)
