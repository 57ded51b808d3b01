"""What the paper states, each as a check with a measured figure.

Published numbers that only a run on the real data can confirm are entered with `core.claims.published`.
"""

from __future__ import annotations

import torch
from core.claims import Verdict, claim, holds

from my_paper.attention_pool import AttentionPool


@claim("MY_PAPER-1", "the pooled feature does not depend on the order of the tokens", source="authors, venue year, sec. 3")
def order() -> Verdict:
    pool = AttentionPool(16)
    torch.nn.init.normal_(pool.query)
    tokens = torch.randn(8, 32, 16)
    with torch.no_grad():
        worst = float((pool(tokens) - pool(tokens[:, torch.randperm(32)])).abs().max())
    return holds(worst < 1e-6, measured=f"largest difference {worst:.1e} over 8 sets of 32 tokens")
