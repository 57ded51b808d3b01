"""Golden adapters: the SAP release's modules, rebuilt from a case's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.golden import Case, Replay, adapter, formula
from plugins.sap.contrastive import DomainSupCon, IntrinsicSupCon
from plugins.sap.domain_encoder import StyleStatDomainEncoder
from plugins.sap.intrinsic_encoder import IntrinsicEncoder
from plugins.sap.purification import SemanticAnchorPurification

# Options of the release that choose nothing here: a switched-off part we do not have, and two names of one layer.
INERT = {"trainable_delta_kernel": (False,), "norm": ("gn", "ln"), "use_mixstyle": (True, False)}


def options(case: Case, config: Mapping[str, Any]) -> dict[str, Any]:
    """A case's configuration without what is inert here.

    Raises:
        ValueError: if an inert option asks for something.
    """
    for name, allowed in INERT.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{case.path.name}: {name} = {config[name]!r} is not built here; allowed: {allowed}")
    return {name: value for name, value in config.items() if name not in INERT}


@adapter("SemanticAnchorPurification")
def purification(case: Case) -> Replay:
    """Support rows come first in a case: n_way * k_shot of them."""
    patch2 = "logit_scale_log" not in case.params
    module = SemanticAnchorPurification(
        scale_mode="fixed_sqrt" if patch2 else "learned",
        detach_anchors="semantic" not in case.input_grads,
        cap_mode="inward" if patch2 else "hard",
        row_max_shift=not patch2,
        **options(case, case.config),
    )
    case.load(module)
    n_way, support = case.meta["n_way"], case.meta["n_way"] * case.meta["k_shot"]
    replay = Replay(module, run=lambda inputs: {}, stats={})

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        semantic = inputs["semantic"]
        out = module(inputs["domain"], semantic, semantic[:support], inputs["labels"][:support], n_way=n_way)
        replay.stats = {name: float(value) for name, value in out.monitors.items()}
        return {"purified": out.purified, "attention": out.attention, "orthogonal_loss": out.orthogonal_loss}

    replay.run = run
    return replay


@adapter("IntrinsicEncoder")
def intrinsic_encoder(case: Case) -> Replay:
    """The feature map before pooling."""
    module = IntrinsicEncoder(**options(case, case.config))
    case.load(module)
    return Replay(module, lambda inputs: {"map": module(inputs["x"])})


@adapter("StyleStatDomainEncoder")
def domain_encoder(case: Case) -> Replay:
    """Filled by the formula; scale and gain keys are 1 + 0.1 of it. The constants are compared with the stored buffers."""
    module = StyleStatDomainEncoder(**options(case, case.config))

    def fill(key: str, value: Tensor) -> Tensor:
        return 1 + 0.1 * value if key.endswith(("scale", "gain")) else value

    case.load(module, fill=fill)
    ours = dict(module.named_buffers())
    for name, theirs in case.params.items():
        key = name.removeprefix("buffer/")
        worst = float((ours[key] - theirs).abs().max())
        if worst > 1e-6:
            raise ValueError(f"{case.path.name}: buffer {key} differs from the reference by {worst:.3g}")
    return Replay(module, lambda inputs: {"y": module(inputs["x"])})


@adapter("SupConLosses")
def contrastive_losses(case: Case) -> Replay:
    """Both losses, each filled from its own keys; gradients are of their sum."""
    losses = torch.nn.ModuleDict(
        {"intrinsic": IntrinsicSupCon(**case.meta["intrinsic"]), "domain": DomainSupCon(**case.meta["domain"])}
    )
    for name, loss in losses.items():
        expected = {key: tuple(shape) for key, shape in case.meta[f"keys_{name}"]}
        found = {key: tuple(value.shape) for key, value in loss.state_dict().items()}
        if expected != found:
            raise ValueError(f"{case.path.name}: keys of the {name} loss are {found}, the reference's {expected}")
        loss.load_state_dict({key: formula(key, shape) for key, shape in expected.items()})
    epoch = case.meta["epoch"]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = inputs["class_labels"], inputs["domain_labels"]
        return {
            "intrinsic_loss": losses["intrinsic"](inputs["intrinsic_features"], *labels, epoch).loss,
            "domain_loss": losses["domain"](inputs["domain_features"], *labels, epoch).loss,
        }

    # Gradients of parameters are in no case, and reported under no key.
    return Replay(losses, run, loss=lambda out: out["intrinsic_loss"] + out["domain_loss"], params={})
