"""Claims: what a paper, its release or its notes state, as checks with a verdict and a measured figure.

A plugin lists its claims in `<plugin package>/claims.py`. A claim that can be checked is a function; what it returns says
whether the statement holds, and the figure behind that. Published results that only a training run on the real data can
confirm are rows of the same ledger, compared with run folders by their metric.

    @claim("SDTPS-11", "128 tokens become 64, then 25 and one extra", source="final note, sec. 5")
    def token_counts() -> Verdict:
        counts = …
        return holds(counts == (64, 25, 26), measured=f"{counts}")

    published("RGBNT201 mAP", source="DeMo, table 1", config="gin/sdtps/rgbnt201.gin", metric="mAP[camera]", value=0.79, tolerance=0.01)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

from core import registry

Outcome = Literal["holds", "does not hold", "depends", "cannot be tested here"]
Cost = Literal["quick", "slow"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        outcome: holds / does not hold / depends / cannot be tested here.
        measured: the figure, in words and numbers.
        why: what the figure means for the statement, or why it cannot be tested.
    """

    outcome: Outcome
    measured: str
    why: str = ""


def holds(condition: bool, *, measured: str, why: str = "") -> Verdict:
    """`holds` or `does not hold`, by a measured condition."""
    return Verdict("holds" if condition else "does not hold", measured, why)


def depends(*, measured: str, why: str) -> Verdict:
    """The statement is true in some settings and false in others; `why` says in which."""
    return Verdict("depends", measured, why)


def untestable(*, why: str, measured: str = "–") -> Verdict:
    """It cannot be tested here; `why` says what it would take."""
    return Verdict("cannot be tested here", measured, why)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement and its check.

    Attributes:
        expect: the verdict that this check is known to give; another one makes `repro verify` fail, so that the ledger
            cannot change unnoticed.
    """

    plugin: str
    id: str
    statement: str
    source: str
    check: Callable[[], Verdict]
    expect: Outcome
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Published:
    """A published number, to be compared with run folders.

    Attributes:
        config: the gin file that reproduces it.
        metric: name in a run's result, protocol included.
        value, tolerance: in the metric's own unit (fractions, not percent).
        where: bindings a run must have had, beside being a run of `config`.
    """

    plugin: str
    id: str
    statement: str
    source: str
    config: str
    metric: str
    value: float
    tolerance: float
    where: tuple[tuple[str, str], ...] = ()


_CLAIMS: dict[tuple[str, str], Claim] = {}
_PUBLISHED: dict[tuple[str, str], Published] = {}


def claim(
    id: str, statement: str, *, source: str, expect: Outcome = "holds", cost: Cost = "quick"
) -> Callable[[Callable[[], Verdict]], Callable[[], Verdict]]:
    """Enter a statement and its check into the ledger.

    Raises:
        ValueError: if the plugin has a claim of that id already.
    """

    def add(check: Callable[[], Verdict]) -> Callable[[], Verdict]:
        plugin = registry.namespace(check.__module__)
        key = (plugin, id)
        if key in _CLAIMS and _CLAIMS[key].check.__qualname__ != check.__qualname__:
            raise ValueError(
                f"claim {id!r} of plugin {plugin!r} is entered twice: {_CLAIMS[key].check.__name__} and {check.__name__}"
            )
        _CLAIMS[key] = Claim(plugin, id, statement, source, check, expect, cost)
        return check

    return add


def published(
    id: str,
    statement: str,
    *,
    plugin: str,
    source: str,
    config: str,
    metric: str,
    value: float,
    tolerance: float,
    where: dict[str, str] | None = None,
) -> Published:
    """Enter a published number into the ledger; `tolerance` is what counts as reproduced."""
    if tolerance <= 0:
        raise ValueError(f"published {id!r}: tolerance must be positive, got {tolerance}")
    row = Published(plugin, id, statement, source, config, metric, value, tolerance, tuple(sorted((where or {}).items())))
    if (plugin, id) in _PUBLISHED and _PUBLISHED[plugin, id] != row:
        raise ValueError(f"published number {id!r} of plugin {plugin!r} is entered twice")
    _PUBLISHED[plugin, id] = row
    return row


def load(plugin: str) -> None:
    """Import the claims of a plugin.

    Raises:
        KeyError: if no such plugin is installed.
        registry.PluginError: if it, or its claims, do not import.
    """
    registry.load_part(plugin, "claims")


def of(plugin: str) -> list[Claim]:
    """The claims of a plugin, in natural order of their ids."""
    load(plugin)
    return sorted((c for c in _CLAIMS.values() if c.plugin == plugin), key=lambda c: _natural(c.id))


def published_of(plugin: str) -> list[Published]:
    """The published numbers of a plugin, in the order of entry."""
    load(plugin)
    return [p for p in _PUBLISHED.values() if p.plugin == plugin]


def _natural(id: str) -> tuple[str, int, str]:
    head, _, tail = id.rpartition("-")
    digits = "".join(ch for ch in tail if ch.isdigit())
    return head, int(digits) if digits else 0, tail


@dataclasses.dataclass(frozen=True)
class Checked:
    """A claim with what its check found; `error` where the check itself failed."""

    claim: Claim
    verdict: Verdict | None
    seconds: float
    error: str = ""

    @property
    def as_expected(self) -> bool:
        return self.verdict is not None and self.verdict.outcome == self.claim.expect

    def row(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "plugin": self.claim.plugin, "id": self.claim.id, "statement": self.claim.statement, "source": self.claim.source,
            "verdict": verdict.outcome if verdict else "check failed", "expected": self.claim.expect,
            "measured": verdict.measured if verdict else self.error, "why": verdict.why if verdict else "", "seconds": round(self.seconds, 3),
        }  # fmt: skip


def run(one: Claim) -> Checked:
    """Run one check. Random states are put back, so that the order of checks changes nothing."""
    import torch

    from core.checkpoint import preserved_random_state

    started = time.perf_counter()
    try:
        with preserved_random_state():
            torch.manual_seed(0)
            verdict = one.check()
    except Exception as error:
        return Checked(one, None, time.perf_counter() - started, f"{type(error).__name__}: {error}")
    return Checked(one, verdict, time.perf_counter() - started)
