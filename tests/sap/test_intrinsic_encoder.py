"""The intrinsic encoder: its parts by hand, its sizes, and small maps."""

import pytest
import torch
from synchronisation import NoWaiting
from torch import nn
from torch.testing import assert_close

from plugins.sap.intrinsic_encoder import BlurPool, DropBlock, IntrinsicEncoder, MixStyle, SobelEdges, StandardizedConv2d

SMALL = (8, 16, 32, 64)


def test_keys_and_sizes_of_the_release():
    encoder = IntrinsicEncoder()
    parameters = dict(encoder.named_parameters())
    assert len(parameters) == 51
    assert sum(p.numel() for p in parameters.values()) == 12_465_792
    sizes = [
        sum(p.numel() for k, p in parameters.items() if k.startswith(part))
        for part in ("stem", "layer1", "layer2", "layer3", "layer4")
    ]
    assert sizes == [2_432, 115_200, 564_480, 2_357_760, 9_425_920]
    buffers = {k for k in encoder.state_dict() if k not in parameters}
    assert buffers == {"sobel.rgb2gray", "sobel.sobel_x", "sobel.sobel_y"} | {
        f"layer{i}.{part}.kernel" for i in (1, 2, 3) for part in ("blur_pool", "downsample.2")
    }


@pytest.mark.parametrize(("size", "side"), [(84, 11), (224, 28), (64, 8)])
def test_map_sizes_of_the_release(size, side):
    encoder = IntrinsicEncoder().to("meta").eval()
    assert encoder(torch.empty(2, 3, size, size, device="meta")).shape == (2, 640, side, side)
    assert (
        IntrinsicEncoder(dilated=False).to("meta").eval()(torch.empty(1, 3, size, size, device="meta")).shape[-1] == (side + 1) // 2
    )


def test_sobel_by_hand():
    image = torch.randn(1, 3, 5, 6)
    edges = SobelEdges("zeros")(image)
    gray = torch.zeros(7, 8)
    gray[1:-1, 1:-1] = (image[0] * torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(0)
    for y in range(5):
        for x in range(6):
            g = gray[y : y + 3, x : x + 3]
            dx = g[0, 2] + 2 * g[1, 2] + g[2, 2] - g[0, 0] - 2 * g[1, 0] - g[2, 0]
            dy = g[2, 0] + 2 * g[2, 1] + g[2, 2] - g[0, 0] - 2 * g[0, 1] - g[0, 2]
            assert_close(edges[0, 3, y, x], (dx**2 + dy**2 + 1e-6).sqrt(), atol=1e-5, rtol=1e-5)
    assert_close(edges[:, :3], image)


def test_blur_pool_by_hand():
    x = torch.randn(1, 2, 5, 5)
    padded = nn.functional.pad(x, (1,) * 4)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    out = BlurPool(2)(x)
    assert out.shape == (1, 2, 3, 3)
    for c in range(2):
        for i in range(3):
            for j in range(3):
                assert_close(out[0, c, i, j], (padded[0, c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel).sum())


def test_standardized_convolution_ignores_shift_and_scale_of_its_filters():
    conv = StandardizedConv2d(3, 4, 3, bias=False)
    x = torch.randn(2, 3, 6, 6)
    before = conv(x)
    w = conv.weight.detach()
    standard = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), correction=0, keepdim=True) + 1e-5)
    assert_close(before, nn.functional.conv2d(x, standard))
    with torch.no_grad():
        conv.weight.mul_(3).add_(1)
    assert_close(conv(x), before, atol=2e-3, rtol=1e-3)


# --- regularisers -----------------------------------------------------------------------------------------------------


def test_drop_block_drops_squares_of_all_channels_at_its_rate_and_keeps_the_mean():
    drop = DropBlock(0.15)
    out = drop(torch.ones(1000, 3, 11, 11))
    dropped = out == 0
    assert (dropped[:, :1] == dropped).all()
    rate = float(dropped.float().mean())
    assert 0.11 < rate < 0.152  # overlaps lower it
    assert float(out.mean()) == pytest.approx(1.0, rel=1e-4)
    alone = [m for m in dropped[:, 0] if 0 < int(m.sum()) <= 25]
    assert alone
    assert all(int(m.sum()) == 25 for m in alone)  # the whole square is inside
    assert_close(drop.eval()(torch.ones(2, 3, 11, 11)), torch.ones(2, 3, 11, 11))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_drop_block_works_on_small_maps_and_never_takes_all_of_one(side):
    out = DropBlock(0.9)(torch.ones(200, 2, side, side))
    assert out.isfinite().all()
    assert (out == 0).any() == (side > 1)
    assert (out.amax((1, 2, 3)) > 0).all()


def test_mix_style_exchanges_statistics_and_nothing_else():
    mix = MixStyle(1.0, detach=True)
    x = torch.randn(16, 4, 6, 6) * torch.rand(16, 4, 1, 1) + torch.randn(16, 4, 1, 1)
    y = mix(x)

    def normalised(t):
        variance, mean = torch.var_mean(t, dim=(2, 3), correction=1, keepdim=True)
        return (t - mean) / variance.sqrt(), mean

    assert_close(normalised(y)[0], normalised(x)[0], atol=1e-3, rtol=1e-3)
    means = normalised(x)[1].flatten(1)
    low, high = means.amin(0), means.amax(0)
    mixed = normalised(y)[1].flatten(1)
    assert ((mixed >= low - 1e-4) & (mixed <= high + 1e-4)).all()
    assert (mixed - means).abs().max() > 0.1


def test_mix_style_tosses_its_coin_and_leaves_the_other_batches_alone():
    x = torch.randn(4, 2, 5, 5)
    mix = MixStyle(0.5)
    same = sum(bool((mix(x) == x).all()) for _ in range(200))
    assert 70 < same < 130
    assert (mix.eval()(x) == x).all()


def test_mix_style_detach_stops_the_gradient_of_the_statistics():
    grads = []
    for detach in (True, False):
        torch.manual_seed(3)
        x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        MixStyle(1.0, detach=detach)(x).sum().backward()
        grads.append(x.grad)
    # With the statistics as constants each pixel's gradient is new deviation / deviation, one number a map.
    assert_close(grads[0], grads[0].mean((2, 3), keepdim=True).expand_as(grads[0]))
    assert (grads[0] - grads[1]).abs().max() > 0.1


# --- the whole --------------------------------------------------------------------------------------------------------


def test_evaluation_treats_images_apart():
    encoder = IntrinsicEncoder(SMALL).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert_close(encoder(images)[1:2], encoder(images[1:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [16, 32, 36])
def test_small_images_train(size):
    encoder = IntrinsicEncoder(SMALL)
    out = encoder(torch.randn(4, 3, size, size))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_no_waiting():
    encoder = IntrinsicEncoder(SMALL)
    images = torch.randn(4, 3, 32, 32)
    with NoWaiting():
        encoder(images).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_odd_widths_find_their_group_count():
    encoder = IntrinsicEncoder((16, 40, 80, 160))
    assert (encoder.layer3.bn1.num_groups, encoder.layer4.bn1.num_groups, encoder.layer2.bn1.num_groups) == (16, 32, 40)


@pytest.mark.parametrize("options", [{"widths": (8, 0, 8, 8)}, {"mixstyle": 1.5}, {"drop_rate": 1.0}])
def test_bad_values_are_errors(options):
    if "drop_rate" in options:
        IntrinsicEncoder(SMALL, **options)  # stages cap it at 0.15: a rate of 1 means the caps
        options = {"drop_rate": -0.1}
    with pytest.raises(ValueError, match=r"widths|mixstyle|drop rate"):
        IntrinsicEncoder(**{"widths": SMALL, **options})


def test_how_styles_are_mixed_is_refused_where_none_is():
    with pytest.raises(ValueError, match="mixstyle_detach = False would have no effect, because mixstyle = 0"):
        IntrinsicEncoder((4, 4, 8, 8), mixstyle=0.0, mixstyle_detach=False)
    IntrinsicEncoder((4, 4, 8, 8), mixstyle_detach=False)
