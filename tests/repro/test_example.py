"""`examples/token_merging`: a third party swaps a component of a reproduction without touching it."""

import json
import re

import pytest

pytest_plugins = ["installed"]

SMALL = (
    "STEPS=2", "EVAL_EVERY=0", "trainer.train.threads=1", "trainer.train.eval_first=False", "sdtps.PKPlan.identities=3", "sdtps.PKPlan.instances=2",
    "sdtps.CLIPVisionTransformer.width=16", "LAYERS=2", "sdtps.CLIPVisionTransformer.heads=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def example(fresh, tmp_path_factory):
    """The example as a user has it: a copy of its folder, installed beside this project's wheel."""
    import shutil

    from installed import CHECKOUT

    folder = tmp_path_factory.mktemp("example") / "token_merging"
    shutil.copytree(
        CHECKOUT / "examples" / "token_merging", folder, ignore=shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info")
    )
    fresh.install(folder)
    return folder


@pytest.fixture(scope="module")
def run(fresh, example, sample, tmp_path_factory):
    """Run one of its gin files at a tiny size on the tiny sample; returns the run folder."""

    def go(gin, *settings):
        out = tmp_path_factory.mktemp("run") / "run"
        words = [w for s in (*SMALL, f"ROOT={sample}", *settings) for w in ("--set", s)]
        done = fresh.repro("run", "--gin", gin, *words, "--out", out, cwd=out.parent)
        assert done.returncode == 0, done.stderr
        return out

    return go


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_its_own_tests_and_lint_pass(example, fresh):
    done = fresh.python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25
    for words in (("check",), ("format", "--check")):
        assert fresh.python("-m", "ruff", *words, "--no-cache", ".", cwd=example).returncode == 0


def test_it_stands_after_the_tower_in_the_place_of_sdtps(run):
    folder = run("token_merging:rgbnt.gin")
    result, profile, info = (read(folder / f"{name}.json") for name in ("result", "profile", "run"))
    assert 0 <= result["metrics"]["branch/mAP[camera]"] <= 1
    (tokens,) = [t for t in result["tables"] if t["title"] == "tokens of a modality"]
    assert [row[:2] for row in tokens["rows"]] == [
        ["patches", 128],
        ["round 1", 102],
        ["round 2", 76],
        ["round 3", 51],
        ["round 4", 26],
    ]
    modules = {m["name"]: m for m in profile["model"]["modules"]}
    assert modules["tokens"]["type"] == "TokenMerging"
    assert modules["tokens"]["parameters"] == 0
    assert modules["tokens"]["macs"] == 3 * 512 * (64 * 64 + 51 * 51 + 38 * 38 + 26 * 25)
    assert info["plugins"]["token_merging"]["distribution"] == "ginrepro-token-merging"
    assert (folder / "pictures" / "tokens.png").is_file()
    assert "token_merging.TokenMerging.rounds = 4" in (folder / "operative.gin").read_text()


def test_it_stands_inside_the_tower_and_saves_compute_there(run):
    folder = run("token_merging:pruned.gin", "KEEP=0.25")
    profile = read(folder / "profile.json")
    blocks = {name: {m["name"]: m["macs"] for m in profile[name]["modules"]} for name in ("model", "unpruned")}
    first, second = (blocks["model"][f"backbone.blocks.{i}"] for i in (0, 1))
    assert first == blocks["unpruned"]["backbone.blocks.0"]
    width, before, after = 16, 129, 33  # the class token is not merged

    def block(tokens):
        return 3 * (12 * tokens * width**2 + 2 * tokens**2 * width)

    assert (first, second) == (block(before), block(after))


def test_it_is_listed_and_verified_like_ours(example, fresh, tmp_path):
    listed = fresh.repro("list", "--plugin", "token_merging", cwd=tmp_path)
    assert re.search(
        r"token_merging\.TokenMerging +module +ginrepro-token-merging 0\.1\.0 +\S+multimodal\.py:\d+ +Bolya", listed.stdout
    )
    verified = fresh.repro("verify", "token_merging", "--json", tmp_path / "v.json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert [r["verdict"] for r in read(tmp_path / "v.json")["claims"]] == ["holds", "holds", "holds", "cannot be tested here"]
