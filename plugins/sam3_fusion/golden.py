"""Golden replay of the fusion modules. The reference is sequence first and has packed projections."""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor

from core.golden import Case, Replay, adapter
from plugins.sam3_fusion.decoder import QueryDecoder
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.keys import OriginalKeys
from plugins.sam3_fusion.scoring import PromptScorer


def _batch_first(x: Tensor) -> Tensor:
    return rearrange(x, "n b d -> b n d")


@adapter("TransformerEncoderFusion")
def fusion_encoder(case: Case) -> Replay:
    config = case.config
    pooled: Literal["none", "mean", "masked"]
    pooled = "none" if not config.get("add_pooled_text", False) else "masked" if config.get("pool_text_with_mask", True) else "mean"
    encoder = FusionEncoder(
        dim=config["dim"],
        heads=config["heads"],
        layers=config["layers"],
        hidden=config["ffn"],
        dropout=0.0,
        activation=config.get("activation", "relu"),
        norm="pre" if config.get("pre_norm", True) else "post",
        pos_in_self=config.get("pos_at_self", True),
        pos_in_prompt_query=config.get("pos_at_cross_queries", False),
        pooled_text=pooled,
    )
    keys = OriginalKeys("encoder.", "transformer.encoder.")
    case.load(encoder, keys)
    height, width = config["feat_size"]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        src, pos = (rearrange(inputs[k], "(h w) b d -> b d h w", h=height, w=width) for k in ("src", "pos"))
        memory = encoder(src, _batch_first(inputs["prompt"]), case.flag("prompt_mask"), pos).memory
        return {"memory": rearrange(memory, "b n d -> n b d")}

    return Replay(encoder, run, keys)


@adapter("TransformerDecoder")
def query_decoder(case: Case) -> Replay:
    config = case.config
    decoder = QueryDecoder(
        dim=config["dim"],
        heads=config["heads"],
        layers=config["layers"],
        hidden=config["ffn"],
        queries=config["num_queries"],
        dropout=0.0,
        activation=config.get("activation", "relu"),
        box_bias=config.get("box_rpb", "log"),
        presence=config.get("presence", True),
        presence_clamp="none",  # the release computes its clamp and drops the result
        prompt_attention=config.get("use_text_cross_attention", True),
        one_to_many=bool(config.get("dac", False)),
    )
    keys = OriginalKeys("decoder.", "transformer.decoder.")
    case.load(decoder, keys)
    height, width = config["feat_size"]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {k: _batch_first(inputs[k]) for k in ("memory", "memory_text", "pos")}
        out = decoder(given["memory"], (height, width), given["memory_text"], case.flag("text_mask"), given["pos"])
        named = {
            "hs": rearrange(out.hidden, "layers b r d -> layers r b d"),
            "reference_boxes": rearrange(out.anchors, "layers b r four -> layers r b four"),
        }
        if out.presence is not None and out.presence_state is not None:
            named["presence_logits"] = rearrange(out.presence, "layers b -> layers 1 b")
            named["presence_feats"] = rearrange(out.presence_state, "b d -> 1 b d")
        return named

    return Replay(decoder, run, keys)


@adapter("DotProductScoring")
def prompt_scorer(case: Case) -> Replay:
    config = case.config
    scorer = PromptScorer(config["dim"], config["ffn"], dropout=0.0, clamp="hard" if config.get("clamp_logits", True) else "none")
    keys = OriginalKeys("scorer.", "dot_prod_scoring.")
    case.load(scorer, keys)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = scorer(inputs["hs"], _batch_first(inputs["prompt"]), case.flag("prompt_mask"))
        return {"scores": rearrange(scores, "layers b r -> layers b r 1")}

    return Replay(scorer, run, keys)
