"""`repro new` writes a package that works before the first edit: generated, installed, tested, checked and run here."""

import json
import re

import pytest

from repro import cli, new

pytest_plugins = ["installed"]

NAME = "anchor_nets"  # another length and another place in the alphabet than the template's own


@pytest.fixture(scope="module")
def package(tmp_path_factory, fresh):
    """A generated package, made and installed by the wheel's own command line."""
    folder = tmp_path_factory.mktemp("papers")
    made = fresh.repro("new", NAME, "--into", folder, cwd=folder)
    assert made.returncode == 0, made.stderr
    assert f"--gin {NAME}:base.gin" in made.stdout
    fresh.install(folder / NAME)
    return folder / NAME


def test_nothing_of_the_placeholder_is_left_and_every_file_is_there(package):
    expected = {
        new.renamed(str(p.relative_to(new.TEMPLATE)), NAME)
        for p in new.TEMPLATE.rglob("*")
        if p.suffix in (".py", ".gin", ".md", ".toml", ".safetensors") and ".mypy_cache" not in p.parts
    }
    found = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and not {"build", "__pycache__"} & set(p.parts)}
    assert expected <= found
    assert "tests/golden/attention_pool.safetensors" in expected
    for path in sorted(found):
        content = (package / path).read_bytes().lower()
        assert b"my_paper" not in content, path
        assert b"my-paper" not in content, path


def test_its_own_tests_pass(package, fresh):
    done = fresh.python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 11
    assert not re.search(r"failed|skipped|error", done.stdout.splitlines()[-1])


def test_its_lint_and_types_pass_and_would_fail(package, fresh, tmp_path):
    for words in (
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--check", "--no-cache", "."),
        ("mypy", "--cache-dir", str(tmp_path)),
    ):
        done = fresh.python("-m", *words, cwd=package)
        assert done.returncode == 0, (words, done.stdout + done.stderr)
    assert "no issues found in 7 source files" in done.stdout
    path = package / NAME / "marked_tokens.py"
    right = path.read_text()
    try:
        path.write_text(right.replace("-> dict[str, float]:", "-> str:"))
        done = fresh.python("-m", "mypy", "--cache-dir", str(tmp_path), cwd=package)
    finally:
        path.write_text(right)
    assert 'incompatible with return type "dict[str, float]" in supertype "core.task.Task"' in done.stdout


def test_it_runs_by_name_from_anywhere_and_gives_the_number_in_its_readme(package, fresh, tmp_path):
    done = fresh.python("-m", "repro.run", "--gin", f"{NAME}:base.gin", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GENERATED SAMPLE" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    stated = re.search(r"\| accuracy \| (0\.\d+) \| (0\.\d+) \|", (package / "README.md").read_text())
    assert [result["first"]["accuracy"], result["metrics"]["accuracy"]] == pytest.approx(
        [float(x) for x in stated.groups()], abs=0.01
    )
    assert result["metrics"]["accuracy"] > result["first"]["accuracy"] + 0.5
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["plugins"][NAME]["distribution"] == NAME.replace("_", "-")
    assert info["plugins"][NAME]["version"] == "0.1.0"
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert profile["model"]["macs"] == 2 * 16 * 16 + 16 * 4


def test_it_is_listed_and_verified_like_any_other(package, fresh, tmp_path):
    listed = fresh.repro("list", "--plugin", NAME, cwd=tmp_path)
    assert re.search(rf"{NAME}\.AttentionPool +module +anchor-nets 0\.1\.0 +\S+attention_pool\.py:\d+ +authors", listed.stdout)
    verified = fresh.repro("verify", NAME, "--golden", package / "tests/golden", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "1 of 1 golden cases agree" in verified.stdout
    assert "ANCHOR_NETS-1  [HOLDS]" in verified.stdout


def test_its_wheel_carries_the_gin_file(package, fresh):
    assert (fresh.packages / NAME / "gin" / "base.gin").is_file()
    again = fresh.repro("new", NAME, "--into", package.parent.parent, cwd=package)
    assert again.returncode == 2
    assert f"a plugin '{NAME}' is installed already, by anchor-nets 0.1.0" in again.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my-paper", "try my_paper"),
        ("MyPaper", "try my_paper"),
        ("2d_paper", "try paper_2d_paper"),
        ("paper_", "try paper"),
        ("a b", "try a_b"),
        ("übung", "try bung"),
        ("../paper", "try paper"),
        ("", "must be lower-case letters"),
        ("lambda", "is a word of the language; try lambda_paper"),
        ("torch", "a Python module called 'torch'"),
        ("gin", "a Python module called 'gin'"),
        ("golden", "a Python module called 'golden'"),
        ("a" * 41, "has 41 characters; choose one of at most 40"),
        ("tests", "a Python module called 'tests'"),
        ("sdtps", "a plugin 'sdtps' is installed already, by ginrepro"),
        ("there_already", "exists already"),
    ],
)
def test_a_bad_name_is_one_clear_error_and_leaves_nothing(tmp_path, capsys, name, said):
    (tmp_path / "there_already").mkdir()
    assert cli.main(["new", name, "--into", str(tmp_path)]) == 2
    heard = capsys.readouterr()
    (line,) = heard.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert [p.name for p in tmp_path.iterdir()] == ["there_already"]
    assert not list((tmp_path / "there_already").iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["new", "some_paper", "--into", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_broken_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(new, "_golden", full)
    with pytest.raises(OSError, match="No space"):
        new.write("some_paper", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_stored_case_is_what_the_loops_give(tmp_path):
    """The template's golden case can be made again from `by_hand.py` alone, bit by bit up to rounding."""
    import runpy
    import shutil

    from safetensors.torch import load_file

    shutil.copy(new.TEMPLATE / "tests" / "by_hand.py", tmp_path)
    runpy.run_path(str(tmp_path / "by_hand.py"), run_name="__main__")
    made, stored = (load_file(p / "golden" / "attention_pool.safetensors") for p in (tmp_path, new.TEMPLATE / "tests"))
    assert made.keys() == stored.keys()
    for key, value in made.items():
        assert value.shape == stored[key].shape
        assert float((value - stored[key]).abs().max()) < 1e-6, key
