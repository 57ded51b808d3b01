"""Semantic alignment against its equations in slow loops, its limits, its properties, and the release's own numbers."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core import golden
from plugins.sam import golden as sam_golden
from plugins.sam.semantic_alignment import LOG_100, SemanticAlignment, mth_largest

GOLDEN = Path(__file__).parents[1] / "golden"
B, H, W, C, T, CT = 3, 2, 3, 8, 6, 5


def module(side="decoder", seed=0, **options):
    torch.manual_seed(seed)
    sam = SemanticAlignment(C, CT, heads=2, side=side, **options)
    with torch.no_grad():  # biases too, so that nothing hides behind a zero
        for parameter in sam.parameters():
            if parameter.ndim:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return sam


def inputs(pads=(), seed=1):
    torch.manual_seed(seed)
    visual, text = torch.randn(B, H, W, C), torch.randn(B, T, CT)
    for sample, token in pads:
        text[sample, token] = 0
    return visual, text


def layer_norm(x, norm):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return torch.stack([(v - mean) / math.sqrt(var + 1e-5) * w + b for v, w, b in zip(x, norm.weight, norm.bias)])


def by_hand_attention(sam, x, tokens, *, cosine, scale, top):
    """One query over the tokens of its sample, head by head, from the note's formulas."""
    d = C // sam.heads
    q = sam.to_query.weight @ x + sam.to_query.bias
    joined = []
    for head in range(sam.heads):
        part = slice(head * d, (head + 1) * d)
        qh = q[part] / q[part].norm() if cosine else q[part]
        logits, values = [], []
        for token in tokens:
            k = (sam.to_key.weight @ token + sam.to_key.bias)[part]
            logits.append(float(qh @ (k / k.norm() if cosine else k)) * scale)
            values.append((sam.to_value.weight @ token + sam.to_value.bias)[part])
        kept = sorted(range(len(logits)), key=lambda i: -logits[i])[: top or len(logits)]
        total = sum(math.exp(logits[i]) for i in kept)
        joined.append(sum(math.exp(logits[i]) / total * values[i] for i in kept))
    return sam.to_out.weight @ torch.cat(joined) + sam.to_out.bias


def by_hand(sam, visual, text, side, *, cosine, scale, top):
    out = torch.empty_like(visual)
    for b in range(B):
        tokens = [t for t in text[b] if t.abs().sum() > 1e-6]
        for y in range(H):
            for x in range(W):
                v = visual[b, y, x]
                if not tokens:
                    out[b, y, x] = v
                elif side == "encoder":
                    out[b, y, x] = v + sam.gamma * by_hand_attention(sam, v, tokens, cosine=cosine, scale=scale, top=None)
                else:
                    stream = layer_norm(v, sam.norm1)
                    stream = stream + sam.alpha * by_hand_attention(sam, stream, tokens, cosine=cosine, scale=scale, top=top)
                    stream = layer_norm(stream, sam.norm2)
                    z = sam.ffn.expand.weight @ stream + sam.ffn.expand.bias
                    z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
                    out[b, y, x] = stream + sam.ffn.contract.weight @ z + sam.ffn.contract.bias
    return out


HOLES = ((0, 1), (0, 4), (1, 5), *((2, t) for t in range(T)))  # holes, a trailing pad, a sample without text


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("side", ["decoder", "encoder"])
@torch.no_grad()
def test_matches_the_equations_by_hand(side, cosine):
    init = 14.285714 if cosine else 1.0
    sam = module(side, top_m=3, **{f"{side}_use_cosine": cosine, f"{side}_logit_scale_init": init})
    visual, text = inputs(HOLES)
    expected = by_hand(sam, visual, text, side, cosine=cosine, scale=init / math.sqrt(C // 2), top=3)
    assert_close(sam(visual, text), expected, atol=2e-5, rtol=1e-5)


def test_defaults_are_those_of_the_note():
    both = SemanticAlignment(C, CT, side="both")
    assert both.use_cosine == {"decoder": True, "encoder": False}
    assert both.learnable == {"decoder": True, "encoder": False}
    assert float(both.decoder_logit_scale) == pytest.approx(math.log(1 / 0.07))
    assert float(both.encoder_logit_scale) == 0.0
    assert both.decoder_logit_scale.requires_grad
    assert not both.encoder_logit_scale.requires_grad


@pytest.mark.parametrize(
    ("release", "learnable", "init", "temp_param", "expected"),
    [
        # d_k = 32, the note's table: code on the left, its formula read literally where named so
        (False, False, 1.0, "log_of_init", 0.1767767),
        (False, False, 14.285714, "log_of_init", 2.5253814),
        (True, True, 14.285714, "log_of_init", math.exp(2) / math.sqrt(32)),
        (True, True, 1.0, "log_of_init", 0.1767767),
        (False, True, 14.285714, "log_of_init", 2.5253814),  # ours: learnable and fixed start at one temperature
        (True, False, 1.0, "seed_literal", math.e / math.sqrt(32)),
        (True, True, 14.285714, "seed_literal", math.exp(2) / math.sqrt(32)),
        (True, False, 14.285714, "seed_literal", math.exp(14.285714) / math.sqrt(32)),
        (True, False, 14.285714, "init_as_log", math.exp(2) / math.sqrt(32)),
    ],
)
def test_logit_scale_table(release, learnable, init, temp_param, expected):
    options = sam_golden.RELEASE if release else {}
    sam = SemanticAlignment(
        64, CT, heads=2, **{**options, "temp_param": temp_param}, decoder_learnable_temp=learnable, decoder_logit_scale_init=init
    )
    assert sam.scale("decoder").item() == pytest.approx(expected, rel=1e-6)


def temperature_gradient(sam, visual, text):
    torch.manual_seed(5)
    (sam(visual, text) * torch.randn(visual.shape)).sum().backward()
    return float(sam.decoder_logit_scale.grad)


def test_the_released_default_temperature_is_dead_and_ours_is_not():
    visual, text = inputs()
    assert temperature_gradient(module(**sam_golden.RELEASE), visual, text) == 0.0
    assert abs(temperature_gradient(module(), visual, text)) > 1e-6
    for policy in ("none", "project_after_step"):
        assert abs(temperature_gradient(module(clamp_policy=policy), visual, text)) > 1e-6
    assert abs(temperature_gradient(module(clamp_policy="value_clamp"), visual, text)) > 1e-6  # the bound is log(100) now


def test_straight_through_blocks_only_the_way_out():
    sam = module(clamp_logit=2.0)  # starts at 2.66, beyond the bound
    assert float(sam.scale("decoder")) == pytest.approx(math.exp(2) / 2)
    inward = torch.autograd.grad(sam.scale("decoder"), sam.decoder_logit_scale)[0]  # descent lowers it
    outward = torch.autograd.grad(-sam.scale("decoder"), sam.decoder_logit_scale)[0]
    assert float(inward) == pytest.approx(math.exp(2) / 2)
    assert float(outward) == 0.0
    with torch.no_grad():
        sam.decoder_logit_scale.fill_(-2.5)
    inward = torch.autograd.grad(-sam.scale("decoder"), sam.decoder_logit_scale)[0]
    assert float(inward) == pytest.approx(-math.exp(-2) / 2)


def test_projection_moves_the_parameter_back_in_training_only():
    sam = module(clamp_policy="project_after_step", clamp_logit=2.0).eval()
    assert float(sam.scale("decoder")) == pytest.approx(math.exp(2) / 2)
    assert float(sam.decoder_logit_scale) > 2.6
    sam.train().scale("decoder")
    assert float(sam.decoder_logit_scale) == 2.0


def test_a_learnable_temperature_reaches_the_optimum_it_is_pulled_to():
    """Fit the logit scale to attention made at another temperature: ours gets there, the release stays."""
    visual, text = inputs()
    for options, moves in (({}, True), (sam_golden.RELEASE, False)):
        sam, target = module(**options), module(clamp_policy="none")
        with torch.no_grad():
            target.decoder_logit_scale.fill_(1.0)
            wanted = target.attention(visual, text)
        optimizer = torch.optim.Adam([sam.decoder_logit_scale], lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            (sam.attention(visual, text) - wanted).square().sum().backward()
            optimizer.step()
        assert (abs(float(sam.decoder_logit_scale) - 1.0) < 0.1) is moves


@pytest.mark.parametrize("side", ["decoder", "encoder"])
@given(sample=st.integers(0, B - 1), seed=st.integers(0, 99))
def test_a_sample_does_not_depend_on_its_batch_mates(side, sample, seed):
    sam = module(side)
    visual, text = inputs(HOLES, seed)
    alone = sam(visual[sample : sample + 1], text[sample : sample + 1])
    assert_close(sam(visual, text)[sample : sample + 1], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["decoder", "encoder"])
@given(seed=st.integers(0, 99), order=st.permutations(range(T)))
def test_token_order_and_holes_change_nothing(side, seed, order):
    sam = module(side, top_m=2)
    visual, text = inputs(HOLES, seed)
    packed = torch.cat([text, torch.zeros(B, 2, CT)], dim=1)
    assert_close(sam(visual, text[:, order]), sam(visual, text), atol=2e-6, rtol=1e-5)
    assert_close(sam(visual, packed), sam(visual, text), atol=2e-6, rtol=1e-5)


def test_released_encoder_loses_tokens_behind_a_hole_and_ours_does_not():
    visual, text = inputs([(b, t) for b in range(B) for t in range(T - 1)])  # one token, the last
    assert_close(module("encoder", pad_trim="prefix")(visual, text), visual)
    assert (module("encoder")(visual, text) - visual).abs().max() > 0.01
    assert torch.equal(module("decoder", pad_trim="prefix")(visual, text), module("decoder")(visual, text))  # it was right there


def test_without_text_a_sample_passes_unchanged_and_has_no_gradient_into_the_module():
    visual, text = inputs([(b, t) for b in range(B) for t in range(T)])
    for side in ("decoder", "encoder"):
        sam = module(side)
        out = sam(visual, text)
        assert torch.equal(out, visual)
        out.sum().backward()
        assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in sam.parameters())
    released = module(missing_text="upstream")
    normed = released.norm2(released.norm1(visual))
    assert_close(released(visual, text), normed + released.ffn(normed))


def test_released_decoder_depends_on_batch_mates():
    visual, text = inputs([(2, t) for t in range(T)])
    released = module(missing_text="upstream")
    assert (released(visual, text)[2] - released(visual[2:], text[2:])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [T, 32])
def test_top_m_keeps_m_tokens_or_all_that_are_real(tokens):
    torch.manual_seed(3)
    sam, visual, text = module(top_m=5), torch.randn(B, H, W, C), torch.randn(B, tokens, CT)
    text[1, 3:] = 0
    counts = (sam.attention(visual, text) > 0).sum(dim=-1)
    assert (counts[0] == 5).all()
    assert (counts[1] == 3).all()
    assert_close(sam.attention(visual, text).sum(-1), torch.ones(B, 2, H, W))


@given(m=st.integers(1, 7), seed=st.integers(0, 99), coarse=st.booleans())
def test_mth_largest_counts_ties_as_often_as_they_occur(m, seed, coarse):
    logits = torch.randn(2, 2, 4, 7, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if coarse else logits
    expected = logits.sort(dim=3, descending=True).values[..., m - 1 : m]
    assert torch.equal(mth_largest(logits, m), expected)


def test_a_large_vocabulary_takes_the_other_way_to_the_same_threshold():
    logits = torch.randn(1, 1, 3, 300)
    assert torch.equal(mth_largest(logits, 5), logits.sort(dim=3, descending=True).values[..., 4:5])


def test_top_m_of_every_token_equals_none():
    visual, text = inputs(HOLES)
    assert_close(module(top_m=T)(visual, text), module(top_m=None)(visual, text))


def test_cosine_ignores_the_length_of_queries_and_keys_and_dot_does_not():
    visual, text = inputs()
    for cosine in (True, False):
        sam = module(decoder_use_cosine=cosine, top_m=None)
        before = sam.attention(visual, text)
        with torch.no_grad():
            for projection in (sam.to_query, sam.to_key):
                projection.weight.mul_(7)
                projection.bias.mul_(7)
        assert torch.allclose(sam.attention(visual, text), before, atol=1e-5) is cosine


def test_limits_alpha_and_gamma_zero():
    """Weight 0: the encoder is the identity; the decoder is its norms and feed-forward, whatever the text says."""
    visual, text = inputs()
    assert torch.equal(module("encoder", gamma_init=0.0)(visual, text), visual)
    assert torch.equal(module("encoder", gamma_scale=0.0)(visual, text), visual)
    decoder = module(alpha_init=0.0)
    normed = decoder.norm2(decoder.norm1(visual))
    assert_close(decoder(visual, text), normed + decoder.ffn(normed))


def test_one_token_gives_its_value_everywhere():
    visual, text = inputs()
    sam = module("encoder")
    expected = sam.to_out(sam.to_value(text[:, :1]))
    assert_close(sam(visual, text[:, :1]) - visual, (sam.gamma * expected)[:, None].expand_as(visual))


def test_residual_and_norm_placement_switches():
    visual, text = inputs()
    release, raw, pre, bare = module(), module(residual_source="raw"), module(ffn_norm_placement="pre"), module(add_residual=False)
    x = release.norm1(visual)
    attended = release._attend(x.flatten(1, 2), text, "decoder")[0].view_as(visual)
    stream = x + release.alpha * attended
    assert_close(pre(visual, text), stream + release.ffn(release.norm2(stream)))
    for sam, source in ((raw, visual), (bare, torch.zeros_like(visual))):
        normed = release.norm2(source + release.alpha * attended)
        assert_close(sam(visual, text), normed + release.ffn(normed))


def test_the_released_decoder_forgets_the_scale_of_its_input():
    visual, text = inputs()
    assert_close(module()(10 * visual, text), module()(visual, text), atol=1e-3, rtol=1e-3)
    assert (module(residual_source="raw")(10 * visual, text) - module(residual_source="raw")(visual, text)).abs().max() > 0.1


def test_full_channel_norm_before_heads_changes_the_attention_by_about_the_root_of_heads():
    visual, text = inputs()
    per_head, full = module(top_m=None), module(top_m=None, cosine_norm_scope="full_channel")
    q = per_head.to_query(per_head.norm1(visual).flatten(1, 2))
    assert_close(full._inverse_length(q)[:, 0, :, 0], 1 / q.norm(dim=-1))
    assert (per_head.attention(visual, text) - full.attention(visual, text)).abs().max() > 1e-3


def test_cosine_without_sqrt_dk_is_sharper_by_sqrt_dk():
    assert float(module(cosine_sqrt_dk=False).scale("decoder") / module().scale("decoder")) == pytest.approx(2.0)


def test_text_layouts():
    visual, text = inputs()
    sam = module(top_m=None)
    shared = sam(visual, text[0].expand(B, T, CT))
    assert_close(sam(visual, text[0]), shared)
    assert_close(sam(visual, text[:1]), shared)
    assert_close(sam(visual, text[0, 0]), sam(visual, text[0, :1].expand(B, 1, CT)))
    dealt = module(top_m=None, shared_text_layout="upstream")(visual, text[:1])
    assert_close(dealt, sam(visual, text[0].view(B, T // B, CT)))  # the release splits one text among the samples
    with pytest.raises(ValueError, match="shared_text_layout='expand'"):
        module("encoder", shared_text_layout="upstream")(visual, text[:1])


def test_one_clear_error_each():
    visual, text = inputs()
    sam = module()
    with pytest.raises(ValueError, match=r"text tokens are 4 wide.*text_dim=5"):
        sam(visual, text[..., :4])
    with pytest.raises(ValueError, match="its batch must be 1 or that of the features, 3"):
        sam(visual, text[:2])
    with pytest.raises(ValueError, match="name one that was built"):
        sam(visual, text, side="encoder")
    with pytest.raises(ValueError, match="heads must divide dim"):
        SemanticAlignment(10, heads=4)
    with pytest.raises(ValueError, match="top_m must be at least 1"):
        SemanticAlignment(8, top_m=0)
    with pytest.raises(ValueError, match="decoder_logit_scale_init must be positive"):
        SemanticAlignment(8, decoder_logit_scale_init=0.0)


FIXED = {"decoder_learnable_temp": False}  # the encoder's is by default
DOT = {"decoder_use_cosine": False}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"clamp_policy": "none", "clamp_logit": 2.0}, r"clamp_logit = 2\.0 would have no effect, because clamp_policy = 'none'"),
        ({**FIXED, "clamp_policy": "value_clamp"}, r"clamp_policy = 'value_clamp' would have no effect, because both temperatures"),
        ({**FIXED, "clamp_policy": "none"}, r"clamp_policy = 'none' would have no effect"),
        ({**FIXED, "clamp_logit": 2.0}, r"clamp_logit = 2\.0 would have no effect"),
        ({**FIXED, "temp_param": "seed_literal", "clamp_logit": 3.0}, r"clamp_logit = 3\.0 would have no effect"),
        ({**DOT, "cosine_norm_scope": "full_channel"}, r"cosine_norm_scope = 'full_channel' would have no effect, because neither"),
        ({**DOT, "cosine_sqrt_dk": False}, r"cosine_sqrt_dk = False would have no effect"),
        ({"add_residual": False, "residual_source": "raw"}, r"residual_source = 'raw' would have no effect, because add_residual"),
    ],
)
def test_an_option_that_cannot_take_effect_is_an_error(options, complaint):
    with pytest.raises(ValueError, match=f"SemanticAlignment: .*{complaint}"):
        SemanticAlignment(8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {**FIXED, "encoder_learnable_temp": True, "clamp_policy": "value_clamp"},  # one set of options serves both sides' modules
        {**FIXED, "temp_param": "init_as_log", "clamp_logit": 2.0},  # bounded when fixed too
        {**FIXED, **sam_golden.RELEASE},  # the release's bound comes with its other switches, whatever the preset
        {**DOT, "encoder_use_cosine": True, "cosine_norm_scope": "full_channel"},
        {"add_residual": False, "residual_source": "raw", "missing_text": "upstream"},  # the stream where no sample has text
    ],
)
def test_an_option_that_takes_effect_somewhere_is_none(options):
    assert SemanticAlignment(8, **options)


def test_a_golden_case_may_have_a_bound_that_binds_nothing():
    config = {"query_dim": 8, "clamp_logit": 1.5, "mode": "decoder", "decoder_learnable_temp": False}
    assert sam_golden.release_alignment(config).clamp_logit == 2.0
    assert sam_golden.release_alignment({**config, "decoder_learnable_temp": True}).clamp_logit == 1.5


def test_both_halves_share_their_projections():
    both = module("both")
    visual, text = inputs()
    decoder, encoder = module("decoder"), module("encoder")
    for sam in (decoder, encoder):
        sam.load_state_dict({k: v for k, v in both.state_dict().items() if k in sam.state_dict()})
    assert_close(both(visual, text, side="decoder"), decoder(visual, text))
    assert_close(both(visual, text, side="encoder"), encoder(visual, text))
    with pytest.raises(ValueError, match="name one that was built"):
        both(visual, text)


@pytest.mark.parametrize(("side", "expected"), [("encoder", 394_242), ("decoder", 920_834), ("both", 920_836)])
def test_parameter_counts_of_the_release(side, expected):
    sam = SemanticAlignment(256, 512, side=side)
    assert sum(p.numel() for p in sam.parameters()) == expected


def test_half_precision_text_and_features_agree_with_full():
    visual, text = inputs(HOLES)
    sam = module(top_m=None)
    half = module(top_m=None).to(torch.bfloat16)
    assert (half(visual.bfloat16(), text).float() - sam(visual, text)).abs().max() < 0.15
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(sam(visual, text)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_every_precision_is_finite_with_padding_and_agrees_with_float32(side, cosine, dtype):
    """A padding token's key is exactly zero while the bias is: its 1 / |k| is beyond float16."""

    def fresh():
        torch.manual_seed(0)
        return SemanticAlignment(C, CT, heads=2, side=side, decoder_use_cosine=cosine, encoder_use_cosine=cosine)

    visual, text = inputs(HOLES)
    expected = fresh()(visual, text)
    narrow = fresh().to(dtype)
    leaf = visual.to(dtype).requires_grad_()
    out = narrow(leaf, text.to(dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert torch.isfinite(leaf.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in narrow.parameters() if p.grad is not None)
    assert (out.float() - expected).abs().max() < {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            mixed = fresh()(visual, text)
        assert (mixed.float() - expected).abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_zero_query_or_key_has_cosine_zero(dtype):
    """F.normalize with eps 1e-6 gives 0, so that attention is even."""
    sam = SemanticAlignment(C, CT, heads=2, top_m=None).to(dtype)
    text = torch.randn(1, T, CT, dtype=dtype)
    with torch.no_grad():
        sam.to_query.weight.zero_()
    assert_close(sam.attention(torch.randn(1, H, W, C, dtype=dtype), text).float(), torch.full((1, 2, H, W, T), 1 / T))


@pytest.mark.parametrize("side", ["decoder", "encoder"])
@torch.no_grad()
def test_an_export_serves_any_number_of_tokens(side):
    sam = module(side, top_m=3).eval()
    visual, text = inputs(HOLES)
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(sam, (visual, text), dynamic_shapes=({0: dynamic}, {0: dynamic, 1: dynamic})).module()
    for tokens in (2, 3, 4, 12):  # fewer than m, m, more
        text = torch.randn(2, tokens, CT)
        text[0, 1:] = 0
        assert_close(exported(visual[:2], text), sam(visual[:2], text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("sam_*.safetensors")), ids=lambda p: p.stem)
def test_release_parity(path):
    result = golden.compare(golden.read(path))
    assert result.passed, result.failures
    assert result.compared >= 12


def test_release_parity_is_lost_without_the_release_switches():
    """The comparison can fail: our default temperature is not the release's frozen one."""
    case = golden.read(GOLDEN / "sam_decoder_cos_learn.safetensors")
    sam = sam_golden.release_alignment(case.config)
    sam.clamp_logit = LOG_100
    case.load(sam, sam_golden.AlignmentKeys())
    assert (sam(case.inputs["visual"], case.inputs["text"]) - case.outputs["y"]).abs().max() > 1e-4
