import fusion_by_hand as by_hand
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.positions import cell_positions

SMALL = {"dim": 8, "heads": 2, "layers": 2, "hidden": 10, "dropout": 0.0}


def small(**options):
    encoder = FusionEncoder(**{**SMALL, **options})
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.4)
    return encoder


def inputs(batch=2, height=2, width=3, length=4):
    pad = torch.arange(length)[None].expand(batch, -1) >= torch.tensor([[length], [length - 2]])[:batch]
    return torch.randn(batch, 8, height, width), torch.randn(batch, length, 8), pad


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "post"}, {"norm": "post", "pos_in_prompt_query": True}, {"pos_in_prompt_query": True}],
)
def test_matches_the_equations(options):
    encoder = small(**options)
    features, prompt, pad = inputs()
    ours = encoder(features, prompt, pad)
    pos = by_hand.grid_positions(2, 3, 8)
    for i in range(2):
        tokens = [features[i, :, y, x] for y in range(2) for x in range(3)]
        theirs = by_hand.encoder(
            encoder.state_dict(),
            2,
            2,
            tokens,
            pos,
            prompt[i],
            pad[i],
            options.get("norm") == "post",
            "pos_in_prompt_query" in options,
        )
        assert_close(ours.memory[i], torch.stack(theirs), atol=2e-5, rtol=1e-4)
        assert_close(ours.pos[i], torch.stack(pos))
    assert ours.sizes == ((2, 3),)
    assert ours.level_starts == (0,)
    assert (ours.valid_ratios == 1).all()


def test_pooled_text_by_hand_and_out_of_place():
    features, prompt, pad = inputs()
    kept = features.clone()
    for kind in ("mean", "masked"):
        encoder = small(pooled_text=kind)
        plain = small()
        plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if "pool_proj" not in k})
        shifted = features.clone()
        for i in range(2):
            seen = [t for t, p in zip(prompt[i], pad[i]) if kind == "mean" or not p]
            pooled = by_hand.linear(encoder.state_dict(), "pool_proj", sum(seen) / len(seen))
            shifted[i] += pooled[:, None, None]
        assert_close(encoder(features, prompt, pad).memory, plain(shifted, prompt, pad).memory)
        assert torch.equal(features, kept)
        first = encoder(features, prompt, pad).memory
        encoder(features, torch.randn_like(prompt), pad)
        assert torch.equal(encoder(features, prompt, pad).memory, first)  # the release adds in place and would drift
        with pytest.raises(ValueError, match="pooled_text"):
            encoder.image_state(features)


def test_pooled_text_of_padding_alone_adds_the_bias():
    encoder = small(pooled_text="masked")
    features, prompt, pad = inputs()
    out = encoder(features, prompt, torch.ones_like(pad)).memory
    assert torch.isfinite(out).all()
    assert_close(out, encoder(features, torch.zeros_like(prompt), torch.ones_like(pad)).memory)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_an_image_state_serves_every_prompt_with_equal_results(norm):
    encoder = small(norm=norm).eval()
    features, prompt, pad = inputs()
    with torch.no_grad():
        state = encoder.image_state(features)
        for _ in range(3):
            other = torch.randn_like(prompt)
            assert torch.equal(encoder.fuse(state, other, pad).memory, encoder(features, other, pad).memory)
        one = encoder.image_state(features[:1])
        several = encoder.fuse(one, prompt, pad)
        for i in range(2):
            assert_close(several.memory[i], encoder(features[:1], prompt[i : i + 1], pad[i : i + 1]).memory[0])
        chosen = state.select(torch.tensor([1, 0, 1]))
        three = torch.randn(3, 4, 8)
        assert_close(encoder.fuse(chosen, three).memory, encoder(features[[1, 0, 1]], three).memory)


def test_prompts_and_images_of_different_number_are_an_error():
    encoder = small()
    features, _, _ = inputs()
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        encoder(features, torch.randn(3, 4, 8))


@given(seed=st.integers(0, 999), height=st.integers(1, 4), width=st.integers(1, 4))
def test_prompt_order_and_padding_do_not_matter_and_images_are_independent(seed, height, width):
    torch.manual_seed(seed)
    encoder = small()
    features, prompt, pad = inputs(2, height, width)
    out = encoder(features, prompt, pad).memory
    order = torch.randperm(4)
    assert_close(encoder(features, prompt[:, order], pad[:, order]).memory, out, atol=1e-5, rtol=1e-4)
    changed = torch.where(pad[..., None], torch.full_like(prompt, 9.0), prompt)
    assert_close(encoder(features, changed, pad).memory, out, atol=1e-5, rtol=1e-4)
    assert_close(encoder(features[1:], prompt[1:], pad[1:]).memory[0], out[1], atol=1e-5, rtol=1e-4)


def test_a_prompt_of_padding_alone_is_finite_in_value_and_gradient():
    encoder = small()
    features, prompt, pad = inputs()
    features.requires_grad_(), prompt.requires_grad_()
    pad = torch.tensor([[True] * 4, [False] * 4])
    out = encoder(features, prompt, pad).memory
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(features.grad).all()
    assert (prompt.grad[0] == 0).all()
    other = encoder(features, torch.randn_like(prompt), pad).memory
    assert_close(out[0], other[0])


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        small()(torch.randn(1, 8, 2, 2), torch.randn(1, 0, 8))


def test_image_padding_is_as_good_as_absence():
    encoder = small()
    features, prompt, pad = inputs(1, 3, 4)
    pos = cell_positions(3, 4, 8, features)[None]
    cells = torch.zeros(1, 3, 4, dtype=torch.bool)
    cells[:, 2:], cells[:, :, 3:] = True, True
    padded = encoder(features, prompt, pad[:1], pos, cells)
    cropped = encoder(features[..., :2, :3], prompt, pad[:1], pos[..., :2, :3])
    kept = rearrange(padded.memory, "b (h w) d -> b h w d", h=3)[:, :2, :3]
    assert_close(rearrange(kept, "b h w d -> b (h w) d"), cropped.memory)
    assert_close(padded.valid_ratios, torch.tensor([[[3 / 4, 2 / 3]]]))  # width first
    assert padded.image_pad.sum() == 12 - 6


def test_levels_are_joined_and_their_code_goes_into_the_position():
    encoder = small(levels=2)
    fine, prompt, pad = inputs(2, 2, 3)
    coarse = torch.randn(2, 8, 1, 2)
    out = encoder([fine, coarse], prompt, pad)
    assert out.sizes == ((2, 3), (1, 2))
    assert out.level_starts == (0, 6)
    codes = [torch.stack(by_hand.grid_positions(2, 3, 8)), torch.stack(by_hand.grid_positions(1, 2, 8))]
    pos = torch.cat([code + encoder.level_embed[i] for i, code in enumerate(codes)])
    assert_close(out.pos[0], pos)
    tokens = [*rearrange(fine[0], "d h w -> (h w) d"), *rearrange(coarse[0], "d h w -> (h w) d")]
    theirs = by_hand.encoder(encoder.state_dict(), 2, 2, tokens, list(pos), prompt[0], pad[0])
    assert_close(out.memory[0], torch.stack(theirs), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="1 levels and the encoder was built for levels=2"):
        encoder(fine, prompt, pad)


def test_recomputing_blocks_changes_no_gradient():
    features, prompt, pad = inputs()
    encoder, saving = small(), small(recompute=True)
    saving.load_state_dict(encoder.state_dict())
    for module in (encoder, saving):
        module.train()(features, prompt, pad).memory.square().sum().backward()
    for (name, a), b in zip(encoder.named_parameters(), saving.parameters()):
        assert_close(a.grad, b.grad, msg=name)


def test_no_layer_leaves_the_image_alone_when_its_branches_are_zero():
    encoder = small()
    for name, p in encoder.named_parameters():
        if "out_proj" in name or "ffn.contract" in name:
            nn.init.zeros_(p)
    features, prompt, pad = inputs()
    assert_close(encoder(features, prompt, pad).memory, rearrange(features, "b d h w -> b (h w) d"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 6}, "dim must be a multiple of 4"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"norm": "mid"}, "norm"),
        ({"pooled_text": "max"}, "pooled_text"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises((ValueError, TypeError), match=match):  # a TypeError where annotations are checked
        FusionEncoder(**{**SMALL, **options})


def test_runs_wherever_its_inputs_are():
    with torch.device("meta"):
        encoder = FusionEncoder(**SMALL)
        out = encoder(torch.empty(2, 8, 3, 5), torch.empty(2, 4, 8), torch.empty(2, 4, dtype=torch.bool))
    assert out.memory.device.type == "meta"
    assert out.memory.shape == (2, 15, 8)


@pytest.mark.parametrize("kind", ["mean", "masked"])
def test_pooled_text_takes_several_prompts_for_one_padded_image(kind):
    encoder = small(pooled_text=kind).eval()
    features, prompt, pad = inputs()
    cells = torch.zeros(1, 2, 3, dtype=torch.bool)
    cells[:, :, 2] = True
    together = encoder(features[:1], prompt, pad, image_pad=cells)
    assert together.image_pad.shape == (2, 6)
    for i in range(2):
        alone = encoder(features[:1], prompt[i : i + 1], pad[i : i + 1], image_pad=cells)
        assert_close(together.memory[i], alone.memory[0])
        assert_close(together.valid_ratios[i], alone.valid_ratios[0])
    with pytest.raises(ValueError, match="3 prompts for 2 images: give one each"):
        encoder(features, torch.randn(3, 4, 8))


@pytest.mark.parametrize("pooled", ["none", "masked"])
def test_a_prompt_that_does_not_fit_is_one_clear_error(pooled, unchecked_shapes):
    encoder = small(pooled_text=pooled)
    features, prompt, pad = inputs()
    with pytest.raises(ValueError, match=r"pad must be \(2, 4\), one entry for each token of the prompt, got \(2, 3\)"):
        encoder(features, prompt, pad[:, :3])
    with pytest.raises(ValueError, match=r"prompt must be \(prompts, tokens, 8\), got \(2, 4, 6\)"):
        encoder(features, prompt[..., :6], pad)
    if pooled == "none":
        with pytest.raises(ValueError, match=r"pad must be \(2, 4\)"):
            encoder.fuse(encoder.image_state(features), prompt, pad[:1])
