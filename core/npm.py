"""Pictures and data out of npm packages: fetched by name and exact version, checked, and only the wanted files kept.

    with packages({"emoji-datasource-google": "16.0.0"}) as fetched:
        fetched["emoji-datasource-google"].extract(lambda path: path == "emoji.json", folder)

`npm pack` downloads into a temporary folder, which is gone afterwards. What a package shows is its publisher's; callers
keep the licence notes of `Package.facts()` beside the files, and do not redistribute pictures they have no right to.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

LIMIT_S = 600.0
LARGEST_FILE = 64 << 20  # bytes of one extracted file
_NAME = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")


class NpmError(ValueError):
    """A package that cannot be had, or is not what it should be. One line, with what to do."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A downloaded package.

    Attributes:
        sha256: of the archive.
        integrity: the registry's own hash, which the archive was checked against.
    """

    name: str
    version: str
    archive: Path
    sha256: str
    integrity: str

    def facts(self) -> dict[str, str]:
        """What a manifest should say of it."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256, "integrity": self.integrity}

    def _members(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        try:
            with tarfile.open(self.archive, mode="r|gz") as archive:
                for member in archive:
                    parts = PurePosixPath(member.name).parts[1:]  # npm puts everything under one folder
                    path = "/".join(parts)
                    if not parts or not wanted(path):
                        continue
                    if not member.isfile() or ".." in parts or PurePosixPath(path).is_absolute():
                        raise NpmError(f"{self.name}@{self.version}: {member.name!r} is no plain file inside the package")
                    if member.size > LARGEST_FILE:
                        raise NpmError(f"{self.name}@{self.version}: {path} has {member.size:,} bytes, more than {LARGEST_FILE:,}")
                    content = archive.extractfile(member)
                    assert content is not None
                    yield path, content.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise NpmError(f"{self.name}@{self.version}: the archive is damaged ({error}); run again") from error

    def read(self, path: str) -> bytes:
        """One file of the package.

        Raises:
            NpmError: if it has no such file.
        """
        for _, content in self._members(lambda p: p == path):
            return content
        raise NpmError(f"{self.name}@{self.version} has no file {path!r}")

    def extract(self, wanted: Callable[[str], bool], folder: Path) -> list[str]:
        """Write the wanted files (by their path inside the package) under `folder`; returns their paths, sorted.

        Raises:
            NpmError: if none is wanted, or one is not a plain file inside the package.
        """
        written = []
        for path, content in self._members(wanted):
            target = folder.joinpath(*path.split("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            written.append(path)
        if not written:
            raise NpmError(f"{self.name}@{self.version} holds none of the wanted files")
        return sorted(written)


@contextlib.contextmanager
def packages(wanted: Mapping[str, str], sha256: Mapping[str, str] | None = None) -> Iterator[dict[str, Package]]:
    """Packages by name, downloaded for the time of the block.

    Args:
        wanted: exact version of each package.
        sha256: the archive's hash, or its first digits, where it is known beforehand.

    Raises:
        NpmError: if npm is missing, a package cannot be had, or a hash differs.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise NpmError(
            "npm is not installed here; install Node.js (it brings npm), or make the data on a machine that has it and copy the folder"
        )
    with tempfile.TemporaryDirectory(prefix="npm-") as temporary:
        yield {n: _fetch(npm, n, v, Path(temporary), (sha256 or {}).get(n, "")) for n, v in wanted.items()}


def _fetch(npm: str, name: str, version: str, folder: Path, expected: str) -> Package:
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise NpmError(f"{name}@{version}: want a package name and an exact version such as 16.0.0")
    what = f"{name}@{version}"
    try:
        done = subprocess.run(
            [npm, "pack", what, "--json", "--ignore-scripts", "--pack-destination", str(folder)],
            capture_output=True, text=True, timeout=LIMIT_S, cwd=folder, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NpmError(f"{what}: npm did not finish in {LIMIT_S:g} s; is its registry reachable?") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "npm" in line and "code" in line.lower()] or done.stderr.splitlines()
        raise NpmError(f"{what}: npm pack failed ({said[0].strip() if said else f'exit code {done.returncode}'})")
    facts = _facts(done.stdout, what)
    archive = folder / str(facts["filename"]).replace("@", "").replace("/", "-")
    if not archive.is_file():
        raise NpmError(f"{what}: npm pack left no archive {archive.name}")
    content = archive.read_bytes()
    kind, _, digest = str(facts["integrity"]).partition("-")
    if kind not in ("sha512", "sha256") or base64.b64encode(hashlib.new(kind, content).digest()).decode() != digest:
        raise NpmError(f"{what}: the archive does not match the registry's {kind} hash; run again")
    sha256 = hashlib.sha256(content).hexdigest()
    if not sha256.startswith(expected):
        raise NpmError(f"{what}: the archive's sha256 is {sha256[:16]}…, expected {expected}…")
    return Package(name, version, archive, sha256, str(facts["integrity"]))


def _facts(stdout: str, what: str) -> Mapping[str, Any]:
    try:
        listed = json.loads(stdout)
        entry = listed[0] if isinstance(listed, list) else next(iter(listed.values()))
        if entry["filename"] and entry["integrity"]:
            return entry
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        pass
    raise NpmError(f"{what}: npm pack printed something else than its JSON; npm 7 or newer is needed")
