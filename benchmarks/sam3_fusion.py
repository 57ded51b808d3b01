"""CPU cost of the SAM3 fusion modules against the same mathematics in the released order, in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/sam3_fusion.py

The other side is written from the published description: `nn.MultiheadAttention` (packed projections, no weights
returned), a sequence-first decoder, one key and value projection of the image a layer, and a box bias that is summed,
flattened, permuted and then extended by the presence row. Both sides get the same weights through the key maps and have
to give the same numbers before anything is timed. fp32, 72×72 tokens, 33 prompt tokens, 200 queries, one image,
evaluation. Figures are ratios of CPU seconds; the two sides run in turn and each keeps its best.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

SIDE, PROMPT, QUERIES, DIM, HEADS, FFN, LAYERS = 72, 33, 200, 256, 8, 2048, 6
LIMITS = {"encoder": 1.0, "decoder": 0.75, "further prompt": 0.90}


class ReleasedEncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True)
        self.cross_attn_image = nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(DIM, FFN), nn.Linear(FFN, DIM)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(0.1) for _ in range(4))

    def forward(self, x: Tensor, pos: Tensor, prompt: Tensor, pad: Tensor) -> Tensor:
        n = self.norm1(x)
        q = k = n + pos
        x = x + self.dropout1(self.self_attn(q, k, value=n, need_weights=False)[0])
        n = self.norm2(x)
        x = x + self.dropout2(self.cross_attn_image(n, prompt, prompt, key_padding_mask=pad, need_weights=False)[0])
        n = self.norm3(x)
        return x + self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(n)))))


class ReleasedEncoder(nn.Module):
    """Sequence first outside, batch first inside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReleasedEncoderLayer() for _ in range(LAYERS))

    def forward(self, src: Tensor, pos: Tensor, prompt: Tensor, pad: Tensor) -> Tensor:
        x, p, t = src.transpose(0, 1), pos.transpose(0, 1), prompt.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, p, t, pad)
        return x.transpose(0, 1)


class Mlp(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if i < len(self.layers) - 1 else layer(x)
        return x


class ReleasedDecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.ca_text, self.cross_attn = (nn.MultiheadAttention(DIM, HEADS, dropout=0.1) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(DIM, FFN), nn.Linear(FFN, DIM)
        self.norm1, self.norm2, self.norm3, self.catext_norm = (nn.LayerNorm(DIM) for _ in range(4))

    def forward(
        self, x: Tensor, pos: Tensor, prompt: Tensor, pad: Tensor, memory: Tensor, memory_pos: Tensor, bias: Tensor
    ) -> Tensor:
        q = k = x + pos
        x = self.norm2(x + self.self_attn(q, k, x, need_weights=False)[0])
        x = self.catext_norm(x + self.ca_text(x + pos, prompt, prompt, key_padding_mask=pad, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + pos, memory + memory_pos, memory, attn_mask=bias, need_weights=False)[0])
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


def logit(x: Tensor, eps: float = 1e-3) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class ReleasedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReleasedDecoderLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.bbox_embed = Mlp(DIM, DIM, DIM, 4)
        self.query_embed, self.reference_points = nn.Embedding(QUERIES, DIM), nn.Embedding(QUERIES, 4)
        self.boxRPB_embed_x, self.boxRPB_embed_y = Mlp(2, DIM, HEADS), Mlp(2, DIM, HEADS)
        self.presence_token = nn.Embedding(1, DIM)
        self.presence_token_head, self.presence_token_out_norm = Mlp(DIM, DIM, DIM, 1), nn.LayerNorm(DIM)
        self.ref_point_head = Mlp(2 * DIM, DIM, DIM)

    @staticmethod
    def sine(boxes: Tensor) -> Tensor:
        k = torch.arange(128, dtype=torch.float32)
        frequency = 10000 ** (2 * (k // 2) / 128)
        codes = []
        for axis in (1, 0, 2, 3):
            angle = boxes[:, :, axis, None] * 2 * math.pi / frequency
            codes.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=3).flatten(2))
        return torch.cat(codes, dim=2)

    def bias(self, boxes: Tensor, h: int, w: int) -> Tensor:
        cx, cy, bw, bh = boxes.transpose(0, 1).unbind(-1)
        corners = torch.stack((cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2), -1)
        b, q = corners.shape[:2]
        ys, xs = torch.arange(h, dtype=torch.float32) / h, torch.arange(w, dtype=torch.float32) / w
        dy = ys.view(1, -1, 1) - corners.reshape(-1, 1, 4)[:, :, 1:4:2]
        dx = xs.view(1, -1, 1) - corners.reshape(-1, 1, 4)[:, :, 0:3:2]
        dy, dx = dy.view(b, q, -1, 2) * 8, dx.view(b, q, -1, 2) * 8
        dy = torch.sign(dy) * torch.log2(dy.abs() + 1.0) / math.log2(8)
        dx = torch.sign(dx) * torch.log2(dx.abs() + 1.0) / math.log2(8)
        by, bx = self.boxRPB_embed_y(dy), self.boxRPB_embed_x(dx)
        both = (by.unsqueeze(3) + bx.unsqueeze(2)).flatten(2, 3)
        both = both.permute(0, 3, 1, 2).contiguous()
        both = torch.cat((both.new_zeros(b, HEADS, 1, h * w), both), dim=2)
        return both.flatten(0, 1)

    def forward(self, memory: Tensor, pos: Tensor, prompt: Tensor, pad: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        b = memory.shape[1]
        x = self.query_embed.weight.unsqueeze(1).repeat(1, b, 1)
        boxes = self.reference_points.weight.unsqueeze(1).repeat(1, b, 1).sigmoid()
        presence = self.presence_token.weight[None].expand(1, b, -1)
        hidden, references, logits = [], [boxes], []
        for i, layer in enumerate(self.layers):
            query_pos = self.ref_point_head(self.sine(boxes))
            bias = self.bias(boxes, h, w)
            both = layer(
                torch.cat((presence, x)), torch.cat((torch.zeros_like(presence), query_pos)), prompt, pad, memory, pos, bias
            )
            presence, x = both[:1], both[1:]
            normed = self.norm(x)
            boxes = (self.bbox_embed(normed) + logit(boxes)).sigmoid()
            if i < LAYERS - 1:
                references.append(boxes)
            hidden.append(normed)
            logits.append(self.presence_token_head(self.presence_token_out_norm(presence)).squeeze(-1))
        return torch.stack(hidden), torch.stack(references), torch.stack(logits)


def best(*sides: Callable[[], object], repeats: int) -> list[float]:
    """The least CPU seconds of each side; the sides take turns."""
    least = [math.inf] * len(sides)
    for _ in range(repeats):
        for i, side in enumerate(sides):
            started = time.process_time()
            side()
            least[i] = min(least[i], time.process_time() - started)
    return least


def measure(repeats: int = 7, side: int = SIDE) -> dict[str, tuple[float, float, float]]:
    """Per part: our CPU seconds, the other side's, and their ratio.

    Raises:
        AssertionError: if the two sides do not give equal numbers.
    """
    from plugins.sam3_fusion.decoder import QueryDecoder
    from plugins.sam3_fusion.fusion_encoder import FusionEncoder
    from plugins.sam3_fusion.keys import OriginalKeys
    from plugins.sam3_fusion.positions import cell_positions

    torch.manual_seed(0)
    released_encoder, released_decoder = ReleasedEncoder().eval(), ReleasedDecoder().eval()
    encoder, decoder = FusionEncoder().eval(), QueryDecoder().eval()
    encoder.load_state_dict(OriginalKeys("encoder.", "transformer.encoder.").from_reference(released_encoder.state_dict()))
    decoder.load_state_dict(OriginalKeys("decoder.", "transformer.decoder.").from_reference(released_decoder.state_dict()))
    features = torch.randn(1, DIM, side, side)
    prompt, other = torch.randn(2, 1, PROMPT, DIM)
    pad = torch.arange(PROMPT)[None] >= PROMPT - 8
    pos = cell_positions(side, side, DIM, features)[None]
    src, src_pos, tokens = features.flatten(2).permute(2, 0, 1), pos.flatten(2).permute(2, 0, 1), prompt.transpose(0, 1)

    with torch.no_grad():
        fused = encoder(features, prompt, pad)
        memory = released_encoder(src, src_pos, tokens, pad)
        torch.testing.assert_close(fused.memory, memory.transpose(0, 1), atol=2e-5, rtol=1e-5)
        ours = decoder(fused.memory, (side, side), prompt, pad, fused.pos)
        hidden, references, presence = released_decoder(memory, src_pos, tokens, pad, side, side)
        torch.testing.assert_close(ours.hidden, hidden.transpose(1, 2), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(ours.anchors, references.transpose(1, 2), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.presence, presence[:, 0], atol=2e-4, rtol=1e-4)
        state = encoder.image_state(features)
        torch.testing.assert_close(encoder.fuse(state, other, pad).memory, encoder(features, other, pad).memory, atol=0, rtol=0)

        again, whole, theirs = best(
            lambda: encoder.fuse(state, other, pad),
            lambda: encoder(features, other, pad),
            lambda: released_encoder(src, src_pos, tokens, pad),
            repeats=repeats,
        )
        decode, their_decode = best(
            lambda: decoder(fused.memory, (side, side), prompt, pad, fused.pos),
            lambda: released_decoder(memory, src_pos, tokens, pad, side, side),
            repeats=3 * repeats,
        )
    pairs = {"encoder": (whole, theirs), "decoder": (decode, their_decode), "further prompt": (again, whole)}
    return {name: (a, b, a / b) for name, (a, b) in pairs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    failed = 0
    print(f"{'part':16}{'ours [s]':>10}{'other [s]':>11}{'ratio':>8}{'limit':>8}")
    for name, (ours, theirs, ratio) in measure(args.repeats).items():
        failed += ratio > LIMITS[name]
        print(f"{name:16}{ours:10.3f}{theirs:11.3f}{ratio:8.3f}{LIMITS[name]:8.2f}{'  over' if ratio > LIMITS[name] else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
