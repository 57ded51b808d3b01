"""Golden adapters of the core itself: protocols that no paper owns."""

from __future__ import annotations

import torch
from torch import Tensor

from core.golden import Case, Replay, adapter
from core.metrics.reid import Labels, evaluate_features


@adapter("ReIDEvaluation")
def reid_evaluation(case: Case) -> Replay:
    """mAP and CMC under the junk rule that the case names."""

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        query, gallery = (
            Labels(inputs[f"{s}_ids"], inputs.get(f"{s}_cameras"), inputs.get(f"{s}_scenes")) for s in ("query", "gallery")
        )
        result = evaluate_features(
            inputs["query_features"],
            inputs["gallery_features"],
            query,
            gallery,
            junk=case.meta["junk"],
            max_rank=case.meta["max_rank"],
            normalise=case.meta["normalise"],
        )
        return {"cmc": torch.from_numpy(result.cmc), "mAP": torch.tensor(result.mAP, dtype=torch.float64)}

    return Replay(None, run)
