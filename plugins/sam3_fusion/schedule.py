"""Learning rates of runs in two phases."""

from __future__ import annotations

from collections.abc import Callable

from core.registry import register
from core.schedules import Cosine


@register("schedule")
class TwoPhases:
    """Another schedule twice: over the first steps, and over the rest.

    Args:
        first: steps of the first phase; 0 leaves one phase.
        schedule: constructor of the schedule.

    Raises:
        ValueError: for fewer than 0 steps.
    """

    def __init__(self, first: int, schedule: Callable[..., Callable[..., float]] = Cosine):
        if first < 0:
            raise ValueError(f"first must be 0 or more, got {first}")
        self.first, self.schedule = first, schedule()

    def __call__(self, done: int, total: int, base: float, steps_per_epoch: int | None = None) -> float:
        if done < self.first:
            return self.schedule(done, min(self.first, total), base, steps_per_epoch)
        return self.schedule(done - self.first, total - self.first, base, steps_per_epoch)
