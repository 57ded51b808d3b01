"""Purification: the note's equations by hand, its two patches, the switches apart, and facts S1 to S9."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from jaxtyping import TypeCheckError
from synchronisation import NoWaiting
from torch import nn
from torch.testing import assert_close

from plugins.sap.purification import SemanticAnchorPurification, UnitDot, load_release

N, K, Q = 5, 5, 3


def episode(dom=16, phy=40, n=N, k=K, q=Q, seed=0):
    """Domain rows, semantic rows, support labels; the support rows are the first."""
    g = torch.Generator().manual_seed(seed)
    rows = n * (k + q)
    labels = torch.arange(n).repeat_interleave(k)[torch.randperm(n * k, generator=g)]
    return torch.randn(rows, dom, generator=g), torch.randn(rows, phy, generator=g), labels


def run(module, domain, semantic, labels, n=N):
    return module(domain, semantic, semantic[: len(labels)], labels, n_way=n)


def by_hand(module, domain, semantic, labels, n, scale):
    """The equations of the note, one row and one class at a time, in float64 and without dropout."""
    p = {key: value.detach().double() for key, value in module.state_dict().items()}
    anchors = []
    for c in range(n):
        rows = [semantic[i].double() for i in range(len(labels)) if labels[i] == c]
        mean = sum(rows) / len(rows)
        anchors.append(mean / mean.norm())
    outputs, shares, squares = [], [], []
    for f, phy in zip(domain.double(), semantic.double()):
        q = p["W_q.0.weight"] @ f + p["W_q.0.bias"]
        q = q / q.norm()
        e = torch.stack([torch.exp(scale * (q @ anchor)) for anchor in anchors])
        a = e / e.sum()
        mixture = sum(a[c] * anchors[c] for c in range(n))
        component = p["W_proj.0.weight"] @ mixture + p["W_proj.0.bias"]
        o = f - torch.sigmoid(p["alpha"]) * component
        o = (o - o.mean()) / (o.var(correction=0) + 1e-5).sqrt() * p["output_ln.weight"] + p["output_ln.bias"]
        mapped = p["W_orth.weight"] @ o
        outputs.append(o)
        shares.append(a)
        squares.append((mapped @ phy / (mapped.norm() * phy.norm())) ** 2)
    return torch.stack(outputs), torch.stack(shares), torch.stack(squares).mean()


@pytest.mark.parametrize(("mode", "scale"), [("learned", 25.0), ("fixed_sqrt", 40**-0.5)])
def test_matches_the_equations(mode, scale):
    module = SemanticAnchorPurification(16, 40, scale_mode=mode, alpha_init=0.3).eval()
    for layer in (module.W_q[0], module.W_proj[0]):
        nn.init.normal_(layer.bias)
    domain, semantic, labels = episode()
    out = run(module, domain, semantic, labels)
    purified, attention, loss = by_hand(module, domain, semantic, labels, N, scale)
    assert_close(out.purified.double(), purified, atol=1e-5, rtol=1e-5)
    assert_close(out.attention.double(), attention, atol=1e-5, rtol=1e-5)
    assert_close(out.orthogonal_loss.double(), loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("paired", [True, False])
def test_unit_dot_is_normalise_then_multiply_with_its_gradients(paired):
    rows = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    read = torch.randn(4 if paired else 3, 6, dtype=torch.float64, requires_grad=True)
    unit = nn.functional.normalize(rows, dim=-1)
    assert_close(UnitDot.apply(rows, read, paired), (unit * read).sum(-1) if paired else unit @ read.t())
    assert torch.autograd.gradcheck(lambda a, b: UnitDot.apply(a, b, paired), (rows, read))


def test_learned_scale_at_the_fixed_value_is_patch_2_in_value_and_gradient():
    fixed = SemanticAnchorPurification(16, 40, dropout=0.0, scale_mode="fixed_sqrt")
    learned = SemanticAnchorPurification(16, 40, dropout=0.0, scale_mode="learned", scale_init=40**-0.5)
    learned.load_state_dict({**fixed.state_dict(), "logit_scale_log": learned.logit_scale_log.detach()})
    domain, semantic, labels = episode()
    results = []
    for module in (fixed, learned):
        d, s = domain.clone().requires_grad_(), semantic.clone().requires_grad_()
        out = run(module, d, s, labels)
        (out.purified.sin().sum() + out.orthogonal_loss).backward()
        results.append((out.purified, out.attention, d.grad, s.grad, module.W_q[0].weight.grad))
    for a, b in zip(*results):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_row_max_shift_changes_neither_values_nor_gradients():  # S8
    plain = SemanticAnchorPurification(16, 40, dropout=0.0)
    shifted = SemanticAnchorPurification(16, 40, dropout=0.0, row_max_shift=True)
    shifted.load_state_dict(plain.state_dict())
    domain, semantic, labels = episode()
    grads = []
    for module in (plain, shifted):
        out = run(module, domain, semantic, labels)
        (out.purified.sin().sum() + out.attention.square().sum()).backward()
        grads.append((out.attention, *(p.grad for p in module.parameters())))
    for a, b in zip(*grads):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_extreme_logits_stay_finite_without_the_shift():  # S8: softmax shifts by itself
    module = SemanticAnchorPurification(16, 40, scale_init=1e4, scale_max=1e4, normalize_query=False)
    domain, semantic, labels = episode()
    assert run(module, domain * 1e3, semantic, labels).attention.isfinite().all()


@pytest.mark.parametrize("detach", [True, False])
def test_detach_decides_which_semantic_rows_get_a_gradient(detach):  # finding 2
    module = SemanticAnchorPurification(16, 40, detach_anchors=detach)
    domain, semantic, labels = episode()
    semantic.requires_grad_()
    out = run(module, domain, semantic, labels)
    (out.purified.sin().sum() + out.orthogonal_loss).backward()
    if detach:
        assert semantic.grad is None
    else:
        reached = semantic.grad.abs().sum(1) > 0
        assert reached[: N * K].all()
        assert not reached[N * K :].any()


def test_query_normalisation_bounds_the_logits():
    domain, semantic, labels = episode()
    bounded = SemanticAnchorPurification(16, 40, dropout=0.0)
    free = SemanticAnchorPurification(16, 40, dropout=0.0, normalize_query=False)
    free.load_state_dict(bounded.state_dict())
    a, b = (run(bounded, domain * factor, semantic, labels).attention for factor in (1.0, 3.0))
    assert_close(a, b, atol=1e-5, rtol=1e-4)  # zero bias: the size of the features does not matter
    c, d = (run(free, domain * factor, semantic, labels).attention for factor in (1.0, 3.0))
    assert (c - d).abs().max() > 0.05


def test_purify_in_eval_off_returns_the_features_in_evaluation_only():
    module = SemanticAnchorPurification(16, 40, dropout=0.0, purify_in_eval=False)
    domain, semantic, labels = episode()
    assert_close(run(module.eval(), domain, semantic, labels).purified, domain, atol=0, rtol=0)
    assert (run(module.train(), domain, semantic, labels).purified - domain).abs().max() > 0.1
    on = SemanticAnchorPurification(16, 40, dropout=0.0)
    on.load_state_dict(module.state_dict())
    assert_close(run(on.eval(), domain, semantic, labels).purified, run(module, domain, semantic, labels).purified)


# --- the learned scale ------------------------------------------------------------------------------------------------


def test_scale_parameter_starts_at_25_and_there_is_no_temperature():  # S1, S2
    module = SemanticAnchorPurification()
    assert isinstance(module.logit_scale_log, nn.Parameter)
    assert abs(float(module.logit_scale_log.exp()) - 25.0) < 1e-4
    assert module.logit_scale_max == 100.0
    assert not hasattr(module, "temperature")
    assert sum(p.numel() for p in module.parameters()) == 123_714
    assert len(module.state_dict()) == 9


@pytest.mark.parametrize("cap_mode", ["hard", "inward", "soft"])
def test_cap_bounds_the_scale(cap_mode):  # S3
    module = SemanticAnchorPurification(16, 40, cap_mode=cap_mode)
    assert abs(float(module.scale().detach()) - 25.0) < 1e-4
    with torch.no_grad():
        module.logit_scale_log.fill_(math.log(200.0) if cap_mode != "soft" else 50.0)
    out = run(module, *episode())
    assert float(out.monitors["logit_scale"]) == 100.0
    assert float(out.monitors["logit_scale_clipped"]) == 1.0


@pytest.mark.parametrize(
    ("log", "gradient", "hard", "inward"), [(3.0, 1, True, True), (5.0, 1, False, True), (5.0, -1, False, False)]
)
def test_gradient_at_the_cap(log, gradient, hard, inward):
    """Above the cap `hard` is stuck; `inward` lets descent lower the scale and stops it from rising; below, all agree."""
    for cap_mode, passes in (("hard", hard), ("inward", inward)):
        module = SemanticAnchorPurification(16, 40, cap_mode=cap_mode)
        with torch.no_grad():
            module.logit_scale_log.fill_(log)
        (gradient * module.scale()).backward()
        expected = gradient * math.exp(log) if passes else 0.0
        assert float(module.logit_scale_log.grad) == pytest.approx(expected, rel=1e-5)


def test_a_scale_started_at_the_cap_is_absorbed_by_hard_and_returns_from_inward():
    moved = {}
    for cap_mode in ("hard", "inward"):
        module = SemanticAnchorPurification(16, 40, scale_init=100.0, cap_mode=cap_mode)
        optimiser = torch.optim.SGD([module.logit_scale_log], lr=1e-3)
        for _ in range(5):
            optimiser.zero_grad()
            module.scale().backward()  # the loss wants a smaller scale
            optimiser.step()
        moved[cap_mode] = float(module.scale().detach())
    assert moved["hard"] == 100.0  # ln 100 rounds up in float32: the cap itself is already inside
    assert moved["inward"] < 70.0


def test_fixed_scale_has_no_parameter_and_is_flat():  # SAP-11, section 1.2
    module = SemanticAnchorPurification(scale_mode="fixed_sqrt")
    assert "logit_scale_log" not in module.state_dict()
    domain, semantic, labels = episode(64, 640)
    out = run(module, domain, semantic, labels)
    low, high = 1 / (1 + 4 * math.exp(2 / 640**0.5)), 1 / (1 + 4 * math.exp(-2 / 640**0.5))
    assert low <= float(out.attention.detach().min()) <= float(out.attention.detach().max()) <= high
    assert (round(low, 4), round(high, 4)) == (0.1877, 0.2129)
    assert float(out.monitors["attn_entropy"]) >= 1.60868
    assert float(out.monitors["logit_scale"]) == pytest.approx(640**-0.5)


def test_entropy_and_maximum_on_noise_lie_in_the_band_of_the_note():  # S4, S5
    entropies, maxima = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        module = SemanticAnchorPurification().eval()
        out = run(module, *episode(64, 640, q=15, seed=seed))
        entropies.append(float(out.monitors["attn_entropy"]))
        maxima.append(float(out.monitors["attn_max"]))
    assert all(1.2 < h < 1.5 for h in entropies)
    assert all(0.35 < m < 0.55 for m in maxima)


def test_orthogonality_starts_at_its_floor():
    torch.manual_seed(1)
    with torch.no_grad():
        losses = [
            float(run(SemanticAnchorPurification().eval(), *episode(64, 640, q=15, seed=s)).orthogonal_loss) for s in range(10)
        ]
    assert sum(losses) / 10 == pytest.approx(1 / 640, rel=0.15)


# --- properties -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), n=st.integers(2, 6), k=st.integers(1, 4))
def test_order_of_support_and_of_rows_does_not_matter(seed, n, k):
    module = SemanticAnchorPurification(16, 40).eval()
    domain, semantic, labels = episode(n=n, k=k, seed=seed)
    out = module(domain, semantic, semantic[: n * k], labels, n_way=n)
    assert_close(out.attention.sum(1), torch.ones(len(domain)))
    g = torch.Generator().manual_seed(seed)
    rows, support = torch.randperm(len(domain), generator=g), torch.randperm(n * k, generator=g)
    moved = module(domain[rows], semantic[rows], semantic[: n * k][support], labels[support], n_way=n)
    assert_close(moved.purified, out.purified[rows], atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 1000))
def test_renaming_classes_permutes_the_attention(seed):
    module = SemanticAnchorPurification(16, 40).eval()
    domain, semantic, labels = episode(seed=seed)
    names = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    a, b = run(module, domain, semantic, labels), run(module, domain, semantic, names[labels])
    assert_close(b.purified, a.purified, atol=1e-5, rtol=1e-5)
    assert_close(b.attention[:, names], a.attention, atol=1e-5, rtol=1e-5)


def test_mixing_support_with_query_rows_changes_the_result():
    module = SemanticAnchorPurification(16, 40).eval()
    domain, semantic, labels = episode()
    right = run(module, domain, semantic, labels).purified
    wrong = module(domain, semantic, semantic[-N * K :], labels, n_way=N).purified
    assert (right - wrong).abs().max() > 0.01


def test_a_missing_class_stops_the_program():
    module = SemanticAnchorPurification(16, 40)
    domain, semantic, labels = episode()
    with pytest.raises(RuntimeError, match="no support row"):
        run(module, domain, semantic, labels.clamp(max=N - 2))


def test_wrong_widths_are_named():
    module = SemanticAnchorPurification(16, 40)
    domain, semantic, labels = episode(dom=12)
    with pytest.raises(ValueError, match=r"16 and 40 channels, got shapes \(40, 12\)"):
        run(module, domain, semantic, labels)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale_mode": "patch3"}, "scale_mode"),
        ({"cap_mode": "output"}, "cap_mode"),
        ({"scale_init": 200.0}, "scale_init"),
        ({"scale_init": 0.0}, "scale_init"),
        ({"scale_init": 100.0, "cap_mode": "soft"}, "never reaches"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_values_are_errors_that_name_the_option(options, said):
    with pytest.raises((ValueError, TypeCheckError), match=said):  # the shape checks of the tests look at Literals first
        SemanticAnchorPurification(**options)


@pytest.mark.parametrize("mode", ["learned", "fixed_sqrt"])
def test_forward_and_backward_never_wait_for_the_device(mode):
    module = SemanticAnchorPurification(16, 40, scale_mode=mode)
    domain, semantic, labels = episode()
    with NoWaiting():
        out = run(module, domain, semantic, labels)
        (out.purified.sum() + out.orthogonal_loss).backward()
    assert all(not m.requires_grad and m.ndim == 0 for m in out.monitors.values())


def test_mixed_precision_changes_nothing():
    module = SemanticAnchorPurification(16, 40).eval()
    domain, semantic, labels = episode()
    plain = run(module, domain, semantic, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(module, domain, semantic, labels)
    assert_close(mixed.purified, plain.purified, atol=0, rtol=0)


def test_shapes_of_the_published_size_on_the_meta_device():
    module = SemanticAnchorPurification().to("meta")
    semantic = torch.empty(100, 640, device="meta")
    labels = torch.empty(25, dtype=torch.int64, device="meta")
    out = module(torch.empty(100, 64, device="meta"), semantic, semantic[:25], labels, n_way=5)
    assert (out.purified.shape, out.attention.shape) == ((100, 64), (100, 5))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_patch_2_checkpoint_loads_as_exactly_patch_2():
    old = SemanticAnchorPurification(16, 40, scale_mode="fixed_sqrt").eval()
    whole = {f"sap_module.{key}": value for key, value in old.state_dict().items()} | {"domain_classifier.x": torch.zeros(1)}
    new = SemanticAnchorPurification(16, 40).eval()
    report = load_release(new, whole, prefix="sap_module.")
    assert report.patch == 2
    assert report.filled == {"logit_scale_log": pytest.approx(-0.5 * math.log(40))}
    assert report.scale == pytest.approx(40**-0.5)
    domain, semantic, labels = episode()
    a, b = run(old, domain, semantic, labels), run(new, domain, semantic, labels)
    assert_close(a.purified, b.purified, atol=1e-6, rtol=1e-6)
    assert_close(a.attention, b.attention, atol=1e-7, rtol=1e-6)


def test_log_scale_that_makes_patch_3_patch_2_at_the_published_width():
    module = SemanticAnchorPurification()
    state = {k: v for k, v in module.state_dict().items() if k != "logit_scale_log"}
    assert load_release(module, state).filled["logit_scale_log"] == pytest.approx(-3.2307, abs=1e-4)


def test_a_patch_3_checkpoint_loads_into_every_cap_mode_with_its_scale():
    old = SemanticAnchorPurification(16, 40, scale_init=31.0, cap_mode="hard", detach_anchors=True)
    for cap_mode, detach, notes in (("hard", True, 0), ("inward", True, 1), ("soft", False, 2)):
        new = SemanticAnchorPurification(16, 40, cap_mode=cap_mode, detach_anchors=detach)
        report = load_release(new, old.state_dict())
        assert report.patch == 3
        assert report.scale == pytest.approx(31.0, rel=1e-5)
        assert len(report.notes) == notes


def test_checkpoints_that_do_not_fit_say_what_is_wrong():
    state = SemanticAnchorPurification(16, 40).state_dict()
    with pytest.raises(ValueError, match="scale_mode 'fixed_sqrt'"):
        load_release(SemanticAnchorPurification(16, 40, scale_mode="fixed_sqrt"), state)
    with pytest.raises(ValueError, match=r"W_q.0.bias: checkpoint \(40,\), module \(41,\)"):
        load_release(SemanticAnchorPurification(16, 41), state)


@pytest.mark.parametrize("option", [{"scale_init": 10.0}, {"scale_max": 50.0}, {"cap_mode": "hard"}])
def test_an_option_of_the_learned_scale_is_refused_without_one(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} = .* would have no effect.*'fixed_sqrt'"):
        SemanticAnchorPurification(8, 12, scale_mode="fixed_sqrt", **option)
    SemanticAnchorPurification(8, 12, **option)
