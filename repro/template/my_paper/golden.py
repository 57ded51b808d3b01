"""Golden cases: how the reference's modules are built, loaded and run here (see `core.golden`)."""

from __future__ import annotations

from core.golden import Case, Replay, adapter

from my_paper.attention_pool import AttentionPool


@adapter("my_paper.AttentionPool")
def attention_pool(case: Case) -> Replay:
    """`param/query`, `in/tokens` and `out/pooled`."""
    module = AttentionPool(**case.config)
    case.load(module)
    return Replay(module, lambda inputs: {"pooled": module(inputs["tokens"])})
