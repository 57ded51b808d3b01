"""What token reduction buys: stages, ratios with and without class token, masked against gathered, promise against latency."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.profile import Compression, Profile, Range, Spread, TokenCountError, TokenReport, compression, profile, spread


class Selector(nn.Module):
    """Keeps tokens whose mean is positive, gathered out or masked."""

    def __init__(self, masked: bool):
        super().__init__()
        self.masked = masked
        self.score = nn.Linear(16, 16)
        self.stages: list[tuple[str, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        keep = x.mean(dim=-1) > 0
        self.stages = [("patches", x.shape[1]), ("kept", int(keep.sum()))]
        x = x * keep[..., None] if self.masked else x[keep][None]
        return self.score(x)

    def token_report(self) -> TokenReport:
        theory = self.stages[-1][1] * 16 * 16 if self.masked else None
        return TokenReport(self.stages, masked=self.masked, theoretical_macs=theory, class_tokens=1)


class Network(nn.Module):
    def __init__(self, selector: nn.Module | None):
        super().__init__()
        self.selector = selector
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.selector is not None:
            x = self.selector(x)
        return self.head(x.mean(dim=1))


def tokens(positive: int, total: int = 12) -> Tensor:
    return torch.cat([torch.ones(1, positive, 16), -torch.ones(1, total - positive, 16)], dim=1)


def identity(module: nn.Linear) -> nn.Linear:
    nn.init.eye_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def network(masked: bool | None) -> Network:
    model = Network(None if masked is None else Selector(masked)).eval()
    identity(model.body)
    return model


def timed(record: Profile, seconds: float, **changes: Any) -> Profile:
    """The record with another measured latency: how a verdict reads a time must not depend on this machine."""
    assert record.latency is not None
    return dataclasses.replace(record, latency=dataclasses.replace(record.latency, median_s=seconds, **changes))


def test_ratios_of_the_papers() -> None:
    reid = TokenReport([("patches", 128), ("kept", 64), ("aggregated", 25), ("with extra", 26)])
    assert (reid["kept"], reid.tokens_out) == (64, 26)
    assert round(100 * reid.ratio, 1) == 20.3
    seps = TokenReport([("patches", 196), ("aggregated", 39), ("with extra", 40)], class_tokens=1)
    assert round(100 * seps.ratio_with_class_out, 1) == 20.9
    assert seps.ratio_with_class == 41 / 197
    assert seps.ratio == 40 / 196
    assert TokenReport.from_dict(json.loads(json.dumps(seps.to_dict()))) == seps


@pytest.mark.parametrize("stages", [[], [("in", 3)], [("in", 0), ("out", 0)], [("in", 4), ("out", -1)], [("in", 4), ("out", 1.5)]])
def test_a_report_must_be_countable(stages: list[tuple[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"stages must have|token counts must be"):
        TokenReport(stages)


def test_gathered_pruning_executes_fewer_macs() -> None:
    before, after = profile(network(None), tokens(3), repeats=1), profile(network(False), tokens(3), repeats=1)
    result = compression(before, after, scopes={"module": (None, "selector"), "head": ("head", "head")}, expect={"kept": 3})
    module, head, whole = result.scopes
    assert (module.macs_before, module.macs_after, module.ratio) == (0, 3 * 256, None)
    assert (head.macs_before, head.macs_after, head.ratio) == (64, 64, 1.0)
    assert (whole.macs_before, whole.macs_after) == (12 * 256 + 64, 15 * 256 + 64)
    assert (result.masked, result.theoretical_macs, result.executed_macs) == (False, 15 * 256 + 64, 15 * 256 + 64)
    assert "No compute is saved: the network takes +24.49% MACs" in result.verdict
    assert result.latency_before_s is not None
    assert result.memory_after is not None
    assert "| selector | kept | 3 | 25.0% |" in result.markdown()
    assert "| selector | with class token | 4 | 33.3% |" in result.markdown()
    assert "| MACs, module | 0 | 768 | new |" in result.markdown()
    assert Compression.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_masked_pruning_executes_all_and_says_so() -> None:
    before, after = profile(network(None), tokens(3), timed=False), profile(network(True), tokens(3), timed=False)
    result = compression(before, after)
    assert result.masked
    assert result.executed_macs == 24 * 256 + 64
    assert result.theoretical_macs == 15 * 256 + 64
    assert result.executed_speedup == pytest.approx((12 * 256 + 64) / (24 * 256 + 64))
    assert "if masked tokens were not computed" in result.markdown()
    assert "kept (masked)" in result.markdown()
    silent = {"selector": dataclasses.replace(after.tokens["selector"], theoretical_macs=None)}
    unknown = compression(before, after, tokens=silent)
    assert unknown.theoretical_macs is None
    assert unknown.verdict.startswith("No promise can be stated")
    assert compression(before, after, tokens=silent, theoretical_macs=1000).promised_speedup == pytest.approx(
        (12 * 256 + 64) / 1000
    )


def test_a_promise_that_latency_does_not_keep_is_said() -> None:
    wide, narrow = profile(nn.Linear(16, 16), tokens(4), repeats=1), profile(nn.Linear(16, 16), tokens(3, 6), repeats=1)
    kept = compression(timed(wide, 2.0), timed(narrow, 1.2))
    assert kept.promised_speedup == 2
    assert kept.verdict == "Promised 2.00× by MACs, 1.67× measured in latency (n = 1)."
    broken = compression(timed(wide, 2.0), timed(narrow, 1.5))
    assert broken.seen_speedup == pytest.approx(4 / 3)
    assert broken.verdict == "The promised ratio is NOT seen in latency: 2.00× by MACs, 1.33× measured (n = 1)."
    untimed = compression(dataclasses.replace(wide, latency=None), narrow)
    assert untimed.verdict == "Promised 2.00× by MACs (latency not measured)."
    masked = {"": TokenReport([("in", 6), ("out", 3)], masked=True, theoretical_macs=3 * 256)}
    assert "masked: only 2.00× is executed; n = 1" in compression(timed(wide, 2.0), timed(narrow, 1.5), tokens=masked).verdict
    slower = compression(timed(narrow, 1.0), timed(wide, 1.1))
    assert slower.verdict == "No compute is saved: the network takes +100.00% MACs; latency changes by +10.0%."


def test_latencies_of_different_devices_are_not_compared() -> None:
    record = profile(nn.Linear(16, 16), tokens(4), repeats=1)
    with pytest.raises(ValueError, match="different devices or thread counts"):
        compression(record, timed(record, 1.0, device="another"))
    with pytest.raises(ValueError, match="different devices or thread counts"):
        compression(record, timed(record, 1.0, threads=64))


def test_a_count_that_was_promised_must_be_there() -> None:
    before, after = profile(network(None), tokens(3), timed=False), profile(network(False), tokens(3), timed=False)
    with pytest.raises(TokenCountError, match=r"promised 4 tokens at 'kept', reported \{'selector': 3\}"):
        compression(before, after, expect={"kept": 4})
    with pytest.raises(TokenCountError, match="by no module"):
        compression(before, after, expect={"lost": 4})
    with pytest.raises(KeyError, match="no module 'neck'"):
        compression(before, after, scopes={"neck": ("neck", "neck")})


def test_the_range_over_inputs() -> None:
    model = network(False)
    samples = [tokens(count) for count in (2, 9, 4)]
    result = spread(model, samples)
    fixed = 12 * 256 + 64
    assert result.macs == (fixed + 2 * 256, fixed + 9 * 256, fixed + 4 * 256)
    assert result.range == Range(fixed + 512, fixed + 5.0 * 256, fixed + 9 * 256, 3)
    assert result.range.varies
    assert result.tokens_range("selector", "kept") == Range(2, 5.0, 9, 3)
    assert not result.tokens_range("selector", "patches").varies
    assert Spread.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    before, after = profile(network(None), samples[0], timed=False), profile(model, samples[0], timed=False)
    shown = compression(before, after, over_inputs=result)
    assert "2 / 5 / 9 (min / mean / max of 3)" in shown.markdown()
    assert "12 (all 3)" in shown.markdown()
    assert "MACs over inputs" in shown.markdown()
    assert Compression.from_dict(json.loads(json.dumps(shown.to_dict()))) == shown


def test_every_sample_must_keep_what_was_promised() -> None:
    assert spread(network(False), [tokens(3)] * 2, expect={"kept": 3}).macs[0] == 15 * 256 + 64
    with pytest.raises(TokenCountError, match="sample 1: 4 tokens at 'kept', promised 3"):
        spread(network(False), [tokens(3), tokens(4)], expect={"kept": 3})
    with pytest.raises(TokenCountError, match="no module reports a stage 'merged'"):
        spread(network(False), [tokens(3)], expect={"merged": 3})
    with pytest.raises(ValueError, match="samples is empty"):
        spread(network(False), [])


def test_a_report_of_another_type_is_refused() -> None:
    class Wrong(nn.Linear):
        def token_report(self) -> dict[str, int]:
            return {"kept": 3}

    with pytest.raises(TypeError, match=r"Wrong\.token_report\(\) must give a TokenReport, got dict"):
        profile(Wrong(16, 16), tokens(3), timed=False)
