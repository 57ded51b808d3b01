"""The main job at a tiny size, run through the real command line in child processes that do not import torch again."""

from pathlib import Path

import children
import pytest
import tiny_job

TINY = ("STEPS=6", "trainer.train.log_every=2", *tiny_job.OVERRIDES)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    return tiny_job.sample(tmp_path_factory.mktemp("data") / "RGBNT201")


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
def unread():
    """For `before` of a command: its standard output is a pipe that nobody reads any more."""

    def close():
        import os

        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    return close


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
