"""The release's own numbers: outputs and gradients of the tri-modal module in its seed, Gumbel and latest versions."""

from pathlib import Path

import pytest

import plugins.sdtps.golden
from core import golden
from plugins.sdtps import multimodal, token_sparse

CASES = sorted((Path(__file__).parents[1] / "golden").glob("sdtps_*.safetensors"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path):
    result = golden.compare(golden.read(path))
    assert result.passed, result.failures
    assert result.compared > 30


def test_all_cases_are_there():
    names = {path.stem for path in CASES}
    assert names >= {f"sdtps_{n}" for n in ("default", "beta_ratio", "gumbel_release", "latest", "latest_cosine")}


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (token_sparse.TokenSparse, "attend", lambda self, maps: self.beta * maps.sum(1)),
        (multimodal, "attention_maps", lambda patches, guides, similarity: patches @ guides.transpose(1, 2)),
    ],
)
def test_a_wrong_equation_fails_the_cases(monkeypatch, owner, name, wrong):
    right = getattr(owner, name)
    if name == "attention_maps":
        monkeypatch.setattr(owner, name, lambda *a: wrong(*a).transpose(1, 2) * right(*a).abs())
    else:
        monkeypatch.setattr(owner, name, wrong)
    assert not golden.compare(golden.read(CASES[0].with_name("sdtps_default.safetensors"))).passed


def test_unknown_arguments_of_the_release_are_refused():
    with pytest.raises(ValueError, match="no version of MultiModalSDTPS has the arguments top_p"):
        plugins.sdtps.golden.release_module({"top_p": 3}, guides_learn=False)
