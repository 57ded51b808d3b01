"""Attention pooling in slow loops over numbers, written from eq. 1-2, and the golden case that they make.

    python tests/by_hand.py       writes tests/golden/attention_pool.safetensors again

Where the authors' code is at hand, compute the cases from that instead: the file's format is the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

Tokens = list[list[list[float]]]  # batch, tokens, channels


def pooled(tokens: Tokens, query: list[float], temperature: float) -> list[list[float]]:
    """y of eq. 2 for every sample."""
    result = []
    for sample in tokens:
        scores = []
        for token in sample:
            product = 0.0
            for x, q in zip(token, query):
                product += x * q
            scores.append(product / (temperature * math.sqrt(len(query))))
        total = sum(math.exp(s) for s in scores)
        y = [0.0] * len(query)
        for token, score in zip(sample, scores):
            for i, x in enumerate(token):
                y[i] += math.exp(score) / total * x
        result.append(y)
    return result


def main() -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    temperature, step = 0.5, 1e-5
    tokens, query, cotangent = torch.randn(2, 5, 4), torch.randn(4), torch.randn(2, 4)

    def total(tokens: torch.Tensor, query: torch.Tensor) -> float:
        y = pooled(tokens.tolist(), query.tolist(), temperature)
        return sum(a * b for row, other in zip(y, cotangent.tolist()) for a, b in zip(row, other))

    def slope(which: int) -> torch.Tensor:
        """Central differences, one number at a time."""
        given = [tokens.double(), query.double()]
        found = torch.zeros_like(given[which])
        for i in range(found.numel()):
            sides = []
            for sign in (1, -1):
                moved = [g.clone() for g in given]
                moved[which].view(-1)[i] += sign * step
                sides.append(total(moved[0], moved[1]))
            found.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
        return found.float()

    tensors = {
        "param/query": query,
        "in/tokens": tokens,
        "out/pooled": torch.tensor(pooled(tokens.tolist(), query.tolist(), temperature)),
        "grad/cotangent/pooled": cotangent,
        "grad/in/tokens": slope(0),
        "grad/param/query": slope(1),
    }
    meta = {
        "module": "my_paper.AttentionPool",
        "config": {"dim": 4, "temperature": temperature},
        "notes": "by hand, tests/by_hand.py; gradients by central differences",
    }
    path = Path(__file__).parent / "golden" / "attention_pool.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"meta": json.dumps(meta)})


if __name__ == "__main__":
    main()
