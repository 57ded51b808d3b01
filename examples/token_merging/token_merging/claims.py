"""What the ToMe paper states of merging itself, as checks; what it states of accuracy on ImageNet is not tested here."""

from __future__ import annotations

import torch
from core.claims import Verdict, claim, holds, untestable
from core.profile import profile

from token_merging.multimodal import TokenMerging

PAPER = "Bolya et al., ICLR 2023"


@claim("ToMe-1", "merged tokens are means over the patches they stand for", source=f"{PAPER}, sec. 3")
def means() -> Verdict:
    merging = TokenMerging(64, 128)
    tokens = torch.randn(4, 128, 64)
    with torch.no_grad():
        result = merging.merged(tokens)
    worst = 0.0
    for b in range(4):
        for t in range(merging.num_out):
            mine = tokens[b][result.owners[b] == t]
            worst = max(worst, float((result.tokens[b, t] - mine.mean(0)).abs().max()), abs(float(result.sizes[b, t]) - len(mine)))
    return holds(
        worst < 1e-5, measured=f"largest difference to the mean over owned patches {worst:.1e}; 128 patches in 26 tokens, 4 rounds"
    )


@claim("ToMe-2", "matching needs no training: the module has no parameters", source=f"{PAPER}, abstract")
def parameters() -> Verdict:
    count = sum(p.numel() for p in TokenMerging().parameters())
    return holds(count == 0, measured=f"{count} parameters")


@claim("ToMe-3", "matching costs little beside a block of the tower", source=f"{PAPER}, sec. 3")
def cost() -> Verdict:
    n, c = 128, 768
    tokens = {m: torch.randn(1, n, c) for m in ("rgb", "nir", "tir")}
    merging = profile(TokenMerging(c, n).eval(), (tokens,), timed=False).macs
    block = 3 * (4 * n * c * c + 2 * n * n * c + 8 * n * c * c)
    return holds(
        merging < 0.01 * block, measured=f"{merging:,} MACs, {merging / block:.2%} of one ViT-B block over the same 3 × {n} tokens"
    )


@claim(
    "ToMe-4",
    "twice the throughput of a ViT-L or ViT-H for 0.2 to 0.3 points of accuracy",
    source=f"{PAPER}, abstract",
    expect="cannot be tested here",
)
def throughput() -> Verdict:
    return untestable(
        why="it takes ImageNet and the published weights, and merging in every block; this module stands in one place"
    )
