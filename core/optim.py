"""Optimisers, and parameter groups by rule.

Rules are written by a task (`Task.parameter_rules`) as (regular expression on the parameter's name, settings); the first
rule that matches (anywhere in the name) decides. Settings: `lr` (absolute), `lr_scale` (times the optimiser's), `weight_decay`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from core.registry import register

Groups = list[dict[str, Any]]
_SETTINGS = ("lr", "lr_scale", "weight_decay")


def parameter_groups(model: nn.Module, rules: Sequence[tuple[str, Mapping[str, float]]] = ()) -> Groups:
    """Trainable parameters in groups, one a rule that matched and one for the rest; each carries `name` and `names`.

    Raises:
        ValueError: for a rule that decides for no trainable parameter, an unknown setting, both `lr` and `lr_scale`, or a
            model with nothing to train.
    """
    found: dict[int, list[tuple[str, nn.Parameter]]] = {}
    matched: list[str | None] = [None] * len(rules)
    for position, (pattern, settings) in enumerate(rules):
        unknown = set(settings) - set(_SETTINGS)
        if unknown:
            raise ValueError(
                f"rule {position} ({pattern!r}): unknown setting {sorted(unknown)[0]!r}; known: {', '.join(_SETTINGS)}"
            )
        if "lr" in settings and "lr_scale" in settings:
            raise ValueError(f"rule {position} ({pattern!r}) sets both lr and lr_scale; choose one")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hits = [i for i, (pattern, _) in enumerate(rules) if re.search(pattern, name)]
        for i in hits:
            matched[i] = name
        found.setdefault(hits[0] if hits else len(rules), []).append((name, parameter))
    for position, example in enumerate(matched):
        pattern = rules[position][0]
        if example is None:
            raise ValueError(f"parameter rule {pattern!r} matches no trainable parameter; remove it or mend the expression")
        if position not in found:
            raise ValueError(
                f"parameter rule {pattern!r} decides nothing: all it matches ({example}, …) is taken by an earlier rule"
            )
    if not found:
        raise ValueError("the model has no trainable parameter")
    groups: Groups = []
    for position in sorted(found):
        pattern, settings = rules[position] if position < len(rules) else ("rest", dict[str, float]())
        groups.append({
            "params": [p for _, p in found[position]], "name": pattern, "names": [n for n, _ in found[position]], **settings,
        })  # fmt: skip
    return groups


def _resolve(params: Iterable[Any], lr: float, decay_vectors: bool) -> tuple[Groups, bool]:
    """Groups with absolute rates, and whether the fused kernels can be used (all parameters on one device type that has them).

    Without `decay_vectors`, a group that sets no weight decay of its own leaves its parameters of fewer than two
    dimensions (norms, biases, scales) to a further group without decay, named `<name>, no decay`.
    """
    groups: Groups = []
    for entry in params:
        group: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"params": [entry]}
        if "lr_scale" in group:
            group["lr"] = lr * group.pop("lr_scale")
        if decay_vectors or "weight_decay" in group:
            groups.append(group)
            continue
        names = group.get("names", [None] * len(group["params"]))
        for vectors in (False, True):
            chosen = [(p, n) for p, n in zip(group["params"], names) if (p.ndim < 2) == vectors]
            if chosen:
                part = {**group, "params": [p for p, _ in chosen]}
                if "names" in group:
                    part["names"] = [n for _, n in chosen]
                if vectors:
                    part |= (
                        {"weight_decay": 0.0, "name": f"{group['name']}, no decay"} if "name" in group else {"weight_decay": 0.0}
                    )
                groups.append(part)
    kinds = {p.device.type for g in groups for p in g["params"]}
    return groups, kinds <= {"cpu"} or kinds <= {"cuda"}


def _positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not value >= 0:
            raise ValueError(f"optim.{name}.{key} must be 0 or more, got {value}")


@register("optimizer", paper="Kingma and Ba 2015", denylist=["params"])
def Adam(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_vectors: bool = True,
) -> torch.optim.Optimizer:
    """Adam with L2 regularisation coupled into the gradient.

    Args:
        params: parameters, or groups of them (`parameter_groups`).
        lr: rate of groups that set none.
        betas, eps: of the moments.
        weight_decay: L2 factor of groups that set none.
        decay_vectors: False leaves norms, biases and scales (fewer than two dimensions) without weight decay, unless a rule
            sets theirs.
    """
    _positive("Adam", lr=lr, eps=eps, weight_decay=weight_decay)
    groups, fused = _resolve(params, lr, decay_vectors)
    return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)


@register("optimizer", paper="Loshchilov and Hutter 2019", denylist=["params"])
def AdamW(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay_vectors: bool = True,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay. Arguments as for `Adam`."""
    _positive("AdamW", lr=lr, eps=eps, weight_decay=weight_decay)
    groups, fused = _resolve(params, lr, decay_vectors)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused)


@register("optimizer", denylist=["params"])
def SGD(
    params: Iterable[Any],
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    decay_vectors: bool = True,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum and coupled L2. Other arguments as for `Adam`.

    Args:
        momentum: share of the last update that the next one keeps.
        nesterov: take the gradient where the momentum leads; needs a momentum above 0.
    """
    _positive("SGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0:
        raise ValueError("optim.SGD.nesterov needs a momentum above 0")
    groups, fused = _resolve(params, lr, decay_vectors)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused)
    if momentum:
        # The fused kernel makes its buffers with `empty_like` and leaves them unwritten where a flag stops the first step:
        # the second then adds whatever lay in memory. From zero the first step is the same, momentum * 0 + g = g.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
