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
import re
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


def _at_home(module: str, space: str) -> bool:
    """Whether a module lies inside the installed plugin `space`: what one plugin builds on may be imported by it first."""
    owner = plugins().get(space)
    return owner is not None and (module == owner.package or module.startswith(owner.package + "."))


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
        if _LOADING and space != _LOADING[-1] and not cls.__module__.startswith("core.") and not _at_home(cls.__module__, space):
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


_CORE = Path(__file__).parent
_REGISTER = f"{__name__}.register"
_USED = re.compile(rb"@[\w.\s]*\bregister\s*\(|\bregister\s+as\b|=\s*[\w.\s]*\bregister\b")
"""What a file that registers something holds, under whatever name: others that speak of registering need not be parsed."""
_PLAIN_BASES = {"object", "abc.ABC", "typing.Generic", "typing.Protocol", "typing_extensions.Protocol"}
_PLAIN_DECORATORS = {"final", "runtime_checkable", "total_ordering"}
_Signature = tuple[tuple[Parameter, ...], bool]
"""The parameters of a constructor, and whether it takes others too (`**kwargs`, or what cannot be known from the text)."""


@dataclasses.dataclass(frozen=True)
class _Class:
    """What the text of a class says of its constructor: its own, or the fields of a dataclass, or that of its bases."""

    own: _Signature | None
    dataclass: bool
    fields: tuple[tuple[Parameter, bool], ...]  # each with whether it is for keywords alone
    removed: frozenset[str]  # fields of a base that are none here: ClassVar, init=False
    bases: tuple[str, ...]
    decorators: tuple[str, ...]  # beside that of a dataclass; any but `register` may add a constructor
    followed: bool  # whether the bases say the rest: no metaclass, no `__new__`


@dataclasses.dataclass(frozen=True)
class _Decorated:
    """A class or function with a call of something named by its whole dotted name as decorator."""

    name: str
    decorator: str
    line: int
    kind: str
    paper: str
    equations: str
    summary: str
    denied: tuple[str, ...] | str  # or what is wrong with it
    function: _Signature | None


@dataclasses.dataclass(frozen=True)
class _Outline:
    """What a file defines and imports, by name."""

    classes: dict[str, _Class]
    names: dict[str, str]  # imported or set to another name: the whole dotted name
    stars: tuple[str, ...]
    decorated: tuple[_Decorated, ...]


def _signature(function: ast.FunctionDef, skip: int = 0) -> _Signature:
    args = function.args
    positional = args.posonlyargs + args.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = list(zip(positional, defaults))[skip:] + list(zip(args.kwonlyargs, args.kw_defaults))
    listed = tuple(
        Parameter(a.arg, ast.unparse(a.annotation) if a.annotation else None, ast.unparse(d) if d is not None else None)
        for a, d in pairs
    )
    return listed, args.kwarg is not None


def _last(node: ast.expr) -> str:
    """The last name of `a.b.name`, `name[…]` or `name(…)`."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _option(call: ast.expr | None, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None) if isinstance(call, ast.Call) else None


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _fields(node: ast.ClassDef, keywords_only: bool) -> tuple[list[tuple[Parameter, bool]], set[str]]:
    """The fields that a dataclass adds to its constructor, and the names it takes from that of its bases."""
    fields: list[tuple[Parameter, bool]] = []
    removed: set[str] = set()
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name, annotation, value = statement.target.id, statement.annotation, statement.value
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            with contextlib.suppress(SyntaxError):
                annotation = ast.parse(annotation.value, mode="eval").body
        kind = _last(annotation)
        special = value if isinstance(value, ast.Call) and _last(value) == "field" else None
        if kind == "KW_ONLY":
            keywords_only = True
        elif kind == "ClassVar" or _is(_option(special, "init"), False):
            removed.add(name)
        else:
            if kind == "InitVar" and isinstance(annotation, ast.Subscript):
                annotation = annotation.slice
            default = value if special is None else _option(special, "default")
            factory = _option(special, "default_factory")
            written = f"{ast.unparse(factory)}()" if factory is not None else ast.unparse(default) if default is not None else None
            asked = _option(special, "kw_only")
            fields.append((Parameter(name, ast.unparse(annotation), written), keywords_only if asked is None else _is(asked, True)))
    return fields, removed


def _class(node: ast.ClassDef, dotted: Callable[[ast.expr], str]) -> _Class:
    defined = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    decorator = next((d for d in node.decorator_list if _last(d) == "dataclass"), None)
    generated = decorator is not None and not _is(_option(decorator, "init"), False)
    others = [d for d in node.decorator_list if d is not decorator and _last(d) not in _PLAIN_DECORATORS]
    fields, removed = _fields(node, _is(_option(decorator, "kw_only"), True)) if decorator is not None else ([], set())
    own = _signature(defined["__init__"], 1) if "__init__" in defined else None
    return _Class(
        own=own,
        dataclass=own is None and generated,
        fields=tuple(fields),
        removed=frozenset(removed),
        bases=tuple(dotted(base) for base in node.bases),
        decorators=tuple(dotted(d.func) if isinstance(d, ast.Call) else dotted(d) for d in others),
        followed=not node.keywords and "__new__" not in defined,
    )


def _outline(path: Path, module: str) -> _Outline:
    """A file as it is on the disk now; read once for as long as it stays the same.

    Raises:
        SyntaxError: if it does not parse.
    """
    at = path.stat()
    return _outlined(path, at.st_mtime_ns, at.st_size, module)


@functools.cache
def _outlined(path: Path, _changed: int, _size: int, module: str) -> _Outline:
    source = path.read_text(encoding="utf-8-sig", errors="replace")
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects and no garbage: looking through them doubles the time
    try:
        return _outline_of(ast.parse(source, filename=str(path)), module, path.name == "__init__.py")
    finally:
        if collecting:
            gc.enable()


def _outline_of(tree: ast.Module, module: str, is_package: bool) -> _Outline:
    names: dict[str, str] = {}
    stars: list[str] = []
    classes: dict[str, _Class] = {}
    decorated: list[_Decorated] = []

    def dotted(node: ast.expr) -> str:
        """The whole name that an expression at the top of the module means; empty where it is not a name."""
        if isinstance(node, ast.Subscript):  # Base[int]
            return dotted(node.value)
        if isinstance(node, ast.Attribute):
            above = dotted(node.value)
            return f"{above}.{node.attr}" if above else ""
        if not isinstance(node, ast.Name):
            return ""
        return names.get(node.id) or ("object" if node.id == "object" else f"{module}.{node.id}")

    for node in _top(tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            stars += [source for alias in node.names if alias.name == "*"]
            names.update({alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names if alias.name != "*"})
        elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Name, ast.Attribute)):
            names.update({t.id: dotted(node.value) for t in node.targets if isinstance(t, ast.Name)})
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.pop(node.name, None)
            if isinstance(node, ast.ClassDef):
                classes[node.name] = _class(node, dotted)
            for call in node.decorator_list:
                called = dotted(call.func) if isinstance(call, ast.Call) else ""
                if called and isinstance(call, ast.Call):
                    decorated.append(_decorated(node, call, called, tree))
    return _Outline(classes, names, tuple(stars), tuple(decorated))


def _top(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those under its `if` and `try`."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _top([*node.orelse, *node.body])
        elif isinstance(node, ast.Try):
            yield from _top([*(n for h in node.handlers for n in h.body), *node.orelse, *node.body, *node.finalbody])
        else:
            yield node


def _decorated(node: ast.ClassDef | ast.FunctionDef, call: ast.Call, called: str, tree: ast.Module) -> _Decorated:
    keywords = {k.arg: k.value for k in call.keywords}
    denied: tuple[str, ...] | str = ()
    if "denylist" in keywords:
        try:
            denied = _written(keywords["denylist"], tree, f"denylist of {node.name} at line {node.lineno}")
        except ValueError as error:
            denied = str(error)
    return _Decorated(
        name=node.name,
        decorator=called,
        line=node.lineno,
        kind=_text(call.args[0]) if call.args else _text(keywords.get("kind")),
        paper=_text(keywords.get("paper")),
        equations=_text(keywords.get("equations")),
        summary=(ast.get_docstring(node) or "").strip().split("\n")[0],
        denied=denied,
        function=_signature(node) if isinstance(node, ast.FunctionDef) else None,
    )


def _file_of(module: str) -> Path | None:
    """The source file of a module of the core or of an installed plugin: only what those hold is followed."""
    homes = {"core": _CORE} | {p.package: p.folder for p in plugins().values() if p.folder}
    for package, folder in homes.items():
        if module == package or module.startswith(package + "."):
            place = folder.joinpath(*module[len(package) :].split(".")[1:])
            return next((p for p in (place / "__init__.py", place.with_suffix(".py")) if p.is_file()), None)
    return None


def _origin(name: str, near: tuple[str, Path], seen: frozenset[str] = frozenset()) -> tuple[str, _Class | None]:
    """Where a dotted name is defined, through the imports of other modules, and the class it is, if its text can be had."""
    module, _, last = name.rpartition(".")
    if name == _REGISTER or name in seen:
        return name, None
    path = near[1] if module == near[0] else _file_of(module) if module else None
    if path is None:
        return name, None
    try:
        outline = _outline(path, module)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return name, None
    if last in outline.classes and last not in outline.names:
        return name, outline.classes[last]
    seen |= {name}
    if last in outline.names:
        return _origin(outline.names[last], near, seen)
    for source in outline.stars:
        found, node = _origin(f"{source}.{last}", near, seen)
        if node is not None or found == _REGISTER:
            return found, node
    return name, None


def _constructor(cls: _Class, near: tuple[str, Path], depth: int = 0) -> _Signature | None:
    """The constructor of a class as the text says; None where neither it nor a base writes one, and that is certain."""
    if cls.own is not None:
        return cls.own
    followed = cls.followed and depth < 20 and all(_origin(name, near)[0] == _REGISTER for name in cls.decorators)
    if cls.dataclass and followed:
        fields, certain = _all_fields(cls, near, depth)
        ordered = sorted(fields.values(), key=lambda field: field[1])
        return tuple(parameter for parameter, _ in ordered), not certain
    if not followed:
        return (), True
    found = [_origin(base, near) for base in cls.bases]
    signatures: list[_Signature] = []
    for name, base in found:
        signature = _constructor(base, near, depth + 1) if base else None if name in _PLAIN_BASES else ((), True)
        if base and base.own and not signatures:
            return signature
        signatures += [signature] if signature is not None else []
    alike = all(signature == signatures[0] for signature in signatures)  # else the order of all the bases decides
    return None if not signatures else signatures[0] if alike else ((), True)


def _all_fields(cls: _Class, near: tuple[str, Path], depth: int) -> tuple[dict[str, tuple[Parameter, bool]], bool]:
    """The fields of a dataclass with those of its bases by name, in order, and whether these are all there are."""
    fields: dict[str, tuple[Parameter, bool]] = {}
    certain = depth < 20
    for base in reversed(cls.bases) if certain else ():
        name, found = _origin(base, near)
        if found is not None:
            more, known = _all_fields(found, near, depth + 1)
            fields.update(more)
            certain = certain and known
        elif name not in _PLAIN_BASES:
            certain = False
    for gone in cls.removed:
        fields.pop(gone, None)
    fields.update({parameter.name: (parameter, keyword) for parameter, keyword in cls.fields})
    return fields, certain


def _scan(path: Path, module: str, space: str, plugin: str, distribution: str) -> Iterator[Component]:
    """Components of a file as it is on the disk now.

    Raises:
        SyntaxError: if it does not parse, and may register something.
        ValueError: if what has to be written out is computed.
    """
    if path.name != "__init__.py":
        text = path.read_bytes()
        if b"register" not in text or not _USED.search(text):
            return
    outline, near = _outline(path, module), (module, path)
    for node in outline.decorated:
        if _origin(node.decorator, near)[0] != _REGISTER:
            continue
        if isinstance(node.denied, str):
            raise ValueError(node.denied)
        cls = outline.classes.get(node.name)
        signature = node.function or (_constructor(cls, near) if cls else None) or ((), False)
        yield Component(
            name=f"{space}.{node.name}",
            kind=node.kind,
            paper=node.paper,
            equations=node.equations,
            plugin=plugin,
            distribution=distribution,
            module=module,
            file=str(path),
            line=node.line,
            summary=node.summary,
            parameters=signature[0],
            denied=node.denied,
            open_keywords=signature[1],
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
    for path, module in _modules(_CORE, "core"):
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


def add_module(module: str) -> None:
    """Put what a module outside the plugins registers into the index, from its source text; of a package, all its modules.

    Raises:
        ValueError: if there is no such module, its source cannot be read, or one of its names is taken.
    """
    folder = _package_folder(module)
    if folder is not None and (folder / "__init__.py").is_file():
        files = list(_modules(folder, module))
    else:
        parent, _, last = module.rpartition(".")
        above = _package_folder(parent) if parent else None
        spec = None if parent else importlib.util.find_spec(module)
        origin = above / f"{last}.py" if above else Path(spec.origin) if spec and spec.origin else None
        compiled = module in sys.modules or (above is not None and any(above.glob(f"{last}.*")))
        if not compiled and (origin is None or (above and not origin.is_file())):
            raise ValueError(f"no module {module!r} is importable here; install it, or put its folder on PYTHONPATH")
        files = [(origin, module)] if origin and origin.suffix == ".py" and origin.is_file() else []
    known = index()
    for path, name in files:
        try:
            text = path.read_bytes()
            if b"core" not in text or b"registry" not in text:
                continue  # however large the package
            for component in _scan(path, name, _declared(name, path) or name.split(".")[-1], "", module):
                other = known.get(component.name, component)
                known[component.name] = component if other.file == component.file else other
                if other.file != component.file:
                    raise ValueError(
                        f"{component.name} is registered twice, at {other.file}:{other.line} and {component.file}:{component.line}"
                    )
        except SyntaxError as error:
            raise ValueError(f"SyntaxError in {path}:{error.lineno}: {error.msg}") from None
        except (OSError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None


def _declared(module: str, path: Path) -> str | None:
    """The `__plugin__` that a module or the nearest package above it declares, from source text."""
    parts = module.split(".")
    above = [_package_folder(".".join(parts[:depth])) for depth in range(len(parts), 0, -1)]
    for place in [path, *(folder / "__init__.py" for folder in above if folder)]:
        name = _constants(place).get("__plugin__") if place.is_file() else None
        if name is not None:
            return str(name)
    return None


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
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
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


def module_hash(module: str) -> str | None:
    """sha256 of a module that is imported: as `source_hash` of a package, of the bytes of a file; None where there is neither."""
    loaded = sys.modules[module]
    folders, file = list(getattr(loaded, "__path__", ())), getattr(loaded, "__file__", None)
    if folders:
        return source_hash(Path(folders[0]))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


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
    """Import what a component needs: its plugin, or its own module."""
    component = find(name)
    if component.plugin not in plugins():  # of the core, or of a module that a gin file imports
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
