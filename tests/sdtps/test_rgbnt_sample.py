"""The generated sample: deterministic bytes, RGBNT201's layout, and identities that need all three spectra."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from core import data, samples
from plugins.sdtps import pedestrians
from plugins.sdtps import rgbnt_sample as generator
from plugins.sdtps.augmentation import EvalTransform
from plugins.sdtps.datasets import MANIFEST, RGBNT201, TriSpectralImages, rgbnt201
from plugins.sdtps.pedestrians import persons
from plugins.sdtps.rgbnt_sample import rgbnt_sample, rgbnt_sample_files

TINY = {
    "train_identities": 5,
    "train_cameras": 3,
    "train_images": 1,
    "test_identities": 4,
    "test_images": 2,
    "height": 64,
    "width": 32,
}


def digests(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample") / "tiny"
    rgbnt_sample(str(root), seed=3, **TINY)
    return root


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny, tmp_path):
    rgbnt_sample(str(tmp_path / "again"), seed=3, **TINY)
    assert digests(tmp_path / "again") == digests(tiny)
    rgbnt_sample(str(tmp_path / "other"), seed=4, **TINY)
    ours, theirs = digests(tiny), digests(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)
    assert not list(tmp_path.glob(".*")), "no draft is left behind"


def test_more_images_leave_the_first_ones_alone(tiny, tmp_path):
    rgbnt_sample(str(tmp_path / "more"), seed=3, **(TINY | {"train_images": 2, "train_cameras": 4}))
    few, more = digests(tiny), digests(tmp_path / "more")
    pictures = [name for name in few if name.startswith("train_171")]
    assert len(pictures) == 45
    assert all(few[name] == more[name] for name in pictures)


def test_it_is_rgbnt201_to_its_loader_and_says_that_it_is_not_to_its_checker(tiny):
    layout = RGBNT201(str(tiny))
    assert layout.sample
    assert (layout.train.counts.identities, layout.train.counts.images, layout.train.counts.cameras) == (5, 15, 3)
    assert (layout.query.counts.identities, layout.query.counts.images, layout.query.counts.cameras) == (4, 16, 2)
    assert layout.unseen_cameras == ()
    assert not set(layout.train.identities) & set(layout.query.identities)
    assert layout.train.records[0].files[0] == "train_171/RGB/000001_cam1_0_00.jpg"
    for file in layout.train.records[0].files:
        with Image.open(tiny / file) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 64))
    findings = rgbnt201(str(tiny))
    assert any(f.level == "error" and "generated sample" in f.found for f in findings)
    manifest = json.loads((tiny / MANIFEST).read_text())
    assert manifest["generated"] is True
    assert "not comparable" in manifest["statement"]
    assert manifest["counts"] == layout.counts()
    assert (manifest["seed"], manifest["options"]["train_identities"]) == (3, 5)


def test_nir_and_tir_are_grey_and_colours_are_not(tiny):
    layout = RGBNT201(str(tiny))
    rgb, nir, tir = (np.stack(v).astype(int) for v in zip(*(layout.read(record) for record in layout.train.records)))
    for grey in (nir, tir):
        assert np.abs(grey[..., 0] - grey[..., 1]).max() == 0
        assert grey.std() > 25
    assert np.abs(rgb[..., 0] - rgb[..., 2]).mean() > 10


def test_a_sample_already_there_is_kept_and_anything_else_is_refused(tiny, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    rgbnt_sample(str(tiny), seed=3, **TINY)
    assert before == {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    with pytest.raises(ValueError, match="holds another sample"):
        rgbnt_sample(str(tiny), seed=4, **TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is no generated sample"):
        rgbnt_sample(str(tmp_path / "mine"), **TINY)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    rgbnt_sample(str(tmp_path / "empty"), **TINY)
    assert RGBNT201(str(tmp_path / "empty")).sample


def test_damage_is_noticed(tmp_path):
    root = tmp_path / "sample"
    rgbnt_sample(str(root), **TINY)
    assert {f.level for f in rgbnt_sample_files(str(root))} == {"ok"}
    victim = root / "test/NI/000006_cam1_0_00.jpg"
    raw = bytearray(victim.read_bytes())
    raw[-10] ^= 1
    victim.write_bytes(raw)
    assert [f.what for f in rgbnt_sample_files(str(root)) if f.level == "error"] == ["fingerprint of all bytes"]
    with pytest.raises(ValueError, match="damaged sample"):
        rgbnt_sample(str(root), **TINY)
    victim.unlink()
    assert any("missing NIR image" in f.found for f in rgbnt_sample_files(str(root)))
    (root / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        samples.read_manifest(root)
    (root / MANIFEST).unlink()
    assert rgbnt_sample_files(str(root))[0].what == "manifest"


def test_a_draft_that_fails_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*args)

    original = generator.render
    monkeypatch.setattr(generator, "render", fails)
    with pytest.raises(OSError, match="No space"):
        rgbnt_sample(str(tmp_path / "sample"), **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_identities": 0}, "train_identities must be at least 1"),
        ({"train_cameras": 5}, "train_cameras must be at most 4"),
        ({"test_images": 101}, "at most 100"),
        ({"height": 63}, "even"),
        ({"sharing": 0}, "sharing must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rgbnt_sample(str(tmp_path / "sample"), **(TINY | options))
    assert not (tmp_path / "sample").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("count", "sharing"), [(20, 3), (96, 3), (7, 2), (12, 1), (3, 3), (40, 20)])
def test_looks_are_shared_in_one_spectrum_and_never_in_two(count, sharing):
    people = persons(count, sharing, np.random.default_rng(1))
    assert len(people) == count
    for key in ("visible", "reflected", "thermal"):
        groups = Counter(repr(getattr(person, key)) for person in people)
        assert max(groups.values()) <= sharing
        if sharing > 1 and count > 4:
            assert min(groups.values()) >= 1
            assert max(groups.values()) >= 2, f"nobody shares a {key} look"
    for i, a in enumerate(people):
        for b in people[:i]:
            shared = [getattr(a, key) == getattr(b, key) for key in ("visible", "reflected", "thermal")]
            assert sum(shared) <= 1
            if shared[0] or shared[2]:
                assert a.short_sleeves == b.short_sleeves, "bare arms show in colour and in heat"


def test_a_spectrum_shows_its_own_look_and_no_other():
    """Two persons who differ in one spectrum's look differ there, and (arms and legs apart) nowhere else."""
    people = persons(12, 2, np.random.default_rng(0))
    plain = dataclasses.replace(people[0].visible, cap=None, bag=None)  # a bag has an outline in every spectrum
    base = dataclasses.replace(people[0], visible=plain, thermal=dataclasses.replace(people[0].thermal, pocket=None))
    camera = pedestrians.CAMERAS[0]
    scenery = pedestrians.background(camera, 64, 160, np.random.default_rng(0))

    def shot(person):
        return [v.astype(int) for v in pedestrians.render(person, [], camera, scenery, (64, 32), np.random.default_rng(5))]

    reference = shot(base)
    changes = {
        "visible": dataclasses.replace(plain, upper=(0.9, 0.1, 0.1), second=(0.1, 0.1, 0.9), lower=(0.1, 0.8, 0.1)),
        "reflected": dataclasses.replace(base.reflected, upper=0.95 - base.reflected.upper, lower=0.95 - base.reflected.lower),
        "thermal": dataclasses.replace(base.thermal, trunk=1.1 - base.thermal.trunk, lower=1.1 - base.thermal.lower),
    }
    for spectrum, (key, look) in enumerate(changes.items()):
        differences = [np.abs(a - b).max() for a, b in zip(shot(dataclasses.replace(base, **{key: look})), reference)]
        assert differences[spectrum] > 40
        assert sum(d == 0 for d in differences) == 2, f"{key} look leaks: {differences}"


# --- what it is for: three spectra tell more than one ------------------------------------------------------------------


def mean_average_precision(features, pids, cameras):
    """Camera protocol, in slow loops."""
    precisions = []
    for i in range(len(pids)):
        others = [j for j in range(len(pids)) if (pids[j], cameras[j]) != (pids[i], cameras[i])]
        others.sort(key=lambda j: float(((features[i] - features[j]) ** 2).sum()))
        hits, found = 0, []
        for rank, j in enumerate(others, 1):
            if pids[j] == pids[i]:
                hits += 1
                found.append(hits / rank)
        precisions.append(np.mean(found))
    return float(np.mean(precisions))


def test_three_spectra_rank_better_than_any_one_and_raw_pixels_tell_nothing(tmp_path):
    root = tmp_path / "sample"
    rgbnt_sample(str(root), train_identities=1, train_cameras=1, train_images=1, test_identities=20, test_images=2, sharing=3)
    layout = RGBNT201(str(root))
    side = TriSpectralImages(layout, layout.query, EvalTransform(size=(64, 32)))
    views = [np.stack(v).astype(np.float64) / 255 for v in zip(*(side.views(i) for i in range(len(side))))]
    pids, cameras = np.array(side.pids), np.array(side.cameras)

    def pooled(images):
        """Mean of a 16 x 4 grid over the person, standardised per image and centred per camera (no identity is used)."""
        grid = images[:, :, 8:24].reshape(len(images), 16, 4, 4, 4, 3).mean((2, 4))
        grid = grid + grid[:, :, ::-1]
        flat = grid.reshape(len(images), -1)
        flat = (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)
        for camera in set(side.cameras):
            flat[cameras == camera] -= flat[cameras == camera].mean(0)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    single = [mean_average_precision(pooled(view), pids, cameras) for view in views]
    together = mean_average_precision(np.concatenate([pooled(view) for view in views], 1), pids, cameras)
    raw = mean_average_precision(np.concatenate([view.reshape(len(pids), -1) for view in views], 1), pids, cameras)
    assert together > max(single) + 0.25, (single, together)
    assert raw < 0.15, raw
    assert all(0.1 < value < 0.6 for value in single), single


def test_streams_are_named_by_integers():
    """Images depend on (seed, purpose, person, camera, shot): neighbours in any of them are independent."""
    draws = {data.generator(0, *key).integers(2**62) for key in np.ndindex(2, 4, 3, 3)}
    assert len(draws) == 2 * 4 * 3 * 3
