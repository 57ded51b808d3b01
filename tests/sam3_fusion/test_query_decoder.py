import math

import fusion_by_hand as by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from plugins.sam3_fusion.boxes import corners
from plugins.sam3_fusion.decoder import BoxBias, QueryDecoder

SMALL = {"dim": 8, "heads": 2, "layers": 2, "hidden": 10, "queries": 3, "dropout": 0.0}
SIZE = (2, 3)


def small(**options):
    decoder = QueryDecoder(**{**SMALL, **options})
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.4)
    return decoder


def inputs(batch=2, size=SIZE, length=4):
    tokens = size[0] * size[1]
    pad = torch.arange(length)[None].expand(batch, -1) >= torch.tensor([[length], [length - 2]])[:batch]
    return torch.randn(batch, tokens, 8), torch.randn(batch, tokens, 8), torch.randn(batch, length, 8), pad


def run(decoder, given, size=SIZE):
    memory, pos, prompt, pad = given
    return decoder(memory, size, prompt, pad, pos)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"box_bias": "linear"},
        {"box_bias": "both"},
        {"box_bias": "none"},
        {"presence": False},
        {"prompt_attention": False},
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_matches_the_equations(options, train):
    decoder = small(**options).train(train)
    given = inputs()
    ours = run(decoder, given)
    for i in range(2):
        theirs = by_hand.decoder(
            decoder.state_dict(),
            2,
            2,
            given[0][i],
            given[1][i],
            SIZE,
            given[2][i],
            given[3][i],
            kind=options.get("box_bias", "log"),
            presence=options.get("presence", True),
            text=options.get("prompt_attention", True),
            copies=2 if train else 1,
        )
        for layer, (hidden, entering, refined, z) in enumerate(theirs):
            close = {"atol": 5e-5, "rtol": 1e-3}
            assert_close(ours.hidden[layer, i], hidden, **close)
            assert_close(ours.anchors[layer, i], entering, **close)
            assert_close(ours.boxes[layer, i], refined, **close)
            if z is None:
                assert ours.presence is None
                assert ours.presence_state is None
            else:
                assert_close(ours.presence[layer, i], z[0], **close)


@pytest.mark.parametrize("kind", ["log", "linear", "both", "none"])
def test_inference_without_gradient_gives_the_same(kind):
    decoder = small(box_bias=kind).eval()
    given = inputs()
    with_gradient = run(decoder, given)
    with torch.no_grad():
        without = run(decoder, given)
    for a, b in zip(with_gradient, without):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_shapes_and_their_order():
    out = run(small().train(), inputs())
    assert out.hidden.shape == (2, 2, 6, 8)
    assert out.boxes.shape == out.anchors.shape == (2, 2, 6, 4)
    assert out.presence.shape == (2, 2)
    assert out.presence_state.shape == (2, 8)


def test_one_to_one_rows_do_not_see_one_to_many_rows():
    decoder = small()
    given = inputs()
    alone, both = run(decoder.eval(), given), run(decoder.train(), given)
    assert_close(both.hidden[:, :, :3], alone.hidden, atol=1e-5, rtol=1e-4)
    assert_close(both.presence, alone.presence, atol=1e-5, rtol=1e-4)
    assert (both.hidden[:, :, 3:] - both.hidden[:, :, :3]).abs().max() > 1e-3
    assert run(small(one_to_many=False).train(), given).hidden.shape[2] == 3


def test_each_box_step_gets_gradient_from_its_layer_and_the_next_alone():
    decoder = small(layers=3).eval()
    hidden_grads = []
    decoder.out_norm.register_forward_hook(lambda module, given, out: (out.retain_grad(), hidden_grads.append(out))[0])
    out = run(decoder, inputs())
    out.boxes[2].sum().backward()
    # boxes[2] = σ(step 2 + logit(anchors[2])), anchors[2] = σ(step 1 + logit(detached)): nothing from step 0's box
    through_box = [bool((h.grad != 0).any()) for h in hidden_grads]
    assert through_box == [False, True, True]


def test_learned_anchors_get_gradient_through_the_first_layers_bias():
    decoder = small(layers=1).eval()
    out = run(decoder, inputs())
    (with_bias,) = torch.autograd.grad(out.hidden.sum(), decoder.anchors, retain_graph=True)
    nn.init.zeros_(decoder.box_pos[1].weight)  # close the other way: the position code
    out = run(decoder, inputs())
    (grad,) = torch.autograd.grad(out.hidden.square().sum(), decoder.anchors)
    assert (with_bias != 0).any()
    assert (grad != 0).any()


def test_bias_is_zero_for_presence_and_a_sum_over_axes():
    module = BoxBias(8, 2, "log")
    boxes = torch.rand(2, 3, 4)
    bias = module(boxes, (4, 5), presence=True)
    full = bias.full().reshape(2, 2, 4, 4, 5)
    assert (full[:, :, 0] == 0).all()
    weights = {"box_bias." + k: v for k, v in module.state_dict().items()}
    theirs = by_hand.box_bias(weights, "log", 2, boxes[1], 4, 5, presence=True)
    for head in range(2):
        for row in range(1, 4):
            expected = torch.stack([torch.as_tensor(v) for v in theirs[head][row]]).reshape(4, 5)
            assert_close(full[1, head, row], expected, atol=1e-5, rtol=1e-4)


def test_zero_bias_networks_give_the_decoder_without_bias():
    biased, plain = small(), small(box_bias="none")
    plain.load_state_dict({k: v for k, v in biased.state_dict().items() if "box_bias" not in k})
    for p in biased.box_bias.parameters():
        nn.init.zeros_(p)
    given = inputs()
    assert_close(run(biased, given).hidden, run(plain, given).hidden)


@given(seed=st.integers(0, 999), height=st.integers(1, 4), width=st.integers(1, 4))
def test_images_are_independent_and_prompt_order_does_not_matter(seed, height, width):
    torch.manual_seed(seed)
    decoder = small().eval()
    memory, pos, prompt, pad = inputs(2, (height, width))
    out = decoder(memory, (height, width), prompt, pad, pos)
    alone = decoder(memory[1:], (height, width), prompt[1:], pad[1:], pos[1:])
    assert_close(out.boxes[:, 1:], alone.boxes, atol=1e-5, rtol=1e-4)
    order = torch.randperm(4)
    shuffled = decoder(memory, (height, width), prompt[:, order], pad[:, order], pos)
    assert_close(out.presence, shuffled.presence, atol=1e-5, rtol=1e-4)


def test_query_order_permutes_rows():
    decoder = small().eval()
    given = inputs()
    before = run(decoder, given)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        decoder.queries.copy_(decoder.queries[order].clone())
        decoder.anchors.copy_(decoder.anchors[order].clone())
    after = run(decoder, given)
    assert_close(after.boxes, before.boxes[:, :, order], atol=1e-5, rtol=1e-4)


def test_image_padding_is_as_good_as_absence():
    decoder = small().eval()
    memory, pos, prompt, pad = inputs(1, (1, 4))
    cells = torch.tensor([[False, False, False, True]])
    noisy = memory.clone()
    noisy[:, 3] = 50.0
    a = decoder(memory, (1, 4), prompt, pad, pos, cells)
    b = decoder(noisy, (1, 4), prompt, pad, pos, cells)
    assert_close(a.hidden, b.hidden)
    with torch.no_grad():
        assert_close(decoder(noisy, (1, 4), prompt, pad, pos, cells).hidden, a.hidden, atol=1e-5, rtol=1e-4)


def test_valid_ratio_scales_the_position_code_and_not_the_bias():
    decoder = small(layers=1).eval()
    given = inputs()
    plain = run(decoder, given)
    memory, pos, prompt, pad = given
    ones = decoder(memory, SIZE, prompt, pad, pos, valid_ratio=torch.ones(2, 2))
    assert_close(ones.hidden, plain.hidden)
    half = decoder(memory, SIZE, prompt, pad, pos, valid_ratio=torch.full((2, 2), 0.5))
    assert (half.hidden - plain.hidden).abs().max() > 1e-3
    nn.init.zeros_(decoder.box_pos[1].weight)
    assert_close(decoder(memory, SIZE, prompt, pad, pos, valid_ratio=torch.full((2, 2), 0.5)).hidden, run(decoder, given).hidden)


def test_padding_alone_and_boxes_at_the_edge_are_finite():
    decoder = small()
    with torch.no_grad():
        decoder.anchors.copy_(torch.tensor([[90.0, -90.0, 90.0, -90.0], [-90.0] * 4, [90.0] * 4]))
    memory, pos, prompt, _ = inputs()
    prompt.requires_grad_()
    out = decoder(memory, SIZE, prompt, torch.ones(2, 4, dtype=torch.bool), pos)
    (out.boxes.sum() + out.presence.sum() + out.hidden.square().sum()).backward()
    for value in (out.hidden, out.boxes, out.presence):
        assert torch.isfinite(value).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in decoder.parameters())
    assert (prompt.grad == 0).all()


def test_presence_clamp_none_passes_and_hard_stops_at_ten():
    free, hard = small(), small(presence_clamp="hard")
    for decoder in (free, hard):
        nn.init.zeros_(decoder.presence.head[2].weight)
        nn.init.constant_(decoder.presence.head[2].bias, -30.0)
    hard.load_state_dict(free.state_dict())
    given = inputs()
    assert_close(run(free, given).presence, torch.full((2, 2), -30.0))
    out = run(hard, given).presence
    assert (out == -10).all()
    (grad,) = torch.autograd.grad(out.sum(), hard.presence.head[2].bias)
    assert (grad == 0).all()


def test_feed_forward_stays_in_fp32_under_autocast():
    decoder = small().eval()
    seen = []
    decoder.blocks[0].ffn.expand.register_forward_hook(lambda m, given, out: seen.append((given[0].dtype, out.dtype)))
    decoder.blocks[0].self_attn.q_proj.register_forward_hook(lambda m, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(decoder, inputs())
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)]
    assert torch.isfinite(out.boxes).all()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(run(decoder, inputs()).boxes).all()


def test_recomputing_blocks_changes_no_gradient():
    given = inputs()
    decoder, saving = small(), small(recompute=True)
    saving.load_state_dict(decoder.state_dict())
    for module in (decoder, saving):
        out = run(module.train(), given)
        (out.hidden.square().sum() + out.boxes.sum() + out.presence.sum()).backward()
    for (name, a), b in zip(decoder.named_parameters(), saving.named_parameters()):
        assert_close(a.grad, b[1].grad, msg=name)


def test_no_input_is_changed():
    given = inputs()
    kept = [t.clone() for t in given]
    with torch.no_grad():
        run(small().eval(), given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 12, "heads": 2}, "multiple of 8"),
        ({"queries": 0}, "at least 1"),
        ({"box_bias": "cubic"}, "box_bias"),
        ({"presence_clamp": "soft"}, "presence_clamp"),
        ({"presence": False, "presence_clamp": "hard"}, "no effect"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises((ValueError, TypeError), match=match):  # a TypeError where annotations are checked
        QueryDecoder(**{**SMALL, **options})


def test_wrong_grid_and_empty_prompt_are_errors():
    memory, pos, prompt, _ = inputs()
    with pytest.raises(ValueError, match="6 tokens and a grid of 4×4 has 16"):
        small()(memory, (4, 4), prompt, None, pos)
    with pytest.raises(ValueError, match="at least one token"):
        small()(memory, SIZE, prompt[:, :0], None, pos)


def test_runs_wherever_its_inputs_are():
    with torch.device("meta"):
        decoder = QueryDecoder(**SMALL)
        out = decoder(torch.empty(2, 6, 8), SIZE, torch.empty(2, 4, 8), torch.empty(2, 4, dtype=torch.bool), torch.empty(2, 6, 8))
    assert out.boxes.device.type == "meta"


def test_boxes_start_at_the_anchors():
    decoder = QueryDecoder(**SMALL).eval()
    out = run(decoder, inputs())
    start = decoder.anchors.sigmoid().clamp(1e-3, 1 - 1e-3)
    assert_close(out.boxes[-1, 0], start, atol=1e-4, rtol=1e-3)
    assert corners(out.boxes).shape == (2, 2, 3, 4)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 200])
def test_anchors_of_a_grid_are_the_same_on_every_device(count):
    rows = max(1, round(math.sqrt(count)))
    members = [[i for i in range(count) if i * rows // count == r] for r in range(rows)]
    centres = [((j + 0.5) / len(m), (r + 0.5) / rows) for r, m in enumerate(members) for j in range(len(m))]
    made = QueryDecoder(8, 2, 1, 8, count, anchor_start="grid").anchors
    torch.testing.assert_close(made.sigmoid(), torch.tensor([(x, y, 0.25, 0.25) for x, y in centres]), rtol=1e-6, atol=1e-6)
    with torch.device("meta"):  # nothing can be counted there
        assert QueryDecoder(8, 2, 1, 8, count, anchor_start="grid").anchors.is_meta


@pytest.mark.parametrize("grad", [False, True])
def test_shapes_that_do_not_fit_are_one_clear_error(grad, unchecked_shapes):
    decoder = small().eval()
    memory, pos, prompt, pad = inputs()
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match="2 prompts for a memory of 1: the encoder gives one memory a prompt"):
            decoder(memory[:1], SIZE, prompt, pad, pos[:1])
        with pytest.raises(ValueError, match=r"prompt must be \(prompts, tokens, 8\), got \(2, 4, 6\)"):
            decoder(memory, SIZE, prompt[..., :6], pad, pos)
        with pytest.raises(ValueError, match=r"memory must be \(pairs, tokens, dim=8\), got \(2, 6, 6\)"):
            decoder(memory[..., :6], SIZE, prompt, pad)
        with pytest.raises(ValueError, match=r"pad must be \(2, 4\)"):
            decoder(memory, SIZE, prompt, pad[:, :3], pos)
