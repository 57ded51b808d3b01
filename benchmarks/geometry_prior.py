"""CPU time of DFormerv2-S at 480x640 with the geometry prior's distances computed once a stage instead of once a block.

    python benchmarks/geometry_prior.py          prints one line and exits 1 when a limit is missed, in either reading

Three models with the same weights and equal outputs, one forward each in turn (float32, one thread, no gradient):

    ours       distances and rotary codes once a stage; each block mixes them with its two weights inside fused attention
    released   each block resizes the depth map, builds the index grid, distances, per-head decays and rotary codes, adds the
               prior to explicit logits and takes their softmax (the released order, written from its formulas)
    block      ours, but with the distances and codes computed again in every block: what sharing alone is worth

The limit of 0.9 can be read in two ways. ours / released, the form with everything once a block as it was released: met.
ours / block, where nothing but the sharing differs: missed, because distances and codes are a small part of a forward;
`distances_share` is what all blocks together spend on them over `block`, so that sharing saves less than that. `limits` judges
each reading; `ok` is true when all are met and the outputs are equal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plugins.sam.dformer import DFormerv2, GeometryAttention, GeometryPrior

LIMIT = 0.9


def turn(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


class ReleasedAttention(nn.Module):
    """Geometry self-attention in the released order, on the parameters of ours."""

    def __init__(self, ours: GeometryAttention, depth: dict[str, Tensor]):
        super().__init__()
        self.ours, self.depth = ours, depth

    def prior(self, size: tuple[int, int], prior: GeometryPrior) -> tuple[Tensor, ...]:
        h, w = size
        device = prior.weight.device
        depth = F.interpolate(self.depth["map"][:, :1], size=size, mode="bilinear", align_corners=False)[:, 0]
        dim = self.ours.to_query.in_features // self.ours.heads
        angle = (1.0 / (10000 ** torch.linspace(0, 1, dim // 2, device=device))).repeat_interleave(2)
        index = torch.arange(h * w, device=device)
        sin = torch.sin(index[:, None] * angle[None, :]).reshape(h, w, -1)
        cos = torch.cos(index[:, None] * angle[None, :]).reshape(h, w, -1)
        place, far = prior.weight[0], prior.weight[1]
        if not self.ours.decomposed:
            grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(h * w, 2).to(device)
            by_place = (grid[:, None] - grid[None, :]).abs().sum(-1) * prior.decay[:, None, None]
            flat = depth.reshape(depth.shape[0], -1, 1)
            by_depth = (flat - flat.transpose(1, 2)).abs()[:, None] * prior.decay[:, None, None]
            return sin, cos, place * by_place + far * by_depth
        masks = []
        for length, values in ((w, depth), (h, depth.transpose(1, 2))):
            line = torch.arange(length, device=device)
            by_place = (line[:, None] - line[None, :]).abs() * prior.decay[:, None, None]
            by_depth = (values[..., :, None] - values[..., None, :]).abs()[:, None] * prior.decay[:, None, None, None]
            masks.append(place * by_place[None, :, None] + far * by_depth)
        return sin, cos, *masks

    def forward(self, x: Tensor, _: object, prior: GeometryPrior) -> Tensor:
        m = self.ours
        b, h, w, c = x.shape
        sin, cos, *masks = self.prior((h, w), prior)
        q, k, v = m.to_query(x), m.to_key(x), m.to_value(x)
        local = m.enhance(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        k = k * (c // m.heads) ** -0.5
        q, k = (y.view(b, h, w, m.heads, -1).permute(0, 3, 1, 2, 4) for y in (q, k))
        q, k = q * cos + turn(q) * sin, k * cos + turn(k) * sin
        if not m.decomposed:
            q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.reshape(b, h * w, m.heads, -1).permute(0, 2, 1, 3)
            out = torch.softmax(q @ k.transpose(-1, -2) + masks[0], -1) @ v
            out = out.transpose(1, 2).reshape(b, h, w, -1)
        else:
            v = v.reshape(b, h, w, m.heads, -1).permute(0, 1, 3, 2, 4)
            rows_q, rows_k = q.transpose(1, 2), k.transpose(1, 2)
            v = torch.softmax(rows_q @ rows_k.transpose(-1, -2) + masks[0].transpose(1, 2), -1) @ v
            v = v.permute(0, 3, 2, 1, 4)
            down_q, down_k = q.permute(0, 3, 1, 2, 4), k.permute(0, 3, 1, 2, 4)
            out = torch.softmax(down_q @ down_k.transpose(-1, -2) + masks[1].transpose(1, 2), -1) @ v
            out = out.permute(0, 3, 1, 2, 4).flatten(-2, -1)
        return m.to_out(out + local)


class AnewInEveryBlock(nn.Module):
    """Our attention, its distances computed again each time."""

    def __init__(self, ours: GeometryAttention, owner: DFormerv2, stage: int, depth: dict[str, Tensor]):
        super().__init__()
        self.ours, self.stage, self.depth = ours, stage, depth
        self.distances = owner.distances

    def forward(self, x: Tensor, _: object, prior: GeometryPrior) -> Tensor:
        return self.ours(x, self.distances(self.depth["map"], self.stage, (x.shape[1], x.shape[2])), prior)


def measure(rounds: int = 6, height: int = 480, width: int = 640) -> dict[str, float]:
    """Times, ratios, and the worst difference of the four feature maps."""
    torch.manual_seed(0)
    image, depth = torch.randn(1, 3, height, width), torch.rand(1, 1, height, width)
    held = {"map": depth}
    ours, released, block = (DFormerv2("S").eval() for _ in range(3))
    for prior in ours.modules():
        if isinstance(prior, GeometryPrior):
            nn.init.uniform_(prior.weight, 0.5, 1.5)
    for other in (released, block):
        other.load_state_dict(ours.state_dict())
    for i in range(4):
        for a, b in zip(released.stages[i].blocks, block.stages[i].blocks):
            a.attention = ReleasedAttention(a.attention, held)
            b.attention = AnewInEveryBlock(b.attention, block, i, held)
    models = {"ours": ours, "released": released, "block": block}
    with torch.inference_mode():
        features = {name: model(image, depth) for name, model in models.items()}
        worst = max(
            float((a - b).abs().max() / b.abs().max()) for n in ("ours", "block") for a, b in zip(features[n], features["released"])
        )

        def distances(_: Tensor, depth: Tensor) -> None:
            for stage, blocks in enumerate(ours.stages):
                for _ in blocks.blocks:
                    ours.distances(depth, stage, (height >> (stage + 2), width >> (stage + 2)))

        timed = {**models, "distances": distances}
        best = dict.fromkeys(timed, math.inf)
        for _ in range(rounds):  # interleaved, so that a slow spell of the machine hits all
            for name, model in timed.items():
                started = time.process_time()
                model(image, depth)
                best[name] = min(best[name], time.process_time() - started)
    return {
        **{f"{name}_s": seconds for name, seconds in best.items()},
        "ratio": best["ours"] / best["released"],
        "sharing_alone": best["ours"] / best["block"],
        "distances_share": best["distances"] / best["block"],
        "worst_output": worst,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    result = measure(parser.parse_args().rounds)
    limits = {
        reading: {"value": round(result[name], 3), "limit": LIMIT, "met": result[name] <= LIMIT}
        for reading, name in (("against the released form", "ratio"), ("sharing alone, the literal reading", "sharing_alone"))
    }
    why = f"distances and codes in every block are {result['distances_share']:.3f} of that forward: all that sharing them can save"
    equal = result["worst_output"] < 1e-4
    ok = equal and all(judged["met"] for judged in limits.values())
    figures = {k: round(v, 6) for k, v in result.items()}
    print(json.dumps({"benchmark": "geometry_prior", "ok": ok, "equal": equal, "limits": limits, "why": why, **figures}))
    return 0 if ok else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
