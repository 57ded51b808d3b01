"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file that is either whole or not there.

A checkpoint is a safetensors file. Tensors of the nested state (model, optimiser, random states, task) are stored under
their path; everything else is JSON in the header; the header also carries a sha256 over both. It is written to a
temporary file, flushed to disk, renamed, and the folder is flushed. Nothing is pickled, so reading one runs no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

FORMAT = "repro-checkpoint-1"
_NAME = re.compile(r"step-(\d{9})\.safetensors$")
_TENSOR = "\x00tensor"
_TUPLE = "\x00tuple"
_PAIRS = "\x00pairs"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: damaged, foreign, or not written. The message names the file and the reason."""


# --- nested state <-> flat tensors and JSON ---------------------------------------------------------------------------


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path
        while name in tensors:  # "a/b" beside "a" with its own "b", or 1 beside "1"
            name += "'"
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("\x00") for k in value):
            return {k: _pack(v, f"{path}/{k}" if path else k, tensors) for k, v in value.items()}
        for k in value:
            if not (k is None or isinstance(k, (bool, int, float, str))):
                raise TypeError(f"{path}: a {type(k).__name__} ({k!r}) cannot be a key in a checkpoint; use strings or numbers")
        return {_PAIRS: [[k, _pack(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{path}: a {type(value).__name__} cannot be stored in a checkpoint; use tensors, numbers, strings, lists, dicts"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_unpack(v, tensors) for v in value[_TUPLE])
        if _PAIRS in value:
            return {k: _unpack(v, tensors) for k, v in value[_PAIRS]}
        return {k: _unpack(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    return value


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


# --- one file -----------------------------------------------------------------------------------------------------------


def _write_all(handle: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[handle.write(view) :]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete on disk under its name, or not there.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written; names path, needed and free bytes. What
            was there before stays as it was, and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as handle:
            _write_all(handle, data)
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free:,}"
        reason = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise CheckpointError(
            f"cannot write {path}: {reason} ({len(data):,} bytes needed, {free} free). "
            "Earlier checkpoints are intact; make room and run the same command again."
        ) from error


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested state (tensors, numbers, strings, lists, tuples, dicts) as one checkpoint file.

    Raises:
        CheckpointError: as `write_atomic`.
        TypeError: if the state holds something else; names where.
    """
    found: dict[str, Tensor] = {}
    structure = json.dumps(_pack(state, "", found), allow_nan=True)
    # A copy of each on the CPU: tied weights share memory, which the format does not allow.
    tensors = {k: v.to("cpu", copy=True).contiguous() for k, v in found.items()}
    metadata = {"format": FORMAT, "state": structure, "sha256": _digest(structure, tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save_bytes(tensors, metadata))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint and check it.

    Raises:
        CheckpointError: if it is missing, truncated, altered by even one bit, or not a checkpoint of this project.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    try:
        tensors = load_bytes(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({len(data):,} bytes): {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this project (format {metadata.get('format')!r}, want {FORMAT!r})")
    structure = metadata.get("state", "")
    if _digest(structure, tensors) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its contents")
    restored: dict[str, Any] = _unpack(json.loads(structure), tensors)
    return restored


# --- a folder of them ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Store:
    """The checkpoints of one run: `step-NNNNNNNNN.safetensors`, the newest `keep` of them and the best one."""

    folder: Path
    keep: int = 2

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a file, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m.group(1)) for p in self.folder.iterdir() if (m := _NAME.match(p.name)))

    def save(self, step: int, state: Mapping[str, Any], *, best: int | None = None) -> Path:
        """Write the checkpoint of a step, then drop what is neither recent nor best, and stale temporary files."""
        target = self.path(step)
        save(target, state)
        recent = set(self.steps()[-self.keep :]) | {step} | ({best} if best is not None else set())
        for old in set(self.steps()) - recent:
            self.path(old).unlink(missing_ok=True)
        for stale in self.folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        return target

    def newest(self) -> tuple[int, dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole: (step, state, complaints about newer damaged ones); None if there is none.

        Raises:
            CheckpointError: if there are files and every one of them is damaged.
        """
        complaints: list[str] = []
        for step in reversed(self.steps()):
            try:
                return step, load(self.path(step)), complaints
            except CheckpointError as error:
                complaints.append(str(error))
        if complaints:
            raise CheckpointError(
                "no usable checkpoint: " + "; ".join(complaints) + ". Remove the folder's checkpoints to start over."
            )
        return None


# --- random states ------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Every global random state of the process, as tensors and numbers."""
    version, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    kind, internal, spare = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(version), torch.from_numpy(np.asarray(words, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [kind, list(internal), spare],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    name, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    kind, internal, spare = state["python"]
    random.setstate((kind, tuple(internal), spare))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the global random states as they were, whatever the block draws (evaluation must not change training)."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


# --- models -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading a state dict did: how many tensors matched, and which names did not."""

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.matched} tensors matched"]
        for label in ("missing", "unexpected", "mismatched", "ignored"):
            names = getattr(self, label)
            if names:
                shown = ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
                parts.append(f"{label}: {shown}")
        return "; ".join(parts)


def load_model(
    model: nn.Module, state: Mapping[str, Tensor], *, what: str, ignore: tuple[str, ...] = (), allow: tuple[str, ...] = ()
) -> LoadReport:
    """Load a state dict strictly, with a report.

    Args:
        model: receives the tensors.
        state: names to tensors, already in our naming.
        what: named in errors, e.g. the file's path.
        ignore: endings of names in `state` that are known not to matter (a profiler's buffers, say).
        allow: beginnings of the model's names that may stay at their initial values (a new head, say).

    Raises:
        CheckpointError: if a name is missing, unexpected or of another shape; nothing is loaded then.
    """
    ours = model.state_dict()
    ignored = tuple(k for k in state if k not in ours and k.endswith(ignore)) if ignore else ()
    theirs = {k: v for k, v in state.items() if k not in ignored}
    mismatched = tuple(
        f"{k} (file {tuple(v.shape)}, model {tuple(ours[k].shape)})"
        for k, v in theirs.items()
        if k in ours and v.shape != ours[k].shape
    )
    missing = tuple(k for k in ours if k not in theirs and not (allow and k.startswith(allow)))
    unexpected = tuple(k for k in theirs if k not in ours)
    matched = sum(k in ours for k in theirs) - len(mismatched)
    report = LoadReport(matched, missing, unexpected, mismatched, ignored)
    if not report.complete:
        raise CheckpointError(f"{what} does not fit this model: {report}")
    model.load_state_dict(theirs, strict=not allow)
    return report


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a foreign weight file (.safetensors, or .pt/.pth/.bin read with `weights_only=True`).

    Wrapping dicts under `state_dict`, `model` or `module` are opened, however many there are and in whatever order.

    Raises:
        CheckpointError: if the file is missing, of another kind, or would need to run code to be read.
    """
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return dict(load_bytes(path.read_bytes()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a weight file that can be read without running code in it (.safetensors, or a .pt, .pth or .bin of tensors); "
            f"{type(error).__name__}"
        ) from error
    while isinstance(loaded, dict):
        inner = next((loaded[w] for w in ("state_dict", "model", "module") if isinstance(loaded.get(w), dict)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, want a state dict")
    return {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
