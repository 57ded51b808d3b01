"""The whole model: sizes of the release, who reaches whom with gradients, streams of noise, and modes."""

from functools import partial

import pytest
import torch
from synchronisation import NoWaiting
from tiny import Encoder
from torch.testing import assert_close

from plugins.sap.dual_stream import DualStreamModel, EpisodeOutput, Features
from plugins.sap.episodes import EpisodeShape
from plugins.sap.linear_probe import linear_probe
from plugins.sap.purification import SemanticAnchorPurification
from plugins.sap.random_streams import stream
from plugins.sap.separation import separation_ratio

SHAPE = EpisodeShape(3, 2, 3)


def build(detach=False, **options):
    torch.manual_seed(0)
    purification = options.pop("purification", partial(SemanticAnchorPurification, detach_anchors=detach))
    return DualStreamModel(intrinsic=Encoder, purification=purification, **options)


def episode(seed=0):
    g = torch.Generator().manual_seed(seed)
    classes = torch.tensor([0, 0, 4, 4, 6, 6, 0, 0, 0, 4, 4, 4, 6, 6, 6])
    domains = torch.tensor([0, 1, 1, 0, 0, 1] + [2] * 9)
    return torch.randn(15, 3, 24, 24, generator=g), classes, domains


def test_size_of_the_release():
    model = DualStreamModel()
    assert sum(p.numel() for p in model.parameters()) == 12_849_001
    assert len(list(model.parameters())) == 83
    counts = {
        part: sum(p.numel() for n, p in model.named_parameters() if n.startswith(part))
        for part in ("backbone.intrinsic_encoder", "backbone.domain_encoder", "domain_classifier", "intrinsic_supcon_module", "domain_supcon_module", "sap_module")
    }  # fmt: skip
    assert list(counts.values()) == [12_465_792, 54_947, 4_420, 196_992, 3_136, 123_714]
    assert len(model.state_dict()) == 96
    assert len(list(DualStreamModel(purification=None).parameters())) == 74


@pytest.mark.parametrize("detach", [True, False])
def test_what_domain_losses_reach(detach):  # finding 1
    model = build(detach)
    output = model(*episode(), shape=SHAPE)
    intrinsic = list(model.backbone.intrinsic_encoder.parameters())
    own = [p for n, p in model.named_parameters() if n.startswith(("backbone.domain_encoder", "sap_module"))]
    for name in ("domain", "domain_contrast"):
        found = torch.autograd.grad(output.losses[name], intrinsic, allow_unused=True, retain_graph=True)
        assert all((g is None) == detach for g in found)
    # The orthogonality loss reaches the semantic features through the anchors only; its target is detached.
    found = torch.autograd.grad(output.losses["orthogonality"], intrinsic, allow_unused=True, retain_graph=True)
    assert all((g is None) == detach for g in found)
    assert all(g is None for g in torch.autograd.grad(output.losses["class"], own, allow_unused=True, retain_graph=True))


def test_the_intrinsic_branch_starts_the_same_whatever_else_is_on():
    a, b = build(), build(purification=None, domain_contrast=None)
    for (name, p), (_, q) in zip(a.backbone.intrinsic_encoder.named_parameters(), b.backbone.intrinsic_encoder.named_parameters()):
        assert (p == q).all(), name
    assert (
        a.intrinsic_supcon_module.projection_head.projector[0].weight
        == b.intrinsic_supcon_module.projection_head.projector[0].weight
    ).all()


def test_named_noise_is_the_same_whatever_else_draws():
    with_sap, without = build(), build(purification=None)
    inputs = episode()
    first = with_sap(*inputs, shape=SHAPE, noise=(7, 3))
    torch.rand(5)
    second = without(*inputs, shape=SHAPE, noise=(7, 3))
    assert (first.logits == second.logits).all()
    assert float(first.losses["intrinsic_contrast"].detach()) == float(second.losses["intrinsic_contrast"].detach())
    assert (with_sap(*inputs, shape=SHAPE, noise=(7, 4)).logits != first.logits).any()
    # Without names, everybody draws from one stream, and what is drawn between moves it.
    torch.manual_seed(0)
    one = with_sap(*inputs, shape=SHAPE).losses["intrinsic_contrast"]
    torch.manual_seed(0)
    two = without(*inputs, shape=SHAPE).losses["intrinsic_contrast"]
    assert float(one.detach()) != float(two.detach())


def test_a_stream_leaves_the_global_one_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with stream((1, 2), "domain", torch.device("cpu")):
        inside = torch.rand(4)
    assert (torch.rand(4) == expected).all()
    with stream((1, 2), "domain", torch.device("cpu")):
        assert (torch.rand(4) == inside).all()
    with stream((1, 2), "intrinsic", torch.device("cpu")):
        assert (torch.rand(4) != inside).any()


def test_one_call_or_two_are_the_same_in_evaluation_only():
    joint, apart = build().eval(), build(joint_forward=False).eval()
    inputs = episode()
    assert_close(joint(*inputs, shape=SHAPE).logits, apart(*inputs, shape=SHAPE).logits, atol=1e-5, rtol=1e-5)
    joint.train(), apart.train()
    for noise in ((0, n) for n in range(8)):
        if (joint(*inputs, shape=SHAPE, noise=noise).logits - apart(*inputs, shape=SHAPE, noise=noise).logits).abs().max() > 1e-3:
            return
    pytest.fail("MixStyle and DropBlock made no difference between one call and two")


def test_features_and_purify_agree_with_the_episode_in_evaluation():
    model = build().eval()
    images, classes, domains = episode()
    features = model(images)
    assert isinstance(features, Features)
    output = model(images, classes, domains, shape=SHAPE)
    assert isinstance(output, EpisodeOutput)
    labels = SHAPE.labels(torch.device("cpu"))
    purified = model.purify(features.domain, features.intrinsic, torch.arange(6), labels[:6], 3)
    assert_close(purified.monitors["attn_entropy"], output.monitors["attn_entropy"])
    logits, _ = model.prototype_head(features.intrinsic[6:], features.intrinsic[:6], labels[:6], n_way=3)
    assert_close(logits, output.logits)


def test_a_whole_step_never_waits_for_the_device():
    model = build()
    inputs = episode()
    with NoWaiting():
        output = model(*inputs, shape=SHAPE, noise=(0, 1))
        torch.stack(list(output.losses.values())).sum().backward()
    assert all(not m.requires_grad and m.ndim == 0 for m in output.monitors.values())
    assert {"attn_entropy", "attn_max", "logit_scale", "logit_scale_clipped", "gate", "accuracy[train]"} <= output.monitors.keys()


def test_wrong_rows_are_named():
    model = build()
    images, classes, domains = episode()
    with pytest.raises(ValueError, match="has 15 rows, got 14"):
        model(images[1:], classes[1:], domains[1:], shape=SHAPE)
    with pytest.raises(ValueError, match="class and domain numbers"):
        model(images, shape=SHAPE)


# --- what features hold -----------------------------------------------------------------------------------------------


def test_the_probe_reads_what_is_linear_and_not_what_is_not_there():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=g)
    features = torch.randn(400, 6, generator=g) * 5 + 100
    assert linear_probe(features[:300], labels[:300], features[300:], labels[300:]).accuracy < 0.45
    features[:, 2] += 25 * labels
    found = linear_probe(features[:300], labels[:300], features[300:], labels[300:])
    assert found.accuracy > 0.95
    assert found.majority == pytest.approx(float(torch.bincount(labels[300:]).max()) / 100)
    with pytest.raises(ValueError, match=r"labels \[3\] that training rows never have"):
        linear_probe(features[:300], labels[:300], features[300:], labels[300:] * 0 + 3)
    with pytest.raises(ValueError, match="rows on both sides"):
        linear_probe(features[:0], labels[:0], features, labels)


def test_separation_by_hand_and_its_limits():
    features, labels = torch.randn(12, 5), torch.arange(12) % 3
    rows = [f / f.norm() for f in features]
    prototypes = [sum(r for r, c in zip(rows, labels) if c == k) / 4 for k in range(3)]
    between = sum((prototypes[a] - prototypes[b]).norm() for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    within = sum(sum((r - prototypes[k]).norm() for r, c in zip(rows, labels) if c == k) / 4 for k in range(3)) / 3
    assert float(separation_ratio(features, labels, 3)) == pytest.approx(float(between / within), rel=1e-5)
    assert float(separation_ratio(features * 9, labels, 3)) == pytest.approx(float(between / within), rel=1e-4)
