import contextlib
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.metrics import detection
from core.metrics.detection import Found, average_precision


def scenes(seed, images=6, levels=5):
    """Random truths and detections near them; few score levels, so that equal scores occur."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        corner = rng.uniform(0, 60, (rng.integers(0, 5), 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 40, corner.shape)], axis=1)
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 3, (2 * len(boxes), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        stray = rng.uniform(0, 60, (rng.integers(0, 4), 2))
        near = np.concatenate([near, np.concatenate([stray, stray + rng.uniform(5, 30, stray.shape)], axis=1)])
        found.append(Found(near, rng.integers(1, levels + 1, len(near)) / levels))
        truth.append(boxes)
    return found, truth


def official(found, truth):
    """The same through COCO's own evaluation code."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    xywh = lambda b: [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]  # noqa: E731
    annotations = [
        {"id": 0, "image_id": i, "category_id": 1, "bbox": xywh(b), "area": float((b[2] - b[0]) * (b[3] - b[1])), "iscrowd": 0}
        for i, boxes in enumerate(truth)
        for b in boxes
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    results = [
        {"image_id": i, "category_id": 1, "bbox": xywh(b), "score": float(s)}
        for i, f in enumerate(found)
        for b, s in zip(f.boxes, f.scores)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": i} for i in range(len(found))], "annotations": annotations, "categories": [{"id": 1}]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_equals_cocos_own_code(seed):
    pytest.importorskip("pycocotools")
    found, truth = scenes(seed)
    ours = average_precision(found, truth)
    if not ours.truths or not sum(len(f.scores) for f in found):
        return
    stats = official(found, truth)
    assert math.isclose(ours.ap, stats[0], abs_tol=1e-9)
    assert math.isclose(ours.at(0.5), stats[1], abs_tol=1e-9)
    assert math.isclose(ours.at(0.75), stats[2], abs_tol=1e-9)
    assert math.isclose(float(np.mean(ours.recall)), stats[8], abs_tol=1e-9)


def test_by_hand():
    truth = [np.array([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])]
    found = [
        Found(np.array([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0], [20.0, 20.0, 30.0, 26.0]]), np.array([0.9, 0.8, 0.7]))
    ]
    result = average_precision(found, truth)
    # at 0.5 and 0.55 and 0.6: hits 1, 0, 1: precision 1 up to recall 0.5 (51 points), then 2/3 (50 points)
    half = (51 * 1.0 + 50 * 2 / 3) / 101
    assert math.isclose(result.at(0.5), half)
    assert math.isclose(result.at(0.75), 51 / 101)
    assert math.isclose(result.ap, (3 * half + 7 * 51 / 101) / 10)
    assert result.recall[0] == 1.0
    assert result.recall[-1] == 0.5


def test_perfect_nothing_and_absent():
    truth = [np.array([[0.0, 0.0, 1.0, 1.0]]), np.zeros((0, 4))]
    none = Found(np.zeros((0, 4)), np.zeros(0))
    perfect = Found(truth[0], np.array([0.5]))
    assert average_precision([perfect, none], truth).ap == 1.0
    assert average_precision([none, none], truth).ap == 0.0
    stray = Found(np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([0.9]))
    assert math.isclose(average_precision([perfect, stray], truth).ap, 0.5)  # a box for an absent prompt counts as false
    assert math.isnan(average_precision([none], [np.zeros((0, 4))]).ap)


def test_bad_input_is_an_error():
    with pytest.raises((ValueError, TypeError), match="boxes"):
        Found(np.zeros((2, 4)), np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        Found(np.full((1, 4), np.nan), np.zeros(1))
    with pytest.raises(ValueError, match="1 images with detections and 0 with truths"):
        average_precision([Found(np.zeros((0, 4)), np.zeros(0))], [])


@given(seed=st.integers(0, 10_000))
def test_auroc_counts_pairs_and_ignores_monotone_change(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 6, 20).astype(float), rng.random(20) < 0.5
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    ours = detection.auroc(scores, positive)
    if not wins:
        assert math.isnan(ours)
        return
    assert math.isclose(ours, float(np.mean(wins)))
    assert math.isclose(detection.auroc(np.exp(scores) - 3, positive), ours)


def test_calibration_by_hand():
    probability, positive = np.array([0.95, 0.9, 0.15, 0.12]), np.array([True, False, False, False])
    # bins [0.9, 1]: mean 0.925, share 0.5; [0.1, 0.2): mean 0.135, share 0
    assert math.isclose(detection.calibration_error(probability, positive), 0.5 * 0.425 + 0.5 * 0.135)
    logits = np.array([0.0, 2.0, -1000.0])
    expected = (math.log(2) + math.log(1 + math.exp(2.0)) + 0.0) / 3
    assert math.isclose(detection.log_loss(logits, np.array([True, False, False])), expected)


def test_matthews_by_hand():
    positive = np.array([True, True, False, False])
    assert detection.matthews(positive, positive) == 1.0
    assert detection.matthews(~positive, positive) == -1.0
    assert detection.matthews(np.ones(4, bool), positive) == 0.0
    predicted = np.array([True, False, True, True])
    assert math.isclose(detection.matthews(predicted, positive), (1 * 0 - 2 * 1) / math.sqrt(3 * 2 * 2 * 1))


def test_nan_is_an_error_and_no_order():
    some, positive = np.array([0.1, np.nan, np.nan]), np.array([True, False, True])
    for metric, name in ((detection.auroc, "scores"), (detection.log_loss, "logits"), (detection.calibration_error, "probability")):
        with pytest.raises(ValueError, match=f"{name} must be numbers, got NaN at 2 of 3, first at index 1"):
            metric(some, positive)
    assert detection.auroc(np.array([np.inf, 0.0, -np.inf]), np.array([True, False, False])) == 1.0
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got values from 0.1 to 1.5"):
        detection.calibration_error(np.array([0.1, 1.5]), np.array([True, False]))
