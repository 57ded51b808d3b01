"""Counts against closed forms, error 0; against what torch executes; and against fvcore where fvcore is right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import (
    batchnorm_flop_jit,
    elementwise_flop_counter,
    norm_flop_counter,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.profile import Call, Cost, FlopCount, UncountedOperatorError, einsum_macs, formula, profile

DEVICES = ["cpu", "meta"]


def macs(function: Callable[..., Any] | nn.Module, *inputs: Any) -> int:
    return profile(function, inputs, timed=False).macs


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("left", "right", "count"),
    [
        ((5,), (5,), 5),
        ((3, 5), (5,), 15),
        ((5,), (5, 7), 35),
        ((3, 5), (5, 7), 105),
        ((2, 3, 5), (5, 7), 210),
        ((2, 3, 5), (2, 5, 7), 210),
        ((4, 1, 3, 5), (2, 5, 7), 4 * 2 * 105),
        ((2, 3, 5), (5,), 30),
        ((5,), (2, 5, 7), 70),
        ((1, 3, 5), (6, 1, 5, 7), 6 * 105),
        ((0, 5), (5, 7), 0),
    ],
)
def test_matmul_in_every_broadcast_form(left: tuple[int, ...], right: tuple[int, ...], count: int, device: str) -> None:
    a, b = torch.zeros(left, device=device), torch.zeros(right, device=device)
    assert macs(torch.matmul, a, b) == count
    assert macs(lambda x, y: x @ y, a, b) == count


def _z(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("function", "inputs", "count"),
    [
        (torch.mm, (_z(3, 5), _z(5, 7)), 105),
        (torch.addmm, (_z(7), _z(3, 5), _z(5, 7)), 105),
        (torch.bmm, (_z(2, 3, 5), _z(2, 5, 7)), 210),
        (torch.baddbmm, (_z(2, 3, 7), _z(2, 3, 5), _z(2, 5, 7)), 210),
        (torch.addbmm, (_z(3, 7), _z(2, 3, 5), _z(2, 5, 7)), 210),
        (lambda x, a, b: x.baddbmm_(a, b), (_z(2, 3, 7), _z(2, 3, 5), _z(2, 5, 7)), 210),
        (torch.mv, (_z(3, 5), _z(5)), 15),
        (torch.addmv, (_z(3), _z(3, 5), _z(5)), 15),
        (torch.dot, (_z(5), _z(5)), 5),
        (torch.vdot, (_z(5), _z(5)), 5),
        (torch.linalg.vecdot, (_z(4, 1, 5), _z(3, 5)), 60),
        (torch.inner, (_z(2, 3, 5), _z(4, 5)), 120),
        (torch.outer, (_z(3), _z(5)), 15),
        (torch.addr, (_z(3, 5), _z(3), _z(5)), 15),
        (lambda a, b: torch.tensordot(a, b, dims=([2, 0], [0, 1])), (_z(2, 3, 5), _z(5, 2, 7)), 2 * 3 * 5 * 7),
        (lambda a, b: torch.tensordot(a, b, dims=([-1], [-2])), (_z(2, 3, 5), _z(5, 7)), 2 * 3 * 5 * 7),
        (lambda a, b: torch.chain_matmul(a, b, b), (_z(3, 5), _z(5, 5)), 2 * 3 * 5 * 5),
        (torch.linalg.multi_dot, ([_z(3, 5), _z(5, 7), _z(7, 2)],), 5 * 7 * 2 + 3 * 5 * 2),  # the cheaper order
        (F.linear, (_z(2, 3, 5), _z(7, 5), _z(7)), 210),
        (F.linear, (_z(2, 3, 5), _z(5)), 30),
        (F.bilinear, (_z(2, 3, 5), _z(2, 3, 4), _z(6, 5, 4)), 2 * 3 * 6 * (5 * 4 + 4)),
        (torch.cdist, (_z(2, 3, 5), _z(2, 4, 5)), 120),
        (torch.cdist, (_z(2, 40, 5), _z(2, 60, 5)), 2 * 40 * 60 * 5),  # above 25 rows torch goes through matmul
        (lambda a, b: torch.cdist(a, b, p=1.0), (_z(2, 40, 5), _z(60, 5)), 2 * 40 * 60 * 5),
        (F.pdist, (_z(6, 5),), 15 * 5),
    ],
)
def test_products(function: Callable[..., Any], inputs: tuple[Any, ...], count: int) -> None:
    assert macs(function, *inputs) == count


# --- einsum: against the products that torch executes ------------------------------------------------------------------


class Executed(TorchDispatchMode):
    """Multiplications in what torch runs after it has taken an einsum apart: batched products, and pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.count += args[0].numel() * args[1].shape[-1]
        elif func is torch.ops.aten.mul.Tensor:
            self.count += out.numel()
        return out


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]], list[int] | None]:
    letters = "abcde"
    sizes = {letter: draw(st.integers(1, 4)) for letter in letters}
    terms = draw(st.lists(st.lists(st.sampled_from(letters), min_size=1, max_size=4), min_size=1, max_size=4))
    used = sorted({letter for term in terms for letter in term})
    result = draw(st.permutations(draw(st.lists(st.sampled_from(used), unique=True))))
    dots = draw(st.booleans())
    batch = draw(st.lists(st.integers(1, 3), max_size=2)) if dots else []
    shapes = []
    for term in terms:
        own = tuple(batch[draw(st.integers(0, len(batch))) :])  # fewer axes, and axes of size 1, broadcast
        own = tuple(1 if draw(st.booleans()) else size for size in own)
        shapes.append(own + tuple(sizes[letter] for letter in term))
    prefix = "..." if dots else ""
    equation = ",".join(prefix + "".join(term) for term in terms)
    if draw(st.booleans()) or dots:
        equation += "->" + prefix + "".join(result)
    pairs = [x for left in range(len(terms), 1, -1) for x in draw(st.permutations(range(left)))[:2]]
    path = pairs if len(terms) > 1 and draw(st.booleans()) else None
    return equation, shapes, path


@settings(max_examples=150, deadline=None)
@given(equations())
def test_einsum_is_what_torch_executes(case: tuple[str, list[tuple[int, ...]], list[int] | None]) -> None:
    equation, shapes, path = case
    with Executed() as executed:
        torch._C._VariableFunctions.einsum(equation, [torch.zeros(shape) for shape in shapes], path=path)
    assert einsum_macs(equation, shapes, path) == executed.count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("equation", "shapes", "count"),
    [
        ("b h n d, b h m d -> b h n m", [(2, 8, 64, 32), (2, 8, 64, 32)], 2_097_152),  # fvcore prints this as 2.097e+06
        ("bnc,bmc,bmd->bnd", [(2, 6, 8), (2, 5, 8), (2, 5, 7)], 2 * 6 * 5 * 8 + 2 * 6 * 5 * 7),  # left to right
        ("bmd,bmc,bnc->bnd", [(2, 5, 7), (2, 5, 8), (2, 6, 8)], 2 * 5 * 7 * 8 + 2 * 6 * 7 * 8),  # and in another order
        ("bi,bj->bij", [(4, 32), (4, 32)], 4096),
        ("bi,bi->b", [(4, 32), (4, 32)], 128),
        ("i,j->", [(3,), (5,)], 1),  # both are summed first
        ("bij->b", [(2, 3, 4)], 0),
    ],
)
def test_einsum_in_a_model(equation: str, shapes: list[tuple[int, ...]], count: int, device: str) -> None:
    assert macs(lambda *xs: torch.einsum(equation, *xs), *(torch.zeros(shape, device=device) for shape in shapes)) == count


def test_an_outer_product_has_one_count_in_every_spelling() -> None:
    a, b = _z(4, 32), _z(4, 16)
    spellings = [
        lambda: torch.einsum("bi,bj->bij", a, b),
        lambda: a[:, :, None] @ b[:, None, :],
        lambda: torch.bmm(a.unsqueeze(2), b.unsqueeze(1)),
        lambda: torch.stack([torch.outer(x, y) for x, y in zip(a, b)]),
    ]
    assert [macs(spelling) for spelling in spellings] == [4 * 32 * 16] * 4


def test_einsum_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="axis j is 3 and 4"):
        einsum_macs("ij,jk->ik", [(2, 3), (4, 5)])
    with pytest.raises(ValueError, match="names 2 operands, got 1"):
        einsum_macs("ij,jk->ik", [(2, 3)])
    with pytest.raises(ValueError, match="has 2 axes, got shape"):
        einsum_macs("ij,jk->ik", [(2, 3), (3,)])


# --- attention --------------------------------------------------------------------------------------------------------


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("heads", "queries", "keys", "dim", "value"), [(8, 64, 64, 32, 32), (2, 5, 9, 12, 12), (3, 7, 4, 8, 6)])
def test_scaled_dot_product_attention(heads: int, queries: int, keys: int, dim: int, value: int, grad: bool, device: str) -> None:
    q = torch.zeros(2, heads, queries, dim, device=device, requires_grad=grad)
    k, v = torch.zeros(2, heads, keys, dim, device=device), torch.zeros(2, heads, keys, value, device=device)
    count = 2 * heads * queries * keys * (dim + value)
    assert macs(F.scaled_dot_product_attention, q, k, v) == count == macs(explicit_attention, q, k, v)
    for mask in (
        torch.ones(queries, keys, dtype=torch.bool, device=device),
        torch.zeros(2, 1, queries, keys, device=device),
        torch.zeros(2, heads, 1, keys, device=device),
    ):
        assert macs(F.scaled_dot_product_attention, q, k, v, mask) == count
    assert macs(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1), q, k, v) == count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (6, 3), (4, 1)])
def test_grouped_query_attention(heads: int, groups: int, device: str) -> None:
    q = torch.zeros(2, heads, 5, 8, device=device)
    k = v = torch.zeros(2, groups, 7, 8, device=device)
    assert macs(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v) == 2 * heads * 5 * 7 * (8 + 8)


def test_attention_compares_the_same_elements_in_both_spellings() -> None:
    q = _z(2, 3, 5, 8)
    fused, by_hand = (profile(f, (q, q, q), timed=False) for f in (F.scaled_dot_product_attention, explicit_attention))
    assert fused.operator("aten::softmax").elements == by_hand.operator("aten::softmax").elements == 2 * 3 * 5 * 5
    assert fused.operator("aten::softmax").calls == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_module(batch_first: bool, need_weights: bool, train: bool, device: str) -> None:
    module = nn.MultiheadAttention(64, 8, batch_first=batch_first).to(device).train(train)
    x = torch.zeros((2, 16, 64) if batch_first else (16, 2, 64), device=device)
    record = profile(lambda x: module(x, x, x, need_weights=need_weights)[0], (x,), timed=False)
    assert record.macs == 4 * 2 * 16 * 64 * 64 + 2 * 2 * 16 * 16 * 64 == 589_824
    assert record.coverage == 1


@pytest.mark.parametrize("train", [False, True])
def test_multihead_attention_across_widths_and_with_padding(train: bool) -> None:
    module = nn.MultiheadAttention(32, 4, kdim=24, vdim=40, batch_first=True).train(train)
    q, k, v, padding = _z(2, 5, 32), _z(2, 9, 24), _z(2, 9, 40), torch.zeros(2, 9, dtype=torch.bool)
    expected = 2 * (5 * 32 * 32 + 9 * 24 * 32 + 9 * 40 * 32 + 2 * 5 * 9 * 32 + 5 * 32 * 32)
    assert macs(lambda q, k, v, p: module(q, k, v, key_padding_mask=p), q, k, v, padding) == expected


def test_heads_do_not_change_the_count() -> None:
    counts = {heads: macs(nn.MultiheadAttention(64, heads, batch_first=True).eval(), *(_z(2, 16, 64),) * 3) for heads in (1, 4, 8)}
    assert set(counts.values()) == {589_824}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(norm_first: bool, train: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 8, 256, batch_first=True, norm_first=norm_first).train(train)
    record = profile(layer, _z(2, 16, 64), timed=False)
    assert record.macs == 589_824 + 2 * 2 * 16 * 64 * 256
    assert record.norms == 2 * 5 * 2 * 16 * 64


def test_the_fused_kernels_of_the_fast_path_have_the_same_count() -> None:
    module = nn.MultiheadAttention(64, 8, batch_first=True).eval()
    x = _z(2, 16, 64)
    fused = lambda x: torch._native_multi_head_attention(  # noqa: E731
        x, x, x, 64, 8, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias, need_weights=False
    )
    assert macs(fused, x) == 589_824


# --- convolution, recurrence ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    axes=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    device=st.sampled_from(DEVICES),
)
def test_convolutions(
    axes: int, transposed: bool, groups: int, kernel: int, stride: int, padding: int, dilation: int, device: str
) -> None:
    family = {False: (nn.Conv1d, nn.Conv2d, nn.Conv3d), True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "device": device}
    module = family[transposed][axes - 1](4, 8, kernel, **settings)
    x = torch.zeros((2, 4, *(7, 6, 5)[:axes]), device=device)
    out = module(x)
    if transposed:
        expected = x.numel() * (8 // groups) * kernel**axes
    else:
        expected = out.numel() * (4 // groups) * kernel**axes
    assert macs(module, x) == expected
    if device == "cpu":
        assert FlopCountAnalysis(module, x).total() == expected


def test_convolution_in_a_slow_loop() -> None:
    module, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), _z(2, 4, 7, 5)
    multiplications = 0
    for _ in range(2):  # sample
        for _ in range(6):  # output channel
            for _ in range((7 + 2 - 3) // 2 + 1):  # row
                for _ in range((5 + 2 - 3) // 2 + 1):  # column
                    multiplications += 2 * 3 * 3  # channels of the group, kernel; taps on padding are computed
    assert macs(module, x) == multiplications


@pytest.mark.parametrize("device", DEVICES)
def test_convolutions_of_other_spellings(device: str) -> None:
    x = torch.zeros(2, 4, 7, 6, device=device)
    assert macs(nn.Conv2d(4, 8, 3, padding="same", device=device), x) == 2 * 8 * 7 * 6 * 4 * 9
    assert macs(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", device=device), x) == 2 * 8 * 7 * 6 * 4 * 9
    assert macs(nn.Conv2d(4, 8, 3, device=device), x[0]) == 8 * 5 * 4 * 4 * 9
    if device == "cpu":
        assert macs(torch.conv_tbc, _z(9, 2, 4), _z(3, 4, 5), _z(5)) == 7 * 2 * 5 * 3 * 4


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_modules(kind: type[nn.Module], gates: int, bidirectional: bool) -> None:
    module = kind(8, 16, num_layers=2, bidirectional=bidirectional)
    ways = 2 if bidirectional else 1
    count = 5 * 3 * ways * gates * 16 * ((8 + 16) + (ways * 16 + 16))
    assert macs(module, _z(5, 3, 8)) == count
    packed = nn.utils.rnn.pack_padded_sequence(_z(5, 3, 8), torch.tensor([5, 3, 1]))
    assert macs(module, packed) == count // 15 * 9
    assert macs(nn.LSTMCell(8, 16), _z(3, 8)) == 3 * 4 * 16 * (8 + 16)


# --- norms and resampling: fvcore's convention, fvcore's own handles as the oracle ------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_norms_are_those_of_fvcore(affine: bool, train: bool) -> None:
    x = _z(2, 8, 6, 5)
    cases = [
        (nn.LayerNorm(5, elementwise_affine=affine), 5 if affine else 4),
        (nn.LayerNorm((6, 5), elementwise_affine=affine), 5 if affine else 4),
        (nn.GroupNorm(4, 8, affine=affine), 5 if affine else 4),
        (nn.InstanceNorm2d(8, affine=affine), 5 if affine else 4),
        (nn.BatchNorm2d(8, affine=affine), (5 if affine else 4) if train else (2 if affine else 1)),
    ]
    for module, per_element in cases:
        record = profile(module.train(train), x, timed=False)
        assert (record.macs, record.norms) == (0, per_element * x.numel())
        assert FlopCountAnalysis(module, x).total() == record.norms


def test_rms_norm_costs_two_fewer_than_layer_norm() -> None:
    assert profile(nn.RMSNorm(5), _z(2, 5), timed=False).norms == 3 * 10
    assert profile(nn.RMSNorm(5, elementwise_affine=False), _z(2, 5), timed=False).norms == 2 * 10


@pytest.mark.parametrize("device", DEVICES)
def test_resampling(device: str) -> None:
    x, line, volume = (torch.zeros(shape, device=device) for shape in ((2, 3, 4, 5), (2, 3, 4), (2, 3, 4, 5, 6)))
    for mode, taps in (("nearest", 1), ("nearest-exact", 1), ("bilinear", 4), ("bicubic", 16)):
        assert profile(lambda x, m=mode: F.interpolate(x, scale_factor=2, mode=m), (x,), timed=False).norms == taps * 4 * x.numel()
        assert profile(lambda x, m=mode: F.interpolate(x, size=(3, 7), mode=m), (x,), timed=False).norms == taps * 2 * 3 * 21
    assert profile(lambda x: F.interpolate(x, scale_factor=2, mode="linear"), (line,), timed=False).norms == 2 * 2 * line.numel()
    assert (
        profile(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (volume,), timed=False).norms
        == 8 * 8 * volume.numel()
    )
    for mode, taps in (("bilinear", 4), ("nearest", 1), ("bicubic", 16)):
        grid = torch.zeros(2, 7, 6, 2, device=device)
        sample = lambda x, g, m=mode: F.grid_sample(x, g, mode=m, align_corners=False)  # noqa: E731
        assert profile(sample, (x, grid), timed=False).norms == taps * 2 * 3 * 7 * 6
    grid = torch.zeros(2, 7, 6, 4, 3, device=device)
    assert (
        profile(lambda x, g: F.grid_sample(x, g, align_corners=False), (volume, grid), timed=False).norms == 8 * 2 * 3 * 7 * 6 * 4
    )
    assert profile(nn.AdaptiveAvgPool2d(2), x, timed=False).norms == x.numel()
    assert profile(nn.AdaptiveAvgPool1d(2), line, timed=False).norms == line.numel()
    assert profile(nn.AvgPool2d(2), x, timed=False).norms == 2 * 3 * 2 * 2 * 4
    assert profile(nn.AvgPool2d((1, 3), stride=1), x, timed=False).norms == 2 * 3 * 4 * 3 * 3


@pytest.mark.parametrize(
    ("operator", "handle", "module", "shape"),
    [
        ("aten::layer_norm", norm_flop_counter(2), nn.LayerNorm(5), (2, 3, 5)),
        ("aten::group_norm", norm_flop_counter(2), nn.GroupNorm(2, 4), (2, 4, 5)),
        ("aten::batch_norm", batchnorm_flop_jit, nn.BatchNorm2d(4).eval(), (2, 4, 5, 5)),
        ("aten::adaptive_avg_pool2d", elementwise_flop_counter(1, 0), nn.AdaptiveAvgPool2d(1), (2, 4, 5, 5)),
    ],
)
def test_handles_written_for_fvcore_work_and_agree(operator: str, handle: Any, module: nn.Module, shape: tuple[int, ...]) -> None:
    ours = FlopCount(module, _z(*shape)).total()
    assert FlopCount(module, _z(*shape)).set_op_handle(operator, handle).total() == ours
    assert FlopCount(module, _z(*shape)).set_op_handle(operator, lambda i, o: 7).total() == 7


# --- a whole network --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, spelling: str):
        super().__init__()
        self.heads, self.spelling = heads, spelling
        if spelling == "module":
            self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "module":
            return self.inner(x, x, x, need_weights=False)[0]
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.spelling == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "einsum":
            weights = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
            mixed = torch.einsum("bhnm,bhmd->bhnd", weights, v)
        else:
            mixed = explicit_attention(q, k, v)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, spelling: str):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, spelling)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(
        self, dim: int = 768, heads: int = 12, depth: int = 12, spelling: str = "explicit", image: int = 224, classes: int = 1000
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, stride=16)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, (image // 16) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, spelling) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = rearrange(self.patches(image), "b c h w -> b (h w) c")
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_macs(dim: int, depth: int, tokens: int, classes: int) -> int:
    block = tokens * dim * dim * (3 + 1 + 4 + 4) + 2 * tokens * tokens * dim
    return (tokens - 1) * 3 * 16 * 16 * dim + depth * block + dim * classes


def test_vit_b16_is_17_58_gmac_in_every_spelling_of_attention() -> None:
    records = {}
    for spelling in ("explicit", "fused", "einsum", "module"):
        with torch.device("meta"):
            records[spelling] = profile(ViT(spelling=spelling).eval(), torch.zeros(1, 3, 224, 224), timed=False)
    assert {record.macs for record in records.values()} == {vit_macs(768, 12, 197, 1000)} == {17_563_828_224}
    assert {record.macs_with_norms for record in records.values()} == {17_563_828_224 + 25 * 5 * 197 * 768} == {17_582_740_224}
    assert {record.parameters for record in records.values()} == {86_567_656}
    assert {record.coverage for record in records.values()} == {1.0}
    assert all(record.macs * 2 == record.flops for record in records.values())


def test_fvcore_agrees_where_it_is_right() -> None:
    model, x = ViT(32, 4, 2, "explicit", 64, 10).eval(), _z(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
        ours = FlopCount(model, x)
        assert ours.total() == theirs.total()
        assert {k: v for k, v in ours.by_module().items() if v} == {k: v for k, v in theirs.by_module().items() if v}
        fused = FlopCountAnalysis(ViT(32, 4, 2, "fused", 64, 10).eval(), x).unsupported_ops_warnings(False)
        assert fused.total() < ours.total() == FlopCount(ViT(32, 4, 2, "fused", 64, 10).eval(), x).total()
    assert "blocks.1.attention.qkv" in flop_count_table(ours, max_depth=4)


def test_the_count_is_linear_in_the_batch() -> None:
    model = ViT(32, 4, 2, "fused", 64, 10).eval()
    one, three = (profile(model, _z(b, 3, 64, 64), timed=False) for b in (1, 3))
    assert (three.macs, three.norms) == (3 * one.macs, 3 * one.norms)


def test_dead_results_are_counted_because_they_run() -> None:
    def monitored(x: Tensor) -> Tensor:
        _ = x @ x  # nothing depends on it
        return x + 1

    assert macs(monitored, _z(4, 4)) == 64


def test_a_path_that_depends_on_the_data() -> None:
    class Pruner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            assert type(x.shape[0]) is int  # sizes stay Python integers under counting
            kept = x[x.mean(dim=1) > 0]
            return self.wide(kept)

    pruner = Pruner()
    assert macs(pruner, torch.ones(16, 64)) == 65_536
    assert macs(pruner, torch.cat([torch.ones(1, 64), -torch.ones(15, 64)])) == 4_096
    assert macs(pruner, -torch.ones(16, 64)) == 0


# --- classes apart ----------------------------------------------------------------------------------------------------


def test_comparison_class_operators_are_counted_apart() -> None:
    def compare(x: Tensor) -> Tensor:
        values, index = x.topk(2, dim=1)
        x.sort(dim=1)
        x.argsort(dim=1)
        x.softmax(dim=1)
        x.index_select(1, torch.tensor([0, 2]))
        x.scatter(1, index, values)
        F.max_pool1d(x, 2)
        torch.fft.fft(x)
        return x.gather(1, index)

    record = profile(compare, (torch.rand(3, 8),), timed=False)
    assert (record.macs, record.norms, record.elementwise, record.coverage) == (0, 0, 0, 1)
    compared = {row.name: (row.calls, row.elements) for row in record.operators if row.kind == "comparison"}
    assert compared == {
        "aten::topk": (1, 24),
        "aten::sort": (1, 24),
        "aten::argsort": (1, 24),
        "aten::softmax": (1, 24),
        "aten::index_select": (1, 6),
        "aten::scatter": (1, 6),
        "aten::max_pool1d": (1, 24),
        "aten::fft_fft": (1, 24),
        "aten::gather": (1, 6),
    }


def test_elementwise_is_a_column_of_its_own() -> None:
    def busy(x: Tensor) -> Tensor:
        return (x * 2 + x.mean(dim=1, keepdim=True)).relu().sum()

    assert profile(busy, (_z(3, 8),), timed=False).elementwise == 5 * 24
    assert profile(nn.Dropout(0.5).train(), _z(3, 8), timed=False).elementwise == 24
    assert profile(nn.Dropout(0.5).eval(), _z(3, 8), timed=False).elementwise == 0


def test_every_common_operator_has_a_class() -> None:
    def many(x: Tensor) -> Tensor:
        half = x.sigmoid()
        _ = (x.unique(), x.roll(1), x.flip(0), x.cumsum(0), x.tril(), torch.cat([x, x]), x.std(0), x.var(), x.norm(dim=1), x.max(1))
        _ = (F.normalize(x), F.one_hot(torch.tensor([1, 2])), x.repeat(2, 2), x.repeat_interleave(2), torch.where(x > 0), x[x > 0])
        _ = (x.masked_fill(x > 0, 1), F.pad(x, (1, 1)), F.unfold(x[None, None], 2), torch.meshgrid(x[0], x[0], indexing="ij"))
        _ = (torch.bernoulli(half), torch.multinomial(half, 2), F.gumbel_softmax(x), F.cosine_similarity(x, x), x.quantile(0.5))
        _ = (F.pairwise_distance(x, x), torch.bucketize(x, x[0].sort()[0]), torch.histc(x), x.logsumexp(0), torch.linalg.norm(x[0]))
        _ = (torch.cross(x[:, :3], x[:, :3]), x.diagonal(), torch.block_diag(x, x), x.scatter_reduce(0, x.long() * 0, x, "sum"))
        _ = (torch.complex(x, x).abs(), x.nan_to_num(), torch.isin(x, x), x.lerp(x, 0.5), x.addcmul(x, x), torch.logical_and(x, x))
        _ = (x.any(), x.all(), torch.randperm(5), torch.randn_like(x), x.new_zeros(3), nn.init.trunc_normal_(torch.empty(3)))
        _ = (torch.allclose(x, x), F.huber_loss(x, x), F.binary_cross_entropy_with_logits(x, half), torch.diff(x), x.argmax())
        _ = (
            F.cross_entropy(x, torch.tensor([1, 2, 3])),
            F.kl_div(x, half),
            F.triplet_margin_loss(x, x, x),
            x.median(),
            x.clone().t_(),
        )
        _ = (F.glu(x), F.prelu(x, x[0, :1]), F.hardswish(x), F.mish(x), F.softplus(x), F.embedding(x.long() * 0, x), x.tolist())
        _ = (
            x.index_add(0, torch.tensor([0]), x[:1]),
            x.clone().transpose_(0, 1),
            F.fold(torch.ones(1, 4, 4), (3, 3), 2),
            x.int() & 1,
        )
        x = x.clone()
        x[0, 1] = 3
        return x

    record = profile(many, (torch.randn(3, 8),), timed=False)
    assert (record.uncovered, record.macs) == ({}, 0)


def test_an_operator_that_hands_its_work_to_the_compiler_is_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    with pytest.raises(UncountedOperatorError, match="flex_attention hands a Python function to the compiler"):
        macs(lambda q: flex_attention(q, q, q), _z(1, 2, 16, 8))


def test_profiler_marks_in_a_forward_are_no_operators() -> None:
    def marked(x: Tensor) -> Tensor:
        with torch.profiler.record_function("step"):
            return x @ x

    record = profile(marked, (_z(4, 4),), timed=False)
    assert (record.macs, record.coverage) == (64, 1)


def test_counts_survive_checkpointing_vmap_and_functional_calls() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.Linear(8, 4), _z(3, 8)
    assert macs(lambda x: checkpoint(layer, x, use_reentrant=False), x) == 96
    assert macs(lambda x: checkpoint(layer, x, use_reentrant=True), x) == 96
    assert macs(torch.vmap(lambda row: layer.weight @ row), x) == 96
    assert macs(lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), x), x) == 96


# --- coverage, strictness, formulas of others --------------------------------------------------------------------------


@torch.library.custom_op("profiletest::twice", mutates_args=())
def twice(x: Tensor, times: int) -> Tensor:
    return x * times


@torch.library.custom_op("profiletest::mix", mutates_args=())
def mix(x: Tensor, weights: list[Tensor], window: int = 3, scale: float = 1.0) -> Tensor:
    return x.clone()


def test_an_unknown_operator_is_an_error_that_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    run = lambda x: twice(model(x), 3)  # noqa: E731
    with pytest.raises(UncountedOperatorError, match=r"profiletest::twice \(1 calls.*@formula\('profiletest::twice'\)"):
        profile(run, (_z(2, 4),), timed=False)
    loose = profile(run, (_z(2, 4),), timed=False, strict=False)
    assert loose.macs == 32
    assert loose.uncovered == {"profiletest::twice": 1}
    assert loose.coverage == pytest.approx(2 / 3)


@pytest.mark.parametrize("function", [torch.linalg.svd, torch.linalg.inv, torch.linalg.matrix_exp, torch.linalg.eigh])
def test_a_matrix_operator_without_formula_is_an_error(function: Callable[..., Any]) -> None:
    with pytest.raises(UncountedOperatorError, match="linalg"):
        profile(function, (torch.eye(4),), timed=False)
    assert profile(function, (torch.eye(4),), timed=False, strict=False).coverage < 1


def test_a_sparse_operand_is_not_counted_as_if_it_were_dense() -> None:
    sparse = torch.eye(4).to_sparse()
    with pytest.raises(UncountedOperatorError, match="mm"):
        profile(lambda x: torch.mm(sparse, x), (torch.eye(4),), timed=False)


def test_a_registered_formula_sees_shapes_and_arguments() -> None:
    seen: list[Call] = []

    @formula("profiletest::mix")
    def cost(call: Call) -> Cost:
        seen.append(call)
        return Cost(macs=math.prod(call["x"]) * call["window"], compared={"aten::sort": 5})

    record = profile(lambda x: mix(x, [x, x[:1]], scale=0.5), (_z(2, 4),), timed=False)
    assert seen[0].operator == "profiletest::mix"
    assert dict(seen[0].arguments) == {"x": (2, 4), "weights": [(2, 4), (1, 4)], "window": 3, "scale": 0.5}
    assert seen[0].outputs == ((2, 4),)
    assert seen[0][2] == 3
    assert (record.macs, record.operator("aten::sort").elements, record.coverage) == (24, 5, 1)

    with pytest.raises(ValueError, match="has a formula already"):
        formula("profiletest::mix")(lambda call: 1)
    formula("profiletest::mix", replace=True)(lambda call: 2.5)
    with pytest.raises(TypeError, match=r"must give a non-negative int or a Cost, got 2\.5"):
        profile(lambda x: mix(x, []), (_z(2, 4),), timed=False)
    with pytest.raises(ValueError, match="namespace::name"):
        formula("mix")(cost)
    with pytest.raises(ValueError, match="kind must be one of"):
        formula("a::b", kind="flops")  # type: ignore[arg-type]


class Visible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Hidden(torch.autograd.Function):
    """A kernel past the dispatcher, as bindings of a foreign library are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        return torch.from_numpy(np.linalg.matrix_power(x.numpy(), times))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


KEPT = Hidden.apply  # torch's own documents keep it under a name


class Partly(torch.autograd.Function):
    """Its first step is torch's, its product is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy((2 * x).numpy() @ x.numpy())


class Given(torch.autograd.Function):
    """Memory from torch, values from elsewhere, as Triton kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(2 * x)
        out.numpy()[:] = x.numpy() @ x.numpy()
        return out.view(-1)


class Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Given.apply(x)


class Noticed(torch.autograd.Function):
    """Everything by torch, the last step in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x @ x).add_(1)


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def test_autograd_functions_are_counted_by_their_parts_or_by_formula() -> None:
    assert macs(Visible.apply, _z(4, 4)) == 64
    with pytest.raises(UncountedOperatorError, match="autograd::Hidden"):
        macs(lambda x: Hidden.apply(x, 3), torch.eye(4))

    for inside in (
        Hidden.apply,
        lambda x, times: Partly.apply(x),
        lambda x, times: Given.apply(x),
        lambda x, times: Outer.apply(x),
    ):
        with pytest.raises(UncountedOperatorError, match=r"autograd::(Hidden|Partly|Given)"):
            macs(lambda x, inside=inside: KEPT(x, 3) if inside is Hidden.apply else inside(x, 3), torch.eye(4))
    assert macs(Noticed.apply, torch.eye(4)) == 64
    assert macs(Passing.apply, torch.eye(4)) == 0
    assert torch.autograd.Function.apply.__func__.__module__ == "torch.autograd.function"  # nothing is left in place

    formula("autograd::Hidden")(lambda call: (call["times"] - 1) * call["x"][0] ** 3)
    assert macs(lambda x: Hidden.apply(x, 3), torch.eye(4)) == macs(lambda x: KEPT(x, 3), torch.eye(4)) == 2 * 64


def test_sparse_products_and_scripts_past_the_dispatcher_are_refused() -> None:
    dense, sparse = torch.eye(4), torch.eye(4).to_sparse()
    for call in (lambda d: torch.sparse.mm(sparse, d), lambda d: torch.sparse.addmm(d, sparse, d), lambda d: sparse @ d):
        with pytest.raises(UncountedOperatorError, match="no formula for aten::"):
            macs(call, dense)
    with pytest.raises(UncountedOperatorError, match="sparse_sampled_addmm"):
        macs(lambda d: torch.sparse.sampled_addmm(dense.to_sparse_csr(), d, d), dense)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())
    assert macs(scripted, _z(1, 3, 8, 8)) == 8 * 3 * 9 * 36
    with pytest.raises(UncountedOperatorError, match="the model is scripted and optimised for inference: prim::mkldnn_convolution"):
        macs(torch.jit.optimize_for_inference(scripted), _z(1, 3, 8, 8))


def test_a_forward_that_differentiates_is_one_clear_error() -> None:
    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad((x @ x).sum(), x)[0]

    with pytest.raises(UncountedOperatorError, match="the forward differentiates"):
        macs(slope, torch.eye(4))


def test_in_place_spellings_are_covered_as_their_originals() -> None:
    def forward(x: Tensor) -> Tensor:
        x = x.clone().abs_().masked_fill_(x > 0, 1.0)
        x = nn.functional.threshold_(torch.ops.aten.gelu_(x), 0.1, 0.0).eq_(1)
        return nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)

    assert profile(forward, (_z(1, 2, 8, 8),), timed=False).coverage == 1


def test_operators_are_counted_in_inference_mode_and_under_autocast() -> None:
    layer = nn.Linear(8, 4)

    def inferred(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return layer(x)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    assert macs(inferred, _z(2, 8)) == macs(cast, _z(2, 8)) == 64
