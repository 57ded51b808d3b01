"""The task protocol: what a reproduction gives, and all that the trainer knows of it.

A reproduction is a Task. It prepares its data, builds its model, turns a batch into named losses and evaluates to named
metrics. Everything else (tables for people, pictures, inputs for the profiler) is optional and has a default.

The order of calls in a run, all in one process:

    prepare(run folder) -> model() -> batches(start) -> losses(model, batch, step) … -> evaluate(model) -> tables, pictures

`model()` is called after seeding. Ranks of a distributed run each see the whole global batch plan and take their shard of
it; what couples samples (batch norm, mining of triplets) gathers first (`core.distributed.gather`), so that two ranks
compute what one process computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass
class StepResult:
    """What a batch came to.

    Attributes:
        losses: named loss terms, already weighted; their sum is what is differentiated.
        monitors: named scalars that are only logged. Both stay tensors on the device until they are logged.
    """

    losses: dict[str, Tensor]
    monitors: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataCard:
    """What data a run saw. `sample` is True for generated data, and then every output says so."""

    name: str
    root: str
    fingerprint: str
    sample: bool
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Table:
    """A small table for people: shown at the end of a run, and in its report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


class Task:
    """Base class of all reproductions. Subclasses are registered with `@register("task", …)`."""

    def prepare(self, workspace: Path) -> DataCard:
        """Open (or, for a sample, make) the data. Called once, before the model exists.

        Args:
            workspace: folder under which generated sample data may be kept and found again.

        Raises:
            ValueError: if the data is missing or damaged; the message says what is missing and what to do.
        """
        raise NotImplementedError

    def model(self) -> nn.Module:
        """Build the model on the CPU. Called after seeding, so that one seed gives one model."""
        raise NotImplementedError

    def batches(self, start: int, seed: int) -> Iterator[Any]:
        """Endless batches from global step `start` on. Batch number t depends on (seed, t) alone, never on the past."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Any, step: int) -> StepResult:
        """Named, weighted loss terms of one batch (already on the model's device)."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Named metrics of the model in evaluation mode. Must not touch any global random state."""
        raise NotImplementedError

    def conclude(self, model: nn.Module) -> dict[str, float]:
        """Further metrics that are measured once, after the last step. Same rules as `evaluate`."""
        return {}

    # --- optional -----------------------------------------------------------------------------------------------------

    def steps_per_epoch(self) -> int | None:
        """Optimiser steps that make one epoch, for schedules written in epochs. None where epochs mean nothing."""
        return None

    def parameter_rules(self) -> Sequence[tuple[str, Mapping[str, float]]]:
        """Rules (regular expression on parameter names, settings), first match wins: lr_scale, lr, weight_decay."""
        return ()

    def clip_groups(self, model: nn.Module) -> Mapping[str, Iterable[nn.Parameter]]:
        """Named groups of parameters whose gradient norm is clipped apart. Default: one group, all parameters."""
        return {"all": model.parameters()}

    def state(self) -> dict[str, Any]:
        """State of the task itself that a checkpoint has to carry (tensors, numbers, strings, lists, dicts)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""

    def tables(self, metrics: Mapping[str, float]) -> list[Table]:
        """The result for people. Default: every metric in one table."""
        return [Table("metrics", ("metric", "value"), [(k, v) for k, v in metrics.items()])]

    def pictures(self, model: nn.Module, folder: Path) -> None:
        """Write pictures of what the model does (PNG, deterministic names) into `folder`."""

    def leave(self, model: nn.Module, folder: Path) -> None:
        """Write into `folder`, the run's own, what else a finished run leaves behind: weights for use elsewhere, say."""

    def profile_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Positional inputs of `model()` at the configured size, for the FLOP profile.

        Raises:
            NotImplementedError: if the task has none; the profile then says so.
        """
        raise NotImplementedError(f"{type(self).__name__} has no profile_inputs, so there is nothing to count")

    def real_inputs(self, count: int) -> Iterator[tuple[Any, ...]]:
        """Positional inputs of `model()` from the test split, one sample each, at most `count`; called after `prepare`.

        This is what `repro profile --inputs` counts, where the path of the forward depends on what comes in.

        Raises:
            NotImplementedError: if the task has none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no real_inputs, so `--inputs` has nothing to count")

    def blueprint(self) -> nn.Module:
        """The model at its published size, built without any data (the published number of identities, say).

        This is what `repro profile` counts, and `repro export` loads a run into, where the data are not at hand. Default: `model()`.
        """
        return self.model()

    def unpruned(self, model: nn.Module) -> nn.Module | None:
        """The same model without what drops or merges tokens, to compare with; None where nothing is dropped."""
        return None

    def profile_scopes(self, model: nn.Module) -> Mapping[str, tuple[str | None, str | None]]:
        """Parts to compare beside the whole: label -> (module name in `unpruned()`, module name in the model), None where absent."""
        return {}

    def expected(self) -> Mapping[str, float]:
        """Published values of this configuration by metric name, for tables and the claims ledger."""
        return {}
