"""Learning-rate schedules in closed form: the rate of a step is a function of its number, so nothing has to be stored.

A schedule is called as `schedule(done, total, base, steps_per_epoch)`: `done` steps are finished (0 … total-1), `base` is
the group's own rate, and the result is the rate of the next step. `steps_per_epoch` is None where a task has no epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch

from core.registry import register


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"schedules.{name} must be in [0, 1], got {value}")


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
        per: Literal["step", "epoch"] = "step",
        noise_pct: float = 0.0,
        noise_seed: int = 42,
    ):
        _fraction("Cosine.warmup", warmup)
        if warmup_start < 0 or floor < 0 or noise_pct < 0:
            raise ValueError(
                f"schedules.Cosine: warmup_start, floor and noise_pct must be 0 or more, got {warmup_start}, {floor}, {noise_pct}"
            )
        if warmup_mode == "ratio" and warmup_start > 1:
            raise ValueError(
                f"schedules.Cosine.warmup_start is a ratio of the base rate here and must be in [0, 1], got {warmup_start}"
            )
        if noise_pct and per != "epoch":
            raise ValueError("schedules.Cosine.noise_pct is noise per epoch and needs per = 'epoch'")
        self.warmup, self.warmup_mode, self.warmup_start, self.floor = warmup, warmup_mode, warmup_start, floor
        self.per, self.noise_pct, self.noise_seed = per, noise_pct, noise_seed

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        if self.per == "epoch":
            if not steps_per_epoch:
                raise ValueError("schedules.Cosine.per is 'epoch', but this task has no epochs; use 'step'")
            now, end = done // steps_per_epoch + 1, max(1, round(total / steps_per_epoch))
        else:
            now, end = done, total
        warm = round(self.warmup * end)
        if now < warm:
            start = base * self.warmup_start if self.warmup_mode == "ratio" else self.warmup_start
            rate = start + (base - start) * now / warm
        else:
            # The release's cosine runs over the whole length, warm-up included: the peak is never quite reached.
            rate = self.floor + 0.5 * (base - self.floor) * (1 + math.cos(math.pi * now / end))
        if self.noise_pct and now < end:
            rate *= 1 + _noise(self.noise_seed + now, self.noise_pct)
        return rate


@register("schedule", paper="DeepLab, Chen et al. 2017, sec. 4.1")
class Poly:
    """Linear warm-up from 0, then (1 - progress) to a power.

    Args:
        power: exponent.
        warmup: share of the run that warms up.
        floor: smallest rate.
    """

    def __init__(self, power: float = 0.9, warmup: float = 0.0, floor: float = 0.0):
        _fraction("Poly.warmup", warmup)
        if power <= 0 or floor < 0:
            raise ValueError(f"schedules.Poly: power must be positive and floor 0 or more, got {power}, {floor}")
        self.power, self.warmup, self.floor = power, warmup, floor

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        warm = round(self.warmup * total)
        if done < warm:
            return base * done / warm
        return max(self.floor, base * (1 - done / total) ** self.power)


@register("schedule")
class MultiStep:
    """The base rate times `gamma` for every milestone passed.

    Args:
        milestones: shares of the run, ascending.
        gamma: factor at each.
        warmup: share of the run that warms up linearly from 0.
    """

    def __init__(self, milestones: Sequence[float] = (0.4, 0.7), gamma: float = 0.1, warmup: float = 0.0):
        _fraction("MultiStep.warmup", warmup)
        if list(milestones) != sorted(milestones) or any(not 0 <= m <= 1 for m in milestones):
            raise ValueError(f"schedules.MultiStep.milestones must ascend within [0, 1], got {list(milestones)}")
        if gamma <= 0:
            raise ValueError(f"schedules.MultiStep.gamma must be positive, got {gamma}")
        self.milestones, self.gamma, self.warmup = tuple(milestones), gamma, warmup

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        warm = round(self.warmup * total)
        if done < warm:
            return base * done / warm
        return float(base * self.gamma ** sum(done >= m * total for m in self.milestones))
