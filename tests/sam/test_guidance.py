"""Which text goes with which image: the release's forms, its cache, its traps, and the refusal of ground truth."""

import functools
import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core.text import EmbeddingTable, HashedText, prompted
from plugins.sam.classes import NYU40, SUN37
from plugins.sam.datasets import NYUDepthv2, RGBDScenes
from plugins.sam.guidance import BothTexts, Captions, ClassNames, ConstantTokens, GroundTruthTags, ImageTags, normalise
from plugins.sam.rgbd_sample import ORACLE

ENCODER = functools.partial(HashedText, dim=16)
Tags = functools.partial(ImageTags, encoder=ENCODER, cache=False)


@pytest.fixture(scope="module")
def scenes(sample):
    return NYUDepthv2(str(sample))


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_tags_are_cleaned_cut_and_padded(scenes, tmp_path):
    names = [r.image for r in scenes.train]
    tags = {name: ["chair"] for name in (*names, *(r.image for r in scenes.test))}
    tags[names[0]] = [
        "Night  Stand",
        "nightstand",
        {"label": "Refridgerator"},
        {"name": "floor_mat"},
        {"text": "bed"},
        "",
        "sofa",
        "desk",
        "lamp",
        "box",
    ]
    guidance = Tags(write(tmp_path / "t.json", tags))
    assert guidance.open(scenes) == {"images_without_tags": 0}
    assert guidance.words(scenes.train[0]) == ["nightstand", "refrigerator", "rug", "bed", "sofa", "desk"]
    tokens = guidance.tokens(scenes.train[0])
    assert_close(tokens, prompted(HashedText(16), guidance.words(scenes.train[0])))
    one = guidance.tokens(scenes.train[1])
    assert one.shape == (6, 16)
    assert float(one[1:].abs().sum()) == 0  # padding


def test_label_rules():
    assert [normalise(x) for x in ("floor_mat", "Fridge", "night_stand", "tv", "television")] == [
        "rug",
        "refrigerator",
        "nightstand",
        "tv",
        "tv",
    ]
    assert [normalise(x, "upstream") for x in ("floor_mat", "Fridge", "Night Stand")] == ["floor_mat", "fridge", "nightstand"]


def test_the_sample_s_own_tags_are_accepted_and_cached_in_the_release_s_form(scenes):
    first = ImageTags(encoder=ENCODER)
    assert first.open(scenes)["images_without_tags"] <= 2
    files = list((scenes.root / ".text_cache").glob("*/imglabels/embeds.pt"))
    assert len(files) == 1
    held = torch.load(files[0], weights_only=True)
    assert set(held) == {"pad_len", "feats", "names"}
    assert held["pad_len"] == 6
    assert held["feats"]["RGB/0000.jpg"].shape == (6, 16)
    second = ImageTags(encoder=ENCODER)
    second.open(scenes)
    assert all(torch.equal(first.tokens(r), second.tokens(r)) for r in scenes.train)
    other = ImageTags(encoder=functools.partial(HashedText, dim=16, seed=1))  # another encoder, another key
    other.open(scenes)
    assert not torch.equal(other.tokens(scenes.train[0]), first.tokens(scenes.train[0]))
    for damage in (b"damaged", {k: v for k, v in held.items() if k != "pad_len"}, [1], {"pad_len": 6, "feats": [1]}):
        files[0].write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, files[0])
        third = ImageTags(encoder=ENCODER)
        third.open(scenes)
        assert torch.equal(first.tokens(scenes.train[0]), third.tokens(scenes.train[0]))


def test_ground_truth_is_refused_by_name_and_by_looking(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"its name says so.*GroundTruthTags"):
        Tags(str(scenes.root / ORACLE)).open(scenes)
    (tmp_path / "innocent.json").write_text((scenes.root / ORACLE).read_text())
    with pytest.raises(ValueError, match="on 10 of 10 train images it names exactly the largest classes"):
        Tags(str(tmp_path / "innocent.json")).open(scenes)
    # Of the test images alone is as bad: there it decides the figure.
    swapped = NYUDepthv2(str(scenes.root))
    swapped.train, swapped.test = scenes.test, scenes.train
    oracle = json.loads((scenes.root / ORACLE).read_text())
    for name in {r.image for r in swapped.train}:
        oracle[name] = ["bed", "lamp"]
    with pytest.raises(ValueError, match="on 10 of 10 test images it names exactly the largest classes"):
        Tags(write(tmp_path / "test_only.json", oracle)).open(swapped)
    asked = GroundTruthTags(max_tags=5, encoder=ENCODER)
    assert asked.open(scenes) == {"images_with_tags_from_labels": 13}
    expected = [normalise(x) for x in json.loads((scenes.root / ORACLE).read_text())["RGB/0000.jpg"]]
    assert asked.words(scenes.train[0]) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ("{}", r"holds no tags \(0 images\)"),
        ('{"RGB/0000.jpg": []}', r"holds no tags \(1 images\)"),
        ("[1]", "must be a JSON object from image to tags"),
        ("{bad", "is not JSON"),
        ('{"RGB/0000.jpg": [3]}', "holds 3; a tag is a string or an object"),
        ('{"RGB/zz.jpg": ["bed"]}', "names none of the 13 images"),
    ],
)
def test_a_bad_tag_file_is_one_clear_error(scenes, tmp_path, content, complaint):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        Tags(str(tmp_path / "t.json")).open(scenes)


def test_a_missing_tag_file_and_images_without_tags(scenes, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Tags(str(tmp_path / "none.json")).open(scenes)
    guidance = Tags(write(tmp_path / "t.json", {"0000.jpg": ["bed"], "0001": ["sofa"]}))
    assert guidance.open(scenes) == {"images_without_tags": 11}
    assert guidance.words(scenes.train[0]) == ["bed"]
    assert guidance.words(scenes.train[1]) == ["sofa"]
    assert float(guidance.tokens(scenes.train[2]).abs().sum()) == 0


def test_the_release_s_match_by_number_takes_another_image_s_tags(scenes, tmp_path):
    path = write(tmp_path / "t.json", {"RGB/test_3.jpg": ["bed"]})
    exact, upstream = Tags(path), Tags(path, match="upstream")
    with pytest.raises(ValueError, match="names none"):
        exact.open(scenes)
    upstream.open(scenes)
    assert upstream.words(scenes.train[3]) == ["bed"]  # 0003.jpg is another image


def test_class_names_captions_both_and_the_control(scenes, tmp_path):
    names = ClassNames(encoder=ENCODER)
    names.open(scenes)
    assert names.tokens(scenes.train[0]).shape == (40, 16)
    assert torch.equal(names.tokens(scenes.train[0]), names.tokens(scenes.train[1]))

    path = write(tmp_path / "c.json", [{"rgb_path": "RGB/0000.jpg", "description": "A bed stands left. A lamp! Nothing else?"}])
    captions = Captions(path, max_sentences=4, encoder=ENCODER)
    assert captions.open(scenes) == {"images_without_caption": 12}
    assert captions.words(scenes.train[0]) == ["A bed stands left", "A lamp", "Nothing else"]
    assert_close(captions.tokens(scenes.train[0])[:3].norm(dim=-1), torch.ones(3))
    with pytest.raises(ValueError, match="must be a JSON list of objects"):
        Captions(write(tmp_path / "d.json", {"a": 1}), encoder=ENCODER).open(scenes)

    both = BothTexts(functools.partial(ClassNames, encoder=ENCODER), functools.partial(Captions, path, encoder=ENCODER))
    both.open(scenes)
    assert both.count == 50  # as in the release: 40 names and 10 sentences
    assert both.tokens(scenes.train[0]).shape == (50, 16)
    few = write(tmp_path / "few.json", {r.image: ["bed"] for r in scenes.train})
    mixed = BothTexts(functools.partial(Tags, few, max_tags=3), functools.partial(ClassNames, encoder=ENCODER))
    mixed.open(scenes)
    assert mixed.words(scenes.train[0])[:5] == ["bed", "", "", "wall", "floor"]  # a word for every token, and none for padding
    assert len(mixed.words(scenes.train[0])) == mixed.count == len(mixed.tokens(scenes.train[0]))
    with pytest.raises(ValueError, match="one width, got 16 and 8"):
        BothTexts(functools.partial(ClassNames, encoder=ENCODER), functools.partial(ConstantTokens, dim=8))

    control = ConstantTokens(max_tags=6, dim=16)
    control.open(scenes)
    assert torch.equal(control.tokens(scenes.train[0]), control.tokens(scenes.test[0]))
    assert np.linalg.matrix_rank(control.tokens(scenes.train[0]).numpy()) == 6


def test_vectors_keyed_by_a_data_set_s_own_names_are_found(tmp_path):
    for title, names in (("nyu", NYU40), ("sun", SUN37)):
        path = tmp_path / f"{title}.npz"
        np.savez(path, names=np.array(names), embeddings=np.eye(len(names), dtype=np.float32))
        scenes = RGBDScenes.__new__(RGBDScenes)  # a data set's names are all that is asked
        scenes.classes = names
        table = functools.partial(EmbeddingTable, path=str(path))
        guidance = ClassNames(encoder=table, prompts="none", label_alias="none")
        guidance.open(scenes)
        assert_close(guidance.feats, torch.eye(len(names)))
        with pytest.raises(ValueError, match="no vector for 'bookcase'"):
            ClassNames(encoder=table, prompts="none").open(scenes)


def largest(scenes, count, *, below=40, without=()):
    """Names of the largest classes of each image's label map."""
    told = {}
    for record in (*scenes.train, *scenes.test):
        pixels = np.bincount(scenes.read(record).label.ravel(), minlength=256)[:below]
        names = [NYU40[k] for k in np.argsort(-pixels, kind="stable") if pixels[k] and NYU40[k] not in without]
        told[record.image] = names[:count]
    return told


@pytest.mark.parametrize("label_alias", ["fixed", "none"])
@pytest.mark.parametrize(
    "rule", [{"count": 5, "below": 37}, {"count": 6}, {"count": 40}, {"count": 5, "without": ("wall", "floor")}], ids=str
)
def test_tags_and_sentences_from_label_maps_are_refused_however_they_were_cut(scenes, tmp_path, rule, label_alias):
    told = largest(scenes, **rule)
    upper = {image: [{"label": name.upper()} for name in names] for image, names in told.items()}
    with pytest.raises(ValueError, match="exactly the largest classes"):
        Tags(write(tmp_path / "t.json", upper), label_alias=label_alias).open(scenes)
    padded = {image: [*names, *(["lamp"] * (i % 2))] for i, (image, names) in enumerate(told.items())}
    if rule["count"] == 6:  # what follows the tokens is no disguise
        with pytest.raises(ValueError, match="exactly the largest classes"):
            Tags(write(tmp_path / "p.json", padded), label_alias=label_alias).open(scenes)
    told = {image: ". ".join(f"There are some {name}s" for name in names) for image, names in told.items()}
    captions = [{"rgb_path": image, "description": text} for image, text in told.items()]
    with pytest.raises(ValueError, match="exactly the largest classes"):
        Captions(write(tmp_path / "c.json", captions), max_sentences=40, encoder=ENCODER).open(scenes)


def test_a_bad_caption_file_is_one_clear_error_and_so_is_a_bad_count(scenes, tmp_path):
    def entry(image, text):
        return {"rgb_path": image, "description": text}

    for content, complaint in (
        ([], r"holds no sentence \(0 images\)"),
        ([entry("RGB/0000.jpg", " . ")], r"holds no sentence \(1 images\)"),
        ([entry("RGB/0000.jpg", None)], "entry 1 holds .* are texts"),
        ([entry(["RGB/0000.jpg"], "a bed")], "entry 1 holds .* are texts"),
        ([entry("RGB/0000.jpg", "a bed"), entry("RGB/0000.jpg", "a sofa")], r"describes RGB/0000.jpg twice \(again in entry 2\)"),
        ([entry("RGB/zz.jpg", "a bed")], "describes none of the 13 images"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Captions(write(tmp_path / "c.json", content), encoder=ENCODER).open(scenes)
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="is not UTF-8"):
        Captions(str(tmp_path / "c.json"), encoder=ENCODER).open(scenes)
    with pytest.raises(ValueError, match="max_tags must be at least 1, got 0"):
        GroundTruthTags(max_tags=0, encoder=ENCODER)
    assert BothTexts(functools.partial(ClassNames, encoder=ENCODER), functools.partial(Captions, encoder=ENCODER)).dim == 16


def test_a_name_that_several_entries_have_is_an_error_and_a_whole_path_is_not(scenes, tmp_path):
    double = {"train/0000.jpg": ["bed"], "test/0000.jpg": ["sofa"]}
    with pytest.raises(ValueError, match=r"train/0000\.jpg, test/0000\.jpg all fit the image RGB/0000\.jpg"):
        Tags(write(tmp_path / "t.json", double)).open(scenes)
    exact = Tags(write(tmp_path / "t.json", {**double, "RGB/0000.jpg": ["lamp"]}))
    exact.open(scenes)
    assert exact.words(scenes.train[0]) == ["lamp"]
    upstream = Tags(write(tmp_path / "t.json", double), match="upstream")
    upstream.open(scenes)
    assert upstream.words(scenes.train[0]) == ["bed"]
