"""Write docs/pareto.md and its picture: accuracy, compute and latency of tokens dropped or merged inside the tower.

    python -m repro.sweep --gin gin/sdtps/pruned.gin --set trainer.train.threads=1 --grid KEEP=1.0,0.75,0.5,0.25 --grid SEED=0..2 --runs runs/pareto
    python -m repro.sweep --gin token_merging:pruned.gin --set trainer.train.threads=1 --grid KEEP=0.75,0.5,0.25 --grid SEED=0..2 --runs runs/pareto
    python docs/make_pareto.py runs/pareto

Accuracy comes from the run folders. MACs are counted, and latency is measured here and now: all models in one process on one
thread, turn and turn about, the median of `--repeats` forwards of `--batch` samples. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from core import config as configs
from core import data, profile
from core.profile import count, measure
from repro import gather
from repro.profile import build

PAGE = Path(__file__).with_name("pareto.md")
METRIC = "mAP[camera]"
METHODS = {"sdtps": "selection (SDTPS)", "token_merging": "merging (ToMe)"}
HEAD = """# Fewer tokens inside the tower: accuracy against compute

SDTPS stands after the backbone and saves nothing there. Here the same selection stands *inside* the small tower of the sample, after block 1
of 4, so that three blocks see only what is kept; beside it token merging in the manner of ToMe (`examples/token_merging`) in the same
place. Selection leaves one token more than merging at the same share: the extra token that pools what it dropped. Written by `python docs/make_pareto.py runs/pareto`, whose head has the commands that train.

Generated sample, 120 steps; mAP is mean ± standard deviation over seeds (their number in brackets). GMACs are those of the whole network for one
sample of three spectra. Latency: {batch} samples, one thread of {device}, median of {repeats} forwards, all models in one process.

![mAP against GMACs and against latency](pareto.png)

How to read it: latency falls with the counted MACs, not quite in proportion, so compute really falls, and both ways of shortening fall alike. Selection and merging are told
apart only where their bars do not overlap; three seeds tell little, and a person's identity in this sample is spread over the whole body.

| tokens | kept share | tokens in blocks 2 to 4 | mAP (camera) | GMACs | of all | latency (ms) | of all |
|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    points = [point(group, args.batch) for group in gather.groups(gather.collect(args.runs))]
    if not points:
        print(f"error: no finished run below {' '.join(args.runs)}", file=sys.stderr)
        return 2
    latencies(points, args.repeats)
    points.sort(key=lambda p: (p["method"], -p["keep"]))
    whole = max(points, key=lambda p: p["keep"])
    lines = [
        f"| {p['method']} | {p['keep']:.2f} | {p['tokens']} | {p['accuracy'].text(3)} | {p['macs'] / 1e9:.3f} | "
        f"{p['macs'] / whole['macs']:.3f} | {1e3 * p['seconds']:.1f} | {p['seconds'] / whole['seconds']:.3f} |"
        for p in points
    ]
    head = HEAD.format(batch=args.batch, repeats=args.repeats, device=measure.device_name(torch.device("cpu")))
    PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    draw(points, whole)
    return 0


def point(group: gather.Group, batch: int) -> dict[str, Any]:
    """A setting's accuracy over its seeds, its model without training, and its counted cost."""
    run = group.runs[0]
    config = configs.read(str(run.path / "operative.gin"))
    task = build(config)
    model = task.blueprint().eval()
    ((key, keep),) = [(k, v) for k, v in run.effective.items() if k.endswith((".sparse_ratio", ".keep_ratio"))]
    with torch.no_grad():
        counted = profile.profile(model, data.to_device(task.profile_inputs(1), torch.device("cpu")), timed=False)
    (stages,) = [report.stages for report in counted.tokens.values()][:1]
    inputs, named = count.arguments(task.profile_inputs(batch))
    return {
        "method": METHODS[key.split(".")[0]], "keep": float(keep), "tokens": stages[-1][1], "accuracy": gather.spread(group, METRIC), "macs": counted.macs,
        "forward": lambda: model(*inputs, **named),
    }  # fmt: skip


def latencies(points: list[dict[str, Any]], repeats: int) -> None:
    """Median seconds of a forward, all settings interleaved."""
    times: list[list[float]] = [[] for _ in points]
    with torch.no_grad():
        for number in range(repeats + 2):
            for one, spent in zip(points, times):
                start = time.perf_counter()
                one["forward"]()
                if number >= 2:
                    spent.append(time.perf_counter() - start)
    for one, spent in zip(points, times):
        one["seconds"] = statistics.median(spent)


def draw(points: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, scale, label in ((panels[0], "macs", 1e-9, "GMACs"), (panels[1], "seconds", 1e3, "latency (ms)")):
        for method, marker in zip(METHODS.values(), "os"):
            line = sorted((p for p in [*points, whole] if p["method"] == method or p is whole), key=lambda p: p[key])
            x, y = [scale * p[key] for p in line], [p["accuracy"].mean for p in line]
            panel.errorbar(x, y, [p["accuracy"].deviation or 0.0 for p in line], marker=marker, capsize=3, label=method)
            for at, height, one in zip(x, y, line):
                panel.annotate(f"{one['keep']:.2f}", (at, height), textcoords="offset points", xytext=(5, 5), fontsize=8)
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(METRIC)
    panels[0].legend(fontsize=8)
    figure.savefig(PAGE.with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
