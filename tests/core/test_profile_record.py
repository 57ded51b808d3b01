"""The record of a profile: its tree, what it costs to make, what it leaves behind, and that it can be written and read."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.profile import FlopCount, Profile, TokenReport, UncountedOperatorError, profile
from core.profile.account import quantity, size


class Runs(nn.Module):
    """Counts its forwards; has state and randomness that a profile must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.twice = self.inner[0]  # the same module under a second name
        self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inner(self.norm(x + torch.rand_like(x))) + self.twice(x)[:, :8]


@pytest.mark.parametrize("repeats", [1, 4])
def test_three_forwards_beside_the_timed_ones(repeats: int) -> None:
    model = Runs()
    record = profile(model, torch.rand(4, 8), repeats=repeats)
    assert model.runs == 3 + repeats
    assert record.forwards == 3
    assert record.latency is not None
    assert (record.latency.n, record.latency.warmup) == (repeats, 3)
    assert 0 < record.latency.fastest_s <= record.latency.low_s <= record.latency.median_s <= record.latency.high_s
    profile(model, torch.rand(4, 8), timed=False)
    assert model.runs == 3 + repeats + 1
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        profile(model, torch.rand(4, 8), repeats=0)


def test_the_module_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Runs().train(), torch.rand(4, 8)
    model.inner.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    state, apply = torch.get_rng_state(), torch.autograd.Function.__dict__["apply"]
    profile(model, x, repeats=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    model(x).sum().backward()  # no tensor made while counting stays behind in inference mode or without gradient
    assert all(p.grad is not None for part in (model.norm, model.inner) for p in part.parameters())


def test_a_failing_forward_leaves_nothing_switched_off() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            profile(nn.Sequential(nn.Linear(2, 2), Fails()), torch.rand(1, 2))
        assert not torch.backends.mha.get_fastpath_enabled()  # as the caller had it
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert not nn.modules.module._global_forward_hooks
    assert profile(nn.Linear(2, 2), torch.rand(1, 2), timed=False).macs == 4


def test_a_failure_that_the_model_survives_does_not_shift_the_tree() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not this way")

    class Falls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Fails(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.first(x)
            except ValueError:
                return self.second(x) @ x.T

    record = profile(Falls(), torch.rand(2, 4), repeats=1)
    assert {row.name: row.macs for row in record.modules} == {"": 32 + 16, "first": 0, "second": 32}
    seconds = {row.name: row.seconds for row in record.modules}
    assert seconds[""] is not None
    assert seconds["second"] is not None
    assert seconds[""] > seconds["second"]


def test_the_tree_adds_up() -> None:
    model = Runs().eval()
    record = profile(model, torch.rand(4, 8), repeats=1)
    rows = {row.name: row for row in record.modules}
    assert list(rows) == [name for name, _ in model.named_modules()]
    assert "twice" not in rows  # a shared module stands under its first name
    assert (rows["inner.0"].calls, rows["inner.0"].macs) == (2, 2 * 4 * 8 * 16)
    assert rows["inner"].macs == rows["inner.0"].macs + rows["inner.2"].macs == record.macs == 4 * 8 * 16 * 3
    assert (rows["norm"].norms, record.norms, record.macs_with_norms) == (2 * 32, 64, record.macs + 64)
    assert (rows["idle"].calls, rows["idle"].macs, rows["idle"].seconds, rows["idle"].parameters) == (0, 0, None, 12)
    assert (
        record.parameters == sum(p.numel() for p in model.parameters()) == rows["norm"].parameters + rows["inner"].parameters + 12
    )
    assert record.macs == sum(row.macs for row in record.operators)
    assert record.activation_bytes == sum(row.allocated_bytes for row in record.operators)
    assert all(row.seconds is not None and row.seconds > 0 for row in record.modules if row.calls)
    assert rows[""].seconds is not None
    assert rows["inner"].seconds is not None
    assert rows[""].seconds >= rows["inner"].seconds
    with pytest.raises(KeyError, match="no module 'missing'"):
        record.module("missing")
    with pytest.raises(KeyError, match="did not run 'aten::topk'"):
        record.operator("aten::topk")


def test_frozen_parameters_are_not_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    record = profile(model, torch.rand(1, 4), timed=False)
    assert (record.parameters, record.trainable) == (40, 20)


def test_activation_memory_is_what_operators_create() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x @ x  # 4 KiB
        y.relu_()  # in place
        z = y.transpose(0, 1).reshape(-1, 16)  # a view, then a copy: 4 KiB
        return z[:32].double()  # a view, then 8 bytes for half of the elements: 4 KiB

    assert profile(forward, (torch.rand(32, 32),), timed=False).activation_bytes == 3 * 4096
    with torch.device("meta"):
        assert profile(forward, (torch.rand(32, 32),), timed=False).activation_bytes == 3 * 4096


def test_peak_memory_is_measured_and_repeats() -> None:
    def forward(x: Tensor) -> Tensor:
        a = x @ torch.ones(512, 512)  # 1 MiB for the matrix, released after; 1/8 MiB for the product
        b = a * 2
        del a
        return (b + 1).sum()

    peaks = {profile(forward, (torch.rand(64, 512),), repeats=1).memory.peak_bytes for _ in range(3)}  # type: ignore[union-attr]
    assert peaks == {2**20 + 2**17}
    record = profile(nn.Linear(512, 64), torch.rand(64, 512), repeats=1)
    assert record.memory is not None
    assert record.memory.resting_bytes == 4 * (512 * 64 + 64)


def test_inputs_of_every_form() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 4)

        def forward(self, views: dict[str, Tensor], extra: Any = None, *, scale: float = 1.0) -> dict[str, Any]:
            return {name: (self.project(view) * scale, "text", None) for name, view in views.items()}

        def encode(self, view: Tensor) -> Tensor:
            return self.project(view)

    model, views = Pairs(), {"rgb": torch.rand(2, 8), "depth": torch.rand(3, 8)}
    count = (2 + 3) * 8 * 4
    assert profile(model, (views, ["anything", None]), timed=False).macs == count
    assert profile(model, {"views": views, "scale": 2.0}, timed=False).macs == count
    assert profile(model, [views], timed=False).inputs == ("2x8 float32", "3x8 float32")

    method = profile(model.encode, torch.rand(2, 8), timed=False)
    assert (method.macs, method.module("project").macs, method.parameters) == (64, 64, 36)

    weight = nn.Parameter(torch.rand(8, 8))

    def closure(x: Tensor) -> Tensor:
        return model.encode(x @ weight)  # fvcore cannot trace a function that closes over parameters

    around = profile(closure, torch.rand(2, 8), timed=False)
    assert (around.macs, around.module("model.project").macs, around.parameters) == (64 + 128, 64, 36 + 64)
    assert profile(functools.partial(model, scale=3.0), [views], timed=False).module("function.project").macs == count
    with pytest.raises(ValueError, match="a module or a function, got int"):
        profile(3, ())  # type: ignore[arg-type]


def test_the_meta_device_counts_what_memory_could_not_hold() -> None:
    with torch.device("meta"):
        record = profile(nn.Linear(2**20, 2**20), torch.zeros(2**12, 2**20))
    assert record.macs == 2**52
    assert (record.latency, record.memory, record.device, record.forwards) == (None, None, "meta", 1)
    assert record.parameters == 2**40 + 2**20


def test_a_compiled_module_is_counted_by_what_is_inside() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    record = profile(model, torch.rand(2, 8), timed=False)
    assert (record.macs, record.module("0").macs) == (128, 128)


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.shape[1] // 2
        return x[:, : self.kept]

    def token_report(self) -> TokenReport:
        return TokenReport([("patches", 2 * self.kept), ("kept", self.kept)], class_tokens=1)


def test_a_record_is_plain_data_and_comes_back() -> None:
    model = nn.Sequential(Keeps(), nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    run = lambda x: model[2](*[model[1](model[0](x))] * 3)[0].softmax(-1)  # noqa: E731
    record = profile(run, torch.rand(1, 6, 8), name="small", repeats=2)
    text = json.dumps(record.to_dict(), allow_nan=False)
    again = Profile.from_dict(json.loads(text))
    assert again == record
    plain = json.loads(text)
    assert plain["macs"] * 2 == plain["flops"]
    assert plain["macs_with_norms"] == plain["macs"] + plain["norms"]
    assert plain["modules"][0]["flops"] == plain["flops"]
    assert "fvcore" in plain["convention"]
    assert plain["tokens"]["model.0"]["ratio"] == 0.5
    meta = profile(nn.Linear(2, 2, device="meta"), torch.rand(1, 2, device="meta"))
    assert Profile.from_dict(json.loads(json.dumps(meta.to_dict()))) == meta


def test_tables_show_every_column() -> None:
    from rich.console import Console

    model = nn.Sequential(nn.Linear(1000, 1000), nn.LayerNorm(1000), nn.Softmax(dim=-1))
    record = profile(model, torch.rand(2, 1000), name="a|b", repeats=1)
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in record.tables():
        console.print(table)
    text = console.export_text()
    for expected in ("2.000 M (2,000,000)", "4.000 M", "2.010 M", "aten::softmax", "100.0%", "LayerNorm", "n = 1 after 3 warm-up"):
        assert expected in text
    markdown = record.markdown()
    assert "a\\|b" in markdown
    assert "| · 0 | Linear | 1.001 M | 2.000 M | 100.0% | 4.000 M |" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") in (3, 11, 8) for line in rows)


def test_quantities_read_well() -> None:
    assert [quantity(n) for n in (0, 999, 1000, 17_563_828_224, 3 * 10**12)] == ["0", "999", "1.000 k", "17.564 G", "3.000 T"]
    assert [size(n) for n in (1, 2048, 3 * 2**20, 5 * 2**30)] == ["1 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_ancestors_by_caller_as_fvcore_has_them() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = nn.Sequential(nn.Linear(4, 4))
            self.user = User(self.owner)

        def forward(self, x: Tensor) -> Tensor:
            return self.user(x)

    class User(nn.Module):
        def __init__(self, lent: nn.Module):
            super().__init__()
            self.lent = [lent]

        def forward(self, x: Tensor) -> Tensor:
            return self.lent[0](x)

    count = FlopCount(Caller(), torch.rand(1, 4))
    assert (count.by_module()["owner.0"], count.by_module()["user"]) == (16, 0)
    caller = FlopCount(Caller(), torch.rand(1, 4)).ancestor_mode("caller")
    assert (caller.by_module()["owner.0"], caller.by_module()["user"]) == (16, 16)
    assert FlopCount(Runs().eval(), torch.rand(4, 8)).uncalled_modules() == {"idle"}


def test_a_strict_error_leaves_no_half_count_behind() -> None:
    count = FlopCount(nn.Linear(4, 4), torch.rand(4, 4), call=lambda x: torch.linalg.inv(x), strict=True)
    for _ in range(2):
        with pytest.raises(UncountedOperatorError):
            count.total()
