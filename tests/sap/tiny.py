"""A tiny SAP task on real files: seven classes of striped images in four colour casts."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core import optim, record, trainer
from plugins.sap.augmentation import EvalTransform, TrainTransform
from plugins.sap.contrastive import DomainSupCon, IntrinsicSupCon
from plugins.sap.datasets import PACS
from plugins.sap.domain_classifier import DomainClassifier
from plugins.sap.domain_encoder import StyleStatDomainEncoder
from plugins.sap.dual_stream import DualStreamModel
from plugins.sap.episodes import EpisodePlan
from plugins.sap.intrinsic_encoder import IntrinsicEncoder
from plugins.sap.purification import SemanticAnchorPurification
from plugins.sap.task import FewShot

WIDTHS = (8, 8, 16, 16)
Encoder = partial(IntrinsicEncoder, WIDTHS)


def images(root: Path, per_cell: int = 10) -> Path:
    """Stripes whose direction is the class, on a tint that is the domain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:24, 0:24]
    for d, domain in enumerate(PACS.domains):
        tint = np.array([1.0, 0.4 + 0.2 * d, 1.0 - 0.25 * d])
        for c, cls in enumerate(PACS.classes):
            (root / domain / cls).mkdir(parents=True)
            for n in range(per_cell):
                wave = np.sin(0.9 * (x * np.cos(c * 0.45) + y * np.sin(c * 0.45)) + rng.uniform(0, 6))
                pixels = (110 + 70 * wave)[..., None] * tint + rng.normal(0, 15, (24, 24, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / domain / cls / f"{n}.png")
    return root


def task(root: Path, purification=SemanticAnchorPurification, **options):
    """Constructor of the task."""
    network = partial(
        DualStreamModel, intrinsic=Encoder, purification=purification, joint_forward=options.pop("joint_forward", True)
    )
    return partial(
        FewShot,
        str(root),
        layout=partial(PACS, holdout=0.5),
        network=network,
        train_transform=partial(TrainTransform, 24),
        eval_transform=partial(EvalTransform, 24),
        plan=partial(EpisodePlan, n_way=3, k_shot=2, n_query=3, episodes=4),
        **{"eval_episodes": 10, "cache": True, **options},
    )


def silent_task(root: Path):
    """Constructor of the task without any noise, on episodes that divide over two processes."""
    network = partial(
        DualStreamModel,
        intrinsic=partial(IntrinsicEncoder, WIDTHS, drop_rate=0.0, mixstyle=0.0),
        domain=partial(StyleStatDomainEncoder, token_dropout=0.0),
        classifier=partial(DomainClassifier, dropout=0.0),
        purification=partial(SemanticAnchorPurification, dropout=0.0),
        intrinsic_contrast=partial(IntrinsicSupCon, dropout=0.0),
        domain_contrast=partial(DomainSupCon, dropout=0.0),
    )
    return partial(task(root), network=network, plan=partial(EpisodePlan, n_way=3, k_shot=2, n_query=2, episodes=4))


def train(folder: Path, constructor, steps: int = 4, writes: bool = True, **options):
    """Train with the project's trainer; returns outcome, model and task."""
    built = []
    with record.RunFolder(folder, writes=writes, chatty=False) as run:
        outcome = trainer.train(
            run,
            lambda work, model: built.extend([model, work]),
            task=constructor,
            optimizer=partial(optim.SGD, lr=0.05, nesterov=True, weight_decay=5e-4),
            **{"steps": steps, "device": "cpu", "clip_norm": 1.0, **options},
        )
    return outcome, *built


def intrinsic_weights(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("backbone.intrinsic_encoder", "intrinsic_supcon"))}
