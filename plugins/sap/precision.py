"""Parts of a step that stay in float32 under mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `like`; cast the inputs yourself with `.float()`.

    Bfloat16 has steps of 0.004 near 1, so a cosine times 25 is off by 0.1 before the softmax sees it. The similarity
    matrices of this plugin are small, and exactness costs nothing.
    """
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
