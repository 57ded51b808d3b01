"""Scores of object queries against a prompt (SAM3, `DotProductScoring`).

Axes: layers, b image-prompt pairs, r rows, l prompt tokens, d channels.
"""

from __future__ import annotations

from typing import Literal

from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from core.registry import register
from plugins.sam3_fusion.feed_forward import BlockwiseFeedForward
from plugins.sam3_fusion.prompts import check_prompt

SCORE_LIMIT = 12.0


@register("module", paper="SAM 3 (arXiv:2511.16719), dot-product scoring")
class PromptScorer(nn.Module):
    """⟨row, prompt⟩ / √d, where the prompt is the mean of its unpadded tokens after a residual MLP.

    Every token passes t' = LN(t + W2 dropout(relu(W1 t))) first and pads are left out of the mean after it. A prompt of
    padding alone has a zero mean, so all its scores equal the product with the projection's bias; never NaN.

    Args:
        dim: channels.
        hidden: width of the MLP.
        dropout: dropout of its hidden layer, in training only.
        clamp: "hard" as built keeps logits within ±12, "none" does not.

    Raises:
        ValueError: for another `clamp`.
    """

    def __init__(self, dim: int = 256, hidden: int = 2048, dropout: float = 0.1, clamp: Literal["hard", "none"] = "hard"):
        super().__init__()
        if clamp not in ("hard", "none"):
            raise ValueError(f"clamp must be 'hard' or 'none', got {clamp!r}")
        self.clamp = clamp
        self.mlp = BlockwiseFeedForward(dim, hidden, dropout)
        self.norm = nn.LayerNorm(dim)
        self.prompt_proj, self.query_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self,
        hidden: Float[Tensor, "layers b r d"],
        prompt: Float[Tensor, "b l d"],
        pad: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "layers b r"]:
        """Logits of every row of every layer.

        Raises:
            ValueError: if the prompt does not fit the rows, or has no token.
        """
        check_prompt(prompt, pad, self.prompt_proj.in_features)
        if hidden.shape[1] != prompt.shape[0]:
            raise ValueError(f"{prompt.shape[0]} prompts for the rows of {hidden.shape[1]} pairs: give one prompt a pair")
        t = self.norm(prompt + self.mlp(prompt))
        if pad is None:
            pooled = t.mean(dim=1)
        else:
            valid = rearrange((~pad).to(t.dtype), "b l -> b l 1")
            pooled = (t * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
        scores = einsum(self.query_proj(hidden), self.prompt_proj(pooled), "layers b r d, b d -> layers b r")
        scores = scores * hidden.shape[-1] ** -0.5
        return scores.clamp(-SCORE_LIMIT, SCORE_LIMIT) if self.clamp == "hard" else scores
