"""Token merging: the paper's steps by hand, limits, what must hold for any tokens, and its cost."""

import pytest
import torch
from core import claims, config
from core.profile import profile, token_reports
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from token_merging.bipartite_matching import merge, unmerged
from token_merging.multimodal import TokenMerging, schedule

from by_hand import rounds

MODALITIES = ("rgb", "nir", "tir")


def tokens(batch, count, dim, seed=0):
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("count", "keep_ratio", "number"), [(8, 0.5, 1), (9, 0.6, 1), (12, 0.25, 3), (13, 0.4, 2), (2, 0.5, 1)])
def test_matches_the_papers_steps_by_hand(count, keep_ratio, number, weighted):
    module = TokenMerging(5, count, keep_ratio=keep_ratio, rounds=number, weighted=weighted)
    x = tokens(3, count, 5, seed=count)
    result = module.merged(x)
    for b in range(3):
        expected = rounds(x[b].tolist(), module.merges, weighted)
        assert len(expected) == module.num_out == result.tokens.shape[1]
        for t, (vector, patches) in enumerate(expected):
            assert_close(result.tokens[b, t], torch.tensor(vector))
            assert float(result.sizes[b, t]) == len(patches)
            assert set((result.owners[b] == t).nonzero().flatten().tolist()) == patches
            assert int(result.places[b, t]) in patches


def test_keeping_all_changes_nothing_in_value_and_gradient():
    module, x = TokenMerging(4, 6, keep_ratio=1.0), tokens(2, 6, 4).requires_grad_()
    result = module(dict.fromkeys(MODALITIES, x))
    for m in MODALITIES:
        assert torch.equal(result.tokens[m], x)
        assert torch.equal(result.masks[m], torch.ones(2, 6))
    weight = tokens(2, 6, 4, seed=1)
    (result.tokens["nir"] * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_two_tokens_that_are_one_are_merged_first():
    x = tokens(1, 8, 16)
    x[0, 3] = 2 * x[0, 6]  # one of A and one of B: cosine 1
    result = merge(unmerged(x), 1)
    assert int(result.owners[0, 3]) == int(result.owners[0, 6])
    assert_close(result.tokens[0, result.owners[0, 3]], (x[0, 3] + x[0, 6]) / 2)
    assert sorted(result.sizes[0].tolist()) == [1.0] * 6 + [2.0]


@settings(deadline=None, max_examples=25)
@given(count=st.integers(2, 20), keep=st.floats(0.3, 1.0), number=st.integers(2, 4), seed=st.integers(0, 50))
def test_whatever_the_tokens_nothing_is_lost(count, keep, number, seed):
    """Each token is the mean of its patches, so sizes and size-weighted sums are conserved, and so is the gradient of the sum."""
    module = TokenMerging(3, count, keep_ratio=keep, rounds=number)
    x = tokens(2, count, 3, seed).requires_grad_()
    result = module.merged(x)
    assert result.tokens.shape == (2, module.num_out, 3)
    assert_close(result.sizes.sum(1), torch.full((2,), float(count)))
    for b in range(2):
        assert sorted(set(result.owners[b].tolist())) == list(range(module.num_out))
        for t in range(module.num_out):
            assert_close(result.tokens[b, t], x[b][result.owners[b] == t].mean(0), rtol=1e-4, atol=1e-5)
    (result.tokens * result.sizes[..., None]).sum().backward()
    assert_close(x.grad, torch.ones_like(x), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(scale=st.floats(0.1, 10.0), seed=st.integers(0, 50))
def test_matching_sees_directions_only_and_samples_apart(scale, seed):
    module, x = TokenMerging(4, 10, keep_ratio=0.4), tokens(3, 10, 4, seed)
    result = module.merged(x)
    assert torch.equal(module.merged(x * scale).owners, result.owners)
    assert_close(module.merged(x[1:2]).tokens, result.tokens[1:2])


def test_modalities_do_not_mix_and_guides_are_not_looked_at():
    module = TokenMerging(4, 8, keep_ratio=0.5)
    patches = {m: tokens(2, 8, 4, seed=i) for i, m in enumerate(MODALITIES)}
    alone = module(patches)
    others = {**patches, "tir": tokens(2, 8, 4, seed=9)}
    mixed = module(others, {m: tokens(2, 1, 4)[:, 0] for m in MODALITIES})
    assert torch.equal(alone.tokens["rgb"], mixed.tokens["rgb"])
    assert not torch.equal(alone.tokens["tir"], mixed.tokens["tir"])
    for m in MODALITIES:
        assert_close(alone.masks[m].sum(1), torch.full((2,), 4.0))
        for b in range(2):
            (places,) = alone.masks[m][b].nonzero(as_tuple=True)
            assert sorted(alone.owners[m][b, places].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("count", "left", "number", "expected"), [(128, 26, 4, [26, 26, 25, 25]), (10, 10, 3, [0, 0, 0]), (7, 4, 2, [2, 1])]
)
def test_schedule_is_even(count, left, number, expected):
    assert schedule(count, left, number) == expected


def test_its_tokens_are_as_many_as_those_of_sdtps_and_it_says_so():
    module = TokenMerging()
    assert module.num_out == 26
    (report,) = token_reports(module).values()
    assert list(report.stages) == [("patches", 128), ("round 1", 102), ("round 2", 76), ("round 3", 51), ("round 4", 26)]
    assert not report.masked


def test_costs_one_product_of_the_two_halves_a_round():
    module, n, expected = TokenMerging(24, 128), 128, 0
    for merges in module.merges:
        expected += 3 * (n - n // 2) * (n // 2) * 24
        n -= merges
    counted = profile(module, ({m: tokens(1, 128, 24) for m in MODALITIES},), timed=False)
    assert counted.macs == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.5}, "got 1.5"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"keep_ratio": 0.2, "rounds": 3}, r"in 3 even rounds: one would merge 34 of 60.*give rounds = 4 or more"),
        ({"keep_ratio": 0.2, "rounds": 1}, "in 1 even rounds: one would merge 102 of 128.*give rounds = 4 or more"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TokenMerging(4, 128, **options)


def test_other_shapes_are_refused():
    module = TokenMerging(4, 8)
    with pytest.raises(ValueError, match=r"nir has shape \(2, 9, 4\).*num_patches = 8, dim = 4"):
        module({"rgb": tokens(2, 8, 4), "nir": tokens(2, 9, 4), "tir": tokens(2, 8, 4)})
    with pytest.raises(ValueError, match="given for rgb"):
        module({"rgb": tokens(2, 8, 4)})
    with pytest.raises(ValueError, match="at most half of 5 tokens, got merges = 3"):
        merge(unmerged(tokens(1, 5, 4)), 3)


def test_claims_are_as_entered():
    entered = claims.of("token_merging")
    assert [c.id for c in entered] == ["ToMe-1", "ToMe-2", "ToMe-3", "ToMe-4"]
    for one in entered:
        checked = claims.run(one)
        assert checked.as_expected, (one.id, checked.verdict, checked.error)


def test_the_recipe_differs_from_that_of_sdtps_in_the_token_module_alone():
    ours, theirs = config.read("token_merging:rgbnt.gin").effective(), config.read("gin/sdtps_rgbnt.gin").effective()
    differing = {key for key, a, b in config.difference(ours, theirs)}
    assert differing
    assert all(
        key.startswith(("token_merging.", "sdtps.MultiModalSDTPS.", "sdtps.TokenSparse.", "sdtps.TokenAggregation."))
        or key == "sdtps.TriModalReID.tokens"
        for key in differing
    )
