"""What a job asks of a cluster: a file of keys (slurm/profiles/NAME.gin, or one of your own), and changes on top.

PARTITION = 'gpu'       None is the cluster's default          TIME = '24:00:00'     or minutes
CPUS = 8                a task                                 MEMORY_GB = 64.0      a node; None is the default
GPUS = 1                a node                                 NODES, TASKS          tasks a node; several are ranks of one run
PARALLEL = 16           runs at the same time                  REQUEUES = 20         a run, for whatever reason
SIGNAL_S = 120          seconds before the end to stop a run with a checkpoint
QOS, ACCOUNT, CONSTRAINT, NODELIST, EXCLUDE                    as sbatch has them
SETUP = ['module load cuda']                                   shell lines before the run
EXTRA = {'gres': 'shard:4'}                                    any other option of sbatch
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import config as configs
from core import registry

FOLDER = Path(__file__).parent / "profiles"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one run asks for; see the module's text."""

    partition: str | None = None
    time: int | str = 60
    cpus: int = 1
    memory_gb: float | None = None
    gpus: int = 0
    nodes: int = 1
    tasks: int = 1
    parallel: int = 16
    requeues: int = 20
    signal_s: int = 120
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    setup: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("cpus", 1),
            ("nodes", 1),
            ("tasks", 1),
            ("parallel", 1),
            ("gpus", 0),
            ("requeues", 0),
            ("signal_s", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name.upper()} must be at least {least}, got {getattr(self, name)}")
        if self.signal_s >= self.minutes * 60:
            raise ValueError(
                f"SIGNAL_S ({self.signal_s} s) must be less than TIME ({self.minutes} min): it is the time before the end"
            )

    @property
    def minutes(self) -> int:
        """The time limit in whole minutes, which is what SLURM counts in."""
        if isinstance(self.time, int):
            if self.time < 1:
                raise ValueError(f"TIME must be at least a minute, got {self.time}")
            return self.time
        found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", self.time)
        if found is None:
            raise ValueError(f"TIME must be minutes, 'HH:MM:SS' or 'D-HH:MM:SS', got {self.time!r}")
        days, first, second, third = found.groups()
        if days is None and third is None:
            raise ValueError(f"TIME = {self.time!r}: write hours too ('0:{self.time}' or '{self.time}:00')")
        seconds = int(days or 0) * 86400 + int(first) * 3600 + int(second) * 60 + int(third or 0)
        return max(1, -(-seconds // 60))


def _annotations() -> dict[str, str]:
    return {field.name.upper(): str(field.type) for field in dataclasses.fields(Profile)}


def names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.gin"))


def read(name: str | None, changes: Sequence[str] = ()) -> Profile:
    """A profile by name or path, with `KEY=VALUE` changes on top; without a name the defaults.

    Raises:
        ValueError: if there is no such profile, or for a key or value in it or in the changes that is wrong.
    """
    found: dict[str, Any] = {}
    if name is not None:
        path = Path(name)
        if not path.is_file():
            path = FOLDER / f"{name}.gin"
        if not path.is_file():
            near = registry.nearest(name, names()) or names()
            raise ValueError(f"no cluster profile {name!r}; there are: {', '.join(near)}, or give a file")
        found = configs.read_keys(path, _annotations())
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--slurm {change}: want KEY=VALUE, e.g. --slurm time=60")
        found.update(
            configs.parse_keys(f"{key.strip().upper()} = {configs.quoted(value.strip())}", f"--slurm {change}", _annotations())
        )
    return Profile(**{key.lower(): value for key, value in found.items()})
