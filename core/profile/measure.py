"""Latency and memory, measured on the device at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler writes two lines to stderr each time otherwise


@dataclasses.dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of one forward.

    Attributes:
        median_s, low_s, high_s: median and quartiles of the timed forwards; `spread_s` is the distance of the quartiles.
        fastest_s: the shortest.
        n: timed forwards. `warmup`: forwards that ran before them and are not among them.
        threads: intra-op threads on a CPU, 0 on other devices.
    """

    median_s: float
    low_s: float
    high_s: float
    fastest_s: float
    n: int
    warmup: int
    device: str
    threads: int

    @property
    def spread_s(self) -> float:
        return self.high_s - self.low_s


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one forward.

    Attributes:
        peak_bytes: the most that was allocated at one time beyond what was there before the forward.
        resting_bytes: parameters and buffers.
        method: how it was measured.
    """

    peak_bytes: int
    resting_bytes: int
    method: str


def device_of(module: nn.Module, inputs: Any = ()) -> torch.device:
    """The device of the first parameter, else of the first buffer, else of the first tensor among the inputs, else the CPU."""
    from torch.utils._pytree import tree_leaves

    found = [*module.parameters(), *module.buffers(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))]
    return found[0].device if found else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What a reader knows the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    return str(device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def latency(forward: Callable[[], Any], device: torch.device, *, repeats: int = 10, warmup: int = 2, ran: int = 0) -> Latency:
    """Time a forward.

    Args:
        repeats: timed forwards. warmup: untimed ones run here first. ran: untimed ones that the caller ran already.

    Raises:
        ValueError: if there is nothing to take a median of.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        forward()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        forward()
        synchronise(device)
        times.append(time.perf_counter() - start)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if repeats > 1 else times * 3
    return Latency(
        median_s=statistics.median(times),
        low_s=low,
        high_s=high,
        fastest_s=min(times),
        n=repeats,
        warmup=warmup + ran,
        device=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def peak_memory(forward: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """The most memory that one forward holds at a time beyond what was held before, in bytes, and how that was measured.

    On a CUDA device the caching allocator's own high-water mark; on a CPU every allocation and release of a tensor,
    temporaries of kernels included, as torch's profiler logs them: exact and the same each time, unlike resident memory.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler:
        result = forward()
    del result
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, "allocations logged by torch.autograd.profiler"


@contextlib.contextmanager
def module_times(names: Mapping[nn.Module, str], device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in each module, what it calls included, summed over its calls; filled while the context is open."""
    spent: dict[str, float] = defaultdict(float)
    started: list[float] = []

    def enter(*_: Any) -> None:
        synchronise(device)
        started.append(time.perf_counter())

    def leave(module: nn.Module, *_: Any) -> None:
        synchronise(device)
        seconds = time.perf_counter() - started.pop()
        if module in names:
            spent[names[module]] += seconds

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
