"""Every gin file of SAP builds its task and model with no binding left over."""

from pathlib import Path

import building
import pytest
import torch
from test_sap_datasets import emoji_folder
from tiny import images

from core import config as configs

ROOT = Path(__file__).parents[2]
# Requests of sweeps are no configs; tests/docs plans them as documented.
FOUND = [ROOT / "gin/sap_pacs.gin", *(p for p in (ROOT / "gin/sap").rglob("*.gin") if p.parent.name != "sweeps")]
FILES = [str(p.relative_to(ROOT)) for p in sorted(FOUND)]
WHOLE = {"gin/sap_pacs.gin", "gin/sap/emoji7.gin", "gin/sap/sample_off.gin"}
WHOLE |= {f"gin/sap/{name}.gin" for name in ("pacs", "pacs_off", "pacs_release", "pacs_patch2_release")}
RUNNABLE = sorted(WHOLE | {f for f in FILES if f.startswith("gin/sap/variants/")})
PURIFICATIONS = sorted(f for f in FILES if f.startswith("gin/sap/purification/"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    base = tmp_path_factory.mktemp("roots")
    return {"pacs": images(base / "pacs", per_cell=6), "emoji": emoji_folder(base / "emoji", per_class=12)}


def build(file, roots, folder, monkeypatch, **overrides):
    monkeypatch.chdir(ROOT)
    root = roots["emoji" if "emoji7" in file or "variants" in file else "pacs"]
    settings = {"ROOT": str(root), "K_SHOT": 1, "N_QUERY": 1, "DEVICE": "cpu", **overrides}
    config = configs.read(file, [f"{k}={v}" for k, v in settings.items()])
    return building.build(config, folder)


@pytest.mark.parametrize("file", RUNNABLE)
def test_a_recipe_builds_and_leaves_no_binding_over(file, roots, tmp_path, monkeypatch):
    found = build(file, roots, tmp_path, monkeypatch)
    assert found["unused"] == []
    purification = found["model"].sap_module
    name = Path(file).stem
    assert (purification is None) == name.endswith("off")
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


@pytest.mark.parametrize("file", [f for f in RUNNABLE if "pacs" in f])
def test_every_target_is_a_macro_away(file, roots, tmp_path, monkeypatch):
    """And what the recipe selects its checkpoint by is measured, whichever the target is."""
    monkeypatch.chdir(ROOT)
    selected = configs.draft(file).bindings["trainer.train.select"].value
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        settings = {"TARGET": f"'{domain}'", "EPISODES": 1, "sap.FewShot.eval_episodes": 1, "IMAGE": 24}
        found = build(file, roots, tmp_path / domain, monkeypatch, **settings)
        assert found["task"].data.domains[found["task"].target_domain] == domain
        found["model"].eval()
        with torch.inference_mode():
            assert selected in found["task"].evaluate(found["model"])


@pytest.mark.parametrize("part", PURIFICATIONS)
def test_the_release_s_recipe_goes_on_every_purification(part, roots, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "pacs_mine.gin"
    file.write_text(f"include 'gin/sap/pacs_base.gin'\ninclude '{part}'\ninclude 'gin/sap/release.gin'\n")
    assert build(str(file), {"pacs": roots["pacs"], "emoji": roots["pacs"]}, tmp_path / "run", monkeypatch)["unused"] == []


@pytest.mark.parametrize("base", ["emoji7_base", "pacs_base", "sample"])
@pytest.mark.parametrize("part", PURIFICATIONS)
def test_every_purification_goes_on_every_recipe(base, part, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "mine.gin"
    file.write_text(f"include 'gin/sap/{base}.gin'\ninclude '{part}'\n")
    config = configs.read(str(file), ["ROOT=/data"])
    assert (config.bindings["PURIFICATION"].value is None) == part.endswith("none.gin")
