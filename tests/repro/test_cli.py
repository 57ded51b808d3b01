"""The command line: every mistake is one line on standard error and a non-zero status, never a traceback."""

import json
import os
import subprocess
import sys

import pytest

from repro import cli


def repro(*words, **options):
    return subprocess.run([sys.executable, "-m", "repro", *words], capture_output=True, text=True, check=False, **options)


def failed(capsys, *words):
    """Run a verb in this process; it must fail with messages only."""
    status = cli.main(list(words))
    said = capsys.readouterr()
    assert status != 0, said.out
    assert "Traceback" not in said.err
    assert said.err.startswith("error: ")
    return status, said.err


def test_help_lists_every_installed_verb(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    for name in cli.available():
        assert f"\n  {name} " in said


@pytest.mark.parametrize("verb", sorted(cli.available()))
def test_every_verb_has_help_and_its_own_module(verb, capsys):
    parser = cli.parser_of(verb)
    assert parser.description
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    assert "usage: repro" in capsys.readouterr().out


def test_python_m_and_the_console_script_are_the_same():
    assert (
        repro("--help").stdout
        == subprocess.run(
            [sys.executable, "-c", "from repro.cli import main; main(['--help'])"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert repro("--version").stdout.strip() == "0.1.0"


def test_an_unknown_verb_names_the_nearest(capsys):
    status, said = failed(capsys, "rnu")
    assert status == 2
    assert "run" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--gin", "gin/sdtps_rgbn.gin"), "nearest: gin/sdtps_rgbnt.gin"),
        (("run", "--gin", "nothing:a.gin"), "no plugin 'nothing'"),
        (("run", "--gin", "gin/sdtps_rgbnt.gin", "--set", "STEPZ=3"), "did you mean STEPS"),
        (("run", "--gin", "gin/sdtps_rgbnt.gin", "--set", "train.steps='many'"), "must be int | None"),
        (("config", "gin/sdtps_rgbnt.gin", "--set", "sdtps.TokenSparse.sparse_ration=0.5"), "nearest: sparse_ratio"),
        (("config", "gin/sdtps_rgbnt.gin", "--why", "STEP"), "STEPS"),
        (("config", "diff", "one"), "two run folders"),
        (("config", "diff", "a", "b"), "no gin file 'a'"),
        (("verify", "sdtp"), "sdtps"),
        (("verify", "--golden", "/nowhere"), "does not exist"),
        (
            ("verify", "sdtps", "--id", "SDTPS-11", "--id", "SDTPS-99"),
            "--id SDTPS-99: no claim of sdtps has this id; nearest: SDTPS-9",
        ),
        (("verify", "--golden", "tests/golden", "--id", "SDTPS-99"), "--id SDTPS-99: no claim of sam"),
        (("data", "make", "rgbnt-sampel", "--root", "x"), "rgbnt-sample"),
        (("data", "make", "rgbnt-sample"), "--root DIR"),
        (("data", "make", "rgbnt-sample", "--root", "x", "--set", "sead=1"), "nearest: seed"),
        (("data", "make", "rgbnt-sample", "--root", "x", "--set", "seed=one"), "must be int"),
        (("data", "make", "rgbnt-sample", "--root", "x", "--set", "root=y"), "has no option 'root'; it has seed"),
        (
            ("data", "make", "rgbnt-sample", "--root", "x", "--set", "seed=1", "--set", "seed=2"),
            "--set seed is given twice, as 1 and as 2",
        ),
        (("data", "check", "rgbnt201", "--root", "/nowhere"), "/nowhere"),
    ],
)
def test_each_mistake_is_one_clear_line(capsys, words, said):
    if words[0] == "data" and words[1] == "check":
        assert cli.main(list(words)) != 0
        seen = capsys.readouterr()
        assert said in seen.out + seen.err
        return
    _, heard = failed(capsys, *words)
    assert said in heard


def test_golden_verification_fails_on_a_case_nobody_claims_and_on_a_wrong_number(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    save_file(
        {"in/x": torch.zeros(1), "out/y": torch.zeros(1)},
        tmp_path / "a.safetensors",
        {"meta": json.dumps({"module": "NobodysModule"})},
    )
    assert cli.main(["verify", "--golden", str(tmp_path)]) == 1
    assert "no plugin claims module 'NobodysModule'" in capsys.readouterr().out
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    assert cli.main(["verify", "--golden", str(tmp_path)]) == 1
    assert "not a readable safetensors file" in capsys.readouterr().out


def test_list_as_json_says_where_everything_is_from(capsys):
    assert cli.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {c["name"] for c in found["components"]}
    assert {"trainer.train", "optim.AdamW", "schedules.Cosine", "sdtps.RGBNT201"} <= names
    assert {p["name"] for p in found["plugins"]} >= {"sam", "sam3_fusion", "sap", "sdtps"}


def test_what_a_component_refuses_is_said_without_gins_own_lines(main_job, tmp_path):
    from core import record

    asked = ("sdtps.TokenSparse.sparse_ratio=1.5",)
    done = main_job("a", "--quiet", settings=asked)
    assert done.status == 2
    assert done.err == "error: sparse_ratio must be in (0, 1], got 1.5\n"
    assert record.status(tmp_path / "a").message == "ValueError: sparse_ratio must be in (0, 1], got 1.5"
    with_all = main_job("a", "--fresh", "--quiet", before=lambda: os.environ.update(REPRO_TRACEBACK="1"), settings=asked)
    assert "In call to configurable 'TokenSparse'" in with_all.err
    assert "Traceback" in with_all.err


def test_a_reader_that_goes_away_is_no_traceback(command, unread):
    pytest.importorskip("shtab")
    for words in ("completion", "bash"), ("help",), ("list",):
        done = command(*words, before=unread)
        assert (done.status, done.err) == (1, "")
