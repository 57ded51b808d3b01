"""docs/commands.md is what the parsers say, for every verb and every option."""

from pathlib import Path

import make_commands
import pytest

from repro import cli

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date():
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == make_commands.page(), "stale: run python docs/make_commands.py"


@pytest.mark.parametrize("verb", sorted(cli.available()))
def test_every_option_of_every_verb_is_on_it(verb):
    section = make_commands.page().split(f"\n## {verb}\n")[1].split("\n## ")[0]
    for action in cli.parser_of(verb)._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert f"{option} " in section or f"{option}`" in section
        if not action.option_strings:
            assert (action.metavar or action.dest) in section or "|".join(action.choices).replace("|", "\\|") in section


def test_a_stale_page_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_commands, "PAGE", tmp_path / "commands.md")
    assert make_commands.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert make_commands.main([]) == 0
    assert make_commands.main(["--check"]) == 0
    page = (tmp_path / "commands.md").read_text()
    (tmp_path / "commands.md").write_text(page.replace("--gin FILE", "--gen FILE"))
    assert make_commands.main(["--check"]) == 1
