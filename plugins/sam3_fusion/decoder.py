"""Query decoder of SAM3: object queries, a presence token, refined boxes and a box bias on image attention.

Carion et al., SAM 3: Segment Anything with Concepts, 2025; facebookresearch/sam3, `TransformerDecoder`.

Axes: b image-prompt pairs, q queries, r rows of queries (q, or 2q while training with one-to-many rows), s the presence
token and the rows together, n = height·width image tokens, l prompt tokens, h heads, e channels of a head, d channels.

One block on y = [presence; rows] (post-norm; u the position of the rows' boxes, zero for the presence token):

    y = LN(y + SA(q = k = y + u, v = y))                      one-to-many rows skip the attention, not the norm
    y = LN(y + CA(q = y + u, k = v = prompt))
    y = LN(y + CA(q = y + u, k = memory + pos, v = memory, bias))
    y = LN(y + W2 relu(W1 y))                                 in fp32 also under autocast

after which o = norm(rows), box' = σ(MLP(o) + logit(box)) and presence logit = MLP(norm(presence)).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from core.layers import Attention, Heads
from core.options import require_idle
from core.registry import register
from plugins.sam3_fusion.boxes import corners, logit
from plugins.sam3_fusion.feed_forward import Activation, BlockwiseFeedForward, Mlp, autocasting, inference
from plugins.sam3_fusion.positions import box_positions
from plugins.sam3_fusion.prompts import check_prompt

BIAS_SCALE = 8.0
PRESENCE_LIMIT = 10.0
LOCAL_SLOPE = 8.0  # how fast the bias falls outside the box at the start "local", in logits a unit of distance


class Bias(NamedTuple):
    """A bias on image attention that is a sum over rows and columns of the grid: bias[i·W + j] = y[i] + x[j]."""

    y: Float[Tensor, "b h s height"]
    x: Float[Tensor, "b h s width"]

    def full(self) -> Float[Tensor, "b h s n"]:
        return rearrange(self.y[..., :, None] + self.x[..., None, :], "b h s i j -> b h s (i j)")


class BoxBias(nn.Module):
    """Bias of a query towards image cells by their place relative to the query's box.

    Δx = (j/W − x0, j/W − x1) from the origin of cell j (not its centre), likewise Δy; "log" maps each difference δ to
    sign(8δ) log2(|8δ| + 1) / log2 8, "linear" keeps it, "both" gives both. A two-layer MLP an axis makes one number a
    head. The decoder feeds boxes without gradient from its second layer on; in the first, the learned anchors get one.
    """

    def __init__(self, dim: int, heads: int, kind: Literal["linear", "log", "both"]):
        super().__init__()
        self.kind = kind
        inputs = 4 if kind == "both" else 2
        self.x, self.y = Mlp(inputs, dim, heads), Mlp(inputs, dim, heads)

    @torch.no_grad()
    def start_local(self) -> None:
        """Let the first two hidden units of each axis say how far a cell lies outside the box, and each head fall with them."""
        for mlp in (self.x, self.y):
            first, last = mlp[0], mlp[1]
            assert isinstance(first, nn.Linear)
            assert isinstance(last, nn.Linear)
            first.weight[:2] = 0
            first.weight[0, -2], first.weight[1, -1] = -1.0, 1.0  # cells before the lower edge, cells beyond the upper one
            first.bias[:2] = 0
            last.weight[:, :2] = -LOCAL_SLOPE

    def forward(self, boxes: Float[Tensor, "b r 4"], size: tuple[int, int], presence: bool) -> Bias:
        """The bias of every row; with `presence`, a zero row for the presence token comes first."""
        x0, y0, x1, y1 = corners(boxes).unbind(-1)
        by_y = self._axis(self.y, torch.stack((y0, y1), dim=-1), size[0])
        by_x = self._axis(self.x, torch.stack((x0, x1), dim=-1), size[1])
        return Bias(F.pad(by_y, (0, 0, 1, 0)), F.pad(by_x, (0, 0, 1, 0))) if presence else Bias(by_y, by_x)

    def _axis(self, mlp: Mlp, edges: Float[Tensor, "b r 2"], cells: int) -> Float[Tensor, "b h r {cells}"]:
        origin = torch.arange(cells, dtype=edges.dtype, device=edges.device) / cells
        delta = rearrange(origin, "i -> i 1") - rearrange(edges, "b r two -> b r 1 two")
        if self.kind != "linear":
            scaled = BIAS_SCALE * delta
            log = torch.sign(scaled) * torch.log2(scaled.abs() + 1) / math.log2(BIAS_SCALE)
            delta = log if self.kind == "log" else torch.cat((delta, log), dim=-1)
        return rearrange(mlp(delta), "b r i h -> b h r i")


class Presence(nn.Module):
    """A token that says whether the prompt is in the image at all."""

    def __init__(self, dim: int, clamp: Literal["none", "hard"]):
        super().__init__()
        self.clamp = clamp
        self.token = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
        self.norm = nn.LayerNorm(dim)
        self.head = Mlp(dim, dim, dim, 1)

    def forward(self, state: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        z = self.head(self.norm(state))[..., 0]
        # release: the result of its clamp is dropped, so its weights were trained and run without one
        return z.clamp(-PRESENCE_LIMIT, PRESENCE_LIMIT) if self.clamp == "hard" else z


class ImageAttention(Attention):
    """Attention to image tokens under a bias that is a sum over grid rows and columns."""

    def look(
        self, query: Float[Tensor, "b s d"], given: Heads, bias: Bias | None, image_pad: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b s d"]:
        """As `attend`; in inference head by head, so that one head's logits are made, normalised and used in the cache."""
        if bias is None or image_pad is not None or not inference() or autocasting(query):
            return self.attend(query, given, image_pad, None if bias is None else bias.full())
        q = self.split(self.q_proj(query)) * given.key.shape[-1] ** -0.5
        batch, heads, rows, _ = q.shape
        out = torch.empty_like(q)
        logits = q.new_empty(rows, given.key.shape[2])
        grid = logits.view(rows, bias.y.shape[-1], bias.x.shape[-1])
        for b in range(batch):
            for h in range(heads):
                torch.add(bias.y[b, h, :, :, None], bias.x[b, h, :, None, :], out=grid)
                logits.addmm_(q[b, h], given.key[b, h].T)
                torch.softmax(logits, dim=-1, out=logits)
                torch.mm(logits, given.value[b, h], out=out[b, h])
        return self.out_proj(rearrange(out, "b h s e -> b s (h e)"))


class DecoderBlock(nn.Module):
    """Self-attention of presence token and queries, attention to the prompt, attention to the image, feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, activation: Activation, prompt_attention: bool):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.prompt_attn = Attention(dim, heads, dropout) if prompt_attention else None
        self.prompt_norm = nn.LayerNorm(dim) if prompt_attention else None
        self.image_attn = ImageAttention(dim, heads, dropout)
        self.image_norm = nn.LayerNorm(dim)
        self.ffn = BlockwiseFeedForward(dim, hidden, dropout, activation)
        self.ffn_norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        y: Float[Tensor, "b s d"],
        u: Float[Tensor, "b s d"],
        seen: int,
        prompt: Float[Tensor, "b l d"],
        pad: Bool[Tensor, "b l"] | None,
        image: Heads,
        bias: Bias | None,
        image_pad: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b s d"]:
        """`seen` is the number of leading rows that take part in the self-attention."""
        among, others = y[:, :seen], y[:, seen:]
        q = among + u[:, :seen]
        among = among + self.drop(self.self_attn(q, q, among))
        y = self.self_norm(torch.cat((among, others), dim=1) if others.shape[1] else among)
        if self.prompt_attn is not None and self.prompt_norm is not None:
            y = self.prompt_norm(y + self.drop(self.prompt_attn(y + u, prompt, prompt, pad)))
        y = self.image_norm(y + self.drop(self.image_attn.look(y + u, image, bias, image_pad)))
        if autocasting(y):
            with torch.autocast(y.device.type, enabled=False):
                return self.ffn_norm(y.float() + self.drop(self.ffn(y.float())))
        return self.ffn_norm(y + self.drop(self.ffn(y)))


def _grid(count: int) -> Float[Tensor, "{count} 4"]:
    """Logits of boxes of a quarter of the side, their centres on rows that cover the image evenly.

    Computed on the CPU whatever device a model is built on: on the meta device there are no numbers to count.
    """
    rows = max(1, round(math.sqrt(count)))
    with torch.device("cpu"):
        index = torch.arange(count)
        row, column = index * rows // count, torch.zeros(count)
        for r in range(rows):
            inside = row == r
            column[inside] = (torch.arange(int(inside.sum())) + 0.5) / inside.sum()
        grid = torch.logit(torch.stack((column, (row + 0.5) / rows, *torch.full((2, count), 0.25)), dim=1))
    return torch.empty_like(grid, device=torch.get_default_device()).copy_(grid)


class Decoded(NamedTuple):
    """What the decoder gives, for every layer.

    Attributes:
        hidden: normalised rows; the first q are one-to-one, the rest (training only) one-to-many.
        boxes: refined boxes (cx, cy, w, h). Their gradient reaches this layer's step and the one before it.
        anchors: the boxes that entered each layer.
        presence: presence logits, None without a presence token.
        presence_state: the presence token after the last layer, not normalised.
    """

    hidden: Float[Tensor, "layers b r d"]
    boxes: Float[Tensor, "layers b r 4"]
    anchors: Float[Tensor, "layers b r 4"]
    presence: Float[Tensor, "layers b"] | None
    presence_state: Float[Tensor, "b d"] | None


@register("module", paper="SAM 3 (arXiv:2511.16719), detector decoder")
class QueryDecoder(nn.Module):
    """Object queries that read an image fused with a prompt, and a presence token beside them.

    Args:
        dim: channels; a multiple of 8 (box codes of four axes).
        heads: attention heads.
        layers: number of blocks.
        hidden: width of the feed-forward networks.
        queries: number of object queries. `keys.more_queries` widens trained weights.
        dropout: dropout of attention weights, branches and hidden layer, in training only.
        activation: of the feed-forward networks.
        box_bias: bias of image attention by box: "log" as built, "linear", "both", or "none".
        presence: have a presence token.
        presence_clamp: "none" as the release runs (it computes a clamp and drops it); "hard" clamps logits to ±10, as
            the Hugging Face port does.
        prompt_attention: let rows and presence token attend to the prompt.
        anchor_start: where learned anchors start: "normal" as built (logits from N(0, 1)), or "grid" (centres spread evenly
            over the image, each a quarter of its side), from which small detectors learn much faster.
        bias_start: where the box bias starts: "xavier" as built (no preference), or "local" (each query looks at its own box;
            in a few hundred steps a small detector learns its boxes from there and not otherwise).
        one_to_many: in training repeat the queries as one-to-many rows, which skip the self-attention.
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
        queries: int = 200,
        dropout: float = 0.1,
        activation: Literal["relu", "gelu"] = "relu",
        box_bias: Literal["none", "linear", "log", "both"] = "log",
        presence: bool = True,
        presence_clamp: Literal["none", "hard"] = "none",
        prompt_attention: bool = True,
        anchor_start: Literal["normal", "grid"] = "normal",
        bias_start: Literal["xavier", "local"] = "xavier",
        one_to_many: bool = True,
        recompute: bool = False,
    ):
        super().__init__()
        if dim % 8:
            raise ValueError(f"dim must be a multiple of 8 (sine codes of four box axes), got {dim}")
        if layers < 1 or queries < 1:
            raise ValueError(f"layers and queries must be at least 1, got layers={layers}, queries={queries}")
        if box_bias not in ("none", "linear", "log", "both"):
            raise ValueError(f"box_bias must be 'none', 'linear', 'log' or 'both', got {box_bias!r}")
        if anchor_start not in ("normal", "grid"):
            raise ValueError(f"anchor_start must be 'normal' or 'grid', got {anchor_start!r}")
        if bias_start not in ("xavier", "local"):
            raise ValueError(f"bias_start must be 'xavier' or 'local', got {bias_start!r}")
        if box_bias == "none":
            require_idle(QueryDecoder, {"bias_start": bias_start}, "box_bias = 'none'")
        if presence_clamp not in ("none", "hard"):
            raise ValueError(f"presence_clamp must be 'none' or 'hard', got {presence_clamp!r}")
        if not presence:
            require_idle(QueryDecoder, {"presence_clamp": presence_clamp}, "presence = False")
        self.dim, self.one_to_many, self.recompute = dim, one_to_many, recompute
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads, hidden, dropout, activation, prompt_attention) for _ in range(layers))
        self.out_norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.anchors = nn.Parameter(torch.randn(queries, 4) if anchor_start == "normal" else _grid(queries))
        self.box_head = Mlp(dim, dim, dim, 4)
        self.box_head.start_at_zero()
        self.box_pos = Mlp(2 * dim, dim, dim)
        self.box_bias = None if box_bias == "none" else BoxBias(dim, heads, box_bias)
        if self.box_bias is not None and bias_start == "local":
            self.box_bias.start_local()
        self.presence = Presence(dim, presence_clamp) if presence else None

    def forward(
        self,
        memory: Float[Tensor, "b n d"],
        size: tuple[int, int],
        prompt: Float[Tensor, "b l d"],
        pad: Bool[Tensor, "b l"] | None = None,
        pos: Float[Tensor, "b n d"] | None = None,
        image_pad: Bool[Tensor, "b n"] | None = None,
        valid_ratio: Float[Tensor, "b 2"] | None = None,
    ) -> Decoded:
        """Read the memory of images fused with prompts.

        Args:
            memory: image tokens of a grid of `size`, row by row.
            size: (height, width) of the grid, Python integers.
            prompt: prompt tokens.
            pad: True at prompt tokens that are padding; a prompt of padding alone leaves the rows as they are there.
            pos: position code of the image tokens, added to the keys.
            image_pad: True at image tokens that are padding.
            valid_ratio: unpadded part of (width, height); scales the boxes in the queries' position code.

        Raises:
            ValueError: if the memory does not have height·width tokens, the prompt has none, or shapes do not fit each other.
        """
        if memory.ndim != 3 or memory.shape[2] != self.dim:
            raise ValueError(f"memory must be (pairs, tokens, dim={self.dim}), got {tuple(memory.shape)}")
        check_prompt(prompt, pad, self.dim)
        if memory.shape[0] != prompt.shape[0]:
            raise ValueError(f"{prompt.shape[0]} prompts for a memory of {memory.shape[0]}: the encoder gives one memory a prompt")
        batch, tokens, _ = memory.shape
        if self.box_bias is not None and tokens != size[0] * size[1]:
            raise ValueError(f"memory has {tokens} tokens and a grid of {size[0]}×{size[1]} has {size[0] * size[1]}")
        lead = 0 if self.presence is None else 1
        seen = lead + self.queries.shape[0]
        copies = 2 if self.one_to_many and self.training else 1
        rows = repeat(self.queries, "q d -> b (copies q) d", b=batch, copies=copies)
        entering = repeat(self.anchors.sigmoid(), "q four -> b (copies q) four", b=batch, copies=copies)
        y = rows if self.presence is None else torch.cat((self.presence.token.expand(batch, 1, -1), rows), dim=1)
        images = self._image_heads(memory, memory if pos is None else memory + pos)

        hidden: list[Tensor] = []
        boxes: list[Tensor] = []
        anchors: list[Tensor] = []
        presence: list[Tensor] = []
        for block, image in zip(self.blocks, images):
            fed = entering.detach() if hidden else entering  # the learned anchors get a gradient through the first layer
            y = self._run(self._layer, block, y, fed, seen, prompt, pad, image, size, image_pad, valid_ratio)
            normed = self.out_norm(y[:, lead:])
            step = self.box_head(normed)
            hidden.append(normed)
            anchors.append(entering)
            boxes.append((step + logit(entering)).sigmoid())
            entering = (step + logit(fed)).sigmoid()
            if self.presence is not None:
                presence.append(self.presence(y[:, 0]))
        return Decoded(
            torch.stack(hidden),
            torch.stack(boxes),
            torch.stack(anchors),
            torch.stack(presence) if presence else None,
            y[:, 0] if presence else None,
        )

    def _layer(
        self,
        block: DecoderBlock,
        y: Float[Tensor, "b s d"],
        fed: Float[Tensor, "b r 4"],
        seen: int,
        prompt: Float[Tensor, "b l d"],
        pad: Bool[Tensor, "b l"] | None,
        image: Heads,
        size: tuple[int, int],
        image_pad: Bool[Tensor, "b n"] | None,
        valid_ratio: Float[Tensor, "b 2"] | None,
    ) -> Float[Tensor, "b s d"]:
        shown = fed if valid_ratio is None else fed * repeat(valid_ratio, "b two -> b 1 (again two)", again=2)
        u = self.box_pos(box_positions(shown, 2 * self.dim))
        if self.presence is not None:
            u = F.pad(u, (0, 0, 1, 0))
        bias = None if self.box_bias is None else self.box_bias(fed, size, self.presence is not None)
        return block(y, u, seen, prompt, pad, image, bias, image_pad)

    def _run(self, part, *inputs):  # type: ignore[no-untyped-def]
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _image_heads(self, values: Float[Tensor, "b n d"], keys: Float[Tensor, "b n d"]) -> list[Heads]:
        """Keys and values of all layers: memory is the same for each, so two wide products take the place of twelve."""
        attentions = [block.image_attn for block in self.blocks if isinstance(block, DecoderBlock)]
        heads = attentions[0].heads

        def project(x: Tensor, linears: list[nn.Linear]) -> Tensor:
            weight, bias = torch.cat([m.weight for m in linears]), torch.cat([m.bias for m in linears])
            if inference() and not autocasting(x):  # channels first: heads come out apart, uncopied
                wide = torch.baddbmm(rearrange(bias, "c -> 1 c 1"), weight.expand(x.shape[0], -1, -1), x.mT)
                return rearrange(wide, "b (layers h e) n -> layers b h n e", layers=len(linears), h=heads)
            return rearrange(
                F.linear(x, weight, bias), "b n (layers h e) -> layers b h n e", layers=len(linears), h=heads
            ).contiguous()

        k, v = project(keys, [a.k_proj for a in attentions]), project(values, [a.v_proj for a in attentions])
        return [Heads(key, value) for key, value in zip(k.unbind(), v.unbind())]
