"""The task: what is wrong with the data is said before the first step, and what was measured is said whole."""

import functools

import pytest
import torch
from sdtps.published_layouts import GREY, save, write_rgbnt201

from plugins.sdtps.augmentation import EvalTransform, TrainTransform
from plugins.sdtps.clip_vit import CLIPVisionTransformer
from plugins.sdtps.multimodal import MultiModalSDTPS
from plugins.sdtps.reid_model import TriModalReID
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
