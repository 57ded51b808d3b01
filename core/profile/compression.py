"""What dropping or merging tokens buys: tokens, MACs, memory and time, before and after, and whether the promise is kept.

Three numbers are easily taken for each other. *Theoretical* MACs are what the kept tokens need; *executed* MACs are what ran:
where dropped tokens are masked and not gathered out, nothing was saved. And a ratio of MACs is a *promise* of time that a
device may not keep. They are apart here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from core.profile.account import Profile, _root, markdown_table, milliseconds, quantity, size
from core.profile.count import FlopCount
from core.profile.tokens import TokenReport, token_reports

SEEN_SHARE = 0.8  # a promised speed-up counts as seen in latency from this share of it on


class TokenCountError(ValueError):
    """A module kept another number of tokens than was promised."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Smallest, mean and largest of a count over several inputs."""

    low: int
    mean: float
    high: int
    n: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> Range:
        return cls(min(counts), sum(counts) / len(counts), max(counts), len(counts))

    @property
    def varies(self) -> bool:
        return self.low != self.high

    def text(self, unit: Callable[[int | float], str] = quantity) -> str:
        if not self.varies:
            return f"{unit(self.low)} (all {self.n})"
        return f"{unit(self.low)} / {unit(self.mean)} / {unit(self.high)} (min / mean / max of {self.n})"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Counts over several real inputs, for a forward whose path depends on them.

    Attributes:
        macs: MACs of each input, in order. tokens: of each reporting module and stage, the tokens of each input.
    """

    macs: Sequence[int]
    tokens: Mapping[str, Mapping[str, Sequence[int]]]

    @property
    def range(self) -> Range:
        return Range.of(self.macs)

    def tokens_range(self, module: str, stage: str) -> Range:
        return Range.of(self.tokens[module][stage])

    def to_dict(self) -> dict[str, Any]:
        return {
            "macs": list(self.macs),
            "macs_range": dataclasses.asdict(self.range),
            "tokens": {module: {stage: list(counts) for stage, counts in stages.items()} for module, stages in self.tokens.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spread:
        tokens = {module: {stage: tuple(counts) for stage, counts in stages.items()} for module, stages in data["tokens"].items()}
        return cls(tuple(data["macs"]), tokens)


def spread(
    target: nn.Module | Callable[..., Any],
    samples: Iterable[Any],
    *,
    expect: Mapping[str, int] | None = None,
    strict: bool = True,
) -> Spread:
    """Count one forward for each of several inputs (as `profile` takes them).

    Args:
        expect: stage name -> tokens that every sample must have there.

    Raises:
        TokenCountError: if a sample has another count at an expected stage, or no module reports that stage.
        UncountedOperatorError: as in `profile`.
        ValueError: if there are no samples.
    """
    module, call = _root(target)
    macs: list[int] = []
    tokens: dict[str, dict[str, list[int]]] = {}
    for index, inputs in enumerate(samples):
        tallies = FlopCount(module, inputs, call=call, strict=strict).tallies()
        macs.append(sum(tally.macs for tally in tallies[""].values()))
        reports = token_reports(module)
        for name, report in reports.items():
            for stage, count in report.stages:
                tokens.setdefault(name, {}).setdefault(stage, []).append(count)
        for stage, wanted in (expect or {}).items():
            found = [count for report in reports.values() for label, count in report.stages if label == stage]
            if not found:
                raise TokenCountError(
                    f"no module reports a stage {stage!r}; reported: {sorted({s for r in reports.values() for s, _ in r.stages})}"
                )
            if any(count != wanted for count in found):
                raise TokenCountError(
                    f"sample {index}: {found[0] if len(found) == 1 else found} tokens at {stage!r}, promised {wanted}"
                )
    if not macs:
        raise ValueError("samples is empty; a range needs at least one input")
    return Spread(
        tuple(macs), {name: {stage: tuple(counts) for stage, counts in stages.items()} for name, stages in tokens.items()}
    )


@dataclasses.dataclass(frozen=True)
class ScopeRow:
    """A part of the network before and after; a part that is absent on one side has 0 there."""

    scope: str
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    activation_bytes_before: int
    activation_bytes_after: int

    @property
    def ratio(self) -> float | None:
        """MACs after over before."""
        return self.macs_after / self.macs_before if self.macs_before else None


@dataclasses.dataclass(frozen=True)
class Compression:
    """Before and after, as numbers.

    Attributes:
        scopes: named parts, the whole network last.
        tokens: reports of the compressed network, by module.
        theoretical_macs: of the network after, if masked tokens were not computed; equal to the executed ones where tokens
            are gathered; None where a masked module does not say.
        latency_before_s, latency_after_s: medians; None where not measured. Memory: peaks of a forward.
        over_inputs: counts over several inputs, if given.
    """

    before: str
    after: str
    scopes: Sequence[ScopeRow]
    tokens: Mapping[str, TokenReport]
    theoretical_macs: int | None
    latency_before_s: float | None
    latency_after_s: float | None
    latency_n: int
    memory_before: int | None
    memory_after: int | None
    over_inputs: Spread | None = None

    @property
    def network(self) -> ScopeRow:
        return self.scopes[-1]

    @property
    def executed_macs(self) -> int:
        return self.network.macs_after

    @property
    def masked(self) -> bool:
        """Whether some module multiplies dropped tokens by zero instead of dropping them."""
        return any(report.masked for report in self.tokens.values())

    @property
    def promised_speedup(self) -> float | None:
        """MACs before over theoretical MACs after."""
        return self.network.macs_before / self.theoretical_macs if self.theoretical_macs else None

    @property
    def executed_speedup(self) -> float | None:
        """MACs before over executed MACs after."""
        return self.network.macs_before / self.executed_macs if self.executed_macs else None

    @property
    def seen_speedup(self) -> float | None:
        """Median latency before over after."""
        if self.latency_before_s is None or not self.latency_after_s:
            return None
        return self.latency_before_s / self.latency_after_s

    @property
    def verdict(self) -> str:
        """One line: whether the promise is seen in latency."""
        promised, seen = self.promised_speedup, self.seen_speedup
        if promised is None:
            return "No promise can be stated: a masked module does not say what its kept tokens would take."
        if promised <= 1:
            more = 1 / promised - 1
            heard = "latency not measured" if seen is None else f"latency changes by {1 / seen - 1:+.1%}"
            return f"No compute is saved: the network takes {more:+.2%} MACs; {heard}."
        kind = "masked: " if self.masked else ""
        if self.masked and self.executed_speedup is not None and self.executed_speedup < promised:
            kind = f"masked: only {self.executed_speedup:.2f}× is executed; "
        if seen is None:
            return f"Promised {promised:.2f}× by MACs ({kind}latency not measured)."
        if seen < SEEN_SHARE * promised:
            return f"The promised ratio is NOT seen in latency: {promised:.2f}× by MACs, {seen:.2f}× measured ({kind}n = {self.latency_n})."
        return f"Promised {promised:.2f}× by MACs, {seen:.2f}× measured in latency ({kind}n = {self.latency_n})."

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["tokens"] = {name: report.to_dict() for name, report in self.tokens.items()}
        data["over_inputs"] = self.over_inputs.to_dict() if self.over_inputs else None
        keys = ("executed_macs", "masked", "promised_speedup", "executed_speedup", "seen_speedup", "verdict")
        return {**data, **{key: getattr(self, key) for key in keys}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Compression:
        kept = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        kept["scopes"] = tuple(ScopeRow(**row) for row in data["scopes"])
        kept["tokens"] = {name: TokenReport.from_dict(report) for name, report in data["tokens"].items()}
        kept["over_inputs"] = Spread.from_dict(data["over_inputs"]) if data["over_inputs"] else None
        return cls(**kept)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of (what, before, after, ratio)."""
        lines: list[tuple[str, str, str, str]] = []
        for row in self.scopes:
            ratio = f"{row.ratio:.4f}" if row.ratio is not None else "new"
            lines.append((f"MACs, {row.scope}", quantity(row.macs_before), quantity(row.macs_after), ratio))
        if self.masked:
            known = self.theoretical_macs
            share = f"{known / self.network.macs_before:.4f}" if known is not None and self.network.macs_before else "–"
            text = quantity(known) if known is not None else "unknown"
            lines.append(("MACs, network, if masked tokens were not computed", quantity(self.network.macs_before), text, share))
        whole = self.network
        lines.append(_line("parameters", whole.parameters_before, whole.parameters_after, quantity))
        lines.append(
            _line("activation memory", whole.activation_bytes_before, whole.activation_bytes_after, lambda n: size(int(n)))
        )
        lines.append(_line("peak memory", self.memory_before, self.memory_after, lambda n: size(int(n))))
        lines.append(_line("latency, median", self.latency_before_s, self.latency_after_s, milliseconds))
        if self.over_inputs:
            lines.append(("MACs over inputs", "", self.over_inputs.range.text(), ""))
        return lines

    def token_rows(self) -> list[tuple[str, ...]]:
        """Lines of (module, stage, tokens, share of the tokens in, over several inputs)."""
        lines: list[tuple[str, ...]] = []
        for name, report in self.tokens.items():
            stages = list(report.stages)
            if report.class_tokens:
                stages.append(
                    ("with class token" + ("s" if report.class_tokens > 1 else ""), report.tokens_out + report.class_tokens)
                )
            for stage, count in stages:
                many = ""
                if self.over_inputs and stage in self.over_inputs.tokens.get(name, {}):
                    many = self.over_inputs.tokens_range(name, stage).text(lambda n: f"{n:g}")
                lines.append(
                    (
                        name or "model",
                        stage + (" (masked)" if report.masked else ""),
                        str(count),
                        f"{count / report.tokens_in:.1%}",
                        many,
                    )
                )
        return lines

    def markdown(self) -> str:
        """Tables of tokens and of costs, and the verdict."""
        parts = []
        if self.tokens:
            parts.append(markdown_table(("module", "stage", "tokens", "of tokens in", "over inputs"), self.token_rows()))
        parts.append(markdown_table(("", self.before, self.after, "after / before"), self.rows()))
        return "\n\n".join([*parts, self.verdict])


def _line(what: str, before: float | None, after: float | None, unit: Callable[[Any], str]) -> tuple[str, str, str, str]:
    ratio = f"{after / before:.4f}" if before and after is not None else "–"
    return what, unit(before) if before is not None else "not measured", unit(after) if after is not None else "not measured", ratio


def compression(
    before: Profile,
    after: Profile,
    *,
    scopes: Mapping[str, tuple[str | None, str | None]] | None = None,
    tokens: Mapping[str, TokenReport] | None = None,
    over_inputs: Spread | None = None,
    expect: Mapping[str, int] | None = None,
    theoretical_macs: int | None = None,
) -> Compression:
    """Put the profiles of a network without and with token reduction beside each other.

    Args:
        scopes: parts to show beside the whole: label -> (module name before, module name after), None where absent, e.g.
            {"module": (None, "sdtps"), "head": ("head", "head")}.
        tokens: reports by module name of `after`; those that `after` holds unless given.
        over_inputs: counts over several inputs, from `spread`.
        expect: stage name -> promised tokens.
        theoretical_macs: of the whole network after, if masked tokens were not computed (the count of its gathered twin, say);
            taken from the reports of masked modules unless given.

    Raises:
        KeyError: for a module name that a profile does not have.
        TokenCountError: if a reported count is not the promised one.
        ValueError: if both were timed, but not on the same device with as many threads.
    """
    reports = dict(after.tokens if tokens is None else tokens)
    for stage, wanted in (expect or {}).items():
        found = {name: report[stage] for name, report in reports.items() if stage in dict(report.stages)}
        if not found or any(count != wanted for count in found.values()):
            raise TokenCountError(f"promised {wanted} tokens at {stage!r}, reported {found or 'by no module'}")
    if before.latency and after.latency:
        sides = [(latency.device, latency.threads) for latency in (before.latency, after.latency)]
        if sides[0] != sides[1]:
            raise ValueError(f"latencies of different devices or thread counts cannot be compared: {sides[0]} and {sides[1]}")
    rows = [_scope(label, before, one, after, other) for label, (one, other) in (scopes or {}).items()]
    rows.append(_scope("network", before, "", after, ""))
    timed = before.latency and after.latency
    return Compression(
        before=before.name,
        after=after.name,
        scopes=tuple(rows),
        tokens=reports,
        theoretical_macs=_theoretical(after, reports) if theoretical_macs is None else theoretical_macs,
        latency_before_s=before.latency.median_s if before.latency else None,
        latency_after_s=after.latency.median_s if after.latency else None,
        latency_n=min(before.latency.n, after.latency.n) if timed and before.latency and after.latency else 0,
        memory_before=before.memory.peak_bytes if before.memory else None,
        memory_after=after.memory.peak_bytes if after.memory else None,
        over_inputs=over_inputs,
    )


def _scope(label: str, before: Profile, one: str | None, after: Profile, other: str | None) -> ScopeRow:
    a = None if one is None else before.module(one)
    b = None if other is None else after.module(other)
    return ScopeRow(
        scope=label,
        macs_before=a.macs if a else 0,
        macs_after=b.macs if b else 0,
        parameters_before=a.parameters if a else 0,
        parameters_after=b.parameters if b else 0,
        activation_bytes_before=a.activation_bytes if a else 0,
        activation_bytes_after=b.activation_bytes if b else 0,
    )


def _theoretical(after: Profile, reports: Mapping[str, TokenReport]) -> int | None:
    """Executed MACs, with each masked module's replaced by what it says its kept tokens would take."""
    total = after.macs
    for name, report in reports.items():
        if report.masked:
            if report.theoretical_macs is None:
                return None
            total += report.theoretical_macs - after.module(name).macs
    return total
