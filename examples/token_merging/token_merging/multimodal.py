"""Token merging for every modality, in the slot of SDTPS: the same call, the same kind of answer, no parameters.

It can stand in either of the two slots of `sdtps.TriModalReID`: after the tower (`tokens`), where it shortens what the head
reads, or inside it (`inside`), where the blocks that follow see fewer tokens.

Departures from the paper, which merges a few tokens in every block of the tower: here all rounds stand in one place; the
similarity is that of the tokens themselves, since a module in this slot sees no attention keys (the paper's ablation has
both); and attention that follows is not made proportional to the sizes (its eq. 1), since the tower is not ours to change.

Axes: b batch, n patch tokens, t tokens left, c channels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from core.profile import TokenReport
from core.registry import register
from jaxtyping import Float, Int
from torch import Tensor, nn

from token_merging.bipartite_matching import TokenSet, merge, unmerged


@dataclasses.dataclass(frozen=True)
class Merged:
    """What each modality's tokens became, by modality name.

    Attributes:
        tokens: (b, t, c) the tokens that are left.
        masks: (b, n) 1 at the patches they have grown from, 0 at those merged into another.
        sizes: (b, t) how many patches each stands for.
        owners: (b, n) the token that each patch went into.
    """

    tokens: dict[str, Float[Tensor, "b t c"]]
    masks: dict[str, Float[Tensor, "b n"]]
    sizes: dict[str, Float[Tensor, "b t"]]
    owners: dict[str, Int[Tensor, "b n"]]


def schedule(tokens: int, left: int, rounds: int) -> list[int]:
    """How many tokens each round merges: as evenly as whole numbers allow, the larger first.

    Raises:
        ValueError: if a round would have to merge more than half of its tokens; says how many rounds it takes.
    """
    found, rest = _spread(tokens, left, rounds)
    if rest is None:
        return found
    least = next(r for r in itertools.count(rounds + 1) if _spread(tokens, left, r)[1] is None)
    raise ValueError(
        f"{tokens} tokens cannot become {left} in {rounds} even rounds: one would merge {found[-1]} of {rest}, and a round merges at "
        f"most half; give rounds = {least} or more, or a larger keep_ratio"
    )


def _spread(tokens: int, left: int, rounds: int) -> tuple[list[int], int | None]:
    """Merges of each round, up to the first that merges more than half, and the tokens which that one has."""
    found: list[int] = []
    for i in range(rounds):
        merges = (tokens - left) // rounds + (i < (tokens - left) % rounds)
        now = tokens - sum(found)
        found.append(merges)
        if merges > now // 2:
            return found, now
    return found, None


@register("module", paper="Bolya et al., ICLR 2023, sec. 3")
class TokenMerging(nn.Module):
    """Rounds of bipartite soft matching, each modality on its own. Called as `sdtps.MultiModalSDTPS` is.

    Args:
        dim: channels c of the tokens; checked at every call.
        num_patches: n, tokens of a modality; checked at every call.
        modalities: their names.
        keep_ratio: the share of tokens that is left, rounded up; the default leaves as many as SDTPS, 26 of 128.
        rounds: over how many rounds the merges are spread.
        weighted: weight tokens by the patches they stand for when they are merged.

    Raises:
        ValueError: if keep_ratio is not in (0, 1], or the rounds are too few for it.
    """

    def __init__(
        self,
        dim: int = 512,
        num_patches: int = 128,
        modalities: tuple[str, ...] = ("rgb", "nir", "tir"),
        *,
        keep_ratio: float = 0.2,
        rounds: int = 4,
        weighted: bool = True,
    ):
        super().__init__()
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.dim, self.num_patches, self.modalities, self.weighted = dim, num_patches, tuple(modalities), weighted
        self.num_out = max(1, math.ceil(Fraction(repr(keep_ratio)) * num_patches))
        self.merges = schedule(num_patches, self.num_out, rounds)

    def token_report(self) -> TokenReport:
        """Tokens of a modality after each round; merged tokens are gone, not masked."""
        stages, now = [("patches", self.num_patches)], self.num_patches
        for number, merges in enumerate(self.merges, 1):
            now -= merges
            stages.append((f"round {number}", now))
        return TokenReport(stages)

    def forward(
        self, patches: Mapping[str, Float[Tensor, "b n c"]], guides: Mapping[str, Float[Tensor, "b c"]] | None = None
    ) -> Merged:
        """Merge.

        Args:
            patches: patch tokens by modality.
            guides: global features, which SDTPS selects by; merging looks at the tokens alone and takes no notice of them.

        Raises:
            ValueError: if modalities or shapes are not those the module was built for.
        """
        if set(patches) != set(self.modalities):
            raise ValueError(f"patches are given for {', '.join(patches)}; this module was built for {', '.join(self.modalities)}")
        found = {name: self.merged(patches[name], name) for name in self.modalities}
        masks = {}
        for name, result in found.items():
            masks[name] = torch.zeros_like(patches[name][..., 0]).scatter(1, result.places, 1.0)
        return Merged(
            {m: r.tokens for m, r in found.items()},
            masks,
            {m: r.sizes for m, r in found.items()},
            {m: r.owners for m, r in found.items()},
        )

    def merged(self, tokens: Float[Tensor, "b n c"], name: str = "patches") -> TokenSet:
        """All rounds on one set of tokens."""
        if tuple(tokens.shape[1:]) != (self.num_patches, self.dim):
            raise ValueError(
                f"{name} has shape {tuple(tokens.shape)}; this module was built for num_patches = {self.num_patches}, dim = {self.dim}"
            )
        result = unmerged(tokens)
        for merges in self.merges:
            result = merge(result, merges, weighted=self.weighted)
        return result
