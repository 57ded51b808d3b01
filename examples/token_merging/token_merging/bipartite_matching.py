"""One round of bipartite soft matching and merging. Bolya et al., Token Merging, ICLR 2023, sec. 3.

1. Put the tokens alternately into two sets A and B.
2. Each token of A looks at the token of B that is most similar to it (cosine).
3. The r most similar of these pairs are kept.
4. A pair's token of A is merged into that of B: the mean, weighted by how many patches each stands for.
5. What is left of A, and B, are put together again.

Several tokens of A may be merged into one of B; none is merged into its own set, so no chain has to be followed.

Axes: b batch, n tokens, p tokens of A, q tokens of B, r merged tokens of A, t tokens left, c channels.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Tokens and what they stand for.

    Attributes:
        tokens: (b, n, c).
        sizes: (b, n) number of patches merged into each; they sum to the number of patches.
        owners: (b, m) for each of the m patches, the position of the token it went into.
        places: (b, n) for each token, the patch that it has grown from.
    """

    tokens: Float[Tensor, "b n c"]
    sizes: Float[Tensor, "b n"]
    owners: Int[Tensor, "b m"]
    places: Int[Tensor, "b n"]


def unmerged(tokens: Float[Tensor, "b n c"]) -> TokenSet:
    """Every patch its own token."""
    batch, count, _ = tokens.shape
    positions = repeat(torch.arange(count, device=tokens.device), "n -> b n", b=batch)
    return TokenSet(tokens, tokens.new_ones(batch, count), positions, positions)


def pairs(tokens: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b p"], Int[Tensor, "b p"]]:
    """Steps 1 and 2: for each token of A (even positions) its greatest cosine with one of B (odd positions), and which."""
    directions = F.normalize(tokens.detach().float(), dim=-1)
    best = (directions[:, 0::2] @ rearrange(directions[:, 1::2], "b q c -> b c q")).max(-1)
    return best.values, best.indices


def merge(given: TokenSet, merges: int, *, weighted: bool = True) -> TokenSet:
    """Steps 3 to 5: `merges` tokens fewer.

    Which tokens are merged has no gradient; the means have. Ties go to the earlier token.

    Args:
        given: the tokens.
        merges: r, at most half of the tokens.
        weighted: weight each token by its size; False takes the plain mean of the tokens that meet.

    Raises:
        ValueError: if more than half of the tokens are to be merged.
    """
    batch, count, dim = given.tokens.shape
    if not 0 <= merges <= count // 2:
        raise ValueError(f"one round merges at most half of {count} tokens, got merges = {merges}")
    if merges == 0:
        return given
    similarity, partner = pairs(given.tokens)
    ranked = similarity.argsort(dim=-1, descending=True, stable=True)
    gone, kept = ranked[:, :merges], ranked[:, merges:].sort(dim=-1).values  # positions in A
    into = partner.gather(1, gone)  # positions in B

    weights = given.sizes if weighted else torch.ones_like(given.sizes)
    amounts = given.tokens * rearrange(weights, "b n -> b n 1")
    even, odd = amounts[:, 0::2], amounts[:, 1::2]
    sums = odd.scatter_add(1, _over(into, dim), even.gather(1, _over(gone, dim)))
    divisor = weights[:, 1::2].scatter_add(1, into, weights[:, 0::2].gather(1, gone))
    tokens = torch.cat([given.tokens[:, 0::2].gather(1, _over(kept, dim)), sums / rearrange(divisor, "b q -> b q 1")], 1)
    sizes = given.sizes[:, 1::2].scatter_add(1, into, given.sizes[:, 0::2].gather(1, gone))

    left = kept.shape[1]
    moved = torch.empty(batch, count, dtype=torch.int64, device=tokens.device)  # new position of every token
    of_even = torch.empty_like(partner).scatter(1, kept, repeat(torch.arange(left, device=tokens.device), "k -> b k", b=batch))
    moved[:, 0::2] = of_even.scatter(1, gone, left + into)
    moved[:, 1::2] = left + torch.arange(count // 2, device=tokens.device)
    return TokenSet(
        tokens,
        torch.cat([given.sizes[:, 0::2].gather(1, kept), sizes], 1),
        moved.gather(1, given.owners),
        torch.cat([given.places[:, 0::2].gather(1, kept), given.places[:, 1::2]], 1),
    )


def _over(index: Int[Tensor, "b k"], channels: int) -> Int[Tensor, "b k c"]:
    return repeat(index, "b k -> b k c", c=channels)
