"""Checks of constructor options, worded alike everywhere: what is wrong, the rule, and the next move."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args


def require_choice(name: str, value: str, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's choices."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


def require_fraction(name: str, value: float) -> None:
    """ValueError unless `value` is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def require_idle(cls: type, values: Mapping[str, Any], why: str) -> None:
    """ValueError if one of `values` (by constructor parameter name) differs from its default, because `why` it is unused."""
    parameters = inspect.signature(cls).parameters
    changed = [f"{name} = {value!r}" for name, value in values.items() if value != parameters[name].default]
    if changed:
        raise ValueError(f"{cls.__name__}: {', '.join(changed)} would have no effect, because {why}; leave it out or change that")
