import pytest
import torch
from torch import nn

from core import export
from plugins.sam3_fusion.decoder import QueryDecoder
from plugins.sam3_fusion.export import fusion_parts
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.scoring import PromptScorer


def parts(size, layers=1, **options):
    encoder = FusionEncoder(16, 2, 1, 24)
    decoder = QueryDecoder(16, 2, layers, 24, 5, **options)
    nn.init.normal_(decoder.box_head[2].weight, std=0.3)
    return fusion_parts(encoder, decoder, PromptScorer(16, 24), size)


# The 8×8 grid goes through `repro export` in tests/repro/test_export.py.
def test_onnx_runtime_gives_pytorchs_numbers_on_the_released_grid(tmp_path):
    pytest.importorskip("onnxruntime")
    tried = [{"batch": 1, "tokens": 7}]
    done = export.export(parts((72, 72))[:2], tmp_path, ("onnx",), sizes=lambda part: tried)
    assert max(e.worst for e in done) < 1e-5


def test_torch_programs_give_pytorchs_numbers(tmp_path):
    tried = [{"batch": b, "tokens": t} for b, t in [(1, 1), (3, 9)]]
    done = export.export(parts((2, 3))[1:], tmp_path, ("torch",), sizes=lambda part: tried)
    assert max(e.worst for e in done) < 1e-5


def test_example_prompts_include_one_of_padding_alone_and_are_finite():
    for part in parts((3, 4), presence=False):
        assert part.inputs["pad"][1].all()
        for value in part.expected(part.at({"batch": 3})).values():
            assert torch.isfinite(value).all()


def test_modules_of_different_width_are_an_error():
    with pytest.raises(ValueError, match="need one width, got 16, 8, 16"):
        fusion_parts(FusionEncoder(16, 2, 1, 24), QueryDecoder(8, 2, 1, 24, 5), PromptScorer(16, 24), (2, 2))
    with pytest.raises(ValueError, match="levels=2"):
        fusion_parts(FusionEncoder(8, 2, 1, 24, levels=2), QueryDecoder(8, 2, 1, 24, 5), PromptScorer(8, 24), (2, 2))
