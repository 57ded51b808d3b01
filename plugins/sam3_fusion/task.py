"""Text-prompted detection as a task: scenes with prompts, the detector, its losses, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from core.checkpoint import read_weights
from core.data import Shuffled, Stream, to_device
from core.registry import register
from core.task import DataCard, StepResult, Table, Task
from core.text import HashedText, TextEncoder
from plugins.sam3_fusion import keys, reading
from plugins.sam3_fusion.detector import PromptedDetector
from plugins.sam3_fusion.losses import DetectionLoss
from plugins.sam3_fusion.processor import Processor
from plugins.sam3_fusion.scenes import Prompt, PromptedScenes, collate
from plugins.sam3_fusion.shapes_sample import shapes_sample

COLUMNS = ("AP", "AP50", "recall", "false positives", "false positives, hard", "pmF1", "cgF1")


class TextTable:
    """Token vectors of texts, each computed once."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors, zero-padded to the longest, and True where one is real."""
        for text in texts:
            if text not in self.known:
                vectors, real = self.encoder.tokens([text])
                self.known[text] = vectors[0, real[0]]
        rows = [self.known[t] for t in texts]
        longest = max([1, *(len(r) for r in rows)])
        padded, real = torch.zeros(len(rows), longest, self.encoder.dim), torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            padded[i, : len(row)], real[i, : len(row)] = row, True
        return padded, real


@register("task", paper="SAM 3 (arXiv:2511.16719), promptable concept detection, without masks")
class PromptedDetection(Task):
    """Train and evaluate a text-prompted detector on prompted scenes.

    Args:
        root: folder in the layout of `plugins.sam3_fusion.scenes`; None makes a sample under the workspace.
        sample: maker of that sample, called with its folder.
        detector: the model's constructor; it is given `text_dim` and `side`.
        text: the text encoder's constructor; frozen, on the CPU.
        loss: constructor of the loss terms.
        processor: threshold and use of presence in evaluation.
        fusion_weights: a checkpoint in the release's, the Hugging Face port's or our naming, whose encoder, decoder and scorer the
            model starts from. They must fit strictly; everything else in the file is left alone.
        trunk_lr_scale: learning rate of the trunk over that of the rest.
        side: side of the squared image, in pixels.
        profile_tokens: prompt tokens of a profiled forward pass.
        batch: images a step.
        prompts: prompts an image and step, half of them absent.
        flip: mirror training images at random.
        eval_batch: images a forward pass in evaluation.
        workers: loader processes.
        train_split, test_split: names of the splits.

    Raises:
        ValueError: for counts below 1, or a data set that does not follow the layout.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        sample: Callable[..., None] = shapes_sample,
        detector: Callable[..., nn.Module] = PromptedDetector,
        text: Callable[..., TextEncoder] = HashedText,
        loss: Callable[..., Any] = DetectionLoss,
        processor: Callable[..., Processor] = Processor,
        fusion_weights: str | None = None,
        trunk_lr_scale: float = 1.0,
        side: int = 64,
        profile_tokens: int = 4,
        batch: int = 16,
        prompts: int = 4,
        flip: bool = True,
        eval_batch: int = 25,
        workers: int = 0,
        train_split: str = "train",
        test_split: str = "test",
    ):
        for name, value in (
            ("side", side),
            ("batch", batch),
            ("profile_tokens", profile_tokens),
            ("prompts", prompts),
            ("eval_batch", eval_batch),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.root, self.sample, self.detector = root, sample, detector
        self.texts, self.criterion, self.processor = TextTable(text()), loss(), processor()
        self.fusion_weights, self.trunk_lr_scale, self.profile_tokens = fusion_weights, trunk_lr_scale, profile_tokens
        self.side, self.batch, self.prompts, self.flip = side, batch, prompts, flip
        self.eval_batch, self.workers = eval_batch, workers
        self.train_split, self.test_split = train_split, test_split

    # --- data

    def prepare(self, workspace: Path) -> DataCard:
        if self.root is None:
            maker = getattr(self.sample, "__name__", "scenes").replace("_", "-")
            root = workspace / "samples" / maker
            self.sample(str(root))
        else:
            root = Path(self.root)
        self.train = PromptedScenes(root, self.train_split, self.side, self.prompts, self.flip)
        self.test = PromptedScenes(root, self.test_split, self.side)
        self.plan = Shuffled(len(self.train), self.batch)
        generated = (root / "manifest.json").is_file()
        counts = {**self.train.counts(), **self.test.counts()}
        name = f"{root.name}, generated" if generated else root.name
        return DataCard(name, str(root), f"{self.train.fingerprint()}-{self.test.fingerprint()}", generated, counts)

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        return Stream(self.train, self.plan, seed, workers=self.workers, collate_fn=self._collate).batches(start)

    def _collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        return collate(samples, self.texts)

    def steps_per_epoch(self) -> int:
        return self.plan.batches_per_epoch()

    # --- model and losses

    def model(self) -> nn.Module:
        model = self.blueprint()
        if self.fusion_weights is not None:
            keys.read(model, read_weights(Path(self.fusion_weights)))
        return model

    def blueprint(self) -> nn.Module:
        return self.detector(text_dim=self.texts.encoder.dim, side=self.side)

    def parameter_rules(self) -> Sequence[tuple[str, Mapping[str, float]]]:
        return ((r"^trunk\.", {"lr_scale": self.trunk_lr_scale}),) if self.trunk_lr_scale != 1 else ()

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        out = model(batch["image"], batch["tokens"], batch["pad"], batch["image_of"])
        losses = self.criterion(out.scores, out.boxes, out.presence, out.queries, batch["boxes"], batch["valid"], out.cells)
        monitors = {}
        if out.presence is not None:
            seen = batch["valid"].any(dim=1)
            monitors["presence accuracy"] = ((out.presence[-1].detach() > 0) == seen).float().mean()
        return StepResult(losses, monitors)

    # --- evaluation

    def read(self, model: nn.Module) -> reading.Reading:
        """What the model says of every pair of the test split."""
        return reading.read(model, self.test, self.texts, self.eval_batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return reading.measure(self.read(model), self.processor)

    def conclude(self, model: nn.Module) -> dict[str, float]:
        """The same without presence: what the token is worth."""
        if not self.processor.presence:
            return {}
        alone = reading.measure(self.read(model), Processor(self.processor.threshold, presence=False))
        return {f"queries alone/{k}": v for k, v in alone.items() if k in COLUMNS and k != "cgF1"}

    # --- for people

    def tables(self, metrics: Mapping[str, float]) -> list[Table]:
        kinds = {"": "query × presence" if self.processor.presence else "queries alone", "queries alone/": "queries alone"}
        rows = [[text, *(metrics.get(prefix + c) for c in COLUMNS)] for prefix, text in kinds.items() if f"{prefix}AP" in metrics]
        note = f"Threshold {self.processor.threshold:g}. Absent prompts take part in AP; false positives: share of absent prompts with a box."
        tables = [Table("detection", ("probability", *COLUMNS), rows, note)]
        presence = [(k.removeprefix("presence "), v) for k, v in metrics.items() if k.startswith("presence ")]
        return [*tables, Table("presence", ("metric", "value"), presence)] if presence else tables

    def pictures(self, model: nn.Module, folder: Path) -> None:
        """`detections.png`: test images with a present and an absent prompt each; found boxes coloured, true ones white."""
        training = model.training
        model.eval()
        sheet = draw(model, self.test, self.texts, self.processor)
        model.train(training)
        sheet.save(folder / "detections.png")

    # --- for the profiler

    def profile_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        tokens = torch.rand(batch, self.profile_tokens, self.texts.encoder.dim)
        return (
            torch.rand(batch, 3, self.side, self.side),
            tokens,
            torch.zeros(tokens.shape[:2], dtype=torch.bool),
            torch.arange(batch),
        )

    def real_inputs(self, count: int) -> Iterator[tuple[Any, ...]]:
        """An image with all its prompts each: their number and the length of the longest decide what is computed."""
        never = np.random.default_rng(0)
        for index in range(min(count, len(self.test))):
            batch = self._collate([self.test.sample(index, never)])
            yield batch["image"], batch["tokens"], batch["pad"], batch["image_of"]


def draw(
    model: nn.Module, split: PromptedScenes, tokens: reading.Tokens, processor: Processor, count: int = 12, scale: int = 3
) -> Image.Image:
    """A sheet of the first `count` images, each with its first present and its first absent prompt (a hard one if there is one)."""
    device = next(model.parameters()).device
    side, gap, head, columns = split.size * scale, 8, 32, 6
    chosen: list[tuple[int, Prompt]] = []
    for index, scene in enumerate(split.scenes[:count]):
        present = [p for p in scene.prompts if p.kind == "present"][:1]
        absent = sorted((p for p in scene.prompts if p.kind != "present"), key=lambda p: p.kind != "hard")[:1]
        chosen.extend((index, prompt) for prompt in present + absent)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, -(-len(chosen) // columns) * (side + head + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    never = np.random.default_rng(0)
    for number, (index, prompt) in enumerate(chosen):
        left, top = gap + number % columns * (side + gap), gap + number // columns * (side + head + gap)
        vectors, real = tokens([prompt.text])
        given = to_device((split.sample(index, never)["image"][None], vectors, ~real, torch.zeros(1, dtype=torch.int64)), device)
        with torch.inference_mode():
            out = model(*given)
        z = None if out.presence is None else out.presence[-1]
        answer = processor(out.scores[-1], out.boxes[-1], z, [(side, side)])[0]
        picture = Image.fromarray(split.pixels(index)).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left, top + head))
        scene = split.scenes[index]
        for box in (prompt.boxes / np.array([scene.width, scene.height] * 2, np.float32) * side).tolist():
            pen.rectangle([left + box[0], top + head + box[1], left + box[2], top + head + box[3]], outline="white", width=1)
        for box, score in zip(answer.boxes.tolist(), answer.scores.tolist()):
            edges = [
                left + box[0],
                top + head + box[1],
                max(left + box[2], left + box[0]),
                max(top + head + box[3], top + head + box[1]),
            ]
            pen.rectangle(edges, outline="#ff20c0", width=2)
            pen.text((edges[0] + 3, edges[1] + 2), f"{score:.2f}", fill="#ff20c0")
        right = bool(len(answer.scores)) == (prompt.kind == "present")
        pen.text((left, top), f"{prompt.text}  ({prompt.kind})", fill="black")
        said = f"{len(answer.scores)} found" + ("" if z is None else f", presence {torch.sigmoid(z).item():.2f}")
        pen.text((left, top + 14), said, fill="#107030" if right else "#b01010")
    return sheet
