import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from plugins.sam3_fusion import losses
from plugins.sam3_fusion.boxes import corners, iou
from plugins.sam3_fusion.losses import DetectionLoss
from plugins.sam3_fusion.matching import HungarianMatcher, OneToManyMatcher


def scene(seed=0, layers=2, pairs=3, queries=4, most=3):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, pairs, queries, generator=g)
    boxes = torch.rand(layers, pairs, queries, 4, generator=g) * 0.4 + 0.2
    targets = torch.rand(pairs, most, 4, generator=g) * 0.4 + 0.2
    valid = torch.arange(most)[None] < torch.tensor([[most], [1], [0]])[:pairs]
    return logits, boxes, targets, valid


def cost_by_hand(z, box, target):
    p = 1 / (1 + math.exp(-z))
    focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    far = sum(abs(float(a) - float(b)) for a, b in zip(box, target))
    _, giou = iou(corners(box), corners(target))
    return 2 * focal + 5 * far - 2 * float(giou)


def test_cost_matches_its_formula():
    logits, boxes, targets, _ = scene()
    cost = HungarianMatcher().cost(logits, boxes, targets)
    for layer, p, q, m in itertools.product(range(2), range(3), range(4), range(3)):
        assert math.isclose(
            float(cost[layer, p, q, m]), cost_by_hand(float(logits[layer, p, q]), boxes[layer, p, q], targets[p, m]), abs_tol=1e-4
        )


@given(seed=st.integers(0, 500))
def test_assignment_is_the_cheapest_of_all(seed):
    logits, boxes, targets, valid = scene(seed)
    matcher = HungarianMatcher()
    pairs, cost = matcher(logits, boxes, targets, valid), matcher.cost(logits, boxes, targets)
    for layer, p in itertools.product(range(2), range(3)):
        count = int(valid[p].sum())
        assert (pairs[layer, p].sum(dim=0)[:count] == 1).all()
        assert not pairs[layer, p][:, count:].any()
        assert (pairs[layer, p].sum(dim=1) <= 1).all()
        least = min(
            (sum(float(cost[layer, p, q, m]) for m, q in enumerate(chosen)) for chosen in itertools.permutations(range(4), count)),
            default=0.0,
        )
        assert math.isclose(float(cost[layer, p][pairs[layer, p]].sum()), least, abs_tol=1e-4)


def test_more_boxes_than_queries_and_broken_predictions():
    logits, boxes, targets, _ = scene(queries=2, most=3)
    pairs = HungarianMatcher()(logits, boxes, targets, torch.ones(3, 3, dtype=torch.bool))
    assert (pairs.sum(dim=(2, 3)) == 2).all()
    logits[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        HungarianMatcher()(logits, boxes, targets, torch.ones(3, 3, dtype=torch.bool))


def test_one_to_many_takes_queries_above_floor_and_quantile():
    queries, top = 10, 3
    logits, boxes, targets, valid = scene(3, 1, 3, queries)
    boxes[0, 0, :4] = targets[0, 0] + 0.01 * torch.arange(4)[:, None]
    pairs = OneToManyMatcher(top)(logits, boxes, targets, valid)
    for p, m in itertools.product(range(3), range(3)):
        overlap, _ = iou(corners(boxes[0, p]), corners(targets[p, m]))
        score = 0.3 * logits[0, p].sigmoid() + 0.7 * overlap
        ordered = sorted(score.tolist())
        at = (1 - top / queries) * (queries - 1)
        quantile = ordered[int(at)] + (at - int(at)) * (ordered[min(int(at) + 1, queries - 1)] - ordered[int(at)])
        expected = [(s > quantile + 1e-7) and s > 0.4 and bool(valid[p, m]) for s in score.tolist()]
        assert pairs[0, p, :, m].tolist() == expected
    assert 1 <= int(pairs[0, 0, :, 0].sum()) <= 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HungarianMatcher(-1.0), "class_weight"),
        (lambda: HungarianMatcher(0.0, 0.0, 0.0), "not all 0"),
        (lambda: OneToManyMatcher(0), "top must be at least 1"),
        (lambda: OneToManyMatcher(score_weight=1.5), "score_weight"),
        (lambda: DetectionLoss(box_weight=-1.0), "box_weight"),
    ],
)
def test_bad_options_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def bce(z, t):
    return max(z, 0) - z * t + math.log1p(math.exp(-abs(z)))


def terms_by_hand(logits, boxes, targets, valid, pairs):
    """One layer, loops; alpha .25, gamma 2, positive weight 10, rows q."""
    count = max(1, int(valid.sum()))
    box = giou = query = 0.0
    for p in range(logits.shape[0]):
        for q in range(logits.shape[1]):
            mine = [m for m in range(targets.shape[1]) if pairs[p, q, m]]
            best = 0.0
            for m in mine:
                overlap, generalised = iou(corners(boxes[p, q]), corners(targets[p, m]))
                box += float((boxes[p, q] - targets[p, m]).abs().sum()) / count
                giou += (1 - float(generalised)) / count
                best = max(best, float(overlap))
            if not valid[p].any():
                continue
            z = float(logits[p, q])
            prob = 1 / (1 + math.exp(-z))
            if mine:
                query += 10 * bce(z, max(prob**0.25 * best**0.75, 0.01))
            else:
                query += bce(z, 0.0) * prob**2
    return box, giou, query / (logits.shape[0] * logits.shape[1])


def test_terms_match_their_formulas_on_both_kinds_of_rows():
    queries = 4
    logits, boxes, targets, valid = scene(1, 3, 3, 2 * queries)
    presence = torch.randn(3, 3)
    criterion = DetectionLoss(least_rows=0, prompt_scale=False)
    ours = criterion(logits, boxes, presence, queries, targets, valid)
    expected = dict.fromkeys(("box", "giou", "query", "many_box", "many_giou", "many_query"), 0.0)
    for layer in range(3):
        for prefix, part, weight in (("", slice(0, queries), 1.0), ("many_", slice(queries, None), 2.0)):
            z, b = logits[layer : layer + 1, :, part], boxes[layer : layer + 1, :, part]
            matcher = OneToManyMatcher() if prefix and layer == 2 else HungarianMatcher()
            box, giou, query = terms_by_hand(z[0], b[0], targets, valid, matcher(z, b, targets, valid)[0])
            for name, value, own in (("box", box, 5.0), ("giou", giou, 2.0), ("query", query, 20.0)):
                expected[prefix + name] += weight * own * value
    expected["presence"] = 20 * 0.5 * sum(bce(float(z), float(v.any())) for row in presence for z, v in zip(row, valid)) / 3
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(float(ours[name]), value, rel_tol=1e-4), name
    scaled = DetectionLoss(least_rows=0)(logits, boxes, presence, queries, targets, valid)
    assert_close(scaled["box"], ours["box"] * 3**0.5)
    wide = DetectionLoss(least_rows=8, prompt_scale=False)(logits, boxes, None, queries, targets, valid)
    assert_close(wide["query"], ours["query"] / 2)
    assert "presence" not in wide


def test_presence_is_plain_cross_entropy_with_a_gradient_at_saturated_logits():
    z = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    seen = torch.tensor([True, False, True])
    value = losses.presence_loss(z, seen)
    value.backward()
    assert_close(value.detach(), torch.tensor(0.5 * math.log(2) / 3))
    assert torch.isfinite(z.grad).all()
    assert_close(z.grad, torch.tensor([[0.0, 0.0, -0.25 / 3]]))


def test_absent_prompts_teach_presence_and_nothing_else():
    logits, boxes, targets, _ = scene()
    logits.requires_grad_(), boxes.requires_grad_()
    presence = torch.zeros(2, 3, requires_grad=True)
    given = DetectionLoss()(logits, boxes, presence, 4, targets, torch.zeros(3, 3, dtype=torch.bool))
    sum(given.values()).backward()
    assert (logits.grad == 0).all()
    assert (boxes.grad == 0).all()
    assert (presence.grad > 0).all()


def test_the_aim_of_a_matched_query_has_no_gradient_and_a_floor():
    z = torch.tensor([[0.3]], requires_grad=True)
    matched, keep = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    losses.query_loss(z, torch.tensor([[0.0]]), matched, keep, 0.25, 2.0, 10.0, 0).backward()
    assert_close(z.grad, 10 * (torch.sigmoid(z.detach()) - 0.01))


@given(seed=st.integers(0, 200))
def test_finite_whatever_the_boxes(seed):
    logits, boxes, targets, valid = scene(seed)
    boxes = (boxes - 0.4) * 5  # out of range, some inverted
    boxes.requires_grad_(), logits.requires_grad_()
    given = DetectionLoss()(logits * 50, boxes, torch.randn(2, 3) * 100, 4, targets * 3, valid)
    total = sum(given.values())
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(boxes.grad).all()
    assert torch.isfinite(logits.grad).all()


def test_perfect_boxes_cost_nothing():
    _, _, targets, valid = scene(pairs=1)
    boxes = targets[None]
    given = DetectionLoss()(torch.full((1, 1, 3), 20.0), boxes, torch.full((1, 1), 20.0), 3, targets, valid[:1])
    assert float(given["box"]) < 1e-5
    assert float(given["giou"]) < 1e-5
    assert float(given["presence"]) < 1e-5
