import math

import fusion_by_hand as by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from plugins.sam3_fusion import boxes as box
from plugins.sam3_fusion.positions import box_positions, cell_positions, sine_code


def test_sine_code_by_hand():
    for c in (0.0, 0.3, 1.0):
        assert_close(sine_code(torch.tensor(c), 6), by_hand.sine(c, 6))
    with pytest.raises(ValueError, match="even"):
        sine_code(torch.zeros(1), 5)


def test_cell_positions_have_y_first():
    code = cell_positions(2, 3, 8, torch.zeros(1))
    for i, cell in enumerate(by_hand.grid_positions(2, 3, 8)):
        assert_close(code[:, i // 3, i % 3], cell, atol=1e-5, rtol=1e-5)


def test_box_positions_are_ordered_y_x_w_h():
    code = box_positions(torch.tensor([0.1, 0.2, 0.3, 0.4]), 16)
    assert_close(code, torch.cat([by_hand.sine(c, 4) for c in (0.2, 0.1, 0.3, 0.4)]))


def test_logit_has_a_floor_of_a_thousandth():
    out = box.logit(torch.tensor([-5.0, 0.0, 0.25, 1.0, 9.0]))
    assert_close(out, torch.tensor([-math.log(1e3), -math.log(1e3), math.log(1 / 3), math.log(1e3), math.log(1e3)]))
    assert_close(torch.sigmoid(box.logit(torch.tensor([0.2, 0.7]))), torch.tensor([0.2, 0.7]))


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_corners_and_centres_are_inverse(values):
    boxes = torch.tensor([values])
    assert_close(box.centres(box.corners(boxes)), boxes, atol=1e-6, rtol=1e-5)


def area(b):
    return max(b[2] - b[0], 0) * max(b[3] - b[1], 0)


@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=8, max_size=8))
def test_iou_and_generalised_iou_by_hand(values):
    a, b = values[:4], values[4:]
    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area(a) + area(b) - shared
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    overlap, generalised = box.iou(torch.tensor(a), torch.tensor(b))
    if union > 1e-6 and hull > 1e-6:
        assert math.isclose(float(overlap), shared / union, abs_tol=1e-4)
        assert math.isclose(float(generalised), shared / union - (hull - union) / hull, abs_tol=1e-4)
    assert math.isfinite(float(overlap))
    assert math.isfinite(float(generalised))


def test_equal_boxes_have_iou_one_and_far_ones_a_negative_generalised_iou():
    same, far = torch.tensor([0.1, 0.1, 0.4, 0.5]), torch.tensor([0.8, 0.8, 0.9, 0.9])
    assert_close(box.iou(same, same), (torch.tensor(1.0), torch.tensor(1.0)))
    assert box.iou(same, far)[0] == 0
    assert box.iou(same, far)[1] < -0.5


def test_boxes_without_area_and_out_of_range_have_finite_gradients():
    a = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1], [-3.0, -3.0, 4.0, 4.0]], requires_grad=True)
    overlap, generalised = box.iou(a, torch.tensor([0.5, 0.5, 0.5, 0.5]))
    (overlap.sum() + generalised.sum()).backward()
    assert torch.isfinite(generalised).all()
    assert torch.isfinite(a.grad).all()
    x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    box.logit(x).sum().backward()
    assert torch.isfinite(x.grad).all()
