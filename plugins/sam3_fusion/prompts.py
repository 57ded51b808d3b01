"""What every fusion module asks of a prompt, checked where it enters.

Axes: p prompts, l prompt tokens, d channels.
"""

from __future__ import annotations

from torch import Tensor


def check_prompt(prompt: Tensor, pad: Tensor | None, dim: int, name: str = "prompt") -> None:
    """Tokens of the right width, at least one each, and a padding of the same length.

    Raises:
        ValueError: with the shape that is wrong and the one that is wanted.
    """
    if prompt.ndim != 3 or prompt.shape[2] != dim:
        raise ValueError(f"{name} must be (prompts, tokens, {dim}), got {tuple(prompt.shape)}")
    if prompt.shape[1] == 0:
        raise ValueError(f"the prompt needs at least one token (pad it), got shape {tuple(prompt.shape)}")
    if pad is not None and pad.shape != prompt.shape[:2]:
        raise ValueError(f"pad must be {tuple(prompt.shape[:2])}, one entry for each token of the prompt, got {tuple(pad.shape)}")
