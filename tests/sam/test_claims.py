"""The ledger: every quick claim gives the verdict it is known to give; every gin file of the plugin is sound."""

from pathlib import Path

import pytest

from core import claims, config
from plugins.sam.golden import RELEASE

GIN = Path(__file__).parents[2] / "gin"
RECIPES = sorted(
    [GIN / "sam_nyu.gin", *GIN.glob("sam/*_[sbl].gin"), *GIN.glob("sam/dformer/*.gin"), *GIN.glob("sam/variants/*.gin")]
)
REQUIRED = ("ROOT", "TAGS", "PRETRAINED", "CLIP_WEIGHTS", "CLIP_VOCABULARY")


@pytest.mark.parametrize("one", [c for c in claims.of("sam") if c.cost == "quick"], ids=lambda c: c.id)
def test_claim(one):
    checked = claims.run(one)
    assert checked.error == ""
    assert checked.as_expected, checked.verdict
    assert checked.verdict.measured


def test_the_ledger_is_whole():
    ids = {c.id for c in claims.of("sam")}
    assert {f"SAM-{n}" for n in range(1, 15)} <= ids
    rows = claims.published_of("sam")
    assert len(rows) == 9
    for row in rows:
        assert (GIN.parent / row.config).is_file(), row.config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(GIN).as_posix())
def test_every_recipe_is_sound(path):
    text = path.read_text()
    given = [f"{name} = 'x'" for name in REQUIRED if f"{name} = %gin.REQUIRED" in text]
    read = config.read(str(path), given)
    assert read.text()


def test_release_gin_is_the_release_of_the_golden_cases():
    read = config.read(str(GIN / "sam/variants/release.gin"))
    bound = {line.split(" = ")[0]: line.split(" = ")[1] for line in read.text().splitlines() if " = " in line}
    for name, value in RELEASE.items():
        assert bound[f"sam.SemanticAlignment.{name}"] == repr(value), name
