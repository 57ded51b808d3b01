"""core.images: reading with clear errors, Pillow's resampling by hand, and what the random functions promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core import images


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- reading


def test_reads_colour_grey_labels_and_depth_as_asked(tmp_path):
    grey = picture(5, 7)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (images.read_image(tmp_path / "grey.png") == grey[:, :, None]).all()
    assert (images.read_image(tmp_path / "grey.png", "L") == grey).all()

    labels = Image.fromarray((grey % 4).astype(np.uint8), mode="P")
    labels.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    labels.save(tmp_path / "labels.png")
    assert (images.read_image(tmp_path / "labels.png", "raw") == grey % 4).all()
    assert images.read_image(tmp_path / "labels.png").shape == (5, 7, 3)

    depth = grey.astype(np.uint16) * 250
    Image.fromarray(depth).save(tmp_path / "depth.png")
    assert (images.read_image(tmp_path / "depth.png", "raw") == depth).all()


def test_what_cannot_be_read_is_named(tmp_path):
    def complaint(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(images.ImageError, match=name) as caught:
            images.read_image(tmp_path / name)
        return str(caught.value)

    assert "no such" in complaint("absent.jpg")
    assert "empty (0 bytes)" in complaint("empty.jpg", b"")
    assert "unreadable" in complaint("text.jpg", b"this is no image")
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.jpg")
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.png")
    assert "truncated" in complaint("cut.jpg", (tmp_path / "whole.jpg").read_bytes()[:1500])
    assert "unreadable" in complaint("cut.png", (tmp_path / "whole.png").read_bytes()[:1500])
    (tmp_path / "folder.jpg").mkdir()
    assert "unreadable" in complaint("folder.jpg")


# --- resizing


def triangle(x):
    return max(0.0, 1 - abs(x))


def keys(x):  # Keys' cubic with a = -1/2
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0)


def by_hand(row, length, kernel, reach):
    """One-dimensional resampling with the kernel widened by the shrink factor."""
    scale = len(row) / length
    wide = max(1.0, scale)
    out = []
    for i in range(length):
        centre = (i + 0.5) * scale
        taps = range(max(0, int(centre - reach * wide + 0.5)), min(len(row), int(centre + reach * wide + 0.5)))
        weights = [kernel((j + 0.5 - centre) / wide) for j in taps]
        out.append(sum(w * row[j] for w, j in zip(weights, taps)) / sum(weights))
    return out


@pytest.mark.parametrize(("how", "kernel", "reach"), [("bilinear", triangle, 1), ("bicubic", keys, 2)])
@pytest.mark.parametrize("length", [5, 9, 23])
def test_resize_is_antialiased_convolution(how, kernel, reach, length):
    row = np.random.default_rng(1).integers(60, 190, 13).astype(np.uint8)
    image = np.repeat(np.repeat(row[None, :, None], 4, 0), 3, 2)
    resized = images.resize(image, (4, length), how)
    assert resized.shape == (4, length, 3)
    assert resized.dtype == np.uint8
    np.testing.assert_allclose(resized[2, :, 1], by_hand(row.astype(float), length, kernel, reach), atol=0.75)


def test_resize_of_maps_keeps_type_and_nearest_makes_no_new_label():
    labels = picture(9, 8)[:, :, 0] % 3 * 100
    assert set(np.unique(images.resize(labels, (31, 17), "nearest"))) <= {0, 100, 200}
    for dtype in (np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64):
        constant = np.full((6, 6), 117, dtype)
        for how in ("nearest", "bilinear", "bicubic"):
            resized = images.resize(constant, (4, 9), how)
            assert resized.dtype == dtype
            assert (resized == 117).all()
    same = picture(6, 6)
    assert images.resize(same, (6, 6), "bicubic") is same


# --- scaling and deterministic geometry


def test_to_float_and_normalize_by_hand():
    image = picture(3, 4)
    scaled = images.normalize(images.to_float(image), (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    assert scaled.dtype == np.float32
    assert scaled.flags.c_contiguous
    for c, (mean, std) in enumerate(((0.5, 0.5), (0.4, 0.25), (0.3, 0.2))):
        for y in range(3):
            for x in range(4):
                assert scaled[c, y, x] == pytest.approx((image[y, x, c] / 255 - mean) / std, abs=1e-6)


def test_pad_then_crop_gives_the_image_back():
    for image in (picture(5, 4), picture(5, 4)[:, :, 0]):
        padded = images.pad(image, 3, fill=255)
        assert padded.shape[:2] == (11, 10)
        assert (images.crop(padded, 3, 3, (5, 4)) == image).all()
        assert (padded[:3] == 255).all()
        assert (padded[:, -3:] == 255).all()
    with pytest.raises(AssertionError, match="leaves the image"):
        images.crop(picture(5, 4), 2, 0, (4, 4))


# --- random functions


def test_flip_frequency_and_alignment():
    image, depth = picture(2, 5), picture(2, 5)[:, :, 0]
    rng, flipped = np.random.default_rng(0), 0
    for _ in range(2000):
        a, b = images.random_flip(rng, image, depth, p=0.3)
        turned = not (a == image).all()
        assert (a == (image[:, ::-1] if turned else image)).all()
        assert (b == (depth[:, ::-1] if turned else depth)).all()
        flipped += turned
    assert abs(flipped / 2000 - 0.3) < 0.04
    assert (images.random_flip(rng, image, p=1.0)[0] == image[:, ::-1]).all()
    assert images.random_flip(rng, image, p=0.0)[0] is image


def test_crop_reaches_every_place_alike_and_keeps_arrays_aligned():
    place = np.arange(6 * 5).reshape(6, 5)
    rng = np.random.default_rng(0)
    seen = np.zeros(30)
    for _ in range(3000):
        a, b = images.random_crop(rng, place, place * 2, size=(4, 3))
        assert a.shape == (4, 3)
        assert (b == 2 * a).all()
        seen[a[0, 0]] += 1
    starts = [5 * top + left for top in range(3) for left in range(3)]
    assert seen.sum() == seen[starts].sum()
    np.testing.assert_allclose(seen[starts] / 3000, 1 / 9, atol=0.03)


def test_crop_refuses_what_does_not_fit():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="cannot crop"):
        images.random_crop(rng, picture(4, 4), size=(5, 4))
    with pytest.raises(ValueError, match="share height and width"):
        images.random_crop(rng, picture(4, 4), picture(5, 4), size=(3, 3))


def erased(before, after):
    """Bounding box of what changed; all of the box must have changed."""
    changed = (before != after).all(0)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert changed.sum() == len(rows) * len(columns)
    assert ((before != after).any(0) == changed).all()
    return len(rows), len(columns)


def test_erasing_statistics():
    rng = np.random.default_rng(0)
    shares, aspects, hits, noise = [], [], 0, []
    for _ in range(1500):
        a, b = np.full((3, 64, 32), 9, np.float32), np.full((2, 64, 32), 9, np.float32)
        images.random_erase(rng, a, b)
        if (a != 9).any():
            h, w = erased(np.full_like(a, 9), a)
            assert ((a[0] != 9) == (b[0] != 9)).all(), "all arrays get one rectangle"
            hits += 1
            shares.append(h * w / (64 * 32))
            aspects.append(math.log(h / w))
            noise.append(a[a != 9])
    assert abs(hits / 1500 - 0.5) < 0.04
    assert 0.015 < min(shares) < 0.035
    assert 0.28 < max(shares) < 0.345
    assert -1.4 < min(aspects) < -0.6
    assert 0.9 < max(aspects) < 1.4
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert not np.array_equal(a[0], b[0]) or (a == 9).all()


def test_erasing_limits():
    rng = np.random.default_rng(0)
    image = np.ones((3, 8, 8), np.float32)
    assert (images.random_erase(rng, image, p=0.0)[0] == 1).all()
    # a rectangle that can never fit is given up after the tries, and nothing is erased
    assert (images.random_erase(rng, image, p=1.0, area=(0.9, 0.9), aspect=(50.0, 50.0))[0] == 1).all()
    assert (images.random_erase(rng, image, p=1.0, area=(0.25, 0.25), aspect=(1.0, 1.0))[0] != 1).sum() == 3 * 16


@given(seed=st.integers(0, 2**32), height=st.integers(3, 20), width=st.integers(3, 20))
def test_equal_generators_give_equal_results(seed, height, width):
    def once():
        rng = np.random.default_rng(seed)
        (a,) = images.random_flip(rng, picture(height, width))
        (a,) = images.random_crop(rng, images.pad(a, 2), size=(height, width))
        return images.random_erase(rng, images.to_float(a))[0]

    assert np.array_equal(once(), once())
