"""Components and plugins: what exists, where it comes from, and how a gin file reaches it.

A plugin is a package named by an entry point of the group `repro.plugins`. Its `__init__` declares

    __plugin__ = "my_paper"      # the namespace of everything it registers; equals the entry point's name
    __interface__ = 1            # the version of this protocol it was written against

and its modules decorate classes with `@register(kind, paper=…)`. Two views of the same facts:

* the *static index* (`index()`), read from source text, imports no plugin and no torch. `repro list`, `repro config` and
  the planning of a sweep live on it;
* the *loaded registry* (`load()`), which imports the plugins that a run names and hands out gin-configurable classes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

GROUP = "repro.plugins"
INTERFACE = 1
IMPORT_LIMIT_S = 60.0

T = TypeVar("T")


# --- registration ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Registered:
    """A component whose module has been imported."""

    name: str
    kind: str
    cls: Callable[..., Any]
    paper: str
    equations: str


_REGISTERED: dict[str, Registered] = {}
_LOADING: list[str] = []


class RegistrationError(ValueError):
    """A component that cannot be filed: a duplicate name, or a name outside its plugin's namespace."""


def namespace(module: str) -> str:
    """The registry namespace of a module: its plugin's `__plugin__`, or for the core the module's own last name."""
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        package = sys.modules.get(".".join(parts[:depth]))
        declared = getattr(package, "__plugin__", None)
        if declared is not None:
            return str(declared)
    return parts[-1]


def register(kind: str, *, paper: str = "", equations: str = "", denylist: Iterable[str] | None = None) -> Callable[[T], T]:
    """File a class or function under `<plugin>.<Name>`, make it reachable from gin, and return it unchanged.

    Args:
        kind: what it is: task, model, module, backbone, dataset, loss, optimizer, schedule, text, …
        paper: short citation, e.g. "SEPS, sec. 3.2".
        equations: the equations it implements, e.g. "eq. 1-4".
        denylist: parameters the caller supplies; binding one in a gin file is an error.

    Raises:
        RegistrationError: if the name is taken (both owners are named) or belongs to another plugin.
    """

    def add(obj: T) -> T:
        import gin

        cls: Any = obj
        space = namespace(cls.__module__)
        if _LOADING and space != _LOADING[-1] and not cls.__module__.startswith("core."):
            raise RegistrationError(
                f"plugin {_LOADING[-1]!r} registers {cls.__name__!r} as {space!r} (module {cls.__module__}); a plugin "
                f"registers only in its own namespace. Set __plugin__ = {_LOADING[-1]!r} in its package."
            )
        name = f"{space}.{cls.__name__}"
        known = _REGISTERED.get(name)
        if known is not None and known.cls.__qualname__ + known.cls.__module__ != cls.__qualname__ + cls.__module__:
            raise RegistrationError(
                f"{name} is registered twice: by {known.cls.__module__} and by {cls.__module__}. Rename one of them."
            )
        if known is None:
            gin.register(cls, module=space, denylist=list(denylist) if denylist else None)
        _REGISTERED[name] = Registered(name, kind, cls, paper, equations)
        return obj

    return add


def registered() -> dict[str, Registered]:
    """Every component imported so far, by full name."""
    return dict(_REGISTERED)


# --- the static index -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One constructor parameter as written: annotation and default are source text, None where absent."""

    name: str
    annotation: str | None
    default: str | None


@dataclasses.dataclass(frozen=True)
class Component:
    """What the source text says of one registered class or function."""

    name: str
    kind: str
    paper: str
    equations: str
    plugin: str
    distribution: str
    module: str
    file: str
    line: int
    summary: str
    parameters: tuple[Parameter, ...]
    denied: tuple[str, ...] = ()
    open_keywords: bool = False

    def parameter(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name), None)


@dataclasses.dataclass(frozen=True)
class Plugin:
    """An installed plugin, seen through its metadata alone."""

    name: str
    package: str
    distribution: str
    version: str
    folder: Path | None
    problem: str | None = None


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    seen: dict[tuple[str, str], importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        seen.setdefault((point.name, point.value), point)
    return sorted(seen.values(), key=lambda point: (point.name, point.value))


def _package_folder(package: str) -> Path | None:
    """The folder of a package without importing it (only the top-level spec is looked up)."""
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for location in list(spec.submodule_search_locations or []) if spec else []:
        folder = Path(location).joinpath(*rest)
        if folder.is_dir():
            return folder
    return None


@functools.cache
def plugins() -> dict[str, Plugin]:
    """Installed plugins by name, without importing any. Two distributions that claim one name are both refused."""
    found: dict[str, Plugin] = {}
    for point in _entry_points():
        package = point.value.split(":")[0]
        owner = point.dist
        distribution, version = (owner.name, owner.version) if owner else ("?", "?")
        folder = _package_folder(package)
        problem = None if folder else f"package {package!r} is not importable"
        if point.name in found:
            first = found[point.name]
            clash = f"the name is claimed by {first.distribution} ({first.package}) and by {distribution} ({package})"
            found[point.name] = dataclasses.replace(first, problem=clash)
            continue
        found[point.name] = Plugin(point.name, package, distribution, version, folder, problem)
    return found


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _parameters(node: ast.ClassDef | ast.FunctionDef) -> tuple[tuple[Parameter, ...], bool] | None:
    """Parameters of a function, or of a class's own `__init__` or dataclass fields; None where it has neither."""
    function: ast.FunctionDef | None = node if isinstance(node, ast.FunctionDef) else None
    skip = 0
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
                return tuple(
                    Parameter(f.target.id, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else None)
                    for f in fields
                    if isinstance(f.target, ast.Name)
                ), False
            return None
        function, skip = inits[0], 1
    assert function is not None
    args = function.args
    positional = args.posonlyargs + args.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = list(zip(positional, defaults))[skip:] + list(zip(args.kwonlyargs, args.kw_defaults))
    listed = tuple(
        Parameter(a.arg, ast.unparse(a.annotation) if a.annotation else None, ast.unparse(d) if d is not None else None)
        for a, d in pairs
    )
    return listed, args.kwarg is not None


def _scan(path: Path, module: str, space: str, plugin: str, distribution: str) -> tuple[Component, ...]:
    """Components of a file as it is on the disk now; read once for as long as it stays the same.

    Raises:
        SyntaxError: if it does not parse.
    """
    at = path.stat()
    return _scanned(path, at.st_mtime_ns, at.st_size, module, space, plugin, distribution)


@functools.cache
def _scanned(
    path: Path, _changed: int, _size: int, module: str, space: str, plugin: str, distribution: str
) -> tuple[Component, ...]:
    source = path.read_text(encoding="utf-8", errors="replace")
    if plugin == "core" and "register(" not in source:
        return ()  # of a plugin it is to be known whether it parses
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects and no garbage: looking through them doubles the time
    try:
        return tuple(_components(ast.parse(source, filename=str(path)), path, module, space, plugin, distribution))
    finally:
        if collecting:
            gc.enable()


def _components(tree: ast.Module, path: Path, module: str, space: str, plugin: str, distribution: str) -> Iterator[Component]:
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        for decorator in node.decorator_list:
            if not isinstance(decorator, ast.Call):
                continue
            called = decorator.func
            if (called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")) != "register":
                continue
            keywords = {k.arg: k.value for k in decorator.keywords}
            denied = keywords.get("denylist")
            signature = _parameters(node)
            if signature is None and isinstance(node, ast.ClassDef):  # inherited constructor, from the same file
                for base in (classes.get(b.id) for b in node.bases if isinstance(b, ast.Name)):
                    signature = signature or (_parameters(base) if base else None)
            yield Component(
                name=f"{space}.{node.name}",
                kind=_text(decorator.args[0]) if decorator.args else _text(keywords.get("kind")),
                paper=_text(keywords.get("paper")),
                equations=_text(keywords.get("equations")),
                plugin=plugin,
                distribution=distribution,
                module=module,
                file=str(path),
                line=node.lineno,
                summary=(ast.get_docstring(node) or "").strip().split("\n")[0],
                parameters=signature[0] if signature else (),
                denied=_written(denied, tree, f"denylist of {node.name} at line {node.lineno}") if denied is not None else (),
                open_keywords=signature[1] if signature else signature is None,
            )


def _written(value: ast.expr, tree: ast.Module, what: str) -> tuple[str, ...]:
    """A list of names that stands in the source, directly or under a name of the module.

    Raises:
        ValueError: if it has to be computed.
    """
    if isinstance(value, ast.Name):
        bound = [
            n.value
            for n in tree.body
            if isinstance(n, ast.Assign)
            for t in n.targets
            if isinstance(t, ast.Name) and t.id == value.id
        ]
        value = bound[-1] if bound else value
    try:
        return tuple(ast.literal_eval(value))
    except (ValueError, TypeError):
        raise ValueError(f"{what} must be written out, it is read without importing: {ast.unparse(value)}") from None


def _modules(folder: Path, package: str) -> Iterator[tuple[Path, str]]:
    for path in sorted(p for p in folder.rglob("*.py") if not p.is_dir()):
        relative = path.relative_to(folder).with_suffix("")
        parts = [p for p in relative.parts if p != "__init__"]
        if any(part.startswith((".", "__")) for part in parts):
            continue
        yield path, ".".join([package, *parts])


@functools.cache
def index() -> dict[str, Component]:
    """Every component of the core and of the installed plugins, by full name, from source text alone.

    A file that cannot be read or parsed contributes nothing here; `plugin_problems()` says so.
    """
    found: dict[str, Component] = {}
    core = Path(__file__).parent
    for path, module in _modules(core, "core"):
        for component in _scan(path, module, module.split(".")[-1], "core", "ginrepro"):
            found[component.name] = component
    for plugin in plugins().values():
        found |= _read(plugin)[0]
    return found


def _read(plugin: Plugin) -> tuple[dict[str, Component], str]:
    """Components of a plugin by name, from its source text, and the first thing that is wrong with the text (else empty).

    Nothing that somebody else's file holds or is may stop what does not need it.
    """
    found: dict[str, Component] = {}
    problem = ""
    for path, module in _modules(plugin.folder, plugin.package) if plugin.folder else ():
        try:
            for component in _scan(path, module, plugin.name, plugin.name, plugin.distribution):
                other = found.setdefault(component.name, component)
                if other is not component:
                    problem = problem or (
                        f"{component.name} is registered twice, at {other.file}:{other.line} and {component.file}:{component.line}"
                    )
        except SyntaxError as error:
            problem = problem or f"SyntaxError in {path}:{error.lineno}: {error.msg}"
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            problem = problem or f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
    return found, problem


@functools.cache
def plugin_problems() -> dict[str, str]:
    """Plugins that already fail without being imported: missing package, unreadable text, wrong interface, two owners."""
    problems: dict[str, str] = {}
    for plugin in plugins().values():
        if plugin.problem or plugin.folder is None:
            problems[plugin.name] = plugin.problem or "no folder"
            continue
        problem = _read(plugin)[1]
        if not problem:
            init = plugin.folder / "__init__.py"
            declared = _constants(init) if init.is_file() else {}
            try:
                _check_declaration(plugin, declared.get("__plugin__"), declared.get("__interface__"))
            except PluginError as error:
                problem = error.cause
        if problem:
            problems[plugin.name] = problem
    return problems


def _constants(path: Path) -> dict[str, Any]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, comparing also their last part."""
    known = list(known)
    direct = get_close_matches(name, known, n=count, cutoff=0.6)
    by_tail = {k.rsplit(".", 1)[-1]: k for k in known}
    tails = get_close_matches(name.rsplit(".", 1)[-1], list(by_tail), n=count, cutoff=0.6)
    return list(dict.fromkeys(direct + [by_tail[t] for t in tails]))[:count]


def find(selector: str) -> Component:
    """The component a selector means: a full name, or an unambiguous ending of one.

    Raises:
        KeyError: if nothing or more than one thing matches; the message lists the nearest names and failed plugins.
    """
    known = index()
    if selector in known:
        return known[selector]
    endings = [name for name in known if name.endswith("." + selector)]
    if len(endings) == 1:
        return known[endings[0]]
    if endings:
        raise KeyError(f"{selector!r} is ambiguous: {', '.join(sorted(endings))}. Write the full name.")
    near = nearest(selector, known)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    failed = plugin_problems()
    broken = "".join(f" Plugin {name} is broken ({cause})." for name, cause in failed.items() if name in selector.split("."))
    raise KeyError(f"no component {selector!r}.{hint}{broken} `repro list` shows all.")


# --- loading --------------------------------------------------------------------------------------------------------


class PluginError(RuntimeError):
    """A plugin that could not be imported: `plugin` names it, `cause` says why in one line."""

    def __init__(self, plugin: str, distribution: str, cause: str):
        super().__init__(f"plugin {plugin!r} (distribution {distribution}) cannot be used: {cause}")
        self.plugin = plugin
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Passport:
    """What importing a plugin showed: seconds, a hash over its source files, and the names it registered."""

    plugin: str
    seconds: float
    sha256: str
    components: tuple[str, ...]


_PASSPORTS: dict[str, Passport] = {}
_FAILED: dict[str, PluginError] = {}


def _check_declaration(plugin: Plugin, declared: Any, interface: Any) -> None:
    if declared != plugin.name:
        raise PluginError(
            plugin.name,
            plugin.distribution,
            f"{plugin.package}.__plugin__ is {declared!r} and must equal the entry point's name {plugin.name!r}",
        )
    if interface != INTERFACE:
        raise PluginError(
            plugin.name,
            plugin.distribution,
            f"written for plugin interface {interface!r}, this is interface {INTERFACE}; install matching versions",
        )


class _ImportTimeout(BaseException):
    """Raised by the alarm in a plugin's import; a BaseException so that the plugin's own handlers let it through."""


def _import_limited(module: str, limit_s: float) -> None:
    """Import a module, but not for longer than `limit_s` (in the main thread, where an alarm can interrupt it)."""
    if threading.current_thread() is not threading.main_thread():
        importlib.import_module(module)
        return

    def expire(signum: int, frame: Any) -> None:
        raise _ImportTimeout

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        importlib.import_module(module)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def source_hash(folder: Path) -> str:
    """sha256 over the names and bytes of a package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*.py") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def _one_line(plugin: Plugin, limit_s: float) -> Iterator[None]:
    """Whatever importing a plugin's code raises becomes one PluginError."""
    try:
        yield
    except PluginError:
        raise
    except _ImportTimeout:
        raise PluginError(plugin.name, plugin.distribution, f"its import took longer than {limit_s:g} s") from None
    except KeyboardInterrupt:
        raise
    except BaseException as cause:  # a plugin may raise anything at all
        frames = traceback.extract_tb(cause.__traceback__)
        where = next((f" at {f.filename}:{f.lineno}" for f in reversed(frames) if str(plugin.folder) in f.filename), "")
        said = f"exited with {cause.code!r}" if isinstance(cause, SystemExit) else f"{type(cause).__name__}: {cause}"
        raise PluginError(plugin.name, plugin.distribution, " ".join(f"{said}{where}".split())) from cause


def load_plugin(name: str, *, limit_s: float = IMPORT_LIMIT_S) -> Passport:
    """Import one plugin and every module of it that registers something.

    Raises:
        PluginError: whatever went wrong in there (ImportError, SyntaxError, sys.exit, a hang longer than `limit_s`,
            a duplicate name, another interface version, a name outside its namespace), in one line.
    """
    if name in _PASSPORTS:
        return _PASSPORTS[name]
    if name in _FAILED:
        raise _FAILED[name]
    known = plugins()
    if name not in known:
        near = nearest(name, known)
        raise KeyError(
            f"no plugin {name!r} is installed; {'nearest: ' + ', '.join(near) if near else 'installed: ' + ', '.join(known)}"
        )
    plugin = known[name]
    started = time.perf_counter()
    _LOADING.append(name)
    try:
        with _one_line(plugin, limit_s):
            if plugin.folder is None or name in plugin_problems():
                raise PluginError(name, plugin.distribution, plugin_problems().get(name, "no folder"))
            _import_limited(plugin.package, limit_s)
            package = sys.modules[plugin.package]
            _check_declaration(plugin, getattr(package, "__plugin__", None), getattr(package, "__interface__", None))
            for module in sorted({c.module for c in index().values() if c.plugin == name}):
                _import_limited(module, limit_s)
    except PluginError as error:
        _FAILED[name] = error
        raise
    finally:
        _LOADING.pop()
    names = tuple(sorted(n for n in _REGISTERED if n.startswith(name + ".")))
    _PASSPORTS[name] = Passport(name, time.perf_counter() - started, source_hash(plugin.folder), names)
    return _PASSPORTS[name]


def load_part(name: str, part: Literal["claims", "golden"], *, limit_s: float = IMPORT_LIMIT_S) -> bool:
    """Import `<package>.<part>` of a plugin, where it has one; returns whether it has.

    Raises:
        PluginError: as `load_plugin`, with the part's name in the cause.
    """
    load_plugin(name, limit_s=limit_s)
    plugin = plugins()[name]
    module = f"{plugin.package}.{part}"
    if importlib.util.find_spec(module) is None:
        return False
    try:
        with _one_line(plugin, limit_s):
            _import_limited(module, limit_s)
    except PluginError as error:
        raise PluginError(name, plugin.distribution, f"{module}: {error.cause}") from error.__cause__
    return True


def load_component(name: str) -> None:
    """Import what a component needs: its plugin, or its module of the core."""
    component = find(name)
    if component.plugin == "core":
        importlib.import_module(component.module)
    else:
        load_plugin(component.plugin)


def load_all() -> dict[str, Passport | PluginError]:
    """Import every installed plugin; a broken one is reported in place and does not stop the others."""
    outcome: dict[str, Passport | PluginError] = {}
    for name in plugins():
        try:
            outcome[name] = load_plugin(name)
        except PluginError as error:
            outcome[name] = error
    return outcome


def signature_of(obj: Callable[..., Any]) -> inspect.Signature:
    """The constructor signature of a registered class or the signature of a registered function."""
    return inspect.signature(obj)
