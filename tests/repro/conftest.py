"""The main job at a tiny size, run through the real command line in child processes that do not import torch again."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import cloudpickle
import pytest

TINY = (
    "STEPS=6", "trainer.train.threads=1", "trainer.train.log_every=2", "trainer.train.eval_first=False", "sdtps.PKPlan.identities=3",
    "sdtps.PKPlan.instances=2", "sdtps.CLIPVisionTransformer.width=16", "sdtps.CLIPVisionTransformer.layers=1", "sdtps.CLIPVisionTransformer.heads=2",
)  # fmt: skip


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A tiny sample in RGBNT201's layout, made by the registered maker."""
    from plugins.sdtps.rgbnt_sample import rgbnt_sample

    root = tmp_path_factory.mktemp("data") / "RGBNT201"
    rgbnt_sample(
        str(root),
        train_identities=6,
        train_cameras=2,
        train_images=2,
        test_identities=4,
        test_images=2,
        sharing=1,
        height=64,
        width=32,
    )
    return root


class Done:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


# Children are forked from a server that has imported everything and computed nothing: a process that has already used
# OpenMP's threads, as this one may have, leaves a child waiting for them for ever.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("torch", "torch.utils.tensorboard", "rich.table", "PIL.Image", "einops", "jaxtyping", "scipy.ndimage"),
        *("core.trainer", "core.profile", "repro.run", "repro.show", "repro.cli"),
    ]
)


def _child(words, before, folder, environment, out, err):
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    status = 99
    try:
        cloudpickle.loads(before)()
        from repro import cli

        status = cli.main(words)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture
def command(tmp_path):
    """Run `repro WORDS` in a child process; `before` is called there first. Returns status (negative: a signal), out, err."""
    count = 0

    def run(*words, before=None, folder=None):
        nonlocal count
        count += 1
        out, err = tmp_path / f"{count}.out", tmp_path / f"{count}.err"
        given = cloudpickle.dumps(before or (lambda: None))
        child = _server.Process(target=_child, args=(list(words), given, folder or os.getcwd(), dict(os.environ), out, err))
        child.start()
        child.join()
        return Done(child.exitcode, out.read_text(), err.read_text())

    return run


@pytest.fixture
def main_job(command, sample, tmp_path):
    """Run the main job at the tiny size into `tmp_path / name`."""

    def run(name, *extra, before=None, gin="gin/sdtps_rgbnt.gin", settings=(), root=sample):
        chosen = {s.partition("=")[0]: s for s in (*TINY, f"ROOT={root}", *settings)}
        words = [w for s in chosen.values() for w in ("--set", s)]
        top = Path(__file__).parents[2]
        return command(
            "run", "--gin", gin, *words, "--out", str(tmp_path / name), "--no-profile", *extra, before=before, folder=top
        )

    return run
