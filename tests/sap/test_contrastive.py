"""The two contrastive losses: their sums by hand, their temperatures, and limits."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from synchronisation import NoWaiting
from torch.testing import assert_close

from plugins.sap.contrastive import DomainSupCon, IntrinsicSupCon, piecewise_linear, weighted_contrast
from plugins.sap.leakage import pair_cosines


def rows(count=12, dim=8, classes=3, domains=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, dim, generator=g),
        torch.randint(classes, (count,), generator=g),
        torch.randint(domains, (count,), generator=g),
    )


def by_hand(kind, z, classes, domains, tau):
    """The note's sums, pair by pair, in float64."""
    z = z.detach().double()
    count, total, anchors = len(z), 0.0, 0
    for i in range(count):
        similar = [float(z[i] @ z[j]) / tau for j in range(count)]
        peak = max(s for j, s in enumerate(similar) if j != i)
        denominator, positives = 0.0, []
        for j in range(count):
            if j == i:
                continue
            same_class, same_domain = bool(classes[i] == classes[j]), bool(domains[i] == domains[j])
            if kind == "intrinsic":
                v = 1.2 if not same_class and not same_domain else 1.0
                if same_class:
                    positives.append((j, 0.7 if same_domain else 1.5))
            else:
                v = 1.5 if same_class and not same_domain else 1.0
                if same_domain:
                    positives.append((j, 0.3 if same_class else 1.2))
            denominator += v * math.exp(similar[j] - peak)
        if positives:
            anchors += 1
            total -= sum(w * (similar[j] - peak - math.log(denominator + 1e-8)) for j, w in positives) / len(positives)
    return total / max(anchors, 1)


def losses(dim=8):
    return {
        "intrinsic": IntrinsicSupCon(dim, 6, 4, cross_domain_neg_weight=1.2),
        "domain": DomainSupCon(dim, 6, 4),
    }


@pytest.mark.parametrize("kind", ["intrinsic", "domain"])
@pytest.mark.parametrize("epoch", [0, 20, 55])
def test_matches_the_sums(kind, epoch):
    loss = losses()[kind].eval()
    features, classes, domains = rows()
    out = loss(features * 20, classes, domains, epoch)
    expected = by_hand(kind, out.projections, classes, domains, loss.temperature(epoch))
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("epoch", "intrinsic", "domain"),
    [
        (0, 0.5, 0.5), (10, 0.5, 0.5), (15, 0.45, 0.50), (20, 0.40, 0.52), (30, 0.30, 0.56), (40, 0.30, 0.60),
        (50, 0.30, 0.45), (55, 0.25, 0.375), (59, 0.21, 0.315), (60, 0.2, 0.3), (99, 0.2, 0.3),
    ],
)  # fmt: skip
def test_temperatures_of_the_recipe(epoch, intrinsic, domain):
    assert IntrinsicSupCon(8, 4, 4).temperature(epoch) == pytest.approx(intrinsic)
    assert DomainSupCon(8, 4, 4).temperature(epoch) == pytest.approx(domain)


@given(epoch=st.floats(0, 80))
def test_temperature_is_continuous_and_within_its_knots(epoch):
    for loss in (IntrinsicSupCon(8, 4, 4), DomainSupCon(8, 4, 4)):
        here, next_to_it = loss.temperature(epoch), loss.temperature(epoch + 1e-6)
        assert 0.2 - 1e-9 <= here <= 0.6 + 1e-9
        assert abs(here - next_to_it) < 1e-6


def test_schedules_that_run_backwards_are_errors():
    with pytest.raises(ValueError, match="ascend strictly"):
        piecewise_linear(3, ((10, 0.5), (10, 0.3)))
    with pytest.raises(ValueError, match="ascend strictly"):
        IntrinsicSupCon(8, 4, 4, phase2_end=70)
    with pytest.raises(ValueError, match="above 0"):
        DomainSupCon(8, 4, 4, final_temp=0.0)
    with pytest.raises(ValueError, match="cdsc_neg_weight"):
        DomainSupCon(8, 4, 4, cdsc_neg_weight=0.9)


def test_with_all_weights_one_it_is_the_published_supervised_contrastive_loss():
    """Khosla et al., eq. 2, value and gradient."""
    features, classes, _ = rows()
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    z = torch.nn.functional.normalize(ours, dim=-1)
    same = classes[:, None] == classes
    weighted_contrast(z, 0.3, same, torch.ones(12, 12), torch.ones(12, 12)).backward()
    z = torch.nn.functional.normalize(theirs, dim=-1)
    other = ~torch.eye(12, dtype=torch.bool)
    log_share = z @ z.t() / 0.3 - (z @ z.t() / 0.3).masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    per_row = [log_share[i][(same & other)[i]].mean() for i in range(12) if (same & other)[i].any()]
    (-torch.stack(per_row).mean()).backward()
    assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_no_positive_gives_zero_and_not_nan():
    features = torch.randn(3, 8, requires_grad=True)
    out = losses()["intrinsic"](features, torch.arange(3), torch.zeros(3, dtype=torch.int64), 0)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert float(features.grad.abs().max()) == 0.0
    assert out.monitors["cdsc"].isnan()


@given(seed=st.integers(0, 1000))
def test_row_order_does_not_matter(seed):
    features, classes, domains = rows(seed=seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    for loss in losses().values():
        loss.eval()
        assert_close(loss(features, classes, domains, 0).loss, loss(features[order], classes[order], domains[order], 0).loss)


def test_scale_of_the_loss_depends_on_the_mix_of_domains():
    """Weights do not cancel: the same features with other domain labels give another loss, even for one positive."""
    loss = losses()["intrinsic"].eval()
    features, classes = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
    one_domain = loss(features, classes, torch.tensor([0, 0, 0, 0]), 0).loss
    crossed = loss(features, classes, torch.tensor([0, 1, 0, 1]), 0).loss
    assert float((crossed / one_domain).detach()) > 1.5


@pytest.mark.parametrize("kind", ["intrinsic", "domain"])
def test_no_waiting(kind):
    features, classes, domains = rows()
    features.requires_grad_()
    loss = losses()[kind]
    with NoWaiting():
        out = loss(features, classes, domains, 3)
        out.loss.backward()
    assert all(not m.requires_grad for m in out.monitors.values())


def test_sizes_of_the_release():
    assert sum(p.numel() for p in IntrinsicSupCon().parameters()) == 196_992
    assert sum(p.numel() for p in DomainSupCon().parameters()) == 3_136


# --- leakage ----------------------------------------------------------------------------------------------------------


def test_pair_cosines_by_hand():
    features, classes, domains = rows()
    found = pair_cosines(features, classes, domains)
    kinds: dict[tuple[bool, bool], list[float]] = {}
    for i in range(12):
        for j in range(12):
            if i != j:
                cosine = float(features[i] @ features[j] / features[i].norm() / features[j].norm())
                kinds.setdefault((bool(domains[i] == domains[j]), bool(classes[i] == classes[j])), []).append(cosine)
    expected = {key: sum(v) / len(v) for key, v in kinds.items()}
    assert float(found.cdsc) == pytest.approx(expected[False, True], abs=1e-6)
    assert float(found.cddc) == pytest.approx(expected[False, False], abs=1e-6)
    assert float(found.sdsc) == pytest.approx(expected[True, True], abs=1e-6)
    assert float(found.sddc) == pytest.approx(expected[True, False], abs=1e-6)
    index = expected[False, True] - expected[False, False]
    assert float(found.leak_index) == pytest.approx(index, abs=1e-6)
    assert float(found.leak_intensity) == pytest.approx(max(0.0, index), abs=1e-6)
    assert float(found.normalised_leak_index) == pytest.approx(index / (1 - expected[False, False]), abs=1e-6)


def test_features_that_are_the_class_leak_and_features_that_are_the_domain_do_not():
    classes, domains = torch.arange(12) % 3, torch.arange(12) // 6
    assert float(pair_cosines(torch.eye(3)[classes], classes, domains).leak_index) == 1.0
    assert float(pair_cosines(torch.eye(2)[domains], classes, domains).leak_index) == 0.0
