"""Fusion encoder of SAM3: image tokens that attend to each other and to a prompt.

Carion et al., SAM 3: Segment Anything with Concepts, 2025; facebookresearch/sam3, `TransformerEncoderFusion`.

Axes: b images (or image-prompt pairs), n image tokens, l prompt tokens, d channels, v feature levels.

One block, as built (pre-norm; t the prompt, p the position code):

    x = x + SA(q = k = LN(x) + p, v = LN(x))       the value carries no position
    x = x + CA(q = LN(x), k = v = t)               no position on either side
    x = x + W2 relu(W1 LN(x))

There is no norm after the last block. The first self-attention sees no prompt: `image_state` computes it once for an
image, and `fuse` continues from it for each prompt, with equal results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.layers import Attention
from core.registry import register
from plugins.sam3_fusion.feed_forward import Activation, BlockwiseFeedForward
from plugins.sam3_fusion.positions import cell_positions
from plugins.sam3_fusion.prompts import check_prompt

Size = tuple[int, int]


class ImageState(NamedTuple):
    """What the encoder knows of images before it sees a prompt: tokens after the first block's self-attention."""

    tokens: Float[Tensor, "b n d"]
    pos: Float[Tensor, "b n d"]
    image_pad: Bool[Tensor, "b n"] | None
    sizes: tuple[Size, ...]
    valid_ratios: Float[Tensor, "b v 2"]

    def select(self, images: Int[Tensor, " p"]) -> ImageState:
        """The states of the images at these indices, one for each prompt, in order."""
        pad = None if self.image_pad is None else self.image_pad[images]
        return ImageState(self.tokens[images], self.pos[images], pad, self.sizes, self.valid_ratios[images])


class Fused(NamedTuple):
    """What the encoder gives.

    Attributes:
        memory: image tokens fused with the prompt.
        pos: their position code.
        image_pad: True at padded tokens, None if there are none.
        sizes: (height, width) of every feature level, in order of its tokens.
        valid_ratios: unpadded part of (width, height) of every level.
    """

    memory: Float[Tensor, "b n d"]
    pos: Float[Tensor, "b n d"]
    image_pad: Bool[Tensor, "b n"] | None
    sizes: tuple[Size, ...]
    valid_ratios: Float[Tensor, "b v 2"]

    @property
    def level_starts(self) -> tuple[int, ...]:
        """Index of the first token of every level."""
        starts = [0]
        for height, width in self.sizes[:-1]:
            starts.append(starts[-1] + height * width)
        return tuple(starts)


class FusionBlock(nn.Module):
    """Self-attention of image tokens, attention to the prompt, feed-forward."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        dropout: float,
        activation: Activation,
        norm: Literal["pre", "post"],
        pos_in_self: bool,
        pos_in_prompt_query: bool,
    ):
        super().__init__()
        self.norm, self.pos_in_self, self.pos_in_prompt_query = norm, pos_in_self, pos_in_prompt_query
        self.self_attn = Attention(dim, heads, dropout)
        self.prompt_attn = Attention(dim, heads, dropout)
        self.ffn = BlockwiseFeedForward(dim, hidden, dropout, activation)
        self.self_norm, self.prompt_norm, self.ffn_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def look(self, x: Float[Tensor, "b n d"], pos: Float[Tensor, "b n d"], image_pad: Bool[Tensor, "b n"] | None) -> Tensor:
        """The part that does not depend on the prompt."""
        n = self.self_norm(x) if self.norm == "pre" else x
        qk = n + pos if self.pos_in_self else n
        x = x + self.drop(self.self_attn(qk, qk, n, image_pad))
        return x if self.norm == "pre" else self.self_norm(x)

    def read(
        self,
        x: Float[Tensor, "b n d"],
        pos: Float[Tensor, "b n d"],
        prompt: Float[Tensor, "b l d"],
        pad: Bool[Tensor, "b l"] | None,
    ) -> Tensor:
        """The part that does."""
        n = self.prompt_norm(x) if self.norm == "pre" else x
        q = n + pos if self.pos_in_prompt_query else n
        x = x + self.drop(self.prompt_attn(q, prompt, prompt, pad))
        if self.norm == "post":
            x = self.prompt_norm(x)
            return self.ffn_norm(x + self.drop(self.ffn(x)))
        return x + self.drop(self.ffn(self.ffn_norm(x)))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        pos: Float[Tensor, "b n d"],
        image_pad: Bool[Tensor, "b n"] | None,
        prompt: Float[Tensor, "b l d"],
        pad: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b n d"]:
        return self.read(self.look(x, pos, image_pad), pos, prompt, pad)


@register("module", paper="SAM 3 (arXiv:2511.16719), fusion encoder")
class FusionEncoder(nn.Module):
    """Image tokens fused with a prompt. Works on any grid, batch first, and changes none of its inputs.

    Args:
        dim: channels of image features, prompt and output.
        heads: attention heads.
        layers: number of blocks.
        hidden: width of the feed-forward networks.
        dropout: dropout of attention weights, branches and hidden layer, in training only.
        activation: of the feed-forward networks.
        norm: "pre" as built; "post" normalises after each residual.
        pos_in_self: add the position code to queries and keys of the self-attention.
        pos_in_prompt_query: add it to the queries of the prompt attention (not built so).
        pooled_text: add a projected mean of the prompt to the image features first: "none" as built, "mean" over all
            prompt tokens, "masked" over the unpadded ones (an all-padding prompt adds the projection's bias).
        levels: number of feature levels; with more than one a learned level code is added to the position code.
        recompute: save memory in training by computing blocks again in the backward pass.

    Raises:
        ValueError: for a value outside its range; the message names parameter and rule.
    """

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        layers: int = 6,
        hidden: int = 2048,
        dropout: float = 0.1,
        activation: Literal["relu", "gelu"] = "relu",
        norm: Literal["pre", "post"] = "pre",
        pos_in_self: bool = True,
        pos_in_prompt_query: bool = False,
        pooled_text: Literal["none", "mean", "masked"] = "none",
        levels: int = 1,
        recompute: bool = False,
    ):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4 (sine codes of two axes), got {dim}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        if pooled_text not in ("none", "mean", "masked"):
            raise ValueError(f"pooled_text must be 'none', 'mean' or 'masked', got {pooled_text!r}")
        self.dim, self.pooled_text, self.levels, self.recompute = dim, pooled_text, levels, recompute
        self.blocks = nn.ModuleList(
            FusionBlock(dim, heads, hidden, dropout, activation, norm, pos_in_self, pos_in_prompt_query) for _ in range(layers)
        )
        if pooled_text != "none":
            self.pool_proj = nn.Linear(dim, dim)
            nn.init.xavier_uniform_(self.pool_proj.weight)
        if levels > 1:
            self.level_embed = nn.Parameter(nn.init.xavier_uniform_(torch.empty(levels, dim)))

    def forward(
        self,
        features: Float[Tensor, "b d h w"] | Sequence[Tensor],
        prompt: Float[Tensor, "p l d"],
        pad: Bool[Tensor, "p l"] | None = None,
        pos: Float[Tensor, "_ d h w"] | Sequence[Tensor] | None = None,
        image_pad: Bool[Tensor, "b h w"] | Sequence[Tensor] | None = None,
    ) -> Fused:
        """Fuse images with prompts.

        Args:
            features: image features, one map or a sequence of `levels` maps, finest first.
            prompt: prompt tokens. As many prompts as images, or any number for one image.
            pad: True at prompt tokens that are padding. A prompt of padding alone leaves the image to itself.
            pos: position codes in the shape of `features`; the sine code of the cells if None.
            image_pad: True at cells that are padding, in the spatial shape of `features`.

        Raises:
            ValueError: if shapes do not fit, or the prompt has no token at all.
        """
        check_prompt(prompt, pad, self.dim)
        if self.pooled_text != "none":
            features, image_pad = self._with_pooled_text(features, prompt, pad, image_pad)
        return self.fuse(self._look(features, pos, image_pad), prompt, pad)

    def image_state(
        self,
        features: Float[Tensor, "b d h w"] | Sequence[Tensor],
        pos: Float[Tensor, "_ d h w"] | Sequence[Tensor] | None = None,
        image_pad: Bool[Tensor, "b h w"] | Sequence[Tensor] | None = None,
    ) -> ImageState:
        """All that does not depend on the prompt, to be computed once for an image and handed to `fuse` for each prompt.

        Raises:
            ValueError: with pooled text, where nothing is independent of the prompt.
        """
        if self.pooled_text != "none":
            raise ValueError(
                f"pooled_text={self.pooled_text!r} puts the prompt into the image features; call forward for each prompt"
            )
        return self._look(features, pos, image_pad)

    def fuse(self, state: ImageState, prompt: Float[Tensor, "p l d"], pad: Bool[Tensor, "p l"] | None = None) -> Fused:
        """Continue from `image_state` with a prompt for each image, or with several prompts for one image."""
        x, pos, image_pad, sizes, ratios = state
        count = prompt.shape[0]
        check_prompt(prompt, pad, self.dim)
        if x.shape[0] != count:
            _check_count(x.shape[0], count)
            x, pos, ratios = x.expand(count, -1, -1), pos.expand(count, -1, -1), ratios.expand(count, -1, -1)
            image_pad = None if image_pad is None else image_pad.expand(count, -1)
        first, *others = self.blocks
        x = self._run(first.read, x, pos, prompt, pad)
        for block in others:
            x = self._run(block, x, pos, image_pad, prompt, pad)
        return Fused(x, pos, image_pad, sizes, ratios)

    def _run(self, part, *inputs):  # type: ignore[no-untyped-def]
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _with_pooled_text(
        self,
        features: Tensor | Sequence[Tensor],
        prompt: Float[Tensor, "p l d"],
        pad: Bool[Tensor, "p l"] | None,
        image_pad: Tensor | Sequence[Tensor] | None,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Features with each prompt's mean, and the padding of as many images: one image with several prompts becomes several."""
        maps, count = _as_levels(features), prompt.shape[0]
        for level in maps:
            if level.shape[0] != count:
                _check_count(level.shape[0], count)
        if self.pooled_text == "mean" or pad is None:
            pooled = reduce(prompt, "p l d -> p d", "mean")
        else:
            valid = rearrange((~pad).to(prompt.dtype), "p l -> p l 1")
            pooled = (prompt * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
        cells = None if image_pad is None else [c.expand(count, -1, -1) if c.shape[0] == 1 else c for c in _as_levels(image_pad)]
        # out of place: a cached feature map must not collect prompts
        return [level + rearrange(self.pool_proj(pooled), "p d -> p d 1 1") for level in maps], cells

    def _look(
        self,
        features: Tensor | Sequence[Tensor],
        pos: Tensor | Sequence[Tensor] | None,
        image_pad: Tensor | Sequence[Tensor] | None,
    ) -> ImageState:
        maps = _as_levels(features)
        if len(maps) != self.levels:
            raise ValueError(f"features has {len(maps)} levels and the encoder was built for levels={self.levels}")
        codes = [None] * len(maps) if pos is None else _as_levels(pos)
        pads = [None] * len(maps) if image_pad is None else _as_levels(image_pad)
        if len(codes) != len(maps) or len(pads) != len(maps):
            raise ValueError(f"pos ({len(codes)}) and image_pad ({len(pads)}) need one entry for each of {len(maps)} levels")
        tokens, positions, padding, ratios, sizes = [], [], [], [], []
        for level, (x, code, cells) in enumerate(zip(maps, codes, pads)):
            if x.ndim != 4 or x.shape[1] != self.dim:
                raise ValueError(f"features must be (batch, dim={self.dim}, height, width), got {tuple(x.shape)}")
            batch, _, height, width = x.shape
            if code is None:
                code = cell_positions(height, width, self.dim, like=x)[None]
            if code.shape[1:] != x.shape[1:] or code.shape[0] not in (1, batch):
                raise ValueError(f"pos must have the shape of features {tuple(x.shape)}, got {tuple(code.shape)}")
            p = rearrange(code, "b d h w -> b (h w) d").expand(batch, -1, -1)
            if self.levels > 1:
                p = p + self.level_embed[level]
            if cells is None:
                ratios.append(x.new_ones(batch, 2))
                cells = torch.zeros((), dtype=torch.bool, device=x.device).expand(batch, height, width)
            else:
                if cells.shape != (batch, height, width):
                    raise ValueError(f"image_pad must be {(batch, height, width)}, got {tuple(cells.shape)}")
                seen_x, seen_y = (~cells[:, 0, :]).sum(dim=1) / width, (~cells[:, :, 0]).sum(dim=1) / height
                ratios.append(torch.stack((seen_x, seen_y), dim=-1).to(x.dtype))
            tokens.append(rearrange(x, "b d h w -> b (h w) d"))
            positions.append(p)
            padding.append(rearrange(cells, "b h w -> b (h w)"))
            sizes.append((height, width))
        x, p = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        cells_pad = None if image_pad is None else torch.cat(padding, dim=1)
        x = self._run(self.blocks[0].look, x, p, cells_pad)
        return ImageState(x, p, cells_pad, tuple(sizes), torch.stack(ratios, dim=1))


def _check_count(images: int, prompts: int) -> None:
    if images != 1:
        raise ValueError(f"{prompts} prompts for {images} images: give one each, or choose images with ImageState.select")


def _as_levels(maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps)
