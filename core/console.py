"""Progress for people: a live line with rate, remaining time and losses in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from core.record import RunFolder, interactive

_PLAIN_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """Seconds as people write them: 42 s, 3:07, 2:15:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows and records how a run gets on. Rates and times go to the status and to timing.jsonl, never to metrics.jsonl."""

    def __init__(self, run: RunFolder, total: int, done: int):
        self.run, self.total, self.start = run, total, done
        self.began = time.perf_counter()
        self.shown_at = 0.0
        self.live: Any = None
        self.bar: Any = None
        run.say(state="running", step=done, steps=total, message="")

    def __enter__(self) -> Progress:
        if self.run.writes and self.run.chatty and interactive():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            self.live = Live(
                TextColumn("[bold]{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(), TextColumn("{task.fields[said]}"), transient=True,
            )  # fmt: skip
            self.live.start()
            self.bar = self.live.add_task("train", total=self.total, completed=self.start, rate="", said="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def note(self, text: str) -> None:
        self.run.say(message=text)
        if self.live is not None:
            self.live.update(self.bar, said=text)

    def advance(self, step: int, row: Mapping[str, float]) -> None:
        spent = time.perf_counter() - self.began
        rate = (step - self.start) / spent if spent > 0 else 0.0
        left = (self.total - step) / rate if rate else 0.0
        self.run.say(step=step, message="")
        self.run.timing({"step": step, "elapsed_s": round(spent, 3), "steps_per_s": round(rate, 4)})
        said = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k == "loss" or k.startswith("loss/"))
        if self.live is not None:
            self.live.update(self.bar, completed=step, rate=f"{rate:.1f} steps/s", said=said)
        now = time.perf_counter()
        if self.live is None and (now - self.shown_at > _PLAIN_EVERY_S or step == self.total):
            self.shown_at = now
            self.run.log(f"step {step}/{self.total}  {rate:.2f} steps/s  left {duration(left)}  {said}")

    def evaluated(self, step: int, metrics: Mapping[str, float], select: str | None) -> None:
        names = [select] if select in metrics else list(metrics)[:4]
        self.run.log(f"step {step}/{self.total}  evaluation: " + "  ".join(f"{n} {metrics[n]:.4f}" for n in names if n is not None))
        self.run.say(message="")
