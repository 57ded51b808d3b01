"""The reproduction: train and evaluate tri-modal re-identification with SDTPS.

Recipe: DeMo (Wang et al., AAAI 2025) and the fork that put SDTPS into it; every number of theirs that is a choice is a
parameter here, and the release's hidden ones are named (`backbone_lr`, `bias_lr_scale`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from core.data import Stream, to_device
from core.distributed import gather
from core.metrics import reid
from core.options import require_choice, require_fraction, require_idle
from core.profile import TokenReport, token_reports
from core.registry import register
from core.task import DataCard, StepResult, Table, Task
from plugins.sdtps.augmentation import EvalTransform, TrainTransform
from plugins.sdtps.clip_vit import CameraEmbedding
from plugins.sdtps.datasets import RGBNT201, Layout, Split, TriSpectralImages
from plugins.sdtps.multimodal import MultiModalSDTPS
from plugins.sdtps.reid_losses import BatchHardTriplet, LabelSmoothedCrossEntropy
from plugins.sdtps.reid_model import MODALITIES, TriModalReID, pattern
from plugins.sdtps.rgbnt_sample import rgbnt_sample
from plugins.sdtps.sampler import PKPlan
from plugins.sdtps.token_sparse import ratio_loss

MISSING = (("rgb",), ("nir",), ("tir",), ("rgb", "nir"), ("rgb", "tir"), ("nir", "tir"))
RANKS = (1, 5, 10)


def _descriptors(branches: Iterable[str]) -> list[Literal["ori", "branch", "both"]]:
    """What can be evaluated of a model with these branches."""
    return ["ori", "branch", "both"] if any(not name.startswith("ori") for name in branches) else ["ori"]


@register("task", paper="SDTPS final note on DeMo, AAAI 2025")
class ReID(Task):
    """Re-identification from RGB, NIR and TIR.

    Args:
        root: folder of the data set; None generates a sample in RGBNT201's layout and reads that.
        layout: constructor of the data set.
        network: constructor of the model, called with `identities=, cameras=`.
        train_transform, eval_transform: constructors of the image transforms.
        plan: constructor of the sampler, called with the identities of the training images.
        identity_loss, metric_loss: constructors of the two losses.
        identity_weight, metric_weight: their weights in every branch.
        branch_weights: weight of a branch by name (`ori`, `sdtps`, or `ori_rgb` …); 1 where absent.
        junk: which gallery images of the same identity do not count: same `camera`, same `scene`, or `none`; None is the data
            set's own protocol (`Layout.junk`). It is part of the metrics' names.
        feature: the evaluated descriptor, `ori`, `branch` or `both`; the others are reported beside it.
        feat_norm: divide each descriptor by its Euclidean norm before distances are taken.
        ratio_weight: weight of SEPS's ratio constraint on the soft masks, see `_ratio`; 0 is off.
        ratio_target: the share of tokens that it asks for; None is the selection's `sparse_ratio`.
        eval_batch: images a forward pass in evaluation.
        workers: loader processes.
        cache: keep decoded, resized images in memory.
        backbone_lr: learning rate of the tower; None uses the optimiser's. The release's is 5e-6, hidden in its optimiser builder.
        bias_lr_scale: factor on the rate of biases outside the tower, whose own rate stands above it in the release; 2 there.
        sample_seed: names the generated sample.
        published: published values of this configuration by metric name.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        layout: Callable[..., Layout] = RGBNT201,
        network: Callable[..., nn.Module] = TriModalReID,
        train_transform: Callable[..., Any] = TrainTransform,
        eval_transform: Callable[..., Any] = EvalTransform,
        plan: Callable[..., Any] = PKPlan,
        identity_loss: Callable[..., nn.Module] = LabelSmoothedCrossEntropy,
        metric_loss: Callable[..., nn.Module] = BatchHardTriplet,
        identity_weight: float = 0.25,
        metric_weight: float = 1.0,
        branch_weights: dict[str, float] | None = None,
        junk: Literal["camera", "scene", "none"] | None = None,
        feature: Literal["ori", "branch", "both"] = "both",
        feat_norm: bool = True,
        ratio_weight: float = 0.0,
        ratio_target: float | None = None,
        eval_batch: int = 64,
        workers: int = 0,
        cache: bool = False,
        backbone_lr: float | None = None,
        bias_lr_scale: float = 1.0,
        sample_seed: int = 0,
        published: dict[str, float] | None = None,
    ):
        if identity_weight < 0 or metric_weight < 0 or identity_weight + metric_weight == 0:
            raise ValueError(
                f"identity_weight and metric_weight must be 0 or more and not both 0, got {identity_weight} and {metric_weight}"
            )
        if eval_batch < 1:
            raise ValueError(f"eval_batch must be at least 1, got {eval_batch}")
        if junk is not None:
            require_choice("junk", junk, reid.Junk)
        require_choice("feature", feature, Literal["ori", "branch", "both"])
        if ratio_weight < 0:
            raise ValueError(f"ratio_weight must be 0 (off) or more, got {ratio_weight}")
        if ratio_weight == 0:
            require_idle(ReID, {"ratio_target": ratio_target}, "ratio_weight = 0 takes no ratio loss")
        elif ratio_target is not None:
            require_fraction("ratio_target", ratio_target)
        self.root, self.layout, self.network, self.plan = root, layout, network, plan
        self.train_transform, self.eval_transform = train_transform(), eval_transform()
        self.identity_loss, self.metric_loss = identity_loss(), metric_loss()
        self.identity_weight, self.metric_weight = identity_weight, metric_weight
        self.branch_weights = dict(branch_weights or {})
        self._junk: reid.Junk | None = junk
        self.feat_norm, self.ratio_weight, self.ratio_target = feat_norm, ratio_weight, ratio_target
        self.feature: Literal["ori", "branch", "both"] = feature
        self.eval_batch, self.workers, self.cache = eval_batch, workers, cache
        self.backbone_lr, self.bias_lr_scale, self.sample_seed = backbone_lr, bias_lr_scale, sample_seed
        self.published = dict(published or {})
        self.reports: dict[str, TokenReport] = {}

    # --- data

    @property
    def junk(self) -> reid.Junk:
        """The protocol: the option, or that of the prepared data set."""
        return self.data.junk if self._junk is None else self._junk

    def prepare(self, workspace: Path) -> DataCard:
        sample = self.root is None
        root = workspace / "samples" / f"rgbnt-{self.sample_seed}" if sample else Path(str(self.root))
        if sample:
            rgbnt_sample(str(root), seed=self.sample_seed)
        self.data = self.layout(str(root))
        self.train = TriSpectralImages(self.data, self.data.train, self.train_transform, relabel=True, cache=self.cache)
        self.sampler = self.plan(self.train.pids)
        self.camera_index = {camera: i for i, camera in enumerate(self.data.train.cameras)}
        self.train.cameras = [self.camera_index[camera] for camera in self.train.cameras]
        # RGBNT201 queries with its gallery: one pass over the images serves both.
        self.sides: dict[str, TriSpectralImages] = {}
        for name, split in (("query", self.data.query), ("gallery", self.data.gallery)):
            twin = self.sides.get("query")
            same = twin is not None and twin.split.records == split.records
            self.sides[name] = twin if same and twin else TriSpectralImages(self.data, split, self.eval_transform, cache=self.cache)
        matched = reid.matched(self._labels(self.data.query), self._labels(self.data.gallery), junk=self.junk)
        if not matched.any():
            raise ValueError(
                f"{root}: none of the {len(matched)} queries has a match that counts under ReID.junk = {self.junk!r}, so nothing could be "
                f"measured after training: a match is a gallery image of the query's identity"
                + (f" with another {self.junk}" if self.junk != "none" else "")
                + f". The protocol of {type(self.data).__name__} is {self.data.junk!r}; `repro data check` looks for missing files"
            )
        sample = sample or bool(self.data.sample)
        name = f"generated sample in the layout of {type(self.data).__name__}" if sample else type(self.data).__name__
        return DataCard(name, str(root), self.data.fingerprint(), sample, self.data.counts())

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        return Stream(self.train, self.sampler, seed, workers=self.workers).batches(start)

    def steps_per_epoch(self) -> int:
        return int(self.sampler.batches_per_epoch())

    # --- model and losses

    def model(self) -> nn.Module:
        model = self.network(identities=len(self.data.train.identities), cameras=len(self.camera_index))
        self._require_branches(model)
        if self.ratio_weight:
            self._require_ratio(model)
        embedding = getattr(getattr(model, "backbone", None), "camera", None)
        if isinstance(embedding, CameraEmbedding) and embedding.unseen == "error":
            self._require_seen_cameras()
        return model

    def _require_branches(self, model: nn.Module) -> None:
        """ValueError if the descriptor or a weight is of a branch that the model has not; a model of one's own need not tell."""
        branches: tuple[str, ...] | None = getattr(model, "branches", None)
        if branches is None:
            return
        if self.feature not in _descriptors(branches):
            raise ValueError(
                f"ReID.feature is {self.feature!r}, but the model has no token branch (it gives {', '.join(branches)}); set ReID.feature = 'ori', "
                "or give TriModalReID.tokens a token module"
            )
        self._require_weighted(branches)

    def _require_weighted(self, branches: Iterable[str]) -> None:
        unknown = sorted(set(self.branch_weights) - set(branches))
        if unknown:
            raise ValueError(
                f"branch_weights names {unknown[0]!r}; this model has {', '.join(branches)}; take it out or use one of these"
            )

    def _require_ratio(self, model: nn.Module) -> None:
        """ValueError unless the model's selection has masks whose share can move."""
        modules = [getattr(model, name, None) for name in ("inside", "tokens")]
        moving = [m.selectors[0] for m in modules if isinstance(m, MultiModalSDTPS) and m.selectors[0].ratio_moves]
        if not moving:
            raise ValueError(
                f"ReID.ratio_weight = {self.ratio_weight} needs soft masks whose share depends on the scores; set TokenSparse.use_gumbel = True "
                "with relaxation = 'sigmoid', or selection = 'relaxed', or ratio_weight = 0"
            )
        self._target = moving[0].sparse_ratio if self.ratio_target is None else self.ratio_target

    def _require_seen_cameras(self) -> None:
        """ValueError if a test image is of a camera without an embedding: found now, not by the first evaluation."""
        for split in (self.data.query, self.data.gallery):
            strange = [r for r in split.records if r.camera not in self.camera_index]
            if strange:
                first = self.data.camera_range[0]
                seen = ", ".join(str(camera + first) for camera in self.camera_index)
                raise ValueError(
                    f"{strange[0].files[0]} ({split.name}) is of camera {strange[0].camera + first}, and training has only {seen}, so the tower "
                    f"has no embedding for it ({len(strange)} of {len(split.records)} images). Train on images of that camera, take these out, "
                    "or set sdtps.CLIPVisionTransformer.camera_unseen = 'zero' to go on without one"
                )

    def parameter_rules(self) -> Sequence[tuple[str, Mapping[str, float]]]:
        rules: list[tuple[str, Mapping[str, float]]] = []
        if self.backbone_lr is not None:
            rules.append((r"^backbone\.(?!camera\.)", {"lr": self.backbone_lr}))
        if self.bias_lr_scale != 1.0:
            rules.append((r"^(?!backbone\.).*bias$", {"lr_scale": self.bias_lr_scale}))
        return rules

    def _cameras(self, cameras: Tensor | Sequence[int]) -> Tensor:
        """Training camera number of each image; -1 for a camera that training never saw."""
        numbers = cameras.tolist() if isinstance(cameras, Tensor) else cameras
        return torch.tensor([self.camera_index.get(int(c), -1) for c in numbers])

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        output = model({m: batch[m] for m in MODALITIES}, batch["camera"])
        identities = gather(batch["pid"])
        self._require_weighted(output.features)
        losses = {}
        for branch, feature in output.features.items():
            weight = self.branch_weights.get(branch, 1.0)
            if self.identity_weight:
                losses[f"{branch}_id"] = weight * self.identity_weight * self.identity_loss(output.scores[branch], identities)
            if self.metric_weight:
                losses[f"{branch}_triplet"] = weight * self.metric_weight * self.metric_loss(feature, identities)
        if self.ratio_weight:
            losses["ratio"] = self.ratio_weight * self._ratio(output.soft)
        accuracy = {f"{b}_accuracy": (s.argmax(-1) == identities).float().mean() for b, s in output.scores.items()}
        return StepResult(losses, accuracy)

    def _ratio(self, soft: Mapping[str, Tensor]) -> Tensor:
        """(target - mean of the soft mask)^2 of the global batch, mean over modalities.

        SEPS's term sums over two masks of the same patches; here each modality's patches have one, so its weight is 1. The mask
        is taken soft: a straight-through mask has k ones in value, whatever the scores, and a top-k of it no gradient at the target.
        """
        each = [ratio_loss([gather(mask)], self._target) for mask in soft.values()]
        return torch.stack(each).mean()

    # --- evaluation

    def _features(self, model: nn.Module, side: TriSpectralImages, missing: Sequence[str] = ()) -> dict[str, Tensor]:
        """Features by branch of every image of a side, with the named modalities zeroed."""
        device = next(model.parameters()).device
        never = np.random.default_rng(0)
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, len(side), self.eval_batch):
            samples = [side.sample(i, never) for i in range(first, min(first + self.eval_batch, len(side)))]
            images = {m: torch.stack([s[m] for s in samples]) for m in MODALITIES}  # type: ignore[misc]
            images = {m: torch.zeros_like(v) if m in missing else v for m, v in images.items()}
            cameras = self._cameras([int(s["camera"]) for s in samples])
            output = model(to_device(images, device), cameras.to(device))
            for branch, feature in output.features.items():
                parts.setdefault(branch, []).append(feature.float().cpu())
        return {branch: torch.cat(chunks) for branch, chunks in parts.items()}

    def _labels(self, split: Split) -> reid.Labels:
        records = split.records
        return reid.Labels([r.identity for r in records], [r.camera for r in records], [r.scene for r in records])

    def _score(self, model: nn.Module, missing: Sequence[str] = ()) -> dict[str, reid.ReIDResult]:
        query = self._features(model, self.sides["query"], missing)
        same = self.sides["gallery"] is self.sides["query"]
        gallery = query if same else self._features(model, self.sides["gallery"], missing)
        sides = self._labels(self.data.query), self._labels(self.data.gallery)
        which = _descriptors(query)
        if self.feature not in which:
            raise ValueError(f"ReID.feature is {self.feature!r}, but the model has no token branch; set it to 'ori'")
        return {
            w: reid.evaluate_features(pattern(query, w), pattern(gallery, w), *sides, junk=self.junk, normalise=self.feat_norm)
            for w in which
        }

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        results = self._score(model)
        metrics = results[self.feature].metrics(RANKS)
        for which, result in results.items():
            metrics.update(result.metrics(RANKS, prefix=f"{which}/"))
        skipped = results[self.feature].skipped
        return metrics | ({f"skipped[{self.junk}]": float(skipped)} if skipped else {})

    def conclude(self, model: nn.Module) -> dict[str, float]:
        """The six missing-modality conditions: query and gallery both without, nothing retrained."""
        self.reports = token_reports(model)
        metrics: dict[str, float] = {}
        for missing in MISSING:
            metrics.update(self._score(model, missing)[self.feature].metrics(RANKS, prefix=f"missing {'+'.join(missing)}/"))
        return metrics

    # --- for people

    def tables(self, metrics: Mapping[str, float]) -> list[Table]:
        tag = f"[{self.junk}]"
        names = [f"mAP{tag}", *(f"rank-{k}{tag}" for k in RANKS)]
        columns = ("", *names)

        def row(label: str, prefix: str) -> list[Any]:
            return [label, *(metrics.get(prefix + n) for n in names)]

        kinds = {"ori": "global features", "branch": "token branch", "both": "both, concatenated"}
        rows = [
            row(text + ("  (reported)" if k == self.feature else ""), f"{k}/")
            for k, text in kinds.items()
            if f"{k}/{names[0]}" in metrics
        ]
        note = f"Junk: gallery images of the query's identity and {self.junk} do not count." if self.junk != "none" else ""
        skipped = int(metrics.get(f"skipped{tag}", 0))
        if skipped:
            queries = len(self.data.query.records)
            note = f"{note} {skipped} of {queries} queries have no match left and are skipped: the figures are of the other {queries - skipped}.".strip()
        tables = [Table("re-identification, all three modalities", columns, rows, note)]
        if f"missing rgb/{names[0]}" in metrics:
            left = {m: "+".join(x for x in MODALITIES if x not in m) for m in MISSING}
            rows = [row("none", "")] + [row(f"{'+'.join(m)}  (left: {left[m]})", f"missing {'+'.join(m)}/") for m in MISSING]
            tables.append(Table("missing modalities (zeroed in query and gallery)", columns, rows))
        return [*tables, *self._token_tables()]

    def _token_tables(self) -> list[Table]:
        rows, note = [], ""
        for report in self.reports.values():
            first = report.stages[0][1]
            for number, (stage, count) in enumerate(report.stages):
                rows.append([f"{stage} (masked)" if number and report.masked else stage, count, f"{count / first:.1%}"])
            if report.masked:
                note = "Masked: the other tokens are multiplied by a mask and still there; what follows reads every one."
        return [Table("tokens of a modality", ("stage", "tokens", "of patches"), rows, note)] if rows else []

    def pictures(self, model: nn.Module, folder: Path) -> None:
        """`tokens.png`: kept patches bright, dropped ones dark, for a few test images in every spectrum."""
        side = self.sides["query"]
        step = max(1, len(side) // 6)
        chosen = list(range(0, len(side), step))[:6]
        never = np.random.default_rng(0)
        samples = [side.sample(i, never) for i in chosen]
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        with torch.inference_mode():
            images = {m: torch.stack([s[m] for s in samples]) for m in MODALITIES}  # type: ignore[misc]
            output = model(to_device(images, device), self._cameras([int(s["camera"]) for s in samples]).to(device))
        model.train(training)
        if not output.masks:
            return
        masks = {m: v.float().cpu().numpy() for m, v in output.masks.items()}
        grid: tuple[int, int] = model.backbone.grid  # type: ignore[assignment, union-attr]
        tile_h, tile_w, gap, head = 192, 96, 6, 22
        sheet = Image.new("RGB", (len(chosen) * (2 * tile_w + 2 * gap) + gap, head + 3 * (tile_h + gap)), "white")
        draw = ImageDraw.Draw(sheet)
        for column, index in enumerate(chosen):
            left = gap + column * (2 * tile_w + 2 * gap)
            record = side.split.records[index]
            draw.text((left, 5), f"id {record.identity}  camera {record.camera}", fill="black")
            for row, (m, view) in enumerate(zip(MODALITIES, side.views(index))):
                top = head + row * (tile_h + gap)
                picture = Image.fromarray(view).resize((tile_w, tile_h), Image.Resampling.BILINEAR)
                mask = masks[m][column].reshape(grid)
                shade = Image.fromarray((60 + 195 * np.clip(mask, 0, 1)).astype(np.uint8)).resize(
                    (tile_w, tile_h), Image.Resampling.NEAREST
                )
                sheet.paste(picture, (left, top))
                sheet.paste(Image.composite(picture, Image.new("RGB", picture.size), shade), (left + tile_w, top))
        sheet.save(folder / "tokens.png")

    # --- for the profiler

    def blueprint(self) -> nn.Module:
        return self.model() if hasattr(self, "data") else self.network(**self._sizes())

    def _sizes(self) -> dict[str, int]:
        """Identities and cameras of the training images; before there are any, those that the data set was published with."""
        if hasattr(self, "data"):
            return {"identities": len(self.data.train.identities), "cameras": len(self.camera_index)}
        layout: Any = self.layout
        while isinstance(layout, functools.partial):
            layout = layout.func
        train = getattr(layout, "published", RGBNT201.published)["train"]
        return {"identities": train.identities, "cameras": train.cameras}

    def unpruned(self, model: nn.Module) -> nn.Module | None:
        if getattr(model, "tokens", None) is None and getattr(model, "inside", None) is None:
            return None
        plain: dict[str, Any] = {"tokens": None, "inside": None}
        if isinstance(model, TriModalReID):  # without a token module these would have no effect, and that is an error
            plain |= {"guide": "pife", "inside_after": 1, "masked_mean": True, "missing_guide": "keep"}
        return self.network(**self._sizes(), **plain)

    def profile_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        height, width = self.eval_transform.size
        images = {m: torch.rand(batch, 3, height, width) for m in MODALITIES}
        return images, torch.zeros(batch, dtype=torch.int64)

    def real_inputs(self, count: int) -> Iterator[tuple[Any, ...]]:
        side, never = self.sides["query"], np.random.default_rng(0)
        for index in range(min(count, len(side))):
            sample = side.sample(index, never)
            yield {m: torch.stack([sample[m]]) for m in MODALITIES}, self._cameras([int(sample["camera"])])  # type: ignore[list-item]

    def profile_scopes(self, model: nn.Module) -> Mapping[str, tuple[str | None, str | None]]:
        scopes: dict[str, tuple[str | None, str | None]] = {"tower's blocks": ("backbone.blocks", "backbone.blocks")}
        for label, part in (("token module", "tokens"), ("token module inside the tower", "inside")):
            if getattr(model, part, None) is not None:
                scopes[label] = (None, part)
        return scopes

    def expected(self) -> Mapping[str, float]:
        return self.published
