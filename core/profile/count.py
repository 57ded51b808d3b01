"""Counting one forward, operator by operator.

The account is fvcore's (`FlopCountAnalysis`: totals, modules, operators, its tables), the handles are ours
(`core.profile.formulas`), and so is the way operators are seen. fvcore sees them through `torch.jit.trace`, and that
cannot be made exact: on the meta device a convolution neither traces nor appears in the graph; operators that no output
depends on are deleted, although they run; sizes become tensors inside the forward, so that Python code which looks at
them takes other paths or fails; an `autograd.Function` is a black box; inputs and outputs must be tensors.

Here a dispatch mode sees every operator as the module calls it. It runs below autograd, where torch has not yet taken
composite operators apart: `linear`, `matmul`, `einsum`, `scaled_dot_product_attention`, `cdist` and `conv2d` arrive whole, with
the shapes they were called with, whatever kernel the device would pick, on every device and on `meta`. Composite operators
without a formula are taken apart and their parts are counted. Python functions are followed as they run, so both a count
of attention by hand and one by `nn.MultiheadAttention` come from the same formulas; the fused path of the latter, which
torch takes in evaluation, is off while counting.

What no counter that watches torch can see is a kernel called past the dispatcher. Inside an `autograd.Function` it is
noticed, because a result appears that no operator wrote, and it is then an uncounted operator; so it is in a scripted module
that was optimised for inference, by its graph. Elsewhere it is not, and neither is what a forward computes in other threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_analysis import Statistics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.profile import formulas
from core.profile.formulas import Call, Cost, Kind, Shape


class UncountedOperatorError(ValueError):
    """A forward used operators that multiply matrices, or that torch does not know, and that have no formula."""


@dataclasses.dataclass
class Tally:
    """What an operator came to, summed over its calls.

    Attributes:
        kind: its class, None for an operator that has no formula.
        allocated: bytes of the tensors it created.
    """

    kind: Kind | None
    calls: int = 0
    macs: int = 0
    norms: int = 0
    elementwise: int = 0
    elements: int = 0
    allocated: int = 0

    def add(self, other: Tally) -> None:
        self.calls += other.calls
        self.macs += other.macs
        self.norms += other.norms
        self.elementwise += other.elementwise
        self.elements += other.elements
        self.allocated += other.allocated


# What to do with an operator: its class and formula, or take it apart.
Rule = tuple[Kind | None, formulas.Formula | None] | Literal["decompose"]


def _shape(value: Any) -> Any:
    """A tensor as its shape, a list of tensors as a list of shapes, the rest as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return [_shape(item) for item in value]
    return value


def _numel(value: Any) -> int:
    """Elements of the first tensor in a value."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, (list, tuple)):
        return next((item.numel() for item in value if isinstance(item, Tensor)), 0)
    return 0


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _looked_at(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Elements of a comparison-class call: fetched, written, or looked at."""
    if name in formulas.FETCHING:
        return _numel(out)
    if name in formulas.WRITING:
        return min((t.numel() for t in _tensors((*args[1:], *kwargs.values()))), default=0)
    return max(_numel(args[0]) if args else 0, _numel(out))


_FACTORY = re.compile(r"(?:new_)?(?:empty|zeros|ones|full)(?:_like|_strided|_permuted|_quantized)?$")


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Iterator[Tensor]:
    """Results that an operator filled with values: not views, and not memory that is only given out for others to write."""
    if _FACTORY.match(func._schema.name.partition("::")[2]):
        return
    given = set() if func._schema.is_mutable else _storages((*args, *kwargs.values()))
    for tensor in _tensors(out if isinstance(out, (list, tuple)) else (out,)):
        if _is_dense(tensor) and tensor.untyped_storage()._cdata not in given:
            yield tensor


def _storages(values: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in _tensors(values) if _is_dense(t)}


class Recorder(TorchDispatchMode):
    """Sees every operator of a forward and what it costs.

    Args:
        names: the name of each module that may run.
        handles: handles in fvcore's protocol, by operator; they go before our formulas.
    """

    def __init__(self, names: Mapping[nn.Module, str], handles: Mapping[str, Callable[..., Any]]):
        super().__init__()
        self.names = names
        self.handles = handles
        self.stack: list[str] = [""]
        self.module_calls: Counter[str] = Counter()
        # What ran, by the chain of modules that were running, and operator.
        self.seen: dict[tuple[tuple[str, ...], str], Tally] = {}
        self._scope: tuple[str, ...] = ("",)
        self._rules: dict[Any, Rule] = {}
        self._muted = 0
        self._results: list[Tensor] | None = None  # what operators wrote inside the autograd function that is running

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's default would import the compiler, seconds at the first operator

    # --- modules

    def enter_module(self, module: nn.Module, *_: Any) -> None:
        self.stack.append(self.names.get(module, self.stack[-1]))
        self.module_calls[self.stack[-1]] += 1
        self._scope = tuple(dict.fromkeys(self.stack))

    def leave_module(self, *_: Any) -> None:
        self.stack.pop()
        self._scope = tuple(dict.fromkeys(self.stack))

    # --- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is None:
            rule = self._rules[func] = self._rule(func)
        if rule == "decompose":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            rule = self._rules[func] = (None, None)
        out = func(*args, **kwargs)
        if self._results is not None:
            self._results.extend(_written(func, args, kwargs, out))
        if not self._muted:
            self._record(func, rule, args, kwargs, out)
        return out

    def _rule(self, func: Any) -> Rule:
        operator, overload = func._schema.name, func._schema.overload_name
        if operator in self.handles:
            return "matmul", functools.partial(_by_handle, self.handles[operator])
        known = formulas.lookup(operator, overload) or formulas.lookup(operator.removesuffix("_"), overload)
        if known:
            return known
        space, _, name = operator.partition("::")
        if space in formulas.SILENT_SPACES:
            return "layout", None
        if space in formulas.TORCH_SPACES:
            kind = _kind(name, func)
            if kind:
                return kind, None
        with contextlib.suppress(RuntimeError):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd):
                return "decompose"
        return None, None

    def _record(self, func: Any, rule: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        kind, formula = rule
        operator = func._schema.name
        cost = Cost()
        if formula is not None:
            if all(map(_is_dense, _tensors((*args, *kwargs.values())))):
                cost = formulas.evaluate(kind, formula, _call(func, args, kwargs, out))
            else:
                kind = None  # a sparse or nested operand: the dense formula would lie
        elif kind == "elementwise":
            cost = Cost(elementwise=max(_numel(args[0]) if args else 0, _numel(out)))
        elif kind == "comparison":
            cost = Cost(compared={operator: _looked_at(operator.partition("::")[2].removesuffix("_"), args, kwargs, out)})
        self.note(operator, kind, cost, _allocated(args, kwargs, out))

    def note(self, operator: str, kind: Kind | None, cost: Cost, allocated: int) -> None:
        """File one call under the modules that are running."""
        tally = self._tally(operator, kind)
        tally.calls += 1
        tally.macs += cost.macs
        tally.norms += cost.norms
        tally.elementwise += cost.elementwise
        tally.allocated += allocated
        for inside, elements in cost.compared.items():
            other = tally if inside == operator else self._tally(inside, "comparison")
            other.calls += other is not tally
            other.elements += elements

    def _tally(self, operator: str, kind: Kind | None) -> Tally:
        key = (self._scope, operator)
        if key not in self.seen:
            self.seen[key] = Tally(kind)
        return self.seen[key]

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Let operators run without being counted."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    # --- autograd functions, whose kernels may bypass the dispatcher

    def apply_function(self, cls: Any, args: tuple[Any, ...], apply: Callable[..., Any]) -> Any:
        """Run `cls.apply`: by its formula if it has one, else by its parts, and if it has none of those either, as uncounted."""
        operator = f"autograd::{cls.__name__}"
        known = formulas.lookup(operator)
        if known and not self._muted:
            with self.muted():
                out = apply(*args)
            bound = (
                inspect.signature(cls.forward).bind(None, *args)
                if _takes_context(cls)
                else inspect.signature(cls.forward).bind(*args)
            )
            arguments = {name: _shape(value) for name, value in list(bound.arguments.items())[_takes_context(cls) :]}
            self.note(
                operator, known[0], formulas.evaluate(*known, Call(operator, arguments, _shapes(out))), _allocated(args, {}, out)
            )
            return out
        around, self._results = self._results, []
        try:
            out = apply(*args)
            created = 0 if self._muted else _allocated((*args, self._results), {}, out)
        finally:
            inside, self._results = self._results, around
        if created:
            self.note(operator, None, Cost(), created)
        if around is not None:  # what has been said of this function need not be said again of the one that calls it
            around += [*inside, *_tensors(out if isinstance(out, (list, tuple)) else (out,))]
        return out


def _takes_context(cls: Any) -> bool:
    """Whether `forward` takes ctx first (the old form) or a separate `setup_context` does."""
    return cls.setup_context is torch.autograd.Function.setup_context


def _kind(name: str, func: Any) -> Kind | None:
    """The class of an operator of torch that has no formula, None where its name says nothing."""
    base = name if name.endswith("__") else name.removesuffix("_")
    view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    if base in formulas.LAYOUT or view:
        return "layout"
    if torch.Tag.pointwise in func.tags or (name != base and _pointwise(base)):
        return "elementwise"
    if (
        base in formulas.LOOKING
        or base in formulas.FETCHING
        or base in formulas.WRITING
        or base.startswith(formulas.LOOKING_PREFIXES)
    ):
        return "comparison"
    if base in formulas.REDUCING:
        return "elementwise"
    if not any("Tensor" in str(argument.type) for argument in func._schema.arguments):
        return "layout"  # factories
    return None


def _pointwise(name: str) -> bool:
    """Whether torch tags the operator as pointwise (its in-place spelling often has no tag)."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Call:
    arguments: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            value = args[position]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value if argument.has_default_value() else None
        arguments[argument.name] = _shape(value)
    return Call(func._schema.name, arguments, _shapes(out))


def _shapes(out: Any) -> tuple[Shape, ...]:
    return tuple(tuple(t.shape) for t in _tensors(out if isinstance(out, (list, tuple)) else (out,)))


def _allocated(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes of result tensors that live in storage of their own: neither views of an operand nor written in place."""
    made = [t for t in _tensors(out if isinstance(out, (list, tuple)) else (out,)) if _is_dense(t)]
    if not made:
        return 0
    given = {t.untyped_storage()._cdata for t in _tensors((*args, *kwargs.values())) if _is_dense(t)}
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in made) if s._cdata not in given}.values())


# --- handles in fvcore's protocol -------------------------------------------------------------------------------------


class _Value:
    """As much of a traced value as fvcore's handles ask for."""

    def __init__(self, value: Any):
        self.value = value

    def isCompleteTensor(self) -> bool:
        return isinstance(self.value, tuple)

    def type(self) -> _Value:
        return self

    def sizes(self) -> list[int]:
        return list(self.value)

    def toIValue(self) -> Any:
        return self.value

    def node(self) -> _Value:
        return self

    def inputs(self) -> list[_Value]:
        return [_Value(item) for item in self.value]


def _by_handle(handle: Callable[..., Any], call: Call) -> int:
    counted = handle([_Value(value) for value in call.arguments.values()], [_Value(shape) for shape in call.outputs])
    return int(sum(counted.values()) if isinstance(counted, Counter) else counted)


# --- the analysis -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run forwards and leave buffers (running statistics) and random state as they were."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta]
    devices = sorted({buffer.device.index or 0 for buffer in (*module.parameters(), *module.buffers()) if buffer.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in before:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


@contextlib.contextmanager
def _fastpath_off() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _functions_watched(recorder: Recorder) -> Iterator[None]:
    """Every `autograd.Function` passes by the recorder, also one whose `apply` somebody keeps under another name."""
    base: Any = torch.autograd.function._SingleLevelFunction  # type: ignore[attr-defined]  # what `Function.apply` calls in the end

    def apply(cls: Any, *args: Any) -> Any:
        return recorder.apply_function(cls, args, super(base, cls).apply)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


@contextlib.contextmanager
def _modules_watched(recorder: Recorder) -> Iterator[None]:
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(recorder.enter_module),
        nn.modules.module.register_module_forward_hook(recorder.leave_module, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class FlopCount(FlopCountAnalysis):
    """fvcore's `FlopCountAnalysis` with exact counts; `flop_count_table` and `flop_count_str` of fvcore read it.

    `total()` and the like give MACs and norms together, fvcore's convention; `tallies` gives the columns apart.

    Args:
        model: the module whose names the account uses.
        inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments; of any type.
        call: what to run, the module itself unless given (one of its methods, or a function that uses it).
        strict: raise where an operator that multiplies matrices, or one that torch does not know, has no formula.

    Raises:
        UncountedOperatorError: in strict mode, when the count is asked for.
    """

    def __init__(self, model: nn.Module, inputs: Any, *, call: Callable[..., Any] | None = None, strict: bool = False):
        super().__init__(model, inputs)
        self._op_handles: dict[str, Callable[..., Any]] = {}
        self._stats: Statistics | None = None
        self._call = call or model
        self._strict = strict
        self._recorder: Recorder | None = None
        self.unsupported_ops_warnings(False)
        self.uncalled_modules_warnings(False)

    def _run(self) -> Recorder:
        names = {module: name for module, name in self._aliases.items() if isinstance(module, nn.Module)}
        recorder = Recorder(names, self._op_handles)
        args, kwargs = arguments(self._inputs)
        with undisturbed(self._model), _fastpath_off(), _modules_watched(recorder), _functions_watched(recorder):
            with torch._C._AutoDispatchBelowAutograd(), recorder:  # type: ignore[attr-defined]
                try:
                    self._call(*args, **kwargs)
                except RuntimeError as error:
                    if "does not require grad" in str(error):
                        raise UncountedOperatorError(
                            "the forward differentiates (torch.autograd.grad or backward), and a count runs below autograd: profile the "
                            "function that it differentiates"
                        ) from error
                    if "HigherOrderOperator" not in str(error):
                        raise
                    what = str(error).partition("HigherOrderOperator ")[2].split(" ")[0]
                    raise UncountedOperatorError(
                        f"{what} hands a Python function to the compiler, and what that computes is not seen. Profile the spelling "
                        "with ordinary operators: its count is the same."
                    ) from error
        return recorder

    def _analyze(self) -> Statistics:
        if self._stats is not None:
            return self._stats
        recorder = self._recorder = self._run()
        owned: dict[str, Counter[str]] = {name: Counter() for name in self._aliases.values()}
        unsupported: dict[str, Counter[str]] = {name: Counter() for name in self._aliases.values()}
        for (scope, operator), tally in recorder.seen.items():
            for name in self._owners(scope):
                if tally.kind is None:
                    unsupported[name][operator] += tally.calls
                elif tally.macs + tally.norms:
                    owned[name][operator.partition("::")[2]] += tally.macs + tally.norms
        called = {name for scope, _ in recorder.seen for name in self._owners(scope)} | set(recorder.module_calls)
        if self._strict:
            self._check(recorder)
        stats = Statistics(counts=owned, unsupported_ops=unsupported, uncalled_mods=set(self._aliases.values()) - called)
        self._stats = stats
        self._warn_unsupported_ops(unsupported[""])
        self._warn_uncalled_mods(stats.uncalled_mods)
        return stats

    def _owners(self, scope: tuple[str, ...]) -> frozenset[str]:
        """The modules that a call belongs to, by fvcore's ancestor mode."""
        if scope not in self._owned_by:
            by_caller = self._ancestor_mode == "caller"
            self._owned_by[scope] = frozenset(
                scope if by_caller else self._get_all_ancestors(scope[-1]) & set(self._aliases.values())
            )
        return self._owned_by[scope]

    def ancestor_mode(self, mode: str) -> FlopCount:
        """As in fvcore: "owner" files a call under the parents of the module by name, "caller" under the modules running."""
        self._owned_by: dict[tuple[str, ...], frozenset[str]] = {}
        self._stats = None
        super().ancestor_mode(mode)
        return self

    def _check(self, recorder: Recorder) -> None:
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) and (found := _past_dispatcher(module)):
                raise UncountedOperatorError(
                    f"{name or 'the model'} is scripted and optimised for inference: {found} runs past torch's dispatcher and would not be "
                    "counted. Profile the module that it was scripted from; its count is the same."
                )
        missing: Counter[str] = Counter()
        where: dict[str, str] = {}
        for (scope, operator), tally in recorder.seen.items():
            custom = operator.partition("::")[0] not in formulas.TORCH_SPACES
            known = formulas.lookup(operator) is not None
            if tally.kind is None and (custom or known or formulas.is_matmul_class(operator)):
                missing[operator] += tally.calls
                where.setdefault(operator, scope[-1] or "the root")
        if missing:
            listed = ", ".join(f"{name} ({calls} calls, first in {where[name]})" for name, calls in sorted(missing.items()))
            raise UncountedOperatorError(
                f"no formula for {listed}: the count would be too low. Register one with @formula({min(missing)!r}) from core.profile, "
                "or pass strict=False to have them listed as uncovered."
            )

    def tallies(self) -> dict[str, dict[str, Tally]]:
        """Every column, by module and operator (`{"": {"aten::linear": Tally(…)}, "block": …}`)."""
        self._analyze()
        assert self._recorder is not None
        out: dict[str, dict[str, Tally]] = {name: {} for name in self._aliases.values()}
        for (scope, operator), tally in self._recorder.seen.items():
            for name in self._owners(scope):
                out[name].setdefault(operator, Tally(tally.kind)).add(tally)
        return out

    def module_calls(self) -> Counter[str]:
        """How often each module ran."""
        self._analyze()
        assert self._recorder is not None
        return self._recorder.module_calls


def _past_dispatcher(module: torch.jit.ScriptModule) -> str | None:
    """An operator of a script that the interpreter runs itself, in a library's own tensors."""
    graph = getattr(module, "inlined_graph", None)
    return next(iter(re.findall(r"prim::mkldnn_\w+", str(graph))), None) if graph is not None else None


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a mapping is keywords, a list or tuple positions, anything else the only one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (list, tuple)):
        return tuple(inputs), {}
    return (inputs,), {}


def describe(inputs: Any) -> list[str]:
    """Shapes and types of all tensors among the inputs, in order."""
    args, kwargs = arguments(inputs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return [f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves]
