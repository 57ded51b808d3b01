"""docs/results.md is what the stored ledger says, the stored ledger is of the claims as they stand, and the READMEs quote it."""

import copy
import json
from pathlib import Path

import make_results
import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def ledger():
    return json.loads((DOCS / "results.json").read_text(encoding="utf-8"))


def test_page_and_quotes_are_up_to_date(capsys):
    assert make_results.main(["--check"]) == 0, capsys.readouterr().err


def test_nothing_in_the_stored_ledger_was_a_surprise_or_a_failure(ledger):
    assert all(case["passed"] for case in ledger["golden"])
    assert len(ledger["golden"]) == len(list((DOCS.parent / "tests" / "golden").glob("*.safetensors")))
    assert not [row["id"] for row in ledger["rows"] if row["standing"] == "check failed" or row["note"].startswith("CHANGED")]
    assert not ledger["problems"]


def test_the_stored_ledger_names_its_source_as_the_documented_command_does(ledger):
    assert {run for row in ledger["rows"] for run in row["runs"]} <= {"verify.json"}, (
        "run the three commands of the page as they stand"
    )


def test_a_number_of_the_page_is_a_number_of_the_ledger(ledger):
    page = make_results.page(ledger)
    for row in ledger["rows"]:
        if row["kind"] == "published":
            assert f"{row['expected']} | {row['found'] or '–'} | {row['standing']} |" in page
        elif row["standing"] in ("refuted", "depends"):
            assert row["found"].replace("|", "\\|") in page
    assert "`ROOT`, `TAGS`, `PRETRAINED`, `CLIP_WEIGHTS`, `CLIP_VOCABULARY`" in page
    assert f"{len(ledger['golden'])} of {len(ledger['golden'])} golden cases agree" in page


def test_the_head_counts_every_row_once(ledger):
    lines = make_results.head(ledger).splitlines()[2:]
    assert sum(int(cell) for line in lines for cell in line.strip("| ").split(" | ")[1:]) == len(ledger["rows"])


def test_a_claim_that_changed_or_is_new_makes_the_ledger_stale(ledger):
    assert make_results.behind(ledger) == []
    other = copy.deepcopy(ledger)
    other["rows"][0]["statement"] += "!"
    gone = other["rows"].pop()
    assert len(make_results.behind(other)) == 2
    assert any(gone["id"] in name for name in make_results.behind(other))


def test_a_quote_is_filled_between_its_markers_and_nowhere_else(ledger):
    text = "a\n<!-- ledger -->\nold\n<!-- end ledger -->\nz"
    made = make_results.quoted(text, ledger)
    assert made == f"a\n<!-- ledger -->\n{make_results.head(ledger)}\n<!-- end ledger -->\nz"
    assert make_results.quoted("no marker", ledger) == "no marker"


def test_a_golden_case_that_could_not_be_read_counts_and_has_no_difference():
    read = {"case": "a", "module": "M", "passed": True, "worst_output": 2e-7, "worst_gradient": 3e-6}
    unread = {"case": "b", "module": None, "passed": False, "worst_output": None, "worst_gradient": None, "error": "cut"}
    said = make_results.golden([read, unread])
    assert said.startswith("1 of 2 golden cases agree")
    assert "over the 1 with finite differences the largest difference of an output is 2.0e-07, of a gradient 3.0e-06" in said
    assert make_results.golden([unread]).startswith("0 of 1 golden cases agree")
