"""What drawing an episode costs beside reading its images.

    python benchmarks/episode_construction.py [--episodes 150]

Records as many as PACS has (9,991, in its published cells of domain and class), 5-way 5-shot with 15 queries, and images of PACS's
size (227 pixels, JPEG) decoded and resized to 84 as the recipe does. One process, CPU time. Limit: 1 ms an episode.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plugins.sap.datasets import PACS, Record
from plugins.sap.episodes import EpisodePlan

LIMIT_MS = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--episodes", type=int, default=150)
    args = parser.parse_args()
    records = [
        Record(f"{domain}/{c}/{i}.jpg", d, c, f"{domain}/{c}/{i}", False)
        for d, (domain, counts) in enumerate(PACS.published.items())
        for c, count in enumerate(counts)
        for i in range(count)
    ]
    plan = EpisodePlan(records, range(3), range(3), episodes=args.episodes)
    start = time.process_time()
    drawn = plan.epoch(0, np.random.default_rng(0))
    draw_ms = 1e3 * (time.process_time() - start) / len(drawn)

    packed = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((227, 227)).save(packed, "JPEG")
    start = time.process_time()
    for _ in drawn[0]:
        np.asarray(Image.open(io.BytesIO(packed.getvalue())).convert("RGB").resize((84, 84)))
    decode_ms = 1e3 * (time.process_time() - start)
    print(f"{len(records):,} records, {len(drawn)} episodes of {len(drawn[0])} images")
    print(f"drawing an episode   {draw_ms:8.3f} ms   (limit {LIMIT_MS:.0f} ms)")
    print(f"decoding its images  {decode_ms:8.3f} ms")
    return int(draw_ms > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
