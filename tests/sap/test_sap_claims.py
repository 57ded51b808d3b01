"""The ledger gives the verdicts that it states, and another one as soon as a fact behind it is broken."""

import re
from pathlib import Path

import pytest

from core import claims
from core import config as configs
from plugins.sap import claims as checks

ROOT = Path(__file__).parents[2]


def test_the_ledger_gives_the_verdicts_that_it_states():
    rows = claims.of("sap")
    assert {f"SAP-{n}" for n in range(1, 13)} | {f"S{n}" for n in range(1, 10)} | {"FINDING-1", "FACT-1"} <= {c.id for c in rows}
    wrong = [(c.claim.id, c.verdict, c.error) for c in map(claims.run, rows) if not c.as_expected]
    assert wrong == []


@pytest.fixture
def module(monkeypatch):
    """Set options of every purification module that a check builds; what was measured before is forgotten."""
    original = checks._module
    checks._over_noise.cache_clear()

    def alter(**options):
        monkeypatch.setattr(checks, "_module", lambda seed=0, **given: original(seed, **{**given, **options}))

    yield alter
    checks._over_noise.cache_clear()


def outcome(id):
    checked = claims.run(next(c for c in claims.of("sap") if c.id == id))
    assert checked.verdict is not None, checked.error
    return checked.verdict.outcome


def test_attention_that_is_flat_on_noise_is_not_selective(module):
    module(scale_mode="fixed_sqrt")
    assert outcome("SAP-5") == "does not hold"


def test_attention_that_is_selective_on_features_too_is_selective(module, monkeypatch):
    domain, semantic, labels = checks._episode()
    monkeypatch.setattr(checks, "_untrained", lambda: (domain, semantic, labels))
    assert outcome("SAP-5") == "holds"


@pytest.mark.parametrize("id", ["SAP-10", "S9"])
def test_what_training_shows_follows_the_figures_of_the_study(id, monkeypatch):
    assert outcome(id) == "depends"
    better = {"patch 2": (0.50, 0.003), "patch 3": (0.52, 0.003)}
    monkeypatch.setattr(checks, "EMOJI7_ACCURACY", better)
    assert outcome(id) == "holds"
    monkeypatch.setattr(checks, "EMOJI7_SCALE", (40.0, 0.1))
    assert outcome(id) == "depends"
    monkeypatch.setattr(checks, "EMOJI7_ACCURACY", {**better, "patch 3": (0.50, 0.003)})
    assert outcome(id) == "does not hold"


def test_the_figures_are_those_of_the_study():
    lines = (ROOT / "docs/emoji7.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    columns = rows[0]
    cells = {row[0]: dict(zip(columns, row)) for row in rows}

    def figures(setting, column):
        return tuple(float(x) for x in re.findall(r"[\d.]+", cells[setting][column]))

    assert {s: figures(s, "accuracy, unseen vendor") for s in checks.EMOJI7_ACCURACY} == checks.EMOJI7_ACCURACY
    assert figures("patch 3", "scale") == checks.EMOJI7_SCALE


def test_the_published_figure_is_of_a_recipe_without_patch_3(monkeypatch):
    monkeypatch.chdir(ROOT)
    (number,) = claims.published_of("sap")
    bindings = configs.draft(number.config).bindings
    assert (bindings["SCALE"].value, bindings["DETACH"].value) == ("fixed_sqrt", False)
    assert bindings["sap.FewShot.published"].value == {number.metric: number.value}
    for file in (ROOT / "gin/sap").rglob("*.gin"):
        if file.parent.name != "sweeps" and str(file.relative_to(ROOT)) != number.config:
            assert "sap.FewShot.published" not in configs.draft(str(file)).bindings, file
