"""The trainer: one loop for every reproduction, and the guards around it.

It knows a Task (core.task) and nothing of any paper. Killed at any step and started again, it ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from core import checkpoint, distributed, optim, schedules
from core.console import Progress
from core.data import to_device
from core.record import RunFolder, Signals
from core.registry import register
from core.task import StepResult, Task

MOST_THREADS = 4096  # far more crash torch


class Stopped(Exception):
    """A signal asked the run to stop; its checkpoint is written. `step` is the last finished step."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the checkpoint is written, the same command goes on"
        )
        self.signum, self.step = signum, step


class NonFinite(FloatingPointError):
    """A loss term or a gradient is NaN or infinite. Raised before the update, so the weights are those of the last good step.

    Attributes:
        step: the one that was not finite.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}; stopped before the update")
        self.step = step


class _Guard:
    """Stops a run at the first non-finite loss term or gradient, before the update.

    On the CPU each step is looked at. On an accelerator nothing waits: a sticky flag on the device makes the fused
    optimiser skip every update from the bad step on, and the host reads it when it logs.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        self.waits = device.type == "cpu" or not all(g.get("fused") for g in optimizer.param_groups)
        self.bad = torch.zeros((), device=device)
        self.suspects: list[tuple[int, Mapping[str, Tensor], Tensor]] = []

    def check(self, step: int, losses: Mapping[str, Tensor], norm: Tensor, model: nn.Module) -> None:
        if self.waits:
            if not (math.isfinite(norm) and all(math.isfinite(v) for v in losses.values())):
                self._raise(step, losses, model)
            return
        total = torch.stack(list(losses.values())).sum() + norm
        self.bad = torch.maximum(self.bad, (~total.isfinite()).float())
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.suspects.append((step, losses, norm))

    def read(self, model: nn.Module) -> None:
        """Look at the device's flag (called where the host waits anyway)."""
        if not self.waits and bool(self.bad):
            for step, losses, norm in self.suspects:
                if not math.isfinite(norm) or any(not math.isfinite(v) for v in losses.values()):
                    self._raise(step, losses, model)
        self.suspects.clear()

    def _raise(self, step: int, losses: Mapping[str, Tensor], model: nn.Module) -> None:
        shown = ", ".join(f"{k} {float(v):.6g}" for k, v in losses.items())
        terms = [k for k, v in losses.items() if not math.isfinite(v)]
        if terms:
            raise NonFinite(step, f"loss term {', '.join(terms)} is not finite ({shown})")
        names = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        few = ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
        raise NonFinite(step, f"the gradient of {few} is not finite while the losses are ({shown})")


@dataclasses.dataclass
class _Log:
    """Scalars of steps, kept as tensors until they are due and then read in one transfer."""

    run: RunFolder
    every: int
    rows: list[tuple[int, dict[str, Tensor], list[float]]] = dataclasses.field(default_factory=list)

    def add(self, step: int, result: StepResult, norm: Tensor, rates: list[float]) -> None:
        row = {f"loss/{k}": v for k, v in result.losses.items()}
        row.update(result.monitors)
        row["grad_norm"] = norm
        self.rows.append((step, row, rates))

    def flush(self, *, before: int | None = None) -> dict[str, float]:
        """Write what is held, or only the steps before one; returns the newest row for display."""
        self.rows = [row for row in self.rows if before is None or row[0] < before]
        if not self.rows:
            return {}
        flat = torch.stack([v.float().reshape(()) for _, row, _ in self.rows for v in row.values()])
        if distributed.world() > 1:
            torch.distributed.all_reduce(flat)
            flat /= distributed.world()
        values = iter(flat.tolist())
        shown: dict[str, float] = {}
        out = []
        for step, row, rates in self.rows:
            shown = {k: next(values) for k in row}
            shown = {"loss": sum(v for k, v in shown.items() if k.startswith("loss/")), **shown, "lr": max(rates)}
            out.append({"step": step, **shown})
        self.run.metrics(out)
        self.run.board(self.rows[-1][0], shown)
        self.rows.clear()
        return shown


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one.

    Raises:
        ValueError: if the named device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device must be 'auto', 'cpu' or 'cuda', with :N for one of several, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"train.device must be 'auto', 'cpu' or 'cuda', with :N for one of several, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device is {name!r}, but torch sees no CUDA device; use 'cpu' or 'auto'")
    if device.type == "cuda" and device.index is None:
        import os

        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def _check_precision(precision: str, place: torch.device) -> None:
    if precision == "fp16" and place.type != "cuda":
        raise ValueError("train.precision = 'fp16' needs a CUDA device (its loss scaling works there only); use 'bf16' or 'fp32'")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import random

    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: metrics at the end, at the best evaluation, and before the first step where asked for."""

    step: int
    last: dict[str, float]
    best: dict[str, float]
    best_step: int
    first: dict[str, float]


@register("trainer", denylist=["run", "on_built"])
def train(
    run: RunFolder,
    on_built: Callable[[Task, nn.Module], None],
    *,
    task: Callable[..., Task],
    optimizer: Callable[..., torch.optim.Optimizer] = optim.AdamW,
    schedule: Callable[..., Callable[..., float]] = schedules.Constant,
    steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    compile: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    eval_every: int = 0,
    eval_first: bool = False,
    save_every: int = 0,
    keep: int = 2,
    log_every: int = 20,
    select: str | None = None,
    select_mode: Literal["max", "min"] = "max",
    deterministic: bool = True,
    threads: int | None = None,
    initial: str | None = None,
) -> Outcome:
    """Train a task and evaluate it, resuming from the run folder's newest whole checkpoint.

    Args:
        run: the open run folder.
        on_built: called with task and model after everything is built and before the first step.
        task, optimizer, schedule: constructors.
        steps, epochs: length of the run, exactly one of the two (optimiser steps, or epochs of the task).
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1, …
        precision: autocast type; weights stay float32. fp16 scales the loss and skips overflowing steps.
        compile: run the model through torch.compile.
        accumulate: micro-batches a step; losses are averaged over them. Terms that couple the samples of a batch
            (mined triplets, batch norm) see one micro-batch each.
        clip_norm: largest gradient norm of each of the task's clip groups.
        eval_every, save_every, log_every: in steps; 0 means only at the end (log_every at least 1).
        eval_first: evaluate before the first step too.
        keep: newest checkpoints to keep beside the best one.
        select: metric that decides which evaluation is called best; None takes the last. Without `eval_first`, one evaluation
            before the first step, which is recorded nowhere, makes sure that there is such a metric.
        select_mode: whether more or less of it is better.
        deterministic: ask torch for deterministic algorithms.
        threads: CPU threads of torch (the bits of a result depend on it); None leaves torch's own choice.
        initial: run folder or checkpoint whose model weights to start from.

    Raises:
        ValueError: for settings that contradict each other; each message names the setting, its value and the rule.
        NonFinite: at the first loss term or gradient that is NaN or infinite.
        Stopped: after a signal, with the checkpoint written.
        checkpoint.CheckpointError: if a checkpoint cannot be written, or all are damaged, or one is of another model.
    """
    for name, value, least in (
        ("accumulate", accumulate, 1),
        ("log_every", log_every, 1),
        ("eval_every", eval_every, 0),
        ("save_every", save_every, 0),
        ("keep", keep, 1),
    ):
        if value < least:
            raise ValueError(f"train.{name} must be at least {least}, got {value}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"train.clip_norm must be positive or None, got {clip_norm}")
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"train.threads must be from 1 to {MOST_THREADS}, or None for torch's own choice, got {threads}")
        torch.set_num_threads(threads)
    if accumulate > 1 and epochs is not None:
        raise ValueError(
            f"train.epochs = {epochs} with accumulate = {accumulate}: an epoch is counted in batches and a step takes {accumulate}; give train.steps"
        )
    if not 0 <= seed < 2**62:  # ranks add to it
        raise ValueError(f"train.seed must be from 0 to 2**62 - 1, got {seed}")
    place = pick_device(device)
    _check_precision(precision, place)
    distributed.start(place)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if place.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic

    with Signals() as signals:  # from here on: preparing real data takes longer than some clusters wait
        # Build: seed first, so that one config and one seed give one model.
        seed_everything(seed)
        work = task()
        if distributed.rank() == 0:
            card = work.prepare(run.path.parent)
        distributed.barrier()
        if distributed.rank() != 0:  # what rank 0 made is there now
            card = work.prepare(run.path.parent)
        seed_everything(seed)
        plain = work.model().to(place)
        length = _length(work, steps, epochs)
        groups = optim.parameter_groups(plain, work.parameter_rules())
        opt = optimizer(groups)
        rates = [float(g["lr"]) for g in opt.param_groups]
        plan = schedule()
        scaler = torch.amp.GradScaler(place.type, enabled=precision == "fp16")
        if distributed.world() > 1:
            seed_everything(seed + distributed.rank())  # dropout differs between ranks; weights, built above, do not
        on_built(work, plain)

        # Resume, or start.
        store = checkpoint.Store(run.path / "checkpoints", keep)
        shapes = [[n, list(p.shape)] for n, p in plain.named_parameters()]
        identity = {"parameters": shapes, "seed": seed, "length": length, "data": card.fingerprint}
        done = 0
        unevaluated = False  # whether the checkpoint stands before an evaluation that is due
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        best: dict[str, Any] = {"step": -1, "metrics": {}}
        found = store.newest()
        if found is not None:
            done, state, complaints = found
            for complaint in complaints:
                run.log(f"WARNING: {complaint}; going on from step {done}")
            run.say(message="; ".join(complaints))
            _check_identity(state["identity"], identity, store.path(done))
            plain.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            work.load_state(state["task"])
            first, best, last, unevaluated = state["first"], state["best"], state["last"], state["unevaluated"]
            _restore_random(state["random"], seed, done, run)
            if state["threads"] != torch.get_num_threads():
                run.log(
                    f"WARNING: the checkpoint was made with {state['threads']} CPU threads, now {torch.get_num_threads()}: the last bits may differ"
                )
            run.open_metrics(state["metrics_bytes"])
            run.log(f"resumed after step {done} of {length} from {store.path(done).name}")
        else:
            run.open_metrics(0)
            if initial is not None:
                run.log(f"initial weights: {checkpoint.load_model(plain, initial_weights(initial), what=initial)}")
        run.write("data.json", dataclasses.asdict(card))

        net = distributed.wrap(torch.compile(plain) if compile else plain, place)  # type: ignore[arg-type]
        clips = {name: [p for p in params if p.requires_grad] for name, params in work.clip_groups(plain).items()}
        epoch_batches = work.steps_per_epoch()
        epoch_steps = None if epoch_batches is None else -(-epoch_batches // accumulate)
        guard, log, progress = _Guard(opt, place), _Log(run, log_every), Progress(run, length, done)
        cast: Callable[[], contextlib.AbstractContextManager[Any]] = (
            contextlib.nullcontext
            if precision == "fp32"
            else lambda: torch.autocast(place.type, torch.bfloat16 if precision == "bf16" else torch.float16)
        )

        def evaluate(step: int) -> dict[str, float]:
            progress.note("evaluating")
            started = time.perf_counter()
            with checkpoint.preserved_random_state(), torch.inference_mode(), cast():
                plain.eval()
                metrics = {k: float(v) for k, v in work.evaluate(plain).items()}
                if step == length:
                    metrics.update((k, float(v)) for k, v in work.conclude(plain).items())
                plain.train()
            _check_selected(select, metrics)  # before anything is written that a repeated evaluation would write again
            run.metrics([{"step": step, "eval": metrics}])
            run.board(step, {f"eval/{k}": v for k, v in metrics.items() if math.isfinite(v)})
            run.timing({"step": step, "evaluation_s": time.perf_counter() - started})
            progress.evaluated(step, metrics, select)
            return metrics

        def judge(step: int) -> None:
            """Evaluate a trained step and keep the best; where that fails, what was trained is not lost."""
            nonlocal last, best
            try:
                last = evaluate(step)
                if _better(last, best, select, select_mode, step == length):
                    best = {"step": step, "metrics": last}
            except Exception:
                if distributed.world() == 1:  # of several ranks one alone may have failed, and the others would wait for it
                    save(step, unevaluated=True)
                    run.log(
                        f"the evaluation after step {step} failed; the checkpoint is written, and the same command begins with it"
                    )
                raise

        def stop_if_asked(*, unevaluated: bool = False) -> None:
            if distributed.any_rank(signals.received is not None):
                log.flush()
                save(done, unevaluated=unevaluated)
                raise Stopped(signals.received or signal.SIGTERM, done)

        def save(step: int, *, unevaluated: bool = False) -> None:
            randoms = _all_random_states()
            if distributed.rank() == 0:
                state = {
                    "identity": identity, "model": plain.state_dict(), "optimizer": opt.state_dict(), "scaler": scaler.state_dict(),
                    "task": work.state(), "random": randoms, "threads": torch.get_num_threads(), "first": first, "best": best,
                    "last": last, "metrics_bytes": run.flush(), "unevaluated": unevaluated,
                }  # fmt: skip
                store.save(step, state, best=best["step"] if best["step"] >= 0 else None)
            distributed.barrier()

        with progress, _kept_until_non_finite(log):
            plain.train()
            if done == 0 and (found is None or unevaluated) and (eval_first or length == 0):
                stop_if_asked(unevaluated=True)
                first = evaluate(0)
                last = first if length == 0 else last
            elif select is not None and found is None:  # a name that no evaluation gives would cost the whole training
                stop_if_asked()
                progress.note(f"looking for {select} in an evaluation")
                with checkpoint.preserved_random_state(), torch.inference_mode(), cast():
                    plain.eval()
                    _check_selected(select, {k: float(v) for k, v in work.evaluate(plain).items()})
                    plain.train()
            elif unevaluated:
                judge(done)
                save(done)
            batches = work.batches(done * accumulate, seed) if done < length else iter(())
            while done < length:
                stop_if_asked()  # here, between steps, everything is consistent
                step = done + 1
                now = [plan(done, length, base, epoch_steps) for base in rates]
                for group, rate in zip(opt.param_groups, now):
                    group["lr"] = rate
                result = _forward_backward(work, net, batches, step, accumulate, scaler, cast, place)
                scaler.unscale_(opt) if scaler.is_enabled() else None
                norm = _clip(clips, clip_norm)
                # The scaler skips gradients that overflow in half precision; a loss that is not finite is nobody's to skip.
                guard.check(step, result.losses, torch.zeros_like(norm) if scaler.is_enabled() else norm, plain)
                scaler.step(opt) if scaler.is_enabled() else opt.step()
                scaler.update() if scaler.is_enabled() else None
                opt.zero_grad(set_to_none=True)
                log.add(step, result, norm, now)
                done = step
                if done % log_every == 0 or done == length:
                    guard.read(plain)
                    progress.advance(done, log.flush())
                due = done == length or (eval_every and done % eval_every == 0)
                if due:
                    log.flush()
                    judge(done)
                if due or (save_every and done % save_every == 0):
                    guard.read(plain)
                    log.flush()
                    save(done)
        return Outcome(done, last, best["metrics"], int(best["step"]), first)


@contextlib.contextmanager
def _kept_until_non_finite(log: _Log) -> Iterator[None]:
    """Where a step is not finite, the log of those before it is written: the curve that led there."""
    try:
        yield
    except NonFinite as error:
        if distributed.world() == 1:  # the means over ranks need every rank, and one alone may have failed
            log.flush(before=error.step)
        raise


def _forward_backward(
    work: Task,
    net: nn.Module,
    batches: Iterator[Any],
    step: int,
    accumulate: int,
    scaler: torch.amp.GradScaler,
    cast: Any,
    place: torch.device,
) -> StepResult:
    """Gradients of one step; the scalars returned are means over its micro-batches."""
    results = []
    for micro in range(accumulate):
        batch = to_device(next(batches), place)
        # Gradients travel between ranks only with the last micro-batch.
        hold = (
            net.no_sync()
            if isinstance(net, nn.parallel.DistributedDataParallel) and micro + 1 < accumulate
            else contextlib.nullcontext()
        )
        with hold:
            with cast():
                result = work.losses(net, batch, step)
            total = sum(result.losses.values()) if len(result.losses) > 1 else next(iter(result.losses.values()))
            assert isinstance(total, Tensor)
            scaled = total if accumulate == 1 else total / accumulate
            (scaler.scale(scaled) if scaler.is_enabled() else scaled).backward()
        results.append(
            StepResult({k: v.detach() for k, v in result.losses.items()}, {k: v.detach() for k, v in result.monitors.items()})
        )
    if accumulate == 1:
        return results[0]
    return StepResult(
        {k: torch.stack([r.losses[k] for r in results]).mean() for k in results[0].losses},
        {k: torch.stack([r.monitors[k].float() for r in results]).mean() for k in results[0].monitors},
    )


def _clip(groups: Mapping[str, list[nn.Parameter]], limit: float | None) -> Tensor:
    """Clip each group to `limit`; returns the norm over all groups before clipping."""
    norms = []
    for params in groups.values():
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            continue
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if limit is not None:
            # One at most, and NaN stays NaN: the guard is next.
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
        norms.append(norm)
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _length(work: Task, steps: int | None, epochs: int | None) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError(f"give exactly one of train.steps and train.epochs, got steps={steps}, epochs={epochs}")
    if steps is not None:
        length = steps
    else:
        assert epochs is not None
        per_epoch = work.steps_per_epoch()
        if per_epoch is None:
            raise ValueError(f"train.epochs is {epochs}, but this task has no epochs; set train.steps")
        length = epochs * per_epoch
    if length < 0:
        raise ValueError(f"the run must have 0 steps or more, got {length}")
    return length


def _check_selected(select: str | None, now: Mapping[str, float]) -> None:
    if select is not None and select not in now:
        raise ValueError(f"train.select is {select!r}, which the evaluation does not give; it gives {', '.join(now)}")


def _better(now: Mapping[str, float], best: Mapping[str, Any], select: str | None, mode: str, final: bool) -> bool:
    if select is None:
        return final
    _check_selected(select, now)
    if not math.isfinite(now[select]):
        return False
    if best["step"] < 0:
        return True
    gain = now[select] - best["metrics"][select]
    return gain > 0 if mode == "max" else gain < 0


def _check_identity(then: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
    if then["parameters"] != now["parameters"]:
        a, b = ({str(n): "×".join(map(str, shape)) or "scalar" for n, shape in side["parameters"]} for side in (then, now))
        changed = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        raise checkpoint.CheckpointError(
            f"{path} is of another model: {len(changed)} parameters differ, e.g. {changed[0]} "
            f"(checkpoint {a.get(changed[0], 'absent')}, model {b.get(changed[0], 'absent')}). Use another --out, or --fresh."
        )
    if then["data"] != now["data"]:
        raise checkpoint.CheckpointError(
            f"{path} was trained on data with fingerprint {then['data']}, now it is {now['data']}: files were added, removed or changed. "
            "Restore them, or use another --out, or --fresh."
        )
    for name in ("seed", "length"):
        if then[name] != now[name]:
            raise checkpoint.CheckpointError(
                f"{path} belongs to a run with {name} {then[name]}, this one has {now[name]}. Use another --out, or --fresh."
            )


def _all_random_states() -> list[Any]:
    mine = checkpoint.random_state()
    if distributed.world() == 1:
        return [mine]
    states: list[Any] = [None] * distributed.world()
    torch.distributed.all_gather_object(states, mine)
    return states


def _restore_random(states: list[Any], seed: int, step: int, run: RunFolder) -> None:
    if len(states) == distributed.world():
        checkpoint.restore_random_state(states[distributed.rank()])
        return
    run.log(
        f"WARNING: the checkpoint was made by {len(states)} processes, now {distributed.world()}: random streams are seeded anew, results will differ in noise"
    )
    seed_everything(seed + 1_000_003 * (step + 1) + distributed.rank())


def initial_weights(source: str) -> dict[str, Tensor]:
    """Model weights of a run folder (its best checkpoint), of one checkpoint, or of a weight file.

    Raises:
        checkpoint.CheckpointError: if there are none.
    """
    from pathlib import Path

    from core.record import read_json

    path = Path(source)
    if path.is_dir():
        folder = checkpoint.Store(path / "checkpoints")
        best = read_json(path / "result.json").get("best_step")
        found = (best, checkpoint.load(folder.path(best))) if best in folder.steps() else folder.newest()
        if found is None:
            raise checkpoint.CheckpointError(f"{source} holds no checkpoint")
        weights: dict[str, Tensor] = found[1]["model"]
        return weights
    if path.suffix == ".safetensors":
        try:
            return checkpoint.load(path)["model"]  # type: ignore[no-any-return]
        except checkpoint.CheckpointError as error:
            if "not a checkpoint of this project" not in str(error):
                raise
    return checkpoint.read_weights(path)
