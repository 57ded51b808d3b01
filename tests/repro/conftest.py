"""The main job at a tiny size, run through the real command line in child processes that do not import torch again."""

from pathlib import Path

import children
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


@pytest.fixture
def command(tmp_path):
    """Run `repro WORDS` in a child process; `before` is called there first. Returns status (negative: a signal), out, err."""
    count = 0

    def run(*words, before=None, folder=None):
        nonlocal count
        count += 1
        out, err = tmp_path / f"{count}.out", tmp_path / f"{count}.err"

        def child():
            if before is not None:
                before()
            from repro import cli

            return cli.main(list(words))

        status = children.run(child, folder=folder, out=out, err=err)
        return Done(status, out.read_text(), err.read_text())

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
