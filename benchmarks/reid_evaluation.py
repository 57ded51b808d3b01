"""Re-identification evaluation against a chunked torch argsort, at the size of Market-1501.

Compared: the protocol alone (junk removal, average precision, CMC). Both sides are given the same precomputed matrix of
squared Euclidean distances, so the matrix product is in neither time. CPU time of one process with one thread, the two
sides interleaved, minimum over repeats; results must agree to 1e-6.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/reid_evaluation.py [--repeats 2] [--queries 3368] [--gallery 15913]
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.metrics.reid import Labels, evaluate_distances, squared_distances

TARGET = 0.05


def sample(
    queries: int, gallery: int, identities: int = 751, cameras: int = 6, channels: int = 512, noise: float = 4.0
) -> tuple[Tensor, Labels, Labels]:
    """Distances between noisy copies of identity centres, and the labels of both sides."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((identities, channels), dtype=np.float32)

    def side(count: int) -> tuple[Tensor, Labels]:
        ids = random.integers(0, identities, count)
        features = centres[ids] + noise * random.standard_normal((count, channels), dtype=np.float32)
        unit = torch.nn.functional.normalize(torch.from_numpy(features), dim=1)
        return unit, Labels(ids, cameras=random.integers(0, cameras, count))

    (query_features, query), (gallery_features, shelf) = side(queries), side(gallery)
    chunks = [torch.from_numpy(c) for c in squared_distances(query_features, gallery_features)]
    return torch.cat(chunks), query, shelf


def argsort_evaluation(
    distances: Tensor, query: Labels, gallery: Labels, max_rank: int = 50, rows: int = 64
) -> tuple[float, Tensor]:
    """The same protocol, written down plainly: sort the whole gallery for each query, gather labels, mask, accumulate."""
    ids, cameras = torch.from_numpy(gallery.ids), torch.from_numpy(gallery.cameras)
    query_ids, query_cameras = torch.from_numpy(query.ids), torch.from_numpy(query.cameras)
    precisions: list[Tensor] = []
    curve = torch.zeros(max_rank, dtype=torch.float64)
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        order = distances[part].argsort(dim=1)
        same = ids[order] == query_ids[part, None]
        kept = ~(same & (cameras[order] == query_cameras[part, None]))
        hits = same & kept
        found = hits.sum(1)
        some = found > 0
        rank, hits, found = kept[some].cumsum(1), hits[some], found[some]
        precision = hits.cumsum(1).double() / rank.clamp(min=1)
        precisions.append((precision * hits).sum(1) / found)
        first = rank.gather(1, hits.int().argmax(1, keepdim=True))
        curve += (first <= torch.arange(1, max_rank + 1)).sum(0)
    precision = torch.cat(precisions)
    return float(precision.mean()), curve / len(precision)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    before = time.process_time()
    result = function()
    return time.process_time() - before, result


def compare(title: str, noise: float, options: argparse.Namespace) -> bool:
    distances, query, gallery = sample(options.queries, options.gallery, noise=noise)
    matrix = distances.numpy()
    first = Labels(query.ids[:64], query.cameras[:64])
    evaluate_distances(matrix[:64], first, gallery, junk="camera")  # warm-up
    argsort_evaluation(distances[:64], first, gallery)

    fast = slow = float("inf")
    for _ in range(options.repeats):
        seconds, result = timed(lambda: evaluate_distances(matrix, query, gallery, junk="camera"))
        fast = min(fast, seconds)
        seconds, (plain_map, plain_cmc) = timed(lambda: argsort_evaluation(distances, query, gallery))
        slow = min(slow, seconds)
    difference = max(abs(result.mAP - plain_map), float(np.abs(result.cmc - plain_cmc.numpy()).max()))

    tracemalloc.start()
    evaluate_distances(matrix, query, gallery, junk="camera")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    print(
        f"\n{title}: mAP {result.mAP:.6f}, rank-1 {result.rank(1):.6f}, {result.evaluated} queries evaluated, {result.skipped} skipped"
    )
    print(f"  largest difference in mAP and CMC {difference:.1e} (at most 1e-6)")
    print(f"  extra memory {peak / 2**20:.1f} MiB, where the matrix has {matrix.nbytes / 2**20:.0f} MiB")
    print(f"  ours {fast:.3f} s, torch argsort {slow:.3f} s, ratio {fast / slow:.4f} (target at most {TARGET})")
    return difference <= 1e-6 and fast / slow <= TARGET


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--queries", type=int, default=3368)
    parser.add_argument("--gallery", type=int, default=15913)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{options.queries} queries, {options.gallery} gallery images, 751 identities, 6 cameras; one thread, CPU time, minimum of {options.repeats}"
    )
    passed = [compare("a trained model", 2.4, options), compare("an untrained model, the worst case", 6.0, options)]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
