"""Parameter groups by rule, optimisers against their update equations, schedules against their worked values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core import optim, schedules


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"camera": nn.Linear(2, 2, bias=False), "fc": nn.Linear(2, 3)})
        self.norm = nn.BatchNorm1d(3)
        self.norm.bias.requires_grad_(False)
        self.head = nn.Linear(3, 4)


RELEASE = ((r"^backbone\.(?!camera\.)", {"lr": 5e-6}), (r"bias$", {"lr_scale": 2.0}))


# --- groups -----------------------------------------------------------------------------------------------------------


def test_first_matching_rule_decides_and_every_group_has_a_name():
    groups = optim.parameter_groups(Net(), RELEASE)
    names = {g["name"]: g["names"] for g in groups}
    assert names == {
        RELEASE[0][0]: ["backbone.fc.weight", "backbone.fc.bias"],  # the bias in the backbone belongs to the first rule
        RELEASE[1][0]: ["head.bias"],
        "rest": ["backbone.camera.weight", "norm.weight", "head.weight"],
    }
    optimizer = optim.Adam(groups, lr=3.5e-4, weight_decay=1e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-6, 7e-4, 3.5e-4]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4] * 3


def test_every_trainable_parameter_is_in_exactly_one_group():
    net = Net()
    listed = [id(p) for g in optim.parameter_groups(net, RELEASE) for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in net.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("nothing", {"lr": 1.0})], "'nothing' matches no trainable parameter"),
        ([(r"norm\.bias", {"lr": 1.0})], "matches no trainable parameter"),  # it is frozen
        ([("head", {"lr": 1.0}), (r"head\.bias", {"lr": 2.0})], r"decides nothing: all it matches \(head\.bias"),
        ([("head", {"rate": 1.0})], "unknown setting 'rate'; known: lr, lr_scale, weight_decay"),
        ([("head", {"lr": 1.0, "lr_scale": 1.0})], "sets both lr and lr_scale"),
    ],
)
def test_a_rule_that_cannot_take_effect_is_an_error(rules, message):
    with pytest.raises(ValueError, match=message):
        optim.parameter_groups(Net(), rules)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.parameter_groups(nn.ReLU())


def test_vectors_can_go_without_decay():
    rules = (*RELEASE, ("head", {"weight_decay": 0.5}))
    optimizer = optim.AdamW(optim.parameter_groups(Net(), rules), lr=1.0, weight_decay=0.1, decay_vectors=False)
    told = {n: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for n in g["names"]}
    assert told == {
        "backbone.fc.weight": (0.1, 5e-6), "backbone.fc.bias": (0.0, 5e-6), "head.bias": (0.0, 2.0), "head.weight": (0.5, 1.0),
        "backbone.camera.weight": (0.1, 1.0), "norm.weight": (0.0, 1.0),
    }  # fmt: skip
    groups = [g["name"] for g in optimizer.param_groups]
    assert len(set(groups)) == len(groups)
    assert "rest, no decay" in groups
    plain = optim.SGD(Net().parameters(), weight_decay=0.1, decay_vectors=False)
    assert sorted({(p.ndim < 2, g["weight_decay"]) for g in plain.param_groups for p in g["params"]}) == [(False, 0.1), (True, 0.0)]


# --- optimisers ---------------------------------------------------------------------------------------------------------


def updates(make, by_hand, steps=5):
    """A parameter after some steps of ours, and after the same steps of the equations in float64."""
    torch.manual_seed(1)
    start, grads = torch.randn(6), torch.randn(steps, 6)
    ours = nn.Parameter(start.clone())
    optimizer = make([ours])
    for grad in grads:
        ours.grad = grad.clone()
        optimizer.step()
    return ours.detach().double(), by_hand(start.double(), grads.double())


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_follows_its_equations(decoupled):
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.95, 1e-6, 0.3

    def by_hand(w, grads):
        m = v = torch.zeros_like(w)
        for t, g in enumerate(grads, 1):
            if decoupled:
                w = w * (1 - lr * decay)
            else:
                g = g + decay * w
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            w = w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        return w

    kind = optim.AdamW if decoupled else optim.Adam
    torch.testing.assert_close(*updates(lambda p: kind(p, lr, (b1, b2), eps, decay), by_hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_its_equations(nesterov):
    lr, momentum, decay = 0.1, 0.9, 0.2

    def by_hand(w, grads):
        velocity = None
        for g in grads:
            g = g + decay * w
            velocity = g if velocity is None else momentum * velocity + g
            w = w - lr * (g + momentum * velocity if nesterov else velocity)
        return w

    torch.testing.assert_close(*updates(lambda p: optim.SGD(p, lr, momentum, decay, nesterov), by_hand), rtol=1e-5, atol=1e-6)


@pytest.fixture
def unwritten_memory_is_nan():
    """What `torch.empty` returns is filled with NaN, so that nothing can pass by luck of the allocator."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.SGD])
def test_a_flag_on_the_device_stops_the_update(make, unwritten_memory_is_nan):
    """The kernels are fused, so a step can be skipped by a tensor that nobody reads; the next one is then a first step."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=0.1)
    assert all(g["fused"] for g in optimizer.param_groups)
    weight.grad = torch.ones(3)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    optimizer.step()
    assert (weight == 1).all()
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    torch.testing.assert_close(weight, torch.full((3,), 0.9), atol=1e-6 if make is not optim.AdamW else 1e-2, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.Adam(p, lr=-1.0), "optim.Adam.lr must be 0 or more, got -1"),
        (lambda p: optim.AdamW(p, weight_decay=-1.0), "optim.AdamW.weight_decay"),
        (lambda p: optim.SGD(p, momentum=math.nan), "optim.SGD.momentum"),
        (lambda p: optim.SGD(p, momentum=0.0, nesterov=True), "nesterov needs a momentum"),
    ],
)
def test_optimisers_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(1))])


# --- schedules ----------------------------------------------------------------------------------------------------------

HEAD, CLIP, BIAS = 3.5e-4, 5e-6, 7e-4


def release(noise_pct=0.0, **options):
    return schedules.Cosine(
        warmup=0.2, warmup_mode="absolute", warmup_start=3.5e-5, floor=3.5e-7, per="epoch", noise_pct=noise_pct, **options
    )


@pytest.mark.parametrize(
    ("epoch", "head", "clip", "bias"),
    [
        (1, 6.65e-5, 3.20e-5, 1.015e-4),
        (5, 1.925e-4, 2.00e-5, 3.675e-4),
        (9, 3.185e-4, 8.0e-6, 6.335e-4),
        (10, 3.17e-4, 4.56e-6, 6.33e-4),
        (25, 1.75e-4, 2.68e-6, 3.50e-4),
        (50, 3.5e-7, 3.5e-7, 3.5e-7),
    ],
)
def test_the_release_cosine_gives_its_worked_values(epoch, head, clip, bias):
    """specs of the release: 50 epochs, warm-up 10, from 3.5e-5 for all groups; held within an epoch of 7 steps."""
    for step in ((epoch - 1) * 7, epoch * 7 - 1):
        for base, expected in ((HEAD, head), (CLIP, clip), (BIAS, bias)):
            assert release()(step, 350, base, 7) == pytest.approx(expected, rel=2e-3)


def test_the_release_backbone_warms_up_downwards_and_the_head_never_reaches_its_rate():
    rates = [release()(7 * e, 350, CLIP, 7) for e in range(50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 6 * CLIP
    assert max(release()(7 * e, 350, HEAD, 7) for e in range(50)) == pytest.approx(3.185e-4)


def test_the_release_noise_is_reproduced():
    """Factors seen in the release: epoch 1 × 0.352, 10 × 0.854, 25 × 0.880, and none at the last."""
    for epoch, factor in ((1, 0.352), (10, 0.854), (25, 0.880), (50, 1.0)):
        step = (epoch - 1) * 7
        for base in (HEAD, CLIP):
            assert release(0.67)(step, 350, base, 7) / release()(step, 350, base, 7) == pytest.approx(factor, abs=5e-4)


def test_noise_stays_within_its_limit_and_depends_on_epoch_and_seed_alone():
    factors = [release(0.2)(7 * e, 350, HEAD, 7) / release()(7 * e, 350, HEAD, 7) for e in range(49)]
    assert all(0.8 < f < 1.2 for f in factors)
    assert len(set(factors)) == 49
    torch.manual_seed(5)
    assert release(0.2)(0, 350, CLIP, 7) / release()(0, 350, CLIP, 7) == pytest.approx(factors[0])
    assert release(0.2, noise_seed=1)(0, 350, HEAD, 7) != release(0.2)(0, 350, HEAD, 7)


def test_the_cosine_over_the_rest_reaches_the_base_rate_and_falls_from_there():
    schedule = schedules.Cosine(warmup=0.1, warmup_start=0.0, span="rest", floor=0.1)
    rates = [schedule(t, 1000, 2.0) for t in range(1000)]
    assert rates[:101] == pytest.approx([2.0 * t / 100 for t in range(101)])
    assert rates[550] == pytest.approx(0.1 + 0.95 * (1 + math.cos(math.pi / 2)))
    assert rates[100:] == sorted(rates[100:], reverse=True)
    whole = schedules.Cosine(warmup=0.1, warmup_start=0.0)
    assert whole(100, 1000, 2.0) == pytest.approx(1 + math.cos(math.pi / 10))


def test_poly_with_warmup():
    """NYU: 500 epochs of 50 iterations, warm-up 10 epochs from 0, over the whole run; the jump at its end is to 0.982 of the rate."""
    schedule = schedules.Poly(power=0.9, warmup=10 / 500)
    assert schedule(0, 25000, 6e-5) == 0
    assert schedule(250, 25000, 6e-5) == pytest.approx(3e-5)
    assert schedule(500, 25000, 6e-5) / 6e-5 == pytest.approx(0.982, abs=5e-4)
    assert schedule(20000, 25000, 6e-5) == pytest.approx(6e-5 * 0.2**0.9)
    rest = schedules.Poly(power=0.9, warmup=10 / 500, span="rest")
    assert rest(500, 25000, 6e-5) == 6e-5
    assert rest(12750, 25000, 6e-5) == pytest.approx(6e-5 * 0.5**0.9)
    assert schedules.Poly(floor=1e-6)(999, 1000, 1e-5) == 1e-6


def test_multistep_with_absolute_warmup():
    """The few-shot release: 60 epochs of 150; 0.001 + 0.049 (e + 1) / 10, then 0.05, 0.025 from epoch 39, 0.0125 from 49 (from 0)."""
    schedule = schedules.MultiStep(
        milestones=(40 / 60, 50 / 60), gamma=0.5, warmup=10 / 60, warmup_mode="absolute", warmup_start=0.001, per="epoch"
    )
    for e in range(60):
        expected = 0.001 + 0.049 * (e + 1) / 10 if e < 10 else 0.05 if e < 39 else 0.025 if e < 49 else 0.0125
        for step in (150 * e, 150 * e + 149):
            assert schedule(step, 9000, 0.05, 150) == pytest.approx(expected), e


def test_multistep_by_steps_and_a_milestone_inside_the_warmup():
    assert [schedules.MultiStep((0.3, 0.6), 0.1)(t, 10, 1.0) for t in range(10)] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 4)
    early = schedules.MultiStep((0.2,), 0.5, warmup=0.4)
    assert [early(t, 10, 1.0) for t in range(6)] == pytest.approx([0, 0.25, 0.25, 0.375, 0.5, 0.5])


@given(
    done=st.integers(0, 99),
    base=st.floats(1e-6, 1.0),
    warmup=st.floats(0.0, 0.9),
    span=st.sampled_from(["run", "rest"]),
    per=st.sampled_from(["step", "epoch"]),
)
def test_rates_are_linear_in_the_base_and_within_it(done, base, warmup, span, per):
    """Without absolute settings a schedule only scales, so groups keep their ratio; a constant one changes nothing."""
    for schedule in (
        schedules.Cosine(warmup=warmup, span=span, per=per),
        schedules.Poly(warmup=warmup, span=span, per=per),
        schedules.MultiStep(warmup=warmup, per=per),
        schedules.Constant(),
    ):
        rate = schedule(done, 100, base, 10)
        assert 0 <= rate <= base * (1 + 1e-12)
        assert schedule(done, 100, 2 * base, 10) == pytest.approx(2 * rate)
    assert schedules.Constant()(done, 100, base) == base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.Cosine(warmup=1.5), r"Cosine.warmup must be in \[0, 1\], got 1.5"),
        (lambda: schedules.Cosine(warmup_start=3.5), "warmup_start is a ratio of the base rate here"),
        (lambda: schedules.Poly(warmup_mode="absolute", warmup_start=-1.0), "Poly.warmup_start is a rate and must be 0 or more"),
        (lambda: schedules.Cosine(floor=-1.0), "floor and noise_pct must be 0 or more"),
        (lambda: schedules.Cosine(noise_pct=0.5), "needs per = 'epoch'"),
        (lambda: schedules.Poly(power=0.0), "power must be positive"),
        (lambda: schedules.MultiStep(milestones=(0.7, 0.4)), "must ascend"),
        (lambda: schedules.MultiStep(gamma=0.0), "gamma must be positive"),
        (lambda: schedules.MultiStep(per="epoch")(0, 10, 1.0, None), "this task has no epochs"),
    ],
)
def test_schedules_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
