"""The release's learning-rate lag: its loop sets the rate after the update, so that every step runs on the rate of the one before."""

from __future__ import annotations

from collections.abc import Callable

from core.registry import register
from core.schedules import Poly


@register("schedule", paper="DFormer's released training loop")
class Lagged:
    """Another schedule, one step late; the first step runs at the full base rate.

    With the release's warm-up from 0, the sequence at a base rate of 6e-5 is 6e-5, 0, and up from there.

    Args:
        schedule: constructor of the schedule that lags.
    """

    def __init__(self, schedule: Callable[..., Callable[..., float]] = Poly):
        self.schedule = schedule()

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        return base if done == 0 else self.schedule(done - 1, total, base, steps_per_epoch)
