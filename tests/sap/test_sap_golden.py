"""Every golden case of the SAP release, values, statistics and gradients; and that a change would be seen."""

from pathlib import Path

import pytest
import torch

import plugins.sap.golden
from core import golden
from plugins.sap.intrinsic_encoder import SobelEdges
from plugins.sap.purification import SemanticAnchorPurification

CASES = sorted((Path(__file__).parents[1] / "golden").glob("sap_*.safetensors"))


def test_all_ten_cases_are_here():
    assert len(CASES) == 10


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_case(path):
    result = golden.compare(golden.read(path))
    assert result.failures == []
    assert result.compared > 0


def test_a_wrong_gate_is_seen(monkeypatch):
    original = SemanticAnchorPurification.scale
    monkeypatch.setattr(SemanticAnchorPurification, "scale", lambda self: original(self) * 1.01)
    path = next(p for p in CASES if p.stem == "sap_default")
    assert golden.compare(golden.read(path)).failures


def test_a_wrong_edge_is_seen(monkeypatch):
    original = SobelEdges.forward
    monkeypatch.setattr(
        SobelEdges, "forward", lambda self, images: original(self, images) * torch.tensor([1, 1, 1, 1.05]).view(1, 4, 1, 1)
    )
    path = next(p for p in CASES if p.stem == "sap_intrinsic_encoder_64")
    assert golden.compare(golden.read(path)).failures


def test_options_of_the_release_that_we_do_not_have_are_refused():
    case = golden.read(next(p for p in CASES if p.stem == "sap_domain_encoder_64"))
    with pytest.raises(ValueError, match="trainable_delta_kernel = True is not built"):
        plugins.sap.golden.options(case, {**case.config, "trainable_delta_kernel": True})
