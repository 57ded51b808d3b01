"""Layouts, their split by identity, what is said of broken folders, the generated sample, and emoji7 without its download."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from core import npm
from plugins.sap import datasets, emoji7_maker
from plugins.sap.augmentation import EvalTransform, TrainTransform, colour_jitter
from plugins.sap.datasets import PACS, DomainImages, Emoji7, LayoutError
from plugins.sap.pacs_sample import draw, pacs_sample


def fill(root, domains, classes, count=3, name="{}.png"):
    for d, domain in enumerate(domains):
        for c, cls in enumerate(classes):
            (root / domain / cls).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (8, 8), (40 * d, 30 * c, 20 * n)).save(root / domain / cls / name.format(n))


@pytest.fixture
def pacs(tmp_path):
    fill(tmp_path / "kfold", PACS.domains, PACS.classes, 5)
    return tmp_path


# --- PACS -------------------------------------------------------------------------------------------------------------


def test_pacs_is_read_in_sorted_order_from_its_folder_or_its_parent(pacs):
    layout = PACS(str(pacs), holdout=0.2)
    assert [r.file for r in layout.records] == [f"{d}/{c}/{n}.png" for d in PACS.domains for c in PACS.classes for n in range(5)]
    assert layout.records[0].domain == 0
    assert layout.records[-1] == PACS(str(pacs / "kfold"), holdout=0.2).records[-1]
    assert layout.counts() == {
        "photo": 35, "art_painting": 35, "cartoon": 35, "sketch": 35, "classes": 7, "identities": 140, "held-out identities": 28,
    }  # fmt: skip
    assert layout.read(1).shape == (8, 8, 3)
    assert not layout.sample


def test_every_cell_gives_its_share_to_the_held_out_and_the_choice_is_fixed(pacs):
    layout = PACS(str(pacs), holdout=0.4)
    held = [(r.domain, r.cls) for r in layout.records if r.held_out]
    assert sorted(held) == [(d, c) for d in range(4) for c in range(7) for _ in range(2)]
    assert [r.held_out for r in layout.records] == [r.held_out for r in PACS(str(pacs), holdout=0.4).records]
    before = {r.identity: r.held_out for r in layout.records}
    Image.new("RGB", (8, 8)).save(pacs / "kfold" / "photo" / "dog" / "zz.png")
    after = {r.identity: r.held_out for r in PACS(str(pacs), holdout=0.4).records}
    assert all(after[i] == h for i, h in before.items() if not i.startswith("photo/dog/"))


def test_what_is_missing_is_named(pacs, tmp_path):
    with pytest.raises(LayoutError, match=r"no folder .*repro data make pacs-sample"):
        PACS(str(tmp_path / "nowhere"))
    (tmp_path / "other" / "stuff").mkdir(parents=True)
    with pytest.raises(LayoutError, match="holds none of photo, art_painting, cartoon, sketch but stuff"):
        PACS(str(tmp_path / "other"))
    shutil.rmtree(pacs / "kfold" / "cartoon" / "horse")
    with pytest.raises(LayoutError, match="missing folder cartoon/horse"):
        PACS(str(pacs))
    (pacs / "kfold" / "cartoon" / "horse").mkdir()
    with pytest.raises(LayoutError, match="no image in cartoon/horse"):
        PACS(str(pacs))
    with pytest.raises(ValueError, match="holdout"):
        PACS(str(pacs), holdout=1.0)


def test_the_checker_counts_against_the_publication_and_finds_damage(pacs):
    found = {f.what: f for f in datasets.pacs(str(pacs))}
    assert found["sketch images"].level == "warning"
    assert found["sketch images"].expected.startswith("3929 in all: 772")
    assert {d: sum(n) for d, n in PACS.published.items()} == {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}
    (pacs / "kfold" / "photo" / "dog" / "0.png").write_bytes(b"no image")
    errors = [f for f in datasets.pacs(str(pacs), thorough=True) if f.level == "error"]
    assert len(errors) == 1
    assert "photo/dog/0.png" in errors[0].found
    shutil.rmtree(pacs / "kfold" / "photo")
    assert [f.level for f in datasets.pacs(str(pacs))] == ["error"]


def test_published_counts_are_accepted_without_a_word(tmp_path, monkeypatch):
    fill(tmp_path, PACS.domains, PACS.classes, 2)
    monkeypatch.setattr(PACS, "published", dict.fromkeys(PACS.domains, (2,) * 7))
    assert {f.level for f in datasets.pacs(str(tmp_path))} == {"ok"}


# --- the generated sample ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    root = tmp_path_factory.mktemp("pacs") / "sample"
    pacs_sample(str(root), seed=3, per_cell=2, size=32)
    return root


def test_the_sample_is_pacs_layout_and_says_that_it_is_generated(sample):
    layout = PACS(str(sample), holdout=0.5)
    assert len(layout.records) == 4 * 7 * 2
    assert layout.sample
    assert datasets.pacs(str(sample))[0].level == "warning"
    assert all(f.level == "ok" for f in datasets.pacs(str(sample))[1:])


def test_an_image_of_the_sample_depends_on_its_own_numbers_alone(sample, tmp_path):
    pacs_sample(str(tmp_path / "again"), seed=3, per_cell=2, size=32)
    one, two = (PACS(str(p), holdout=0.5) for p in (sample, tmp_path / "again"))
    assert one.fingerprint(contents=True) == two.fingerprint(contents=True)
    assert np.array_equal(
        np.asarray(draw(3, 3, 1, 1, 32)), np.asarray(Image.open(sample / "sketch" / "elephant" / "2.png").convert("RGB"))
    )
    assert not np.array_equal(np.asarray(draw(4, 3, 1, 1, 32)), np.asarray(draw(3, 3, 1, 1, 32)))


def test_styles_differ_as_their_names_promise():
    def mean(domain, statistic):
        return np.mean([statistic(np.asarray(draw(0, domain, c, 0, 48), np.float32) / 255) for c in range(7)])

    colour = [mean(d, lambda x: np.ptp(x, axis=2).mean()) for d in range(4)]
    paper = [mean(d, lambda x: (x > 0.97).all(2).mean()) for d in range(4)]
    flat = [mean(d, lambda x: (np.abs(np.diff(x, axis=1)).max(2) < 1e-6).mean()) for d in range(4)]
    assert colour[3] == 0  # a sketch is grey on white
    assert paper[3] > 0.6 > max(paper[:2])
    assert flat[2] > 0.5 > max(flat[:2])  # a cartoon is flat, photo and painting are textured


def test_the_sample_is_found_again_and_never_put_over_something_else(sample, tmp_path):
    stamp = (sample / "photo" / "dog" / "pic_001.jpg").stat().st_mtime_ns
    pacs_sample(str(sample), seed=3, per_cell=2, size=32)
    assert (sample / "photo" / "dog" / "pic_001.jpg").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="another sample"):
        pacs_sample(str(sample), seed=4, per_cell=2, size=32)
    (tmp_path / "mine").write_text("data")
    with pytest.raises(ValueError, match="no generated sample"):
        pacs_sample(str(tmp_path), per_cell=2, size=32)
    with pytest.raises(ValueError, match="per_cell"):
        pacs_sample(str(tmp_path / "x"), per_cell=1)


# --- emoji7 -----------------------------------------------------------------------------------------------------------


def emoji_folder(root, per_class=6):
    fill(root, Emoji7.domains, Emoji7.classes, per_class, "e{}.png")
    identities = {c: emoji7_maker.split({f"e{n}": 0 for n in range(per_class)}, c, 0.5) for c in Emoji7.classes}
    (root / "manifest.json").write_text(json.dumps({"identities": identities}))
    return root


def test_an_emoji_is_one_identity_in_four_domains_and_on_one_side_of_the_split(tmp_path):
    layout = Emoji7(str(emoji_folder(tmp_path)))
    sides: dict[str, set[bool]] = {}
    for record in layout.records:
        sides.setdefault(record.identity, set()).add(record.held_out)
    assert len(sides) == 42
    assert all(len(s) == 1 for s in sides.values())
    assert sum(s == {True} for s in sides.values()) == 21
    assert not layout.sample


def test_emoji7_whose_manifest_is_missing_or_differs_is_refused(tmp_path):
    emoji_folder(tmp_path)
    (tmp_path / "apple" / "food" / "e0.png").rename(tmp_path / "apple" / "food" / "stranger.png")
    with pytest.raises(LayoutError, match="food/stranger is in the files or in the manifest"):
        Emoji7(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(LayoutError, match=r"no manifest.json .* repro data make emoji7"):
        Emoji7(str(tmp_path))
    assert datasets.emoji7_folder(str(tmp_path))[0].level == "error"


def test_the_checker_of_emoji7_wants_twenty_identities_a_side(tmp_path):
    found = {f.what: f for f in datasets.emoji7_folder(str(emoji_folder(tmp_path)))}
    assert found["smallest class and split"].level == "warning"
    assert found["apple images"].level == "ok"


def row(name, subcategory, **changes):
    return {
        "short_name": name,
        "subcategory": subcategory,
        "image": f"{name}-x.png",
        **{f"has_img_{v}": True for v in Emoji7.domains},
        **changes,
    }


def test_the_choice_of_emoji():
    table = [
        row("cat", "animal-mammal"), row("+1", "animal-bug"), row("paw", "animal-mammal"), row("old", "animal-bug", obsoleted_by="1F4A9"),
        row("rare", "animal-bug", has_img_twitter=False), row("car", "transport-ground"),
    ]  # fmt: skip
    classes = {"animal": (("animal-mammal", "animal-bug"), ("paw",)), "vehicle": (("transport-ground",), ())}
    assert emoji7_maker.choose(table, classes) == {
        "animal": {"cat": "cat-x.png", "_1": "+1-x.png"},
        "vehicle": {"car": "car-x.png"},
    }
    with pytest.raises(LayoutError, match="leaves out 'wing'"):
        emoji7_maker.choose(table, {"animal": (("animal-bug",), ("wing",))})
    with pytest.raises(LayoutError, match="one file name"):
        emoji7_maker.choose([*table, row("_1", "animal-bug")], classes)


def test_one_vendor_written_from_an_archive_with_transparency_on_the_background(tmp_path):
    import tarfile

    package = tmp_path / "package"
    pictures = package / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.putpixel((5, 5), (0, 0, 255, 255))
    clear.save(pictures / "cat-x.png")
    (package / "emoji.json").write_text(json.dumps([row("cat", "animal-mammal")]))
    (package / "sprite.png").write_bytes(b"\0" * 1000)
    archive = tmp_path / "p.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, "package")
    made = tmp_path / "set"
    made.mkdir()
    one = npm.Package("emoji-datasource-google", "16.0.0", archive, "", "")
    emoji7_maker.write_vendor(made, "google", one, "grey", {"animal": {"cat": "cat-x.png"}})
    written = Image.open(made / "google" / "animal" / "cat.png")
    assert written.mode == "RGB"
    assert written.getpixel((0, 0)) == (128, 128, 128)
    assert written.getpixel((5, 5)) == (0, 0, 255)
    with pytest.raises(LayoutError, match=r"no image dog-x\.png of dog"):
        emoji7_maker.write_vendor(made, "google", one, "grey", {"food": {"dog": "dog-x.png"}})


def test_the_split_of_a_class_is_half_and_fixed():
    names = {f"n{i}": "" for i in range(47)}
    parts = emoji7_maker.split(names, "clothing", 0.5)
    assert (len(parts["train"]), len(parts["test"])) == (23, 24)
    assert not set(parts["train"]) & set(parts["test"])
    assert parts == emoji7_maker.split(dict(reversed(names.items())), "clothing", 0.5)


def test_without_npm_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(npm.NpmError, match="npm is not installed"):
        emoji7_maker.emoji7(str(tmp_path / "emoji7"))
    assert sorted(p.name for p in tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="test_share"):
        emoji7_maker.emoji7(str(tmp_path / "emoji7"), test_share=1.0)


@pytest.mark.npm
def test_the_four_packages_are_still_what_was_published():
    """Asks the registry for four records; downloads nothing large."""
    import subprocess

    found = shutil.which("npm")
    if found is None:
        pytest.skip("npm is not installed")
    published = {
        "apple": "sha512-dVYjsK0FnCry9F+PBtnivhG2", "google": "sha512-ZRexfzs7MVoLnmzZmNsO4TKh",
        "twitter": "sha512-7F+uCuHH+7Qnrc15P5tnbvKk", "facebook": "sha512-b9ZxJdB7nMWGckH1vyCjPSos",
    }  # fmt: skip
    for vendor, integrity in published.items():
        name = f"emoji-datasource-{vendor}@{emoji7_maker.VERSION}"
        done = subprocess.run([found, "view", name, "dist.integrity"], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.skip(f"the npm registry is not reachable: {done.stderr.strip().splitlines()[-1:]}")
        assert done.stdout.startswith(integrity)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_index_and_generator(pacs):
    layout = PACS(str(pacs))
    kept, read = (DomainImages(layout, TrainTransform(16), cache=c) for c in (True, False))
    for images in (kept, read, kept):
        a, b = (images.sample(7, np.random.default_rng(5)) for _ in range(2))
        assert a["image"].shape == (3, 16, 16)
        assert (a["image"] == b["image"]).all()
        assert (a["class"], a["domain"]) == (layout.records[7].cls, layout.records[7].domain)
    assert (kept.sample(7, np.random.default_rng(5))["image"] == read.sample(7, np.random.default_rng(5))["image"]).all()


def test_transforms():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    plain = EvalTransform(16)(image, np.random.default_rng(0))
    assert (plain.shape, plain.dtype) == ((3, 16, 16), np.float32)
    still = TrainTransform(20, area=(1.0, 1.0), flip=0.0, jitter=0.0, hue=0.0)
    square = image[:, :20]
    assert np.allclose(still(square, np.random.default_rng(0)), EvalTransform(20)(square, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="hue"):
        TrainTransform(hue=0.6)
    with pytest.raises(ValueError, match="area"):
        TrainTransform(area=(0.5, 1.2))


def test_colour_jitter_keeps_grey_grey_and_turns_hues():
    grey = np.full((4, 4, 3), 100, np.uint8)
    for seed in range(5):
        out = colour_jitter(grey, np.random.default_rng(seed), strength=0.4, hue=0.4)
        assert np.ptp(out) == 0
        assert 59 <= out[0, 0, 0] <= 141
    red = np.zeros((4, 4, 3), np.uint8) + np.array([200, 20, 20], np.uint8)
    assert np.array_equal(colour_jitter(red, np.random.default_rng(0), strength=0.0, hue=0.0), red)
    turned = [colour_jitter(red, np.random.default_rng(s), strength=0.0, hue=0.4)[0, 0] for s in range(20)]
    assert {int(c.argmax()) for c in turned} == {0, 1, 2}
