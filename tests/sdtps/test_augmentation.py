"""Train and evaluation transforms: the released order of steps, their statistics, and the switches."""

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.sdtps.augmentation import EvalTransform, TrainTransform

SIZE = (32, 16)


def views(seed=0, size=SIZE):
    return [np.random.default_rng(seed + i).integers(0, 256, (*size, 3), dtype=np.uint8) for i in range(3)]


def scaled(view):
    return torch.from_numpy(view.astype(np.float32)).permute(2, 0, 1) / 255 / 0.5 - 1


def test_evaluation_resizes_bilinear_and_scales_to_minus_one_to_one():
    transform = EvalTransform(SIZE)
    big = views(size=(64, 40))
    small = [transform.resize(view) for view in big]
    for view, expected in zip(small, big):
        assert (view == np.asarray(Image.fromarray(expected).resize((16, 32), Image.Resampling.BILINEAR))).all()
    for out, view in zip(transform(small, np.random.default_rng(0)), small):
        torch.testing.assert_close(out, scaled(view), atol=1e-6, rtol=0)


def test_training_resizes_bicubic_unless_told():
    big = views(size=(64, 40))[0]
    bicubic = np.asarray(Image.fromarray(big).resize((16, 32), Image.Resampling.BICUBIC))
    assert (TrainTransform(SIZE).resize(big) == bicubic).all()
    assert (TrainTransform(SIZE, interpolation="bilinear").resize(big) == EvalTransform(SIZE).resize(big)).all()


def test_without_randomness_training_equals_evaluation():
    still = TrainTransform(SIZE, flip=0.0, padding=0, erase=0.0)
    for a, b in zip(still(views(), np.random.default_rng(0)), EvalTransform(SIZE)(views(), np.random.default_rng(1))):
        assert torch.equal(a, b)


def test_padding_is_black_before_scaling_and_shifts_by_at_most_its_width():
    white = [np.full((*SIZE, 3), 255, np.uint8)] * 3
    transform, rng = TrainTransform(SIZE, flip=0.0, padding=3, erase=0.0), np.random.default_rng(0)
    shifts = set()
    for _ in range(400):
        (out, _, _) = transform(white, rng)
        assert set(out.unique().tolist()) <= {-1.0, 1.0}
        rows, columns = (out[0] == 1).any(1).nonzero()[:, 0], (out[0] == 1).any(0).nonzero()[:, 0]
        black_rows, black_columns = 32 - len(rows), 16 - len(columns)
        shifts.add((black_rows if rows[0] else -black_rows, black_columns if columns[0] else -black_columns))
    assert shifts == {(a, b) for a in range(-3, 4) for b in range(-3, 4)}


def flips(transform, count=600):
    """For each draw, which of the three images was flipped."""
    mark = np.zeros((*SIZE, 3), np.uint8)
    mark[:, :8] = 255
    rng = np.random.default_rng(0)
    return np.array([[bool(out[0, 0, 0] < 0) for out in transform([mark] * 3, rng)] for _ in range(count)])


def test_modalities_are_drawn_apart_by_default_and_together_on_request():
    apart = flips(TrainTransform(SIZE, padding=0, erase=0.0))
    together = flips(TrainTransform(SIZE, padding=0, erase=0.0, sync_modalities=True))
    np.testing.assert_allclose(apart.mean(0), 0.5, atol=0.07)
    np.testing.assert_allclose(together.mean(0), 0.5, atol=0.07)
    assert (together.min(1) == together.max(1)).all()
    assert abs((apart[:, 0] == apart[:, 1]).mean() - 0.5) < 0.07
    # shift and erased rectangle are shared too, the noise is not
    grey = [np.full((*SIZE, 3), 200, np.uint8)] * 3
    a, b, c = TrainTransform(SIZE, padding=4, erase=1.0, sync_modalities=True)(grey, np.random.default_rng(3))
    usual = set(scaled(grey[0]).unique().tolist()) | {-1.0}
    holes = [~torch.isin(out, torch.tensor(sorted(usual))) for out in (a, b, c)]
    assert holes[0].any()
    assert torch.equal(holes[0], holes[1])
    assert torch.equal(holes[0], holes[2])
    assert not torch.equal(a[holes[0]], b[holes[1]])


def test_erasing_comes_last_on_the_scaled_image():
    black = [np.zeros((*SIZE, 3), np.uint8)] * 3
    transform, rng = TrainTransform(SIZE, flip=0.0, padding=2, erase=1.0), np.random.default_rng(0)
    noise = torch.cat([out[out != -1] for _ in range(150) for out in transform(black, rng)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_a_draw_is_a_function_of_its_generator():
    transform = TrainTransform(SIZE, padding=3)
    a, b = (torch.stack(transform(views(), np.random.default_rng(5))) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.stack(transform(views(), np.random.default_rng(6))))


def test_the_input_is_left_alone():
    given = views()
    before = [view.copy() for view in given]
    for _ in range(20):
        TrainTransform(SIZE, padding=0, erase=1.0)(given, np.random.default_rng(0))
    assert all((a == b).all() for a, b in zip(given, before))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (0, 16)}, "size must be"),
        ({"flip": 1.5}, "flip is a probability"),
        ({"erase": -0.1}, "erase is a probability"),
        ({"padding": -1}, "padding must be 0"),
        ({"erase_area": (0.4, 0.2)}, "erase_area must be"),
        ({"erase_aspect": (0.0, 1.0)}, "erase_aspect must be"),
        ({"std": 0.0}, "std must be above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**{"size": SIZE, **settings})
