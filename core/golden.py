"""Golden cases: replay a module against numbers computed once from the authors' released code.

A case is one safetensors file (format: `tests/golden/README.md`). A plugin claims a reference module by registering an
adapter, which builds our module from the case's configuration and says how to run it and how its parameters are named
in the reference:

    @adapter("MultiModalSDTPS")
    def multimodal(case: Case) -> Replay:
        module = MultiModalSDTPS(...)
        case.load(module, KEYS)
        return Replay(module, lambda inputs: {...named outputs...}, keys=KEYS)

Adapters live in `<plugin package>/golden.py` (and `core/golden_cases.py` for the core's own).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from core import registry

OUTPUT_TOLERANCE = 1e-5
OUTPUT_TOLERANCE_CONV = 2e-4
GRADIENT_TOLERANCE = 1e-4
ROUNDING = 1e-6  # a gradient below this part of the case's largest is zero in exact arithmetic; its digits are noise


class KeyMap(Protocol):
    """How our state dict is named in the reference. Both directions, so that packed tensors can be split and joined."""

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class SameKeys:
    """Our keys are the reference's keys."""

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(ours)

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(theirs)


class Renamed:
    """A one-to-one renaming given as `ours -> reference` by a function on keys and its inverse."""

    def __init__(self, forward: Callable[[str], str], backward: Callable[[str], str]):
        self.forward, self.backward = forward, backward

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.forward(k): v for k, v in ours.items()}

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.backward(k): v for k, v in theirs.items()}


def formula(key: str, shape: tuple[int, ...]) -> Tensor:
    """The formula fill of a parameter that a case does not store: a phase-shifted sine of its reference key."""
    n = math.prod(shape)
    phase = zlib.crc32(key.encode()) / 2**32 * 2 * math.pi
    v = torch.sin(0.7 * torch.arange(n, dtype=torch.float64) + phase).reshape(shape)
    if len(shape) >= 2:
        return (v / math.sqrt(n / shape[0])).float()
    return (0.1 * v + (1.0 if key.endswith("weight") else 0.0)).float()


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden file: metadata and tensors by role. Masks stored as uint8 stay uint8; `flag(name)` gives them as bool."""

    path: Path
    meta: dict[str, Any]
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    param_grads: dict[str, Tensor]
    input_grads: dict[str, Tensor]

    @property
    def module(self) -> str:
        return self.meta["module"]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta.get("config", {})

    @property
    def formula_filled(self) -> bool:
        return "params" in self.meta

    def flag(self, name: str) -> Tensor | None:
        """An input mask as bool, or None where the case has none."""
        value = self.inputs.get(name)
        return None if value is None else value.bool()

    def load(self, module: nn.Module, keys: KeyMap | None = None, *, fill: Callable[[str, Tensor], Tensor] | None = None) -> None:
        """Load the case's parameters into `module`, strictly.

        For a formula-filled case every *parameter* is filled from its reference key, buffers keep their constructed
        values, and `fill(reference_key, value)` may adjust a value (README: scale and gain keys).
        """
        keys = keys or SameKeys()
        if not self.formula_filled:
            module.load_state_dict(keys.from_reference(self.params), strict=True)
            return
        theirs = keys.to_reference({k: p.detach() for k, p in module.named_parameters()})
        filled = {k: formula(k, tuple(v.shape)) for k, v in theirs.items()}
        if fill is not None:
            filled = {k: fill(k, v) for k, v in filled.items()}
        expected = {k: tuple(shape) for k, shape in self.meta.get("keys", [])}
        missing = {k: s for k, s in expected.items() if k not in filled and not k.endswith("num_batches_tracked")}
        state = module.state_dict()
        buffers = keys.to_reference({k: v for k, v in state.items() if k not in dict(module.named_parameters())})
        missing = {k: s for k, s in missing.items() if k not in buffers}
        surplus = [k for k in filled if expected and k not in expected]
        wrong = [k for k, v in filled.items() if k in expected and tuple(v.shape) != expected[k]]
        if missing or surplus or wrong:
            raise ValueError(
                f"{self.path.name}: keys differ from the reference: missing {sorted(missing)}, surplus {surplus}, shape {wrong}"
            )
        module.load_state_dict({**state, **keys.from_reference(filled)}, strict=True)


@dataclasses.dataclass
class Replay:
    """Our side of a case.

    Attributes:
        module: holds the parameters whose gradients are compared (None for a pure function).
        run: named inputs (float inputs require grad where the case stores a gradient) to named outputs.
        keys: our parameter names in the reference.
        loss: from outputs to the scalar to differentiate; default sum of output times cotangent.
        stats: named scalars to compare with `meta.stats`, filled by `run`.
        params: parameters by reference key, where a module and a key map do not say it (several modules, say).
    """

    module: nn.Module | None
    run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    keys: KeyMap = dataclasses.field(default_factory=SameKeys)
    loss: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    stats: dict[str, float] | None = None
    params: dict[str, Tensor] | None = None


_ADAPTERS: dict[str, Callable[[Case], Replay]] = {}


def adapter(module: str) -> Callable[[Callable[[Case], Replay]], Callable[[Case], Replay]]:
    """Claim the reference module named `module` in a case's metadata."""

    def add(function: Callable[[Case], Replay]) -> Callable[[Case], Replay]:
        known = _ADAPTERS.get(module)
        if known is not None and known.__module__ != function.__module__:
            raise registry.RegistrationError(
                f"golden module {module!r} is claimed by {known.__module__} and by {function.__module__}"
            )
        _ADAPTERS[module] = function
        return function

    return add


def read(path: Path) -> Case:
    """Read one case.

    Raises:
        ValueError: if the file is not a golden case; the message names the file and what is wrong.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if not isinstance(meta, dict) or "module" not in meta:
        raise ValueError(f"{path}: no `meta` with a `module` in its header; see tests/golden/README.md for the format")

    def role(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    return Case(
        path, meta, role("param/"), role("in/"), role("out/"), role("grad/cotangent/"), role("grad/param/"), role("grad/in/")
    )


@dataclasses.dataclass
class Comparison:
    """The outcome of one case: worst differences, and every reason why it fails."""

    path: Path
    module: str
    variant: str
    compared: int = 0
    worst_output: float = 0.0
    worst_gradient: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures and self.compared > 0


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.numel() == 0:
        return 0.0
    a, b = ours.detach().double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities that agree count as equal
    return float(torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=math.inf).max())


def compare(case: Case) -> Comparison:
    """Replay one case and compare outputs, stats and gradients with the stored ones."""
    result = Comparison(case.path, case.module, str(case.meta.get("variant", "")))
    build = _ADAPTERS.get(case.module)
    if build is None:
        near = registry.nearest(case.module, _ADAPTERS)
        result.failures.append(f"no plugin claims module {case.module!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
        return result
    try:
        replay = build(case)
        if replay.module is not None:
            replay.module.train(bool(case.meta.get("train", False)))
        inputs = {
            k: v.clone().requires_grad_(k in case.input_grads) if v.is_floating_point() else v for k, v in case.inputs.items()
        }
        outputs = replay.run(inputs)
    except Exception as error:  # a module that cannot be built or run is a failed case, not a crash of the others
        result.failures.append(f"{type(error).__name__}: {error}")
        return result

    tolerance = OUTPUT_TOLERANCE_CONV if case.formula_filled else OUTPUT_TOLERANCE
    for name, expected in case.outputs.items():
        if name not in outputs:
            result.failures.append(f"output {name!r} is missing; ours: {', '.join(outputs)}")
            continue
        ours = outputs[name]
        if tuple(ours.shape) != tuple(expected.shape):
            result.failures.append(f"output {name!r} has shape {tuple(ours.shape)}, the reference {tuple(expected.shape)}")
            continue
        scale = max(1.0, float(expected.double().abs().nan_to_num(posinf=0, neginf=0).max()) if expected.numel() else 1.0)
        worst = _difference(ours, expected) / scale
        result.compared += 1
        result.worst_output = max(result.worst_output, worst)
        if worst > tolerance:
            result.failures.append(f"output {name!r} differs by {worst:.3g} (tolerance {tolerance:g})")
    for name, expected_stat in case.meta.get("stats", {}).items():
        if replay.stats is None or name not in replay.stats:
            result.failures.append(f"stat {name!r} is missing")
            continue
        worst = abs(replay.stats[name] - expected_stat) / max(1.0, abs(expected_stat))
        result.compared += 1
        result.worst_output = max(result.worst_output, worst)
        if worst > tolerance:
            result.failures.append(f"stat {name!r} is {replay.stats[name]:.8g}, the reference has {expected_stat:.8g}")
    if result.failures or not (case.param_grads or case.input_grads):
        return result
    _compare_gradients(case, replay, inputs, outputs, result)
    return result


def _compare_gradients(
    case: Case, replay: Replay, inputs: dict[str, Tensor], outputs: Mapping[str, Tensor], result: Comparison
) -> None:
    tolerance = float(case.meta.get("gradient_tolerance", GRADIENT_TOLERANCE))
    if replay.loss is not None:
        total = replay.loss(outputs)
    else:
        total = torch.stack([(outputs[k] * c).sum() for k, c in case.cotangents.items()]).sum()
    total.backward()
    if replay.params is not None:
        grads = {k: p.grad for k, p in replay.params.items()}
    elif replay.module is not None:
        # Zero stands for "no gradient" while keys are mapped (joined tensors may have one half without); a reference
        # entry that is absent must then be exactly zero here.
        ours = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in replay.module.named_parameters()}
        grads = dict(replay.keys.to_reference(ours))
    else:
        grads = {}
    stored = {**{"param " + k: v for k, v in case.param_grads.items()}, **{"input " + k: v for k, v in case.input_grads.items()}}
    largest = max((float(v.double().abs().max()) for v in stored.values() if v.numel()), default=0.0)
    for name, expected in stored.items():
        role, key = name.split(" ", 1)
        grad = grads.get(key) if role == "param" else inputs[key].grad
        if grad is None:
            grad = torch.zeros_like(expected)
        own = float(expected.double().abs().max())
        if own < min(ROUNDING * largest, 1e-4):  # a bias that softmax cannot see, say: ours has to be as small
            own = ROUNDING * largest / tolerance
        worst = _difference(grad, expected) / max(own, 1e-6)
        result.compared += 1
        result.worst_gradient = max(result.worst_gradient, worst)
        if worst > tolerance:
            result.failures.append(f"gradient of {name!r} differs by {worst:.3g} of its maximum (tolerance {tolerance:g})")
    for key, grad in grads.items():
        if key not in case.param_grads and grad is not None and float(grad.abs().max()) > 0:
            result.failures.append(f"gradient of param {key!r} exists here and not in the reference")


def load_adapters() -> dict[str, str]:
    """Import `golden` of every plugin and of the core. Returns the plugins that failed, with the cause."""
    importlib.import_module("core.golden_cases")
    failed: dict[str, str] = {}
    for name, outcome in registry.load_all().items():
        if isinstance(outcome, registry.PluginError):
            failed[name] = outcome.cause
            continue
        try:
            registry.load_part(name, "golden")
        except registry.PluginError as error:
            failed[name] = error.cause
    return failed


@functools.cache
def adapters() -> tuple[str, ...]:
    """Names of the reference modules somebody claims."""
    load_adapters()
    return tuple(sorted(_ADAPTERS))


def cases(folder: Path) -> list[Path]:
    """The case files of a folder.

    Raises:
        ValueError: if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"golden folder {folder} does not exist")
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ValueError(f"golden folder {folder} holds no *.safetensors case")
    return found
