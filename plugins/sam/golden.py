"""Golden cases of the release: SAM, both sides, and the DFormerv2 backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from core.golden import Case, Replay, adapter
from plugins.sam.dformer import DFormer
from plugins.sam.released_weights import AlignmentKeys, BackboneKeys
from plugins.sam.semantic_alignment import SemanticAlignment

# Every switch of SemanticAlignment that makes it compute what the release computes. `gin/sam/release.gin` binds the same.
RELEASE: dict[str, Any] = {
    "clamp_logit": 2.0,
    "clamp_policy": "value_clamp",
    "temp_param": "log_of_init",
    "cosine_sqrt_dk": True,
    "cosine_norm_scope": "per_head",
    "residual_source": "normed",
    "ffn_norm_placement": "post",
    "missing_text": "upstream",
    "pad_trim": "prefix",
    "shared_text_layout": "upstream",
}


def release_alignment(config: Mapping[str, Any]) -> SemanticAlignment:
    """A SemanticAlignment in release mode, from the release's own constructor arguments."""
    known = {
        "query_dim", "text_dim", "top_m", "use_topk", "attn_drop", "proj_drop", "ffn_drop", "add_residual", "gate_channels",
        "alpha_init", "clamp_logit", "num_heads", "gamma_scale", "decoder_use_cosine", "decoder_learnable_temp",
        "decoder_logit_scale_init", "encoder_use_cosine", "encoder_learnable_temp", "encoder_logit_scale_init", "mode",
    }  # fmt: skip
    surplus = sorted(set(config) - known)
    if surplus:
        raise ValueError(f"SemanticAlignmentModule has no argument {', '.join(surplus)}")
    passed = {k: v for k, v in config.items() if k.endswith(("_use_cosine", "_learnable_temp"))}
    passed |= {
        k: float(v) for k, v in config.items() if k.endswith(("_drop", "_init", "_scale")) or k == "clamp_logit"
    }  # fmt: skip
    if "add_residual" in config:
        passed["add_residual"] = config["add_residual"]
    if not passed.get("decoder_learnable_temp", True) and not passed.get("encoder_learnable_temp", False):
        passed.pop("clamp_logit", None)  # the release takes a bound that binds nothing; ours refuses other ones than its own
    return SemanticAlignment(
        dim=config["query_dim"],
        text_dim=config.get("text_dim", 512),
        heads=config.get("num_heads", 1),
        side=config.get("mode", "both"),
        top_m=config.get("top_m", 5) if config.get("use_topk", True) else None,
        **{**RELEASE, **passed},
    )


@adapter("SemanticAlignmentModule")
def semantic_alignment(case: Case) -> Replay:
    module = release_alignment(case.config)
    side = case.meta.get("side", "decoder")
    if not case.formula_filled:
        case.params.setdefault("gamma_scale", module.gamma_scale)  # type: ignore[arg-type]
    case.load(module, AlignmentKeys())
    return Replay(module, lambda inputs: {"y": module(inputs["visual"], inputs["text"], side=side)}, keys=AlignmentKeys())


@adapter("DFormerv2")
def dformer(case: Case) -> Replay:
    c = case.config
    scales = c.get("layerscales", [False] * 4)
    init = float(c.get("layer_init_values", 1e-6))
    module = DFormer(
        dims=tuple(c["embed_dims"]),
        depths=tuple(c["depths"]),
        heads=tuple(c["num_heads"]),
        heads_range=tuple(map(float, c["heads_ranges"])),
        decay_start=tuple(map(float, c["init_values"])),
        ffn_ratio=tuple(map(float, c["mlp_ratios"])),
        layer_scale=tuple(init if scaled else None for scaled in scales),
        drop_path=float(c.get("drop_path_rate", 0.0)),
    )
    case.load(module, BackboneKeys())

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"stage{i}": y for i, y in enumerate(module(inputs["x"], inputs["depth"]))}

    return Replay(module, run, keys=BackboneKeys())
