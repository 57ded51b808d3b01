"""The three published layouts, written exactly and read back; every way they can be wrong; the checkers."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sdtps.published_layouts import GREY, save, write_msvr310, write_rgbnt100, write_rgbnt201

from core import data
from core.images import ImageError
from plugins.sdtps import datasets
from plugins.sdtps.augmentation import EvalTransform, TrainTransform
from plugins.sdtps.datasets import MSVR310, RGBNT100, RGBNT201, Counts, LayoutError, TriSpectralImages

SETS = {
    "RGBNT201": (write_rgbnt201, RGBNT201, datasets.rgbnt201),
    "RGBNT100": (write_rgbnt100, RGBNT100, datasets.rgbnt100),
    "MSVR310": (write_msvr310, MSVR310, datasets.msvr310),
}


@pytest.fixture(params=SETS)
def written(request, tmp_path):
    """(folder, layout class, checker) of each of the three sets."""
    write, layout, checker = SETS[request.param]
    return write(tmp_path / request.param), layout, checker


# --- reading the published layouts


def test_rgbnt201_names_cameras_and_splits(tmp_path):
    layout = RGBNT201(str(write_rgbnt201(tmp_path / "RGBNT201")))
    assert layout.train.identities == (2, 7)
    assert layout.query is layout.gallery
    assert layout.query.identities == (30, 258)
    assert layout.train.cameras == (0, 1), "written from 1, counted from 0"
    assert {record.scene for record in layout.train.records} == {-1}
    assert layout.train.records[1].files == tuple(f"train_171/{s}/000002_cam1_0_01.jpg" for s in ("RGB", "NI", "TI"))
    assert layout.counts() | {"train_images": 8, "query_images": 8, "gallery_identities": 2} == layout.counts()
    assert layout.junk == "camera"


def test_rgbnt100_names_cameras_and_splits(tmp_path):
    layout = RGBNT100(str(write_rgbnt100(tmp_path / "RGBNT100")))
    assert layout.root.name == "rgbir", "found below the published folder name"
    assert layout.train.cameras == (0, 7)
    assert layout.query.identities == (502,)
    assert layout.gallery.identities == (30, 502)
    assert layout.query.records[0].files == ("query/0502_c0001_000.jpg",)


def test_msvr310_names_cameras_scenes_and_splits(tmp_path):
    layout = MSVR310(str(write_msvr310(tmp_path / "MSVR310")))
    assert layout.train.cameras == (0, 7), "written from 0 and not shifted"
    assert sorted({record.scene for record in layout.train.records}) == [1, 24]
    assert layout.query.identities == (268,)
    assert layout.gallery.records[0].files[2] == "bounding_box_test/0030/th/0030_s001_v0_000.jpg"
    assert layout.junk == "scene"


def test_every_set_gives_each_spectrum_its_own_pixels(written):
    root, layout, _ = written
    opened = layout(str(root))
    split = TriSpectralImages(opened, opened.query, EvalTransform(size=(8, 4)))
    assert len(split) == len(opened.query.records)
    for i, record in enumerate(opened.query.records):
        sample = split.sample(i, np.random.default_rng(0))
        for key, value in GREY.items():
            assert sample[key].shape == (3, 8, 4)
            torch.testing.assert_close(sample[key], torch.full((3, 8, 4), value / 127.5 - 1), atol=0.03, rtol=0)
        assert (sample["pid"], sample["camera"], sample["scene"]) == (record.identity, record.camera, record.scene)
        assert sample["name"] == record.files[0]


def test_records_are_sorted_and_the_parent_folder_will_do(written):
    root, layout, _ = written
    opened = layout(str(root))
    for split in (opened.train, opened.query, opened.gallery):
        assert list(split.records) == sorted(split.records, key=lambda record: record.files)
    assert layout(str(root.parent)).train.records == opened.train.records


def test_training_identities_are_numbered_in_sorted_order(written):
    root, layout, _ = written
    opened = layout(str(root))
    split = TriSpectralImages(opened, opened.train, TrainTransform(size=(8, 4), padding=1), relabel=True)
    assert {(record.identity, pid) for record, pid in zip(opened.train.records, split.pids)} == {(2, 0), (7, 1)}
    batch = data.collate([split.sample(i, np.random.default_rng(i)) for i in (0, len(split) - 1)])
    assert batch["pid"].tolist() == [0, 1]
    assert batch["rgb"].shape == (2, 3, 8, 4)


def test_a_kept_image_is_read_once_and_equals_a_fresh_one(written):
    root, layout, _ = written
    opened = layout(str(root))
    transform = TrainTransform(size=(8, 4), padding=1)
    fresh, kept = (TriSpectralImages(opened, opened.train, transform, cache=cache) for cache in (False, True))
    kept.warm()
    for i in range(len(kept)):
        a, b = (s.sample(i, np.random.default_rng(i)) for s in (fresh, kept))
        assert all(torch.equal(a[key], b[key]) for key in GREY)
    shutil.rmtree(opened.root)
    assert kept.sample(0, np.random.default_rng(0))["pid"] == 2
    with pytest.raises(ImageError, match="no such image"):
        fresh.sample(0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="cache=False"):
        fresh.warm()


def test_a_strip_is_cut_into_thirds_and_the_release_way_on_request(tmp_path):
    root = write_rgbnt100(tmp_path)
    strict = RGBNT100(str(root))
    record = strict.query.records[0]
    strip = np.zeros((8, 37, 3), np.uint8)
    Image.fromarray(strip).save(strict.root / record.files[0])
    with pytest.raises(ImageError, match=r"0502_c0001_000\.jpg: 37 pixels wide, not divisible by 3"):
        strict.read(record)
    strip[:] = 200
    Image.fromarray(strip).save(strict.root / record.files[0], quality=95)
    parts = RGBNT100(str(root), strip_width=16).read(record)
    assert [part.shape for part in parts] == [(8, 16, 3)] * 3
    assert parts[1].min() > 190
    assert parts[2][:, :5].min() > 190
    assert parts[2][:, 5:].max() == 0, "what the strip lacks is black, in silence"
    assert RGBNT100(str(root), strip_width=8).read(record)[2].shape == (4, 8, 3), "half as high as wide, the rest cut off"
    with pytest.raises(ValueError, match="strip_width"):
        RGBNT100(str(root), strip_width=0)


def test_market_junk_is_left_out(tmp_path):
    root = write_rgbnt100(tmp_path)
    images = len(RGBNT100(str(root)).gallery.records)
    shutil.copy(root / "rgbir/query/0502_c0001_000.jpg", root / "rgbir/bounding_box_test/-1_c0003_000.jpg")
    assert len(RGBNT100(str(root)).gallery.records) == images


def test_other_files_do_not_count(written):
    root, layout, _ = written
    before = layout(str(root)).counts()
    for place in [p for p in root.rglob("*") if p.is_dir()]:
        for name in ("Thumbs.db", ".DS_Store", "._0002_hidden.jpg"):
            (place / name).write_bytes(b"x")
    assert layout(str(root)).counts() == before


# --- what can be wrong


def complaint(layout, root):
    with pytest.raises(LayoutError) as caught:
        layout(str(root))
    return str(caught.value)


def test_missing_and_empty_roots(written, tmp_path):
    _, layout, _ = written
    assert "no folder" in complaint(layout, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is empty" in complaint(layout, tmp_path / "empty")
    (tmp_path / "empty" / "holiday").mkdir()
    text = complaint(layout, tmp_path / "empty")
    assert "it holds holiday" in text
    assert layout.folders["train"] in text


def test_a_missing_or_empty_split(written):
    root, layout, _ = written
    place = layout.locate(root)
    shutil.rmtree(place / layout.folders["gallery"])
    assert f"{layout.folders['gallery']}: missing folder" in complaint(layout, root)
    for spectrum in ("RGB", "NI", "TI"):
        (place / layout.folders["gallery"] / (spectrum if layout is RGBNT201 else "")).mkdir(parents=True, exist_ok=True)
    assert f"{layout.folders['gallery']}: holds no image" in complaint(layout, root)


@pytest.mark.parametrize(
    ("write", "layout", "file", "spectrum"),
    [
        (write_rgbnt201, RGBNT201, "train_171/RGB/000007_cam2_0_01.jpg", "RGB"),
        (write_rgbnt201, RGBNT201, "test/NI/000258_cam1_0_00.jpg", "NIR"),
        (write_rgbnt201, RGBNT201, "test/TI/000258_cam1_0_00.jpg", "TIR"),
        (write_msvr310, MSVR310, "query3/0268/th/0268_s001_v0_000.jpg", "TIR"),
        (write_msvr310, MSVR310, "bounding_box_train/0002/vis/0002_s024_v7_000.jpg", "RGB"),
    ],
)
def test_a_missing_modality_file_is_named(tmp_path, write, layout, file, spectrum):
    root = write(tmp_path)
    (root / file).unlink()
    text = complaint(layout, root)
    assert f"{file}: missing {spectrum} image" in text
    assert "counterpart of" in text
    (root / file).parent.rename((root / file).parent.with_name("elsewhere"))
    assert f"missing folder ({spectrum})" in complaint(layout, root)


@pytest.mark.parametrize(
    ("write", "layout", "folder", "spectra", "name", "message"),
    [
        (write_rgbnt201, RGBNT201, "test", ("RGB", "NI", "TI"), "00258_cam1_0_00.jpg", "name does not match"),
        (write_rgbnt201, RGBNT201, "test", ("RGB", "NI", "TI"), "000258_c1_0_00.jpg", "name does not match"),
        (write_rgbnt201, RGBNT201, "train_171", ("RGB", "NI", "TI"), "000258_cam5_0_00.jpg", "unknown camera 5"),
        (write_rgbnt201, RGBNT201, "train_171", ("RGB", "NI", "TI"), "000258_cam0_0_00.jpg", "unknown camera 0"),
        (write_rgbnt201, RGBNT201, "train_171", ("RGB", "NI", "TI"), "000258_cam12_0_00.jpg", "name does not match"),
        (write_rgbnt100, RGBNT100, "rgbir/query", ("",), "502-1.jpg", "name does not match"),
        (write_rgbnt100, RGBNT100, "rgbir/query", ("",), "0502_c0009_000.jpg", "unknown camera 9"),
        (write_rgbnt100, RGBNT100, "rgbir/query", ("",), "0601_c0001_000.jpg", "unknown identity 601"),
        (write_msvr310, MSVR310, "query3/0268", ("vis", "ni", "th"), "0268_s1_v0_000.jpg", "name does not match"),
        (write_msvr310, MSVR310, "query3/0268", ("vis", "ni", "th"), "0268_s001_v8_000.jpg", "unknown camera 8"),
        (write_msvr310, MSVR310, "query3/0268", ("vis", "ni", "th"), "0269_s001_v0_000.jpg", "another identity's folder"),
    ],
)
def test_names_that_do_not_read_are_named(tmp_path, write, layout, folder, spectra, name, message):
    root = write(tmp_path)
    for spectrum in spectra:
        save(root / folder / spectrum / name, 9)
    text = complaint(layout, root)
    assert message in text
    assert name in text
    assert "expected" in text


def test_several_faults_are_counted_and_the_check_is_named(tmp_path):
    root = write_rgbnt201(tmp_path)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(root / "test" / "RGB" / name, 9)
    text = complaint(RGBNT201, root)
    assert "and 5 more" in text, "two missing counterparts each"
    assert f"repro data check rgbnt201 --root {root}" in text


def test_an_unreadable_image_is_named_when_it_is_read(tmp_path):
    layout = RGBNT201(str(write_rgbnt201(tmp_path)))
    file = layout.query.records[0].files[1]
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:200])
    split = TriSpectralImages(layout, layout.query, EvalTransform(size=(8, 4)), cache=True)
    with pytest.raises(ImageError, match=file):
        split.sample(0, np.random.default_rng(0))
    with pytest.raises(ImageError, match=file):
        split.warm()


def test_a_camera_that_training_never_saw_is_known(tmp_path):
    root = write_rgbnt201(tmp_path)
    assert RGBNT201(str(root)).unseen_cameras == ()
    for spectrum in ("RGB", "NI", "TI"):
        save(root / "test" / spectrum / "000258_cam4_0_00.jpg", 9)
    assert RGBNT201(str(root)).unseen_cameras == (3,)
    (warning,) = [f for f in datasets.rgbnt201(str(root)) if f.level == "warning"]
    assert "[3]" in warning.found


# --- fingerprint and checkers


def test_fingerprint_sees_names_sizes_and_on_request_bytes(written, tmp_path):
    root, layout, _ = written
    opened = layout(str(root))
    first, deep = opened.fingerprint(), opened.fingerprint(contents=True)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert layout(str(copy)).fingerprint() == first
    file = layout.locate(copy) / opened.train.records[0].files[0]
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    assert layout(str(copy)).fingerprint() == first
    assert layout(str(copy)).fingerprint(contents=True) != deep
    file.write_bytes(raw + b"x")
    assert layout(str(copy)).fingerprint() != first


def published(monkeypatch, layout, root):
    """Make what is written the published counts, so that a clean set of test size exists."""
    opened = layout(str(root))
    monkeypatch.setattr(layout, "published", {name: getattr(opened, name).counts for name in datasets.SPLITS})


def test_a_clean_set_passes_its_check_and_each_fault_fails_it(written, monkeypatch):
    root, layout, checker = written
    published(monkeypatch, layout, root)
    findings = checker(str(root))
    assert {f.level for f in findings} == {"ok"}
    assert len(findings) == 10
    first = layout.locate(root) / layout(str(root)).train.records[0].files[0]
    whole = first.read_bytes()

    def errors():
        return [f for f in checker(str(root)) if f.level == "error"]

    first.write_bytes(b"")
    (empty,) = errors()
    assert first.name in empty.found
    assert "empty" in empty.found
    first.write_bytes(whole[: len(whole) // 2])
    (broken,) = errors()
    assert first.name in broken.found
    assert "unreadable" in broken.found
    assert not [f for f in checker(str(root), decode=False) if f.level == "error"], "sizes alone do not tell"
    first.unlink()
    assert any(f.what == "train images" for f in errors())


def test_counts_are_compared_with_the_published_ones(tmp_path):
    findings = {f.what: f for f in datasets.rgbnt201(str(write_rgbnt201(tmp_path)))}
    assert findings["train identities"] == data.Finding("error", "train identities", "2", "171")
    assert findings["train images"].expected == "3951"
    assert findings["gallery images"].expected == "836"
    assert findings["query cameras"].level == "ok", "two cameras, as published"
    assert MSVR310.published == {"train": Counts(155, 1032, 8), "query": Counts(52, 591, 8), "gallery": Counts(155, 1055, 8)}
    assert RGBNT100.published["train"].images + RGBNT100.published["gallery"].images == 17250
    assert MSVR310.published["train"].images + MSVR310.published["gallery"].images == 2087
    assert RGBNT201.published["train"].images + RGBNT201.published["gallery"].images == 4787


def test_checks_find_what_a_count_does_not_show(tmp_path):
    root = write_rgbnt201(tmp_path / "a", train=(2, 258), test=(258, 30))
    (shared,) = [f for f in datasets.rgbnt201(str(root)) if f.what == "identities in train and gallery"]
    assert shared.found == "258"
    root = write_msvr310(tmp_path / "b")
    shutil.rmtree(root / "bounding_box_test/0268")
    (lost,) = [f for f in datasets.msvr310(str(root)) if f.what == "query identities without gallery"]
    assert lost.found == "268"
    root = write_rgbnt100(tmp_path / "c")
    save(root / "rgbir/query/0502_c0005_000.jpg", 9, width=37)
    assert any("not divisible by 3" in f.found for f in datasets.rgbnt100(str(root)))
    (missing,) = datasets.rgbnt100(str(tmp_path / "d"))
    assert missing.what == "root"


def test_many_faults_of_a_kind_are_summed_up(tmp_path):
    root = write_rgbnt201(tmp_path, train=range(1, 30), shots=1)
    shutil.rmtree(root / "train_171/TI")
    (root / "train_171/TI").mkdir()
    missing = [f for f in datasets.rgbnt201(str(root)) if f.what == "missing TIR image"]
    assert len(missing) == datasets._SHOWN + 1
    assert missing[-1].found == f"{29 * 2 - datasets._SHOWN} more"


@pytest.mark.parametrize("size", [(4, 4), (7, 30), (1, 1)])
def test_a_check_decodes_images_of_less_than_eight_pixels(size, tmp_path):
    file = tmp_path / "small.jpg"
    Image.new("RGB", size).save(file)
    assert datasets._damage(file, RGBNT201, True) is None
