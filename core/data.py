"""Data whose order and randomness are a function of (seed, step), so that a run resumes exactly at any step.

A *dataset* has `__len__` and `sample(index, rng) -> dict`; all randomness of a sample comes from the `rng` it is handed.
A *plan* says which indices make the batches of an epoch. A `Stream` walks the plan: batch number t is found by counting,
its generator is made by counting, and nothing about it has to be stored. Workers, restarts and ranks change nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core import distributed
from core.options import require_choice

Sample = dict[str, Any]
_PLAN, _SAMPLE = 0, 1  # purposes: separate random streams


class Dataset(Protocol):
    """What a Stream reads."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample: ...


class Plan(Protocol):
    """Which samples make the batches of an epoch."""

    def epoch(self, number: int, rng: np.random.Generator) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a data check: what was looked at, what was found, what was expected."""

    level: Literal["ok", "warning", "error"]
    what: str
    found: str
    expected: str = ""


class Shuffled:
    """Every sample once an epoch in random order, in batches of `batch_size`.

    Args:
        length: number of samples.
        batch_size: samples a batch (over all ranks).
        shuffle: False keeps the order.
        last_batch: `drop` leaves out what does not fill a batch; `fill` gives one batch more, length // batch_size + 1 of them
            (also where nothing is left over, as DFormer's release counts), and completes it with samples drawn anew.

    Raises:
        ValueError: if there are fewer samples than one batch needs.
    """

    def __init__(self, length: int, batch_size: int, shuffle: bool = True, last_batch: Literal["drop", "fill"] = "drop"):
        if not 0 < batch_size <= length:
            raise ValueError(f"batch_size must be in 1..{length} (the number of samples), got {batch_size}")
        require_choice("last_batch", last_batch, Literal["drop", "fill"])
        self.length, self.batch_size, self.shuffle, self.last_batch = length, batch_size, shuffle, last_batch

    def epoch(self, number: int, rng: np.random.Generator) -> list[list[int]]:
        order = rng.permutation(self.length) if self.shuffle else np.arange(self.length)
        count = self.batches_per_epoch()
        missing = max(0, count * self.batch_size - self.length)
        if missing:
            again = rng.permutation(self.length) if self.shuffle else np.arange(self.length)
            order = np.concatenate([order, again[:missing]])
        return order[: count * self.batch_size].reshape(count, self.batch_size).tolist()

    def batches_per_epoch(self) -> int:
        return self.length // self.batch_size + (self.last_batch == "fill")


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack tensors and arrays, make int64 tensors of ints and float32 tensors of floats, keep the rest as lists."""
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [s[key] for s in samples]
        if isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, np.ndarray):
            batch[key] = torch.from_numpy(np.stack(values))
        elif isinstance(first, (bool, int, np.integer)):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        elif isinstance(first, float):
            batch[key] = torch.tensor(values, dtype=torch.float32)
        else:
            batch[key] = values
    return batch


def generator(*key: int) -> np.random.Generator:
    """A random stream named by integers: equal keys give equal streams, different keys independent ones."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([k & 0xFFFFFFFFFFFFFFFF for k in key])))


class _Fetch(torch.utils.data.Dataset[Any]):
    """A batch by its key, so that DataLoader workers can make whole batches."""

    def __init__(self, dataset: Dataset, seed: int, collate_fn: Callable[[Sequence[Sample]], Any]):
        self.dataset, self.seed, self.collate = dataset, seed, collate_fn

    def __getitem__(self, key: tuple[int, int, int, list[int]]) -> Any:
        epoch, batch, first, indices = key
        samples = [
            self.dataset.sample(index, generator(self.seed, _SAMPLE, epoch, batch, first + position))
            for position, index in enumerate(indices)
        ]
        return self.collate(samples)


class Stream:
    """Endless batches of a dataset under a plan.

    Args:
        dataset: gives samples.
        plan: gives index batches by epoch (global batches; each rank reads its own shard of every batch).
        seed: names the random streams of order and augmentation.
        workers: loader processes; 0 loads in this process. The batches are the same for every number.
        timeout_s: with workers, how long one batch may take before the run stops with an error.
        collate_fn: samples to batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        seed: int,
        *,
        workers: int = 0,
        timeout_s: float = 120.0,
        collate_fn: Callable[[Sequence[Sample]], Any] = collate,
    ):
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        self.plan, self.seed, self.workers, self.timeout_s = plan, seed, workers, timeout_s
        self.fetch = _Fetch(dataset, seed, collate_fn)

    def keys(self, start: int) -> Iterator[tuple[int, int, int, list[int]]]:
        """(epoch, batch in epoch, first position of this rank's shard, indices of the shard) from step `start` on."""
        seen, epoch = 0, 0
        while True:
            batches = self.plan.epoch(epoch, generator(self.seed, _PLAN, epoch))
            if not batches:
                raise ValueError(f"the plan gives no batch in epoch {epoch}: fewer samples than one batch needs")
            if seen + len(batches) > start:
                for number, indices in enumerate(batches):
                    if seen + number >= start:
                        first, mine = distributed.shard(indices)
                        yield epoch, number, first, mine
            seen += len(batches)
            epoch += 1

    def batches(self, start: int = 0) -> Iterator[Any]:
        """Batches from global step `start` on.

        Raises:
            RuntimeError: if a worker dies or stalls longer than `timeout_s`; the message says so.
        """
        if self.workers == 0:
            for key in self.keys(start):
                yield self.fetch[key]
            return
        loader: DataLoader[Any] = DataLoader(
            self.fetch,
            sampler=self.keys(start),  # type: ignore[arg-type]  # one key is one whole batch
            batch_size=None,
            num_workers=self.workers,
            timeout=self.timeout_s,
            generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global stream
        )
        iterator = iter(loader)
        while True:
            try:
                batch = next(iterator)
            except (RuntimeError, EOFError, ConnectionError) as error:  # a dying worker shows itself in any of these
                if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                    raise
                said = str(error) or "a worker died"
                limit = f"{self.workers} workers, limit {self.timeout_s:g} s a batch"
                raise RuntimeError(f"data loading failed ({limit}): {said}") from error
            yield batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a nested batch on `device`, without waiting for the copy."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def fingerprint(root: Path, files: Sequence[Path], *, contents: bool = False) -> str:
    """sha256 (first 16 hex digits) over sorted relative names and sizes, and with `contents` over the bytes too."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        if contents:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
