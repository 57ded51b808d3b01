import pytest
import torch
from torch import nn
from torch.testing import assert_close

from plugins.sam3_fusion import keys
from plugins.sam3_fusion.decoder import QueryDecoder
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.keys import HuggingFaceKeys, KeysDiffer, OriginalKeys, more_queries
from plugins.sam3_fusion.scoring import PromptScorer


class Fusion(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.encoder = FusionEncoder(8, 2, 2, 10, **parts.get("encoder", {}))
        self.decoder = QueryDecoder(8, 2, 2, 10, 3, **parts.get("decoder", {}))
        self.scorer = PromptScorer(8, 10)


class FullSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.scorer = FusionEncoder(), QueryDecoder(), PromptScorer()


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return FullSize()


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_full_size_has_the_released_number_of_parameters(full):
    assert parameters(full.encoder) == 9_472_512
    assert parameters(full.decoder) == 11_575_093
    assert parameters(full.scorer) == 1_182_976
    presence = [p for n, p in full.decoder.named_parameters() if n.startswith("presence.")]
    assert sum(p.numel() for p in presence) == 132_609


def test_full_size_has_the_released_keys_in_both_namings(full):
    names = OriginalKeys().to_reference(full.state_dict())
    port = HuggingFaceKeys().to_reference(full.state_dict())
    for released, ported, mine in (
        ("transformer.encoder.", "detr_encoder.", (108, 156)),
        ("transformer.decoder.", "detr_decoder.", (175, 247)),
    ):
        assert (sum(k.startswith(released) for k in names), sum(k.startswith(ported) for k in port)) == mine
    assert sum(k.startswith("dot_prod_scoring.") for k in names) == 10
    assert sum(k.startswith("dot_product_scoring.") for k in port) == 10
    assert names["transformer.encoder.layers.5.self_attn.in_proj_weight"].shape == (768, 256)
    assert names["transformer.decoder.presence_token.weight"].shape == (1, 256)
    for key in (
        "transformer.encoder.layers.0.cross_attn_image.in_proj_bias",
        "transformer.encoder.layers.3.linear2.weight",
        "transformer.decoder.layers.2.ca_text.out_proj.weight",
        "transformer.decoder.layers.4.catext_norm.bias",
        "transformer.decoder.bbox_embed.layers.2.weight",
        "transformer.decoder.boxRPB_embed_y.layers.1.bias",
        "transformer.decoder.ref_point_head.layers.0.weight",
        "transformer.decoder.presence_token_head.layers.2.bias",
        "transformer.decoder.presence_token_out_norm.weight",
        "transformer.decoder.query_embed.weight",
        "dot_prod_scoring.prompt_mlp.out_norm.bias",
        "dot_prod_scoring.hs_proj.weight",
    ):
        assert key in names
    for key in (
        "detr_encoder.layers.0.cross_attn.o_proj.bias",
        "detr_encoder.layers.1.mlp.fc2.weight",
        "detr_encoder.layers.1.layer_norm3.weight",
        "detr_decoder.layers.0.text_cross_attn.k_proj.weight",
        "detr_decoder.layers.5.vision_cross_attn_layer_norm.bias",
        "detr_decoder.box_head.layer3.bias",
        "detr_decoder.box_rpb_embed_x.layer1.weight",
        "detr_decoder.ref_point_head.layer2.bias",
        "detr_decoder.output_layer_norm.weight",
        "detr_decoder.presence_head.layer1.weight",
        "detr_decoder.presence_layer_norm.bias",
        "dot_product_scoring.text_mlp.layer2.weight",
        "dot_product_scoring.text_mlp_out_norm.weight",
        "dot_product_scoring.query_proj.bias",
    ):
        assert key in port


@pytest.mark.parametrize("keymap", [OriginalKeys(), HuggingFaceKeys()])
@pytest.mark.parametrize("parts", [{}, {"encoder": {"pooled_text": "mean", "levels": 2}}, {"decoder": {"presence": False}}])
def test_every_weight_comes_back(keymap, parts):
    state = Fusion(**parts).state_dict()
    theirs = keymap.to_reference(state)
    back = keymap.from_reference(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert sum(v.numel() for v in theirs.values()) == sum(v.numel() for v in state.values())


def test_packed_projection_has_the_rows_of_q_then_k_then_v():
    state = Fusion().state_dict()
    packed = OriginalKeys().to_reference(state)["transformer.decoder.layers.1.cross_attn.in_proj_weight"]
    rows = [state[f"decoder.blocks.1.image_attn.{p}_proj.weight"] for p in "qkv"]
    assert_close(packed, torch.cat(rows))


def test_a_projection_without_its_companions_and_strange_names_are_errors():
    state = Fusion().state_dict()
    del state["encoder.blocks.0.self_attn.k_proj.bias"]
    with pytest.raises(KeyError, match="needs the bias of its q, k and v projections, got q, v"):
        OriginalKeys().to_reference(state)
    with pytest.raises(KeyError, match="not a weight of the fusion modules"):
        OriginalKeys().from_reference({"backbone.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match="not a weight of the fusion modules"):
        HuggingFaceKeys().to_reference({"neck.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="stacks q, k and v"):
        OriginalKeys().from_reference({"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.zeros(10, 8)})


def forms(state):
    original = OriginalKeys().to_reference(state)
    wrapped = {"detector." + k: v for k, v in original.items()}
    wrapped |= {"detector.backbone.trunk.weight": torch.zeros(2), "tracker.memory.weight": torch.zeros(3)}
    return {
        "original": original,
        "released file": {"model": wrapped, "epoch": 3},
        "huggingface": HuggingFaceKeys().to_reference(state),
        "ours": state,
    }


@pytest.mark.parametrize("form", ["original", "released file", "huggingface", "ours"])
def test_read_loads_every_form_and_reports_what_it_left(form):
    source, target = Fusion(), Fusion()
    for p in source.parameters():
        nn.init.normal_(p)
    report = keys.read(target, forms(source.state_dict())[form])
    assert report.complete
    assert report.loaded == len(source.state_dict())
    for a, b in zip(source.state_dict().values(), target.state_dict().values()):
        assert torch.equal(a, b)
    if form == "released file":
        assert report.others == {"backbone": 1, "tracker": 1}
        assert "backbone (1)" in str(report)


def test_read_is_strict_both_ways_and_changes_nothing_when_it_fails():
    state = OriginalKeys().to_reference(Fusion().state_dict())
    del state["transformer.decoder.presence_token.weight"]
    state["transformer.decoder.instance_query_embed.weight"] = torch.zeros(4, 8)
    state["transformer.decoder.reference_points.weight"] = torch.zeros(5, 4)
    target = Fusion()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(KeysDiffer, match=r"1 missing: decoder\.presence\.token") as caught:
        keys.read(target, state)
    assert caught.value.report.unexpected == ("transformer.decoder.instance_query_embed.weight",)
    assert caught.value.report.misshapen == ("decoder.anchors (3, 4) / (5, 4)",)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    report = keys.read(target, state, strict=False)
    assert not report.complete
    assert report.loaded == len(before) - 2


def test_read_loads_only_the_parts_a_model_has():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scorer = PromptScorer(8, 10)

    state = OriginalKeys().to_reference(Fusion().state_dict())
    report = keys.read(Scorer(), state)
    assert report.complete
    assert report.loaded == 10
    with pytest.raises(ValueError, match="none of the parts"):
        keys.read(nn.Linear(2, 2), state)
    with pytest.raises(ValueError, match="no weight of the fusion modules"):
        keys.read(Fusion(), {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="no tensors"):
        keys.read(Fusion(), {"model": {"a": 1}})


def test_a_weight_under_two_names_is_an_error_that_names_both():
    state = OriginalKeys().to_reference(Fusion().state_dict())
    bare = "transformer.decoder.norm.weight"
    with pytest.raises(ValueError, match=f"'detector.{bare}' and '{bare}', which are one weight"):
        keys.read(Fusion(), {f"detector.{bare}": torch.ones(8), **state})
    packed = "transformer.encoder.layers.0.self_attn.in_proj_bias"
    split = packed.replace("in_proj_bias", "k_proj.bias")
    with pytest.raises(ValueError, match=rf"'{packed}' and '{split}', which both are encoder\.blocks\.0\.self_attn\.k_proj\.bias"):
        keys.read(Fusion(), {**state, split: torch.ones(8)})


@pytest.mark.parametrize("queries", [3, 4, 11])
def test_more_queries_than_trained(queries):
    state = Fusion().state_dict()
    grown = more_queries(state, queries)
    decoder = QueryDecoder(8, 2, 2, 10, queries).eval()
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in grown.items() if k.startswith("decoder.")})
    assert torch.equal(decoder.queries[:3], state["decoder.queries"])
    assert torch.equal(decoder.anchors[:3], state["decoder.anchors"])
    out = decoder(torch.randn(1, 6, 8), (2, 3), torch.randn(1, 2, 8))
    assert torch.isfinite(out.boxes).all()
    assert len({tuple(row) for row in out.boxes[-1, 0].tolist()}) == queries  # no row repeats another
    with pytest.raises(ValueError, match="at least the trained 3"):
        more_queries(state, 2)
    with pytest.raises(KeyError, match="no decoder queries"):
        more_queries({}, 2)
