import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from core import data
from core.text import HashedText
from plugins.sam3_fusion import emoji_scenes, scenes, shapes_sample
from plugins.sam3_fusion.emoji_scenes import Sprite
from plugins.sam3_fusion.scenes import PromptedScenes, SceneError
from plugins.sam3_fusion.task import TextTable


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "sample"
    shapes_sample.shapes_sample(str(root), train=12, test=6, side=40)
    return root


def test_half_of_the_prompts_are_absent_and_many_of_them_hard(made):
    counts = PromptedScenes(made, "train", 40).counts()
    assert counts["train images"] == 12
    absent = counts["train absent prompts"] + counts["train hard prompts"]
    assert abs(counts["train present prompts"] - absent) <= 12
    assert counts["train hard prompts"] >= counts["train absent prompts"] > 0


def test_boxes_hold_what_the_prompt_says(made):
    for scene in scenes.read(made, "test"):
        pixels = np.asarray(Image.open(made / scene.file)).astype(float)
        for prompt in scene.prompts:
            assert (len(prompt.boxes) > 0) == (prompt.kind == "present")
            colour = prompt.text.split()[0]
            if colour not in shapes_sample.COLOURS:
                continue
            for x0, y0, x1, y1 in prompt.boxes.astype(int):
                centre = np.median(
                    pixels[(y0 + y1) // 2 - 1 : (y0 + y1) // 2 + 2, (x0 + x1) // 2 - 1 : (x0 + x1) // 2 + 2], axis=(0, 1)
                )
                near = min(shapes_sample.COLOURS, key=lambda c: np.abs(centre / centre.max() - np.array(shapes_sample.COLOURS[c]) / max(shapes_sample.COLOURS[c])).sum())  # fmt: skip
                assert near == colour


def test_a_scene_does_not_depend_on_how_many_are_asked_for(made, tmp_path):
    shapes_sample.shapes_sample(str(tmp_path / "more"), train=13, test=2, side=40)
    for n in range(12):
        name = f"images/train/{n:06d}.png"
        assert (made / name).read_bytes() == (tmp_path / "more" / name).read_bytes()
    assert scenes.read(tmp_path / "more", "train")[5].prompts[0].text == scenes.read(made, "train")[5].prompts[0].text


def test_a_sample_is_half_present_and_mirrors_boxes_with_pixels(made):
    plain, mirrored = PromptedScenes(made, "train", 32, 4), PromptedScenes(made, "train", 32, 4, flip=True)
    seen = set()
    for index in range(6):
        for draw in range(4):
            a, b = (s.sample(index, data.generator(draw)) for s in (plain, mirrored))
            assert a["texts"] == b["texts"]
            assert sum(len(x) > 0 for x in a["boxes"]) == 2
            turned = not torch.equal(a["image"], b["image"])
            seen.add(turned)
            torch.testing.assert_close(b["image"], a["image"].flip(2) if turned else a["image"])
            for x, y in zip(a["boxes"], b["boxes"]):
                torch.testing.assert_close(y[:, 0], 1 - x[:, 0] if turned else x[:, 0])
                torch.testing.assert_close(y[:, 1:], x[:, 1:])
    assert seen == {True, False}


def test_a_part_is_those_images_alone(made):
    whole = PromptedScenes(made, "test", 32)
    part = whole.part(2, 5)
    never = np.random.default_rng(0)
    whole.sample(0, never)  # fills the cache of the whole
    assert len(part) == 3
    assert torch.equal(part.sample(0, never)["image"], whole.sample(2, never)["image"])
    assert len(whole) == 6


def test_collate_pads_and_says_so(made):
    split = PromptedScenes(made, "test", 32)
    samples = [split.sample(i, np.random.default_rng(0)) for i in range(3)]
    batch = scenes.collate(samples, TextTable(HashedText(3)))
    assert batch["image_of"].tolist() == [i for i, s in enumerate(samples) for _ in s["texts"]]
    for text, pad, boxes, valid in zip(batch["texts"], batch["pad"], batch["boxes"], batch["valid"]):
        assert int((~pad).sum()) == len(text.split())
        assert (boxes[valid] > 0).all()
        assert (boxes[~valid] == 0).all()


def broken(made, tmp_path, change):
    root = tmp_path / "broken"
    shutil.copytree(made, root)
    path = root / "test.json"
    listed = json.loads(path.read_text())
    change(listed)
    path.write_text(json.dumps(listed))
    return root


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["annotations"][0].update(bbox=[30, 0, 30, 5]), r"annotation 0: bbox .* leaves its image of 40×40"),
        (lambda d: d["annotations"][0].update(bbox=[3, 3, 0, 5]), "is empty"),
        (lambda d: d["annotations"][0].update(bbox=[float("nan"), 3, 4, 5]), "is empty or leaves"),
        (lambda d: d["annotations"][0].update(bbox="wide"), "must be"),
        (lambda d: d["annotations"][0].update(prompt_id=999), "names prompt 999"),
        (lambda d: d["prompts"][0].update(text="  "), "has no text"),
        (lambda d: d["prompts"][0].update(kind="perhaps"), "'perhaps'"),
        (lambda d: d["prompts"][0].update(image_id=77), "not listed|do not belong"),
        (lambda d: d["images"][1].update(id=0), "one id each"),
        (lambda d: d.pop("annotations"), "is not a split"),
        (lambda d: d.update(annotations=[]), "'present' and has 0 boxes"),
    ],
)
def test_a_damaged_split_is_one_clear_error(made, tmp_path, change, said):
    with pytest.raises(SceneError, match=said):
        scenes.read(broken(made, tmp_path, change), "test")


def test_the_checker_lists_what_is_wrong(made, tmp_path):
    assert [f.level for f in scenes.prompted_scenes(str(made))] == ["ok", "ok"]
    root = broken(made, tmp_path, lambda d: d["prompts"][0].update(text=""))
    (root / "images/train/000003.png").unlink()
    found = scenes.prompted_scenes(str(root))
    assert sorted(f.what for f in found if f.level == "error") == ["images/train/000003.png", "test"]
    assert scenes.prompted_scenes(str(tmp_path / "nothing"))[0].level == "error"


def sprites():
    pictures = []
    for colour in ((255, 0, 0), (0, 0, 255), (0, 200, 0), (250, 250, 0)):
        disc = np.zeros((64, 64, 4), np.uint8)
        y, x = np.mgrid[0:64, 0:64]
        disc[(y - 32) ** 2 + (x - 32) ** 2 < 28**2] = (*colour, 255)
        pictures.append(Image.fromarray(disc))
    names = (("red apple", "fruit"), ("blue plum", "fruit"), ("green car", "ground"), ("yellow bus", "ground"))
    return [Sprite(name, group, (picture,)) for (name, group), picture in zip(names, pictures)]


def test_emoji_scenes_ask_for_what_is_there_and_for_its_relatives():
    kinds = set()
    for n in range(12):
        rng = data.generator(n)
        picture, things = emoji_scenes.draw_scene(rng, 96, sprites())
        pixels = np.asarray(picture).astype(int)
        there = {s.name for s, _ in things}
        groups = {s.group for s, _ in things}
        for sprite, (x0, y0, x1, y1) in things:
            ours = np.array(sprite.pictures[0])[32, 32, :3]
            assert np.abs(pixels[int(y0 + y1) // 2, int(x0 + x1) // 2] - ours).max() < 30
        for prompt in emoji_scenes.ask(rng, things, sprites(), 8):
            group = next(s.group for s in sprites() if s.name == prompt.text)
            kinds.add(prompt.kind)
            assert (prompt.text in there) == (prompt.kind == "present") == (len(prompt.boxes) > 0)
            assert prompt.kind != "hard" or group in groups
            assert prompt.kind != "absent" or group not in groups
    assert kinds == {"present", "hard", "absent"}


def test_emoji_are_chosen_by_a_fixed_order_from_what_both_vendors_draw():
    def row(name, **other):
        return {"name": name, "subcategory": "food-fruit", "has_img_google": True, "has_img_twitter": True, **other}

    table = [
        *(row(f"FRUIT {i}") for i in range(9)),
        row("OLD", obsoleted_by="x"),
        row("ONE", has_img_twitter=False),
        row("FLAG", subcategory="flags"),
    ]
    chosen = emoji_scenes.choose(table, 9)
    assert {r["name"] for r in chosen} == {f"FRUIT {i}" for i in range(9)}
    assert emoji_scenes.choose(table[::-1], 5) == chosen[:5]
    with pytest.raises(ValueError, match="at most 9, got 10"):
        emoji_scenes.choose(table, 10)
