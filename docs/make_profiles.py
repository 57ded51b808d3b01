"""Write docs/profiles.md: what the full recipes compute, counted on the meta device from their own gin files.

python docs/make_profiles.py             write it
python docs/make_profiles.py --check     say whether it is up to date (exit status 1 if not)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import generated

PAGE = Path(__file__).with_name("profiles.md")
RECIPES = (
    "gin/sdtps/rgbnt201.gin", "gin/sdtps/rgbnt100.gin", "gin/sdtps/msvr310.gin",
    "gin/sam/dformer/nyu_s.gin", "gin/sam/nyu_s.gin", "gin/sam/dformer/nyu_b.gin", "gin/sam/nyu_b.gin",
    "gin/sam/dformer/nyu_l.gin", "gin/sam/nyu_l.gin", "gin/sam/sun_s.gin", "gin/sam/sun_b.gin", "gin/sam/sun_l.gin",
    "gin/sap/pacs.gin", "gin/sap/pacs_release.gin",
)  # fmt: skip
HEAD = """# What the full recipes compute

Written by `python docs/make_profiles.py`, which runs `repro profile --gin RECIPE --count --json FILE` for each: no data, no weights,
no timing. One sample in evaluation mode; for SAP one image. A multiply-accumulate (MAC) is two FLOPs; *with norms* is the figure
that fvcore's convention gives (normalisations added). *Unpruned* is the same network without its token module.

| recipe | input | parameters | GMACs | with norms | unpruned | activations | operators counted |
|---|---|---|---|---|---|---|---|
"""


def row(recipe: str) -> str:
    """One recipe's line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "repro.profile", "--gin", recipe, "--count", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PAGE.parents[1])
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
        found = json.loads(file.read_text())
    model, bare = found["model"], found.get("unpruned")
    inputs = ", ".join(text.split()[0] for text in model["inputs"] if "x" in text)
    cells = [
        f"`{recipe}`", inputs, f"{model['parameters']:,}", f"{model['macs'] / 1e9:.3f}", f"{model['macs_with_norms'] / 1e9:.3f}",
        f"{bare['macs'] / 1e9:.3f}" if bare else "–", f"{model['activation_bytes'] / 2**20:,.0f} MiB", f"{100 * model['coverage']:.1f} %",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(row(recipe) for recipe in RECIPES) + "\n"


if __name__ == "__main__":
    raise SystemExit(generated.main(__file__, __doc__ or "", lambda: {PAGE: page()}))
