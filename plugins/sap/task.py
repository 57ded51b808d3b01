"""The reproduction: train and evaluate few-shot classification in an unseen domain, with purification.

After the SAP release's training script. One domain is held out as target; episodes cross the domains of the others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from core.data import Stream
from core.metrics import few_shot
from core.registry import register
from core.task import DataCard, StepResult, Table, Task
from plugins.sap.augmentation import EvalTransform, TrainTransform
from plugins.sap.datasets import PACS, DomainFolders, DomainImages, Record
from plugins.sap.dual_stream import DualStreamModel, Features
from plugins.sap.episodes import EpisodePlan
from plugins.sap.leakage import pair_cosines
from plugins.sap.linear_probe import linear_probe
from plugins.sap.pacs_sample import pacs_sample
from plugins.sap.separation import separation_ratio

SOURCE, TARGET = 1, 2  # purposes of evaluation episodes: each draws from a stream of its own
LEAK_EPISODES = 100
LOG_SCALE = r"logit_scale_log$"
BRANCHES = ("backbone.intrinsic_encoder.", "intrinsic_supcon_module.")  # the intrinsic branch; all else is the domain branch
UNSEEN = np.random.default_rng(0)  # evaluation transforms draw nothing from it


@register("task", paper="SAP release and design notes")
class FewShot(Task):
    """N-way K-shot classification of known classes in a domain that training never saw.

    Validation draws from held-out images of the source domains, and that is what should select a checkpoint
    (`accuracy[source]`); the release selects on the target. Validation and test episodes depend on `eval_seed` alone.

    Args:
        root: folder of the data set; None generates a sample in PACS's layout and reads that.
        layout: constructor of the data set.
        target: name of the domain that is held out.
        network: constructor of the model, called with `n_domains=`.
        train_transform, eval_transform: constructors of the image transforms.
        plan: constructor of the episodes, called with `records, support_domains, query_domains, part=`.
        classification_weight, domain_weight, intrinsic_contrast_weight, domain_contrast_weight, orthogonality_weight: weights
            of the loss terms.
        split: "identity" keeps held-out images out of training; "none" trains and tests on the same files, as the release does.
        clip_scope: whether the gradient norm is clipped for each branch apart, or over all parameters together (release), which
            couples the branches: a large domain gradient then shortens the intrinsic branch's step.
        own_streams: give dropout, DropBlock and MixStyle of each part a random stream of its own. False draws all from one,
            as the release does, so that switching a part changes the noise of the others.
        no_decay: regular expressions on names of parameters without weight decay.
        eval_episodes: episodes of each evaluation.
        eval_seed: names the evaluation episodes.
        name_target: give the held-out domain's accuracy as `accuracy[target]` too, so that one recipe can select on it whatever `target` is.
        eval_batch: images a forward pass in evaluation.
        workers: loader processes.
        cache: keep decoded images in memory.
        sample_seed: names the generated sample.
        published: published values of this configuration by metric name.
    """

    def __init__(
        self,
        root: str | None = None,
        layout: Callable[..., DomainFolders] = PACS,
        target: str = "sketch",
        network: Callable[..., nn.Module] = DualStreamModel,
        train_transform: Callable[..., Any] = TrainTransform,
        eval_transform: Callable[..., Any] = EvalTransform,
        plan: Callable[..., EpisodePlan] = EpisodePlan,
        classification_weight: float = 1.0,
        domain_weight: float = 0.2,
        intrinsic_contrast_weight: float = 0.3,
        domain_contrast_weight: float = 0.15,
        orthogonality_weight: float = 0.1,
        split: Literal["identity", "none"] = "identity",
        clip_scope: Literal["per_branch", "global"] = "per_branch",
        own_streams: bool = True,
        no_decay: tuple[str, ...] = (LOG_SCALE,),
        eval_episodes: int = 600,
        eval_seed: int = 0,
        name_target: bool = False,
        eval_batch: int = 100,
        workers: int = 0,
        cache: bool = False,
        sample_seed: int = 0,
        published: dict[str, float] | None = None,
    ):
        self.weights = {
            "class": classification_weight, "domain": domain_weight, "intrinsic_contrast": intrinsic_contrast_weight,
            "domain_contrast": domain_contrast_weight, "orthogonality": orthogonality_weight,
        }  # fmt: skip
        if min(self.weights.values()) < 0 or classification_weight == 0:
            raise ValueError(f"loss weights must be 0 or more and classification_weight above 0, got {self.weights}")
        if split not in ("identity", "none") or clip_scope not in ("per_branch", "global"):
            raise ValueError(
                f"split must be 'identity' or 'none' and clip_scope 'per_branch' or 'global', got {split!r}, {clip_scope!r}"
            )
        if eval_episodes < 1 or eval_batch < 1:
            raise ValueError(f"eval_episodes and eval_batch must be at least 1, got {eval_episodes} and {eval_batch}")
        self.root, self.layout, self.target, self.network, self.plan = root, layout, target, network, plan
        self.train_transform, self.eval_transform = train_transform(), eval_transform()
        self.split, self.clip_scope, self.own_streams, self.no_decay = split, clip_scope, own_streams, tuple(no_decay)
        self.eval_episodes, self.eval_seed, self.eval_batch = eval_episodes, eval_seed, eval_batch
        self.name_target, self.workers, self.cache, self.sample_seed = name_target, workers, cache, sample_seed
        self.published = dict(published or {})
        self.seed = 0

    # --- data

    def prepare(self, workspace: Path) -> DataCard:
        sample = self.root is None
        root = workspace / "samples" / f"pacs-{self.sample_seed}" if sample else Path(str(self.root))
        if sample:
            pacs_sample(str(root), seed=self.sample_seed)
        self.data = self.layout(root=str(root))
        if self.target not in self.data.domains:
            raise ValueError(f"target must be a domain of {self.data.title} ({', '.join(self.data.domains)}), got {self.target!r}")
        target = self.data.domains.index(self.target)
        sources = [d for d in range(len(self.data.domains)) if d != target]
        self.target_domain, self.sources = target, sources
        overlap: dict[str, Any] = {"part": "all", "disjoint_identity": False}
        self.episodes = self.plan(
            self.data.records, sources, sources, **({"part": "train"} if self.split == "identity" else overlap)
        )
        unseen = {"part": "held_out"} if self.split == "identity" else overlap
        self.validation = self.plan(self.data.records, sources, sources, **unseen)
        self.test = self.plan(self._as_unseen(target), sources, [target], **unseen)
        self.train = DomainImages(self.data, self.train_transform, cache=self.cache)
        self.images = DomainImages(self.data, self.eval_transform)
        self.images._kept = self.train._kept  # one copy of decoded pixels
        name = f"{self.data.title} layout, generated sample" if self.data.sample else self.data.title
        return DataCard(name, str(root), self.data.fingerprint(), self.data.sample, self.data.counts())

    def _as_unseen(self, target: int) -> list[Record]:
        """The records, those of the target marked held out where its identities are nobody else's: training sees none of them."""
        if not self.data.single_domain:
            return list(self.data.records)
        return [dataclasses.replace(r, held_out=True) if r.domain == target else r for r in self.data.records]

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        self.seed = seed
        return Stream(self.train, self.episodes, seed, workers=self.workers).batches(start)

    def steps_per_epoch(self) -> int:
        return self.episodes.batches_per_epoch()

    # --- model and losses

    def model(self) -> nn.Module:
        model = self.network(n_domains=len(self.data.domains))
        self._names = [name for name, _ in model.named_parameters()]
        return model

    def parameter_rules(self) -> Sequence[tuple[str, Mapping[str, float]]]:
        scaled = any(name.endswith("logit_scale_log") for name in self._names)
        return [(pattern, {"weight_decay": 0.0}) for pattern in self.no_decay if scaled or pattern != LOG_SCALE]

    def clip_groups(self, model: nn.Module) -> Mapping[str, Iterable[nn.Parameter]]:
        if self.clip_scope == "global":
            return {"all": model.parameters()}
        named = list(model.named_parameters())
        return {
            "intrinsic": [p for n, p in named if n.startswith(BRANCHES)],
            "domain": [p for n, p in named if not n.startswith(BRANCHES)],
        }

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        output = model(
            batch["image"], batch["class"], batch["domain"], shape=self.episodes.shape,
            epoch=(step - 1) // self.steps_per_epoch(), noise=(self.seed, step) if self.own_streams else None,
        )  # fmt: skip
        losses = {name: self.weights[name] * value for name, value in output.losses.items() if self.weights[name]}
        return StepResult(losses, output.monitors)

    # --- evaluation

    def _features(self, model: nn.Module, indices: Iterable[int]) -> tuple[Features, dict[int, int]]:
        """Features of the wanted images on the model's device, and the row of each index. No batch statistics: one pass serves all."""
        wanted = sorted(set(indices))
        device = next(model.parameters()).device
        parts: list[Features] = []
        for first in range(0, len(wanted), self.eval_batch):
            images = torch.stack([self.images.sample(i, UNSEEN)["image"] for i in wanted[first : first + self.eval_batch]])
            parts.append(model(images.to(device)))
        features = Features(torch.cat([p.intrinsic.float() for p in parts]), torch.cat([p.domain.float() for p in parts]))
        return features, {index: row for row, index in enumerate(wanted)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        pools = {"source": (self.validation, SOURCE), self.target: (self.test, TARGET)}
        drawn = {name: plan.fixed(self.eval_episodes, self.eval_seed, purpose) for name, (plan, purpose) in pools.items()}
        features, row = self._features(model, (i for episodes in drawn.values() for episode in episodes for i in episode))
        metrics: dict[str, float] = {}
        for name, (plan, _) in pools.items():
            values = [self._episode_accuracy(model, plan, features, [row[i] for i in episode]) for episode in drawn[name]]
            metrics.update(few_shot.interval(values).metrics(f"accuracy[{name}]"))
        if self.name_target:
            metrics["accuracy[target]"] = metrics[f"accuracy[{self.target}]"]
        metrics.update(self._leakage(model, drawn[self.target][:LEAK_EPISODES], features, row))
        seen = sorted({i for episode in drawn[self.target] for i in episode if self.data.records[i].domain == self.target_domain})
        names, classes = self._class_labels(seen, features.intrinsic.device).unique(return_inverse=True)
        metrics["separation"] = float(separation_ratio(features.intrinsic[[row[i] for i in seen]], classes, len(names)))
        return metrics

    def _episode_accuracy(self, model: Any, plan: EpisodePlan, features: Features, rows: list[int]) -> float:
        shape = plan.shape
        intrinsic = features.intrinsic[rows]
        labels = shape.labels(intrinsic.device)
        logits, _ = model.prototype_head(
            intrinsic[shape.support :], intrinsic[: shape.support], labels[: shape.support], n_way=shape.n_way
        )
        return few_shot.accuracy(logits, labels[shape.support :])

    def _class_labels(self, indices: Sequence[int], device: torch.device) -> Tensor:
        return torch.tensor([self.data.records[i].cls for i in indices], device=device)

    def _domain_labels(self, indices: Sequence[int], device: torch.device) -> Tensor:
        return torch.tensor([self.data.records[i].domain for i in indices], device=device)

    def _leakage(self, model: Any, episodes: list[list[int]], features: Features, row: dict[int, int]) -> dict[str, float]:
        """Leak index on raw and purified domain features and on the contrastive head, and what attention does, over episodes."""
        found: dict[str, list[Tensor]] = {}
        shape = self.test.shape
        for episode in episodes:
            rows = [row[i] for i in episode]
            domain, intrinsic = features.domain[rows], features.intrinsic[rows]
            labels = shape.labels(domain.device)
            classes, domains = self._class_labels(episode, domain.device), self._domain_labels(episode, domain.device)
            result = model.purify(
                domain, intrinsic, torch.arange(shape.support, device=domain.device), labels[: shape.support], shape.n_way
            )
            spaces = {"raw": domain}
            if result is not None:
                spaces["purified"] = result.purified
                for name in ("attn_entropy", "attn_max", "logit_scale", "gate"):
                    found.setdefault(f"{name}[{self.target}]", []).append(result.monitors[name])
            if model.domain_supcon_module is not None:
                spaces["head"] = model.domain_supcon_module.projection_head(spaces.get("purified", domain))
            for name, space in spaces.items():
                found.setdefault(f"leak[{name}]", []).append(pair_cosines(space, classes, domains).leak_index)
        return {name: float(torch.stack(values).mean()) for name, values in found.items()}

    def conclude(self, model: nn.Module) -> dict[str, float]:
        """Linear probes for class and domain on raw and purified features, and the raw-pixel prototypes on the test episodes.

        Purified features here are those of one fixed set of anchors, the training images of all classes in the source domains,
        so that every image has one. Probes are fitted on training identities of all domains and scored on held-out ones.
        """
        assert isinstance(model, DualStreamModel)
        records = self.data.records
        everything = range(len(records))
        features, _ = self._features(model, everything)
        device = features.domain.device
        anchors = [i for i in everything if not records[i].held_out and records[i].domain in self.sources]
        result = model.purify(
            features.domain,
            features.intrinsic,
            torch.tensor(anchors, device=device),
            self._class_labels(anchors, device),
            len(self.data.classes),
        )
        spaces = {"raw": features.domain, "intrinsic": features.intrinsic}
        if result is not None:
            spaces["purified"] = result.purified
        held = torch.tensor([r.held_out for r in records], device=device)
        metrics: dict[str, float] = {}
        for what, labels in (
            ("class", self._class_labels(everything, device)),
            ("domain", self._domain_labels(everything, device)),
        ):
            for name, space in spaces.items():
                probe = linear_probe(space[~held], labels[~held], space[held], labels[held])
                metrics[f"probe/{what}[{name}]"] = probe.accuracy
                metrics[f"probe/{what}[majority]"] = probe.majority
        metrics.update(few_shot.interval(self._pixel_accuracies()).metrics(f"pixels[{self.target}]"))
        return metrics

    def _pixel_accuracies(self) -> list[float]:
        """Nearest prototype of the raw 16 x 16 pixels, on the test episodes."""
        episodes = self.test.fixed(self.eval_episodes, self.eval_seed, TARGET)
        wanted = sorted({i for episode in episodes for i in episode})
        small = [Image.fromarray(self.images.pixels(i)).resize((16, 16), Image.Resampling.BILINEAR) for i in wanted]
        pixels = torch.tensor(np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small]))
        row = {index: position for position, index in enumerate(wanted)}
        shape = self.test.shape
        labels = shape.labels(torch.device("cpu"))
        accuracies = []
        for episode in episodes:
            rows = pixels[[row[i] for i in episode]]
            support = rows[: shape.support].reshape(shape.n_way, shape.k_shot, -1).mean(1)
            logits = -torch.cdist(rows[shape.support :], support)
            accuracies.append(few_shot.accuracy(logits, labels[shape.support :]))
        return accuracies

    # --- for people

    def tables(self, metrics: Mapping[str, float]) -> list[Table]:
        def both(name: str) -> list[Any]:
            return [metrics.get(name), metrics.get(f"{name} ±")]

        shape = self.test.shape
        rows = [
            [f"{self.target} (unseen domain)", *both(f"accuracy[{self.target}]")],
            ["source domains, held-out images", *both("accuracy[source]")],
            [f"{self.target}, nearest prototype of raw pixels", *both(f"pixels[{self.target}]")],
        ]
        note = (
            f"{shape.n_way}-way {shape.k_shot}-shot, {shape.n_query} queries a class, {self.eval_episodes} episodes; ± is the 95 % interval "
            f"over episodes of this one model. Chance {1 / shape.n_way:.3f}."
        )
        tables = [Table("accuracy", ("queries from", "accuracy", "±"), rows, note)]
        spaces = [s for s in ("raw", "purified", "head", "intrinsic") if f"leak[{s}]" in metrics or f"probe/class[{s}]" in metrics]
        if spaces:
            held = [[s, *(metrics.get(f"{k}[{s}]") for k in ("leak", "probe/class", "probe/domain"))] for s in spaces]
            held.append(["majority label", None, metrics.get("probe/class[majority]"), metrics.get("probe/domain[majority]")])
            tables.append(
                Table(
                    "what the domain features hold",
                    ("features", "leak index", "class probe", "domain probe"),
                    held,
                    "Leak index: cosine across domains of equal minus different classes. Probes: linear, on held-out identities.",
                )
            )
        names = [f"{k}[{self.target}]" for k in ("attn_entropy", "attn_max", "logit_scale", "gate")]
        if names[0] in metrics:
            tables.append(
                Table(
                    "purification in test episodes",
                    ("entropy (nats)", "largest share", "scale", "gate", "separation"),
                    [[*(metrics[n] for n in names), metrics["separation"]]],
                    f"Uniform attention: entropy {np.log(shape.n_way):.4f}, share {1 / shape.n_way:.3f}.",
                )
            )
        return tables

    def pictures(self, model: nn.Module, folder: Path) -> None:
        """`episode.png`: one test episode, a column a class; support above, queries below, framed green where recognised."""
        assert isinstance(model, DualStreamModel)
        episode = self.test.fixed(1, self.eval_seed, TARGET)[0]
        shape = self.test.shape
        training = model.training
        model.eval()
        with torch.inference_mode():
            features, row = self._features(model, episode)
            intrinsic = features.intrinsic[[row[i] for i in episode]]
            labels = shape.labels(intrinsic.device)
            logits, _ = model.prototype_head(
                intrinsic[shape.support :], intrinsic[: shape.support], labels[: shape.support], n_way=shape.n_way
            )
        model.train(training)
        right = (logits.argmax(-1) == labels[shape.support :]).tolist()
        tile, gap, head = 72, 5, 20
        shown = min(shape.n_query, 8)
        sheet = Image.new(
            "RGB",
            (
                gap + shape.n_way * 2 * (tile + gap) + gap * shape.n_way,
                2 * head + (-(-shape.k_shot // 2) + -(-shown // 2)) * (tile + gap),
            ),
            "white",
        )
        draw = ImageDraw.Draw(sheet)
        for way in range(shape.n_way):
            left = gap + way * (2 * (tile + gap) + gap)
            draw.text((left, 4), self.data.classes[self.data.records[episode[way * shape.k_shot]].cls], fill="black")
            top = head
            for start, count, frames in (
                (way * shape.k_shot, shape.k_shot, None),
                (shape.support + way * shape.n_query, shown, right),
            ):
                for n in range(count):
                    place = (left + n % 2 * (tile + gap), top + n // 2 * (tile + gap))
                    sheet.paste(Image.fromarray(self.images.pixels(episode[start + n])).resize((tile, tile)), place)
                    if frames is not None:
                        colour = "#1a9850" if frames[start - shape.support + n] else "#d73027"
                        draw.rectangle(
                            (place[0] - 2, place[1] - 2, place[0] + tile + 1, place[1] + tile + 1), outline=colour, width=3
                        )
                top += -(-count // 2) * (tile + gap) + head // 2
        sheet.save(folder / "episode.png")

    # --- for the profiler

    def blueprint(self) -> nn.Module:
        return self.model() if hasattr(self, "data") else self.network(n_domains=len(PACS.domains))

    def profile_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        return (torch.rand(batch, 3, self.eval_transform.size, self.eval_transform.size),)

    def real_inputs(self, count: int) -> Iterator[tuple[Any, ...]]:
        targets = (i for i, record in enumerate(self.data.records) if record.domain == self.target_domain)
        for index in itertools.islice(targets, count):
            yield (self.images.sample(index, UNSEEN)["image"][None],)

    def expected(self) -> Mapping[str, float]:
        return self.published
