"""Text-guided RGB-D segmentation: DFormerv2, a Hamburger head, and SAM where it plugs in.

Released code of DFormerv2 with text fusion. SAM acts on the attention output inside backbone blocks (`block`), or on the
features a stage exports (`export`), and on the levels of the decode head. Without text the model is plain DFormerv2.

Axes: b batch, h height, w width, c channels, k classes, t text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from core.export import Part
from core.options import require_idle
from core.registry import register
from plugins.sam.dformer import DFormerv2
from plugins.sam.hamburger import HamburgerHead
from plugins.sam.semantic_alignment import PAD_BELOW, SemanticAlignment

LEVELS = (1, 2, 3)  # stages whose features reach the decode head


def blocks_per_unit(depth: int, dim: int, rule: Literal["main", "seed", "none"]) -> int:
    """How many consecutive blocks of a stage share one encoder SAM.

    `main` is the released rule, `seed` that of the commit which the note describes (size S differs in stage 2, so the
    checkpoints do not fit each other), `none` gives every block its own.
    """
    if rule == "none":
        return 1
    if depth >= 16:
        if rule == "main":
            return 8 if dim >= 448 else 4
        return 4 if dim >= 320 else 2
    return 4 if depth >= 6 and dim >= 640 else 2


@register("model", paper="DFormerv2 with text fusion (released code); SAM attention modes (note)", equations="")
class Segmentor(nn.Module):
    """RGB-D semantic segmentation, guided by text tokens.

    Args:
        classes: number of classes.
        text_dim: width of the text tokens.
        backbone, head, alignment: constructors of the parts. The head is called with `in_dims` and `classes`, the
            alignment with `dim`, `text_dim`, `heads` and `side`.
        encoder_stages: backbone stages with SAM, out of 0 to 3; empty for none.
        decoder_stages: levels of the head with SAM, out of 1 to 3; empty for none. (The release accepts 0, without effect.)
        encoder_placement: `block` changes the attention output inside blocks (the release's "superpower"); `export` only
            what a stage exports, and leaves the trunk alone.
        sam_share: which blocks share an encoder SAM, see `blocks_per_unit`.
        encoder_sam_build: `eager`; or `lazy_upstream`, the fate of export-only modules in the release, which come to life at the
            first forward, after the optimiser was made: both halves exist and nothing of them is ever trained.
        encoder_sam_init: projections of block-internal modules start as `trunc02` (released: the backbone's initialisation
            overwrites SAM's own) or `xavier`.
        create_unused: build the unused half of each SAM too, as the commit which the note describes does.

    Shapes:
        image (b, 3, h, w), depth (b, m, h, w), text as in SemanticAlignment or None -> logits (b, classes, h, w).
    """

    def __init__(
        self,
        classes: int,
        text_dim: int = 512,
        backbone: Callable[..., nn.Module] = DFormerv2,
        head: Callable[..., nn.Module] = HamburgerHead,
        alignment: Callable[..., nn.Module] = SemanticAlignment,
        encoder_stages: tuple[int, ...] = (1, 2, 3),
        decoder_stages: tuple[int, ...] = (1, 2, 3),
        encoder_placement: Literal["block", "export"] = "block",
        sam_share: Literal["main", "seed", "none"] = "main",
        encoder_sam_build: Literal["eager", "lazy_upstream"] = "eager",
        encoder_sam_init: Literal["trunc02", "xavier"] = "trunc02",
        create_unused: bool = False,
    ):
        super().__init__()
        for name, stages, allowed in (("encoder_stages", encoder_stages, (0, 1, 2, 3)), ("decoder_stages", decoder_stages, LEVELS)):
            if not set(stages) <= set(allowed) or len(set(stages)) != len(stages):
                why = "; the head sees stages 1 to 3 only" if name == "decoder_stages" else ""
                raise ValueError(f"{name} must be distinct and out of {allowed}{why}, got {stages}")
        for name, value, options in (
            ("encoder_placement", encoder_placement, ("block", "export")),
            ("sam_share", sam_share, ("main", "seed", "none")),
            ("encoder_sam_build", encoder_sam_build, ("eager", "lazy_upstream")),
            ("encoder_sam_init", encoder_sam_init, ("trunc02", "xavier")),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
        lazy = encoder_sam_build == "lazy_upstream"
        if lazy and encoder_placement == "block":
            raise ValueError("encoder_sam_build='lazy_upstream' concerns export-only modules; set encoder_placement='export'")
        if encoder_placement == "export":
            in_blocks = {"sam_share": sam_share, "encoder_sam_init": encoder_sam_init}
            require_idle(Segmentor, in_blocks, "encoder_placement = 'export' has one module a stage, in no block")
        self.encoder_placement = encoder_placement
        self.text_dim = text_dim
        self.example_size, self.example_tokens = (480, 640), 6  # of the inputs that an export is traced with
        self.backbone = backbone()
        shape: Any = self.backbone  # channels, blocks and heads of its four stages
        dims, depths, heads = shape.dims, shape.depths, shape.heads
        self.head = head(in_dims=[dims[i] for i in LEVELS], classes=classes)

        side = "both" if create_unused or lazy else "encoder"
        self.share = [blocks_per_unit(depth, dim, sam_share) for depth, dim in zip(depths, dims)]
        self.encoder_alignment = nn.ModuleDict()
        for i in sorted(encoder_stages):
            units = math.ceil(depths[i] / self.share[i]) if encoder_placement == "block" else 1
            self.encoder_alignment[str(i)] = nn.ModuleList(
                alignment(dim=dims[i], text_dim=text_dim, heads=heads[i], side=side) for _ in range(units)
            )
        if encoder_placement == "block" and encoder_sam_init == "trunc02":
            for module in self.encoder_alignment.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        if lazy:
            self.encoder_alignment.requires_grad_(False)
        self.decoder_alignment = nn.ModuleDict(
            {
                str(i): alignment(dim=dims[i], text_dim=text_dim, heads=heads[i], side="both" if create_unused else "decoder")
                for i in sorted(decoder_stages)
            }
        )

    def encode(self, image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b m hd wd"], text: Tensor | None) -> list[Tensor]:
        """Backbone features of the four stages, text-guided where encoder SAMs are."""
        if text is None or not len(self.encoder_alignment):
            return self.backbone(image, depth)

        def in_block(x: Tensor, stage: int, block: int) -> Tensor:
            if str(stage) not in self.encoder_alignment:
                return x
            return self.encoder_alignment[str(stage)][block // self.share[stage]](x, text, side="encoder")  # type: ignore[index]

        def on_export(x: Tensor, stage: int) -> Tensor:
            if str(stage) not in self.encoder_alignment:
                return x
            return self.encoder_alignment[str(stage)][0](x, text, side="encoder")  # type: ignore[index]

        if self.encoder_placement == "block":
            return self.backbone(image, depth, after_attention=in_block)
        return self.backbone(image, depth, after_stage=on_export)

    def align_level(self, level: Float[Tensor, "b c h w"], stage: int, text: Tensor | None) -> Float[Tensor, "b c h w"]:
        """A level of the head after its decoder SAM, if it has one."""
        if text is None or str(stage) not in self.decoder_alignment:
            return level
        align = self.decoder_alignment[str(stage)]
        aligned = rearrange(align(rearrange(level, "b c h w -> b h w c"), text, side="decoder"), "b h w c -> b c h w")
        if getattr(align, "missing_text", "") == "upstream":  # the released head bypasses SAM when a whole batch has no text
            return torch.where((text.float().abs().sum(dim=-1) > PAD_BELOW).any(), aligned, level)
        return aligned

    def forward(
        self, image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b m hd wd"], text: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b k h w"]:
        features = self.encode(image, depth, text)
        logits = self.head([self.align_level(features[i], i, text) for i in LEVELS])
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)

    def export_parts(self) -> list[Part]:
        """The whole model at `example_size`, with as many text tokens as `example_tokens`; the batch stays dynamic."""
        device = next(self.parameters()).device
        inputs = {
            "image": torch.rand(2, 3, *self.example_size, device=device),
            "depth": torch.rand(2, 1, *self.example_size, device=device),
        }
        if len(self.encoder_alignment) or len(self.decoder_alignment):
            inputs["text"] = torch.randn(2, self.example_tokens, self.text_dim, device=device)
        return [Part("segmentor", self, inputs, ("logits",), {name: {0: "batch"} for name in inputs})]
