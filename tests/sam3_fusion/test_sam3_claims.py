"""The ledger: every claim gives the verdict it is known to give; every gin file of the plugin is sound and has its stated size."""

from pathlib import Path

import pytest
import torch

from core import claims, config
from repro import profile

GIN = Path(__file__).parents[2] / "gin"
RECIPES = sorted(
    [GIN / "sam3_fusion.gin", GIN / "sam3_fusion/emoji.gin", GIN / "sam3_fusion/full.gin", *GIN.glob("sam3_fusion/issue17/*.gin")]
)


# SAM3-16 exports the parts that test_fusion_export.py exports and compares at more sizes.
@pytest.mark.parametrize("one", [c for c in claims.of("sam3_fusion") if c.id != "SAM3-16"], ids=lambda c: c.id)
def test_claim(one):
    checked = claims.run(one)
    assert checked.error == ""
    assert checked.as_expected, checked.verdict
    assert checked.verdict.measured


def test_the_ledger_is_whole():
    assert [c.id for c in claims.of("sam3_fusion")] == [f"SAM3-{n}" for n in range(1, 17)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(GIN).as_posix())
def test_every_recipe_is_sound(path):
    given = ["ROOT = 'x'"] if "ROOT = %gin.REQUIRED" in path.read_text() else []
    assert config.read(str(path), given).text()


def test_the_full_size_has_the_released_parameter_counts():
    pytest.importorskip("wordllama")
    task = profile.build(config.read(str(GIN / "sam3_fusion/full.gin"), ["ROOT='-'"]))
    with torch.device("meta"):
        model = task.blueprint()
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("encoder", "decoder", "scorer")}
    assert counts == {"encoder": 9_472_512, "decoder": 11_575_093, "scorer": 1_182_976}
    assert model.grid == (72, 72)
    assert model.decoder.queries.shape[0] == 200


@pytest.mark.parametrize("name", ["sam3_fusion.gin", "sam3_fusion/emoji.gin", "sam3_fusion/issue17/teacher.gin"])
def test_every_detector_is_counted_without_weights(name):
    if "emoji" in name:
        pytest.importorskip("wordllama")
    task = profile.build(config.read(str(GIN / name), []))
    with torch.device("meta"):
        model = task.blueprint()
        assert {p.device.type for p in model.parameters()} == {"meta"}
        found = profile.of_task(task, model, timed=False)
    assert found["model"]["flops"] > 0
