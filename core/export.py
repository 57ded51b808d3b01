"""Export of trained modules to `torch.export` programs and to ONNX, each checked against PyTorch before it counts.

What can be exported is a list of `Part`s: a module of tensors in and tensors out, example inputs, and the axes that may
change size. A model offers its parts with a method

    def export_parts(self) -> Sequence[Part]

`export` writes a file for each part and format, reads it back, runs it at the example's sizes and at others, and compares
with the module. ONNX needs the extra `export` (onnx, onnxscript, onnxruntime).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Format = Literal["torch", "onnx"]
SUFFIX: dict[str, str] = {"torch": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-4
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class ExportError(RuntimeError):
    """A part that cannot be exported, or whose exported form gives other numbers. The message names part and format."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One exportable module.

    Attributes:
        name: of the file, and in messages.
        module: maps tensors to a tensor or a tuple of tensors.
        inputs: example inputs by the names of forward's parameters, in their order. Dynamic axes should be 2 or longer.
        outputs: names of the outputs, in order.
        dynamic: per input, its axes of changing size with a name each; equal names have equal sizes.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]

    def at(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """The example inputs with named axes of other sizes: cut, or repeated from the start."""
        resized = {}
        for name, value in self.inputs.items():
            for axis, symbol in self.dynamic.get(name, {}).items():
                if symbol in sizes:
                    value = value.index_select(axis, torch.arange(sizes[symbol]) % value.shape[axis])
            resized[name] = value.contiguous()
        return resized

    def sizes(self) -> dict[str, int]:
        """The example's sizes of the named axes."""
        return {s: self.inputs[name].shape[axis] for name, axes in self.dynamic.items() for axis, s in axes.items()}

    def expected(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the module itself gives, in evaluation mode and without gradient."""
        with _evaluating(self.module), torch.no_grad():
            given = self.module(**inputs)
        return dict(zip(self.outputs, given if isinstance(given, tuple) else (given,), strict=True))


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        worst: largest difference to PyTorch, relative to the largest value of the output or to 1, over `sizes`.
        sizes: the sizes of the named axes that were tried.
    """

    part: str
    format: Format
    path: Path
    bytes: int
    worst: float
    sizes: tuple[dict[str, int], ...]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on optional packages and renamed axes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def program(part: Part) -> torch.export.ExportedProgram:
    """The part as a `torch.export` program in evaluation mode, on the CPU, with its dynamic axes.

    Raises:
        ExportError: if the module cannot be traced.
    """
    symbols = {s: torch.export.Dim(s) for axes in part.dynamic.values() for s in axes.values()}
    shapes = {name: {axis: symbols[s] for axis, s in part.dynamic.get(name, {}).items()} for name in part.inputs}
    module = copy.deepcopy(part.module).cpu().eval()
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, (), dict(part.inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(f"{part.name}: torch.export cannot trace it: {str(error).splitlines()[0]}") from error


def _need(*modules: str) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(f"ONNX export needs {name}; install the extra: pip install 'ginrepro[export]'") from error


def save(part: Part, traced: torch.export.ExportedProgram, path: Path, format: Format) -> None:
    """Write a traced part in one format, parents included.

    Raises:
        ExportError: if it cannot be written, or ONNX is asked for and its packages are not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "torch":
        torch.export.save(traced, path)
        return
    _need("onnx", "onnxscript")
    try:
        with torch.no_grad(), _quiet():
            made = torch.onnx.export(
                traced, (), dynamo=True, input_names=list(part.inputs), output_names=list(part.outputs), verbose=False
            )
            assert made is not None
            made.save(str(path), external_data=False)
    except Exception as error:
        raise ExportError(f"{part.name}: ONNX export failed: {str(error).splitlines()[0]}") from error


def load(path: Path, outputs: Sequence[str]) -> Run:
    """An exported file as a function of named tensors.

    Raises:
        ExportError: for a file that ONNX Runtime refuses, or another suffix than .pt2 and .onnx.
    """
    if path.suffix == SUFFIX["torch"]:
        module = torch.export.load(path).module()

        def run_program(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad():
                given = module(**inputs)
            return dict(zip(outputs, given if isinstance(given, tuple) else (given,), strict=True))

        return run_program
    if path.suffix != SUFFIX["onnx"]:
        raise ExportError(f"{path}: exported files end in {' or '.join(SUFFIX.values())}")
    _need("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"{path}: ONNX Runtime refuses it: {str(error).splitlines()[0]}") from error

    def run_onnx(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = session.run(list(outputs), {k: v.numpy() for k, v in inputs.items()})
        return {k: torch.from_numpy(v) for k, v in zip(outputs, given, strict=True)}

    return run_onnx


def compare(part: Part, run: Run, sizes: Iterable[Mapping[str, int]]) -> float:
    """The largest difference between a run and the module, relative to the output's largest value or to 1.

    Raises:
        ExportError: if an output has another shape, or is not finite where the module's is.
    """
    worst = 0.0
    for tried in sizes:
        inputs = part.at(tried)
        expected, given = part.expected(inputs), run(inputs)
        for name, theirs in expected.items():
            ours = given[name]
            if ours.shape != theirs.shape:
                raise ExportError(
                    f"{part.name}, sizes {dict(tried)}: {name} is {tuple(ours.shape)}, PyTorch gives {tuple(theirs.shape)}"
                )
            difference = (ours.double() - theirs.double()).abs().max().item() if theirs.numel() else 0.0
            scale = max(1.0, theirs.double().abs().max().item() if theirs.numel() else 1.0)
            if not difference < float("inf"):
                raise ExportError(f"{part.name}, sizes {dict(tried)}: {name} is not finite")
            worst = max(worst, difference / scale)
    return worst


def other_sizes(part: Part) -> list[dict[str, int]]:
    """The example's sizes, all ones, and each axis in turn three longer."""
    own = part.sizes()
    return [own, dict.fromkeys(own, 1), *({**own, s: n + 3} for s, n in own.items())] if own else [{}]


def export(
    parts: Sequence[Part],
    folder: Path,
    formats: Sequence[Format] = ("torch", "onnx"),
    *,
    tolerance: float = TOLERANCE,
    sizes: Callable[[Part], Sequence[dict[str, int]]] = other_sizes,
    told: Callable[[Exported], Any] = lambda exported: None,
) -> list[Exported]:
    """Write every part in every format into `folder` and check each file.

    Args:
        parts: what a model's `export_parts()` gave.
        folder: where the files go, as `<part>.pt2` and `<part>.onnx`.
        formats: any of "torch" and "onnx".
        tolerance: largest difference allowed (see `Exported.worst`).
        sizes: sizes of the named axes at which a part is compared.
        told: called with each file as soon as it is checked.

    Raises:
        ExportError: for the first part that cannot be exported or differs; its file is removed.
        ValueError: for an unknown format or two parts of one name.
    """
    unknown = [f for f in formats if f not in SUFFIX]
    if unknown:
        raise ValueError(f"formats must be among {', '.join(SUFFIX)}, got {', '.join(unknown)}")
    if len({p.name for p in parts}) < len(parts):
        raise ValueError(f"parts need different names, got {', '.join(p.name for p in parts)}")
    done = []
    for part in parts:
        traced = program(part)
        for format in formats:
            path = folder / (part.name + SUFFIX[format])
            try:
                save(part, traced, path, format)
                worst = compare(part, load(path, part.outputs), sizes(part))
                if worst > tolerance:
                    raise ExportError(f"{part.name}: {format} differs from PyTorch by {worst:.3g} (tolerance {tolerance:g})")
            except Exception:
                path.unlink(missing_ok=True)
                raise
            done.append(Exported(part.name, format, path, path.stat().st_size, worst, tuple(sizes(part))))
            told(done[-1])
    return done
