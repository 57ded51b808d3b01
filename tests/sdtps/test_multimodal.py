"""The tri-modal module: published counts, gradient facts, every named variant, checkpoint keys, and what must be refused."""

import functools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core.options import require_choice
from plugins.sdtps.multimodal import MultiModalSDTPS, ReferenceKeys, check_inputs
from plugins.sdtps.token_aggregation import TokenAggregation
from plugins.sdtps.token_sparse import TokenSparse, attention_maps

MODALITIES = ("rgb", "nir", "tir")
B, N, C = 2, 20, 32


def inputs(seed=1, b=B, n=N, c=C, modalities=MODALITIES):
    torch.manual_seed(seed)
    patches = {m: torch.randn(b, n, c, requires_grad=True) for m in modalities}
    return patches, {m: torch.randn(b, c, requires_grad=True) for m in modalities}


def build(seed=0, sparse=None, aggregate=(), **options):
    torch.manual_seed(seed)
    combine = None if aggregate is None else functools.partial(TokenAggregation, **dict(aggregate))
    return MultiModalSDTPS(C, N, sparse=functools.partial(TokenSparse, **(sparse or {})), aggregate=combine, **options)


def probe(enhanced):
    """The loss all gradient figures refer to: mean square of the concatenated mean-pooled outputs."""
    return torch.cat([tokens.mean(1) for tokens in enhanced.tokens.values()], -1).square().mean()


def predictor_gradient(module):
    grads = [p.grad for s in module.selectors if s.score_predictor is not None for p in s.score_predictor.parameters()]
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))


# The variants of the notes, by name: options of the selection, of the aggregation (None: none), and of the module.
VARIANTS = {
    "paper": (
        {"use_gumbel": True, "relaxation": "sigmoid"},
        {"mask_mode": "log"},
        {"similarity": "dot", "guide": "mean_patch", "attention_no_grad": False},
    ),
    "open source": ({"score": "sum", "score_norm": "none"}, {"mask_mode": "none"}, {"guide": "mean_patch"}),
    "annotated": ({"use_gumbel": True}, {"mask_mode": "none"}, {"attention_no_grad": False}),
    "before the note": (
        {"sparse_ratio": 0.6, "use_gumbel": True, "gumbel_train_only": False},
        None,
        {"attention_no_grad": False},
    ),
    "plan A": ({"selection": "relaxed"}, None, {}),
    "plan B": (
        {"use_gumbel": True, "weight_selected": True, "extra_mode": "uniform_in_training"},
        None,
        {"attention_no_grad": False},
    ),
    "final, as released": ({"use_gumbel": True}, {"mask_mode": "additive"}, {}),
    "final, with gradient": ({"use_gumbel": True}, {"mask_mode": "additive"}, {"attention_no_grad": False}),
    "final, clipped": (
        {"use_gumbel": True, "gumbel_clip": 5.0, "gumbel_tau": 5.0},
        {"mask_mode": "additive"},
        {"attention_no_grad": False},
    ),
    "final, hard": ({"sparse_ratio": 0.7}, {"aggr_ratio": 0.5}, {"attention_no_grad": False}),
    "in place": ({"score": "mean", "selection": "in_place", "extra_mode": "none"}, None, {"attention_no_grad": False}),
    "default with noise": ({"use_gumbel": True}, {}, {}),
    "default": ({}, {}, {}),
}
TOKENS_OUT = {"before the note": 13, "plan A": 11, "plan B": 11, "final, hard": 8, "in place": 20}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_evaluates(name):
    sparse, aggregate, options = VARIANTS[name]
    module, (patches, guides) = build(sparse=sparse, aggregate=aggregate, **options), inputs()
    enhanced = module.train()(patches, guides)
    probe(enhanced).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in patches.values())
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    out = module.eval()(patches, guides)
    for m in MODALITIES:
        assert enhanced.tokens[m].shape == out.tokens[m].shape == (B, TOKENS_OUT.get(name, 5), C)
        assert out.tokens[m].shape[1] == module.num_out
        assert out.masks[m].shape == (B, N)
        assert torch.equal(out.masks[m].sum(-1), torch.full((B,), float(out.kept[m].shape[1])))


def test_published_parameter_counts_and_shapes():
    module = MultiModalSDTPS()
    assert sum(p.numel() for p in module.parameters()) == 365_157
    assert sum(p.numel() for p in module.sparse["rgb"].parameters()) == 65_793
    bigger = MultiModalSDTPS(
        sparse=functools.partial(TokenSparse, sparse_ratio=0.7), aggregate=functools.partial(TokenAggregation, aggr_ratio=0.5)
    )
    assert sum(p.numel() for p in bigger.parameters()) == 371_028
    assert (module.num_out, bigger.num_out) == (26, 45)
    patches, guides = inputs(b=1, n=128, c=512)
    enhanced = module(patches, guides)
    assert {m: tuple(t.shape) for m, t in enhanced.tokens.items()} == dict.fromkeys(MODALITIES, (1, 26, 512))
    assert {m: tuple(t.shape) for m, t in enhanced.kept.items()} == dict.fromkeys(MODALITIES, (1, 64))
    assert set(module.state_dict()) == set(ReferenceKeys().from_reference(ReferenceKeys().to_reference(module.state_dict())))
    assert len(module.state_dict()) == 33


def test_is_its_parts_put_together():
    """Modality by modality, own guide first, no joint computation."""
    module, (patches, guides) = build(), inputs()
    with torch.no_grad():
        together = module(patches, guides)
        for m in MODALITIES:
            order = [m, *(o for o in MODALITIES if o != m)]
            maps = attention_maps(patches[m], torch.stack([guides[o] for o in order], 1))
            selection = module.sparse[m](patches[m], maps)
            expected = torch.cat([module.aggregate[m](selection.tokens), selection.extra], 1)
            assert_close(together.tokens[m], expected, rtol=0, atol=1e-6)
            assert torch.equal(together.masks[m], selection.mask)
            assert torch.equal(together.kept[m], selection.kept)


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(sparse=None, aggregate=(), seed=3, **options):
    torch.manual_seed(0)  # one set of weights for all variants
    module = MultiModalSDTPS(
        sparse=functools.partial(TokenSparse, **(sparse or {})),
        aggregate=functools.partial(TokenAggregation, **dict(aggregate)),
        **options,
    )
    patches, guides = inputs(seed, 8, 128, 512)
    torch.manual_seed(7)
    loss = probe(module(patches, guides))
    loss.backward()
    return loss.item(), predictor_gradient(module), patches, guides


def test_gradient_of_the_penalty_and_of_the_log_mask():
    """The release's penalty multiplies the scores' gradient by 1e10 and leaves the loss alone; the log mask does neither."""
    calm_loss, calm, _, _ = gradients()
    log_loss, log, _, _ = gradients({"use_gumbel": True})
    released_loss, released, patches, _ = gradients({"use_gumbel": True}, {"mask_mode": "additive"})
    _, tempered, _, _ = gradients({"use_gumbel": True, "gumbel_clip": 5.0, "gumbel_tau": 5.0}, {"mask_mode": "additive"})
    assert calm_loss == pytest.approx(log_loss, rel=1e-5) == pytest.approx(released_loss, rel=1e-5)
    assert 1e-6 < calm < 1e-3
    assert log < 3 * calm
    assert released > 1e8 * calm
    assert 1e6 * calm < tempered < released
    assert max(p.grad.norm().item() for p in patches.values()) > 1e2


def test_noise_is_inert_where_nothing_reads_the_mask():
    """The released code of SEPS: outputs and gradients are those without noise, to the last bit of the loss."""
    with_noise, without = gradients({"use_gumbel": True}, {"mask_mode": "none"}), gradients()
    assert with_noise[0] == pytest.approx(without[0], rel=1e-6)
    assert with_noise[1] == pytest.approx(without[1], rel=1e-3)


@pytest.mark.parametrize("no_grad", [True, False])
def test_guides_learn_only_if_asked(no_grad):
    _, _, _, guides = gradients(attention_no_grad=no_grad)
    norms = [0.0 if g.grad is None else g.grad.norm().item() for g in guides.values()]
    assert all(norm == 0 for norm in norms) if no_grad else all(1e-9 < norm < 1e-3 for norm in norms)


def test_a_mask_of_ones_is_no_mask():
    """The release always passes its hard mask on; the output with it and without it is the same."""
    module, (patches, guides) = build(aggregate={"mask_mode": "additive"}), inputs()
    for m, selection in module.choose(patches, guides).items():
        masked = module.aggregate[m](selection.tokens, selection.mask.gather(1, selection.kept))
        with torch.no_grad():
            assert torch.equal(masked.detach(), module.aggregate[m](selection.tokens))


# --- train and evaluation -------------------------------------------------------------------------------------------


def test_gap_between_training_and_evaluation():
    patches, guides = inputs()
    hard = build().train_evaluation_gap(patches, guides)
    assert all(gap < 1e-6 for gap in hard.values())
    module = build(sparse={"selection": "relaxed"}, aggregate=None).eval()
    soft = module.train_evaluation_gap(patches, guides)
    assert not module.training
    assert all(0.5 < gap < 1.5 for gap in soft.values())
    sharp = build(sparse={"selection": "relaxed", "gumbel_tau": 1e-6}, aggregate=None).train_evaluation_gap(patches, guides)
    assert all(gap < 1e-2 for gap in sharp.values())


def test_injected_draws_decide_the_gradient():
    grads = []
    for seed in (0, 0, 1):
        module, (patches, guides) = build(sparse={"use_gumbel": True}), inputs()
        draws = {m: torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) for m in MODALITIES}
        probe(module(patches, guides, draws)).backward()
        grads.append(predictor_gradient(module))
    assert grads[0] == grads[1] != grads[2]


def test_autocast_gives_finite_outputs_and_gradients():
    module, (patches, guides) = build(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enhanced = module(patches, guides)
    probe(enhanced).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in [*patches.values(), *module.parameters()])


def test_can_be_traced_and_exported():
    module, (patches, guides) = build().eval(), inputs()
    flat = [*patches.values(), *guides.values()]

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *x):
            return tuple(self.module(dict(zip(MODALITIES, x[:3])), dict(zip(MODALITIES, x[3:]))).tokens.values())

    expected = Flat()(*flat)
    traced = torch.jit.trace(Flat(), tuple(flat), check_trace=False)
    for ours, theirs in zip(traced(*flat), expected):
        assert_close(ours, theirs)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ((*({0: batch} for _ in flat),),)
    exported = torch.export.export(Flat(), tuple(t.detach() for t in flat), dynamic_shapes=shapes).module()
    double = [torch.cat([t, t.flip(0)]) for t in flat]
    for ours, theirs in zip(exported(*double), Flat()(*double)):
        assert_close(ours, theirs)


# --- modalities, keys, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("rgb", "thermal"), ("a", "b", "c", "d")])
def test_any_number_of_modalities(names):
    patches, guides = inputs(modalities=names)
    enhanced = build(modalities=names)(patches, guides)
    assert list(enhanced.tokens) == list(names)


@given(seed=st.integers(0, 99))
def test_order_of_tokens_and_company_in_the_batch_do_not_matter(seed):
    module, (patches, guides) = build(seed), inputs(seed)
    order = torch.randperm(N)
    with torch.no_grad():
        straight = module(patches, guides)
        shuffled = module({m: p[:, order] for m, p in patches.items()}, guides)
        alone = module({m: p[:1] for m, p in patches.items()}, {m: g[:1] for m, g in guides.items()})
    for m in MODALITIES:
        assert_close(shuffled.tokens[m], straight.tokens[m], rtol=1e-4, atol=1e-5)
        assert_close(shuffled.masks[m], straight.masks[m][:, order])
        assert_close(alone.tokens[m], straight.tokens[m][:1], rtol=1e-4, atol=1e-5)


def test_the_order_of_the_other_modalities_does_not_matter():
    patches, guides = inputs()
    module, turned = build(), build(modalities=("rgb", "tir", "nir"))
    turned.load_state_dict(module.state_dict())
    assert_close(turned(patches, guides).tokens["rgb"], module(patches, guides).tokens["rgb"])


@pytest.mark.parametrize("prefix", ["", "sdtps."])
def test_reference_keys_both_ways(prefix):
    state = build().state_dict()
    keys = ReferenceKeys(prefix)
    theirs = keys.to_reference(state)
    assert prefix + "rgb_sparse.score_predictor.0.weight" in theirs
    assert prefix + "tir_aggr.weight.3.bias" in theirs
    assert prefix + "nir_aggr.scale" in theirs
    if prefix:
        theirs["classifier_sdtps.weight"] = torch.zeros(1)  # other parts of a whole model's checkpoint
    again = keys.from_reference(theirs)
    assert set(again) == set(state)
    build(seed=5).load_state_dict(again, strict=True)


def test_refusals_say_what_is_wrong():
    module, (patches, guides) = build(), inputs()
    with pytest.raises(ValueError, match="guides are needed"):
        module(patches)
    with pytest.raises(ValueError, match="patches are given for rgb, nir; this module was built for rgb, nir, tir"):
        module({m: patches[m] for m in ("rgb", "nir")}, guides)
    with pytest.raises(ValueError, match="rgb has 19 patch tokens"):
        module({m: p[:, 1:] for m, p in patches.items()}, guides)
    with pytest.raises(ValueError, match="two different names"):
        MultiModalSDTPS(C, N, ("rgb", "rgb"))
    with pytest.raises(ValueError, match="guide must be one of global, mean_patch; got 'class'"):
        require_choice("guide", "class", Literal["global", "mean_patch"])
    with pytest.raises(ValueError, match="aggregate = None"):
        build(sparse={"score": "mean", "selection": "in_place", "extra_mode": "none"})
    with pytest.raises(ValueError, match="uniform draws"):
        module(patches, guides, {m: torch.rand(B, N) for m in MODALITIES})
    noisy = build(sparse={"use_gumbel": True})
    with pytest.raises(ValueError, match="uniforms are given for rgb; this module was built for rgb, nir, tir"):
        noisy(patches, guides, {"rgb": torch.rand(B, N)})
    for role, wrong, message in (
        ("uniforms", {m: torch.rand(B, 3) for m in MODALITIES}, rf"uniforms of rgb have shape \({B}, 3\).*must have \({B}, {N}\)"),
        ("guides", {**guides, "nir": torch.randn(B, C - 1)}, rf"guides of nir have shape \({B}, {C - 1}\).*must have \({B}, {C}\)"),
        ("patches", {**patches, "tir": torch.randn(B + 1, N, C)}, rf"patches of tir have shape \({B + 1}, {N}, {C}\)"),
    ):
        with pytest.raises(ValueError, match=message):  # the annotations would refuse these before the module can
            check_inputs(MODALITIES, N, **{"patches": patches, "guides": guides, "uniforms": None, role: wrong})


def test_a_selection_without_gradient_teaches_the_aggregation_alone():
    released = {"score": "sum", "score_norm": "none"}
    module, (patches, guides) = build(sparse=released, selection_no_grad=True), inputs()
    plain = build(sparse=released)
    enhanced = module(patches, guides)
    for m in MODALITIES:
        assert torch.equal(enhanced.tokens[m], plain(patches, guides).tokens[m])
    torch.stack([t.square().sum() for t in enhanced.tokens.values()]).sum().backward()
    assert all(v.grad is None for v in (*patches.values(), *guides.values()))
    assert all(p.grad is not None for p in module.parameters())
    assert not any(chosen.tokens.requires_grad for chosen in module.choose(patches, guides).values())
    for sparse in ({}, {**released, "use_gumbel": True}, {**released, "selection": "relaxed"}):
        with pytest.raises(
            ValueError, match=r"selection_no_grad = True, but the selection is to learn.*TokenSparse\.score = 'sum'"
        ):
            build(sparse=sparse, selection_no_grad=True)
    with pytest.raises(ValueError, match="attention_no_grad = False would have no effect"):
        build(sparse=released, selection_no_grad=True, attention_no_grad=False)


def test_mean_patch_guides_need_no_globals():
    module, (patches, guides) = build(guide="mean_patch"), inputs()
    expected = build()(patches, {m: p.mean(1) for m, p in patches.items()})
    for m in MODALITIES:
        assert_close(module(patches).tokens[m], expected.tokens[m])
        assert_close(module(patches, guides).tokens[m], expected.tokens[m])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_gumbel": True}, {"use_gumbel": True, "noisy_topk": True}, {"selection": "relaxed"}])
@pytest.mark.parametrize("place", ["sparse.rgb", "sparse.tir.score_predictor", "aggregate.nir", "aggregate.nir.weight.2"])
def test_a_hook_anywhere_fires_once_and_changes_no_number(place, options, fused):
    torch.manual_seed(0)
    module = MultiModalSDTPS(8, 12, sparse=functools.partial(TokenSparse, **options), fused=fused).train()
    patches = {m: torch.randn(3, 12, 8, requires_grad=True) for m in module.modalities}
    guides = {m: torch.randn(3, 8) for m in module.modalities}

    def gradients():
        torch.manual_seed(1)
        tokens = module(patches, guides).tokens
        return [*tokens.values(), *torch.autograd.grad(sum(t.sin().sum() for t in tokens.values()), list(patches.values()))]

    plain, calls = gradients(), []
    module.get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
    heard = gradients()
    assert calls == [place]
    for one, two in zip(plain, heard):
        torch.testing.assert_close(one, two)


def test_a_selector_of_ones_own_is_called():
    calls = []

    class Counting(TokenSparse):
        def forward(self, *given):
            calls.append(len(given))
            return super().forward(*given)

    module = MultiModalSDTPS(8, 12, sparse=Counting)
    module({m: torch.randn(2, 12, 8) for m in module.modalities}, {m: torch.randn(2, 8) for m in module.modalities})
    assert len(calls) == 3
