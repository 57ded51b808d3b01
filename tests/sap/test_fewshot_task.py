"""The task under the project's own trainer: finding 1 to the bit, resume, evaluation that changes nothing, metrics, tables."""

import math
from functools import partial

import pytest
import torch
from tiny import images, intrinsic_weights, task, train

from core import optim, schedules, trainer
from core.data import generator
from core.metrics import few_shot
from plugins.sap.datasets import PACS
from plugins.sap.dual_stream import DualStreamModel
from plugins.sap.episodes import EpisodePlan
from plugins.sap.pacs_sample import pacs_sample
from plugins.sap.purification import SemanticAnchorPurification
from plugins.sap.task import TARGET, FewShot

DETACHED = partial(SemanticAnchorPurification, detach_anchors=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return images(tmp_path_factory.mktemp("tiny") / "pacs")


def same(a, b):
    return all((a[k] == b[k]).all() for k in a)


def test_detached_apart_and_with_own_noise_purification_changes_no_bit_of_the_intrinsic_branch(root, tmp_path):  # finding 1
    _, on, _ = train(tmp_path / "on", task(root, DETACHED))
    _, off, _ = train(tmp_path / "off", task(root, None))
    assert same(intrinsic_weights(on), intrinsic_weights(off))
    start = task(root, None)()
    start.prepare(tmp_path)
    torch.manual_seed(0)
    assert not same(intrinsic_weights(off), intrinsic_weights(start.model()))  # it did train


@pytest.mark.parametrize(
    ("name", "purification", "options"),
    [
        ("attached", SemanticAnchorPurification, {}),
        ("one clip", DETACHED, {"clip_scope": "global"}),
        ("one stream", DETACHED, {"own_streams": False}),
    ],
)
def test_each_of_the_three_couples_the_branches(root, tmp_path, name, purification, options):
    _, on, _ = train(tmp_path / "on", task(root, purification, **options), clip_norm=0.05)
    _, off, _ = train(tmp_path / "off", task(root, None, **options), clip_norm=0.05)
    assert not same(intrinsic_weights(on), intrinsic_weights(off)), name


def test_how_often_is_evaluated_changes_nothing(root, tmp_path):
    _, rare, _ = train(tmp_path / "rare", task(root))
    _, often, _ = train(tmp_path / "often", task(root), eval_every=1)
    assert same(rare.state_dict(), often.state_dict())
    for one, two in zip(_losses(tmp_path / "rare"), _losses(tmp_path / "often")):
        assert one == two


def _losses(folder):
    import json

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval" not in row]


def test_a_run_in_two_halves_ends_with_the_same_bits(root, tmp_path):
    _, whole, _ = train(tmp_path / "whole", task(root), save_every=2)

    class Interrupted(Exception):
        pass

    constructor = task(root)

    def broken():
        work = constructor()
        losses = work.losses

        def failing(model, batch, step):
            if step == 4:
                raise Interrupted
            return losses(model, batch, step)

        work.losses = failing
        return work

    with pytest.raises(Interrupted):
        train(tmp_path / "halves", broken, save_every=2)
    _, resumed, _ = train(tmp_path / "halves", constructor, save_every=2)
    assert same(whole.state_dict(), resumed.state_dict())


def test_training_learns_and_every_metric_is_there(root, tmp_path):
    outcome, model, work = train(tmp_path / "run", task(root), steps=30, eval_first=True, select="accuracy[source]")
    assert outcome.last["accuracy[source]"] > outcome.first["accuracy[source]"] + 0.1
    expected = {
        "accuracy[sketch]", "accuracy[sketch] ±", "accuracy[source]", "accuracy[source] ±", "leak[raw]", "leak[purified]", "leak[head]",
        "separation", "attn_entropy[sketch]", "attn_max[sketch]", "logit_scale[sketch]", "gate[sketch]", "pixels[sketch]", "pixels[sketch] ±",
    } | {f"probe/{what}[{space}]" for what in ("class", "domain") for space in ("raw", "purified", "intrinsic", "majority")}  # fmt: skip
    assert expected == outcome.last.keys()
    assert all(math.isfinite(v) for v in outcome.last.values())
    assert outcome.last["attn_entropy[sketch]"] < math.log(3)
    tables = work.tables(outcome.last)
    assert [t.title for t in tables] == ["accuracy", "what the domain features hold", "purification in test episodes"]
    assert tables[0].rows[0][1] == outcome.last["accuracy[sketch]"]
    work.pictures(model, tmp_path)
    from PIL import Image

    assert Image.open(tmp_path / "episode.png").size[0] > 400


def test_accuracy_by_hand_from_the_images(root, tmp_path):
    work = task(root)()
    work.prepare(tmp_path)
    torch.manual_seed(1)
    model = work.model().eval()
    with torch.inference_mode():
        found = work.evaluate(model)
        values = []
        for episode in work.test.fixed(10, 0, TARGET):
            x = torch.stack([work.images.sample(i, generator(0))["image"] for i in episode])
            f = model.intrinsic_features(x)
            f = f / f.norm(dim=1, keepdim=True)
            prototypes = f[:6].reshape(3, 2, -1).mean(1)
            guess = torch.cdist(f[6:], prototypes).argmin(1)
            values.append(float((guess == torch.arange(3).repeat_interleave(3)).float().mean()))
    assert found["accuracy[sketch]"] == pytest.approx(few_shot.interval(values).mean, abs=1e-6)


def test_real_inputs_are_images_of_the_target(root, tmp_path):
    work = task(root, target="photo")()
    work.prepare(tmp_path)
    target = [i for i, r in enumerate(work.data.records) if r.domain == work.data.domains.index("photo")]
    seen = [one for (one,) in work.real_inputs(10_000)]
    assert len(seen) == len(target)
    assert torch.equal(seen[-1][0], work.images.sample(target[-1], generator(0))["image"])
    assert work.model().eval()(seen[0]).intrinsic.shape[0] == 1


def test_no_held_out_image_and_no_target_image_is_trained_on(root, tmp_path):
    work = task(root, target="photo")()
    work.prepare(tmp_path)
    trained = {i for e in range(30) for i in work.episodes.fixed(4, e, 0)[0]}
    records = work.data.records
    assert not any(records[i].held_out or records[i].domain == 0 for i in trained)
    tested = {i for episode in work.test.fixed(50, 0, TARGET) for i in episode}
    assert not trained & tested
    assert {records[i].domain for i in tested} == {0, 1, 2, 3}
    release = task(root, split="none")()
    release.prepare(tmp_path)
    assert {records[i].held_out for e in range(30) for i in release.episodes.fixed(1, e, 0)[0]} == {True, False}


@pytest.mark.parametrize(("purification", "tensors"), [(SemanticAnchorPurification, [1, 82]), (None, [74])])
def test_parameter_groups_of_the_release(root, tmp_path, purification, tensors):  # S6
    work = partial(task(root), network=partial(DualStreamModel, purification=purification))()
    work.prepare(tmp_path)
    groups = optim.parameter_groups(work.model(), work.parameter_rules())
    assert [len(g["params"]) for g in groups] == tensors
    if purification:
        assert groups[0]["names"] == ["sap_module.logit_scale_log"]
        assert groups[0]["weight_decay"] == 0.0
        assert sum(p.numel() for p in groups[1]["params"]) == 12_849_000


def test_clip_groups_cover_every_parameter_once(root, tmp_path):  # S7
    for scope, names in (("per_branch", {"intrinsic", "domain"}), ("global", {"all"})):
        work = task(root, clip_scope=scope)()
        work.prepare(tmp_path)
        model = work.model()
        groups = {k: list(v) for k, v in work.clip_groups(model).items()}
        assert groups.keys() == names
        assert sorted(id(p) for g in groups.values() for p in g) == sorted(id(p) for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        trainer._clip(groups, 1.0)
        for members in groups.values():
            assert float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in members]))) == pytest.approx(1.0, rel=1e-4)


def test_the_release_s_learning_rates():
    plan = schedules.MultiStep(
        (0.66666667, 0.83333333), 0.5, warmup=0.16666667, warmup_mode="absolute", warmup_start=1e-3, per="epoch"
    )
    rate = [plan(epoch * 150, 9000, 0.05, 150) for epoch in range(60)]
    assert rate[:10] == pytest.approx([0.001 + 0.049 * (e + 1) / 10 for e in range(10)])
    assert rate[9:39] == pytest.approx([0.05] * 30)
    assert rate[39:49] == pytest.approx([0.025] * 10)
    assert rate[49:] == pytest.approx([0.0125] * 11)
    assert plan(39 * 150 - 1, 9000, 0.05, 150) == 0.05


def test_emoji7_keeps_test_emoji_out_of_every_vendor_s_training(tmp_path):
    from test_sap_datasets import emoji_folder

    from plugins.sap.datasets import Emoji7

    base = task(emoji_folder(tmp_path / "emoji", per_class=12))
    work = partial(base, layout=Emoji7, target="twitter")()
    card = work.prepare(tmp_path)
    assert (card.name, card.sample) == ("emoji7", False)
    trained = {work.data.records[i].identity for e in range(30) for i in work.episodes.fixed(1, e, 0)[0]}
    tested = {work.data.records[i].identity for episode in work.test.fixed(50, 0, TARGET) for i in episode}
    assert not trained & tested


def test_without_a_root_a_sample_is_made_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("plugins.sap.task.pacs_sample", partial(pacs_sample, per_cell=4, size=16))
    work = FewShot(None, plan=partial(EpisodePlan, n_way=3, k_shot=1, n_query=1), layout=partial(PACS, holdout=0.5))
    card = work.prepare(tmp_path)
    assert card.sample
    assert card.root == str(tmp_path / "samples" / "pacs-0")
    with pytest.raises(ValueError, match="target must be a domain of PACS"):
        task(tmp_path / "samples" / "pacs-0", target="oil")().prepare(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classification_weight": 0.0}, "classification_weight"),
        ({"domain_weight": -1.0}, "0 or more"),
        ({"eval_episodes": 0}, "eval_episodes"),
    ],
)
def test_bad_values_are_errors(options, said):
    with pytest.raises(ValueError, match=said):
        task("unused", **options)()


def test_the_target_may_have_a_name_that_is_always_the_same(root, tmp_path):
    work = task(root, target="photo", name_target=True)()
    work.prepare(tmp_path)
    model = work.model().eval()
    with torch.inference_mode():
        metrics = work.evaluate(model)
    assert metrics["accuracy[target]"] == metrics["accuracy[photo]"]
