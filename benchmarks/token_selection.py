"""CPU time and memory of the tri-modal SDTPS step, forward and backward, against the released order of operations.

    python benchmarks/token_selection.py [--repeats 60] [--batch 8] [--dim 512] [--compiled]

The peer below is written from the release's formulas, in its order: patches are L2-normalised once for each of nine attention
maps and multiplied out, the predictor is differentiated at all tokens, scores are sorted in full, kept and dropped tokens are gathered
separately, and a mask of ones goes through the aggregation's additive penalty. Ours is `MultiModalSDTPS` as it is built by default.

Both run in one process, one thread, turn and turn about, on the same weights and inputs (B=8, N=128, C=512, float32); the loss
is the mean square of the concatenated mean-pooled outputs. First outputs must be equal (1e-6), and so must the gradients of
their sum against random numbers (1e-5 of each tensor's largest entry). The figure is the ratio of the shortest process times
(user and system). Target: 0.6. Beside it stands what the graph of a step holds in memory. `--compiled` adds what
`torch.compile` makes of the peer and of our composed operations (minutes, and a C++ compiler), with its differences but no limit on them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plugins.sdtps.multimodal import MultiModalSDTPS, ReferenceKeys

TARGET = 0.6
MODALITIES = ("rgb", "nir", "tir")
COMMITS = {"65c69af": True, "6334359": False}  # attention_no_grad
TOKENS, RHO, ALPHA, BETA = 128, 0.5, 0.4, 0.25


# --- the peer -------------------------------------------------------------------------------------------------------


class ReleasedSparse(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.score_predictor = nn.Sequential(nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1), nn.Sigmoid())

    def forward(self, tokens: Tensor, own: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, ...]:
        _, n, c = tokens.shape
        predicted = self.score_predictor(tokens).squeeze(-1)
        own, second, third = (self.minmax(a) for a in (own, second, third))
        score = (1 - 2 * BETA) * predicted + BETA * (second + third + 2 * own)
        keep = max(1, math.ceil(n * RHO))
        _, order = torch.sort(score, dim=1, descending=True)
        kept, dropped = order[:, :keep], order[:, keep:]
        mask = torch.zeros_like(score).scatter(1, kept, 1.0)
        selected = torch.gather(tokens, 1, kept.unsqueeze(-1).expand(-1, -1, c))
        rest = torch.gather(tokens, 1, dropped.unsqueeze(-1).expand(-1, -1, c))
        weights = F.softmax(torch.gather(score, 1, dropped), dim=1).unsqueeze(-1)
        extra = (rest * weights).sum(dim=1, keepdim=True)
        return selected, extra, mask, torch.gather(mask, 1, kept)

    @staticmethod
    def minmax(a: Tensor) -> Tensor:
        low, high = a.min(dim=-1, keepdim=True)[0], a.max(dim=-1, keepdim=True)[0]
        return (a - low) / (high - low + 1e-8)


class ReleasedAggregation(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        hidden = int(dim * 0.2)
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, tokens: Tensor, keep_policy: Tensor) -> Tensor:
        weight = self.weight(tokens).transpose(2, 1) * self.scale
        weight = weight - (1 - keep_policy.unsqueeze(1)) * 1e10
        return torch.bmm(F.softmax(weight, dim=2), tokens)


class Released(nn.Module):
    def __init__(self, dim: int, attention_no_grad: bool):
        super().__init__()
        self.attention_no_grad = attention_no_grad
        for m in MODALITIES:
            self.add_module(f"{m}_sparse", ReleasedSparse(dim))
            self.add_module(f"{m}_aggr", ReleasedAggregation(dim, int(TOKENS * ALPHA * RHO)))

    def attention(self, tokens: Tensor, guide: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.attention_no_grad):
            tokens, guide = F.normalize(tokens, dim=-1), F.normalize(guide, dim=-1).unsqueeze(1)
            return (tokens * guide).sum(dim=-1)

    def forward(self, patches: dict[str, Tensor], guides: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {}
        for m in MODALITIES:
            second, third = (o for o in MODALITIES if o != m)
            maps = [self.attention(patches[m], guides[g]) for g in (m, second, third)]
            selected, extra, _, keep_policy = getattr(self, f"{m}_sparse")(patches[m], *maps)
            outputs[m] = torch.cat([getattr(self, f"{m}_aggr")(selected, keep_policy), extra], dim=1)
        return outputs


# --- the comparison -------------------------------------------------------------------------------------------------


Tensors = dict[str, Tensor]


def outputs_of(module: nn.Module, patches: Tensors, guides: Tensors) -> Tensors:
    found = module(patches, guides)
    return found if isinstance(found, dict) else found.tokens


def forget(module: nn.Module, patches: Tensors, guides: Tensors) -> None:
    for leaf in (*patches.values(), *guides.values(), *module.parameters()):
        leaf.grad = None


def step(module: nn.Module, patches: Tensors, guides: Tensors) -> None:
    """What is timed."""
    forget(module, patches, guides)
    tokens = outputs_of(module, patches, guides)
    torch.cat([tokens[m].mean(dim=1) for m in MODALITIES], dim=-1).square().mean().backward()


def gradients(module: nn.Module, patches: Tensors, guides: Tensors) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients of their sum against fixed random numbers: of order one, so that a difference shows."""
    forget(module, patches, guides)
    tokens = outputs_of(module, patches, guides)
    random = torch.Generator().manual_seed(1)
    torch.stack([(tokens[m] * torch.randn(tokens[m].shape, generator=random)).sum() for m in MODALITIES]).sum().backward()
    named = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    if not isinstance(module, Released):
        named = ReferenceKeys().to_reference(named)
    return tokens, named | {m: torch.zeros_like(p) if p.grad is None else p.grad for m, p in patches.items()}


def difference(ours: nn.Module, peer: Released, patches: Tensors, guides: Tensors) -> tuple[float, float]:
    """Worst difference of outputs, and of gradients relative to each tensor's largest entry (0.1 at least)."""
    theirs, expected = gradients(peer, patches, guides)
    mine, found = gradients(ours, patches, guides)
    output = max((mine[m] - theirs[m]).abs().max().item() for m in MODALITIES)
    gradient = max((found[k] - g).abs().max().item() / max(g.abs().max().item(), 0.1) for k, g in expected.items())
    return output, gradient


def stored(module: nn.Module, patches: Tensors, guides: Tensors) -> float:
    """MiB that the graph of one step holds, inputs and parameters not counted."""
    given = {t.untyped_storage().data_ptr() for t in (*patches.values(), *guides.values(), *module.parameters())}
    held: dict[int, int] = {}
    keep: list[Tensor] = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        keep.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(patches, guides)
    return sum(size for place, size in held.items() if place not in given) / 2**20


def shortest(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        for name, run in steps.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    gc.enable()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--compiled", action="store_true", help="time both sides under torch.compile as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    patches = {m: torch.randn(args.batch, TOKENS, args.dim, requires_grad=True) for m in MODALITIES}
    guides = {m: torch.randn(args.batch, args.dim, requires_grad=True) for m in MODALITIES}
    missed = 0
    for commit, no_grad in COMMITS.items():
        print(f"\nrelease at {commit}, attention maps {'without' if no_grad else 'with'} gradient")
        missed += compare(no_grad, args.dim, args.repeats, patches, guides, args.compiled)
    return int(missed > 0)


def compare(no_grad: bool, dim: int, repeats: int, patches: Tensors, guides: Tensors, compiled: bool) -> bool:
    """Print one comparison; whether the limit was missed."""
    peer = Released(dim, no_grad)
    ours, composed = (MultiModalSDTPS(dim, TOKENS, attention_no_grad=no_grad, fused=fused) for fused in (True, False))
    modules: dict[str, nn.Module] = {"released order": peer, "ours": ours, "ours, composed (fused=False)": composed}
    for module in (ours, composed):
        module.load_state_dict(ReferenceKeys().from_reference(peer.state_dict()))
    if compiled:
        for name in ("released order", "ours, composed (fused=False)"):
            modules[f"{name}, compiled"] = copy.deepcopy(modules[name])
            modules[f"{name}, compiled"].compile()
    for name in list(modules)[1:]:
        output, gradient = difference(modules[name], peer, patches, guides)
        print(f"{name:<38} outputs equal to {output:.1e}, gradients to {gradient:.1e} of their largest entry")
        if modules[name] in (ours, composed) and (output > 1e-6 or gradient > 1e-5):
            sys.exit(f"outputs differ by {output:.2e} (limit 1e-6), gradients by {gradient:.2e} (limit 1e-5)")

    times = shortest({name: lambda m=m: step(m, patches, guides) for name, m in modules.items()}, repeats)  # type: ignore[misc]
    base, base_median = min(times["released order"]), statistics.median(times["released order"])
    for name, timed in modules.items():
        least, median = min(times[name]), statistics.median(times[name])
        print(
            f"{name:<38} {1e3 * least:7.2f} ms   ratio {least / base:.3f}   (median {1e3 * median:.2f} ms, ratio "
            f"{median / base_median:.3f})   stores {stored(timed, patches, guides):.2f} MiB"
        )
    ratio = min(times["ours"]) / base
    print(f"ours / released order: {ratio:.3f} (target {TARGET}): {'met' if ratio <= TARGET else 'missed'}")
    return ratio > TARGET


if __name__ == "__main__":
    sys.exit(main())
