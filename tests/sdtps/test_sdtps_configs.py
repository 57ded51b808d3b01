"""Every gin file of SDTPS builds its task and model with no binding left over, with or without a token module."""

from pathlib import Path

import building
import pytest
from sdtps.published_layouts import write_msvr310, write_rgbnt100, write_rgbnt201

from core import claims
from core import config as configs

ROOT = Path(__file__).parents[2]
FILES = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "gin/sdtps").rglob("*.gin"))]
REAL = {"rgbnt201": write_rgbnt201, "rgbnt100": write_rgbnt100, "msvr310": write_msvr310}
TOKENS = [f for f in FILES if f.startswith("gin/sdtps/tokens")]
RUNNABLE = [f for f in FILES if "/variants/" in f or (Path(f).stem.startswith(tuple(REAL)) and not f.endswith("_base.gin"))]
TINY = {"width": 16, "heads": 2, "layers": 2, "output_dim": 8}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    base = tmp_path_factory.mktemp("roots")
    return {name: write(base / name) for name, write in REAL.items()}


def build(file, roots, folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = next((n for n in REAL if n in file), None)
    settings = {"ROOT": str(roots[name or "rgbnt201"]), "DEVICE": "cpu", "sdtps.PKPlan.identities": 2, "sdtps.PKPlan.instances": 2}
    settings |= {f"sdtps.CLIPVisionTransformer.{k}": v for k, v in TINY.items() if name or k in ("width", "heads")}
    settings |= {"WEIGHTS": "None"} if name else {}
    config = configs.read(file, [f"{k}={v}" for k, v in settings.items()])
    return building.build(config, folder)


@pytest.mark.parametrize("file", RUNNABLE)
def test_a_recipe_builds_and_leaves_no_binding_over(file, roots, tmp_path, monkeypatch):
    found = build(file, roots, tmp_path, monkeypatch)
    assert found["unused"] == []
    model, without = found["model"], Path(file).stem.endswith("baseline")
    assert (model.tokens is None) == without
    assert (found["task"].feature == "ori") == without
    if "stable_fork" in file:
        first, aggregate = model.tokens.selectors[0], model.tokens.aggregate["rgb"]
        assert (first.sparse_ratio, first.beta, first.use_gumbel) == (0.7, 0.25, False)
        assert aggregate.num_out == int(128 * 0.5 * 0.7)
        assert not model.tokens.attention_no_grad
        assert found["task"].branch_weights == {"sdtps": 2.0}


@pytest.mark.parametrize("base", [*(f"{name}_base" for name in REAL), "sample"])
@pytest.mark.parametrize("part", TOKENS)
def test_every_token_module_goes_on_every_recipe(base, part, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "mine.gin"
    file.write_text(f"include 'gin/sdtps/{base}.gin'\ninclude '{part}'\n")
    config = configs.read(str(file), ["ROOT=/data", *([] if base == "sample" else ["WEIGHTS=/weights"])])
    assert (config.bindings["TOKENS"].value is None) == part.endswith("none.gin")


def test_a_published_number_is_of_a_recipe_that_has_its_settings(monkeypatch):
    """The fork's log is of ratios 0.7 and 0.5 and branch weight 2; DeMo's own head is not built here, so nothing is rated by it."""
    monkeypatch.chdir(ROOT)
    by_config = {}
    for number in claims.published_of("sdtps"):
        by_config.setdefault(number.config, []).append(number)
    assert set(by_config) == {"gin/sdtps/rgbnt201_stable_fork.gin", "gin/sdtps/rgbnt201_baseline.gin"}
    fork = configs.draft("gin/sdtps/rgbnt201_stable_fork.gin").bindings
    wanted = {"SPARSE_RATIO": 0.7, "AGGREGATE_RATIO": 0.5, "NOISE": 0.67, "sdtps.ReID.branch_weights": {"sdtps": 2.0}}
    assert {name: fork[name].value for name in wanted} == wanted
    numbers = {n.metric: n.value for n in by_config["gin/sdtps/rgbnt201_stable_fork.gin"]}
    assert fork["sdtps.ReID.published"].value == numbers
    assert all(dict(n.where) == {"schedules.Cosine.noise_pct": "0.67"} for n in by_config["gin/sdtps/rgbnt201_baseline.gin"])
    for file in FILES:
        if "stable_fork" not in file:
            assert "sdtps.ReID.published" not in configs.draft(file).bindings, file
