"""What a finished run shows a person: its tables, read back from the run folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core import record
from core.console import duration


def cell(value: Any) -> str:
    """A table cell: four decimals for fractions, separators for counts, a dash for a gap."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def table(title: str, columns: list[str], rows: list[list[Any]], note: str = "") -> None:
    """Print one table (numbers to the right)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if record.interactive() else 120)
    shown = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        numeric = any(isinstance(r[i], (int, float)) for r in rows if i < len(r))
        shown.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell(value)) for value in row))
    console.print(shown)
    if note:
        console.print(note, style="dim", markup=False)


def result(path: Path) -> None:
    """Print the tables of a finished run, and the folder they come from."""
    found = record.read_json(path / "result.json")
    for t in found.get("tables", []):
        table(t["title"], t["columns"], t["rows"], t.get("note", ""))
    first, last = found.get("first") or {}, found.get("metrics") or {}
    best = found.get("best") or {}
    expected = found.get("expected") or {}
    names = [n for n in last if n in first or n in expected][:8]
    if names:
        table(
            "progress", ["metric", "untrained", "last", f"best (step {found.get('best_step')})", "published"],
            [[n, first.get(n), last.get(n), best.get(n), expected.get(n)] for n in names],
        )  # fmt: skip
    data = record.read_json(path / "data.json")
    if data.get("sample"):
        print(f"These figures are from a GENERATED SAMPLE ({data.get('name')}), not from the published data set.")
    seconds = record.seconds(path)
    print(f"run folder: {path}" + (f"   ({duration(seconds)})" if seconds is not None else ""))
