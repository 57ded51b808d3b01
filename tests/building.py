"""A config carried as far as its model, and no step further."""

from pathlib import Path

import pytest

from core import config as configs
from core import record


class Built(Exception):
    """Raised once task and model are there."""


def build(config: configs.Config, folder: Path) -> dict:
    """`task` and `model` of a config, and `unused`: its bindings that took no effect."""
    configs.apply(config)
    found = {}

    def on_built(task, model):
        found.update(task=task, model=model, unused=configs.unused(config))
        raise Built

    with record.RunFolder(folder, chatty=False) as run, pytest.raises(Built):
        configs.configured(configs.TRAIN)(run, on_built)
    return found
