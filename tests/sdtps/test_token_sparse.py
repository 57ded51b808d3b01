"""Token selection against eq. 1-3 in slow loops, its limits and gradients, every option, and its hand-written gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from plugins.sdtps.token_sparse import (
    TokenSparse,
    attention_maps,
    gumbel_noise,
    normalise,
    ratio_loss,
    relaxed_topk,
    token_count,
)

B, N, C = 2, 7, 8


def sparse(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return TokenSparse(C, **options).to(dtype)


def inputs(seed=1, n=N, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.randn(B, n, C, dtype=dtype, requires_grad=True), torch.randn(B, 3, n, dtype=dtype)


def erf_gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def by_hand(module, patches, maps):
    """Eq. 1-3 and the extra token, one scalar at a time. Returns kept tokens, extra, positions and scores by sample."""
    first, last = module.score_predictor[0], module.score_predictor[2]
    kept_all, extra_all, order_all, score_all = [], [], [], []
    for tokens, sample_maps in zip(patches.tolist(), maps.tolist()):
        scores = []
        for i, v in enumerate(tokens):
            hidden = [
                erf_gelu(sum(w * x for w, x in zip(row, v)) + bias) for row, bias in zip(first.weight.tolist(), first.bias.tolist())
            ]
            z = sum(w * h for w, h in zip(last.weight[0].tolist(), hidden)) + last.bias.item()
            attention = 0.0
            for g, values in enumerate(sample_maps):
                low, high = min(values), max(values)
                attention += (2 if g == 0 else 1) * module.beta * (values[i] - low) / (high - low + 1e-8)
            scores.append((1 - 2 * module.beta) / (1 + math.exp(-z)) + attention)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        k = max(1, math.ceil(len(scores) * module.sparse_ratio))
        total = sum(math.exp(scores[i]) for i in order[k:])
        extra = [sum(math.exp(scores[i]) / total * tokens[i][c] for i in order[k:]) for c in range(len(tokens[0]))]
        kept_all.append([tokens[i] for i in order[:k]])
        extra_all.append([extra])
        order_all.append(order[:k])
        score_all.append(scores)
    return map(torch.tensor, (kept_all, extra_all, order_all, score_all))


# --- equations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.4])
@pytest.mark.parametrize("grad", [True, False])
def test_matches_equations_1_to_3(beta, grad):
    module, (patches, maps) = sparse(beta=beta), inputs()
    with torch.set_grad_enabled(grad):
        got = module(patches, maps)
    kept, extra, order, scores = by_hand(module, patches, maps)
    assert_close(got.tokens, kept)
    assert_close(got.extra, extra)
    assert_close(got.kept, order)
    assert_close(got.scores, scores)
    assert_close(got.mask, torch.zeros(B, N).scatter_(1, order, 1.0))
    assert got.kept_mask is None


def test_cosine_maps_by_hand():
    patches, guides = torch.randn(B, N, C), torch.randn(B, 2, C)
    patches[0, 0] = 0  # a token without direction: cosine 0
    maps = attention_maps(patches, guides)
    for b in range(B):
        for g in range(2):
            for i in range(N):
                v, w = patches[b, i].double(), guides[b, g].double()
                expected = (v @ w) / max(v.norm() * w.norm(), 1e-12)
                assert maps[b, g, i].item() == pytest.approx(expected.item(), abs=1e-6)
    assert_close(attention_maps(patches, guides, "dot")[1, 1, 3], patches[1, 3] @ guides[1, 1] / C)


@pytest.mark.parametrize(("how", "constant"), [("minmax", 0.0), ("zscore", 0.5), ("none", 3.0)])
def test_constant_maps_are_finite_in_value_and_gradient(how, constant):
    maps = torch.full((1, 2, 5), 3.0, requires_grad=True)
    got = normalise(maps, how, 1e-8)
    got.sum().backward()
    assert_close(got, torch.full_like(got, constant))
    assert torch.isfinite(maps.grad).all()
    assert_close(normalise(maps[..., :1], how, 1e-8), torch.full((1, 2, 1), constant))


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=8))
def test_normalised_maps_keep_order_and_range(values):
    maps = torch.tensor([sorted(values)])
    for how in ("minmax", "zscore"):
        got = normalise(maps, how, 1e-6)
        assert ((got >= 0) & (got <= 1)).all()
        assert (got.diff() >= 0).all()
    if values[0] != values[1]:
        assert (
            normalise(torch.tensor([values]), "minmax", 1e-9).amax() == pytest.approx(1, abs=1e-2)
            or max(values) - min(values) < 1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_even_for_constant_maps(dtype):
    module = sparse().to(dtype)
    patches, _ = inputs(dtype=dtype)
    got = module(patches, torch.full((B, 3, N), 0.3, dtype=dtype))
    assert torch.isfinite(got.tokens).all()
    assert torch.isfinite(got.extra).all()
    assert got.tokens.dtype == got.extra.dtype == dtype
    (got.tokens.sum() + got.extra.sum()).backward()
    assert torch.isfinite(patches.grad).all()


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rho", "alpha", "kept", "aggregated"),
    [
        (128, 0.5, 0.4, 64, 25),
        (196, 0.5, 0.4, 98, 39),
        (576, 0.5, 0.4, 288, 115),
        (49, 0.8, 0.6, 40, 23),
        (144, 0.8, 0.6, 116, 69),
        (128, 0.7, 0.5, 90, 44),
    ],
)
def test_published_token_counts(n, rho, alpha, kept, aggregated):
    assert sparse(sparse_ratio=rho).kept_count(n) == kept
    assert token_count(n, alpha, rho, rounding="floor") == aggregated
    assert token_count(n, rho, rounding="exact_ceil") == kept
    assert token_count(n, alpha, rho, rounding="exact_floor") == aggregated


def test_float_hazards_of_the_release_and_their_cure():
    assert token_count(100, 0.55, rounding="ceil") == 56
    assert token_count(100, 0.55, rounding="exact_ceil") == 55
    assert token_count(200, 0.9, 0.7, rounding="floor") == 125
    assert token_count(200, 0.9, 0.7, rounding="exact_floor") == 126
    assert sparse(sparse_ratio=0.01).kept_count(10) == 1
    assert sparse(sparse_ratio=0.01, round_select="floor").kept_count(10) == 1


# --- limits ---------------------------------------------------------------------------------------------------------


def test_keeping_everything_leaves_a_zero_extra_token():
    module, (patches, maps) = sparse(sparse_ratio=1.0), inputs()
    got = module(patches, maps)
    assert got.tokens.shape == (B, N, C)
    assert torch.equal(got.extra, torch.zeros(B, 1, C))
    (got.tokens.sum() + got.extra.sum()).backward()
    assert_close(patches.grad, torch.ones_like(patches))


@pytest.mark.parametrize("extra_mode", ["softmax", "uniform", "uniform_in_training"])
def test_a_relaxed_selection_of_everything_leaves_a_zero_extra_token_too(extra_mode):
    module, (patches, maps) = sparse(sparse_ratio=1.0, selection="relaxed", gumbel_tau=0.01, extra_mode=extra_mode), inputs()
    chosen = module.train()(patches, maps)
    assert (chosen.extra == 0).all()
    chosen.tokens.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_beta_one_half_is_selection_by_attention_alone():
    module, (patches, maps) = sparse(beta=0.5), inputs()
    got = module(patches, maps)
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    normed = (maps - low) / (high - low + 1e-8)
    assert_close(got.scores, 0.5 * (2 * normed[:, 0] + normed[:, 1] + normed[:, 2]))
    got.extra.square().sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@pytest.mark.parametrize(("score", "reduce"), [("sum", torch.sum), ("mean", torch.mean)])
def test_released_scores_without_predictor(score, reduce):
    module, (patches, maps) = sparse(score=score, score_norm="none"), inputs()
    assert not list(module.parameters())
    assert_close(module(patches, maps).scores, reduce(maps, 1))


def test_a_cold_extra_token_is_the_best_dropped_one():
    module, (patches, maps) = sparse(extra_tau=1e-4), inputs()
    got = module(patches, maps)
    best_dropped = got.scores.argsort(descending=True)[:, got.kept.shape[1]]
    assert_close(got.extra[:, 0], patches[torch.arange(B), best_dropped])


def test_uniform_and_absent_extra_token():
    patches, maps = inputs()
    got = sparse(extra_mode="uniform")(patches, maps)
    for b in range(B):
        assert_close(got.extra[b, 0], patches[b][got.mask[b] == 0].mean(0))
    assert sparse(extra_mode="none")(patches, maps).extra is None


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradient_is_the_derivative():
    module = sparse(dtype=torch.float64)
    patches, maps = inputs(dtype=torch.float64)
    maps.requires_grad_()

    def function(patches, maps):
        got = module(patches, maps)
        return got.tokens, got.extra

    assert torch.autograd.gradcheck(function, (patches, maps), eps=1e-7, atol=1e-6)


def test_predictor_learns_through_the_extra_token_only():
    module, (patches, maps) = sparse(), inputs()
    got = module(patches, maps)
    got.tokens.square().sum().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    got.extra.square().sum().backward()
    assert all(p.grad.any() for p in module.parameters())


def test_kept_tokens_get_their_own_gradient_and_no_more():
    module, (patches, maps) = sparse(), inputs()
    got = module(patches, maps)
    (got.tokens.sum() + got.extra.square().sum()).backward()
    kept = got.mask.bool()
    assert torch.equal(patches.grad[kept], torch.ones_like(patches.grad[kept]))


# --- Gumbel noise and masks -----------------------------------------------------------------------------------------


def test_noise_formula_range_and_clip():
    uniform = torch.tensor([[0.0, 0.25, 0.5, 1 - 2**-24]])
    noise = gumbel_noise(uniform, 1e-9, None)
    assert_close(noise[0, 1], torch.tensor(-math.log(-math.log(0.25))))
    assert noise.min() == pytest.approx(-3.031, abs=1e-3)
    assert noise.max() == pytest.approx(16.62, abs=0.02)
    assert gumbel_noise(uniform, 1e-9, 5.0).max() == 5.0
    assert torch.isfinite(gumbel_noise(torch.rand(1000, 100), 1e-9, None)).all()


@pytest.mark.parametrize("relaxation", ["softmax", "sigmoid", "k_softmax"])
def test_straight_through_mask_is_hard_in_value_and_soft_in_gradient(relaxation):
    module, (patches, maps) = sparse(use_gumbel=True, relaxation=relaxation, gumbel_tau=0.7), inputs()
    uniform = torch.rand(B, N)
    got = module(patches, maps, uniform)
    assert torch.equal(got.mask.detach(), torch.zeros(B, N).scatter_(1, got.kept, 1.0))
    assert torch.equal(got.kept_mask.detach(), torch.ones_like(got.kept_mask))

    scores = got.scores.clone().requires_grad_()
    perturbed = scores + gumbel_noise(uniform, 1e-9, None)
    k = got.kept.shape[1]
    ranked = got.scores.sort(descending=True).values
    soft = {
        "softmax": (perturbed / 0.7).softmax(-1),
        "k_softmax": k * (perturbed / 0.7).softmax(-1),
        "sigmoid": ((perturbed - ranked[:, k - 1 : k + 1].mean(-1, keepdim=True)) / 0.7).sigmoid(),
    }[relaxation]
    weight = torch.randn(B, N)
    (expected,) = torch.autograd.grad((soft * weight).sum(), scores)
    bias = module.score_predictor[2].bias
    (to_bias,) = torch.autograd.grad((got.mask * weight).sum(), bias)
    predicted = (got.scores - module.attend(maps)) / (1 - 2 * module.beta)
    assert_close(to_bias, (expected * (1 - 2 * module.beta) * predicted * (1 - predicted)).sum().view(1), rtol=1e-4, atol=1e-7)


def test_noise_leaves_the_kept_tokens_alone_unless_asked():
    patches, maps = inputs(n=40)
    calm, noisy = sparse()(patches, maps), sparse(use_gumbel=True)(patches, maps)
    assert torch.equal(calm.kept, noisy.kept)
    assert torch.equal(calm.tokens, noisy.tokens)
    assert not torch.equal(sparse(use_gumbel=True, noisy_topk=True)(patches, maps).kept, calm.kept)


def test_noise_in_evaluation_is_a_choice():
    patches, maps = inputs()
    module = sparse(use_gumbel=True).eval()
    assert not module(patches, maps).mask.requires_grad
    module = sparse(use_gumbel=True, gumbel_train_only=False).eval()
    assert module(patches, maps).mask.requires_grad
    with pytest.raises(ValueError, match="no Gumbel noise is drawn"):
        sparse(use_gumbel=True).eval()(patches, maps, torch.rand(B, N))


def test_one_uniform_draw_gives_one_gradient():
    grads = []
    for _ in range(2):
        module, (patches, maps) = sparse(use_gumbel=True), inputs()
        torch.manual_seed(9)
        (module(patches, maps).mask * torch.arange(N)).sum().backward()
        grads.append(patches.grad)
    assert torch.equal(*grads)
    assert grads[0].any()


def test_plan_b_is_hard_forward_and_soft_backward():
    patches, maps = inputs()
    hard, straight = sparse(), sparse(use_gumbel=True, weight_selected=True)
    uniform = torch.rand(B, N)
    assert torch.equal(hard(patches, maps).tokens, straight(patches, maps, uniform).tokens)
    straight(patches, maps, uniform).tokens.square().sum().backward()
    norm = straight.score_predictor[0].weight.grad.norm()
    assert 1e-6 < norm < 1e2


def test_plan_b_as_released_pools_differently_in_training_and_evaluation():
    patches, maps = inputs()
    released = sparse(use_gumbel=True, weight_selected=True, extra_mode="uniform_in_training")
    mended = sparse(use_gumbel=True, weight_selected=True)
    gaps = [(m.train()(patches, maps).extra - m.eval()(patches, maps).extra).abs().max() for m in (released, mended)]
    assert gaps[0] > 1e-3
    assert gaps[1] < 1e-6


def test_in_place_keeps_all_tokens_and_zeroes_the_dropped():
    module, (patches, maps) = sparse(score="mean", selection="in_place", extra_mode="none"), inputs()
    got = module(patches, maps)
    assert torch.equal(got.tokens, patches * got.mask[..., None])
    assert got.extra is None
    assert got.mask.sum(-1).tolist() == [4.0, 4.0]


# --- plan A ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suppression", ["hard", "soft"])
def test_relaxed_topk_by_hand(suppression):
    scores, tau = torch.tensor([[0.3, 0.9, 0.5, 0.1]], dtype=torch.float64), 0.4
    rows, left = relaxed_topk(scores, 3, tau, suppression)
    remaining, taken = [1.0] * 4, []
    for j in range(3):
        unnormalised = [math.exp(s / tau) for s in scores[0].tolist()]
        if suppression == "hard":
            unnormalised = [0.0 if i in taken else u for i, u in enumerate(unnormalised)]
            taken.append(max(range(4), key=lambda i: unnormalised[i]))
        else:
            unnormalised = [u * r ** (1 / tau) for u, r in zip(unnormalised, remaining)]
        row = [u / sum(unnormalised) for u in unnormalised]
        assert rows[0, j].tolist() == pytest.approx(row)
        remaining = [r * (1 - p) for r, p in zip(remaining, row)]
    assert left.exp()[0].tolist() == pytest.approx(remaining)
    assert_close(rows.sum(-1), torch.ones(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("suppression", ["hard", "soft"])
def test_relaxed_topk_tends_to_the_hard_one(suppression):
    torch.manual_seed(3)
    scores = torch.stack([torch.randperm(9) / 9.0 for _ in range(4)])
    rows, left = relaxed_topk(scores, 5, 1e-3, suppression)
    hard = torch.nn.functional.one_hot(scores.argsort(descending=True)[:, :5], 9).float()
    assert_close(rows, hard, atol=1e-4, rtol=0)
    assert_close(-torch.expm1(left), hard.sum(1), atol=1e-4, rtol=0)


def test_plan_a_gap_between_training_and_evaluation_shrinks_with_temperature():
    patches, maps = inputs(n=40)
    gaps = []
    for tau in (1.0, 0.1, 1e-2, 1e-3, 1e-6):
        module = sparse(selection="relaxed", gumbel_tau=tau)
        soft, hard = module.train()(patches, maps), module.eval()(patches, maps)
        assert soft.tokens.shape == hard.tokens.shape
        gaps.append(((soft.tokens - hard.tokens).norm() / hard.tokens.norm()).item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.9
    assert gaps[-1] < 1e-3
    assert_close(soft.extra, hard.extra, atol=1e-4, rtol=1e-3)
    assert_close(soft.mask, hard.mask, atol=1e-4, rtol=1e-3)


def test_plan_a_reaches_every_token_and_the_predictor():
    module, (patches, maps) = sparse(selection="relaxed", gumbel_tau=0.5), inputs()
    got = module(patches, maps)
    got.tokens.square().sum().backward()
    assert (patches.grad.abs().sum(-1) > 0).all()
    assert module.score_predictor[0].weight.grad.norm() > 1e-4
    assert got.mask.requires_grad
    noisy = sparse(selection="relaxed", gumbel_tau=0.5, use_gumbel=True)
    assert not torch.equal(noisy(patches, maps).tokens, got.tokens)


@pytest.mark.parametrize("suppression", ["hard", "soft"])
def test_plan_a_is_finite_where_scores_are_far_apart(suppression):
    scores = torch.tensor([[0.0, 50.0, 100.0, -80.0]], requires_grad=True)
    rows, left = relaxed_topk(scores, 4, 0.01, suppression)
    (rows.square().sum() + left.sum()).backward()
    assert torch.isfinite(rows).all()
    assert torch.isfinite(scores.grad).all()


# --- ratio loss -----------------------------------------------------------------------------------------------------


def test_ratio_loss_value_gradient_and_refusal():
    module, (patches, maps) = sparse(use_gumbel=True, relaxation="sigmoid"), inputs()
    mask = module(patches, maps).mask
    loss = ratio_loss([mask, mask], 0.5)
    assert loss.item() == pytest.approx((0.5 - 4 / 7) ** 2)
    loss.backward()
    assert module.score_predictor[2].bias.grad.abs() > 1e-6
    assert ratio_loss([mask, mask], 0.5, [1.0, 1.0]).item() == pytest.approx((0.5 - 8 / 7) ** 2)
    with pytest.raises(ValueError, match="use_gumbel"):
        ratio_loss([sparse()(patches, maps).mask], 0.5)


def test_ratio_loss_cannot_move_a_softmax_mask():
    module, (patches, maps) = sparse(use_gumbel=True), inputs()
    ratio_loss([module(patches, maps).mask], 0.3).backward()
    assert module.score_predictor[2].bias.grad.abs() < 1e-8


def test_the_soft_part_of_a_mask_is_what_a_ratio_can_move():
    for options in ({"use_gumbel": True, "relaxation": "sigmoid"}, {"selection": "relaxed"}):
        module, (patches, maps) = sparse(**options), inputs()
        chosen = module(patches, maps)
        assert module.ratio_moves
        assert ((chosen.soft > 0) & (chosen.soft < 1)).any()
        ratio_loss([chosen.soft], 0.1).backward()
        assert module.score_predictor[2].bias.grad.abs() + module.score_predictor[0].weight.grad.norm() > 1e-6
    straight = sparse(use_gumbel=True, relaxation="sigmoid")
    mask = straight(patches, maps).mask
    ratio_loss([mask], mask.detach().mean().item()).backward()
    assert straight.score_predictor[2].bias.grad.abs() < 1e-6  # a top-k's mean is k/n whatever the scores
    assert sparse()(patches, maps).soft is None
    assert not sparse().ratio_moves
    assert not sparse(use_gumbel=True).ratio_moves


# --- properties -----------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 12), ratio=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_kept_set_and_extra_ignore_the_order_of_tokens(n, ratio, seed):
    module = sparse(seed, sparse_ratio=ratio)
    patches, maps = inputs(seed + 1, n)
    order = torch.randperm(n)
    straight, shuffled = module(patches, maps), module(patches[:, order], maps[:, :, order])
    assert_close(shuffled.tokens, straight.tokens)
    assert_close(shuffled.extra, straight.extra, atol=1e-5, rtol=1e-4)
    assert_close(shuffled.mask, straight.mask[:, order])
    assert straight.tokens.shape[1] == module.kept_count(n) == straight.mask[0].sum()


@given(seed=st.integers(0, 99), selection=st.sampled_from(["hard", "relaxed"]))
def test_samples_do_not_see_each_other(seed, selection):
    module = sparse(seed, selection=selection)
    patches, maps = inputs(seed + 1)
    both, alone = module(patches, maps), module(patches[:1], maps[:1])
    assert_close(both.tokens[:1], alone.tokens)
    assert_close(both.extra[:1], alone.extra)


@given(scale=st.floats(0.1, 10), shift=st.floats(-2, 2))
def test_selection_ignores_the_maps_scale_and_offset(scale, shift):
    module, (patches, maps) = sparse(), inputs()
    assert_close(module(patches, scale * maps + shift).scores, module(patches, maps).scores, atol=1e-4, rtol=0)


# --- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_ratio": 0.0}, r"sparse_ratio must be in \(0, 1\]"),
        ({"sparse_ratio": 1.5}, r"sparse_ratio must be in \(0, 1\]"),
        ({"beta": 0.6}, "beta must be in"),
        ({"gumbel_tau": 0.5}, "gumbel_tau = 0.5 would have no effect, because use_gumbel = False"),
        ({"noisy_topk": True}, "noisy_topk"),
        ({"relaxation": "sigmoid"}, "relaxation"),
        ({"weight_selected": True}, "weight_selected"),
        ({"gumbel_clip": 5.0}, "gumbel_clip"),
        ({"gumbel_train_only": False}, "gumbel_train_only"),
        ({"score": "mean", "beta": 0.1}, "beta = 0.1 would have no effect"),
        ({"score_norm": "none", "score_eps": 1e-5}, "score_eps"),
        ({"extra_mode": "uniform", "extra_tau": 2.0}, "extra_tau"),
        ({"selection": "in_place"}, "extra_mode = 'none'"),
        ({"selection": "relaxed", "use_gumbel": True, "noisy_topk": True}, "noisy_topk"),
        ({"suppression": "soft"}, "suppression"),
        ({"use_gumbel": True, "gumbel_tau": 0.0}, "gumbel_tau must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSparse(C, **options)


def test_tau_alone_is_an_option_of_the_relaxed_selection():
    assert TokenSparse(C, selection="relaxed", gumbel_tau=0.3).gumbel_tau == 0.3
