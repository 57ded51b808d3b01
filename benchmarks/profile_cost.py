"""What a profile costs: counting against fvcore's FlopCountAnalysis, and a whole profile in forwards. ViT-B/16 at 224, batch 1.

    OMP_NUM_THREADS=1 python benchmarks/profile_cost.py [--repeats 5]

Both sides run interleaved in one process; the figure is the ratio of the shortest process times. Promises: counting at most
1.2 × fvcore's time; a profile at most three forwards beside the timed ones.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from core.profile import FlopCount, profile


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, fused)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, fused: bool, dim: int = 768, heads: int = 12, depth: int = 12):
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, dim, 16, stride=16), nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 197, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = rearrange(self.patches(image), "b c h w -> b (h w) c")
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@torch.no_grad()
def forward(model: nn.Module, image: Tensor) -> Tensor:
    return model(image)


def total(analysis: type[FlopCountAnalysis], model: nn.Module, image: Tensor) -> float:
    return analysis(model, image).total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    image = torch.randn(1, 3, 224, 224)
    for spelling, fused in (("explicit attention", False), ("fused attention", True)):
        model = ViT(fused).eval()
        runs: dict[str, Callable[[], Any]] = {
            "forward": partial(forward, model, image),
            "fvcore": partial(total, FlopCountAnalysis, model, image),
            "count": partial(total, FlopCount, model, image),
            "profile": partial(profile, model, image, repeats=1),
        }
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(seconds(run))
        best = {name: min(values) for name, values in times.items()}
        theirs, ours = (total(analysis, model, image) for analysis in (FlopCountAnalysis, FlopCount))
        beside = (best["profile"] - best["forward"]) / best["forward"]
        print(f"{spelling}: " + ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in best.items()))
        print(f"  count / fvcore            {best['count'] / best['fvcore']:.2f}   (promise: at most 1.2)")
        print(f"  profile beside the timed  {beside:.2f} forwards (promise: at most 3 forwards, plus what logging them takes)")
        print(f"  total                     ours {ours:,}, fvcore {theirs:,.0f} ({(ours - theirs) / ours:.2%} missing)")


if __name__ == "__main__":
    main()
