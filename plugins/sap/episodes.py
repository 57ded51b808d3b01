"""Episodes: N classes, K labelled support images of each, Q queries of each, across domains.

After the SAP release. A query domain is drawn; the support comes from the other source domains. It is not
few-shot learning of new classes: training and test share their classes, and what is new is the domain.

An episode is a list of sample indices in a fixed order, so that labels within it follow from the position:
support first, K of the first class, K of the second, …; then Q queries of the first class, and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from core.data import generator
from core.registry import register
from plugins.sap.datasets import Record
from plugins.sap.prototype_head import check_support


@dataclasses.dataclass(frozen=True)
class EpisodeShape:
    """N ways, K shots, Q queries a class."""

    n_way: int
    k_shot: int
    n_query: int

    def __post_init__(self) -> None:
        if self.n_way < 2 or self.k_shot < 1 or self.n_query < 1:
            raise ValueError(f"an episode needs n_way of at least 2 and k_shot and n_query of at least 1, got {self}")
        check_support(self.labels(torch.device("cpu"))[: self.support], self.n_way)

    @property
    def support(self) -> int:
        """Number of support rows; they come first."""
        return self.n_way * self.k_shot

    @property
    def rows(self) -> int:
        return self.n_way * (self.k_shot + self.n_query)

    def labels(self, device: torch.device) -> Int[Tensor, "b"]:
        """The class of each row within the episode, 0 .. n_way-1, made on the device (nothing is copied)."""
        ways = torch.arange(self.n_way, device=device)
        return torch.cat([ways.repeat_interleave(self.k_shot), ways.repeat_interleave(self.n_query)])


@register("plan", paper="SAP release", denylist=["records", "support_domains", "query_domains"])
class EpisodePlan:
    """Draws episodes from records.

    Args:
        records: the images; their positions are the indices of an episode.
        support_domains: domains that support images may come from.
        query_domains: domains one of which is drawn for the queries of an episode. Its images are never support.
        n_way, k_shot, n_query: shape of an episode.
        episodes: episodes that make one epoch.
        part: whether "train" or "held_out" identities are drawn, or "all" (the release: no split).
        disjoint_identity: an identity appears once in a class of an episode. False (release) draws support images
            independently: one may come twice, and a query may show the same object as a support image.

    Raises:
        ValueError: if a cell of domain and class is too small for what is asked; it is named.
    """

    def __init__(
        self,
        records: Sequence[Record],
        support_domains: Sequence[int],
        query_domains: Sequence[int],
        n_way: int = 5,
        k_shot: int = 5,
        n_query: int = 15,
        episodes: int = 150,
        part: Literal["train", "held_out", "all"] = "train",
        disjoint_identity: bool = True,
    ):
        self.shape = EpisodeShape(n_way, k_shot, n_query)
        self.count, self.disjoint = episodes, disjoint_identity
        self.classes = sorted({record.cls for record in records})
        if n_way > len(self.classes):
            raise ValueError(f"n_way must be at most {len(self.classes)} (the classes there are), got {n_way}")
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        names = {identity: number for number, identity in enumerate(sorted({record.identity for record in records}))}
        self.identity = np.array([names[record.identity] for record in records])
        wanted = {"train": (False,), "held_out": (True,), "all": (False, True)}[part]
        cells: dict[tuple[int, int], list[int]] = {}
        for index, record in enumerate(records):
            if record.held_out in wanted:
                cells.setdefault((record.domain, record.cls), []).append(index)
        self.cells = {key: np.array(members) for key, members in cells.items()}
        self.support_domains, self.query_domains = sorted(set(support_domains)), sorted(set(query_domains))
        for query in self.query_domains:
            if not self._support_of(query):
                raise ValueError(f"query domain {query} leaves no support domain: support domains are {self.support_domains}")
        self._check_sizes()

    def _support_of(self, query: int) -> list[int]:
        return [domain for domain in self.support_domains if domain != query]

    def _check_sizes(self) -> None:
        shape = self.shape
        for domain in sorted({*self.support_domains, *self.query_domains}):
            for cls in self.classes:
                size = len(self.cells.get((domain, cls), ()))
                needed = 1
                if self.disjoint:
                    needed = shape.n_query if domain in self.query_domains else 1
                    if domain in self.support_domains:
                        others = [self.cells[d, cls] for d in self.query_domains if d != domain and (d, cls) in self.cells]
                        mine = set(self.identity[self.cells[domain, cls]].tolist()) if size else set()
                        shared = any(mine & set(self.identity[other].tolist()) for other in others)
                        needed = max(needed, shape.k_shot + (shape.n_query if shared else 0))
                if size < needed:
                    raise ValueError(
                        f"domain {domain}, class {cls} has {size} images for an episode that needs {needed} different identities; "
                        f"lower k_shot or n_query"
                    )

    def episode(self, rng: np.random.Generator) -> list[int]:
        """Sample indices of one episode, in the order of `EpisodeShape`."""
        shape = self.shape
        query = self.query_domains[int(rng.integers(len(self.query_domains)))]
        others = self._support_of(query)
        support: list[int] = []
        queries: list[int] = []
        for position in rng.permutation(len(self.classes))[: shape.n_way]:
            cls = self.classes[position]
            pool = self.cells[query, cls]
            chosen = pool[rng.choice(len(pool), shape.n_query, replace=len(pool) < shape.n_query)]
            queries += chosen.tolist()
            taken = set(self.identity[chosen].tolist()) if self.disjoint else set()
            for domain in rng.integers(len(others), size=shape.k_shot):
                cell = self.cells[others[domain], cls]
                index = int(cell[rng.integers(len(cell))])
                while self.disjoint and int(self.identity[index]) in taken:
                    index = int(cell[rng.integers(len(cell))])
                taken.add(int(self.identity[index]))
                support.append(index)
        return support + queries

    def epoch(self, number: int, rng: np.random.Generator) -> list[list[int]]:
        """The episodes of an epoch."""
        return [self.episode(rng) for _ in range(self.count)]

    def batches_per_epoch(self) -> int:
        return self.count

    def fixed(self, count: int, *key: int) -> list[list[int]]:
        """`count` episodes that depend on `key` alone: the same at every evaluation, and no draw of training moves them."""
        return [self.episode(generator(*key, number)) for number in range(count)]
