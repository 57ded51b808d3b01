"""A detector around the fusion modules: a small vision trunk, prompt tokens, encoder, decoder and scorer.

Axes: b images, p image-prompt pairs, l prompt tokens, t channels of the text encoder, c channels of the trunk, d channels
of the fusion, h and w cells, r rows, s side of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from core.export import Part
from core.layers import TransformerBlock
from core.registry import register
from plugins.sam3_fusion.decoder import QueryDecoder
from plugins.sam3_fusion.export import fusion_parts
from plugins.sam3_fusion.fusion_encoder import Fused, FusionEncoder
from plugins.sam3_fusion.prompts import check_prompt
from plugins.sam3_fusion.scoring import PromptScorer


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm x))))), 3×3, group norm: nothing couples the images of a batch."""

    def __init__(self, channels: int):
        super().__init__()
        groups = 8 if channels % 8 == 0 else 1
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.relu(norm(y)))
        return x + y


@register("backbone", paper="a small residual network; stands in for SAM 3's image encoder")
class ConvTrunk(nn.Module):
    """Image to features at an eighth of its size.

    Args:
        width: channels of the first stage; doubled in the second, `channels` in the third.
        channels: of the output.
        depth: residual blocks of each of the three stages.

    Raises:
        ValueError: for a width, channels or depth below 1 (depth may be 0).
    """

    stride = 8

    def __init__(self, width: int = 32, channels: int = 128, depth: int = 1):
        super().__init__()
        if width < 1 or channels < 1 or depth < 0:
            raise ValueError(f"want width and channels of at least 1 and depth of at least 0, got {width}, {channels}, {depth}")
        self.channels = channels
        stages: list[nn.Module] = []
        before = 3
        for after in (width, 2 * width, channels):
            stages.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            stages.extend(ResidualBlock(after) for _ in range(depth))
            before = after
        self.stages = nn.Sequential(*stages)

    def forward(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        return self.stages(image)


@register("backbone", paper="ViT (Dosovitskiy et al., ICLR 2021) at the size of SAM 3's image encoder")
class ViTTrunk(nn.Module):
    """A plain vision transformer: patches, learned positions, pre-norm blocks with global attention, a last norm.

    SAM 3's encoder of the same depth and width attends within windows in most of its layers and has rotary positions, so its
    weights do not fit in here and its attention costs less.

    Args:
        dim: channels of the tokens and of the output.
        layers: number of blocks.
        heads: attention heads; divides `dim`.
        patch: side of a patch in pixels.
        cells: patches along a side of the image.

    Raises:
        ValueError: for a number below 1, or images of another size than `cells` patches a side.
    """

    def __init__(self, dim: int = 1024, layers: int = 32, heads: int = 16, patch: int = 14, cells: int = 72):
        super().__init__()
        if min(dim, layers, heads, patch, cells) < 1:
            raise ValueError(
                f"dim, layers, heads, patch and cells must be at least 1, got {dim}, {layers}, {heads}, {patch}, {cells}"
            )
        self.channels, self.stride, self.cells = dim, patch, cells
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(cells * cells, dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        if image.shape[-1] != self.cells * self.stride:
            raise ValueError(f"the trunk reads images of {self.cells * self.stride} pixels a side, got {image.shape[-1]}")
        x = rearrange(self.patches(image), "b c h w -> b (h w) c") + self.positions
        return rearrange(self.norm(self.blocks(x)), "b (h w) c -> b c h w", h=self.cells)


def with_coordinates(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b more h w"]:
    """Two channels more: x and y of each cell's centre, from -1 to 1."""
    b, _, h, w = x.shape
    across = (torch.arange(w, dtype=x.dtype, device=x.device) * 2 + 1) / w - 1
    down = (torch.arange(h, dtype=x.dtype, device=x.device) * 2 + 1) / h - 1
    return torch.cat((x, across.expand(b, 1, h, w), rearrange(down, "h -> h 1").expand(b, 1, h, w)), dim=1)


class PromptTokens(nn.Module):
    """Text vectors to prompt tokens, and one learned token after them that is always there.

    SAM3's prompt ends in a geometry token that exists without any box too, so that no prompt is all padding. (The Hugging
    Face port leaves it out without boxes, which changes scores.)
    """

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(text_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.token = nn.Parameter(torch.randn(dim))

    def forward(
        self, tokens: Float[Tensor, "p l t"], pad: Bool[Tensor, "p l"]
    ) -> tuple[Float[Tensor, "p more d"], Bool[Tensor, "p more"]]:
        prompt = self.norm(self.proj(tokens))
        prompt = torch.cat((prompt, self.token.expand(prompt.shape[0], 1, -1)), dim=1)
        return prompt, F.pad(pad, (0, 1), value=False)


class Prompted(NamedTuple):
    """Image tokens fused with prompts, and the prompts as the encoder read them."""

    fused: Fused
    prompt: Float[Tensor, "p more d"]
    pad: Bool[Tensor, "p more"]


class Detected(NamedTuple):
    """What a detector gives, for every decoder layer.

    Attributes:
        scores: query logits, without presence.
        boxes: (cx, cy, w, h) in parts of the image.
        presence: logits, None without a presence token.
        queries: number of one-to-one rows, which come first; the rest are one-to-many rows of training.
        cells: logit of each image token that a named thing covers it, None without a cell head.
    """

    scores: Float[Tensor, "layers p r"]
    boxes: Float[Tensor, "layers p r 4"]
    presence: Float[Tensor, "layers p"] | None
    queries: int
    cells: Float[Tensor, "p h w"] | None = None


@register("model", paper="SAM 3 (arXiv:2511.16719), detector without masks, at any size", denylist=["text_dim", "side"])
class PromptedDetector(nn.Module):
    """Detect what a text names, in any number of image-prompt pairs; each image passes the trunk once.

    Args:
        text_dim: width of the text vectors.
        side: side of the square input image in pixels; a multiple of the trunk's stride.
        trunk, encoder, decoder, scorer: constructors of the parts. Encoder, decoder and scorer share one width.
        cell_head: have a linear head on the fused image tokens that says which of them a named thing covers: what SAM3's
            semantic head does on a finer grid. Detection does not use it; a small detector that starts from nothing learns
            to compare image and prompt many times faster when every token is told (see `DetectionLoss.cell_weight`).

    Raises:
        ValueError: if widths differ or `side` does not fit the trunk.
    """

    trunk: Any

    def __init__(
        self,
        text_dim: int,
        side: int = 64,
        trunk: Callable[..., nn.Module] = ConvTrunk,
        encoder: Callable[..., FusionEncoder] = FusionEncoder,
        decoder: Callable[..., QueryDecoder] = QueryDecoder,
        scorer: Callable[..., PromptScorer] = PromptScorer,
        cell_head: bool = False,
    ):
        super().__init__()
        self.trunk = trunk()
        self.encoder, self.decoder, self.scorer = encoder(), decoder(), scorer()
        dim = self.encoder.dim
        widths = {"encoder": dim, "decoder": self.decoder.dim, "scorer": self.scorer.prompt_proj.in_features}
        if len(set(widths.values())) > 1:
            raise ValueError("encoder, decoder and scorer need one dim, got " + ", ".join(f"{k} {v}" for k, v in widths.items()))
        if side % self.trunk.stride:
            raise ValueError(f"side must be a multiple of the trunk's stride {self.trunk.stride}, got {side}")
        self.side, self.text_dim = side, text_dim
        self.neck = nn.Conv2d(self.trunk.channels + 2, dim, 1)
        self.prompt = PromptTokens(text_dim, dim)
        self.cell_head = nn.Linear(dim, 1) if cell_head else None

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the feature map."""
        return (self.side // self.trunk.stride,) * 2

    def features(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d h w"]:
        """What fusion sees of images: trunk features and the cells' coordinates, mixed.

        Fusion adds position codes to keys and queries only, so values carry a place only if the features do. A vision
        transformer's features do by its own position embedding; here the neck gives them their coordinates.
        """
        return self.neck(with_coordinates(self.trunk(image)))

    def forward(
        self,
        image: Float[Tensor, "b 3 s s"],
        tokens: Float[Tensor, "p l t"],
        pad: Bool[Tensor, "p l"],
        image_of: Int[Tensor, " p"],
    ) -> Detected:
        """Detect.

        Args:
            image: normalised images.
            tokens: text vectors of each pair's prompt.
            pad: True where a token is padding.
            image_of: image of each pair.

        Raises:
            ValueError: if shapes do not fit each other or the detector.
        """
        return self.read(self.features(image), tokens, pad, image_of)

    def read(
        self,
        features: Float[Tensor, "b d h w"],
        tokens: Float[Tensor, "p l t"],
        pad: Bool[Tensor, "p l"],
        image_of: Int[Tensor, " p"],
    ) -> Detected:
        """Everything after the trunk and neck."""
        return self.detect(self.fuse(features, tokens, pad, image_of))

    def fuse(
        self,
        features: Float[Tensor, "b d h w"],
        tokens: Float[Tensor, "p l t"],
        pad: Bool[Tensor, "p l"],
        image_of: Int[Tensor, " p"],
    ) -> Prompted:
        """Image tokens fused with each pair's prompt; what does not depend on the prompt is computed once an image."""
        check_prompt(tokens, pad, self.text_dim, "tokens")
        if image_of.shape != tokens.shape[:1]:
            raise ValueError(f"image_of must be {tuple(tokens.shape[:1])}, one image for each prompt, got {tuple(image_of.shape)}")
        prompt, pad = self.prompt(tokens, pad)
        if self.encoder.pooled_text == "none":
            fused = self.encoder.fuse(self.encoder.image_state(features).select(image_of), prompt, pad)
        else:
            fused = self.encoder(features[image_of], prompt, pad)
        return Prompted(fused, prompt, pad)

    def detect(self, given: Prompted) -> Detected:
        """Decoder, scorer and cell head on what `fuse` gave."""
        fused, prompt, pad = given
        out = self.decoder(fused.memory, fused.sizes[0], prompt, pad, fused.pos)
        cells = None
        if self.cell_head is not None:
            cells = rearrange(self.cell_head(fused.memory), "p (h w) 1 -> p h w", h=fused.sizes[0][0])
        return Detected(self.scorer(out.hidden, prompt, pad), out.boxes, out.presence, self.decoder.queries.shape[0], cells)

    def export_parts(self) -> Sequence[Part]:
        """Parts for `core.export`: the image side (trunk and neck), encoder, decoder, scorer."""

        class ImageSide(nn.Module):
            def __init__(self, trunk: nn.Module, neck: nn.Module):
                super().__init__()
                self.trunk, self.neck = trunk, neck

            def forward(self, image: Tensor) -> Tensor:
                return self.neck(with_coordinates(self.trunk(image)))

        example = torch.randn(2, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        image = Part("image", ImageSide(self.trunk, self.neck), {"image": example}, ("features",), {"image": {0: "batch"}})
        prompt = Part(
            "prompt", self.prompt,
            {"tokens": torch.randn(2, 4, self.text_dim, generator=torch.Generator().manual_seed(1)), "pad": torch.tensor([[False] * 4, [True] * 4])},
            ("prompt", "prompt_pad"), {"tokens": {0: "batch", 1: "tokens"}, "pad": {0: "batch", 1: "tokens"}},
        )  # fmt: skip
        return [image, prompt, *fusion_parts(self.encoder, self.decoder, self.scorer, self.grid)]
