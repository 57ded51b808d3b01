import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core.metrics import detection
from plugins.sam3_fusion import calibration
from plugins.sam3_fusion.calibration import Affine, Moments
from plugins.sam3_fusion.decoder import Presence
from plugins.sam3_fusion.student import StudentTrunk


def pairs(n=60, seed=0, gap=1.5):
    rng = np.random.default_rng(seed)
    present = np.arange(n) % 2 == 0
    return np.where(present, gap, -gap) + rng.normal(0, 2, n) - 3.0, present


def test_mean_and_moment_match_give_the_teachers_moments():
    z, _ = pairs()
    teacher = 2.5 * np.random.default_rng(1).normal(size=80) + 0.7
    shifted, moved = calibration.mean_match(z, teacher)(z), calibration.moment_match(z, teacher)(z)
    assert shifted.mean() == pytest.approx(teacher.mean())
    assert shifted.std() == pytest.approx(z.std())
    assert (moved.mean(), moved.std()) == (pytest.approx(teacher.mean()), pytest.approx(teacher.std()))
    assert calibration.moment_match(np.full(5, 2.0), teacher) == Affine(1.0, pytest.approx(teacher.mean() - 2.0))


def test_regression_is_least_squares():
    z, _ = pairs()
    teacher = 0.4 * z + np.random.default_rng(2).normal(size=len(z))
    slope, shift = np.polyfit(z, teacher, 1)
    assert calibration.regression(z, teacher) == (pytest.approx(slope), pytest.approx(shift))
    with pytest.raises(ValueError, match="do not rise"):
        calibration.regression(z, -z)


def platt_cost(a, b, z, present, ridge=0.0):
    """Platt's cross-entropy, in a loop."""
    up, down = present.sum(), (~present).sum()
    total = ridge * ((a - 1) ** 2 + b**2)
    for one, label in zip(z, present):
        t = (up + 1) / (up + 2) if label else 1 / (down + 2)
        s = a * one + b
        total += np.logaddexp(0, -s) * t + np.logaddexp(0, s) * (1 - t)
    return total


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("gap", [0.8, 1.5, 12.0])  # overlapping, usual, separable
def test_platt_is_the_minimum_of_its_cost(gap, ridge):
    z, present = pairs(24, gap=gap)
    a, b = calibration.platt(z, present, ridge)
    best = platt_cost(a, b, z, present, ridge)
    for da, db in itertools.product((-1e-3, 0, 1e-3), repeat=2):
        assert platt_cost(a + da, b + db, z, present, ridge) >= best - 1e-9


def searched(z, present, ridge):
    """Platt's optimum by brute force: the best of a grid around the best so far, in units of the logits' spread, ever finer."""
    n, mean, unit = len(z), z.mean(), z.std()
    up, down = present.sum(), n - present.sum()
    target = np.where(present, (up + 1) / (up + 2), 1 / (down + 2))

    def cost(slope, shift):
        a, b = slope / unit, shift - slope * mean / unit
        s = a[..., None] * z + b[..., None]
        return (np.logaddexp(0, s) - target * s).sum(-1) + ridge * ((a - 1) ** 2 + b**2)

    at, width = np.zeros(2), 64.0
    for _ in range(200):
        slopes, shifts = np.meshgrid(at[0] + width * np.linspace(-1, 1, 21), at[1] + width * np.linspace(-1, 1, 21))
        values = cost(slopes, shifts)
        best = np.unravel_index(values.argmin(), values.shape)
        at, width = np.array([slopes[best], shifts[best]]), 0.75 * width
    return at[0] / unit, at[1] - at[0] * mean / unit


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize(
    "z", [(-100, -90, 100, 120), (-1e6, -9e5, 2e6, 3e6), (-1e-3, -2e-3, 0, 3e-3), (900, 901, 903, 904), (-700, 30, -20, 800), (-60, -55, 30, 2, 5, -40)], ids=str
)  # fmt: skip
def test_platt_finds_the_optimum_of_logits_of_any_size(z, ridge):
    z, present = np.array(z, float), np.arange(len(z)) >= 2
    a, b = calibration.platt(z, present, ridge)
    wanted = searched(z, present, ridge)
    assert platt_cost(a, b, z, present, ridge) <= platt_cost(*wanted, z, present, ridge) + 1e-9
    if not ridge:  # with it the valley may be too narrow for a grid: ours is then the lower
        np.testing.assert_allclose(a * z + b, wanted[0] * z + wanted[1], rtol=1e-3, atol=1e-4)


def test_logits_without_spread_are_only_shifted_by_platt():
    a, b = calibration.platt(np.full(3, 7.0), np.array([True, True, False]))
    assert a == 1.0
    assert 1 / (1 + math.exp(-(7 + b))) == pytest.approx((2 * 3 / 4 + 1 / 3) / 3)


def test_the_fitted_offset_is_platts_optimum_at_slope_one():
    z, present = pairs(30)
    one, shift = calibration.offset(z, present)
    best = platt_cost(1.0, shift, z, present)
    assert one == 1.0
    assert platt_cost(1.0, shift + 1e-3, z, present) >= best <= platt_cost(1.0, shift - 1e-3, z, present)


def test_the_discriminant_is_the_log_odds_of_two_normals():
    z, present = pairs(40)
    a, b = calibration.discriminant(z, present, prior=0.2)
    high, low = z[present], z[~present]
    v = (((high - high.mean()) ** 2).sum() + ((low - low.mean()) ** 2).sum()) / (len(z) - 2)
    for x in (-4.0, 0.3, 2.0):
        odds = (-((x - high.mean()) ** 2) + (x - low.mean()) ** 2) / (2 * v) + math.log(0.2 / 0.8)
        assert a * x + b == pytest.approx(odds)


@given(st.integers(0, 1000))
def test_no_affine_fit_moves_auroc(seed):
    z, present = pairs(40, seed)
    before = detection.auroc(z, present)
    teacher = 3 * z + np.random.default_rng(seed).normal(size=len(z))
    for fit in (
        calibration.mean_match(z, teacher), calibration.moment_match(z, teacher), calibration.regression(z, teacher),
        calibration.platt(z, present), calibration.offset(z, present), calibration.discriminant(z, present),
    ):  # fmt: skip
        assert fit.scale > 0
        assert detection.auroc(fit(z), present) == pytest.approx(before)


def test_what_cannot_be_fitted_is_an_error():
    z, present = pairs(10)
    everything = np.ones(10, bool)
    for fit in (calibration.platt, calibration.offset, calibration.discriminant):
        with pytest.raises(ValueError, match="present and absent"):
            fit(z, everything)
    with pytest.raises(ValueError, match="finite"):
        calibration.mean_match(np.array([np.nan]), z)
    with pytest.raises(ValueError, match="absent pairs have the higher"):
        calibration.platt(np.where(present, -3.0, 3.0), present)
    with pytest.raises(ValueError, match="prior"):
        calibration.discriminant(z, present, 1.0)


@pytest.mark.parametrize("map", [Affine(1.0, 5.0), Affine(0.3, -2.0), Affine(4.0, 11.05)])
def test_an_affine_map_of_presence_vanishes_into_the_last_layer(map):
    head, state = Presence(16, "none"), torch.randn(7, 16)
    before = head(state)
    keys = {k: v.shape for k, v in head.state_dict().items()}
    calibration.fold_presence(head, map)
    assert {k: v.shape for k, v in head.state_dict().items()} == keys
    torch.testing.assert_close(head(state), map.scale * before + map.shift, rtol=1e-5, atol=1e-5)


def test_a_clamped_presence_head_is_not_folded():
    with pytest.raises(ValueError, match="clamps after its last layer"):
        calibration.fold_presence(Presence(8, "hard"), Affine(1.0, 5.0))
    with pytest.raises(ValueError, match="finite"):
        calibration.fold_presence(Presence(8, "none"), Affine(1.0, math.nan))


def test_feature_moments_vanish_into_the_trunks_last_convolution():
    trunk = StudentTrunk(6, width=2).eval()
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        before = trunk(images)
        wanted = Moments(torch.randn(6).double(), torch.rand(6).double() + 0.5)
        ours = calibration.moments([before[:1], before[1:]])
        scale, shift = calibration.feature_match(ours, wanted)
        calibration.fold_channels(trunk.out, scale, shift)
        after = trunk(images)
    torch.testing.assert_close(after, before * scale[:, None, None].float() + shift[:, None, None].float(), rtol=1e-5, atol=1e-5)
    found = calibration.moments([after])
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std, wanted.std, rtol=1e-4, atol=1e-5)


def test_a_dead_channel_is_only_shifted():
    ours = Moments(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 1.0]).double())
    scale, shift = calibration.feature_match(ours, Moments(torch.zeros(2).double(), torch.full((2,), 3.0).double()))
    assert scale.tolist() == [1.0, 3.0]
    assert shift.tolist() == [-1.0, -6.0]


def test_a_convolution_that_cannot_take_the_map_is_an_error():
    with pytest.raises(ValueError, match="without bias"):
        calibration.fold_channels(nn.Conv2d(2, 3, 1, bias=False), torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="3 channels"):
        calibration.fold_channels(nn.Conv2d(2, 3, 1), torch.ones(2), torch.zeros(2))
