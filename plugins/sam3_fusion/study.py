"""A student's presence score: how far it drifts from the teacher's when only trunk features are distilled, and what repairs it.

The run has two phases. In the first a teacher learns to detect (`PromptedDetection`). In the second two student trunks learn
the teacher's trunk features, one from images normalised as at inference, one (`mismatched`) from ImageNet-normalised images, as
stage 1 of EfficientSAM3's release does while its inference does not. Everything after the trunk stays the teacher's. Then
`conclude` measures each student on test pairs, and again with every fix; fixes are fitted on pairs of other images.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from core import checkpoint, distributed, record, trainer
from core.data import generator, to_device
from core.metrics import detection as metrics_of
from core.registry import register
from core.task import DataCard, StepResult, Table, Task
from plugins.sam3_fusion import calibration, reading
from plugins.sam3_fusion.calibration import Affine
from plugins.sam3_fusion.detector import Detected, PromptedDetector
from plugins.sam3_fusion.losses import presence_loss
from plugins.sam3_fusion.processor import Processor
from plugins.sam3_fusion.reading import Reading
from plugins.sam3_fusion.scenes import PromptedScenes, collate
from plugins.sam3_fusion.student import Preprocessing, StudentTrunk, explained, feature_loss, imagenet_of_half
from plugins.sam3_fusion.task import PromptedDetection

CONDITIONS = ("matched", "mismatched")
FIXES: dict[str, str] = {
    "none": "none",
    "skip": "skip presence",
    "offset": "constant offset",
    "offset_fitted": "offset, fitted",
    "mean": "mean match",
    "moment": "moment match",
    "regression": "regression",
    "platt": "Platt",
    "lda": "discriminant",
    "features": "feature match",
    "features_moment": "feature + moment",
    "input": "input as trained",
    "presence_few": "presence only, few",
    "presence": "presence only",
    "distil": "distillation",
}
COLUMNS: dict[str, str] = {
    "AUROC": "AUROC", "NLL": "NLL", "ECE": "ECE", "recall": "recall", "false": "false pos.",
    "cgF1": "cgF1", "trained": "trained", "labels": "labels", "pairs": "asked", "seconds": "CPU s",
}  # fmt: skip
LEGEND = (
    "AUROC, NLL and ECE of presence; recall of boxes of present prompts at IoU 0.5; false pos.: share of absent prompts with a box; trained: "
    "parameters; labels: labelled pairs; asked: unlabelled pairs that the teacher answered. "
)
SIZES = (4, 8, 16, 32, 128)
DRAWS = 20
CLOSE = 2.0  # cgF1 points within which fixes count as equal
FOLDED = 1e-3  # logits by which a fix in the weights may differ from the same fix on logits, in float32
TOLERATED = 0.05  # false positives beyond the teacher's (or the unrepaired student's, if it has more) that a fix may bring


class Pupils(nn.Module):
    """A teacher and the students' trunks."""

    def __init__(self, teacher: PromptedDetector, students: Mapping[str, nn.Module]):
        super().__init__()
        self.teacher = teacher
        self.students = nn.ModuleDict(students)

    def student(self, condition: str) -> PromptedDetector:
        """A copy of the teacher with the trunk of a student; nothing is shared."""
        made = copy.deepcopy(self.teacher)
        made.trunk = copy.deepcopy(self.students[condition])
        return made


class Prepared(nn.Module):
    """A trunk whose input is first put into another normalisation (what a fix of the first convolution would do inside)."""

    def __init__(self, trunk: nn.Module, first: Preprocessing):
        super().__init__()
        self.trunk, self.first, self.stride, self.channels = trunk, first, trunk.stride, trunk.channels

    def forward(self, image: Tensor) -> Tensor:
        return self.trunk(self.first(image))


def prepared(student: PromptedDetector, first: Preprocessing) -> PromptedDetector:
    """A copy whose trunk sees its images in another normalisation."""
    made = copy.deepcopy(student)
    made.trunk = Prepared(made.trunk, first)
    return made


@dataclasses.dataclass
class Repaired:
    """A fix: what the repaired model says of the test pairs, and what the repair took.

    Attributes:
        said: readings of the test pairs.
        presence: whether presence still multiplies the scores.
        trained: parameters that were changed by training (2 for an affine map that was fitted, 0 for a given one).
        labels: labelled pairs used.
        pairs: pairs on which the teacher had to be asked (unlabelled).
        seconds: CPU seconds of the repair, everything included that needs the calibration images.
        student: the student with the repair in its weights; None for what no weights of its shape hold (skipping presence).
        input: what its images have to pass first.
    """

    said: Reading
    trained: int = 0
    labels: int = 0
    pairs: int = 0
    seconds: float = 0.0
    presence: bool = True
    student: PromptedDetector | None = None
    input: Preprocessing | None = None


@register("task", paper="EfficientSAM3, issue 17: a distilled student's presence scores collapse")
class PresenceStudy(Task):
    """Teacher, students, drift of presence, and every fix, in one run.

    Args:
        detection: constructor of the teacher's task, which also says what the data are.
        teacher: run folder or checkpoint of a teacher; `teacher_steps` must then be 0. None trains one in the first phase.
        teacher_steps: length of the first phase; the rest of the run is the second.
        student: constructor of a student's trunk; it is given `channels`.
        cosine_weight: of the cosine term of the feature loss.
        calibration: test images that fixes are fitted on; all others are what is measured.
        labels: labelled pairs for fixes that need them (drawn from the calibration images); the same for each.
        offset: the shift of the fix "constant offset".
        presence_steps, presence_lr: of presence-only finetuning, on the few labelled pairs, and on labelled pairs of the training
            images, which are as many as its steps see.
        distil_steps, distil_lr: of continued distillation, on unlabelled pairs of the training images.
        distil_memory: weight of its term on fused image tokens.
        prior: share of present pairs that the linear discriminant assumes.

    Raises:
        ValueError: for counts below 1, or a teacher and teacher steps.
    """

    def __init__(
        self,
        detection: Callable[..., PromptedDetection] = PromptedDetection,
        *,
        teacher: str | None = None,
        teacher_steps: int = 800,
        student: Callable[..., nn.Module] = StudentTrunk,
        cosine_weight: float = 1.0,
        calibration: int = 80,
        labels: int = 32,
        offset: float = 5.0,
        presence_steps: int = 150,
        presence_lr: float = 1.0e-3,
        distil_steps: int = 150,
        distil_lr: float = 1.0e-3,
        distil_memory: float = 1.0,
        prior: float = 0.5,
    ):
        for name, value in (("calibration", calibration), ("presence_steps", presence_steps), ("distil_steps", distil_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if labels < 4:
            raise ValueError(f"labels must be at least 4, got {labels}")
        if teacher is not None and teacher_steps:
            raise ValueError(f"teacher is given ({teacher}), so teacher_steps must be 0, got {teacher_steps}")
        if distil_memory < 0:
            raise ValueError(f"distil_memory must be 0 or more, got {distil_memory}")
        if teacher_steps < 0:
            raise ValueError(f"teacher_steps must be 0 or more, got {teacher_steps}")
        self.detection = detection()
        self.teacher, self.teacher_steps, self.student, self.cosine_weight = teacher, teacher_steps, student, cosine_weight
        self.calibration, self.labels, self.offset, self.prior = calibration, labels, offset, prior
        self.presence_steps, self.presence_lr = presence_steps, presence_lr
        self.distil_steps, self.distil_lr, self.distil_memory = distil_steps, distil_lr, distil_memory
        self.seed = 0
        self.found: dict[str, float] = {}  # what `conclude` measured, and the fixes it measured
        self.repaired: dict[tuple[str, str], Repaired] = {}

    # --- data, model, training

    def prepare(self, workspace: Path) -> DataCard:
        if distributed.world() > 1:
            raise ValueError(f"the study runs in one process, got {distributed.world()}: its phases train different parameters")
        card = self.detection.prepare(workspace)
        whole = self.detection.test
        if self.calibration >= len(whole):
            raise ValueError(f"calibration must leave test images: {self.calibration} of {len(whole)}")
        self.fitting, self.test = whole.part(0, self.calibration), whole.part(self.calibration, len(whole))
        return card

    def steps_per_epoch(self) -> int:
        return self.detection.steps_per_epoch()

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        self.seed = seed
        return self.detection.batches(start, seed)

    def model(self) -> Pupils:
        teacher = self.detection.model()
        assert isinstance(teacher, PromptedDetector)
        if self.teacher is not None:
            checkpoint.load_model(teacher, trainer.initial_weights(self.teacher), what=self.teacher)
        return Pupils(teacher, {c: self.student(channels=teacher.trunk.channels) for c in CONDITIONS})

    def blueprint(self) -> PromptedDetector:
        """A student as it is used: what the weight files of `leave` load into."""
        made = self.detection.blueprint()
        assert isinstance(made, PromptedDetector)
        made.trunk = self.student(channels=made.trunk.channels)
        return made

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seed = state.get("seed", 0)

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        assert isinstance(model, Pupils)
        if step <= self.teacher_steps:
            return self.detection.losses(model.teacher, batch, step)
        losses: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        for condition in CONDITIONS:
            image = batch["image"] if condition == "matched" else imagenet_of_half()(batch["image"])
            with torch.no_grad():
                target = model.teacher.trunk(image)
            given = model.students[condition](image)
            losses |= {f"{condition} {k}": v for k, v in feature_loss(given, target, self.cosine_weight).items()}
            monitors[f"{condition} R2"] = explained(given.detach(), target)
        return StepResult(losses, monitors)

    # --- evaluation

    def read(self, model: nn.Module, split: PromptedScenes) -> Reading:
        return reading.read(model, split, self.detection.texts, self.detection.eval_batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The teacher on the test pairs."""
        assert isinstance(model, Pupils)
        return reading.measure(self.read(model.teacher, self.test), self.detection.processor)

    def conclude(self, model: nn.Module) -> dict[str, float]:
        """Everything about the students (see `tables`)."""
        assert isinstance(model, Pupils)
        with torch.inference_mode(False), torch.enable_grad():
            was = self.read(model.teacher, self.test)
            found = {f"teacher/drift/{k}": v for k, v in self._presence(was).items()}
            found |= {f"teacher/fix/none/{k}": v for k, v in self._figures(Repaired(was)).items()}
            found["parameters/teacher"] = sum(p.numel() for p in model.teacher.trunk.parameters())
            found["parameters/student"] = sum(p.numel() for p in model.students[CONDITIONS[0]].parameters())
            started = time.process_time()
            answers = self.read(model.teacher, self.fitting)
            asked = time.process_time() - started
            for condition in CONDITIONS:
                found |= {f"{condition}/{k}": v for k, v in self._condition(model, condition, was, answers, asked).items()}
        self.found = found
        return found

    def _condition(self, model: Pupils, condition: str, was: Reading, answers: Reading, asked: float) -> dict[str, float]:
        student = model.student(condition).eval()
        started = time.process_time()
        fitting = self.read(student, self.fitting)
        own = time.process_time() - started
        said = self.read(student, self.test)
        drift = self._presence(said)
        found = {f"drift/{k}": v for k, v in drift.items()}
        before = self._presence(was)
        found |= {f"drift/change, {k}": drift[f"z {k}"] - before[f"z {k}"] for k in ("present", "absent", "hard")}
        found["drift/R2"] = self._agreement(model, student)
        for name, repaired in self._fixes(model, condition, student, said, fitting, answers, own, asked):
            found |= {f"fix/{name}/{k}": v for k, v in self._figures(repaired).items()}
            self.repaired[condition, name] = repaired
        found |= self._sizes(said, fitting, answers)
        return found

    def _presence(self, said: Reading) -> dict[str, float]:
        """Presence logits by kind of pair, and the two factors of the best score on present pairs, as mean logarithms."""
        z, kinds = said.presence, said.kinds
        best = said.scores.max(axis=1)[said.present]
        return {
            "z present": reading.mean(z[said.present]), "z absent": reading.mean(z[kinds == "absent"]), "z hard": reading.mean(z[kinds == "hard"]),
            "log presence": float(-np.logaddexp(0, -z[said.present]).mean()), "log query": float(-np.logaddexp(0, -best).mean()),
        }  # fmt: skip

    def _figures(self, fix: Repaired) -> dict[str, float]:
        processor = Processor(self.detection.processor.threshold, presence=fix.presence)
        measured = reading.measure(fix.said, processor)
        found = {
            "recall": measured["recall"], "false": measured["false positives"],
            "trained": float(fix.trained), "labels": float(fix.labels), "pairs": float(fix.pairs), "seconds": fix.seconds,
        }  # fmt: skip
        if fix.presence:
            found |= {k: measured[f"presence {k}"] for k in ("AUROC", "NLL", "ECE")} | {"cgF1": measured["cgF1"]}
        else:  # presence is decided by what is found: any query above the threshold
            any_found = fix.said.probability(processor).max(axis=1) > processor.threshold
            found["cgF1"] = measured["pmF1"] * metrics_of.matthews(any_found, fix.said.present)
        return found

    def _agreement(self, model: Pupils, student: PromptedDetector) -> float:
        """R² of the student's trunk features on test images, as they are at inference."""
        never = np.random.default_rng(0)
        device = next(model.parameters()).device
        images = torch.stack([self.test.sample(i, never)["image"] for i in range(len(self.test))]).to(device)
        with torch.no_grad():
            return float(explained(student.trunk(images), model.teacher.trunk(images)))

    # --- fixes

    def _fixes(
        self,
        model: Pupils,
        condition: str,
        student: PromptedDetector,
        said: Reading,
        fitting: Reading,
        answers: Reading,
        own: float,
        asked: float,
    ) -> Iterator[tuple[str, Repaired]]:
        count = len(fitting.presence)
        chosen = balanced(fitting.present, self.labels, generator(self.seed, 17))
        z, present = fitting.presence[chosen], fitting.present[chosen]
        share = own * len(chosen) / count  # the student is asked the labelled pairs alone

        def moved(detector: PromptedDetector, of: Reading, map: Affine, **costs: Any) -> Repaired:
            assert detector.decoder.presence is not None
            folded = None
            if detector.decoder.presence.clamp == "none":  # a clamp after the last layer leaves nowhere to fold to
                folded = copy.deepcopy(detector)
                assert folded.decoder.presence is not None
                calibration.fold_presence(folded.decoder.presence, map)
            return Repaired(of.moved(*map), student=folded, **costs)

        def affine(fit: Callable[[], Affine], **costs: Any) -> Repaired:
            started = time.process_time()
            try:
                fitted = fit()
            except ValueError:  # no affine map helps: the student stays as it is
                fitted = Affine(1.0, 0.0)
            seconds = time.process_time() - started + costs.pop("seconds", 0.0)
            return moved(student, said, fitted, seconds=seconds, **costs)

        yield "none", Repaired(said)
        yield "skip", Repaired(said, presence=False)
        yield "offset", moved(student, said, Affine(1.0, self.offset))
        labelled: dict[str, Any] = {"labels": len(chosen), "seconds": share}
        yield "offset_fitted", affine(lambda: calibration.offset(z, present), trained=1, **labelled)
        asking: dict[str, Any] = {"pairs": count, "seconds": own + asked}
        yield "mean", affine(lambda: calibration.mean_match(fitting.presence, answers.presence), trained=1, **asking)
        yield "moment", affine(lambda: calibration.moment_match(fitting.presence, answers.presence), trained=2, **asking)
        yield "regression", affine(lambda: calibration.regression(fitting.presence, answers.presence), trained=2, **asking)
        yield "platt", affine(lambda: calibration.platt(z, present), trained=2, **labelled)
        yield "lda", affine(lambda: calibration.discriminant(z, present, self.prior), trained=2, **labelled)

        started = time.process_time()
        matched = self._feature_match(model, student)
        seconds = time.process_time() - started
        changed = self.read(matched, self.test)
        width = 2 * student.trunk.channels
        yield "features", Repaired(changed, trained=width, pairs=0, seconds=seconds, student=matched)
        started = time.process_time()
        both = calibration.moment_match(self.read(matched, self.fitting).presence, answers.presence)
        seconds += time.process_time() - started + asked
        yield "features_moment", moved(matched, changed, both, trained=width + 2, pairs=count, seconds=seconds)
        if condition == "mismatched":
            first = imagenet_of_half()
            yield "input", Repaired(self.read(prepared(student, first), self.test), student=student, input=first)
        yield "presence_few", self._presence_only(student, self._pairs(student, chosen))
        yield "presence", self._presence_only(student)
        yield "distil", self._distilled(model, student)

    def _feature_match(self, model: Pupils, student: PromptedDetector) -> PromptedDetector:
        """Trunk features with the teacher's mean and deviation per channel over the calibration images, folded into the last conv."""
        never = np.random.default_rng(0)
        device = next(model.parameters()).device
        images = torch.stack([self.fitting.sample(i, never)["image"] for i in range(len(self.fitting))]).to(device)
        made = copy.deepcopy(student)
        with torch.no_grad():
            ours, theirs = (calibration.moments([net.trunk(images)]) for net in (student, model.teacher))
        last = made.trunk.out
        assert isinstance(last, nn.Conv2d)
        calibration.fold_channels(last, *calibration.feature_match(ours, theirs))
        return made

    def _pairs(self, student: PromptedDetector, chosen: NDArray[np.int64]) -> dict[str, Any]:
        """A batch of the chosen pairs of the calibration images, numbered as in a reading."""
        never = np.random.default_rng(0)
        whole = collate([self.fitting.sample(i, never) for i in range(len(self.fitting))], self.detection.texts)
        index = torch.from_numpy(chosen)
        images, image_of = whole["image_of"][index].unique(return_inverse=True)
        pairs = {k: whole[k][index] for k in ("tokens", "pad", "boxes", "valid")}
        return to_device({"image": whole["image"][images], "image_of": image_of, **pairs}, next(student.parameters()).device)

    def _presence_only(self, student: PromptedDetector, few: Mapping[str, Any] | None = None) -> Repaired:
        """Token, norm and head of presence; everything else frozen and in evaluation mode.

        Args:
            student: stays as it is.
            few: labelled pairs, all of them in every step. None takes new ones from the training images in every step.
        """
        made = copy.deepcopy(student).eval().requires_grad_(False)
        assert made.decoder.presence is not None
        learned = list(made.decoder.presence.requires_grad_().parameters())
        seen = [0] if few is None else [len(few["image_of"])]
        batches = self.detection.batches(0, self.seed + 1) if few is None else itertools.repeat(few)

        def loss(batch: Any) -> Tensor:
            if few is None:
                seen.append(len(batch["image_of"]))
            out = made(batch["image"], batch["tokens"], batch["pad"], batch["image_of"])
            assert out.presence is not None
            return presence_loss(out.presence, batch["valid"].any(dim=1))

        seconds = self._train(learned, loss, batches, self.presence_steps, self.presence_lr)
        return Repaired(self.read(made, self.test), sum(p.numel() for p in learned), sum(seen), 0, seconds, student=made)

    def _distilled(self, model: Pupils, student: PromptedDetector) -> Repaired:
        """Everything after the trunk, against the teacher (`distillation_loss`)."""
        made = copy.deepcopy(student).eval()
        made.trunk.requires_grad_(False)
        if made.cell_head is not None:
            made.cell_head.requires_grad_(False)
        learned = [p for p in made.parameters() if p.requires_grad]
        pairs = 0

        def loss(batch: Any) -> Tensor:
            nonlocal pairs
            pairs += len(batch["image_of"])
            with torch.no_grad():
                theirs = answer(model.teacher.eval(), batch)
            return distillation_loss(*answer(made, batch), *theirs, self.distil_memory)

        training = model.teacher.training
        seconds = self._train(learned, loss, self.detection.batches(0, self.seed + 1), self.distil_steps, self.distil_lr)
        model.teacher.train(training)
        return Repaired(self.read(made, self.test), sum(p.numel() for p in learned), 0, pairs, seconds, student=made)

    def _train(
        self, learned: Sequence[nn.Parameter], loss: Callable[[Any], Tensor], batches: Iterator[Any], steps: int, lr: float
    ) -> float:
        """CPU seconds of a short training run at a rate that falls to nothing along half a cosine."""
        started = time.process_time()
        optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            loss(to_device(next(batches), learned[0].device)).backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
        return time.process_time() - started

    def _sizes(self, said: Reading, fitting: Reading, answers: Reading) -> dict[str, float]:
        """NLL on test pairs of maps fitted on n pairs, mean over draws; a draw that cannot be fitted changes nothing."""
        found: dict[str, float] = {}
        z, t = fitting.presence, answers.presence
        for n in (s for s in SIZES if s <= len(z)):
            losses: dict[str, list[float]] = {}
            for draw in range(DRAWS):
                rng = generator(self.seed, 18, n, draw)
                free = rng.permutation(len(z))[:n]
                labelled = balanced(fitting.present, n, rng)
                known = (z[labelled], fitting.present[labelled])
                fits = {
                    "mean": functools.partial(calibration.mean_match, z[free], t[free]),
                    "moment": functools.partial(calibration.moment_match, z[free], t[free]),
                    "platt": functools.partial(calibration.platt, *known, ridge=1.0 if n < 20 else 0.0),
                    "lda": functools.partial(calibration.discriminant, *known, self.prior),
                }
                for name, fit in fits.items():
                    try:
                        moved = fit()(said.presence)
                    except ValueError:
                        moved = said.presence
                    losses.setdefault(name, []).append(metrics_of.log_loss(moved, said.present))
            found |= {f"pairs/{n}/{name}": float(np.mean(values)) for name, values in losses.items()}
        return found

    # --- for people

    def tables(self, metrics: Mapping[str, float]) -> list[Table]:
        tables = []
        names = (
            "z present",
            "z absent",
            "z hard",
            "change, present",
            "change, absent",
            "change, hard",
            "log presence",
            "log query",
            "R2",
        )
        rows = [
            [who, *(metrics.get(f"{who}/drift/{n}") for n in names)]
            for who in ("teacher", *CONDITIONS)
            if f"{who}/drift/z present" in metrics
        ]
        note = "Mean presence logit by kind of pair; change against the teacher. Log presence, log query: mean log σ of presence and of the best "
        note += "query on present pairs. R2: of trunk features on test images."
        if rows:
            sizes = ", ".join(f"{k} {metrics[f'parameters/{k}']:,.0f} parameters" for k in ("teacher", "student"))
            tables.append(Table("drift of presence", ("", *names), rows, f"{note} Trunks: {sizes}."))
        for condition in CONDITIONS:
            rows = fix_rows(metrics, condition)
            if not rows:
                continue
            title = f"fixes, {'training and inference see the same input' if condition == 'matched' else 'trained on another normalisation'}"
            tables.append(Table(title, ("fix", *COLUMNS.values()), rows, LEGEND + recommendation(metrics, condition)))
            maps = ("mean", "moment", "platt", "lda")
            sizes_ = [n for n in SIZES if f"{condition}/pairs/{n}/mean" in metrics]
            rows = [[str(n), *(metrics[f"{condition}/pairs/{n}/{m}"] for m in maps)] for n in sizes_]
            rows.append(["none", *[metrics[f"{condition}/fix/none/NLL"]] * len(maps)])
            tables.append(
                Table(
                    f"pairs to fit on, {condition}",
                    ("pairs", *(FIXES[m] for m in maps)),
                    rows,
                    f"Presence NLL on test pairs, mean of {DRAWS} draws. Mean and moment match need no label; Platt and the discriminant need them all.",
                )
            )
        return tables or super().tables(metrics)

    def pictures(self, model: nn.Module, folder: Path) -> None:
        """`presence.png`: presence logits of test pairs, each student's against the teacher's."""
        assert isinstance(model, Pupils)
        training = model.training
        model.eval()
        said = {c: self.read(model.student(c), self.test) for c in CONDITIONS}
        scatter(self.read(model.teacher, self.test), said).save(folder / "presence.png")
        model.train(training)

    def leave(self, model: nn.Module, folder: Path) -> None:
        """`repaired/`: every student that has a fix in its weights, `<condition>-<fix>.safetensors`, and `index.json` about them.

        Keys and shapes are those of a student without a fix (`blueprint`), so a file loads wherever the student does, and costs
        what it costs. Each is read back and asked all test pairs before it is listed: the index holds what the file gives, next
        to which fix the table recommends.

        Raises:
            FloatingPointError: if a file's presence logits are not those the table's row was made of.
        """
        training = model.training
        model.eval()
        if not self.repaired:  # resumed after the last step; every fix can be made again
            self.conclude(model)
        folder = folder / "repaired"
        folder.mkdir(parents=True, exist_ok=True)
        normal = {"mean": self.test.mean, "std": self.test.std}
        listed = []
        for (condition, fix), made in self.repaired.items():
            if made.student is None:
                continue
            path = folder / f"{condition}-{fix}.safetensors"
            state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in made.student.state_dict().items()}
            # One entry of metadata: the order of several is not fixed, and equal runs give equal files.
            checkpoint.write_atomic(path, save_bytes(state, {"repaired": path.stem}))
            back = copy.deepcopy(made.student).eval()
            checkpoint.load_model(back, checkpoint.read_weights(path), what=str(path))
            said = self.read(back if made.input is None else prepared(back, made.input), self.test)
            apart = float(np.abs(said.presence - made.said.presence).max())
            if not apart < FOLDED:
                raise FloatingPointError(f"{path.name}: presence logits differ by {apart:.2g} from those of the table's row")
            figures = self._figures(dataclasses.replace(made, said=said))
            images = normal if made.input is None else normal | {"then": made.input._asdict()}
            listed.append({
                "file": path.name, "condition": condition, "fix": fix, "said": FIXES[fix], "images": images,
                "apart": apart, "measured": {k: figures[k] for k in ("AUROC", "NLL", "ECE", "recall", "false", "cgF1")},
            })  # fmt: skip
        record.write_json(
            folder / "index.json", {"recommended": {c: recommended(self.found, c)[0] for c in CONDITIONS}, "files": listed}
        )
        model.train(training)


def answer(model: PromptedDetector, batch: Mapping[str, Any]) -> tuple[Detected, Float[Tensor, "p n d"]]:
    """What a detector says of a batch, and the fused image tokens that it says it from."""
    given = model.fuse(model.features(batch["image"]), batch["tokens"], batch["pad"], batch["image_of"])
    return model.detect(given), given.fused.memory


def distillation_loss(
    ours: Detected, memory: Float[Tensor, "p n d"], theirs: Detected, target: Float[Tensor, "p n d"], memory_weight: float
) -> Float[Tensor, ""]:
    """Fix 3: squared error of presence logits, of query logits and of fused image tokens, and 5 · L1 of boxes; each a mean.

    Logits and boxes are those of every decoder layer. The note names the four and gives no weights; 5 is SAM 3's weight of L1.
    """
    assert ours.presence is not None
    assert theirs.presence is not None
    said = F.mse_loss(ours.presence, theirs.presence) + F.mse_loss(ours.scores, theirs.scores)
    return said + 5 * F.l1_loss(ours.boxes, theirs.boxes) + memory_weight * F.mse_loss(memory, target)


def scatter(teacher: Reading, students: Mapping[str, Reading], side: int = 360, limit: float = 12.0) -> Image.Image:
    """A panel a student: the teacher's presence logit of each pair to the right, the student's upwards, both cut at ±`limit`.

    Present pairs are green, hard ones red, other absent ones grey; the white line is where student and teacher agree.
    """
    colours = {"absent": "#909090", "hard": "#d04030", "present": "#30a050"}
    sheet = Image.new("RGB", (len(students) * (side + 20) + 20, side + 60), "white")
    pen = ImageDraw.Draw(sheet)

    def at(left: int, x: float, y: float) -> tuple[float, float]:
        x, y = (min(max(v, -limit), limit) / (2 * limit) + 0.5 for v in (x, y))
        return left + x * side, 40 + (1 - y) * side

    for panel, (name, said) in enumerate(students.items()):
        left = 20 + panel * (side + 20)
        pen.rectangle([left, 40, left + side, 40 + side], fill="#202428")
        pen.line([*at(left, 0, -limit), *at(left, 0, limit)], fill="#606060")
        pen.line([*at(left, -limit, 0), *at(left, limit, 0)], fill="#606060")
        pen.line([*at(left, -limit, -limit), *at(left, limit, limit)], fill="white")
        for kind, colour in colours.items():
            for x, y in zip(teacher.presence[teacher.kinds == kind], said.presence[said.kinds == kind]):
                px, py = at(left, float(x), float(y))
                pen.ellipse([px - 2, py - 2, px + 2, py + 2], fill=colour)
        pen.text((left, 8), f"{name}: presence logit of the student against the teacher's, -{limit:g} to {limit:g}", fill="black")
    for number, (kind, colour) in enumerate(colours.items()):
        pen.text((20 + 80 * number, 22), kind, fill=colour)
    return sheet


def balanced(present: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of `count` pairs, half of them present, fewer where there are not so many."""
    groups = [np.flatnonzero(present), np.flatnonzero(~present)]
    return np.concatenate([rng.permutation(g)[:n] for g, n in zip(groups, (count - count // 2, count // 2))])


def fix_rows(metrics: Mapping[str, float], condition: str) -> list[list[Any]]:
    """Rows of a condition's table, the teacher first."""
    rows = []
    for who, fix, label in [("teacher", "none", "(teacher)"), *((condition, f, text) for f, text in FIXES.items())]:
        if f"{who}/fix/{fix}/recall" not in metrics:
            continue
        values: list[Any] = [metrics.get(f"{who}/fix/{fix}/{c}") for c in COLUMNS]
        for i, c in enumerate(COLUMNS):
            if c in ("trained", "labels", "pairs"):
                values[i] = int(values[i])
        rows.append([label, *values])
    return rows if len(rows) > 1 else []


def recommended(metrics: Mapping[str, float], condition: str) -> tuple[str, str, list[str]]:
    """Which fix the table recommends, which is best, and which bring too many false positives.

    Fixes that bring too many false positives are left out (`TOLERATED`). Of the others, those whose cgF1 is within `CLOSE` points of
    the best count as equal, and the cheapest of these is recommended: fewest labels, then fewest parameters trained, then fewest of
    the teacher's answers, then CPU seconds.
    """
    value = _values(metrics, condition)
    most = _most(metrics, condition)
    sound = {f: v for f, v in value.items() if v["false"] <= most}
    best = max(sound, key=lambda f: sound[f]["cgF1"])
    near = [f for f in sound if sound[f]["cgF1"] >= sound[best]["cgF1"] - CLOSE]
    pick = min(near, key=lambda f: tuple(sound[f][n] for n in ("labels", "trained", "pairs", "seconds")))
    return pick, best, [f for f in value if f not in sound]


def recommendation(metrics: Mapping[str, float], condition: str) -> str:
    """What the table recommends (`recommended`), in three sentences."""
    value = _values(metrics, condition)
    pick, best, left = recommended(metrics, condition)
    chosen, plain = value[pick], value["none"]
    said = f"Recommended: {FIXES[pick]}. cgF1 {chosen['cgF1']:.1f} (unrepaired {plain['cgF1']:.1f}), recall {chosen['recall']:.3f} ({plain['recall']:.3f}), "
    said += f"false positives {chosen['false']:.3f} ({plain['false']:.3f}); {chosen['labels']:.0f} labels, {chosen['trained']:.0f} parameters."
    if pick != best:
        said += f" Within {CLOSE:g} points of the best, {FIXES[best]} ({value[best]['cgF1']:.1f})."
    if left:
        said += f" Left out for false positives above {_most(metrics, condition):.3f}: {', '.join(FIXES[f] for f in left)}."
    return said


def _values(metrics: Mapping[str, float], condition: str) -> dict[str, dict[str, float]]:
    names = ("cgF1", "labels", "trained", "pairs", "seconds", "recall", "false")
    return {f: {n: metrics[f"{condition}/fix/{f}/{n}"] for n in names} for f in FIXES if f"{condition}/fix/{f}/cgF1" in metrics}


def _most(metrics: Mapping[str, float], condition: str) -> float:
    """The share of false positives from which on a fix is left out."""
    return max(metrics[f"{condition}/fix/none/false"], metrics.get("teacher/fix/none/false", 0.0)) + TOLERATED
