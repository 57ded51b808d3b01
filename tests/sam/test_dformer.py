"""The backbone against its equations in loops over pixels, its published tables, and the release's own numbers."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import plugins.sam.golden  # noqa: F401  (claims the golden cases)
from core import golden
from core.layers import DropPath
from plugins.sam.dformer import SIZES, DFormer, DFormerv2, GeometryAttention, GeometryPrior, resize_depth, rotary_angles, rotate

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"dims": (8, 16, 16, 32), "depths": (1, 1, 2, 1), "heads": (2, 2, 2, 4)}
H, W, C, HEADS = 3, 4, 8, 2


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    model = DFormer(**{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def by_hand_attention(attention, prior, x, depth, *, index="raster1d", mode="logit_bias", full):
    """Geometry self-attention of DFormerv2 (its sec. 3.2), full or along rows and columns, pixel by pixel. x (h, w, c), depth (h, w)."""
    h, w, c = x.shape
    d = c // HEADS
    speed = [10000 ** -(j / (d // 2 - 1)) if d > 2 else 1.0 for j in range(d // 2)]
    value = torch.stack([torch.stack([attention.to_value(x[i, j]) for j in range(w)]) for i in range(h)])

    def turned(linear, i, j, factor):
        out = (linear(x[i, j]) * factor).view(HEADS, d).clone()
        rotated = out.clone()
        for pair in range(d // 2):
            if index == "raster1d":
                angle = (i * w + j) * speed[pair]
            else:
                half = d // 4
                axis = [10000 ** -(n / (half - 1)) if half > 1 else 1.0 for n in range(half)]
                angle = i * axis[pair] if pair < half else j * axis[pair - half]
            a, b = out[:, 2 * pair], out[:, 2 * pair + 1]
            rotated[:, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            rotated[:, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return rotated

    q = {(i, j): turned(attention.to_query, i, j, 1.0) for i in range(h) for j in range(w)}
    k = {(i, j): turned(attention.to_key, i, j, d**-0.5) for i in range(h) for j in range(w)}

    def attend(p, others, values):
        out = []
        for head in range(HEADS):
            decay = math.log(1 - 2 ** (-2 - 4.0 * head / HEADS))
            logits, priors = [], []
            for o in others:
                near = abs(p[0] - o[0]) + abs(p[1] - o[1])
                far = abs(float(depth[p] - depth[o]))
                priors.append(decay * (float(prior.weight[0]) * near + float(prior.weight[1]) * far))
                logits.append(float(q[p][head] @ k[o][head]))
            if mode == "logit_bias":
                weights = torch.tensor([a + b for a, b in zip(logits, priors)]).softmax(0)
            else:
                weights = torch.tensor(logits).softmax(0) * torch.tensor(priors).exp()
            out.append(sum(weight * values[o].view(HEADS, d)[head] for weight, o in zip(weights, others)))
        return torch.cat(out)

    pixels = [(i, j) for i in range(h) for j in range(w)]
    values = {p: value[p] for p in pixels}
    if full:
        mixed = {p: attend(p, pixels, values) for p in pixels}
    else:
        rows = {p: attend(p, [(p[0], j) for j in range(w)], values) for p in pixels}
        mixed = {p: attend(p, [(i, p[1]) for i in range(h)], rows) for p in pixels}
    padded = torch.zeros(h + 4, w + 4, c)
    padded[2:-2, 2:-2] = value
    out = torch.empty_like(x)
    for i, j in pixels:
        local = (padded[i : i + 5, j : j + 5] * attention.enhance.weight[:, 0].permute(1, 2, 0)).sum(
            (0, 1)
        ) + attention.enhance.bias
        out[i, j] = attention.to_out(mixed[i, j] + local)
    return out


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("index", "mode"), [("raster1d", "logit_bias"), ("axial2d", "logit_bias"), ("raster1d", "post_softmax_product")]
)
@torch.no_grad()
def test_geometry_attention_by_hand(index, mode, full):
    attention, prior = GeometryAttention(C, HEADS, decomposed=not full, mode=mode), GeometryPrior(HEADS, 4.0)
    prior.weight.copy_(torch.tensor([0.7, 1.9]))
    stage = 3 if full else 0
    model = DFormer(dims=(C, C, C, C), depths=(1, 1, 1, 1), heads=(HEADS,) * 4, rope_index=index)
    x, depth = torch.randn(2, H, W, C), torch.rand(2, 1, H, W)
    ours = attention(x, model.distances(depth, stage, (H, W)), prior)
    for b in range(2):
        expected = by_hand_attention(attention, prior, x[b], depth[b, 0], index=index, mode=mode, full=full)
        assert_close(ours[b], expected, atol=1e-5, rtol=1e-5)


def test_decay_table():
    assert_close(GeometryPrior(4, 4.0).decay, torch.tensor([-0.28768, -0.13353, -0.06454, -0.03175]), atol=5e-6, rtol=0)
    eight, sixteen = GeometryPrior(8, 6.0).decay, GeometryPrior(16, 6.0).decay
    assert_close(eight[[0, 1, -1]], torch.tensor([-0.28768, -0.16093, -0.00659]), atol=5e-6, rtol=0)
    assert_close(sixteen[-1], torch.tensor(-0.00508), atol=5e-6, rtol=0)


def test_angles_of_the_largest_stage_are_exact_in_float32_whatever_the_model():
    angles = rotary_angles(16, "raster1d", (120, 160), torch.device("cpu"))
    assert angles.shape == (120, 160, 8)
    assert float(angles[119, 159, 0]) == 19_199.0
    x = torch.randn(1, 2, 3, 1, 4)
    assert rotate(x.bfloat16(), torch.ones(2, 3, 2), torch.zeros(2, 3, 2)).dtype == torch.bfloat16


@given(seed=st.integers(0, 99))
def test_rotation_keeps_lengths_and_depends_on_the_offset_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1, 1, 8, generator=generator).expand(1, 1, 6, 1, 8) for _ in range(2))
    angles = rotary_angles(8, "raster1d", (1, 6), torch.device("cpu"))
    a, b = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
    assert_close(a.norm(dim=-1), q.norm(dim=-1))
    products = torch.einsum("bhikd,bhjkd->ij", a, b)
    for offset in range(-5, 6):
        diagonal = products.diagonal(offset)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_without_prior_weights_depth_does_not_matter():
    model = tiny()
    image, depth = torch.randn(1, 3, 64, 64), torch.rand(1, 1, 64, 64)
    before = model(image, depth)[3]
    assert (model(image, depth.square())[3] - before).abs().max() > 1e-6
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GeometryPrior):
                module.weight.zero_()
    assert_close(model(image, depth)[3], model(image, depth.square())[3])


def test_depth_gradient_reaches_the_prior_weights_and_only_channel_zero_counts():
    model = tiny()
    image, depth = torch.randn(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    sum(f.square().sum() for f in model(image, depth)).backward()
    grads = [m.weight.grad for m in model.modules() if isinstance(m, GeometryPrior)]
    assert len(grads) == 5
    assert all(float(g.abs().min()) > 0 for g in grads)
    other = depth.clone()
    other[:, 1:] = 0
    assert_close(model(image, depth)[3], model(image, other)[3])


def test_constant_depth_cancels():
    """Only differences of depth count: adding a constant changes nothing."""
    model, image, depth = tiny(), torch.randn(1, 3, 64, 64), torch.rand(1, 1, 64, 64)
    for a, b in zip(model(image, depth), model(image, depth + 3)):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_samples_are_independent_and_sizes_need_not_be_round():
    model, image, depth = tiny(), torch.randn(3, 3, 72, 100), torch.rand(3, 1, 72, 100)
    together = model(image, depth)
    assert [f.shape[-2:] for f in together] == [(18, 25), (9, 13), (5, 7), (3, 4)]
    for a, b in zip(together, model(image[1:2], depth[1:2])):
        assert_close(a[1:2], b, atol=1e-5, rtol=1e-4)


def test_area_resize_averages_and_bilinear_samples():
    depth = torch.arange(64.0).view(1, 1, 8, 8)
    assert_close(resize_depth(depth, (2, 2), "area")[0], torch.tensor([[13.5, 17.5], [45.5, 49.5]]))
    assert float(resize_depth(depth, (1, 1), "bilinear")) == pytest.approx((27 + 28 + 35 + 36) / 4)


def test_layer_scale_and_hooks():
    model = tiny(layer_scale=(None, None, 0.0, None))
    with torch.no_grad():
        for block in model.stages[2].blocks:
            block.gamma1.zero_()
            block.gamma2.zero_()
    image, depth, seen = torch.randn(1, 3, 64, 64), torch.rand(1, 1, 64, 64), []

    def noise(x, stage, block):
        seen.append((stage, block))
        return torch.randn_like(x) if stage == 2 else x

    plain = model(image, depth)
    for a, b in zip(plain, model(image, depth, after_attention=noise)):  # scaled to nothing, as SAM in B and L at the start
        assert_close(a, b)
    assert seen == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    exported = model(image, depth, after_stage=lambda x, stage: 2 * x if stage == 0 else x)
    assert_close(exported[0], 2 * plain[0])
    assert_close(exported[1], plain[1])  # the trunk is untouched


def test_stochastic_depth_rises_to_its_rate():
    rates = [m.rate for m in tiny(drop_path=0.4).modules() if isinstance(m, DropPath)]
    assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))


def test_initialisation_of_the_release():
    model = DFormerv2("S")
    linear = model.stages[2].blocks[0].attention.to_query
    assert float(linear.weight.std()) == pytest.approx(0.02, abs=5e-4)
    assert float(linear.bias.abs().max()) == 0
    assert all(float((m.weight - 1).abs().max()) == 0 for m in model.modules() if isinstance(m, GeometryPrior))


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"), [("S", 25_416_730, 780), ("B", 52_604_610, 1246), ("L", 93_784_146, 1246)]
)
def test_published_sizes(size, parameters, tensors):
    with torch.device("meta"):
        model = DFormerv2(size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    blocks = sum(SIZES[size]["depths"])
    assert len(model.state_dict()) + 2 * blocks == tensors  # the release also stores two constants a block


def test_one_clear_error_each():
    with pytest.raises(ValueError, match=r"they must be aligned"):
        tiny()(torch.randn(1, 3, 64, 64), torch.rand(1, 1, 64, 60))
    with pytest.raises(ValueError, match="depths must have one entry for each"):
        DFormer(depths=(1, 2))
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        DFormer(drop_path=1.0)
    with pytest.raises(ValueError, match="channels of a head must be even"):
        DFormer(heads=(5, 4, 8, 16))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("dformer_*.safetensors")), ids=lambda p: p.stem)
def test_release_parity(path):
    result = golden.compare(golden.read(path))
    assert result.passed, result.failures
    assert result.compared == 4
