"""The style-statistics encoder: its filter bank, its statistics by hand, and the oddities of the release."""

import math

import pytest
import torch
from synchronisation import NoWaiting
from torch.testing import assert_close

from plugins.sap.domain_classifier import DomainClassifier
from plugins.sap.domain_encoder import StyleStatDomainEncoder, filter_bank


def test_filters_sum_to_zero_and_have_unit_l1_norm():
    bank = filter_bank(7, use_dog=True, use_gabor=True)
    assert bank.shape == (14, 1, 7, 7)
    assert_close(bank.sum((1, 2, 3)), torch.zeros(14), atol=1e-6, rtol=0)
    assert_close(bank.abs().sum((1, 2, 3)), torch.ones(14))
    assert int(torch.linalg.matrix_rank(bank.flatten(1).double(), rtol=1e-5)) == 13  # DoG 3 lies in the span of DoG 1 and 2


@pytest.mark.parametrize(("dog", "gabor", "count"), [(True, True, 14), (False, True, 11), (True, False, 6), (False, False, 3)])
def test_every_choice_of_filters_builds_and_runs(dog, gabor, count):
    encoder = StyleStatDomainEncoder(use_dog=dog, use_gabor=gabor)
    assert encoder.filter_bank.gain.shape == (count,)
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 64)


def test_statistics_by_hand():
    encoder = StyleStatDomainEncoder(8).eval()
    with torch.no_grad():
        encoder.filter_bank.gain.uniform_(0.5, 2)
        encoder.stat_pool.gram_gain.uniform_(0.5, 2)
        encoder.energy.norm.weight.uniform_(0.5, 2)
    images = torch.randn(2, 3, 16, 12)
    found = encoder.statistics(images)
    for b in range(2):
        gray = sum(w * channel for w, channel in zip((0.2989, 0.5870, 0.1140), images[b]))
        padded = torch.zeros(22, 18)
        padded[3:-3, 3:-3] = gray
        energy = torch.zeros(14, 16, 12)
        for f in range(14):
            kernel = encoder.filter_bank.base_weight[f, 0] * encoder.filter_bank.gain[f].detach()
            for y in range(16):
                for x in range(12):
                    energy[f, y, x] = ((padded[y : y + 7, x : x + 7] * kernel).sum() ** 2 + 1e-6).sqrt()
        energy = (energy - energy.mean()) / (energy.var(correction=0) + 1e-5).sqrt()
        energy = energy * encoder.energy.norm.weight.detach()[:, None, None]
        parts = []
        for scale in (1, 2, 4):
            pooled = energy.reshape(14, 16 // scale, scale, 12 // scale, scale).mean((2, 4)).flatten(1)
            parts += [pooled.mean(1), (pooled.var(1, correction=0) + 1e-6).sqrt().log()]
        mixed = encoder.stat_pool.gram_gain.detach()[:, None] * (encoder.stat_pool.gram_proj_in @ energy.flatten(1))
        gram = mixed @ mixed.t() / (16 * 12)
        parts.append(encoder.stat_pool.gram_proj_out @ torch.stack([gram[i, j] for i in range(16) for j in range(i, 16)]))
        assert_close(found[b].detach(), torch.cat(parts), atol=2e-5, rtol=1e-4)


def test_the_three_means_are_copies_where_the_sides_divide_by_four():
    with torch.no_grad():
        means = [StyleStatDomainEncoder().statistics(torch.randn(2, 3, 64, 64))[:, i * 28 : i * 28 + 14] for i in range(3)]
        torch.manual_seed(0)
        encoder, images = StyleStatDomainEncoder(), torch.randn(2, 3, 64, 64)
        means = [encoder.statistics(images)[:, i * 28 : i * 28 + 14] for i in range(3)]
    assert_close(means[1], means[0], atol=1e-6, rtol=0)
    assert_close(means[2], means[0], atol=1e-6, rtol=0)


def test_contrast_and_brightness():
    """Filters sum to zero and energies are normalised: neither brightness nor contrast shows away from the border."""
    encoder = StyleStatDomainEncoder(padding_mode="replicate").eval()
    images = torch.randn(2, 3, 32, 32) * 4
    with torch.no_grad():
        plain, changed = encoder.statistics(images), encoder.statistics(images * 2 + 1)
    assert_close(plain, changed, atol=1e-3, rtol=1e-3)


def test_zero_padding_frames_a_bright_image_and_replicate_does_not():
    bright = torch.full((1, 3, 32, 32), 2.0)
    zeros, replicate = (StyleStatDomainEncoder(padding_mode=mode).filter_bank(bright) for mode in ("zeros", "replicate"))
    assert float(replicate.detach().abs().max()) < 1e-6
    assert float(zeros.detach().abs().max()) > 0.5
    assert float(zeros[..., 3:-3, 3:-3].detach().abs().max()) < 1e-6


def test_output_is_bounded_by_the_clamped_scale():
    encoder = StyleStatDomainEncoder(token_scale_init=50.0)
    with torch.no_grad():
        encoder.token_head.fc2.weight.mul_(1e4)
    out = encoder(torch.randn(4, 3, 32, 32))
    assert float(out.detach().abs().max()) == pytest.approx(10.0, rel=1e-3)


def test_keys_and_sizes_of_the_release():
    encoder = StyleStatDomainEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 54_947
    assert len(list(encoder.parameters())) == 11
    assert {k for k in encoder.state_dict() if k not in dict(encoder.named_parameters())} == {
        "filter_bank.rgb2gray", "filter_bank.base_weight", "stat_pool.gram_proj_in", "stat_pool.gram_proj_out",
    }  # fmt: skip
    assert encoder.stat_pool.dim == 148
    assert sum(p.numel() for p in DomainClassifier().parameters()) == 4_420


def test_construction_draws_its_constants_without_the_global_stream():
    torch.manual_seed(5)
    a = StyleStatDomainEncoder().stat_pool.gram_proj_in
    torch.manual_seed(6)
    assert_close(a, StyleStatDomainEncoder().stat_pool.gram_proj_in, atol=0, rtol=0)


def test_no_waiting():
    encoder, classifier = StyleStatDomainEncoder(), DomainClassifier()
    images = torch.randn(2, 3, 32, 32)
    with NoWaiting():
        classifier(encoder(images)).sum().backward()
    assert all(p.grad is not None for module in (encoder, classifier) for p in module.parameters())


def test_bad_sizes_are_errors():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        StyleStatDomainEncoder(kernel_size=6)
    with pytest.raises(ValueError, match="n_domains"):
        DomainClassifier(n_domains=1)
    assert math.isfinite(float(StyleStatDomainEncoder(kernel_size=5)(torch.randn(1, 3, 16, 16)).detach().sum()))


@pytest.mark.parametrize("option", [{"gram_rank": 3}, {"gram_out_dim": 8}])
def test_an_option_of_the_gram_part_is_refused_without_it(option):
    with pytest.raises(ValueError, match="would have no effect, because use_gram_stats = False"):
        StyleStatDomainEncoder(use_gram_stats=False, **option)
    StyleStatDomainEncoder(**option)
