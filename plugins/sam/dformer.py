"""DFormerv2: an RGB-D backbone whose attention decays with geometric distance, in the image plane and in depth.

Yin et al., DFormerv2: Geometry Self-Attention for RGBD Semantic Segmentation, CVPR 2025 (arXiv 2504.04701), and its released
code. Depth is never encoded: its resized map gives, per stage, the distances of the geometry prior

    G(p, q) = decay_k · (w_s · |p - q|_1 + w_d · |depth_p - depth_q|),    decay_k = ln(1 - 2^(-2 - r·k/K)) < 0

which is added to the attention logits (released code; the paper multiplies the softmax by e^G). w_s and w_d are learned per
block. Stages 0 to 2 attend along rows, then along columns; stage 3 attends in full. The distances depend on the stage
alone, so they are computed once a stage and shared by its blocks.

Axes: b batch, h height, w width (i, j: positions of a query and a key along a row or column), c channels, k heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from core.layers import DropPath
from core.registry import register
from plugins.sam.batch_norm import BatchNorm

AfterAttention = Callable[[Tensor, int, int], Tensor]  # (features b h w c, stage, block) -> features
AfterStage = Callable[[Tensor, int], Tensor]  # (features b h w c, stage) -> features

# Published sizes. The hyper-parameters that do not differ are DFormer's defaults.
SIZES: dict[str, dict[str, tuple]] = {
    "S": {
        "dims": (64, 128, 256, 512),
        "depths": (3, 4, 18, 4),
        "heads": (4, 4, 8, 16),
        "heads_range": (4.0, 4.0, 6.0, 6.0),
        "layer_scale": (None, None, None, None),
    },
    "B": {
        "dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "heads": (5, 5, 10, 16),
        "heads_range": (5.0, 5.0, 6.0, 6.0),
        "layer_scale": (None, None, 1e-6, 1e-6),
    },
    "L": {
        "dims": (112, 224, 448, 640),
        "depths": (4, 8, 25, 8),
        "heads": (7, 7, 14, 20),
        "heads_range": (6.0, 6.0, 6.0, 6.0),
        "layer_scale": (None, None, 1e-6, 1e-6),
    },
}


class Distances(NamedTuple):
    """What the geometry prior of a stage rests on, without any learned weight.

    Attributes:
        place, depth: distances in the image plane and in depth. Full attention: (n, n) and (b, n, n) with n = h·w. Decomposed
            attention, along rows: (w, w) and (b·h, w, w).
        column_place, column_depth: decomposed attention, along columns: (h, h) and (b·w, h, h); else None.
        cos, sin: rotary code of every position, (h, w, d/2).
    """

    place: Tensor
    depth: Tensor
    column_place: Tensor | None
    column_depth: Tensor | None
    cos: Tensor
    sin: Tensor


def resize_depth(
    depth: Float[Tensor, "b m h w"], size: tuple[int, int], mode: Literal["bilinear", "area"]
) -> Float[Tensor, "b i j"]:
    """The first channel of the depth input at a stage's resolution."""
    plane = depth[:, :1].float()
    if mode == "area":
        return F.interpolate(plane, size=size, mode="area")[:, 0]
    return F.interpolate(plane, size=size, mode="bilinear", align_corners=False)[:, 0]


def rotary_angles(
    dim_head: int, index: Literal["raster1d", "axial2d"], size: tuple[int, int], device: torch.device
) -> Float[Tensor, "h w r"]:
    """Rotation angle of each position and channel pair, float32: the raster index reaches 19,199 and half floats do not.

    `raster1d` (released code) numbers positions row by row, so the code jumps at the end of a row; `axial2d` gives half of
    the pairs to the row and half to the column.
    """
    height, width = size
    pairs = dim_head // 2
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    if index == "raster1d":
        speed = 1.0 / (10000 ** torch.linspace(0, 1, pairs, device=device))
        return (rows * width + columns)[..., None] * speed
    speed = 1.0 / (10000 ** torch.linspace(0, 1, pairs // 2, device=device))
    return torch.cat([rows[..., None] * speed, columns[..., None] * speed], dim=-1)


def rotate(x: Float[Tensor, "b h w k d"], cos: Float[Tensor, "h w r"], sin: Float[Tensor, "h w r"]) -> Float[Tensor, "b h w k d"]:
    """Turn each channel pair (0,1), (2,3), … by its angle, in float32."""
    even, odd = rearrange(x.float(), "b h w k (r two) -> two b h w k r", two=2)
    cos, sin = rearrange(cos, "h w r -> h w 1 r"), rearrange(sin, "h w r -> h w 1 r")
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rearrange(turned, "b h w k r two -> b h w k (r two)").to(x.dtype)


def pairwise_distance(values: Float[Tensor, "... n"]) -> Float[Tensor, "... n n"]:
    return (values[..., :, None] - values[..., None, :]).abs()


class GeometryPrior(nn.Module):
    """Learned mix of the distances of one block: decay_k · (w_s · place + w_d · depth).

    Args:
        heads: attention heads, each with its own decay.
        heads_range: r, the spread of decays over the heads.
        decay_start: the 2 of the decay formula.
    """

    decay: Tensor

    def __init__(self, heads: int, heads_range: float, decay_start: float = 2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        exponent = -decay_start - heads_range * torch.arange(heads, dtype=torch.float32) / heads
        self.register_buffer("decay", torch.log(1 - 2**exponent), persistent=False)

    def forward(self, place: Float[Tensor, "i j"], depth: Float[Tensor, "b i j"]) -> Float[Tensor, "b k i j"]:
        mixed = self.weight[0] * place + self.weight[1] * depth
        return rearrange(mixed, "b i j -> b 1 i j") * rearrange(self.decay, "k -> k 1 1")


class GeometryAttention(nn.Module):
    """Geometry self-attention (paper, sec. 3.2): full, or along rows and then columns with shared queries and keys.

    Shapes: (b, h, w, c) -> (b, h, w, c).
    """

    def __init__(self, dim: int, heads: int, *, decomposed: bool, mode: Literal["logit_bias", "post_softmax_product"]):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads}, dim={dim}")
        self.heads, self.decomposed, self.mode = heads, decomposed, mode
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim)
        self.to_value = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.enhance = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)  # locally enhanced positional encoding, on v

    def attend(
        self,
        query: Float[Tensor, "b k i d"],
        key: Float[Tensor, "b k j d"],
        value: Float[Tensor, "b k j d"],
        prior: Float[Tensor, "b k i j"],
    ) -> Float[Tensor, "b k i d"]:
        prior = prior.to(query.dtype)
        if self.mode == "logit_bias":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=prior)
        logits = einsum(query, key, "b k i d, b k j d -> b k i j") * query.shape[-1] ** -0.5
        return einsum(logits.softmax(dim=-1) * prior.exp(), value, "b k i j, b k j d -> b k i d")

    def forward(self, x: Float[Tensor, "b h w c"], distances: Distances, prior: GeometryPrior) -> Float[Tensor, "b h w c"]:
        _, height, width, _ = x.shape
        value = self.to_value(x)
        local = rearrange(self.enhance(rearrange(value, "b h w c -> b c h w")), "b c h w -> b h w c")
        query, key, value = (
            rearrange(y, "b h w (k d) -> b h w k d", k=self.heads) for y in (self.to_query(x), self.to_key(x), value)
        )
        query, key = rotate(query, distances.cos, distances.sin), rotate(key, distances.cos, distances.sin)
        if self.decomposed:
            assert distances.column_place is not None
            assert distances.column_depth is not None
            q, k, v = (rearrange(y, "b h w k d -> (b h) k w d") for y in (query, key, value))
            v = self.attend(q, k, v, prior(distances.place, distances.depth))  # along each row
            v = rearrange(v, "(b h) k w d -> (b w) k h d", h=height)
            q, k = (rearrange(y, "b h w k d -> (b w) k h d") for y in (query, key))
            out = self.attend(q, k, v, prior(distances.column_place, distances.column_depth))  # along each column
            out = rearrange(out, "(b w) k h d -> b h w (k d)", w=width)
        else:
            q, k, v = (rearrange(y, "b h w k d -> b k (h w) d") for y in (query, key, value))
            out = self.attend(q, k, v, prior(distances.place, distances.depth))
            out = rearrange(out, "b k (h w) d -> b h w (k d)", h=height)
        return self.to_out(out + local)


class FeedForward(nn.Module):
    """Two linear maps with a depthwise 3x3 convolution added between them: fc2(z + dw(z)), z = GELU(fc1(x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.shrink = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        z = F.gelu(self.expand(x))
        return self.shrink(z + rearrange(self.local(rearrange(z, "b h w c -> b c h w")), "b c h w -> b h w c"))


class Block(nn.Module):
    """Depthwise position code, geometry self-attention, feed-forward, each with a residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        heads_range: float,
        decay_start: float,
        ffn_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        decomposed: bool,
        mode: Literal["logit_bias", "post_softmax_product"],
    ):
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = GeometryAttention(dim, heads, decomposed=decomposed, mode=mode)
        self.prior = GeometryPrior(heads, heads_range, decay_start)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, int(dim * ffn_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None

    def forward(
        self, x: Float[Tensor, "b h w c"], distances: Distances, align: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """`align` changes the attention output before layer scale and residual."""
        x = x + rearrange(self.position(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")
        attended = self.attention(self.norm1(x), distances, self.prior)
        if align is not None:
            attended = align(attended)
        x = x + self.drop_path(attended if self.gamma1 is None else self.gamma1 * attended)
        fed = self.ffn(self.norm2(x))
        return x + self.drop_path(fed if self.gamma2 is None else self.gamma2 * fed)


class Downsample(nn.Module):
    """Half the resolution, wider: 3x3 convolution of stride 2 and batch norm. (b, h, w, c) -> (b, h/2, w/2, c')."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.reduce = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = BatchNorm(out_dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        return rearrange(self.norm(self.reduce(rearrange(x, "b h w c -> b c h w"))), "b c h w -> b h w c")


class Stage(nn.Module):
    """Blocks at one resolution, which share their distances, and the downsampling that follows."""

    blocks: nn.ModuleList
    downsample: Downsample | None

    def __init__(self, blocks: Sequence[Block], downsample: Downsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


@register("backbone", paper="DFormerv2 (arXiv 2504.04701), sec. 3", equations="geometry prior and geometry self-attention")
class DFormer(nn.Module):
    """DFormerv2 at any size: image and depth to four feature maps at 1/4, 1/8, 1/16 and 1/32. Defaults are size S.

    Args:
        dims, depths, heads: channels, blocks and attention heads of the four stages.
        heads_range: spread r of the decays over the heads, per stage.
        decay_start: first exponent of the decay formula, per stage.
        ffn_ratio: feed-forward width over channels, per stage.
        layer_scale: initial layer scale per stage, None for none.
        drop_path: stochastic depth, rising linearly from 0 to this over all blocks.
        geo_prior_mode: `logit_bias` adds the prior before the softmax (released code); `post_softmax_product`
            multiplies the softmax by e^prior (paper).
        depth_resize: `bilinear` (released code) or `area` (paper: average pooling).
        rope_index: `raster1d` (released code) or `axial2d`, see `rotary_angles`.

    Shapes:
        image (b, 3, h, w), depth (b, m, h, w) of which channel 0 counts -> four maps (b, c_i, h_i, w_i); the last three are
        normalised.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 4, 18, 4),
        heads: tuple[int, ...] = (4, 4, 8, 16),
        heads_range: tuple[float, ...] = (4.0, 4.0, 6.0, 6.0),
        decay_start: tuple[float, ...] = (2.0, 2.0, 2.0, 2.0),
        ffn_ratio: tuple[float, ...] = (4.0, 4.0, 3.0, 3.0),
        layer_scale: tuple[float | None, ...] = (None, None, None, None),
        drop_path: float = 0.0,
        geo_prior_mode: Literal["logit_bias", "post_softmax_product"] = "logit_bias",
        depth_resize: Literal["bilinear", "area"] = "bilinear",
        rope_index: Literal["raster1d", "axial2d"] = "raster1d",
    ):
        super().__init__()
        for name, per_stage in (
            ("dims", dims),
            ("depths", depths),
            ("heads", heads),
            ("heads_range", heads_range),
            ("decay_start", decay_start),
            ("ffn_ratio", ffn_ratio),
            ("layer_scale", layer_scale),
        ):
            if len(per_stage) != 4:
                raise ValueError(f"{name} must have one entry for each of the 4 stages, got {per_stage}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        for name, value, allowed in (
            ("geo_prior_mode", geo_prior_mode, ("logit_bias", "post_softmax_product")),
            ("depth_resize", depth_resize, ("bilinear", "area")),
            ("rope_index", rope_index, ("raster1d", "axial2d")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for dim, n in zip(dims, heads):
            if dim % n or dim // n % (4 if rope_index == "axial2d" else 2):
                raise ValueError(f"channels of a head must be even (a multiple of 4 for axial2d), got dims={dims}, heads={heads}")
        self.dims, self.depths, self.heads = tuple(dims), tuple(depths), tuple(heads)
        self.depth_resize, self.rope_index = depth_resize, rope_index

        half = dims[0] // 2
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, half, 3, stride=2, padding=1), BatchNorm(half), nn.GELU()),
            *(nn.Conv2d(half, half, 3, padding=1), BatchNorm(half), nn.GELU()),
            *(nn.Conv2d(half, dims[0], 3, stride=2, padding=1), BatchNorm(dims[0]), nn.GELU()),
            *(nn.Conv2d(dims[0], dims[0], 3, padding=1), BatchNorm(dims[0])),
        )
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for i in range(4):
            blocks = [
                Block(
                    dims[i],
                    heads[i],
                    heads_range=heads_range[i],
                    decay_start=decay_start[i],
                    ffn_ratio=ffn_ratio[i],
                    drop_path=next(rates),
                    layer_scale=layer_scale[i],
                    decomposed=i < 3,
                    mode=geo_prior_mode,
                )
                for _ in range(depths[i])
            ]
            self.stages.append(Stage(blocks, Downsample(dims[i], dims[i + 1]) if i < 3 else None))
        self.out_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims[1:])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def distances(self, depth: Float[Tensor, "b m h w"], stage: int, size: tuple[int, int]) -> Distances:
        """The distances of a stage whose features are `size` = (h, w)."""
        plane = resize_depth(depth, size, self.depth_resize)
        angles = rotary_angles(self.dims[stage] // self.heads[stage], self.rope_index, size, depth.device)
        rows, columns = (torch.arange(n, dtype=torch.float32, device=depth.device) for n in size)
        if stage < 3:
            return Distances(
                pairwise_distance(columns),
                pairwise_distance(rearrange(plane, "b h w -> (b h) w")),
                pairwise_distance(rows),
                pairwise_distance(rearrange(plane, "b h w -> (b w) h").contiguous()),
                angles.cos(),
                angles.sin(),
            )
        row, column = (rearrange(x, "h w -> (h w)") for x in torch.meshgrid(rows, columns, indexing="ij"))
        place = pairwise_distance(row) + pairwise_distance(column)
        return Distances(place, pairwise_distance(rearrange(plane, "b h w -> b (h w)")), None, None, angles.cos(), angles.sin())

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        depth: Float[Tensor, "b m hd wd"],
        after_attention: AfterAttention | None = None,
        after_stage: AfterStage | None = None,
    ) -> list[Tensor]:
        """Features of the four stages.

        Args:
            image, depth: see the class.
            after_attention: changes the attention output of a block before layer scale and residual: (features, stage, block).
            after_stage: changes the exported features of a stage before their norm, not the trunk: (features, stage).
        """
        if image.shape[-2:] != depth.shape[-2:]:
            raise ValueError(
                f"image is {tuple(image.shape[-2:])} and depth {tuple(depth.shape[-2:])}; they must be aligned, pixel by pixel"
            )
        x = rearrange(self.stem(image), "b c h w -> b h w c")
        features = []
        stage: Stage
        for i, stage in enumerate(self.stages):  # type: ignore[assignment]
            size = (x.shape[1], x.shape[2])
            distances = self.distances(depth, i, size)
            for j, block in enumerate(stage.blocks):
                x = block(x, distances, None if after_attention is None else lambda y, i=i, j=j: after_attention(y, i, j))
            out = x if after_stage is None else after_stage(x, i)
            if i:
                out = self.out_norms[i - 1](out)
            features.append(rearrange(out, "b h w c -> b c h w"))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return features


@register("backbone", paper="DFormerv2 (arXiv 2504.04701), sec. 3", equations="geometry prior and geometry self-attention")
class DFormerv2(DFormer):
    """DFormerv2 at a published size, S, B or L (26.7, 53.9, 95.5 million parameters with the Hamburger head).

    Args:
        size: which published size (`SIZES`).
        drop_path, geo_prior_mode, depth_resize, rope_index: as in DFormer.
    """

    def __init__(
        self,
        size: Literal["S", "B", "L"] = "S",
        drop_path: float = 0.0,
        geo_prior_mode: Literal["logit_bias", "post_softmax_product"] = "logit_bias",
        depth_resize: Literal["bilinear", "area"] = "bilinear",
        rope_index: Literal["raster1d", "axial2d"] = "raster1d",
    ):
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}; sam.DFormer takes any other")
        super().__init__(
            **SIZES[size],
            drop_path=drop_path,
            geo_prior_mode=geo_prior_mode,
            depth_resize=depth_resize,
            rope_index=rope_index,
        )
