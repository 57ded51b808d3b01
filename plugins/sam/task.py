"""The reproduction: train and evaluate text-guided RGB-D segmentation.

Recipe: DFormerv2's release and its fork with text fusion; what they hard-code is a parameter here.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from torch import Tensor, nn

from core.checkpoint import LoadReport
from core.data import Shuffled, Stream, collate, to_device
from core.distributed import gather, world
from core.metrics.segmentation import Absent, Confusion
from core.options import require_choice
from core.registry import register
from core.task import DataCard, StepResult, Table, Task
from plugins.sam.augmentation import DEVIATION, MEAN, EvalTransform, TrainTransform
from plugins.sam.datasets import IGNORE, NYUDepthv2, Record, RGBDScenes, View
from plugins.sam.guidance import Guidance, ImageTags
from plugins.sam.inference import Predictor
from plugins.sam.released_weights import load_pretrained_backbone, load_segmentor
from plugins.sam.rgbd_sample import rgbd_sample
from plugins.sam.segmentor import Segmentor

# Parameters by what decides their weight decay. Norms and biases have none anywhere; the release decays the raw ones.
NORMS_AND_BIASES = r"(^|\.)(norm\d?|out_norms\.\d|stem\.(1|4|7|10))\.(weight|bias)$|bias$"
RAW = r"(^|\.)(gamma\d?|alpha|prior\.weight|(de|en)coder_logit_scale)$"


class Scenes:
    """A split as the loader sees it: images, depth, labels, and the text of each image.

    Args:
        scenes: the data set.
        records: which of it.
        transform: from a view and a generator to tensors.
        guidance: gives the text; None for none.
        cache: keep decoded images in memory.
    """

    def __init__(
        self,
        scenes: RGBDScenes,
        records: Sequence[Record],
        transform: Callable[..., dict[str, Tensor]],
        guidance: Guidance | None,
        cache: bool = False,
    ):
        self.scenes, self.records, self.transform, self.guidance = scenes, tuple(records), transform, guidance
        self.views: dict[int, View] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.records)

    def view(self, index: int) -> View:
        """The images of a record, decoded."""
        if self.views is None:
            return self.scenes.read(self.records[index])
        if index not in self.views:
            self.views[index] = self.scenes.read(self.records[index])
        return self.views[index]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Tensors of a record: image (3, h, w), depth (1, h, w), label (h, w), and text (t, c) where there is one."""
        tensors: dict[str, Any] = dict(self.transform(self.view(index), rng))
        if self.guidance is not None:
            tensors["text"] = self.guidance.tokens(self.records[index])
        return tensors


def pixel_loss(logits: Float[Tensor, "b k h w"], labels: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross entropy, mean over the valid pixels of the global batch; 0 where there is none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    valid = gather((labels != IGNORE).sum().reshape(1)).sum().clamp_min(1)
    return total * world() / valid  # ranks' gradients are averaged afterwards


def _reads_text(model: nn.Module) -> list[str]:
    """Names of the parameters that see a text."""
    return [n for n, _ in model.named_parameters() if n.startswith(("encoder_alignment.", "decoder_alignment."))]


@register("task", paper="DFormerv2 (CVPR 2025) with text fusion; SAM attention modes (note)")
class Segmentation(Task):
    """RGB-D segmentation with text.

    Args:
        root: folder of the data set; None generates a sample in NYUDepthv2's layout and reads that.
        layout: constructor of the data set.
        network: constructor of the model, called with `classes=, text_dim=`.
        text: constructor of the guidance; None trains without text (the network then must have no SAM).
        train_transform, eval_transform: constructors of the image transforms.
        batch_size: images of a step, over all processes.
        last_batch: of an epoch: `drop` leaves out the images that do not fill it; `fill` (release) takes length // batch_size + 1
            batches, the last completed with images drawn anew.
        predictor: constructor of what evaluation does with a picture.
        final_predictor: the same, for one more evaluation after the last step (multi-scale, say), reported under `final/`.
        absent: how a class without pixels counts in the means, `ignore` or `zero` (published numbers).
        eval_batch: images of one size that evaluation takes at once.
        weight_decay_of: `matrices` decays what has two dimensions and more; `release` also decays layer scale, the
            prior's weights, alpha, gamma and the temperatures.
        optimise_raw_params: False keeps those at their initial or loaded values, as DFormer's release does by oversight.
        pretrained: file of released backbone weights to start from.
        weights: file of a released model to start from.
        workers: loader processes.
        cache: keep decoded images in memory.
        sample_seed: names the generated sample.
        sample_train, sample_test: its numbers of images.
        profile_size: height and width for the profile, and for an export.
        profile_classes, profile_text: number of classes, and number and width of text tokens, for the profile where no data
            are at hand.
        published: published values of this configuration by metric name.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        layout: Callable[..., RGBDScenes] = NYUDepthv2,
        network: Callable[..., nn.Module] = Segmentor,
        text: Callable[..., Guidance] | None = ImageTags,
        train_transform: Callable[..., Any] = TrainTransform,
        eval_transform: Callable[..., Any] = EvalTransform,
        batch_size: int = 8,
        predictor: Callable[..., Predictor] = Predictor,
        final_predictor: Callable[..., Predictor] | None = None,
        absent: Literal["ignore", "zero"] = "ignore",
        eval_batch: int = 8,
        weight_decay_of: Literal["matrices", "release"] = "matrices",
        optimise_raw_params: bool = True,
        pretrained: str | None = None,
        weights: str | None = None,
        workers: int = 0,
        cache: bool = False,
        sample_seed: int = 0,
        sample_train: int = 144,
        sample_test: int = 48,
        profile_size: tuple[int, int] = (480, 640),
        profile_classes: int = 40,
        profile_text: tuple[int, int] = (6, 512),
        published: dict[str, float] | None = None,
        last_batch: Literal["drop", "fill"] = "drop",
    ):
        for name, value in (("batch_size", batch_size), ("eval_batch", eval_batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if pretrained is not None and weights is not None:
            raise ValueError("give pretrained (a backbone) or weights (a whole model), not both")
        self.root, self.layout, self.network = root, layout, network
        self.text = text
        self.guidance: Guidance | None = None  # built with the data: its encoder may need files
        self.train_transform, self.eval_transform = train_transform(), eval_transform()
        require_choice("last_batch", last_batch, Literal["drop", "fill"])
        self.batch_size, self.eval_batch = batch_size, eval_batch
        self.last_batch: Literal["drop", "fill"] = last_batch
        self.predictor = predictor()
        self.final_predictor = final_predictor() if final_predictor is not None else None
        self.absent: Absent = absent
        self.weight_decay_of, self.optimise_raw_params = weight_decay_of, optimise_raw_params
        self.pretrained, self.weights = pretrained, weights
        self.workers, self.cache = workers, cache
        self.sample_seed, self.sample_train, self.sample_test = sample_seed, sample_train, sample_test
        self.profile_size, self.profile_classes, self.profile_text = profile_size, profile_classes, profile_text
        self.published = dict(published or {})
        self.loaded: dict[str, LoadReport] = {}

    # --- data

    def prepare(self, workspace: Path) -> DataCard:
        sample = self.root is None
        name = f"rgbd-{self.sample_seed}-{self.sample_train}-{self.sample_test}"
        root = workspace / "samples" / name if sample else Path(str(self.root))
        if sample:
            rgbd_sample(str(root), seed=self.sample_seed, train=self.sample_train, test=self.sample_test)
        self.scenes = self.layout(str(root))
        counts = self.scenes.counts()
        if self.text is not None:
            self.guidance = self.text()
            counts.update(self.guidance.open(self.scenes))
        self.train = Scenes(self.scenes, self.scenes.train, self.train_transform, self.guidance, self.cache)
        self.test = Scenes(self.scenes, self.scenes.test, self.eval_transform, self.guidance, self.cache)
        self.plan = Shuffled(len(self.train), self.batch_size, last_batch=self.last_batch)
        title = type(self.scenes).__name__
        generated = self.scenes.sample
        return DataCard(
            f"{title} layout, generated sample" if generated else title, str(root), self.scenes.fingerprint(), generated, counts
        )

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        return Stream(self.train, self.plan, seed, workers=self.workers).batches(start)

    def steps_per_epoch(self) -> int:
        return self.plan.batches_per_epoch()

    # --- model and loss

    def model(self) -> nn.Module:
        model = self._build(len(self.scenes.classes))
        if self.pretrained is not None:
            self.loaded[self.pretrained] = load_pretrained_backbone(model.backbone, Path(self.pretrained))  # type: ignore[arg-type]
        if self.weights is not None:
            self.loaded[self.weights] = load_segmentor(model, Path(self.weights))
        return model

    def _text_shape(self) -> tuple[int, int]:
        """Number and width of text tokens."""
        return (self.guidance.count, self.guidance.dim) if self.guidance is not None else self.profile_text

    def _build(self, classes: int) -> nn.Module:
        if self.text is not None:
            tokens, width = self._text_shape()
            model = self.network(classes=classes, text_dim=width)
            if isinstance(model, Segmentor):
                model.example_size, model.example_tokens = self.profile_size, tokens
                if not _reads_text(model):
                    raise ValueError(
                        "a text is given, but the network has no SAM module that would read it: give sam.Segmentor.encoder_stages or "
                        "decoder_stages, or set sam.Segmentation.text = None"
                    )
            return model
        model = self.network(classes=classes)
        if isinstance(model, Segmentor):
            model.example_size = self.profile_size
        idle = _reads_text(model)
        if idle:
            raise ValueError(
                f"text is None, but the network has SAM modules that would never be used ({idle[0]}, …): set "
                "sam.Segmentor.encoder_stages = () and decoder_stages = (), or give a text"
            )
        return model

    def parameter_rules(self) -> Sequence[tuple[str, Mapping[str, float]]]:
        rules: list[tuple[str, Mapping[str, float]]] = []
        if not self.optimise_raw_params:
            rules.append((RAW, {"lr_scale": 0.0, "weight_decay": 0.0}))
        elif self.weight_decay_of == "matrices":
            rules.append((RAW, {"weight_decay": 0.0}))
        return [*rules, (NORMS_AND_BIASES, {"weight_decay": 0.0})]

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        logits = model(batch["image"], batch["depth"], batch.get("text"))
        labels = batch["label"]
        with torch.no_grad():  # on every fourth row and column: argmax over all pixels costs a tenth of a small step
            some, shown = labels[:, ::4, ::4], logits[:, :, ::4, ::4].argmax(dim=1)
            right = (shown == some).sum() / (some != IGNORE).sum().clamp_min(1)
        return StepResult({"pixels": pixel_loss(logits, labels)}, {"pixel accuracy": right})

    # --- evaluation

    def _pictures(self, model: nn.Module, predictor: Predictor, split: Scenes) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first index, probabilities, labels) of neighbouring pictures of one size."""
        device = next(model.parameters()).device
        never = np.random.default_rng(0)
        held: list[dict[str, Any]] = []
        for index in range(len(split) + 1):
            sample = split.sample(index, never) if index < len(split) else None
            full = len(held) == self.eval_batch
            if held and (sample is None or full or sample["label"].shape != held[0]["label"].shape):
                batch = to_device(collate(held), device)
                yield index - len(held), predictor(model, batch["image"], batch["depth"], batch.get("text")), batch["label"]
                held = []
            if sample is not None:
                held.append(sample)

    def _score(self, model: nn.Module, predictor: Predictor) -> dict[str, float]:
        confusion = Confusion(len(self.scenes.classes), IGNORE)
        for first, probabilities, labels in self._pictures(model, predictor, self.test):
            broken = (~probabilities.isfinite().flatten(1).all(dim=1)).nonzero()
            if len(broken):  # argmax would call every such pixel class 0
                image = self.test.records[first + int(broken[0])].image
                raise FloatingPointError(
                    f"evaluation: the probabilities of {image} are not finite; its image, depth or text, or the weights, hold "
                    "NaN or infinite values"
                )
            confusion.add(probabilities.argmax(dim=1), labels)
        result = confusion.result(self.absent)
        by_class = {f"IoU/{name}": iou for name, iou in zip(self.scenes.classes, result.iou) if not math.isnan(iou)}
        return {**result.metrics(), **by_class}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self._score(model, self.predictor)

    def conclude(self, model: nn.Module) -> dict[str, float]:
        if self.final_predictor is None:
            return {}
        return {f"final/{k}": v for k, v in self._score(model, self.final_predictor).items()}

    # --- for people

    def tables(self, metrics: Mapping[str, float]) -> list[Table]:
        tag = f"[{self.absent}]"
        columns = [f"mIoU{tag}", f"mAcc{tag}", f"mF1{tag}", "pixel accuracy"]
        rows = [
            [
                "one pass" if self.predictor.scales == (1.0,) and not self.predictor.flip else "several",
                *(metrics.get(c) for c in columns),
            ]
        ]
        if self.final_predictor is not None and f"final/{columns[0]}" in metrics:
            rows.append(["at the end: several scales", *(metrics.get(f"final/{c}") for c in columns)])
        note = (
            "Classes without a pixel are left out of the means."
            if self.absent == "ignore"
            else "Classes without a pixel count as 0."
        )
        tables = [Table("segmentation", ("", *columns), rows, note)]
        by_class = [(k.removeprefix("IoU/"), v) for k, v in metrics.items() if k.startswith("IoU/")]
        if by_class:
            tables.append(Table("intersection over union by class", ("class", "IoU"), by_class))
        if self.loaded:
            tables.append(Table("weights loaded", ("file", "report"), [(Path(k).name, str(v)) for k, v in self.loaded.items()]))
        return tables

    def pictures(self, model: nn.Module, folder: Path) -> None:
        """`predictions.png`: image, depth, labels, prediction; `attention.png`: where each text token is looked at."""
        count = min(6, len(self.test))
        chosen = Scenes(
            self.scenes, self.test.records[:: max(1, len(self.test) // count)][:count], self.eval_transform, self.guidance
        )
        training = model.training
        model.eval()
        with torch.inference_mode():
            predicted = {}
            for first, probabilities, _ in self._pictures(model, self.predictor, chosen):
                for i, classes in enumerate(probabilities.argmax(dim=1).cpu().numpy()):
                    predicted[first + i] = classes
            self._prediction_sheet(chosen, predicted).save(folder / "predictions.png")
            sheet = self._attention_sheet(model, chosen)
        if sheet is not None:
            sheet.save(folder / "attention.png")
        model.train(training)

    def _prediction_sheet(self, chosen: Scenes, predicted: Mapping[int, Any]) -> Image.Image:
        rows = []
        for index in range(len(chosen)):
            view = chosen.view(index)
            h, w = view.label.shape
            depth = np.repeat((view.depth * 255).astype(np.uint8)[:, :, None], 3, axis=2)
            shown = np.where(view.label == IGNORE, IGNORE, predicted[index][:h, :w]).astype(np.uint8)
            rows.append(np.concatenate([view.image, depth, PALETTE[view.label], PALETTE[shown]], axis=1))
        width = max(r.shape[1] for r in rows)
        return Image.fromarray(
            np.concatenate([np.pad(r, ((0, 4), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows])
        )

    def _attention_sheet(self, model: nn.Module, chosen: Scenes) -> Image.Image | None:
        """Rows of pictures, columns of tokens: the decoder's attention at the highest resolution, mean over heads."""
        if self.guidance is None or not isinstance(model, Segmentor) or not len(model.decoder_alignment):
            return None
        stage = min(map(int, model.decoder_alignment))
        align: Any = model.decoder_alignment[str(stage)]
        device, never = next(model.parameters()).device, np.random.default_rng(0)
        tile, gap, head = (96, 128), 4, 14
        shown = min(6, self.guidance.count)
        sheet = Image.new("RGB", ((tile[1] + gap) * (shown + 1), (tile[0] + gap + head) * len(chosen)), "white")
        draw = ImageDraw.Draw(sheet)
        for row in range(len(chosen)):
            batch = to_device(collate([chosen.sample(row, never)]), device)
            level = model.encode(batch["image"], batch["depth"], batch["text"])[stage]
            attention = align.attention(level.permute(0, 2, 3, 1), batch["text"], side="decoder")[0].float().mean(dim=0).cpu()
            picture = denormalised(batch["image"][0].cpu(), self.eval_transform)
            top = row * (tile[0] + gap + head)
            sheet.paste(Image.fromarray(picture).resize((tile[1], tile[0])), (0, top + head))
            words = self.guidance.words(chosen.records[row])
            for token in range(shown):
                heat = attention[..., token].numpy()
                scaled = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-9)
                mask = Image.fromarray((255 * scaled).astype(np.uint8)).resize((tile[1], tile[0]), Image.Resampling.BILINEAR)
                base = Image.fromarray(picture).resize((tile[1], tile[0])).convert("L").convert("RGB")
                left = (token + 1) * (tile[1] + gap)
                sheet.paste(
                    Image.composite(Image.new("RGB", base.size, (255, 60, 0)), base, mask.point(lambda v: int(v * 0.7))),
                    (left, top + head),
                )
                padding = not batch["text"][0, token].any()
                label = "padding" if padding else (words[token] if token < len(words) else "") or f"token {token}"
                draw.text((left, top), f"{label}  {heat.min():.2f}-{heat.max():.2f}", fill="black")
        return sheet

    # --- for the profiler

    def blueprint(self) -> nn.Module:
        return self._build(len(self.scenes.classes) if hasattr(self, "scenes") else self.profile_classes)

    def profile_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        image, depth = torch.rand(batch, 3, *self.profile_size), torch.rand(batch, 1, *self.profile_size)
        return (image, depth) if self.text is None else (image, depth, torch.rand(batch, *self._text_shape()))

    def real_inputs(self, count: int) -> Iterator[tuple[Any, ...]]:
        never = np.random.default_rng(0)
        for index in range(min(count, len(self.test))):
            batch = collate([self.test.sample(index, never)])
            yield (batch["image"], batch["depth"], *([batch["text"]] if "text" in batch else []))

    def expected(self) -> Mapping[str, float]:
        return self.published


def _palette() -> Any:
    """A colour for each label: distinct hues, and black for void."""
    colours = [colorsys.hsv_to_rgb((i * 0.381966) % 1, 0.55 + 0.4 * ((i // 3) % 2), 0.6 + 0.4 * (i % 2)) for i in range(256)]
    table = (np.array(colours) * 255).astype(np.uint8)
    table[IGNORE] = 0
    return table


PALETTE = _palette()


def denormalised(image: Float[Tensor, "3 h w"], transform: Any) -> Any:
    """Back from a normalised image to uint8 pixels in rgb order."""
    pixels = image * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    pixels = pixels if getattr(transform, "channel_order", "rgb") == "rgb" else pixels.flip(0)
    return (pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
