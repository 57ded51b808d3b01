"""A random stream of its own for each purpose of a training step.

With one global stream, a dropout mask drawn in one branch moves every later draw of the others, so that switching a
module on or off changes the whole run. Here each part draws from a stream named by (seed, step, purpose).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["intrinsic", "domain", "purification", "domain_classifier", "intrinsic_contrast", "domain_contrast"]


@contextmanager
def stream(key: tuple[int, ...] | None, purpose: Purpose, device: torch.device) -> Iterator[None]:
    """Draw inside the block from the stream (key, purpose), and leave the global ones as they were.

    Generator states live on the host, on accelerators too: nothing waits.

    Args:
        key: integers that name the step; None draws from the global streams.
        purpose: who draws.
        device: where.
    """
    if key is None:
        yield
        return
    words = [k & 0xFFFFFFFF for k in (*key, get_args(Purpose).index(purpose))]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
