"""Augmentation, inference, schedule, parameter groups, loss, and the task as a whole with a hand loop."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from core.optim import AdamW, parameter_groups
from core.schedules import Poly
from core.text import HashedText
from plugins.sam.augmentation import EvalTransform, TrainTransform
from plugins.sam.datasets import View
from plugins.sam.dformer import DFormer
from plugins.sam.guidance import ConstantTokens, ImageTags
from plugins.sam.hamburger import HamburgerHead
from plugins.sam.inference import Predictor
from plugins.sam.schedule import Lagged
from plugins.sam.segmentor import Segmentor
from plugins.sam.task import Segmentation, pixel_loss

NETWORK = functools.partial(
    Segmentor,
    backbone=functools.partial(DFormer, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), heads=(2, 2, 2, 4)),
    head=functools.partial(HamburgerHead, dim=16, ham_dim=16, rank=4),
)
TEXT = functools.partial(ImageTags, encoder=functools.partial(HashedText, dim=12), cache=False)
CROP = functools.partial(TrainTransform, crop=(32, 48))


def view(h=6, w=8):
    """A picture whose pixels say where they are: red the row, green the column, depth and label the same number."""
    rows, columns = np.mgrid[:h, :w]
    image = np.stack([rows * 10, columns * 10, rows * 0 + 7], -1).astype(np.uint8)
    return View(image, ((rows * w + columns) / 255).astype(np.float32), (rows * w + columns).astype(np.uint8))


def places(sample):
    """Row and column that each pixel came from, and where it is margin."""
    image = (
        sample["image"].numpy() * np.array([0.229, 0.224, 0.225])[:, None, None] + np.array([0.485, 0.456, 0.406])[:, None, None]
    )
    return np.round(image[:2] * 25.5).astype(int), sample["label"].numpy() == 255


# --- augmentation -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 200), height=st.integers(2, 9), width=st.integers(2, 11))
def test_image_depth_and_label_stay_aligned(seed, height, width):
    sample = TrainTransform(crop=(height, width), scales=(1.0,))(view(), np.random.default_rng(seed))
    assert sample["image"].shape == (3, height, width)
    assert sample["depth"].shape == (1, height, width)
    (rows, columns), margin = places(sample)
    label = sample["label"].numpy()
    assert np.array_equal((rows * 8 + columns)[~margin], label[~margin])
    assert_close(sample["depth"][0].numpy()[~margin], ((label / 255 - 0.48) / 0.28).astype(np.float32)[~margin], atol=1e-5, rtol=0)
    assert float(sample["image"][:, torch.from_numpy(margin)].abs().sum()) == 0
    assert (~margin).sum() == min(height, 6) * min(width, 8)  # all of the picture that fits, and the margin around it is even
    top = np.flatnonzero(~margin.all(axis=1))
    assert abs(top[0] - (height - 1 - top[-1])) <= 1


def test_scale_is_drawn_from_the_list_and_labels_are_never_mixed():
    seen = set()
    picture = view(16, 16)
    columns = np.broadcast_to(np.arange(16) % 2 * 200, (16, 16)).astype(np.uint8)  # any mixture of neighbours is neither
    picture = View(picture.image, picture.depth, columns)
    for seed in range(60):
        sample = TrainTransform(crop=(40, 40), flip=0.0)(picture, np.random.default_rng(seed))
        kept = (sample["label"] != 255).sum(dim=1)
        seen.add(int(kept.max()))
        assert set(sample["label"].unique().tolist()) <= {0, 200, 255}
    assert seen == {8, 12, 16, 20, 24, 28}


def test_flip_mirrors_all_three():
    plain = TrainTransform(crop=(6, 8), scales=(1.0,), flip=0.0)(view(), np.random.default_rng(0))
    mirrored = TrainTransform(crop=(6, 8), scales=(1.0,), flip=1.0)(view(), np.random.default_rng(0))
    for key in ("image", "depth", "label"):
        assert torch.equal(mirrored[key], plain[key].flip(-1))


def test_the_release_s_crop_can_overrun_by_one_pixel():
    def margins(offset):
        transform = TrainTransform(crop=(4, 8), scales=(1.0,), flip=0.0, crop_offset=offset)
        return {int((transform(view(), np.random.default_rng(s))["label"] == 255).sum()) for s in range(40)}

    assert margins("fixed") == {0}
    assert margins("upstream") == {0, 8}  # one row of 8 void pixels


def test_channel_order_and_evaluation_padding():
    rgb, bgr = EvalTransform()(view()), EvalTransform(channel_order="bgr")(view())
    pixel = np.array([0.0, 10.0, 7.0]) / 255
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert rgb["image"][:, 0, 1].tolist() == pytest.approx(((pixel - mean) / deviation).tolist(), abs=1e-5)
    assert bgr["image"][:, 0, 1].tolist() == pytest.approx(((pixel[::-1] - mean) / deviation).tolist(), abs=1e-5)
    padded = EvalTransform(pad_to=(7, 10))(view())
    assert padded["label"].shape == (7, 10)
    assert (padded["label"][6] == 255).all()
    assert padded["image"][0, 6, 0].item() == pytest.approx((0 - 0.485) / 0.229)  # black before normalisation
    with pytest.raises(ValueError, match=r"pad_to is \(5, 8\), but an image is \(6, 8\)"):
        EvalTransform(pad_to=(5, 8))(view())


# --- inference ----------------------------------------------------------------------------------------------------------


class Blur(nn.Module):
    """A model whose logits at a pixel depend on its surroundings and its size, as a network's do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.sizes = []

    def forward(self, image, depth, text=None):
        self.sizes.append(tuple(image.shape[-2:]))
        return self.conv(torch.cat([image, depth], dim=1)) + (0 if text is None else text.sum())


def pictures(h=64, w=96):
    torch.manual_seed(3)
    return torch.randn(2, 3, h, w), torch.rand(2, 1, h, w)


@torch.no_grad()
def test_one_pass_is_the_model_itself():
    model, (image, depth) = Blur(), pictures()
    assert_close(Predictor()(model, image, depth, None), model(image, depth).softmax(dim=1))


@torch.no_grad()
def test_scales_and_mirrors_by_hand():
    model, (image, depth) = Blur(), pictures(60, 90)
    ours = Predictor(scales=(0.5, 1.0), flip=True)(model, image, depth, None)
    assert set(model.sizes) == {(32, 64), (64, 96)}  # rounded up to 32
    total = 0
    for size in ((32, 64), (64, 96)):
        a, b = (F.interpolate(x, size=size, mode="bilinear", align_corners=True) for x in (image, depth))
        for mirrored in (False, True):
            logits = model(a.flip(-1), b.flip(-1)).flip(-1) if mirrored else model(a, b)
            total = total + F.interpolate(logits, size=(60, 90), mode="bilinear", align_corners=True).softmax(dim=1)
    assert_close(ours, total / 4)
    mirrored = Predictor(scales=(1.0,), flip=True)
    assert_close(
        mirrored(model, image.flip(-1), depth.flip(-1), None), mirrored(model, image, depth, None).flip(-1), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_windows_cover_every_pixel_and_average_their_logits():
    model, (image, depth) = Blur(), pictures(50, 70)
    predictor = Predictor(window=(32, 32), stride=2 / 3)
    ours = predictor(model, image, depth, None)
    assert predictor._starts(50, 32) == [0, 18]
    assert predictor._starts(70, 32) == [0, 22, 38]
    total, hits = torch.zeros(2, 3, 50, 70), torch.zeros(50, 70)
    for top in (0, 18):
        for left in (0, 22, 38):
            total[..., top : top + 32, left : left + 32] += model(
                image[..., top : top + 32, left : left + 32], depth[..., top : top + 32, left : left + 32]
            )
            hits[top : top + 32, left : left + 32] += 1
    assert float(hits.min()) == 1
    assert_close(ours, (total / hits).softmax(dim=1))


@torch.no_grad()
def test_a_picture_smaller_than_the_window():
    model, (image, depth) = Blur(), pictures(20, 70)
    padded = Predictor(window=(32, 32))(model, image, depth, None)
    assert set(model.sizes) == {(32, 32)}
    inner = model(F.pad(image, (0, 0, 0, 12)), F.pad(depth, (0, 0, 0, 12))).softmax(dim=1)
    assert_close(padded[..., 2:18, 2:18], inner[..., 2:18, 2:18], atol=1e-5, rtol=1e-4)
    stretched = Predictor(window=(32, 32), small="resize")(model, image, depth, None)
    squeezed = [F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=True) for x in (image, depth)]
    logits = F.interpolate(model(*squeezed), size=(20, 70), mode="bilinear", align_corners=True)
    assert_close(stretched, logits.softmax(dim=1))


# --- recipe -------------------------------------------------------------------------------------------------------------


def test_the_release_s_lag_starts_at_the_full_rate_then_zero():
    """10 epochs of warm-up out of 500, 50 steps each, at 6e-5: the release's own sequence."""
    lagged = Lagged(functools.partial(Poly, power=0.9, warmup=0.02))
    rates = [lagged(done, 25_000, 6e-5, 50) for done in (0, 1, 2, 500, 501)]
    assert rates[:3] == pytest.approx([6e-5, 0.0, 6e-5 / 500])
    assert rates[3] == pytest.approx(6e-5 * 499 / 500)
    assert rates[4] / 6e-5 == pytest.approx(0.982, abs=5e-4)  # decay counts the warm-up: the jump


def names(groups):
    return {g["name"]: (set(g["names"]), g.get("weight_decay", "default")) for g in groups}


@pytest.mark.parametrize("policy", ["matrices", "release"])
def test_weight_decay_spares_what_it_should(policy):
    model = NETWORK(classes=5, text_dim=6)
    task = Segmentation("unused", text=TEXT, weight_decay_of=policy)
    groups = parameter_groups(model, task.parameter_rules())
    by_decay = {}
    for group in groups:
        by_decay.setdefault(group.get("weight_decay", "default"), set()).update(group["names"])
    spared, decayed = by_decay[0.0], by_decay["default"]
    vectors = {n for n, p in model.named_parameters() if p.requires_grad and p.ndim < 2}
    if policy == "matrices":
        assert spared == vectors
    else:
        raw = {
            n for n in vectors if n.rsplit(".", 1)[-1] in ("alpha", "gamma", "decoder_logit_scale") or n.endswith("prior.weight")
        }
        assert spared == vectors - raw
        assert raw <= decayed
    assert AdamW(groups, lr=1e-3)  # the optimiser takes them


def test_dformer_s_release_forgets_its_raw_parameters():
    model = NETWORK(classes=5, text_dim=6)
    groups = parameter_groups(model, Segmentation("unused", text=TEXT, optimise_raw_params=False).parameter_rules())
    optimizer = AdamW(groups, lr=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = {n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])}
    assert len([n for n in held if n.endswith("prior.weight")]) == 4
    assert all(p.ndim < 2 for n, p in model.named_parameters() if n in held)


def test_loss_is_the_mean_over_valid_pixels():
    logits, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    labels[0, 0] = 255
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    assert_close(pixel_loss(logits, labels), expected)
    assert float(pixel_loss(logits, torch.full_like(labels, 255))) == 0.0  # torch's own mean is NaN here


# --- the task -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(sample, tmp_path):
    work = Segmentation(str(sample), network=NETWORK, text=TEXT, train_transform=CROP, batch_size=4, eval_batch=2, cache=True)
    work.card = work.prepare(tmp_path)
    return work


def test_a_hand_loop_learns(task):
    assert task.card.sample
    assert task.card.counts["train_images"] == 10
    assert task.steps_per_epoch() == 2
    torch.manual_seed(0)
    model = task.model().train()
    optimizer = AdamW(parameter_groups(model, task.parameter_rules()), lr=5e-3)
    batches, losses = task.batches(0, 0), []
    for step in range(1, 31):
        result = task.losses(model, next(batches), step)
        optimizer.zero_grad()
        result.losses["pixels"].backward()
        optimizer.step()
        losses.append(float(result.losses["pixels"].detach()))
    assert losses[0] > 3.0
    assert np.mean(losses[-5:]) < 0.65 * losses[0]
    with torch.no_grad():
        metrics = task.evaluate(model.eval())
    assert {"mIoU[ignore]", "mAcc[ignore]", "mF1[ignore]", "pixel accuracy", "IoU/wall"} <= set(metrics)
    assert all(0 <= v <= 1 for v in metrics.values())
    assert metrics["pixel accuracy"] > 0.25
    again = task.evaluate(model)
    assert again == metrics


def test_batches_are_a_function_of_seed_and_step(task):
    first, later = task.batches(0, 7), task.batches(3, 7)
    for _ in range(3):
        next(first)
    for a, b in zip(range(2), range(2)):
        x, y = next(first), next(later)
        assert a == b
        assert all(torch.equal(x[k], y[k]) for k in ("image", "depth", "label", "text"))


def test_evaluation_does_not_depend_on_its_batches_nor_touch_random_state(task):
    model = task.model().eval()
    with torch.no_grad():
        state = torch.get_rng_state()
        by_two = task.evaluate(model)
        task.eval_batch = 3
        by_three = task.evaluate(model)
        assert torch.equal(torch.get_rng_state(), state)
    assert by_two == pytest.approx(by_three, abs=2e-3)


def test_an_evaluation_that_is_not_finite_names_the_image(task):
    model = task.model().eval()
    spoilt = task.test.records[1].image
    task.guidance.feats = {**task.guidance.feats, spoilt: torch.full_like(task.guidance.feats[spoilt], math.nan)}
    with torch.no_grad(), pytest.raises(FloatingPointError, match=f"probabilities of {spoilt} are not finite"):
        task.evaluate(model)


def test_pictures_tables_and_profile_inputs(task, tmp_path):
    model = task.model()
    task.pictures(model, tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {"predictions.png", "attention.png"}
    with torch.no_grad():
        tables = task.tables(task.evaluate(model.eval()))
    assert tables[0].columns[1] == "mIoU[ignore]"
    assert any("by class" in t.title for t in tables)
    image, _, text = task.profile_inputs()
    assert image.shape == (1, 3, 480, 640)
    assert text.shape == (1, 6, 12)
    seen = list(task.real_inputs(100))
    assert len(seen) == len(task.test)
    with torch.no_grad():
        assert model(*seen[0]).shape[-2:] == seen[0][0].shape[-2:]
    undressed = Segmentation("unused", network=NETWORK, text=TEXT, profile_text=(5, 12))  # nothing is opened for a profile
    assert undressed.profile_inputs()[2].shape == (1, 5, 12)
    assert sum(p.numel() for p in undressed.blueprint().parameters()) == sum(p.numel() for p in task.blueprint().parameters())


def test_without_text_and_the_control(sample, tmp_path):
    plain = functools.partial(NETWORK, encoder_stages=(), decoder_stages=())
    work = Segmentation(str(sample), network=plain, text=None, train_transform=CROP, batch_size=2)
    work.prepare(tmp_path)
    batch = next(work.batches(0, 0))
    assert "text" not in batch
    assert math.isfinite(work.losses(work.model(), batch, 1).losses["pixels"].item())
    with pytest.raises(ValueError, match="text is None, but the network has SAM modules"):
        Segmentation(str(sample), network=NETWORK, text=None).blueprint()
    with pytest.raises(ValueError, match="a text is given, but the network has no SAM module that would read it"):
        Segmentation("unused", network=plain, text=TEXT, profile_text=(5, 12)).blueprint()

    counts = []
    for text in (TEXT, functools.partial(ConstantTokens, dim=12)):
        work = Segmentation(str(sample), network=NETWORK, text=text)
        work.prepare(tmp_path)
        counts.append(sum(p.numel() for p in work.model().parameters()))
    assert counts[0] == counts[1]


def test_final_evaluation_and_bad_options(sample, tmp_path):
    final = functools.partial(Predictor, scales=(0.5, 1.0), flip=True)
    work = Segmentation(str(sample), network=NETWORK, text=TEXT, final_predictor=final, absent="zero")
    work.prepare(tmp_path)
    model = work.model().eval()
    with torch.no_grad():
        concluded = work.conclude(model)
    assert "final/mIoU[zero]" in concluded
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Segmentation(str(sample), batch_size=0)
    with pytest.raises(ValueError, match=r"window must be at least \(1, 1\), got \(0, 0\)"):
        Predictor(window=(0, 0))
    with pytest.raises(ValueError, match="not both"):
        Segmentation(str(sample), pretrained="a", weights="b")
