"""PK sampling: batches of P identities with K images each (Hermans et al. 2017; order of draws as in DeMo's release)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.registry import register


@register("plan", paper="DeMo (AAAI 2025), released sampler; Hermans et al. 2017, sec. 2", denylist=["pids"])
class PKPlan:
    """Each identity's images, shuffled and cut into chunks of K; a batch is a chunk from each of P identities.

    The rest of an identity's images that fills no chunk waits for another epoch; an identity with fewer than K images gives
    one chunk, drawn with replacement. A batch takes P different identities, uniformly among those with chunks left, and
    the epoch ends when fewer than P have any. So an epoch's length varies a little with the draw.

    Args:
        pids: identity of every sample.
        identities: P.
        instances: K.

    Raises:
        ValueError: if P or K is below 1, or there are fewer than P identities.
    """

    def __init__(self, pids: Sequence[int], identities: int = 8, instances: int = 8):
        if identities < 1 or instances < 1:
            raise ValueError(f"identities and instances must be at least 1, got {identities} and {instances}")
        self.members: dict[int, list[int]] = {}
        for index, pid in enumerate(pids):
            self.members.setdefault(int(pid), []).append(index)
        if len(self.members) < identities:
            raise ValueError(
                f"a batch of {identities} identities needs at least as many in the data, which has {len(self.members)}; "
                f"lower PKPlan.identities"
            )
        self.identities, self.instances = identities, instances

    def epoch(self, number: int, rng: np.random.Generator) -> list[list[int]]:
        """Batches of `identities * instances` sample indices, an identity's K side by side."""
        k = self.instances
        chunks: dict[int, list[list[int]]] = {}
        for pid in sorted(self.members):
            members = self.members[pid]
            if len(members) < k:
                chunks[pid] = [rng.choice(members, k).tolist()]
            else:
                whole = len(members) // k
                chunks[pid] = rng.permutation(members)[: whole * k].reshape(whole, k).tolist()
        left = sorted(chunks)
        batches = []
        while len(left) >= self.identities:
            chosen = [left[i] for i in rng.choice(len(left), self.identities, replace=False)]
            batches.append([index for pid in chosen for index in chunks[pid].pop()])
            left = [pid for pid in left if chunks[pid]]
        return batches

    def batches_per_epoch(self) -> int:
        """The most batches an epoch can have: all chunks over P.

        An epoch may be shorter, because chunks of the last few identities can be left over (the release's length counts
        them too). Exact where every identity gives one chunk. Whoever needs the true length takes `len(epoch(...))`.
        """
        return sum(max(1, len(m) // self.instances) for m in self.members.values()) // self.identities
