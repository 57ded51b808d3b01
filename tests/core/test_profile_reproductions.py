"""Counts of the reproductions at their published sizes, on the meta device, against the figures their releases print."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from core.profile import Profile, profile


def contractions(record: Profile) -> int:
    """Convolutions and linear layers alone: what the counters of the releases see."""
    return sum(row.macs for row in record.operators if row.name in ("aten::conv2d", "aten::linear"))


@pytest.mark.parametrize(
    ("size", "text", "conv_linear", "everything", "parameters"),
    [
        ("S", False, 33.685, 40.581, 26_686_018),
        ("S", True, 40.183, 47.195, 35_456_986),
        ("L", True, 161.090, 177.128, 114_011_444),
    ],
)
def test_dformer_with_and_without_semantic_alignment(
    size: Any, text: bool, conv_linear: float, everything: float, parameters: int
) -> None:
    dformer = pytest.importorskip("plugins.sam.dformer")
    hamburger = pytest.importorskip("plugins.sam.hamburger")
    segmentor = pytest.importorskip("plugins.sam.segmentor")
    large = {"dim": 1024, "ham_dim": None} if size == "L" else {}
    stages = (1, 2, 3) if text else ()
    with torch.device("meta"):
        model = segmentor.Segmentor(
            40,
            backbone=partial(dformer.DFormerv2, size=size),
            head=partial(hamburger.HamburgerHead, **large),
            encoder_stages=stages,
            decoder_stages=stages,
        )
        images = [torch.zeros(1, 3, 480, 640), torch.zeros(1, 3, 480, 640)]
        record = profile(model.eval(), [*images, torch.zeros(1, 6, 512)] if text else images, timed=False)
    assert record.parameters == parameters
    assert round(contractions(record) / 1e9, 3) == conv_linear
    assert round(record.macs / 1e9, 3) == everything
    assert record.coverage == 1


@pytest.mark.parametrize("ratios", [(0.5, 0.4), (0.7, 0.5)])
def test_token_selection(ratios: tuple[float, float]) -> None:
    multimodal = pytest.importorskip("plugins.sdtps.multimodal")
    sparse = pytest.importorskip("plugins.sdtps.token_sparse")
    aggregation = pytest.importorskip("plugins.sdtps.token_aggregation")
    n, c = 128, 512
    with torch.device("meta"):
        module = multimodal.MultiModalSDTPS(
            c,
            n,
            sparse=partial(sparse.TokenSparse, sparse_ratio=ratios[0]),
            aggregate=partial(aggregation.TokenAggregation, aggr_ratio=ratios[1]),
        ).eval()
        patches = {name: torch.zeros(1, n, c) for name in module.modalities}
        guides = {name: torch.zeros(1, c) for name in module.modalities}
        record = profile(module, (patches, guides), timed=False)
    kept = module.selectors[0].kept_count(n)
    out = module.num_out - 1
    network = n * (c * 128 + 128) + kept * (c * 102 + 102 * out) + out * kept * c  # scores, aggregation weights, aggregation
    products = n * c * 3 + (n - kept) * c  # cosines with three guides; the extra token, a weighted sum of what was dropped
    assert record.macs == 3 * (network + products)
    assert record.coverage == 1


def test_fusion_encoder() -> None:
    fusion = pytest.importorskip("plugins.sam3_fusion.fusion_encoder")
    n, prompt, d, hidden = 72 * 72, 33, 256, 2048
    with torch.device("meta"):
        encoder = fusion.FusionEncoder()
        inputs = (torch.zeros(1, d, 72, 72), torch.zeros(1, prompt, d))
        records = [profile(encoder.train(mode), inputs, timed=False) for mode in (True, False)]
    projections = 4 * n * d * d + 2 * n * d * d + 2 * prompt * d * d
    attention = 2 * n * n * d + 2 * n * prompt * d
    assert {record.macs for record in records} == {6 * (projections + attention + 2 * n * d * hidden)}
    assert round(records[0].flops / 1e9, 1) == 255.9
