"""One process or several: rank, world, and the gather that makes several compute what one does.

Ranks come from torchrun's environment, or from SLURM's through the launcher, which sets the same variables. Without
them everything here is the identity.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def start(device: torch.device, timeout_s: float = 600.0) -> None:
    """Join the process group that the environment describes, if it describes one (torchrun sets WORLD_SIZE and RANK).

    Raises:
        ValueError: if the environment is incomplete.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set; start with torchrun or `repro sweep`"
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s))


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def shard(items: Sequence[Any]) -> tuple[int, list[Any]]:
    """This rank's contiguous part of a global batch, and the position of its first item.

    Raises:
        ValueError: if the batch does not divide evenly.
    """
    count = world()
    if count == 1:
        return 0, list(items)
    size, rest = divmod(len(items), count)
    if rest:
        raise ValueError(f"a global batch of {len(items)} does not divide over {count} processes; choose a multiple")
    first = rank() * size
    return first, list(items[first : first + size])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = x.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank holds the loss of the whole batch; DistributedDataParallel averages over ranks afterwards, so the
        # sum over ranks here and the mean there leave exactly the gradient one process would have.
        total = grads[0].contiguous()
        dist.all_reduce(total)
        first = rank() * ctx.rows
        return total[first : first + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Concatenate over ranks along the first axis, in rank order and with gradient. Identity with one process.

    What couples the samples of a batch (batch norm, mining of triplets, contrastive pairs) gathers first and then
    computes on the global batch on every rank. Inside a model, gather in training mode only: every rank evaluates all data.
    """
    if world() == 1:
        return x
    if not x.requires_grad:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    out: Tensor = _Gather.apply(x)
    return out


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean of scalar tensors over ranks (one collective for all of them)."""
    if world() == 1 or not values:
        return values
    stacked = torch.stack([v.detach().float() for v in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked / world()))


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    if world() == 1:
        return flag
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around the model where there are several processes.

    Buffers are not broadcast: batch statistics come from gathered features and are equal on all ranks already.
    """
    if world() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True)
