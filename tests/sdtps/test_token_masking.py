"""Adaptive masking against its formulas in slow loops, published counts, options, and keys."""

import math

import pytest
import torch
from torch.testing import assert_close

from plugins.sdtps.adaptive_masking import AdaptiveMasking, AdaptiveMaskingKeys

MODALITIES = ("rgb", "nir", "tir")
B, N, C = 2, 6, 8


def masking(seed=0, **options):
    torch.manual_seed(seed)
    module = AdaptiveMasking(C, N, sparse_ratio=options.pop("sparse_ratio", 0.6), **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def inputs(seed=1):
    torch.manual_seed(seed)
    patches = {m: torch.randn(B, N, C, requires_grad=True) for m in MODALITIES}
    return patches, {m: torch.randn(B, C, requires_grad=True) for m in MODALITIES}


def scores_by_hand(module, patches, guides, name, b):
    """Scores of one sample of one modality, token by token, in float64."""
    weights = module.weights[name](torch.cat([guides[m] for m in MODALITIES], -1))[b].tolist()
    total = [0.0] * N
    for w, guide in zip(weights, [name, *(m for m in MODALITIES if m != name)]):
        g = guides[guide][b].double()
        values = []
        for i in range(N):
            v = patches[name][b, i].double()
            cosine = float(v @ g / (v.norm() * g.norm()))
            if module.maps == "attention":
                layer = module.attention[f"{name}_by_{guide}"].double()
                cosine = float(layer.q_proj(g) @ layer.k_proj(v)) / math.sqrt(C) + cosine / 0.3
                module.float()
            values.append(cosine)
        if module.maps == "attention":
            top = sum(math.exp(v) for v in values)
            values = [math.exp(v) / top for v in values]
        mean = sum(values) / N
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (N - 1))
        total = [t + w / (1 + math.exp(-(v - mean) / (std + 1e-5))) for t, v in zip(total, values)]
    return total


@pytest.mark.parametrize("maps", ["attention", "cosine"])
def test_soft_mask_by_hand(maps):
    module, (patches, guides) = masking(maps=maps), inputs()
    with torch.no_grad():
        got = module(patches, guides)
        for name in MODALITIES:
            for b in range(B):
                scores = scores_by_hand(module, patches, guides, name, b)
                place = (1 - 0.6) * (N - 1)
                low, high = sorted(scores)[math.floor(place)], sorted(scores)[math.ceil(place)]
                threshold = low + (place - math.floor(place)) * (high - low)
                expected = [1 / (1 + math.exp(-(s - threshold) / 0.3)) for s in scores]
                assert got.masks[name][b].tolist() == pytest.approx(expected, abs=1e-5)
            assert_close(got.tokens[name], patches[name] * got.masks[name][..., None])
            assert got.kept[name].shape == (B, 0)


@pytest.mark.parametrize(
    ("options", "count"), [({}, 5_959_689), ({"share_attention": True}, 2_807_817), ({"maps": "cosine"}, 1_231_881)]
)
def test_published_parameter_counts(options, count):
    with torch.device("meta"):
        module = AdaptiveMasking(**options)
    assert sum(p.numel() for p in module.parameters()) == count
    assert module.num_out == 128


def test_guides_weigh_the_same_at_the_start():
    module, (_, guides) = AdaptiveMasking(C, N).eval(), inputs()
    weights = module.weights["nir"](torch.cat(list(guides.values()), -1))
    assert_close(weights, torch.full((B, 3), 1 / 3))


def test_the_soft_mask_drops_nothing():
    module = AdaptiveMasking(64, 128).eval()
    torch.manual_seed(2)
    patches = {m: torch.randn(4, 128, 64) for m in MODALITIES}
    masks = torch.cat(list(module(patches, {m: torch.randn(4, 64) for m in MODALITIES}).masks.values()))
    assert masks.min() > 0.2
    assert masks.max() < 0.9
    assert ((masks > 0.5).float().mean(-1) - 0.7).abs().max() < 0.02  # above one half: the share rho


def test_hard_mask_and_its_noise():
    module, (patches, guides) = masking(mask="hard", use_gumbel=True), inputs()
    got = module(patches, guides)
    assert all(mask.sum(-1).tolist() == [4.0, 4.0] for mask in got.masks.values())
    assert torch.equal(got.tokens["tir"], patches["tir"] * got.masks["tir"][..., None])
    assert not got.masks["rgb"].requires_grad
    noisy = module.train()(patches, guides, {m: torch.rand(B, N) for m in MODALITIES})
    assert torch.equal(noisy.masks["rgb"].detach().sum(-1), torch.tensor([4.0, 4.0]))
    (noisy.masks["rgb"] * torch.arange(N)).sum().backward()
    assert module.attention["rgb_by_nir"].q_proj.weight.grad.norm() > 0


def test_shared_attention_uses_one_projection_for_all_guides():
    module, (patches, guides) = masking(share_attention=True), inputs()
    assert set(module.attention) == {"rgb_by_rgb", "nir_by_nir", "tir_by_tir"}
    module(patches, guides).tokens["rgb"].sum().backward()
    assert all(module.attention["rgb_by_rgb"].q_proj.weight.grad.abs().sum(1) > 0)


@pytest.mark.parametrize("prefix", ["", "sdtps."])
def test_reference_keys_both_ways(prefix):
    state, keys = masking().state_dict(), AdaptiveMaskingKeys(prefix)
    theirs = keys.to_reference(state)
    for key in ("rgb_self_attn.q_proj.weight", "nir_cross_tir.k_proj.bias", "tir_sparse.modal_weight_mlp.6.weight"):
        assert prefix + key in theirs
    assert set(keys.from_reference(theirs)) == set(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_gumbel": True}, "use_gumbel = True would have no effect"),
        ({"gumbel_tau": 2.0}, "gumbel_tau"),
        ({"maps": "cosine", "share_attention": True}, "share_attention"),
        ({"mask": "hard", "mask_tau": 0.5}, "mask_tau"),
        ({"score_norm": "none", "score_eps": 1e-3}, "score_eps"),
        ({"mask_tau": 0.0}, "mask_tau must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        masking(**options)


@pytest.mark.parametrize("options", [{}, {"maps": "cosine"}, {"mask": "hard", "use_gumbel": True}, {"score_norm": "none"}])
def test_half_precision_modules_run(options):
    patches, guides = inputs()
    halves = [{m: v.bfloat16() for m, v in side.items()} for side in (patches, guides)]
    tokens = masking(**options).bfloat16().train()(*halves).tokens
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in tokens.values())
