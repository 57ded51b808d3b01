"""Every gin file of SAP builds its task and model with no binding left over; the ledger gives the verdicts it states."""

from pathlib import Path

import pytest
from test_sap_datasets import emoji_folder
from tiny import images

from core import claims, record
from core import config as configs

ROOT = Path(__file__).parents[2]
# Requests of sweeps are no configs; tests/docs plans them as documented.
FOUND = [ROOT / "gin/sap_pacs.gin", *(p for p in (ROOT / "gin/sap").rglob("*.gin") if p.parent.name != "sweeps")]
FILES = [str(p.relative_to(ROOT)) for p in sorted(FOUND)]
PARTS = {"gin/sap/model.gin", "gin/sap/purification.gin", "gin/sap/small.gin", "gin/sap/recipe.gin", "gin/sap/emoji7_base.gin"}
RUNNABLE = sorted(set(FILES) - PARTS)


class Built(Exception):
    pass


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    base = tmp_path_factory.mktemp("roots")
    return {"pacs": images(base / "pacs", per_cell=6), "emoji": emoji_folder(base / "emoji", per_class=12)}


def build(file, roots, folder, monkeypatch, **overrides):
    monkeypatch.chdir(ROOT)
    root = roots["emoji" if "emoji7" in file or "variants" in file else "pacs"]
    settings = {"ROOT": str(root), "K_SHOT": 1, "N_QUERY": 1, "DEVICE": "cpu", **overrides}
    config = configs.read(file, [f"{k}={v}" for k, v in settings.items()])
    configs.apply(config)
    found = {}

    def on_built(task, model):
        found.update(task=task, model=model, unused=configs.unused(config))
        raise Built

    with record.RunFolder(folder, chatty=False) as run, pytest.raises(Built):
        configs.configured(configs.TRAIN)(run, on_built)
    return found


@pytest.mark.parametrize("file", RUNNABLE)
def test_a_recipe_builds_and_leaves_no_binding_over(file, roots, tmp_path, monkeypatch):
    found = build(file, roots, tmp_path, monkeypatch)
    assert found["unused"] == []
    purification = found["model"].sap_module
    name = Path(file).stem
    assert (purification is None) == (name == "off")
    if name.startswith(("patch2", "patch3")):
        assert purification.scale_mode == ("fixed_sqrt" if name.startswith("patch2") else "learned")
        assert purification.detach_anchors == (name in ("patch2_detached", "patch3"))
    if "clip" in name:
        assert found["task"].clip_scope == name.removeprefix("clip_")
    if name == "pacs_release":
        assert found["task"].split == "none"
        assert not found["task"].own_streams
        assert (purification.cap_mode, purification.detach_anchors, purification.purify_in_eval) == ("hard", True, False)
        assert not found["model"].joint_forward


def test_every_target_is_a_macro_away(roots, tmp_path, monkeypatch):
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        found = build("gin/sap_pacs.gin", roots, tmp_path / domain, monkeypatch, TARGET=f"'{domain}'")
        assert found["task"].data.domains[found["task"].target_domain] == domain


def test_the_ledger_gives_the_verdicts_that_it_states():
    rows = claims.of("sap")
    assert {f"SAP-{n}" for n in range(1, 13)} | {f"S{n}" for n in range(1, 10)} | {"FINDING-1", "FACT-1"} <= {c.id for c in rows}
    wrong = [(c.claim.id, c.verdict, c.error) for c in map(claims.run, rows) if not c.as_expected]
    assert wrong == []
