"""npm packages through a program that stands in for npm: it packs a folder of ours, so no network is needed."""

import base64
import hashlib
import io
import json
import shutil
import stat
import sys
import tarfile

import pytest

from core import npm
from core.npm import NpmError


def archive(files, links=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for path in links:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Puts an `npm` on the path that serves the given archive."""

    def serve(content, integrity=None, code=0, says=""):
        home = tmp_path / "bin"
        home.mkdir(exist_ok=True)
        (home / "package.tgz").write_bytes(content)
        digest = integrity or "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
        program = home / "npm"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, shutil, sys, pathlib\n"
            f"if {code}:\n    print({says!r}, file=sys.stderr); sys.exit({code})\n"
            "folder = pathlib.Path(sys.argv[sys.argv.index('--pack-destination') + 1])\n"
            f"shutil.copy({str(home / 'package.tgz')!r}, folder / 'thing-1.2.3.tgz')\n"
            f"print(json.dumps([dict(filename='thing-1.2.3.tgz', integrity={digest!r})]))\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(home))
        return home

    return serve


FILES = {"package/data.json": b"[1]", "package/img/a.png": b"AA", "package/img/b.png": b"B", "package/big.bin": b"0" * 99}


def test_only_the_wanted_files_are_kept_and_the_archive_goes(registry, tmp_path):
    registry(archive(FILES))
    with npm.packages({"thing": "1.2.3"}) as fetched:
        thing = fetched["thing"]
        assert thing.read("data.json") == b"[1]"
        assert thing.extract(lambda p: p.startswith("img/"), tmp_path / "out") == ["img/a.png", "img/b.png"]
        assert thing.facts()["version"] == "1.2.3"
        assert thing.facts()["sha256"] == hashlib.sha256(archive_bytes(thing)).hexdigest()
        with pytest.raises(NpmError, match="no file 'none'"):
            thing.read("none")
        with pytest.raises(NpmError, match="none of the wanted files"):
            thing.extract(lambda p: False, tmp_path)
    assert not thing.archive.exists()
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.png")) == ["a.png", "b.png"]
    assert not (tmp_path / "out" / "big.bin").exists()


def archive_bytes(package):
    return package.archive.read_bytes()


def test_a_wrong_hash_is_an_error(registry):
    registry(archive(FILES), integrity="sha512-AAAA")
    with pytest.raises(NpmError, match="does not match the registry's sha512"), npm.packages({"thing": "1.2.3"}):
        pass
    registry(archive(FILES))
    with pytest.raises(NpmError, match="expected 0000"), npm.packages({"thing": "1.2.3"}, {"thing": "0000"}):
        pass


@pytest.mark.parametrize("path", ["package/../../escape.txt", "package/img/../../../x"])
def test_files_outside_the_package_are_refused(registry, tmp_path, path):
    registry(archive({path: b"x"}))
    with npm.packages({"thing": "1.2.3"}) as fetched, pytest.raises(NpmError, match="no plain file inside"):
        fetched["thing"].extract(lambda p: True, tmp_path / "out")
    assert not (tmp_path / "escape.txt").exists()


def test_links_and_large_files_are_refused(registry, tmp_path, monkeypatch):
    registry(archive({}, links=["package/link"]))
    with npm.packages({"thing": "1.2.3"}) as fetched, pytest.raises(NpmError, match="no plain file"):
        fetched["thing"].extract(lambda p: True, tmp_path / "out")
    monkeypatch.setattr(npm, "LARGEST_FILE", 10)
    registry(archive(FILES))
    with npm.packages({"thing": "1.2.3"}) as fetched, pytest.raises(NpmError, match="more than 10"):
        fetched["thing"].extract(lambda p: p == "big.bin", tmp_path / "out")


def test_a_damaged_archive_is_an_error(registry, tmp_path):
    registry(archive({"package/a": b"x" * 5000})[:-40])
    with npm.packages({"thing": "1.2.3"}) as fetched, pytest.raises(NpmError, match="damaged"):
        fetched["thing"].extract(lambda p: True, tmp_path / "out")


def test_no_npm_a_failing_npm_and_bad_names_are_one_line_each(registry, tmp_path, monkeypatch):
    registry(b"", code=1, says="npm error code E404\nnpm error 404 Not Found")
    with pytest.raises(NpmError, match=r"thing@1.2.3: npm pack failed \(npm error code E404\)"), npm.packages({"thing": "1.2.3"}):
        pass
    for name, version in (("Thing; rm -rf", "1.0.0"), ("thing", "latest"), ("--global", "1.0.0")):
        with pytest.raises(NpmError, match="exact version"), npm.packages({name: version}):
            pass
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(NpmError, match=r"install Node\.js"), npm.packages({"thing": "1.2.3"}):
        pass


@pytest.mark.npm
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_a_real_package():
    with npm.packages({"is-odd": "3.0.1"}) as fetched:
        assert json.loads(fetched["is-odd"].read("package.json"))["version"] == "3.0.1"
