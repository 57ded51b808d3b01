"""The re-identification network: its parts by hand, its published sizes, released names, and several processes as one."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

from core.distributed import gather
from plugins.sdtps.adaptive_masking import AdaptiveMasking, AdaptiveMaskingKeys
from plugins.sdtps.clip_vit import CLIPVisionTransformer
from plugins.sdtps.multimodal import MultiModalSDTPS
from plugins.sdtps.reid_losses import BatchHardTriplet, LabelSmoothedCrossEntropy
from plugins.sdtps.reid_model import (
    MODALITIES,
    BNNeckHead,
    PatchIntegrated,
    ReferenceKeys,
    TriModalReID,
    mean_over_tokens,
    pattern,
)
from plugins.sdtps.token_aggregation import TokenAggregation
from plugins.sdtps.token_sparse import TokenSparse

small_tower = functools.partial(
    CLIPVisionTransformer, image_size=(16, 8), patch=4, width=12, layers=2, heads=3, output_dim=8, camera_std=0.5
)
small = functools.partial(TriModalReID, 5, 3, backbone=small_tower)


def images(b=6):
    return {m: torch.randn(b, 3, 16, 8) for m in MODALITIES}


# --- parts --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pife_by_hand():
    layer, cls, patches = PatchIntegrated(4), torch.randn(2, 4), torch.randn(2, 5, 4)
    for i in range(2):
        both = torch.cat([cls[i], sum(patches[i]) / 5])
        normed = (both - both.mean()) / (both.var(unbiased=False) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
        hidden = layer.reduce.weight @ normed + layer.reduce.bias
        torch.testing.assert_close(layer(cls, patches)[i], hidden / (1 + torch.exp(-1.702 * hidden)), atol=1e-5, rtol=1e-5)


def test_head_scores_after_the_norm_and_its_shift_stays_zero():
    head, x = BNNeckHead(6, 4), torch.randn(9, 6) * 3 + 1
    expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() @ head.classify.weight.T
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-4)
    head(x).sum().backward()
    assert head.norm.bias.grad is None
    assert head.norm.weight.grad is not None
    assert head.classify.bias is None
    assert BNNeckHead(500, 500).classify.weight.std().item() == pytest.approx(0.001, rel=0.02)


def test_masked_mean_leaves_out_dropped_tokens():
    tokens = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]], [[0.0, 0.0]] * 3])
    assert mean_over_tokens(tokens, masked=True).tolist() == [[2.0, 1.0], [0.0, 0.0]]
    torch.testing.assert_close(mean_over_tokens(tokens, masked=False), tokens.sum(1) / 3)
    some = torch.randn(2, 4, 3)
    torch.testing.assert_close(mean_over_tokens(some, masked=True), some.mean(1))


# --- the whole ------------------------------------------------------------------------------------------------------------


def test_one_pass_of_the_tower_equals_a_pass_a_modality():
    """The forward pass, written out modality by modality."""
    model, x, cameras = small().eval(), images(), torch.tensor([0, 1, 2, 0, 1, 2])
    tokens = {m: model.backbone(x[m], cameras) for m in MODALITIES}
    glob = {m: model.pife[m](t[:, 0], t[:, 1:]) for m, t in tokens.items()}
    enhanced = model.tokens({m: t[:, 1:] for m, t in tokens.items()}, glob).tokens
    output = model(x, cameras)
    torch.testing.assert_close(output.features["ori"], torch.cat([glob[m] for m in MODALITIES], 1), atol=1e-5, rtol=1e-4)
    pooled = torch.cat([sum(enhanced[m].unbind(1)) / enhanced[m].shape[1] for m in MODALITIES], 1)
    torch.testing.assert_close(output.features["sdtps"], pooled, atol=1e-5, rtol=1e-4)
    assert output.scores == {}
    assert {m: v.shape for m, v in output.masks.items()} == dict.fromkeys(MODALITIES, (6, 8))
    assert torch.equal(pattern(output.features, "both"), torch.cat([output.features["ori"], output.features["sdtps"]], 1))
    assert torch.equal(pattern(output.features, "ori"), output.features["ori"])
    assert torch.equal(pattern(output.features, "branch"), output.features["sdtps"])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("tokens", [MultiModalSDTPS, None])
def test_branches(direct, tokens):
    model = small(direct=direct, tokens=tokens)
    output = model(images(), torch.zeros(6, dtype=torch.int64))
    widths = {"ori": 24} if direct else {f"ori_{m}": 8 for m in MODALITIES}
    if tokens is not None:
        widths["sdtps"] = 24
    assert {k: tuple(v.shape) for k, v in output.features.items()} == {k: (6, d) for k, d in widths.items()}
    assert {k: tuple(v.shape) for k, v in output.scores.items()} == dict.fromkeys(widths, (6, 5))
    for name, feature in output.features.items():
        fresh = (feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-5).sqrt()
        expected = fresh @ model.heads[name].classify.weight.T
        torch.testing.assert_close(output.scores[name], expected, atol=1e-4, rtol=1e-3)
    if tokens is None:
        assert pattern(output.features, "ori").shape == (6, 24)
        with pytest.raises(ValueError, match="needs a token branch"):
            pattern(output.features, "both")


def test_every_trainable_parameter_learns_from_the_two_losses():
    model, identities = small(), torch.tensor([0, 0, 1, 1, 2, 2])
    output = model(images(), torch.arange(6) % 3)
    total = sum(LabelSmoothedCrossEntropy()(s, identities) for s in output.scores.values())
    (total + sum(BatchHardTriplet()(f, identities) for f in output.features.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    assert silent == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["heads.ori.norm.bias", "heads.sdtps.norm.bias"]


def test_guides_are_those_asked_for():
    x, cameras = images(), torch.zeros(6, dtype=torch.int64)
    pife, cls = small(), small(guide="cls")
    cls.load_state_dict(pife.state_dict())
    a, b = pife.eval()(x, cameras), cls.eval()(x, cameras)
    assert torch.equal(a.features["ori"], b.features["ori"])
    assert not torch.allclose(a.features["sdtps"], b.features["sdtps"])
    own = small(tokens=functools.partial(MultiModalSDTPS, guide="mean_patch"))
    own.load_state_dict(pife.state_dict())
    c = own.eval()(x, cameras)
    assert not torch.allclose(c.features["sdtps"], a.features["sdtps"])
    plain = small(pife=False, guide="cls").eval()
    tokens = plain.backbone(x["rgb"], cameras)
    torch.testing.assert_close(plain(x, cameras).features["ori"][:, :8], tokens[:, 0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="guide is 'pife', but pife is False"):
        small(pife=False)


def test_pooling_of_masked_tokens():
    """Tokens kept in place as zeros: the masked mean is the mean of those kept."""
    module = functools.partial(
        MultiModalSDTPS, aggregate=None, sparse=functools.partial(TokenSparse, selection="in_place", extra_mode="none")
    )
    model, x, cameras = small(tokens=module).eval(), images(), torch.zeros(6, dtype=torch.int64)
    output = model(x, cameras)
    patches = model.backbone(x["nir"], cameras)[:, 1:]
    kept = torch.stack([p[m > 0].mean(0) for p, m in zip(patches, output.masks["nir"])])
    torch.testing.assert_close(output.features["sdtps"][:, 8:16], kept, atol=1e-5, rtol=1e-4)
    shrunk = small(tokens=module, masked_mean=False).eval()
    shrunk.load_state_dict(model.state_dict())
    torch.testing.assert_close(shrunk(x, cameras).features["sdtps"][:, 8:16], kept / 2, atol=1e-5, rtol=1e-4)


def test_a_missing_modality_guides_or_does_not():
    seen = {}

    class Watch(nn.Module):
        def __init__(self, dim, num_patches, modalities):
            super().__init__()
            self.inner = MultiModalSDTPS(dim, num_patches, modalities)

        def forward(self, patches, guides):
            seen.update(guides)
            return self.inner(patches, guides)

    x, cameras = images(), torch.zeros(6, dtype=torch.int64)
    x["tir"][2:] = 0
    keep = small(tokens=Watch).eval()
    keep(x, cameras)
    kept = dict(seen)
    drop = small(tokens=Watch, missing_guide="drop").eval()
    drop.load_state_dict(keep.state_dict())
    drop(x, cameras)
    for m in ("rgb", "nir"):
        assert torch.equal(seen[m], kept[m])
    assert torch.equal(seen["tir"][:2], kept["tir"][:2])
    torch.testing.assert_close(seen["tir"][2:], (kept["rgb"][2:] + kept["nir"][2:]) / 2)
    x["rgb"][:], x["nir"][:] = 0, 0
    assert all(f.isfinite().all() for f in drop(x, cameras).features.values())


# --- published sizes and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"tokens": None, "pife": False, "guide": "cls"}, 86_407_680),
        ({"tokens": None}, 87_988_224),
        ({}, 87_988_224 + 365_157 + 262_656 + 1_536),
        ({"tokens": "0.7/0.5"}, 88_623_444),
    ],
)
def test_parameter_counts_of_the_release(options, count):
    """RGBNT201: 171 identities, 4 cameras, 256 × 128; trainable parameters, as the release's logs count them."""
    if options.get("tokens") == "0.7/0.5":
        options = {
            "tokens": functools.partial(
                MultiModalSDTPS,
                sparse=functools.partial(TokenSparse, sparse_ratio=0.7),
                aggregate=functools.partial(TokenAggregation, aggr_ratio=0.5),
            )
        }
    with torch.device("meta"):
        model = TriModalReID(171, 4, **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_released_names_with_another_token_module():
    model, keys = small(tokens=AdaptiveMasking), ReferenceKeys(AdaptiveMaskingKeys("sdtps."))
    theirs = keys.to_reference(model.state_dict())
    assert any(k.startswith("sdtps.rgb_cross_nir.") for k in theirs)
    assert {k: v.shape for k, v in keys.from_reference(theirs).items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("direct", [True, False])
def test_released_names_map_both_ways(direct):
    model, keys = small(direct=direct), ReferenceKeys()
    state = model.state_dict()
    theirs = keys.to_reference(state)
    assert theirs["BACKBONE.cv_embed"].shape == (3, 1, 12)
    for name in (
        "BACKBONE.base.transformer.resblocks.1.attn.in_proj_weight", "BACKBONE.base.proj", "rgb_reduce.0.weight", "tir_reduce.1.bias",
        "sdtps.nir_sparse.score_predictor.0.weight", "bottleneck_sdtps.running_var", "classifier_sdtps.weight",
        *(("bottleneck.weight", "classifier.weight") if direct else ("bottleneck_r.weight", "classifier_n.weight", "bottleneck_t.bias")),
    ):  # fmt: skip
        assert name in theirs
    back = keys.from_reference(theirs)
    assert set(back) == set(state)
    assert all(torch.equal(v, back[k]) for k, v in state.items())
    assert "generalFusion.x" in keys.from_reference({"generalFusion.x": torch.ones(1)})


# --- several processes ------------------------------------------------------------------------------------------------------


def _step(model, x, cameras, identities):
    """Losses of the reproduction and gradients, of the whole batch or of this process's part of it."""
    output = model(x, cameras)
    identities = gather(identities)
    total = sum(0.25 * LabelSmoothedCrossEntropy()(s, identities) for s in output.scores.values())
    total = total + sum(BatchHardTriplet()(f, identities) for f in output.features.values())
    total.backward()
    return total.detach()


def _rank(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    work = torch.load(Path(folder) / "work.pt")
    model = small()
    model.load_state_dict(work["state"])
    part = slice(4 * rank, 4 * rank + 4)
    x = {m: v[part] for m, v in work["images"].items()}
    loss = _step(model, x, work["cameras"][part], work["identities"][part])
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():  # what DistributedDataParallel does with them
        torch.distributed.all_reduce(grad)
        grad /= 2
    torch.save({"loss": loss, "grads": grads, "state": model.state_dict()}, Path(folder) / f"done{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    """Identities are spread so that positives and hardest negatives lie in the other process; the norm needs all samples."""
    model = small()
    work = {
        "state": {k: v.clone() for k, v in model.state_dict().items()}, "images": images(8), "cameras": torch.arange(8) % 3,
        "identities": torch.tensor([0, 1, 2, 3, 0, 1, 2, 4]),
    }  # fmt: skip
    torch.save(work, tmp_path / "work.pt")
    loss = _step(model, work["images"], work["cameras"], work["identities"])
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        done = torch.load(tmp_path / f"done{rank}.pt")
        torch.testing.assert_close(done["loss"], loss, atol=1e-5, rtol=1e-5)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(grads) == set(done["grads"])
        for name, grad in grads.items():
            torch.testing.assert_close(done["grads"][name], grad, atol=1e-4 * float(grad.abs().max()) + 1e-7, rtol=1e-3, msg=name)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(done["state"][name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_selection_inside_the_tower_keeps_what_it_says_and_saves_compute():
    from functools import partial

    from core.profile import profile, token_reports
    from plugins.sdtps.clip_vit import CLIPVisionTransformer
    from plugins.sdtps.multimodal import MultiModalSDTPS
    from plugins.sdtps.reid_model import MODALITIES, TriModalReID
    from plugins.sdtps.token_sparse import TokenSparse

    tower = partial(CLIPVisionTransformer, image_size=(32, 16), patch=4, width=16, layers=3, heads=2, output_dim=24)

    def network(ratio):
        torch.manual_seed(0)
        inside = (
            None if ratio is None else partial(MultiModalSDTPS, sparse=partial(TokenSparse, sparse_ratio=ratio), aggregate=None)
        )
        return TriModalReID(5, 2, backbone=tower, inside=inside, inside_after=1, tokens=None).eval()

    images = {m: torch.randn(2, 3, 32, 16) for m in MODALITIES}
    cameras = torch.zeros(2, dtype=torch.int64)
    macs = {}
    for ratio in (None, 1.0, 0.5, 0.25):
        model = network(ratio)
        macs[ratio] = profile(model, (images, cameras), timed=False).macs
        if ratio is not None:
            (report,) = token_reports(model).values()
            assert report.tokens_out == int(32 * ratio) + 1
            assert {m: int(v.sum(1)[0]) for m, v in model(images, cameras).masks.items()} == dict.fromkeys(
                MODALITIES, int(32 * ratio)
            )
    assert macs[0.25] < macs[0.5] < macs[None] < macs[1.0]

    # With every token kept, the extra one being zero, only the selection's order and that token set it apart from the plain tower.
    whole, plain = network(1.0), network(None)
    plain.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("inside")})
    hidden = [m.backbone.run(m.backbone.embed(images["rgb"], m.backbone.camera_shift(cameras)), 0, 1) for m in (whole, plain)]
    assert torch.equal(hidden[0], hidden[1])
    with pytest.raises(ValueError, match="inside_after must leave a block to run"):
        TriModalReID(5, 2, backbone=tower, inside=MultiModalSDTPS, inside_after=3)


IN_TOWER = functools.partial(MultiModalSDTPS, aggregate=None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tokens": None, "missing_guide": "drop"}, "no token module takes a guide"),
        ({"tokens": None, "masked_mean": False}, "there is no token module"),
        ({"tokens": None, "guide": "cls"}, "there is no token module"),
        ({"tokens": None, "inside_after": 0}, "there is no token module inside the tower"),
        ({"inside_after": 0}, "there is no token module inside the tower"),
        (
            {"tokens": functools.partial(MultiModalSDTPS, guide="mean_patch"), "missing_guide": "drop"},
            "no token module takes a guide",
        ),
        ({"tokens": functools.partial(MultiModalSDTPS, guide="mean_patch"), "guide": "cls"}, "the token module's own guide"),
    ],
)
def test_an_option_that_could_not_take_effect_is_refused(options, why):
    with pytest.raises(ValueError, match=f"would have no effect, because {why}"):
        small(**options)


def test_what_the_guide_is_matters_only_where_one_is_taken():
    small(tokens=None, pife=False)
    small(tokens=None, pife=False, guide="cls")
    with pytest.raises(ValueError, match="set guide = 'cls'"):
        small(pife=False)


@torch.no_grad()
def test_a_missing_modality_guides_the_selection_inside_the_tower_or_does_not():
    x, cameras = images(), torch.zeros(6, dtype=torch.int64)
    x["nir"] = torch.zeros_like(x["nir"])
    seen = {}
    for how in ("keep", "drop"):
        torch.manual_seed(0)
        model = small(tokens=None, inside=IN_TOWER, inside_after=1, missing_guide=how).eval()
        model.inside.register_forward_pre_hook(lambda _, given, how=how: seen.__setitem__(how, given[1]))
        model(x, cameras)
    cls = seen["keep"]
    torch.testing.assert_close(seen["drop"]["nir"], (cls["rgb"] + cls["tir"]) / 2)
    assert all(torch.equal(seen["drop"][m], cls[m]) for m in ("rgb", "tir"))
