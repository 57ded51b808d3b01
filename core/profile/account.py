"""What a model costs, as one record: counts by module and operator, parameters, memory, latency.

The record is a plain dict in a run's `profile.json`, and tables for people. Making it takes three forwards beside the timed
ones: one counted, one with allocations logged, one with modules timed. They are the warm-up of the timed ones.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fvcore
import torch
from torch import nn

from core.profile import measure
from core.profile.count import FlopCount, Tally, arguments, describe, undisturbed
from core.profile.formulas import Kind
from core.profile.measure import Latency, Memory
from core.profile.tokens import TokenReport, token_reports

if TYPE_CHECKING:
    from rich.table import Table

CONVENTION = (
    "MACs: multiply-accumulates of contraction operators, exact. FLOPs: 2 per MAC. Norms: normalisation, resampling and average "
    "pooling in fvcore's convention (fvcore's total is MACs + norms). Elementwise: 1 per element. Comparison-class operators "
    "(sort, topk, gather, softmax, …): calls and elements only. Biases, masks and layout: nothing."
)


@dataclasses.dataclass(frozen=True)
class OperatorRow:
    """An operator in one forward; `kind` is None where it has no formula. `elements` are those of comparison-class calls."""

    name: str
    kind: Kind | None
    calls: int
    macs: int
    norms: int
    elementwise: int
    elements: int
    allocated_bytes: int


@dataclasses.dataclass(frozen=True)
class ModuleRow:
    """A module in one forward, with all that it contains; the whole model is the row named "".

    Attributes:
        calls: how often it ran. elements: comparison-class. parameters: distinct ones, shared ones once.
        activation_bytes: of the tensors that operators created in it. seconds: in one forward with modules timed, all calls
            together; None where nothing was timed or it did not run by being called.
    """

    name: str
    type: str
    calls: int
    macs: int
    norms: int
    elementwise: int
    elements: int
    parameters: int
    activation_bytes: int
    seconds: float | None

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0


@dataclasses.dataclass(frozen=True)
class Profile:
    """The record. Counts are exact, for the inputs described in `inputs` and the path that they took.

    Attributes:
        coverage: share of operator calls, layout apart, whose cost is known. `uncovered` lists the others by calls.
        activation_bytes: of all tensors that operators created in one forward, views and in-place results apart: what
            training keeps at most.
        forwards: how often the model ran to make the record, the timed runs apart.
    """

    name: str
    inputs: Sequence[str]
    device: str
    training: bool
    parameters: int
    trainable: int
    activation_bytes: int
    coverage: float
    uncovered: Mapping[str, int]
    modules: Sequence[ModuleRow]
    operators: Sequence[OperatorRow]
    tokens: Mapping[str, TokenReport]
    latency: Latency | None
    memory: Memory | None
    forwards: int
    versions: Mapping[str, str]

    @property
    def macs(self) -> int:
        return self.modules[0].macs

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def norms(self) -> int:
        return self.modules[0].norms

    @property
    def macs_with_norms(self) -> int:
        """fvcore's total."""
        return self.macs + self.norms

    @property
    def elementwise(self) -> int:
        return self.modules[0].elementwise

    def module(self, name: str) -> ModuleRow:
        """A row by module name, "" for the whole."""
        for row in self.modules:
            if row.name == name:
                return row
        raise KeyError(f"no module {name!r} in the profile of {self.name}")

    def operator(self, name: str) -> OperatorRow:
        """A row by operator, e.g. "aten::topk"."""
        for row in self.operators:
            if row.name == name:
                return row
        raise KeyError(f"{self.name} did not run {name!r}; it ran {', '.join(row.name for row in self.operators)}")

    # --- as data

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `profile.json`; `from_dict` reads it back."""
        data = dataclasses.asdict(self)
        data["tokens"] = {name: report.to_dict() for name, report in self.tokens.items()}
        totals = {key: getattr(self, key) for key in ("macs", "flops", "norms", "macs_with_norms", "elementwise")}
        for row, plain in zip(self.modules, data["modules"]):
            plain["flops"] = row.flops
        return {"name": data.pop("name"), "convention": CONVENTION, **totals, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        kept = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        kept["inputs"] = tuple(data["inputs"])
        kept["modules"] = tuple(ModuleRow(**{k: v for k, v in row.items() if k != "flops"}) for row in data["modules"])
        kept["operators"] = tuple(OperatorRow(**row) for row in data["operators"])
        kept["tokens"] = {name: TokenReport.from_dict(report) for name, report in data["tokens"].items()}
        kept["latency"] = Latency(**data["latency"]) if data["latency"] else None
        kept["memory"] = Memory(**data["memory"]) if data["memory"] else None
        return cls(**kept)

    # --- for people

    def summary(self) -> list[tuple[str, str]]:
        """The whole model in lines of (what, value)."""
        lines = [
            ("input", "; ".join(self.inputs)),
            ("MACs", f"{quantity(self.macs)} ({self.macs:,})"),
            ("FLOPs (2 per MAC)", quantity(self.flops)),
            ("MACs + norms (fvcore's total)", f"{quantity(self.macs_with_norms)} ({self.macs_with_norms:,})"),
            ("elementwise operations", quantity(self.elementwise)),
            ("parameters", f"{quantity(self.parameters)} ({self.parameters:,}), {quantity(self.trainable)} trainable"),
            ("activation memory", size(self.activation_bytes)),
            (
                "coverage",
                f"{self.coverage:.1%} of operator calls"
                + "".join(f"; {n} without formula: {k}" for k, n in self.uncovered.items()),
            ),
        ]
        if self.latency:
            t = self.latency
            lines.append(
                (
                    "latency",
                    f"{milliseconds(t.median_s)}, quartiles {milliseconds(t.low_s)} to {milliseconds(t.high_s)}, "
                    f"n = {t.n} after {t.warmup} warm-up, {t.device}" + (f", {t.threads} threads" if t.threads else ""),
                )
            )
        if self.memory:
            lines.append(
                ("peak memory of a forward", f"{size(self.memory.peak_bytes)} beside {size(self.memory.resting_bytes)} of weights")
            )
        for name, report in self.tokens.items():
            stages = " → ".join(f"{count} {stage}" for stage, count in report.stages)
            lines.append(
                (f"tokens in {name or 'the model'}", f"{stages}: {report.ratio:.1%}" + (", masked" if report.masked else ""))
            )
        return lines

    def tree(self, depth: int = 2) -> list[tuple[str, ...]]:
        """Rows for a table of modules down to `depth`: name, type, parameters, MACs, share, FLOPs, norms, elementwise, memory, time."""
        total = self.macs or 1
        return [
            (
                "  " * row.depth + (row.name.rpartition(".")[2] or self.name),
                row.type + (f" ×{row.calls}" if row.calls > 1 else ""),
                quantity(row.parameters),
                quantity(row.macs),
                f"{row.macs / total:.1%}",
                quantity(row.flops),
                quantity(row.norms),
                quantity(row.elementwise),
                size(row.activation_bytes),
                milliseconds(row.seconds) if row.seconds is not None else "–",
            )
            for row in self.modules
            if row.depth <= depth and (row.calls or row.macs or row.parameters)
        ]

    def tables(self, depth: int = 2) -> list[Table]:
        """rich tables: the summary, the modules, the operators."""
        from rich.table import Table

        whole = Table("", self.name, title=f"Profile of {self.name}")
        for line in self.summary():
            whole.add_row(*line)
        modules = Table(title="By module", caption=CONVENTION)
        for heading in TREE_COLUMNS:
            modules.add_column(heading, justify="left" if heading in ("module", "type") else "right", no_wrap=heading == "module")
        for cells in self.tree(depth):
            modules.add_row(*cells)
        operators = Table(title="By operator")
        for heading in OPERATOR_COLUMNS:
            operators.add_column(heading, justify="left" if heading in ("operator", "class") else "right")
        for cells in self._operator_cells():
            operators.add_row(*cells)
        return [whole, modules, operators]

    def markdown(self, depth: int = 2) -> str:
        """The same tables in Markdown."""
        modules = [(cells[0].replace("  ", "· "), *cells[1:]) for cells in self.tree(depth)]
        return "\n\n".join(
            [
                markdown_table((self.name, ""), self.summary()),
                markdown_table(TREE_COLUMNS, modules),
                markdown_table(OPERATOR_COLUMNS, self._operator_cells()),
                CONVENTION,
            ]
        )

    def _operator_cells(self) -> list[tuple[str, ...]]:
        rows = [row for row in self.operators if row.kind != "layout"]
        return [
            (
                row.name,
                row.kind or "no formula",
                f"{row.calls:,}",
                *(quantity(n) if n else "" for n in (row.macs, row.norms, row.elementwise, row.elements)),
            )
            for row in rows
        ]


TREE_COLUMNS = ("module", "type", "parameters", "MACs", "share", "FLOPs", "norms", "elementwise", "activations", "time")
OPERATOR_COLUMNS = ("operator", "class", "calls", "MACs", "norms", "elementwise", "elements compared")


def quantity(number: int | float) -> str:
    """A count with its decimal unit: 17.564 G."""
    for unit, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(number) >= factor:
            return f"{number / factor:.3f} {unit}"
    return f"{number:g}"


def size(count: int) -> str:
    """Bytes with their binary unit."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


class _Surroundings(nn.Module):
    """The modules and parameters that a function uses without owning them, under their names in the function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        found: dict[str, Any] = {}
        if isinstance(function, functools.partial):
            found.update(function.keywords, **{f"argument{i}": value for i, value in enumerate(function.args)})
            function = function.func
            if isinstance(function, nn.Module):
                found["function"] = function
        if inspect.isfunction(function):
            used = inspect.getclosurevars(function)
            found.update(used.globals, **used.nonlocals)
        for name, value in found.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                self.register_parameter(name, value)


def _root(target: nn.Module | Callable[..., Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """The module whose names a profile uses, and what it runs."""
    if isinstance(target, nn.Module):
        whole: nn.Module = getattr(target, "_orig_mod", target)  # torch.compile wraps; the operators are those inside
        return whole, whole
    owner = getattr(target, "__self__", None)
    if isinstance(owner, nn.Module):
        return owner, target
    if not callable(target):
        raise ValueError(f"a profile takes a module or a function, got {type(target).__name__}")
    return _Surroundings(target), target


def profile(
    target: nn.Module | Callable[..., Any],
    inputs: Any,
    *,
    name: str = "",
    strict: bool = True,
    timed: bool = True,
    repeats: int = 10,
) -> Profile:
    """Count, measure and describe one forward. The module is left as it was: mode, buffers, random state.

    Args:
        target: a module in the mode to be profiled, a method of one, or a function; a function's modules are found in what
            it refers to.
        inputs: one tensor, a list or tuple of positional arguments, or a mapping of keyword arguments. Arguments may be of any
            type. With module and inputs on the meta device, any size is counted without memory, and nothing is timed.
        name: for people; the class or function name unless given.
        strict: raise where an operator that multiplies matrices, or one that torch does not know, has no formula.
        timed: measure latency, peak memory and seconds by module; False only counts, with one forward.
        repeats: timed forwards.

    Raises:
        UncountedOperatorError: in strict mode, naming the operators and where they ran.
        ValueError: for `repeats` below 1, or a target that cannot be called.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}; timed=False times nothing")
    module, call = _root(target)
    device = measure.device_of(module, inputs)
    args, kwargs = arguments(inputs)
    analysis = FlopCount(module, inputs, call=call, strict=strict)
    tallies = analysis.tallies()
    forwards, latency, memory = 1, None, None
    seconds: Mapping[str, float] = {}
    resting = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    if timed and device.type != "meta":

        def forward() -> Any:
            return call(*args, **kwargs)

        with undisturbed(module):
            memory = Memory(*_swap(measure.peak_memory(forward, device), resting))
            with measure.module_times(
                {part: analysis.canonical_module_name(label) for label, part in module.named_modules()}, device
            ) as seconds:
                forward()
            forwards = 3
            latency = measure.latency(forward, device, repeats=repeats, warmup=0, ran=forwards)
    whole = tallies[""]
    coverage, uncovered = _coverage(whole)
    calls = analysis.module_calls()
    modules = tuple(
        _module_row(label, part, tallies[label], calls[label], seconds.get(label)) for label, part in module.named_modules()
    )
    return Profile(
        name=name
        or (type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__qualname__", type(target).__name__)),
        inputs=tuple(describe(inputs)),
        device="meta" if device.type == "meta" else measure.device_name(device),
        training=module.training,
        parameters=modules[0].parameters,
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        activation_bytes=modules[0].activation_bytes,
        coverage=coverage,
        uncovered=uncovered,
        modules=modules,
        operators=_operator_rows(whole),
        tokens=token_reports(module),
        latency=latency,
        memory=memory,
        forwards=forwards,
        versions={"torch": torch.__version__, "fvcore": fvcore.__version__},
    )


def _swap(measured: tuple[int, str], resting: int) -> tuple[int, int, str]:
    return measured[0], resting, measured[1]


def _coverage(whole: Mapping[str, Tally]) -> tuple[float, dict[str, int]]:
    computing = {operator: tally for operator, tally in whole.items() if tally.kind != "layout"}
    uncovered = {operator: tally.calls for operator, tally in sorted(computing.items()) if tally.kind is None}
    total = sum(tally.calls for tally in computing.values())
    return (1.0 if total == 0 else 1 - sum(uncovered.values()) / total), uncovered


def _module_row(name: str, module: nn.Module, tallies: Mapping[str, Tally], calls: int, seconds: float | None) -> ModuleRow:
    whole = Tally(None)
    for tally in tallies.values():
        whole.add(tally)
    return ModuleRow(
        name=name,
        type=type(module).__name__.lstrip("_"),
        calls=calls,
        macs=whole.macs,
        norms=whole.norms,
        elementwise=whole.elementwise,
        elements=whole.elements,
        parameters=sum(p.numel() for p in module.parameters()),
        activation_bytes=whole.allocated,
        seconds=seconds,
    )


def _operator_rows(whole: Mapping[str, Tally]) -> tuple[OperatorRow, ...]:
    order = sorted(
        whole.items(), key=lambda item: (-item[1].macs, -item[1].norms, -item[1].elementwise, -item[1].elements, item[0])
    )
    return tuple(
        OperatorRow(operator, t.kind, t.calls, t.macs, t.norms, t.elementwise, t.elements, t.allocated) for operator, t in order
    )
