"""The fusion modules as parts for `core.export`: encoder, decoder and scorer, each tensors in and tensors out.

Batch and prompt length stay dynamic; the grid is fixed per export (its size enters as Python integers and becomes
constants: position codes and the cell origins of the box bias). Only what detection needs leaves the decoder: its last
layer. Trunk and text encoder export apart from these.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from core.export import Part
from plugins.sam3_fusion.decoder import QueryDecoder
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.positions import cell_positions
from plugins.sam3_fusion.scoring import PromptScorer


class EncoderPart(nn.Module):
    """Image features and a prompt to memory."""

    def __init__(self, encoder: FusionEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(
        self, features: Float[Tensor, "b d h w"], prompt: Float[Tensor, "b l d"], pad: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b n d"]:
        return self.encoder(features, prompt, pad).memory


class DecoderPart(nn.Module):
    """Memory and a prompt to rows, boxes (cx, cy, w, h) and presence logit of the last layer."""

    def __init__(self, decoder: QueryDecoder, size: tuple[int, int]):
        super().__init__()
        self.decoder, self.size = decoder, size

    def forward(
        self, memory: Float[Tensor, "b n d"], prompt: Float[Tensor, "b l d"], pad: Bool[Tensor, "b l"]
    ) -> tuple[Tensor, ...]:
        pos = rearrange(cell_positions(*self.size, self.decoder.dim, like=memory), "d h w -> 1 (h w) d")
        out = self.decoder(memory, self.size, prompt, pad, pos.expand(memory.shape[0], -1, -1))
        last = (out.hidden[-1], out.boxes[-1])
        return last if out.presence is None else (*last, out.presence[-1])


class ScorerPart(nn.Module):
    """Rows and a prompt to logits."""

    def __init__(self, scorer: PromptScorer):
        super().__init__()
        self.scorer = scorer

    def forward(
        self, hidden: Float[Tensor, "b q d"], prompt: Float[Tensor, "b l d"], pad: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b q"]:
        return self.scorer(hidden[None], prompt, pad)[0]


def fusion_parts(
    encoder: FusionEncoder, decoder: QueryDecoder, scorer: PromptScorer, size: tuple[int, int], prompt: int = 5
) -> list[Part]:
    """Encoder, decoder and scorer for images of a grid of `size`.

    Args:
        encoder, decoder, scorer: trained modules of one width.
        size: (height, width) of the grid.
        prompt: tokens of the example prompt; one of its two rows is all padding, so that this case is checked too.

    Raises:
        ValueError: for modules of different width, or an encoder with several levels.
    """
    if encoder.dim != decoder.dim or scorer.prompt_proj.in_features != decoder.dim:
        raise ValueError(
            f"encoder, decoder and scorer need one width, got {encoder.dim}, {decoder.dim}, {scorer.prompt_proj.in_features}"
        )
    if encoder.levels != 1:
        raise ValueError(f"the decoder reads one level, got an encoder with levels={encoder.levels}")
    dim, (height, width) = decoder.dim, size
    random = torch.Generator().manual_seed(0)

    def example(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    pad = torch.zeros(2, prompt, dtype=torch.bool)
    pad[0, 1:], pad[1] = True, True
    shared = {"prompt": example(2, prompt, dim), "pad": pad}
    axes = {"prompt": {0: "batch", 1: "tokens"}, "pad": {0: "batch", 1: "tokens"}}
    boxes = ("hidden", "boxes") if decoder.presence is None else ("hidden", "boxes", "presence")
    return [
        Part(
            "encoder", EncoderPart(encoder), {"features": example(2, dim, height, width), **shared}, ("memory",),
            {"features": {0: "batch"}, **axes},
        ),
        Part(
            "decoder", DecoderPart(decoder, size), {"memory": example(2, height * width, dim), **shared}, boxes,
            {"memory": {0: "batch"}, **axes},
        ),
        Part(
            "scorer", ScorerPart(scorer), {"hidden": example(2, decoder.queries.shape[0], dim), **shared}, ("scores",),
            {"hidden": {0: "batch"}, **axes},
        ),
    ]  # fmt: skip
