"""What a module that drops or merges tokens says of its last forward.

Such a module has a method

    def token_report(self) -> TokenReport:
        return TokenReport([("patches", 128), ("kept", 64), ("aggregated", 25), ("with extra", 26)], masked=False)

which the profile calls after it ran the module. Counts that depend on the data are those of that forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """Tokens of one sample as they pass a module, stage by stage.

    Attributes:
        stages: (name, tokens) from what comes in to what goes out.
        masked: dropped tokens are multiplied by zero and still computed; False says they are gathered out, and gone.
        theoretical_macs: of a masked module, the MACs it would take if it computed the kept tokens only; None if unknown.
        class_tokens: tokens that travel beside the patches and are not in `stages`.
    """

    stages: Sequence[tuple[str, int]]
    masked: bool = False
    theoretical_macs: int | None = None
    class_tokens: int = 0

    def __post_init__(self) -> None:
        counts = [count for _, count in self.stages]
        if len(counts) < 2 or counts[0] < 1:
            raise ValueError(f"stages must have an input and an output stage, and a token to begin with; got {list(self.stages)}")
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(
                f"token counts must be non-negative int, got {list(self.stages)}; a mean over samples is not one sample's count"
            )
        object.__setattr__(self, "stages", tuple((str(name), count) for name, count in self.stages))

    def __getitem__(self, stage: str) -> int:
        """Tokens of a stage by name."""
        for name, count in self.stages:
            if name == stage:
                return count
        raise KeyError(f"no stage {stage!r}; there are {', '.join(name for name, _ in self.stages)}")

    @property
    def tokens_in(self) -> int:
        return self.stages[0][1]

    @property
    def tokens_out(self) -> int:
        return self.stages[-1][1]

    @property
    def ratio(self) -> float:
        """Tokens out over tokens in, without class tokens."""
        return self.tokens_out / self.tokens_in

    @property
    def ratio_with_class(self) -> float:
        """The same with the class tokens on both sides."""
        return (self.tokens_out + self.class_tokens) / (self.tokens_in + self.class_tokens)

    @property
    def ratio_with_class_out(self) -> float:
        """Tokens out with class tokens over patches in: what papers print that count the class token only at the end."""
        return (self.tokens_out + self.class_tokens) / self.tokens_in

    def to_dict(self) -> dict[str, Any]:
        return {
            "stages": [list(stage) for stage in self.stages],
            "masked": self.masked,
            "theoretical_macs": self.theoretical_macs,
            "class_tokens": self.class_tokens,
            "ratio": self.ratio,
            "ratio_with_class": self.ratio_with_class,
            "ratio_with_class_out": self.ratio_with_class_out,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenReport:
        stages = [(name, count) for name, count in data["stages"]]
        return cls(stages, data["masked"], data["theoretical_macs"], data["class_tokens"])


def token_reports(module: nn.Module) -> dict[str, TokenReport]:
    """The report of every module that gives one, by module name."""
    found: dict[str, TokenReport] = {}
    for name, part in module.named_modules():
        report = getattr(part, "token_report", None)
        if callable(report):
            given = report()
            if not isinstance(given, TokenReport):
                raise TypeError(f"{type(part).__name__}.token_report() must give a TokenReport, got {type(given).__name__}")
            found[name] = given
    return found
