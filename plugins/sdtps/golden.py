"""Golden cases of the release: the tri-modal selection in its seed, Gumbel and latest versions."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from core.golden import Case, Replay, adapter
from plugins.sdtps import clip_vit
from plugins.sdtps.adaptive_masking import AdaptiveMasking, AdaptiveMaskingKeys
from plugins.sdtps.multimodal import Enhanced, MultiModalSDTPS, ReferenceKeys
from plugins.sdtps.token_aggregation import TokenAggregation
from plugins.sdtps.token_sparse import TokenSparse

# --- the tri-modal module -------------------------------------------------------------------------------------------

MODALITIES = ("rgb", "nir", "tir")


def _floats(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of the named arguments that a case sets, as floats (JSON writes 1.0 as 1)."""
    return {name: float(config[name]) for name in names if name in config}


def release_module(config: dict[str, Any], *, guides_learn: bool) -> MultiModalSDTPS | AdaptiveMasking:
    """The module a release's constructor arguments describe.

    `cross_attn_type` exists in its latest version alone. `use_gumbel` means the straight-through mask with the additive
    penalty of 1e10. Arguments that the release takes and ignores (`num_heads`, and in the latest version also `beta`,
    `aggr_ratio` and the Gumbel switch of its soft mask) are dropped here.

    Args:
        guides_learn: whether the attention scores are computed with gradient (they are not in the seed version).

    Raises:
        ValueError: for an argument no version of the release has.
    """
    known = {
        "embed_dim", "num_patches", "sparse_ratio", "aggr_ratio", "use_gumbel", "gumbel_tau", "beta", "dim_ratio",
        "cross_attn_type", "num_heads", "share_cross_attn",
    }  # fmt: skip
    surplus = sorted(set(config) - known)
    if surplus:
        raise ValueError(f"no version of MultiModalSDTPS has the arguments {', '.join(surplus)}")
    shape = {"dim": config.get("embed_dim", 512), "num_patches": config.get("num_patches", 128), "modalities": MODALITIES}
    if "cross_attn_type" in config:
        passed = _floats(config, "sparse_ratio") | {"maps": config["cross_attn_type"]}
        passed["share_attention"] = bool(config.get("share_cross_attn", False))
        return AdaptiveMasking(**shape, **passed)
    gumbel = bool(config.get("use_gumbel", False))
    selecting = _floats(config, "sparse_ratio", "beta", *(["gumbel_tau"] if gumbel else []))
    combining = _floats(config, "aggr_ratio", "dim_ratio") | {"mask_mode": "additive" if gumbel else "log"}
    return MultiModalSDTPS(
        **shape,
        sparse=functools.partial(TokenSparse, use_gumbel=gumbel, **selecting),
        aggregate=functools.partial(TokenAggregation, **combining),
        attention_no_grad=not guides_learn,
    )


@adapter("MultiModalSDTPS")
def multimodal_sdtps(case: Case) -> Replay:
    module = release_module(case.config, guides_learn=any(name.endswith("_global") for name in case.input_grads))
    keys = AdaptiveMaskingKeys() if isinstance(module, AdaptiveMasking) else ReferenceKeys()
    case.load(module, keys)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        draws = {name: inputs[f"uniform_{name}"] for name in MODALITIES if f"uniform_{name}" in inputs}
        enhanced: Enhanced = module(
            {name: inputs[name] for name in MODALITIES}, {name: inputs[f"{name}_global"] for name in MODALITIES}, draws or None
        )
        return {**enhanced.tokens, **{f"{name}_mask": mask for name, mask in enhanced.masks.items()}}

    return Replay(module, run, keys=keys)


# --- the backbone ---------------------------------------------------------------------------------------------------


@adapter("CLIPVisionTransformer")
def clip_vision_transformer(case: Case) -> Replay:
    """The camera embedding is an input of the case: a (b, 1, c) row for each image, added to the class token."""
    config = case.config
    rows, columns = config["grid"]
    tower = clip_vit.CLIPVisionTransformer(
        image_size=(rows * config["patch"], columns * config["patch"]),
        patch=config["patch"],
        width=config["width"],
        layers=config["layers"],
        heads=config["heads"],
        output_dim=config["output_dim"],
    )
    keys = clip_vit.ReferenceKeys()
    case.load(tower, keys)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        shift = inputs.get("camera_embedding")
        tokens = tower.embed(inputs["x"], None if shift is None else shift[:, 0])
        return {"tokens": tower.project(tower.run(tokens))}

    return Replay(tower, run, keys=keys)
