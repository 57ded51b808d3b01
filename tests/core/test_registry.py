"""Plugins come from outside, are listed without being imported, and fail alone."""

import subprocess
import sys
import textwrap
import time

import pytest

from core import registry

GOOD = """
    __plugin__ = "{name}"
    __interface__ = 1
"""
MODULE = textwrap.dedent("""
    from core.registry import register

    @register("module", paper="A paper", equations="eq. 1")
    class Thing:
        \"\"\"A thing.\"\"\"

        def __init__(self, size: int = 3, *, rate: float = 0.5):
            self.size, self.rate = size, rate
""")


@pytest.fixture
def install(tmp_path):
    """Write packages with entry points to a folder on PYTHONPATH, as pip would; returns a runner for Python code there."""

    def write(name, init=GOOD, modules=None, *, package=None, entry=None, distribution=None):
        package = package or name
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text(textwrap.dedent(init).format(name=name))
        for file, text in (modules or {"thing.py": MODULE}).items():
            if text is None:  # as an editor's lock or a moved file leaves it
                (folder / file).symlink_to("nowhere.py")
            else:
                (folder / file).write_text(text)
        info = tmp_path / f"{distribution or package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[repro.plugins]\n{entry or name} = {package}\n")

    def run(*argv):
        import os

        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, check=False)

    write.run = run
    return write


def test_a_plugin_is_listed_without_being_imported(install):
    install("my_paper", GOOD + "    raise RuntimeError('imported')\n")
    done = install.run("-m", "repro.list")
    assert done.returncode == 0
    assert "my_paper.Thing" in done.stdout
    assert "A paper eq. 1" in done.stdout
    assert "my_paper 1.2" in done.stdout


def test_static_parameters_are_the_real_ones(install):
    install("my_paper")
    code = """
        import inspect
        from core import registry
        registry.load_plugin("my_paper")
        for name, component in registry.registered().items():
            if registry.find(name).open_keywords: continue
            real = [p for p in inspect.signature(component.cls).parameters]
            assert [p.name for p in registry.find(name).parameters] == real, name
        thing = registry.find("my_paper.Thing")
        assert [(p.annotation, p.default) for p in thing.parameters] == [("int", "3"), ("float", "0.5")]
        print("checked", len(registry.registered()))
    """
    done = install.run("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout


def test_the_static_index_agrees_with_what_importing_registers():
    import inspect

    outcomes = registry.load_all()
    assert not {name: str(o) for name, o in outcomes.items() if not isinstance(o, registry.Passport)}
    registered = {
        n: c
        for n, c in registry.registered().items()
        if n in registry.index() or c.cls.__module__.startswith(("plugins.", "core."))
    }
    assert registered
    for name, component in registered.items():
        static = registry.find(name)
        signature = inspect.signature(component.cls)
        assert static.kind == component.kind
        assert static.paper == component.paper
        if not static.open_keywords:
            assert [p.name for p in static.parameters] == list(signature.parameters), name


def test_registering_returns_the_class_unchanged():
    @registry.register("module")
    class Plain:
        def __init__(self, size: int = 3):
            self.size = size

    try:
        assert Plain().size == 3
        assert type(Plain()) is Plain
    finally:
        registry._REGISTERED.pop("test_registry.Plain", None)


BROKEN = {
    "ImportError": (GOOD, {"thing.py": MODULE + "\nimport nothing_of_that_name\n"}, "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "SyntaxError": (GOOD, {"thing.py": MODULE + "\ndef (:\n"}, "SyntaxError"),
    "exit": (GOOD, {"thing.py": MODULE + "\nimport sys\nsys.exit(3)\n"}, "exited with 3"),
    "anything": (GOOD, {"thing.py": MODULE + "\nraise BaseException('boo')\n"}, "BaseException: boo"),
    "computed": (GOOD, {"thing.py": MODULE.replace('equations="eq. 1"', "denylist=dir(register)")}, "denylist of Thing at line 5 must be written out"),
    "too deep": (GOOD, {"thing.py": MODULE, "deep.py": "x = " + "-" * 10_000 + "1  # @register(\n"}, "deep.py cannot be read"),
    "not there": (GOOD, {"thing.py": MODULE, "gone.py": None}, "gone.py cannot be read"),
    "two owners": (GOOD, {"thing.py": MODULE, "other.py": MODULE}, "bad_paper.Thing is registered twice, at "),
    "interface": ('__plugin__ = "{name}"\n__interface__ = 99\n', None, "interface 99"),
    "undeclared": ("", None, "__plugin__ is None"),
    "outside": (GOOD, {"thing.py": MODULE + '\nThing.__module__ = "else.where"\nThing.__qualname__ = "Other"\nregister("module")(Thing)\n'}, "only in its own namespace"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_plugin_is_one_line_and_stops_only_its_own_runs(install, tmp_path, kind):
    init, modules, cause = BROKEN[kind]
    install("bad_paper", init, modules)
    install("good_paper")
    listed = install.run("-m", "repro.list", "--imports", "--plugin", "bad_paper")
    assert listed.returncode == 0
    assert "Traceback" not in listed.stderr
    (line,) = [row for row in listed.stderr.splitlines() if "BROKEN" in row]
    assert cause in line
    assert "bad_paper 1.2" in line
    code = "from core import config; c = config.read({!r}); config.apply(c); print('applied', c.components())"
    for name in ("good_paper", "bad_paper"):
        (tmp_path / f"{name}.gin").write_text(f"{name}.Thing.size = 4\n")
    good = install.run("-c", code.format(str(tmp_path / "good_paper.gin")))
    assert "applied ['good_paper.Thing']" in good.stdout, good.stderr
    if cause in install.run("-m", "repro.list", "--plugin", "bad_paper").stderr:  # so much is known without importing it
        checked = install.run("-m", "repro.config", str(tmp_path / "bad_paper.gin"))
        assert (checked.returncode, checked.stdout) == (2, "")
        assert cause in checked.stderr or "no component 'bad_paper.Thing'" in checked.stderr
    bad = install.run("-c", code.format(str(tmp_path / "bad_paper.gin")))
    assert bad.returncode != 0
    assert "bad_paper" in bad.stderr
    run = install.run("-m", "repro.run", "--gin", str(tmp_path / "bad_paper.gin"), "--runs", str(tmp_path / "runs"))
    assert run.returncode in (1, 2)
    assert "bad_paper" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_denylist_may_stand_under_a_name_and_a_folder_is_no_module(install, tmp_path):
    text = MODULE.replace('equations="eq. 1"', "denylist=DENIED").replace("\n@", '\nDENIED = ["rate"]\n\n@', 1)
    install("my_paper", GOOD, {"thing.py": text})
    (tmp_path / "my_paper" / "folder.py").mkdir()
    done = install.run(
        "-c", "from core import registry as r; print(r.load_plugin('my_paper').components, r.find('my_paper.Thing').denied)"
    )
    assert done.stdout == "('my_paper.Thing',) ('rate',)\n", done.stderr


def test_constructors_are_followed_to_their_bases_and_only_our_decorator_counts(install, tmp_path):
    """Names and types of inherited constructors are known without importing; what the text does not show is checked after."""
    base = """
        import abc, dataclasses
        from typing import ClassVar, Literal
        from core.registry import register as file_it
        class Root(abc.ABC):
            def __init__(self, size: int = 3, *, side: Literal[-1, 1] = 1): pass
        class Middle(Root): pass
        @dataclasses.dataclass
        class Fields:
            x: int = 1
            gone: int = 2
            late: str = dataclasses.field(default="z", kw_only=True)
    """
    derived = """
        from __future__ import annotations
        import dataclasses, functools
        from typing import ClassVar
        import outside_base
        from core import registry
        from core.task import Task
        from my_paper import Renamed
        from . import base as b
        from .base import file_it

        @file_it("module")
        class FromFile(Renamed):
            pass

        @registry.register("module")
        class FromModule(b.Root): pass

        @file_it("module")
        @dataclasses.dataclass
        class Data(b.Fields):
            gone: ClassVar[int] = 3
            y: float = 2.0
            made: list = dataclasses.field(default_factory=list)
            hidden: int = dataclasses.field(default=0, init=False)

        @file_it("module")
        class Plain: pass

        @file_it("module")
        class Open(outside_base.Far): pass

        @file_it("module")
        class Both(b.Middle, outside_base.Far): pass

        @functools.singledispatch
        def size(x): return 0
        @size.register(int)
        def _(x): return 1
        @size.register(str)
        def _(x): return 2
        class Shelf:
            def register(self): return lambda c: c
        SHELF = Shelf()
        @SHELF.register()
        class Foreign:
            def __init__(self, a: int = 1): pass
    """
    dedented = textwrap.dedent
    init = '__plugin__: str = "{name}"\n__interface__: int = 1\nfrom .base import Middle as Renamed\n'
    install("my_paper", init, {"base.py": dedented(base), "derived.py": dedented(derived), "old.py": 'print "of another Python"\n'})
    (tmp_path / "outside_base.py").write_text("class Far:\n    def __init__(self, far: int = 1, *, near: float = 2.0): pass\n")
    builds_on = (
        "from core.registry import register\nfrom my_paper.derived import Data\n@register('module')\nclass More(Data): pass\n"
    )
    install("a_paper", GOOD, {"thing.py": builds_on})  # its name comes before that of the plugin it builds on
    (tmp_path / "wrong.gin").write_text("my_paper.Open.neer = 1.0\nmy_paper.Open.far = 'x'\nmy_paper.Open.near = 1\n")
    (tmp_path / "early.gin").write_text("my_paper.FromFile.sise = 1\nmy_paper.FromFile.side = 0\nmy_paper.Data.hidden = 1\n")
    code = f"""
        import inspect
        from core import config, registry
        ours = [c for c in registry.index().values() if c.plugin in ("my_paper", "a_paper")]
        for c in ours: print(c.name, c.open_keywords, [p.name for p in c.parameters])
        print(registry.plugin_problems())
        print("\\n".join(config.why(config.read({str(tmp_path / "empty.gin")!r}), "my_paper.FromFile.side")))
        for file in ("early", "wrong"):
            try: config.apply(config.read({str(tmp_path)!r} + f"/{{file}}.gin"))
            except config.ConfigError as error: print(*error.problems, sep="\\n")
        print([n for n, outcome in registry.load_all().items() if isinstance(outcome, registry.PluginError)])
        for c in ours:
            real = [p for p in inspect.signature(registry.registered()[c.name].cls).parameters if p not in ("args", "kwargs")]
            assert c.open_keywords or [p.name for p in c.parameters] == real, (c.name, real)
    """
    (tmp_path / "empty.gin").write_text("")
    done = install.run("-c", dedented(code))
    assert done.returncode == 0, done.stderr
    here = f"{tmp_path}/"
    assert done.stdout.replace(here, "").splitlines() == [
        "a_paper.More False ['x', 'y', 'made', 'late']",
        "my_paper.FromFile False ['size', 'side']",
        "my_paper.FromModule False ['size', 'side']",
        "my_paper.Data False ['x', 'y', 'made', 'late']",
        "my_paper.Plain False []",
        "my_paper.Open True []",
        "my_paper.Both True []",
        "{}",
        "my_paper.FromFile.side = 1   (the constructor's default)",
        "  default     my_paper/derived.py:13: 1",
        "early.gin:1: my_paper.FromFile has no parameter 'sise'; nearest: size, side",
        "early.gin:3: my_paper.Data has no parameter 'hidden'; it has: x, y, made, late",
        "early.gin:2: my_paper.FromFile.side must be Literal[-1, 1], got 0 (int)",
        "wrong.gin:1: my_paper.Open has no parameter 'neer'; nearest: near",
        "wrong.gin:2: my_paper.Open.far must be int, got 'x' (str)",
        "[]",
    ]


def test_a_hanging_import_is_cut_off(install):
    install("slow_paper", GOOD, {"thing.py": MODULE + "\nimport time\ntime.sleep(60)\n"})
    started = time.monotonic()
    code = "from core import registry\ntry:\n    registry.load_plugin('slow_paper', limit_s=1.0)\nexcept registry.PluginError as e:\n    print(e)"
    done = install.run("-c", code)
    assert "took longer than 1 s" in done.stdout, done.stderr
    assert time.monotonic() - started < 40


def test_two_distributions_with_one_name_are_both_named(install):
    install("twice", package="first_package", distribution="first-dist")
    install("twice", package="second_package", distribution="second-dist")
    done = install.run("-m", "repro.list")
    (line,) = [row for row in done.stderr.splitlines() if "BROKEN" in row]
    assert "first-dist" in line
    assert "second-dist" in line


def test_a_duplicate_name_names_both_owners():
    def make(module):
        class Same:
            def __init__(self, a: int = 1):
                pass

        Same.__module__ = module
        Same.__qualname__ = "Same"
        return Same

    registry.register("module")(make("one.place"))
    try:
        with pytest.raises(registry.RegistrationError, match=r"one\.place.*two\.place"):
            registry.register("module")(make("two.place"))
    finally:
        registry._REGISTERED.pop("place.Same", None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--plugin", "sdtp"], "no plugin 'sdtp'; nearest: sdtps"), (["--kind", "modul"], "no kind 'modul'; nearest: module")],
)
def test_listing_what_there_is_not_names_the_nearest(argv, said):
    done = subprocess.run([sys.executable, "-m", "repro.list", *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_unknown_names_list_the_nearest():
    with pytest.raises(KeyError, match=r"trainer\.train"):
        registry.find("trainer.trian")


def test_help_and_list_import_no_torch():
    for argv in (["--help"], ["list"]):
        code = f"import sys; from repro import cli; cli.main({argv!r}); print('TORCH', 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "TORCH False" in done.stdout
