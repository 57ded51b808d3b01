"""Plugins as pip installs them: on the path of a child process (`install`), or in a fresh virtual environment (`fresh`).

In the fresh environment this project is installed from its wheel, and other packages after it. Torch and the other libraries
are not installed again: it sees the present environment's packages behind its own, but nothing that is installed there with
`-e`, such as this checkout.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import site
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

from core import registry

INIT = '__plugin__ = "{name}"\n__interface__ = 1\n'
CHECKOUT = Path(__file__).parents[2]


def build_flags():
    """Build with the backend that is here; only without one does pip have to fetch it."""
    return ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []


class Environment:
    def __init__(self, folder):
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        (self.packages / "behind.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        # As in an environment made by pip alone, the gin library lies beside our packages.
        library = importlib.metadata.distribution("gin-config")
        for name in {file.parts[0] for file in library.files if ".." not in file.parts}:
            shutil.copytree(library.locate_file(name), self.packages / name)

    def run(self, *argv, cwd, **options):
        """A program of the environment, away from the checkout."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        return subprocess.run(
            [str(a) for a in argv], capture_output=True, text=True, check=False, cwd=cwd, env=environment, **options
        )

    def python(self, *argv, cwd):
        return self.run(self.bin / "python", *argv, cwd=cwd)

    def repro(self, *words, cwd):
        return self.run(self.bin / "repro", *words, cwd=cwd)

    def install(self, what):
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-q", "--no-deps", "--ignore-installed"]
        done = self.run(*pip, *build_flags(), what, cwd=self.folder)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """This project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *build_flags(), "-w", str(folder), str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("ginrepro-*.whl")
    return made


@pytest.fixture(scope="session")
def fresh(tmp_path_factory, wheel):
    """The environment, with this project in it."""
    environment = Environment(tmp_path_factory.mktemp("fresh") / "venv")
    environment.install(wheel)
    return environment


@pytest.fixture
def install(tmp_path, command):
    """Write packages with entry points to a folder on the path, as pip would; `repro` is the command line where they are."""

    def write(name, files, *, version="3.4"):
        for file, text in {"__init__.py": INIT.format(name=name), **files}.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[repro.plugins]\n{name} = {name}\n")

    def there():  # in the child process
        sys.path.insert(0, str(tmp_path))
        for cached in (registry.plugins, registry.index, registry.plugin_problems):
            cached.cache_clear()

    write.repro = lambda *words: command(*map(str, words), before=there, folder=tmp_path)
    return write
