"""How long a report over many runs takes: seconds of CPU for 10,000 run folders (2,500 configurations of 4 seeds).

    python benchmarks/report_scale.py [FOLDERS]

The folders are written first, which is not counted. Limit: 30 s for 10,000.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from repro import gather, report

LIMIT_S = 30.0


def write(root: Path, count: int) -> None:
    """Run folders as a sweep leaves them, with a log of 50 steps each."""
    drawn = random.Random(0)
    for i in range(count):
        folder = root / f"run-{i:06d}"
        folder.mkdir()
        effective = {f"component.C{k}.value": str((i // 4) % (k + 2)) for k in range(40)}
        effective |= {"trainer.train.seed": str(i % 4), "sweep.index": str(i // 4)}
        (folder / "run.json").write_text(
            json.dumps({"effective": effective, "config": "gin/x.gin", "source": {}, "environment": {}})
        )
        (folder / "result.json").write_text(
            json.dumps({"metrics": {f"m{k}": drawn.random() for k in range(12)}, "expected": {}, "tables": []})
        )
        (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 50, "steps": 50}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / (s + 1)}) + "\n" for s in range(50)))


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, count)
        started = time.process_time()
        runs = gather.collect([str(root)])
        read = time.process_time() - started
        page = report.build(runs)
        report.render(page, runs, "scale", "benchmark")
        report.markdown(page, "scale")
        total = time.process_time() - started
    print(
        f"{count} run folders: read {read:.1f} s, page and tables {total - read:.1f} s, together {total:.1f} s of CPU (limit {LIMIT_S:.0f} s for 10,000)"
    )
    return int(count >= 10_000 and total > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
