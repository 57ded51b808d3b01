"""A mode in which everything that would wait for an accelerator raises."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.item.default}


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor's value would have to reach the host: `.item()`, `bool(tensor)`, boolean indexing, `nonzero`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise AssertionError(f"{func} waits for the device")
        if func in (aten.index.Tensor, aten.index_put_.default) and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError(f"{func} with a boolean mask waits for the device")
        return func(*args, **(kwargs or {}))
