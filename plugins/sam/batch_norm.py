"""Batch norm whose statistics cover the whole global batch, on any number of processes and any device.

The release trains with synchronised batch norm. With one process, and in evaluation, this is `nn.BatchNorm2d`; state-dict names
are the same.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from core.distributed import gather, world


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, with mean and variance over all ranks in training. Every rank holds equally many samples."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if world() == 1 or not self.training:
            return super().forward(x)
        mean = self._over_ranks(reduce(x.float(), "b c h w -> 1 c", "mean"))
        centred = x.float() - rearrange(mean, "c -> c 1 1")
        variance = self._over_ranks(reduce(centred.square(), "b c h w -> 1 c", "mean"))
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                count = world() * x.numel() // x.shape[1]
                momentum = self.momentum if self.momentum is not None else 0.1
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * rearrange(scale, "c -> c 1 1") + rearrange(self.bias, "c -> c 1 1")).to(x.dtype)

    @staticmethod
    def _over_ranks(local: Float[Tensor, "1 c"]) -> Float[Tensor, "c"]:
        return gather(local).mean(dim=0)
