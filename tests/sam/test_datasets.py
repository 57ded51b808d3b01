"""The published layouts: read, refused with one clear error each, checked; and the generated sample that stands in for them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from core.images import ImageError
from plugins.sam.classes import NYU40, SUN37
from plugins.sam.datasets import SUNRGBD, LayoutError, NYUDepthv2, check, nyudepthv2
from plugins.sam.rgbd_sample import NUMBER, ORACLE, Camera, Room, Solid, cast, encode_depth, furnish, render, rgbd_sample, tags

SMALL = {"train": 10, "test": 3, "height": 32, "width": 48}  # as tests/sam/conftest.py makes it
TINY = {"train": 2, "test": 1, "height": 16, "width": 16}


@pytest.fixture
def copy(sample, tmp_path):
    shutil.copytree(sample, tmp_path / "NYU")
    return tmp_path / "NYU"


# --- rendering ----------------------------------------------------------------------------------------------------------


def box(centre, half, label=1, turn=0.0):
    return Solid(centre, half, turn, label, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_rays_hit_where_geometry_says():
    solids = [box((0, 0, 5), (1, 1, 1)), box((0, 0, 9), (3, 3, 1)), box((2, 0, 3), (0.5, 0.5, 0.5), turn=np.pi / 4)]
    rays = np.array([[0, 0, 1.0], [2 / 3, 0, 1.0], [0, 1, 0.0], [0, 0.3, 1.0]])
    distance, which = cast(np.zeros((1, 3)), rays, solids)
    assert which.tolist() == [0, 2, -1, 1]
    assert distance[0] == pytest.approx(4)
    assert 2.2 < distance[1] < 3  # the turned box, whose edge is nearer than its middle
    assert distance[2] == np.inf
    assert distance[3] == pytest.approx(8)  # over the near box, onto the far one


def test_depth_is_along_the_optical_axis_and_nearer_things_hide_farther_ones():
    """A flat wall square to the view has one depth in all pixels; what stands before it is labelled and nearer."""
    room = Room(4.0, 2.6, 4.0)
    for centre, half in (
        ((2, 1.3, 4.05), (9, 9, 0.05)),
        ((2, 1.3, -0.05), (9, 9, 0.05)),
        ((-9, 1.3, 2), (0.05, 9, 9)),
        ((13, 1.3, 2), (0.05, 9, 9)),
    ):
        room.solids.append(box(centre, half))
    room.solids += [box((2, -9, 2), (20, 0.05, 20), 2), box((2, 12, 2), (20, 0.05, 20), 22), box((2, 1.3, 2.5), (0.3, 0.3, 0.3), 4)]

    view = render(room, Camera((2.0, 1.3, 0.25), 0.0, 0.0, 1.1), (24, 32), np.random.default_rng(0))
    near = view.labels == 4
    assert near.any()
    assert view.depth[near] == pytest.approx(2.2 - 0.25)
    assert view.depth[view.labels == 1] == pytest.approx(4.0 - 0.25)


def test_a_room_is_furnished_and_tags_are_its_inventory():
    kinds = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        room = furnish(rng)
        listed = tags(room, rng)
        kinds.append(tuple(sorted(room.inventory)))
        assert {"wall", "floor", "ceiling"} <= set(room.inventory)
        assert not {"wall", "floor", "ceiling"} & set(listed)
        assert len(listed) == len(set(listed))
        assert sum(name not in room.inventory for name in listed) <= 1  # at most one mistake
        assert all(name in NUMBER for name in listed)
    assert len(set(kinds)) > 6


def test_depth_codes():
    metres = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert encode_depth(metres, "gray8").tolist() == [[0, 64], [128, 255]]
    assert encode_depth(metres, "millimetres").tolist() == [[1000, 2000], [3000, 5000]]


# --- the sample on disk -------------------------------------------------------------------------------------------------


def test_the_sample_has_the_published_layout_and_is_found_again(sample):
    before = {p: p.stat().st_mtime_ns for p in sample.rglob("*") if p.is_file()}
    rgbd_sample(str(sample), **SMALL)
    assert {p: p.stat().st_mtime_ns for p in sample.rglob("*") if p.is_file()} == before
    scenes = NYUDepthv2(str(sample))
    assert scenes.sample
    assert (len(scenes.train), len(scenes.test)) == (10, 3)
    view = scenes.read(scenes.train[0])
    assert view.image.shape == (32, 48, 3)
    assert view.depth.shape == view.label.shape == (32, 48)
    assert (view.depth.min(), view.depth.max()) == (0, 1)  # stretched per image, as released
    seen = set()
    for record in (*scenes.train, *scenes.test):
        seen |= set(np.unique(scenes.read(record).label).tolist())
    assert len(seen - {255}) >= 10
    assert json.loads((sample / "manifest.json").read_text())["generated"] is True
    assert "not comparable" in json.loads((sample / "manifest.json").read_text())["statement"]


def test_the_sample_is_a_function_of_its_seed_and_more_images_change_none(tmp_path):
    for name, options in (("one", {}), ("more", {"train": 3}), ("other", {"seed": 1})):
        rgbd_sample(str(tmp_path / name), **{**TINY, **options})
    for part in ("RGB/0001.jpg", "Depth/0001.png", "Label/0001.png"):
        assert (tmp_path / "more" / part).read_bytes() == (tmp_path / "one" / part).read_bytes()
        assert (tmp_path / "other" / part).read_bytes() != (tmp_path / "one" / part).read_bytes()


def test_the_sample_refuses_a_folder_that_is_something_else(copy, tmp_path):
    with pytest.raises(ValueError, match="holds another sample"):
        rgbd_sample(str(copy), seed=5, **SMALL)
    (copy / "RGB/0000.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged sample"):
        rgbd_sample(str(copy), **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(ValueError, match="is no generated sample"):
        rgbd_sample(str(tmp_path / "mine"), **SMALL)
    with pytest.raises(ValueError, match="train must be at least 1"):
        rgbd_sample(str(tmp_path / "new"), train=0)


# --- labels, depth, errors ----------------------------------------------------------------------------------------------


def test_labels_lose_one_and_void_becomes_255(copy):
    raw = np.zeros((32, 48), np.uint8)
    raw[0, :3] = 1, 40, 0
    Image.fromarray(raw).save(copy / "Label/0000.png")
    label = NYUDepthv2(str(copy)).read(NYUDepthv2(str(copy)).train[0]).label
    assert label[0, :3].tolist() == [0, 39, 255]


def test_millimetres_keep_the_scale(tmp_path):
    rgbd_sample(str(tmp_path / "mm"), **TINY, depth="millimetres")
    scenes = NYUDepthv2(str(tmp_path / "mm"), depth_encoding="millimetres", depth_range_m=8.0)
    depth = scenes.read(scenes.train[0]).depth
    assert 0.02 < depth.min() < depth.max() <= 0.9  # rooms are 3 to 6 metres deep
    shutil.copy(tmp_path / "mm/Label/0000.png", tmp_path / "mm/Depth/0000.png")
    with pytest.raises(ImageError, match="wants a 16-bit map"):
        scenes.read(scenes.train[0])


def test_metric_depth_is_refused_where_gray_is_expected(tmp_path):
    """Pillow would clip it to 255: a constant 1."""
    rgbd_sample(str(tmp_path / "mm"), **TINY, depth="millimetres")
    scenes = NYUDepthv2(str(tmp_path / "mm"))
    complaint = (
        r"Depth/0000\.png: depth_encoding 'gray8' wants .* 8 bits, this one holds I;16 .* set depth_encoding = 'millimetres'"
    )
    with pytest.raises(ImageError, match=complaint):
        scenes.read(scenes.train[0])
    found = [f for f in nyudepthv2(str(tmp_path / "mm")) if f.level == "error"]
    assert "set depth_encoding = 'millimetres'" in found[0].found
    assert all(f.level != "error" for f in nyudepthv2(str(tmp_path / "mm"), depth_encoding="millimetres"))


def test_gray_depth_may_be_stored_as_colour_or_a_palette(copy):
    """The release writes it with matplotlib, as RGBA."""
    scenes = NYUDepthv2(str(copy))
    expected = scenes.read(scenes.train[0]).depth
    gray = Image.open(copy / "Depth/0000.png")
    for mode in ("RGBA", "RGB", "P"):
        gray.convert(mode).save(copy / "Depth/0000.png")
        assert np.array_equal(scenes.read(scenes.train[0]).depth, expected)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda r: (r / "Depth/0002.png").unlink(),
            r"Depth/0002\.png is missing, the partner of RGB/0002\.jpg \(line 3 of train\.txt\)",
        ),
        (
            lambda r: (r / "Label/0011.png").unlink(),
            r"Label/0011\.png is missing, the partner of RGB/0011\.jpg \(line 2 of test\.txt\)",
        ),
        (lambda r: (r / "train.txt").write_text(""), r"the list train\.txt is empty"),
        (lambda r: (r / "train.txt").write_bytes(b"RGB/\xe9.jpg"), r"the list train\.txt is not UTF-8 text"),
        (
            lambda r: (r / "train.txt").write_text("RGB/sub/0000.jpg\n"),
            r"RGB/sub/0000\.jpg \(line 1 of train\.txt\) does not lie in RGB/ itself",
        ),
        (lambda r: (r / "test.txt").unlink(), r"the list test\.txt is missing"),
        (lambda r: shutil.rmtree(r / "Depth"), "Depth/ is missing or empty"),
        (lambda r: shutil.rmtree(r), "no such folder"),
    ],
)
def test_a_broken_layout_is_one_clear_error(copy, damage, complaint):
    damage(copy)
    with pytest.raises(LayoutError, match=complaint):
        NYUDepthv2(str(copy))
    assert any(f.level == "error" for f in nyudepthv2(str(copy)))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda r: Image.fromarray(np.full((32, 48), 57, np.uint8)).save(r / "Label/0000.png"),
            r"holds label 57; NYUDepthv2 has 40 classes",
        ),
        (
            lambda r: Image.fromarray(np.zeros((32, 40), np.uint8)).save(r / "Depth/0000.png"),
            r"Depth/0000\.png is 32x40 and RGB/0000\.jpg 32x48",
        ),
        (lambda r: Image.fromarray(np.zeros((16, 48), np.uint8)).save(r / "Label/0000.png"), r"Label/0000\.png is 16x48 and RGB"),
        (
            lambda r: Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(r / "Label/0000.png"),
            "a label map has one channel of integers",
        ),
        (lambda r: (r / "RGB/0000.jpg").write_bytes(b""), "the file is empty"),
    ],
)
def test_a_broken_image_is_one_clear_error(copy, damage, complaint):
    damage(copy)
    scenes = NYUDepthv2(str(copy))
    with pytest.raises(ImageError, match=complaint):
        scenes.read(scenes.train[0])
    assert any(f.level == "error" and f.what == "image" for f in nyudepthv2(str(copy)))


def test_checks_say_what_differs_from_the_published_set(sample, copy):
    findings = {f.what: f for f in nyudepthv2(str(sample))}
    assert findings["origin"].level == "warning"
    assert (findings["train images"].found, findings["train images"].expected) == ("10", "795")
    assert findings["readable records"].found == "13"
    assert all(f.level != "error" for f in findings.values())
    (copy / "train.txt").write_text((copy / "train.txt").read_text() + "RGB/0003.jpg\nRGB/0003.jpg\n")
    twice = next(f for f in check(NYUDepthv2, str(copy), decode=False) if f.what == "images twice in train.txt")
    assert (twice.level, twice.found) == ("error", "RGB/0003.jpg")
    (copy / "test.txt").write_text("RGB/0000.jpg\n")
    assert any(f.what == "images in both lists" for f in check(NYUDepthv2, str(copy), decode=False))


def test_sun_has_its_own_label_folder_and_classes(copy):
    (copy / "Label").rename(copy / "labels")
    scenes = SUNRGBD(str(copy))
    assert scenes.classes == SUN37
    assert len(SUN37) == 37
    assert len(NYU40) == 40
    assert SUN37[23] == "fridge"
    Image.fromarray(np.full((32, 48), 38, np.uint8)).save(copy / "labels/0000.png")
    with pytest.raises(ImageError, match=r"holds label 38; SUN RGB-D has 37 classes"):
        scenes.read(scenes.train[0])


def test_the_oracle_file_is_the_largest_classes(sample):
    scenes = NYUDepthv2(str(sample))
    table = json.loads((sample / ORACLE).read_text())
    label = scenes.read(scenes.train[0]).label
    counts = np.bincount(label[label < 37].ravel(), minlength=37)
    assert table["RGB/0000.jpg"] == [NYU40[k] for k in np.argsort(-counts, kind="stable")[:5] if counts[k]]
