"""Batch norm over ranks: two processes compute, forward and backward, what one computes on the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from plugins.sam.batch_norm import BatchNorm


def case():
    torch.manual_seed(0)
    x, cotangent = torch.randn(4, 3, 2, 5) * 2 + 1, torch.randn(4, 3, 2, 5)
    norm = BatchNorm(3, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, x, cotangent


def test_one_process_is_torch_s_own():
    norm, x, _ = case()
    twin = nn.BatchNorm2d(3, eps=1e-3)
    twin.load_state_dict(norm.state_dict())
    for training in (True, False):
        assert torch.equal(norm.train(training)(x), twin.train(training)(x))
    assert set(norm.state_dict()) == set(twin.state_dict())


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    norm, x, cotangent = case()
    mine = slice(2 * rank, 2 * rank + 2)
    part = x[mine].clone().requires_grad_()
    out = norm.train()(part)
    # What DistributedDataParallel does with each rank's loss: gradients are averaged.
    (2 * (out * cotangent[mine]).sum()).backward()
    for parameter in norm.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    evaluated = norm.eval()(x)
    torch.save(
        {
            "out": out.detach(),
            "x": part.grad / 2,
            "weight": norm.weight.grad,
            "bias": norm.bias.grad,
            "state": norm.state_dict(),
            "eval": evaluated.detach(),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_ranks_are_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    norm, x, cotangent = case()
    twin = nn.BatchNorm2d(3, eps=1e-3)
    twin.load_state_dict(norm.state_dict())
    x.requires_grad_()
    out = twin.train()(x)
    (out * cotangent).sum().backward()
    assert_close(torch.cat([r["out"] for r in ranks]), out.detach(), atol=1e-5, rtol=1e-5)
    assert_close(torch.cat([r["x"] for r in ranks]), x.grad, atol=1e-5, rtol=1e-4)
    for r in ranks:
        assert_close(r["weight"], twin.weight.grad, atol=1e-5, rtol=1e-4)
        assert_close(r["bias"], twin.bias.grad, atol=1e-5, rtol=1e-4)
        assert_close(dict(r["state"]), dict(twin.state_dict()), atol=1e-5, rtol=1e-5)
        assert_close(r["eval"], twin.eval()(x).detach(), atol=1e-5, rtol=1e-5)
        twin.train()
