"""Generated sample data on disk: made whole or not at all, found again, and never taken for anything else.

A sample folder has a `manifest.json` which says that it was generated, by what, from which seed and options, and carries a
hash over every other file. Asking for the same sample again finds it; asking for another in its place is an error.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core import data

MANIFEST = "manifest.json"


def read_manifest(root: str | Path) -> dict[str, Any] | None:
    """What a generated sample says of itself, or None where the folder has no manifest.

    Raises:
        ValueError: if there is one and it is no sample's.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable ({error}); remove the folder and make the sample again") from error
    if not isinstance(manifest, dict) or manifest.get("generated") is not True:
        raise ValueError(f"{path} is not the manifest of a generated sample")
    return manifest


def _fingerprint(root: Path) -> str:
    files = [
        p
        for p in root.rglob("*")
        if p.is_file() and p.name != MANIFEST and not any(x.startswith(".") for x in p.relative_to(root).parts)
    ]
    return data.fingerprint(root, files, contents=True)


def make(
    root: str,
    *,
    generator: str,
    version: int,
    seed: int,
    options: Mapping[str, Any],
    statement: str,
    write: Callable[[Path], Mapping[str, Any]],
) -> Path:
    """Make a sample folder, or find it whole.

    It is written beside `root` and renamed when complete, so that a broken or parallel run leaves no half of one.

    Args:
        root: the folder.
        generator: name of what makes it.
        version: of what it makes; another number means other files from the same seed.
        seed, options: everything the files depend on (JSON values).
        statement: one sentence for readers: that this is no real data.
        write: writes all files under a given empty folder, and returns facts for the manifest (counts, say).

    Returns:
        The folder, absolute.

    Raises:
        ValueError: if `root` holds anything else, another sample, or a damaged one.
    """
    target = Path(root).expanduser().resolve()
    asked = {"generator": generator, "version": version, "seed": seed, "options": dict(options)}
    if _holds(target, asked):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        facts = write(draft)
        manifest = {"generated": True, "statement": statement, **asked, **facts, "fingerprint": _fingerprint(draft)}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)
        try:
            os.rename(draft, target)
        except OSError:
            if not _holds(target, asked):  # else another process was faster
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _holds(target: Path, asked: Mapping[str, Any]) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None:
        raise ValueError(f"{target} exists and is no generated sample; choose another root")
    found = {key: manifest.get(key) for key in asked}
    if found != json.loads(json.dumps(asked)):
        raise ValueError(f"{target} holds another sample ({found}); remove it or choose another root")
    if _fingerprint(target) != manifest["fingerprint"]:
        raise ValueError(f"{target} is a damaged sample (files differ from its manifest); remove it to have it made again")
    return True
