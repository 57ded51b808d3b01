"""The run that README.md describes gives its number; the claims hold; nothing in the gin file is without effect."""

import json
import re
import subprocess
import sys
from pathlib import Path

from core import claims

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_run_gives_the_number_in_the_readme(tmp_path):
    command = [sys.executable, "-m", "repro.run", "--gin", "my_paper:base.gin", "--out", str(tmp_path / "run"), "--quiet"]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    stated = re.search(r"\| accuracy \| (0\.\d+) \| (0\.\d+) \|", README)
    assert stated, "README.md has no row of accuracies"
    untrained, trained = map(float, stated.groups())
    assert abs(result["first"]["accuracy"] - untrained) <= 0.01
    assert abs(result["metrics"]["accuracy"] - trained) <= 0.01


def test_claims_are_as_entered():
    entered = claims.of("my_paper")
    assert entered
    for one in entered:
        checked = claims.run(one)
        assert checked.as_expected, (one.id, checked.verdict, checked.error)
