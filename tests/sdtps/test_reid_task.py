"""The task: what is wrong with the data is said before the first step, and what was measured is said whole."""

import functools

import pytest
import torch
from sdtps.published_layouts import GREY, save, write_msvr310, write_rgbnt201
from torch import nn

from core.metrics import reid
from core.optim import parameter_groups
from plugins.sdtps.augmentation import EvalTransform, TrainTransform
from plugins.sdtps.clip_vit import CLIPVisionTransformer
from plugins.sdtps.datasets import MSVR310, RGBNT100
from plugins.sdtps.multimodal import MultiModalSDTPS
from plugins.sdtps.reid_model import ReIDOutput, TriModalReID
from plugins.sdtps.sampler import PKPlan
from plugins.sdtps.task import ReID
from plugins.sdtps.token_sparse import TokenSparse

TOWER = {"image_size": (16, 8), "patch": 4, "width": 12, "layers": 2, "heads": 3, "output_dim": 8}


def task(root, tower=None, network=None, **options):
    backbone = functools.partial(CLIPVisionTransformer, **TOWER, **(tower or {}))
    return ReID(
        str(root),
        network=functools.partial(TriModalReID, backbone=backbone, **(network or {})),
        train_transform=functools.partial(TrainTransform, (16, 8), padding=1),
        eval_transform=functools.partial(EvalTransform, (16, 8)),
        plan=functools.partial(PKPlan, identities=2, instances=2),
        **options,
    )


def add(root, pid, camera, folder="test"):
    for spectrum, value in zip(("RGB", "NI", "TI"), GREY.values()):
        save(root / folder / spectrum / f"{pid:06d}_cam{camera}_0_00.jpg", value)


def evaluated(work, folder):
    work.prepare(folder)
    torch.manual_seed(0)
    model = work.model().eval()
    with torch.inference_mode():
        metrics = work.evaluate(model)
        return metrics | work.conclude(model), model


def test_a_camera_that_training_never_saw_is_named_before_training(tmp_path):
    root = write_rgbnt201(tmp_path / "set")
    add(root, 30, 4)
    work = task(root)
    work.prepare(tmp_path)
    with pytest.raises(
        ValueError, match=r"test/RGB/000030_cam4_0_00\.jpg \(query\) is of camera 4, and training has only 1, 2.*'zero'"
    ):
        work.model()
    metrics, _ = evaluated(task(root, {"camera_unseen": "zero"}), tmp_path)
    assert "mAP[camera]" in metrics


def test_queries_of_which_none_has_a_match_are_found_before_training(tmp_path):
    root = write_rgbnt201(tmp_path / "set", cameras=(1,))
    with pytest.raises(ValueError, match=r"none of the 4 queries has a match .* 'camera'.*another camera"):
        task(root).prepare(tmp_path)
    with pytest.raises(ValueError, match=r"'scene'.*another scene.*The protocol of RGBNT201 is 'camera'"):
        task(write_rgbnt201(tmp_path / "other"), junk="scene").prepare(tmp_path)
    task(root, junk="none").prepare(tmp_path)


def test_skipped_queries_are_counted_and_said(tmp_path):
    root = write_rgbnt201(tmp_path / "set")
    work = task(root)
    whole, _ = evaluated(work, tmp_path)
    assert not [name for name in whole if "skipped" in name]
    assert "skipped" not in work.tables(whole)[0].note
    add(root, 77, 1)
    work = task(root)
    some, _ = evaluated(work, tmp_path)
    assert some.keys() - whole.keys() == {"skipped[camera]"}
    assert some["skipped[camera]"] == 1
    assert "1 of 9 queries have no match left and are skipped: the figures are of the other 8." in work.tables(some)[0].note


@pytest.mark.parametrize(
    ("tokens", "masked"),
    [
        (functools.partial(MultiModalSDTPS, sparse=functools.partial(TokenSparse, selection="in_place", extra_mode="none"), aggregate=None), True),
        (MultiModalSDTPS, False),
    ],
)  # fmt: skip
def test_tokens_that_are_masked_and_stay_are_called_so(tokens, masked, tmp_path):
    work = task(write_rgbnt201(tmp_path / "set"), network={"tokens": tokens, **({"masked_mean": False} if masked else {})})
    metrics, model = evaluated(work, tmp_path)
    table = work.tables(metrics)[-1]
    assert table.title == "tokens of a modality"
    assert any("masked" in row[0] for row in table.rows) == masked
    assert table.rows[0][0] == "patches"
    assert ("still there" in table.note) == masked
    assert work.unpruned(model).tokens is None


def test_the_protocol_is_the_data_sets_own_unless_told(tmp_path):
    root = write_msvr310(tmp_path / "set")
    whole, _ = evaluated(task(root, layout=MSVR310), tmp_path)
    assert "mAP[scene]" in whole
    assert not [name for name in whole if "[camera]" in name]


def test_a_branch_that_the_model_has_not_is_refused_when_it_is_built(tmp_path):
    root = write_rgbnt201(tmp_path / "set")
    for options, network, message in (
        ({"feature": "both"}, {"tokens": None}, r"ReID\.feature is 'both', but the model has no token branch \(it gives ori\)"),
        ({"branch_weights": {"stdps": 2.0}}, {}, "branch_weights names 'stdps'; this model has ori, sdtps"),
    ):
        work = task(root, network=network, **options)
        work.prepare(tmp_path)
        with pytest.raises(ValueError, match=message):
            work.model()
    work = task(root, network={"tokens": None}, feature="ori")
    work.prepare(tmp_path)
    assert work.model().branches == ("ori",)


def test_the_ratio_constraint_moves_the_scores(tmp_path):
    root = write_rgbnt201(tmp_path / "set")

    def tokens(**options):
        return {"tokens": functools.partial(MultiModalSDTPS, sparse=functools.partial(TokenSparse, **options))}

    for options in ({}, {"use_gumbel": True}):
        work = task(root, network=tokens(**options), ratio_weight=2.0)
        work.prepare(tmp_path)
        with pytest.raises(ValueError, match=r"ratio_weight = 2.0 needs soft masks.*relaxation = 'sigmoid'"):
            work.model()
    with pytest.raises(ValueError, match=r"ratio_target = 0\.3 would have no effect"):
        task(root, ratio_target=0.3)
    for target in (None, 0.2):
        work = task(root, network=tokens(use_gumbel=True, relaxation="sigmoid"), ratio_weight=2.0, ratio_target=target)
        work.prepare(tmp_path)
        torch.manual_seed(0)
        model = work.model()
        batch = next(iter(work.batches(0, 0)))
        soft = []
        forward = model.tokens.forward
        model.tokens.forward = lambda *given, forward=forward, soft=soft: soft.append(forward(*given)) or soft[-1]
        losses = work.losses(model, batch, 0).losses
        by_hand = sum((float(mask.mean()) - (target or 0.5)) ** 2 for mask in soft[0].soft.values()) / 3
        assert losses["ratio"].item() == pytest.approx(2 * by_hand)
        losses["ratio"].backward()
        assert model.tokens.selectors[1].score_predictor[2].bias.grad.abs() > 0


class _Fixed(nn.Module):
    """Features whose lengths differ more than their directions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, cameras):
        feature = torch.tensor([[1.0, 0.0], [9.0, 0.5], [0.0, 1.0], [0.5, 7.0], [3.0, 3.0]])[torch.arange(len(cameras)) % 5]
        return ReIDOutput({"ori": self.weight * feature}, {}, {})


def test_descriptors_are_normalised_unless_told(tmp_path):
    root = write_rgbnt201(tmp_path / "set")
    seen = []
    for feat_norm in (True, False):
        work = task(root, feat_norm=feat_norm, feature="ori")
        work.prepare(tmp_path)
        with torch.inference_mode():
            found = work.evaluate(_Fixed())
        features = _Fixed()(None, torch.zeros(len(work.data.query.records))).features["ori"]
        labels = work._labels(work.data.query)
        expected = reid.evaluate_features(features, features, labels, labels, junk="camera", normalise=feat_norm)
        assert found["mAP[camera]"] == expected.mAP
        seen.append(expected.mAP)
    assert seen[0] != seen[1]


def test_the_tower_takes_no_part_of_the_bias_factor(tmp_path):
    """Its rate stands above the factor in the release, whether it is the tower's own or the optimiser's."""
    work = task(write_rgbnt201(tmp_path / "set"), bias_lr_scale=2.0)
    work.prepare(tmp_path)
    scaled = next(g for g in parameter_groups(work.model(), work.parameter_rules()) if g.get("lr_scale") == 2.0)
    assert "heads.sdtps.classify.bias" not in scaled["names"]
    assert "pife.rgb.reduce.bias" in scaled["names"]
    assert not [name for name in scaled["names"] if name.startswith("backbone.") or not name.endswith("bias")]


@pytest.mark.parametrize(("layout", "identities", "cameras"), [(RGBNT100, 50, 8), (MSVR310, 155, 8)])
def test_a_blueprint_has_the_published_sizes_of_its_data_set(layout, identities, cameras):
    work = task("nowhere", layout=functools.partial(layout))
    for model in (work.blueprint(), work.unpruned(work.blueprint())):
        assert model.heads["ori"].classify.out_features == identities
        assert len(model.backbone.camera.table) == cameras
