"""The ledger gives the verdicts that it states, without a warning, and another one as soon as a fact behind it is broken."""

import copy
import warnings

import pytest
import torch

from core import claims
from plugins.sdtps import claims as checks
from plugins.sdtps import token_sparse

BY_ID = {c.id: c for c in claims.of("sdtps")}


def outcome(id):
    checked = claims.run(BY_ID[id])
    assert checked.verdict is not None, checked.error
    return checked.verdict.outcome


@pytest.mark.parametrize("id", BY_ID)
def test_the_ledger_gives_the_verdict_that_it_states(id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        checked = claims.run(BY_ID[id])
    assert checked.as_expected, (checked.verdict, checked.error)


def altered(sparse=None, aggregate=None, **options):
    """`_module` with some of its arguments replaced, whatever a check asks for."""
    original = checks._module

    def build(given_sparse=None, given_aggregate=None, **given):
        return original(
            given_sparse if sparse is None else sparse,
            given_aggregate if aggregate is None else aggregate,
            **{**given, **options},
        )

    return build


@pytest.mark.parametrize(
    ("id", "broken", "verdict"),
    [
        ("SDTPS-2", {"attention_no_grad": True}, "does not hold"),  # nothing is saved
        ("SDTPS-5", {"sparse": {}}, "does not hold"),  # plan A is hard selection
        ("SDTPS-gumbel", {"aggregate": {"mask_mode": "none"}}, "does not hold"),  # no penalty blows up
        ("SDTPS-gumbel", {"aggregate": {"mask_mode": "additive"}}, "holds"),  # the noise blows up wherever it acts
        ("SDTPS-gradient", {"sparse": {"extra_mode": "none"}}, "holds"),  # disconnected altogether
        ("SDTPS-gradient", {"sparse": {}}, "does not hold"),  # connected altogether
    ],
)
def test_a_broken_fact_changes_the_verdict(id, broken, verdict, monkeypatch):
    monkeypatch.setattr(checks, "_module", altered(**broken))
    assert outcome(id) == verdict


def _penalty_of_one(forward, net, tokens, mask):
    net.mask_penalty = 1.0
    return forward(net, tokens, mask)


def _without_scale(forward, net, tokens, mask):
    plain = copy.deepcopy(net)
    plain.scale.data.fill_(1.0)
    return forward(plain, tokens, mask)


@pytest.mark.parametrize(
    ("id", "broken"),
    [
        ("SDTPS-7", lambda forward, net, tokens, mask: forward(net, tokens, None)),  # reads no mask
        (
            "SDTPS-7",
            lambda forward, net, tokens, mask: forward(net, tokens, None if mask is None else mask.exp()),
        ),  # adds D, not log D
        ("SDTPS-8", lambda forward, net, tokens, mask: forward(net, tokens, None)),
        (
            "SDTPS-8",
            lambda forward, net, tokens, mask: forward(net, tokens, None if mask is None else 1 - mask),
        ),  # masks what is kept
        ("SDTPS-8", _penalty_of_one),
        ("SDTPS-10", _without_scale),
        ("SDTPS-10", lambda forward, net, tokens, mask: forward(net, net.weight[0](tokens), mask)),  # combines normalised tokens
    ],
)
def test_a_broken_aggregation_changes_the_verdict(id, broken, monkeypatch):
    forward = checks.TokenAggregation.forward
    monkeypatch.setattr(checks.TokenAggregation, "forward", lambda net, tokens, mask=None: broken(forward, net, tokens, mask))
    assert outcome(id) == "does not hold"


def test_noise_that_is_not_gumbels_changes_the_verdict(monkeypatch):
    monkeypatch.setattr(token_sparse, "gumbel_noise", lambda uniform, eps, clip: 0 * uniform)
    assert outcome("SDTPS-gumbel") == "does not hold"


def test_what_saves_neither_time_nor_memory_does_not_hold(monkeypatch):
    monkeypatch.setattr(checks, "_saved_bytes", lambda work: 1)
    assert outcome("SDTPS-2") == "does not hold"


def test_what_saves_and_changes_no_gradient_holds(monkeypatch):
    memory = iter((1, 2))
    monkeypatch.setattr(checks, "_cpu_seconds", lambda works: {True: 1.0, False: 2.0})
    monkeypatch.setattr(checks, "_saved_bytes", lambda work: next(memory))
    monkeypatch.setattr(checks, "_module", altered(attention_no_grad=True))
    assert outcome("SDTPS-2") == "holds"


def test_a_relaxed_selection_without_a_gap_would_hold(monkeypatch):
    monkeypatch.setattr(checks.MultiModalSDTPS, "train_evaluation_gap", lambda self, *_: {"rgb": torch.zeros(())})
    assert outcome("SDTPS-5") == "holds"


def test_the_memory_that_autograd_keeps_is_counted_once_a_storage():
    x = torch.zeros(1000, requires_grad=True)
    assert checks._saved_bytes(lambda: (x * x).sum()) == 4000
    assert checks._saved_bytes(lambda: (x.exp() * 2).sum()) == 4000
    assert checks._saved_bytes(lambda: x.detach().exp()) == 0


def test_the_cost_is_stated_for_module_head_and_whole_network():
    measured = claims.run(BY_ID["SDTPS-14"]).verdict.measured
    for part in ("module", "head", "whole network"):
        assert part in measured
