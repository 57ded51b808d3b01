"""Learning-rate schedules in closed form: the rate of a step is a function of its number, so nothing has to be stored.

A schedule is called as `schedule(done, total, base, steps_per_epoch)`: `done` steps are finished (0 … total-1), `base` is
the group's own rate, and the result is the rate of the next step. `steps_per_epoch` is None where a task has no epochs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch

from core.registry import register

Mode = Literal["ratio", "absolute"]
Per = Literal["step", "epoch"]
Span = Literal["run", "rest"]


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"schedules.{name} must be in [0, 1], got {value}")


@dataclasses.dataclass(frozen=True)
class _Clock:
    """Where a run stands, and its warm-up: what the schedules have in common."""

    name: str
    warmup: float
    mode: Mode
    start: float
    per: Per
    span: Span = "run"

    def __post_init__(self) -> None:
        _fraction(f"{self.name}.warmup", self.warmup)
        if self.start < 0 or (self.mode == "ratio" and self.start > 1):
            rule = "a ratio of the base rate here and must be in [0, 1]" if self.mode == "ratio" else "a rate and must be 0 or more"
            raise ValueError(f"schedules.{self.name}.warmup_start is {rule}, got {self.start}")

    def read(self, done: int, total: int, steps_per_epoch: int | None) -> tuple[int, int]:
        """(now, end) in steps, counted from 0, or in epochs, counted from 1."""
        if self.per == "step":
            return done, total
        if not steps_per_epoch:
            raise ValueError(f"schedules.{self.name}.per is 'epoch', but this task has no epochs; use 'step'")
        return done // steps_per_epoch + 1, max(1, round(total / steps_per_epoch))

    def warming(self, now: int, end: int, base: float) -> float | None:
        """The rate during warm-up, None after it."""
        warm = round(self.warmup * end)
        if now >= warm:
            return None
        start = base * self.start if self.mode == "ratio" else self.start
        return start + (base - start) * now / warm

    def progress(self, now: int, end: int) -> float:
        """Share of the decay that lies behind: of the whole run, or of what is left of it after the warm-up."""
        before = 0 if self.span == "run" else round(self.warmup * end)
        return (now - before) / max(1, end - before)


@register("schedule")
class Constant:
    """The base rate throughout."""

    def __init__(self) -> None:
        pass

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        return base


@functools.lru_cache(maxsize=4096)
def _noise(seed: int, limit: float) -> float:
    """A standard normal draw, drawn again until it lies within the limit."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randn(1, generator=generator).item()
        if abs(drawn) < limit:
            return drawn


@register("schedule", paper="Loshchilov and Hutter 2017; DeMo's released schedule as an option", equations="eq. 5")
class Cosine:
    """Linear warm-up, then half a cosine down to a floor.

    Args:
        warmup: share of the run that warms up.
        warmup_mode: `ratio` starts each group at `warmup_start` times its own rate. `absolute` starts all groups at the
            rate `warmup_start`, as DeMo's release does; a group with a smaller rate then warms up *downwards*.
        warmup_start: ratio or rate to start from, by mode.
        floor: rate at the end, for every group.
        span: what the cosine runs over. The whole `run`, warm-up included, as in the release: the rate drops to the curve when
            the warm-up ends, and the base rate is never reached. Or the `rest` after the warm-up, from the base rate on.
        per: `step` moves at every step; `epoch` holds the rate through an epoch and counts epochs from 1, as the release does.
        noise_pct: the release's multiplicative noise: from epoch 1 to the last but one, each epoch's rate is multiplied by
            1 + n with n normal, drawn again until |n| < noise_pct. 0 is off. Needs per = 'epoch'.
        noise_seed: epoch t draws with seed noise_seed + t.
    """

    def __init__(
        self,
        warmup: float = 0.0,
        warmup_mode: Literal["ratio", "absolute"] = "ratio",
        warmup_start: float = 0.1,
        floor: float = 0.0,
        span: Literal["run", "rest"] = "run",
        per: Literal["step", "epoch"] = "step",
        noise_pct: float = 0.0,
        noise_seed: int = 42,
    ):
        self.clock = _Clock("Cosine", warmup, warmup_mode, warmup_start, per, span)
        if floor < 0 or noise_pct < 0:
            raise ValueError(f"schedules.Cosine: floor and noise_pct must be 0 or more, got {floor} and {noise_pct}")
        if noise_pct and per != "epoch":
            raise ValueError("schedules.Cosine.noise_pct is noise per epoch and needs per = 'epoch'")
        self.floor, self.noise_pct, self.noise_seed = floor, noise_pct, noise_seed

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        now, end = self.clock.read(done, total, steps_per_epoch)
        rate = self.clock.warming(now, end, base)
        if rate is None:
            rate = self.floor + 0.5 * (base - self.floor) * (1 + math.cos(math.pi * self.clock.progress(now, end)))
        if self.noise_pct and now < end:
            rate *= 1 + _noise(self.noise_seed + now, self.noise_pct)
        return rate


@register("schedule", paper="DeepLab, Chen et al. 2017, sec. 4.1")
class Poly:
    """Linear warm-up, then (1 - progress) to a power.

    Args:
        power: exponent.
        warmup, warmup_mode, warmup_start: as for `Cosine`; the start is 0 unless told.
        floor: smallest rate.
        span: what the decay runs over: the whole `run`, warm-up included, or the `rest` after it, as for `Cosine`.
        per: `step`, or `epoch`, as for `Cosine`.
    """

    def __init__(
        self,
        power: float = 0.9,
        warmup: float = 0.0,
        warmup_mode: Literal["ratio", "absolute"] = "ratio",
        warmup_start: float = 0.0,
        floor: float = 0.0,
        span: Literal["run", "rest"] = "run",
        per: Literal["step", "epoch"] = "step",
    ):
        self.clock = _Clock("Poly", warmup, warmup_mode, warmup_start, per, span)
        if power <= 0 or floor < 0:
            raise ValueError(f"schedules.Poly: power must be positive and floor 0 or more, got {power}, {floor}")
        self.power, self.floor = power, floor

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        now, end = self.clock.read(done, total, steps_per_epoch)
        rate = self.clock.warming(now, end, base)
        if rate is None:
            rate = max(self.floor, base * (1 - self.clock.progress(now, end)) ** self.power)
        return float(rate)


@register("schedule")
class MultiStep:
    """The base rate times `gamma` for every milestone passed.

    Args:
        milestones: shares of the run, ascending; each is rounded to a step or an epoch.
        gamma: factor at each.
        warmup, warmup_mode, warmup_start: as for `Cosine`; the start is 0 unless told. Milestones inside it still count.
        per: `step`, or `epoch`, as for `Cosine`.
    """

    def __init__(
        self,
        milestones: Sequence[float] = (0.4, 0.7),
        gamma: float = 0.1,
        warmup: float = 0.0,
        warmup_mode: Literal["ratio", "absolute"] = "ratio",
        warmup_start: float = 0.0,
        per: Literal["step", "epoch"] = "step",
    ):
        self.clock = _Clock("MultiStep", warmup, warmup_mode, warmup_start, per)
        if list(milestones) != sorted(milestones) or any(not 0 <= m <= 1 for m in milestones):
            raise ValueError(f"schedules.MultiStep.milestones must ascend within [0, 1], got {list(milestones)}")
        if gamma <= 0:
            raise ValueError(f"schedules.MultiStep.gamma must be positive, got {gamma}")
        self.milestones, self.gamma = tuple(milestones), gamma

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        now, end = self.clock.read(done, total, steps_per_epoch)
        base = base * self.gamma ** sum(now >= round(m * end) for m in self.milestones)
        rate = self.clock.warming(now, end, base)
        return float(base if rate is None else rate)
