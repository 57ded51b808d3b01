import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch

from core import checkpoint, trainer
from core import config as configs
from core.checkpoint import read_weights
from core.text import HashedText
from plugins.sam3_fusion import calibration, keys, shapes_sample
from plugins.sam3_fusion.decoder import QueryDecoder
from plugins.sam3_fusion.detector import ConvTrunk, PromptedDetector
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.reading import Reading
from plugins.sam3_fusion.schedule import TwoPhases
from plugins.sam3_fusion.scoring import PromptScorer
from plugins.sam3_fusion.student import IMAGENET_MEAN, IMAGENET_STD, StudentTrunk, explained, feature_loss, imagenet_of_half
from plugins.sam3_fusion.study import (
    CONDITIONS,
    FIXES,
    PresenceStudy,
    answer,
    balanced,
    distillation_loss,
    fix_rows,
    recommendation,
    recommended,
    scatter,
)
from plugins.sam3_fusion.task import PromptedDetection


def detection():
    return PromptedDetection(
        sample=lambda root: shapes_sample.shapes_sample(root, train=8, test=6, side=32),
        detector=lambda text_dim, side: PromptedDetector(
            text_dim, side, functools.partial(ConvTrunk, 4, 8, 1), functools.partial(FusionEncoder, 16, 2, 1, 24, 0.0),
            functools.partial(QueryDecoder, 16, 2, 2, 24, 5, 0.0), functools.partial(PromptScorer, 16, 24, 0.0),
        ),
        text=functools.partial(HashedText, 8), side=32, batch=4, eval_batch=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny study: two steps of each phase, then everything measured."""
    torch.manual_seed(0)
    task = PresenceStudy(
        detection,
        teacher_steps=2,
        student=functools.partial(StudentTrunk, width=2),
        calibration=3,
        labels=6,
        presence_steps=2,
        distil_steps=2,
    )
    task.workspace = tmp_path_factory.mktemp("study")
    task.prepare(task.workspace)
    net = task.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    batches, seen = task.batches(0, 0), []
    for step in range(1, 5):
        optimizer.zero_grad(set_to_none=True)
        result = task.losses(net, next(batches), step)
        sum(result.losses.values()).backward()
        seen.append({n.split(".")[0] for n, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.inference_mode():
        net.eval()
        metrics = task.evaluate(net) | task.conclude(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # fixes work on copies
    return task, net, metrics, seen


def test_the_teacher_learns_first_and_the_students_after_it(finished):
    _, _, _, seen = finished
    assert seen == [{"teacher"}, {"teacher"}, {"students"}, {"students"}]


def test_every_fix_is_measured_in_every_condition(finished):
    task, net, metrics, _ = finished
    assert all(math.isfinite(v) for v in metrics.values())
    for condition in CONDITIONS:
        fixes = set(FIXES) - (set() if condition == "mismatched" else {"input"})
        assert {k.split("/")[2] for k in metrics if k.startswith(f"{condition}/fix/")} == fixes
        for fix in ("offset", "offset_fitted", "mean", "moment", "regression", "platt", "lda"):
            assert metrics[f"{condition}/fix/{fix}/AUROC"] == pytest.approx(metrics[f"{condition}/fix/none/AUROC"])
    presence = sum(p.numel() for n, p in net.teacher.named_parameters() if "presence" in n)
    assert metrics["matched/fix/presence/trained"] == presence
    assert metrics["matched/fix/presence_few/trained"] == presence
    assert (
        metrics["matched/fix/presence_few/labels"]
        == metrics["matched/fix/platt/labels"]
        == 6
        < metrics["matched/fix/presence/labels"]
    )
    assert metrics["matched/fix/distil/labels"] == 0 < metrics["matched/fix/distil/pairs"]
    assert metrics["matched/fix/platt/labels"] == 6
    titles = [t.title for t in task.tables(metrics)]
    assert titles[0] == "drift of presence"
    assert len(titles) == 5


def test_drift_is_the_change_of_the_mean_logit_by_kind_of_pair(finished):
    task, net, metrics, _ = finished
    with torch.no_grad():
        teacher, student = (task.read(m.eval(), task.test) for m in (net.teacher, net.student("matched")))
    for name, chosen in (("present", teacher.kinds == "present"), ("hard", teacher.kinds == "hard")):
        change = student.presence[chosen].mean() - teacher.presence[chosen].mean()
        assert metrics[f"matched/drift/change, {name}"] == pytest.approx(change, abs=1e-5)


def test_calibration_and_test_images_are_apart(finished):
    task = finished[0]
    assert not {s.file for s in task.fitting.scenes} & {s.file for s in task.test.scenes}
    assert len(task.fitting) == len(task.test) == 3


def test_a_student_is_a_copy_that_shares_nothing(finished):
    net = finished[1]
    student = net.student("matched")
    ours = {p.data_ptr() for p in net.parameters()}
    assert not ours & {p.data_ptr() for p in student.parameters()}
    assert isinstance(student.trunk, StudentTrunk)


def test_the_two_normalisations_are_of_one_image():
    pixels = torch.rand(1, 3, 4, 4)
    wanted = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(imagenet_of_half()((pixels - 0.5) / 0.5), wanted, rtol=1e-5, atol=1e-5)
    assert [round(s, 3) for s in imagenet_of_half().scale] == [2.183, 2.232, 2.222]
    assert [round(b, 3) for b in imagenet_of_half().shift] == [0.066, 0.196, 0.418]


def test_feature_loss_by_hand():
    ours, theirs = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    got = feature_loss(ours, theirs, 0.5)
    square = turned = 0.0
    for b in range(2):
        for i in range(2):
            for j in range(2):
                x, y = ours[b, :, i, j], theirs[b, :, i, j]
                square += float(((x - y) ** 2).sum()) / 8
                turned += float(1 - x @ y / (x.norm() * y.norm())) / 8
    assert float(got["features"]) == pytest.approx(square, rel=1e-5)
    assert float(got["cosine"]) == pytest.approx(0.5 * turned, rel=1e-4)
    assert float(explained(theirs, theirs)) == 1.0
    assert float(explained(theirs.mean(dim=(0, 2, 3), keepdim=True).expand_as(theirs), theirs)) == pytest.approx(0.0, abs=1e-6)


def test_each_phase_has_its_own_schedule():
    plan = TwoPhases(3, lambda: lambda done, total, base, steps: base * (done + 1) / total)
    assert [plan(t, 5, 1.0) for t in range(5)] == [1 / 3, 2 / 3, 1.0, 1 / 2, 1.0]
    with pytest.raises(ValueError, match="first"):
        TwoPhases(-1)


def made_up(**fixes):
    """Metrics of a condition from (cgF1, labels, trained)."""
    found = {}
    for fix, (score, labels, trained) in fixes.items():
        found |= {f"matched/fix/{fix}/{k}": v for k, v in (("cgF1", score), ("labels", labels), ("trained", trained))}
        found |= {f"matched/fix/{fix}/{k}": 0.0 for k in ("pairs", "seconds", "recall", "false")}
    return found


def test_the_recommendation_is_the_cheapest_of_the_best():
    said = recommendation(made_up(none=(10, 0, 0), platt=(40.2, 32, 2), moment=(39.5, 0, 2), distil=(40.4, 0, 900)), "matched")
    assert said.startswith("Recommended: moment match. cgF1 39.5 (unrepaired 10.0)")
    assert "Within 2 points of the best, distillation (40.4)" in said
    said = recommendation(made_up(none=(10, 0, 0), platt=(40.2, 32, 2), moment=(30, 0, 2)), "matched")
    assert said.startswith("Recommended: Platt.")
    loud = made_up(none=(10, 0, 0), offset=(60, 0, 0), moment=(30, 0, 2)) | {
        "matched/fix/offset/false": 0.3,
        "teacher/fix/none/false": 0.2,
    }
    assert recommendation(loud, "matched").startswith("Recommended: moment match.")
    assert "Left out for false positives above 0.250: constant offset." in recommendation(loud, "matched")
    said = recommendation(made_up(none=(40, 0, 0), skip=(12, 0, 0), moment=(40.5, 0, 2)), "matched")
    assert said.startswith("Recommended: none.")
    assert fix_rows({}, "matched") == []


def test_a_folded_map_gives_the_readings_that_were_measured(finished):
    task, net, _, _ = finished
    student = net.student("mismatched").eval()
    said = task.read(student, task.test)
    map = calibration.moment_match(said.presence, 2 * said.presence + 3)
    keys = {k: v.shape for k, v in student.state_dict().items()}
    calibration.fold_presence(student.decoder.presence, map)
    folded = task.read(student, task.test)
    assert {k: v.shape for k, v in student.state_dict().items()} == keys
    np.testing.assert_allclose(folded.presence, said.moved(*map).presence, atol=1e-5)
    np.testing.assert_array_equal(folded.scores, said.scores)
    np.testing.assert_array_equal(folded.boxes, said.boxes)


def test_matched_features_have_the_teachers_moments_at_no_cost(finished):
    task, net, _, _ = finished
    student = net.student("matched").eval()
    matched = task._feature_match(net, student)
    images = torch.stack([task.fitting.sample(i, np.random.default_rng(0))["image"] for i in range(len(task.fitting))])
    with torch.no_grad():
        ours, theirs = (calibration.moments([m.trunk(images)]) for m in (matched, net.teacher))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.std, theirs.std, rtol=1e-4, atol=1e-5)
    assert {k: v.shape for k, v in matched.state_dict().items()} == {k: v.shape for k, v in student.state_dict().items()}


def test_the_picture_shows_every_pair_where_it_belongs(finished, tmp_path):
    task, net, _, _ = finished
    task.pictures(net, tmp_path)
    assert (tmp_path / "presence.png").stat().st_size > 1000
    boxes = np.zeros((1, 1, 4))
    one = Reading(boxes, np.zeros((1, 1)), np.array([6.0]), [np.zeros((1, 4))], np.array(["present"]))
    sheet = np.asarray(scatter(one, {"a": one.moved(1.0, -12.0)}, side=240, limit=12.0))
    assert tuple(sheet[40 + 180, 20 + 180]) == (0x30, 0xA0, 0x50)


def test_labelled_pairs_are_half_present():
    present = np.array([True] * 3 + [False] * 20)
    chosen = balanced(present, 8, np.random.default_rng(0))
    assert present[chosen].sum() == 3
    assert len(set(chosen.tolist())) == 7


def test_settings_that_contradict_each_other_are_errors(tmp_path):
    with pytest.raises(ValueError, match="teacher_steps must be 0"):
        PresenceStudy(detection, teacher="runs/x", teacher_steps=5)
    with pytest.raises(ValueError, match="labels"):
        PresenceStudy(detection, labels=2)
    with pytest.raises(ValueError, match="leave test images: 6 of 6"):
        PresenceStudy(detection, calibration=6).prepare(tmp_path)


def test_a_given_teacher_is_loaded(finished, tmp_path):
    from safetensors.torch import save_file

    task, net, _, _ = finished
    save_file({k: v.contiguous() for k, v in net.teacher.state_dict().items()}, tmp_path / "teacher.safetensors")
    other = PresenceStudy(detection, teacher=str(tmp_path / "teacher.safetensors"), teacher_steps=0, calibration=3)
    loaded = other.model()
    torch.testing.assert_close(loaded.teacher.neck.weight, net.teacher.neck.weight)
    result = other.losses(loaded, next(task.batches(0, 0)), 1)
    assert all(k.startswith(CONDITIONS) for k in result.losses)


@pytest.mark.parametrize("name", ["study", "teacher", "student_small", "student_short", "student_large"])
def test_the_files_of_the_study_are_sound(name):
    config = configs.read(f"gin/sam3_fusion/issue17/{name}.gin", [])
    assert config.get("trainer.train.threads") == 1


def test_skipping_presence_is_judged_by_what_is_found(finished):
    metrics = finished[2]
    assert "matched/fix/skip/AUROC" not in metrics
    row = next(r for r in fix_rows(metrics, "matched") if r[0] == FIXES["skip"])
    assert row[1] is None


def test_continued_distillation_compares_presence_queries_boxes_and_memory():
    torch.manual_seed(0)
    net = detection().detector(8, 32).eval()
    batch = {
        "image": torch.randn(2, 3, 32, 32), "tokens": torch.randn(3, 4, 8), "pad": torch.zeros(3, 4, dtype=torch.bool), "image_of": torch.tensor([0, 1, 1]),
    }  # fmt: skip
    ours, memory = answer(net, batch)
    whole = net(batch["image"], batch["tokens"], batch["pad"], batch["image_of"])
    assert all(
        torch.equal(a, b) for a, b in zip((ours.scores, ours.boxes, ours.presence), (whole.scores, whole.boxes, whole.presence))
    )
    assert memory.shape == (3, 16, 16)
    theirs = ours._replace(presence=ours.presence + 2, scores=ours.scores - 3, boxes=ours.boxes + 0.1)
    for changed, wanted in (
        (ours, 0.0), (ours._replace(presence=theirs.presence), 4.0), (ours._replace(scores=theirs.scores), 9.0), (ours._replace(boxes=theirs.boxes), 0.5), (theirs, 13.5),
    ):  # fmt: skip
        assert distillation_loss(ours, memory, changed, memory, 1.0).item() == pytest.approx(wanted, abs=1e-5)
        assert distillation_loss(ours, memory, changed, memory + 2, 0.5).item() == pytest.approx(wanted + 2.0, abs=1e-5)
    gradient = torch.autograd.grad(
        distillation_loss(ours, memory, whole, (memory + 1).detach(), 1.0), list(net.encoder.parameters()), allow_unused=True
    )
    assert any(g is not None and g.abs().max() > 0 for g in gradient)  # what the memory term alone teaches


def test_the_few_pairs_are_those_of_the_reading(finished):
    task, net, _, _ = finished
    student = net.student("matched").eval()
    said = task.read(student, task.fitting)
    chosen = balanced(said.present, 6, np.random.default_rng(3))
    pairs = task._pairs(student, chosen)
    np.testing.assert_array_equal(pairs["valid"].any(dim=1).numpy(), said.present[chosen])
    with torch.no_grad():
        out = student(pairs["image"], pairs["tokens"], pairs["pad"], pairs["image_of"])
    np.testing.assert_allclose(out.presence[-1].numpy(), said.presence[chosen], atol=1e-5)
    np.testing.assert_allclose(out.scores[-1].numpy(), said.scores[chosen], atol=1e-5)


def test_every_foldable_fix_is_a_weight_file_that_gives_its_row(finished, tmp_path, monkeypatch):
    task, net, metrics, _ = finished
    task.leave(net.eval(), tmp_path)
    tmp_path = tmp_path / "repaired"
    index = json.loads((tmp_path / "index.json").read_text())
    listed = {(f["condition"], f["fix"]) for f in index["files"]}
    assert listed == {(c, f) for c in CONDITIONS for f in set(FIXES) - {"none", "skip"} if f != "input" or c == "mismatched"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f["file"] for f in index["files"]] + ["index.json"])
    assert index["recommended"] == {c: recommended(metrics, c)[0] for c in CONDITIONS}
    for one in index["files"]:
        for figure, value in one["measured"].items():
            assert value == pytest.approx(metrics[f"{one['condition']}/fix/{one['fix']}/{figure}"], abs=1e-5), (one["file"], figure)
    platt, base = read_weights(tmp_path / "matched-platt.safetensors"), net.student("matched").state_dict()
    assert {k for k, v in base.items() if not torch.equal(v, platt[k])} == {
        "decoder.presence.head.2.weight",
        "decoder.presence.head.2.bias",
    }
    student = task.blueprint().eval()
    assert keys.read(student, platt).complete  # encoder, decoder, scorer
    checkpoint.load_model(student, trainer.initial_weights(str(tmp_path / "mismatched-distil.safetensors")), what="distilled")
    np.testing.assert_array_equal(task.read(student, task.test).presence, task.repaired["mismatched", "distil"].said.presence)
    inner = [f["images"] for f in index["files"] if f["fix"] == "input"]
    assert inner == [
        {"mean": 0.5, "std": 0.5, "then": {"scale": list(imagenet_of_half().scale), "shift": list(imagenet_of_half().shift)}}
    ]

    wrong = dataclasses.replace(task.repaired["matched", "platt"], student=net.student("matched"))
    monkeypatch.setitem(task.repaired, ("matched", "platt"), wrong)
    with pytest.raises(FloatingPointError, match=r"matched-platt\.safetensors: presence logits differ"):
        task.leave(net, tmp_path / "wrong")


def test_repaired_students_are_made_again_where_a_run_was_resumed_after_its_last_step(finished, tmp_path):
    task, net, metrics, _ = finished
    again = PresenceStudy(
        detection, teacher_steps=2, student=functools.partial(StudentTrunk, width=2), calibration=3, labels=6, presence_steps=2, distil_steps=2
    )  # fmt: skip
    again.load_state(task.state())
    again.prepare(task.workspace)
    again.leave(net, tmp_path / "again")
    for condition, fix in (("matched", "platt"), ("mismatched", "presence"), ("mismatched", "features_moment")):
        name = f"{condition}-{fix}.safetensors"
        ours = task.repaired[condition, fix].student.state_dict()
        assert all(torch.equal(v, ours[k]) for k, v in read_weights(tmp_path / "again/repaired" / name).items()), name
    task.leave(net, tmp_path / "first")
    for path in (tmp_path / "first/repaired").iterdir():
        assert path.read_bytes() == (tmp_path / "again/repaired" / path.name).read_bytes(), path.name
    assert again.found.keys() == {k for k in metrics if "/" in k}
