"""The hand-written gradient of the tri-modal step: the composed operations' numbers, the true derivative, and when it steps back."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from plugins.sdtps.multimodal import MultiModalSDTPS
from plugins.sdtps.token_aggregation import TokenAggregation
from plugins.sdtps.token_sparse import TokenSparse

MODALITIES = ("rgb", "nir", "tir")
B, N, C = 2, 10, 12


def build(sparse=None, aggregate=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = MultiModalSDTPS(
        C,
        N,
        sparse=functools.partial(TokenSparse, **(sparse or {})),
        aggregate=functools.partial(TokenAggregation, **({"dim_ratio": 0.5} | (aggregate or {}))),
        **options,
    )
    with torch.no_grad():  # so that nothing hides behind a one or a zero
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.to(dtype)


def inputs(dtype=torch.float64, grad=True):
    torch.manual_seed(1)
    patches = {m: torch.randn(B, N, C, dtype=dtype).requires_grad_(grad) for m in MODALITIES}
    return patches, {m: torch.randn(B, C, dtype=dtype).requires_grad_(grad) for m in MODALITIES}


def is_fused(enhanced):
    return all(type(t.grad_fn).__name__ == "SelectAndAggregateBackward" for t in enhanced.tokens.values())


def loss_of(enhanced, modalities=MODALITIES):
    torch.manual_seed(5)
    return torch.stack([(enhanced.tokens[m] * torch.randn_like(enhanced.tokens[m])).sum() for m in modalities]).sum()


def both_ways(setup, modalities=MODALITIES):
    """Outputs and gradients, fused and composed."""
    results = []
    for allowed in (True, False):
        module, patches, guides = setup()
        module.fused = allowed
        enhanced = module(patches, guides)
        assert is_fused(enhanced) == allowed
        loss_of(enhanced, modalities).backward()
        grads = {f"patches {m}": patches[m].grad for m in MODALITIES} | {f"guides {m}": guides[m].grad for m in MODALITIES}
        grads |= {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        results.append((enhanced, grads))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparse": {"sparse_ratio": 0.3, "beta": 0.1, "extra_tau": 0.5}},
        {"sparse": {"sparse_ratio": 1.0}},
        {"sparse": {"beta": 0.5, "score_norm": "zscore"}},
        {"attention_no_grad": False},
        {"guide": "mean_patch", "attention_no_grad": False, "similarity": "dot"},
        {"sparse": {"extra_mode": "softmax"}, "aggregate": {"mask_mode": "additive"}},
    ],
)
def test_equals_the_composed_operations(options):
    (ours, our_grads), (theirs, their_grads) = both_ways(lambda: (build(**options), *inputs()))
    for m in MODALITIES:
        assert_close(ours.tokens[m], theirs.tokens[m], rtol=1e-10, atol=1e-12)
        assert torch.equal(ours.masks[m], theirs.masks[m])
        assert torch.equal(ours.kept[m], theirs.kept[m])
    for name, grad in their_grads.items():
        ours = our_grads[name]
        if grad is None or ours is None:
            assert all(g is None or not g.any() for g in (grad, ours)), name
        else:
            assert_close(ours, grad, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("frozen", ["patches", "weights", "one modality"])
def test_frozen_parts(frozen):
    def setup():
        module, (patches, guides) = build(), inputs(grad=frozen != "patches")
        if frozen == "weights":
            module.requires_grad_(False)
        if frozen == "one modality":
            module.sparse["nir"].requires_grad_(False)
            module.aggregate["nir"].requires_grad_(False)
            patches["nir"].requires_grad_(False)
        return module, patches, guides

    (_, ours), (_, theirs) = both_ways(setup)
    for name, grad in theirs.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            assert_close(ours[name], grad, rtol=1e-8, atol=1e-11)


def test_an_unused_modality_gets_no_gradient():
    (_, ours), (_, theirs) = both_ways(lambda: (build(), *inputs()), modalities=("rgb", "tir"))
    for name, grad in theirs.items():
        if "nir" in name:
            assert ours[name] is None or not ours[name].any()
        elif grad is not None:
            assert_close(ours[name], grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("attention_no_grad", [True, False])
def test_is_the_derivative(attention_no_grad):
    module, (patches, guides) = build(attention_no_grad=attention_no_grad), inputs()
    names, weights = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in module.named_parameters()])
    flat = [*patches.values(), *(() if attention_no_grad else guides.values())]
    # with attention_no_grad the maps are constants: what is compared must not move them
    if attention_no_grad:
        constant = module.attention(patches, guides)
        module.attention = lambda *_: constant

    def function(*tensors):
        given = dict(zip(MODALITIES, tensors[:3]))
        guided = guides if attention_no_grad else dict(zip(MODALITIES, tensors[3:6]))
        enhanced = torch.func.functional_call(module, dict(zip(names, tensors[len(flat) :])), (given, guided))
        assert is_fused(enhanced)
        return tuple(enhanced.tokens.values())

    assert torch.autograd.gradcheck(function, (*flat, *weights), eps=1e-6, atol=1e-5, fast_mode=True)


def test_backward_twice_through_one_graph():
    module, (patches, guides) = build(), inputs()
    loss = loss_of(module(patches, guides))
    first = torch.autograd.grad(loss, patches["rgb"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, patches["rgb"])[0])


def test_second_derivative_is_refused_and_there_is_a_way_to_it():
    module, (patches, guides) = build(), inputs()
    with pytest.raises(RuntimeError, match="fused = False"):
        torch.autograd.grad(loss_of(module(patches, guides)), patches["rgb"], create_graph=True)
    composed = build(fused=False)
    (grad,) = torch.autograd.grad(loss_of(composed(patches, guides)), patches["rgb"], create_graph=True)
    grad.square().sum().backward()
    assert patches["rgb"].grad.norm() > 0


def test_stores_less_than_the_composed_operations():
    """The point of gathering again in the backward pass."""
    stored = []
    for allowed in (True, False):
        module, (patches, guides) = build(dtype=torch.float32), inputs(dtype=torch.float32)
        held = {}

        def pack(t, held=held):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        module.fused = allowed
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(patches, guides)
        given = {t.untyped_storage().data_ptr() for t in (*patches.values(), *guides.values(), *module.parameters())}
        stored.append(sum(size for place, size in held.items() if place not in given))
    assert stored[0] < 0.5 * stored[1]


def test_steps_back_where_it_may_not_stand():
    patches, guides = inputs()

    def fused(module):
        return is_fused(module(patches, guides))

    assert fused(build())
    assert not fused(build({"use_gumbel": True}))
    assert not fused(build({"selection": "relaxed"}))
    assert fused(build({"selection": "relaxed"}).eval())
    assert not fused(build({"extra_mode": "uniform"}))
    assert not fused(build({"score": "mean"}))

    listened = build()
    calls = []
    handle = listened.aggregate["rgb"].weight[1].register_forward_hook(lambda *a: calls.append(1))
    assert not fused(listened)
    assert calls == [1]
    handle.remove()
    assert fused(listened)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    replaced = build()
    replaced.sparse["rgb"].score_predictor[0] = Doubled(C, C // 4).double()
    assert not fused(replaced)

    class Silent(TokenAggregation):
        def forward(self, tokens, mask=None):
            return 0 * super().forward(tokens, mask)

    own = build()
    own.aggregate["tir"] = Silent(C, N, dim_ratio=0.5).double()
    assert not fused(own)
    with torch.no_grad():
        assert all(t.grad_fn is None for t in build()(patches, guides).tokens.values())


def test_a_token_of_length_zero():
    """Its direction is undefined; the gradient is what the composed operations make of it, and finite."""

    def setup():
        module, (patches, guides) = build(attention_no_grad=False), inputs()
        with torch.no_grad():
            patches["nir"][0, 3] = 0
        return module, patches, guides

    (_, fused), (_, composed) = both_ways(setup)
    assert composed["patches nir"][0, 3].isfinite().all()
    for name, gradient in composed.items():
        assert_close(fused[name], gradient, atol=1e-9, rtol=1e-9)


class _OtherPredictor(TokenSparse):
    """A user's own network in the place of eq. 1."""

    def __init__(self, dim):
        super().__init__(dim)
        self.score_predictor = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, 1), nn.Tanh())


def _replace(path, new):
    def change(module):
        for m in MODALITIES:
            *way, last = path.split(".")
            part = (module.aggregate if way[0] == "weight" else module.sparse)[m].get_submodule(".".join(way))
            part[int(last)] = new()
        return module.double()

    return change


@pytest.mark.parametrize(
    "change",
    [
        _replace("score_predictor.1", nn.ReLU),
        _replace("score_predictor.1", lambda: nn.GELU(approximate="tanh")),
        _replace("score_predictor.3", nn.Tanh),
        _replace("score_predictor.2", lambda: nn.Linear(C // 4, 1, bias=False)),
        _replace("weight.2", nn.SiLU),
        _replace("weight.2", lambda: nn.GELU(approximate="tanh")),
        _replace("weight.0", lambda: nn.LayerNorm(C, elementwise_affine=False)),
        lambda module: MultiModalSDTPS(C, N, sparse=_OtherPredictor).double(),
    ],
)
def test_another_network_is_composed_and_trains_as_it_evaluates(change):
    patches, guides = inputs()
    torch.manual_seed(2)
    module = change(build())
    enhanced = module(patches, guides)
    assert not is_fused(enhanced)
    with torch.no_grad():
        still = module(patches, guides)
    for m in MODALITIES:
        assert torch.equal(enhanced.tokens[m].detach(), still.tokens[m])


def test_an_empty_batch():
    def setup():
        shapes = dict.fromkeys(MODALITIES, (0, N, C))
        patches = {m: torch.zeros(s, dtype=torch.float64, requires_grad=True) for m, s in shapes.items()}
        return (
            build(attention_no_grad=False),
            patches,
            {m: torch.zeros(0, C, dtype=torch.float64, requires_grad=True) for m in shapes},
        )

    (fused, _), (composed, _) = both_ways(setup)
    assert [t.shape for t in fused.tokens.values()] == [t.shape for t in composed.tokens.values()]


def test_function_transforms_and_forward_mode_get_the_composed_operations():
    patches, guides = inputs(grad=False)
    module = build(attention_no_grad=False)
    weights = dict(module.named_parameters())
    found = []
    for module.fused in (True, False):

        def loss(given):
            return loss_of(torch.func.functional_call(module, given, (patches, guides)))

        slopes = torch.func.grad(loss)(weights)
        _, along = torch.func.jvp(loss, (weights,), (slopes,))
        found.append((slopes, along))
    for name, slope in found[1][0].items():
        assert_close(found[0][0][name], slope)
    assert_close(found[0][1], found[1][1])
    assert_close(along, torch.stack([s.square().sum() for s in slopes.values()]).sum())
