"""The decode head: matrix factorisation in loops, its limits, and repeatable evaluation."""

import pytest
import torch
from torch.testing import assert_close

from plugins.sam.hamburger import HamburgerHead, MatrixDecomposition


def by_hand(x, bases, steps, eps=1e-6):
    """Alg. 1 on one sample, entry by entry. x (c, n), bases (c, r)."""
    c, n = x.shape
    r = bases.shape[1]

    def update_coefficients():
        for i in range(n):
            old = coefficients[i].clone()
            for k in range(r):
                top = sum(x[j, i] * bases[j, k] for j in range(c))
                below = sum(old[s] * sum(bases[j, s] * bases[j, k] for j in range(c)) for s in range(r))
                coefficients[i, k] = old[k] * top / (below + eps)

    coefficients = torch.stack(
        [torch.stack([sum(x[j, i] * bases[j, k] for j in range(c)) for k in range(r)]).softmax(0) for i in range(n)]
    )
    for _ in range(steps):
        update_coefficients()
        new = bases.clone()
        for j in range(c):
            for k in range(r):
                top = sum(x[j, i] * coefficients[i, k] for i in range(n))
                below = sum(bases[j, s] * sum(coefficients[i, s] * coefficients[i, k] for i in range(n)) for s in range(r))
                new[j, k] = bases[j, k] * top / (below + eps)
        bases = new
    update_coefficients()
    return bases @ coefficients.T


@torch.no_grad()
def test_factorisation_by_hand():
    nmf = MatrixDecomposition(3, rank=2, eval_steps=2).eval()
    x = torch.rand(2, 3, 2, 2)
    start = nmf.initial_bases(x.flatten(2))[0]
    assert_close(start.norm(dim=0), torch.ones(2))
    for ours, sample in zip(nmf(x), x):
        assert_close(ours.flatten(1), by_hand(sample.flatten(1), start, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_runs_in_float32_whatever_the_module_was_cast_to(dtype, training):
    x = torch.rand(1, 16, 4, 4)
    out = MatrixDecomposition(16, rank=4).to(dtype).train(training)(x.to(dtype))
    assert out.dtype == dtype
    if not training:
        assert_close(out.float(), MatrixDecomposition(16, rank=4).eval()(x), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_full_rank_reconstructs_what_has_low_rank():
    x = (torch.rand(2, 6, 1) @ torch.rand(2, 1, 12)).view(2, 6, 3, 4)  # rank 1, non-negative
    assert_close(MatrixDecomposition(6, rank=1, eval_steps=3).eval()(x), x, atol=1e-4, rtol=1e-3)


def test_evaluation_repeats_and_samples_are_independent_where_the_release_draws_anew():
    x = torch.rand(3, 8, 4, 5)
    ours, released = MatrixDecomposition(8, rank=4).eval(), MatrixDecomposition(8, rank=4, eval_seed=None).eval()
    assert torch.equal(ours(x), ours(x))
    assert_close(ours(x)[1:2], ours(x[1:2]))
    assert not torch.equal(released(x), released(x))
    state = torch.get_rng_state()
    ours(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(ours.train()(x), ours(x))


def test_gradient_flows_through_every_update():
    nmf, x, direction = MatrixDecomposition(4, rank=2, eval_steps=2).eval(), torch.rand(1, 4, 2, 2) + 0.5, torch.randn(1, 4, 2, 2)
    x.requires_grad_()
    nmf(x).square().sum().backward()
    with torch.no_grad():
        numeric = (nmf(x + 1e-2 * direction).square().sum() - nmf(x - 1e-2 * direction).square().sum()) / 2e-2
    assert float((x.grad * direction).sum()) == pytest.approx(float(numeric), rel=1e-2)


def test_half_precision_surroundings_compute_in_float32():
    nmf, x = MatrixDecomposition(8, rank=4).eval(), torch.rand(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(nmf(x), nmf(x.float()))
    assert nmf(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("in_dims", "dim", "ham_dim", "expected"),
    [
        ((128, 256, 512), 512, 512, 1_269_288),
        ((160, 320, 512), 512, 512, 1_318_440),
        ((224, 448, 640), 1024, 512, 1_765_928),
        ((224, 448, 640), 1024, None, 4_537_384),
    ],
)
def test_parameter_counts_of_both_releases(in_dims, dim, ham_dim, expected):
    with torch.device("meta"):
        head = HamburgerHead(in_dims, 40, dim=dim, ham_dim=ham_dim)
    assert sum(p.numel() for p in head.parameters()) == expected


def test_levels_are_resized_to_the_first_and_batch_norm_is_the_release_s():
    head = HamburgerHead((4, 8, 8), 5, dim=16, ham_dim=16, rank=4).eval()
    logits = head([torch.rand(2, 4, 8, 12), torch.rand(2, 8, 4, 6), torch.rand(2, 8, 2, 3)])
    assert logits.shape == (2, 5, 8, 12)
    assert {m.eps for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_one_clear_error_each():
    for name, value in (("rank", 0), ("train_steps", -1), ("eval_steps", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            HamburgerHead((4, 8), 3, 8, 8, **{name: value})
    with pytest.raises(ValueError, match="classes must be at least 2"):
        HamburgerHead((4, 4, 4), 1)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        HamburgerHead((4, 4, 4), 3, dropout=1.0)
