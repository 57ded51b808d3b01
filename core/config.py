"""Gin with restraint: what gin 0.5.0 lets pass in silence is one clear error here, before anything is built.

A config is read twice. `read()` parses the files itself (no torch, nothing imported, nothing executed) and checks every
name, type, duplicate, macro, include and import against the static index of components; it knows for every value where
it comes from and what it shadowed. `apply()` then loads the plugins that are named and hands gin one canonical text.
After building, `unused()` lists the bindings that took no effect.

Order of precedence, weakest first: the constructor's default; an included file, in the order of the statements; the
file itself; `--set` on the command line.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import math
import re
import tokenize
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core import registry

try:
    from gin import config_parser
except ImportError as absent:  # from a checkout without its environment, the folder gin/ passes for the library
    raise ImportError("gin-config is not installed in this Python; use .venv/bin/python, or install as README.md says") from absent

PRECEDENCE = "constructor default < included file < the file itself < --set"
TRAIN = "trainer.train"
REQUIRED = "gin.REQUIRED"


class ConfigError(ValueError):
    """Everything wrong with a config; `problems` has one line each, with file and line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


# --- values -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` (a constructor) or `@scope/name()` (refused: an instance made while gin parses is made before seeding)."""

    scope: str
    name: str
    evaluated: bool

    def __str__(self) -> str:
        return "@" + (f"{self.scope}/" if self.scope else "") + self.name + ("()" if self.evaluated else "")


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def format_value(value: Any) -> str:
    """A value as gin writes it."""
    if isinstance(value, (Reference, Macro)):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(format_value, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(format_value, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{format_value(k)}: {format_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _walk(k)
            yield from _walk(v)


def _reached(values: Iterable[Any], bindings: Mapping[str, Binding]) -> set[str]:
    """Names of the macros that values refer to, directly or through other macros."""
    queue, found = list(values), set[str]()
    while queue:
        for value in _walk(queue.pop()):
            if isinstance(value, Macro) and value.name not in found:
                found.add(value.name)
                queue += [bindings[value.name].value] if value.name in bindings else []
    return found


# --- what was written, and where --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Binding:
    """One statement. `selector` is the full component name; macros have an empty `argument` and their name as selector.

    What comes from an included file is a default: that a binding of a narrower scope replaces it everywhere is no mistake.
    """

    scope: str
    selector: str
    argument: str
    value: Any
    source: str
    included: bool = False

    @property
    def is_macro(self) -> bool:
        return not self.argument

    @property
    def key(self) -> str:
        head = (f"{self.scope}/" if self.scope else "") + self.selector
        return head if self.is_macro else f"{head}.{self.argument}"


_INCLUDED = "# from an included file"


def _within(wider: Binding, scope: str, selector: str, argument: str) -> bool:
    """Whether a parameter of a component in a scope is one that a binding of a wider scope gives too."""
    around = f"{wider.scope}/" if wider.scope else ""
    return (selector, argument) == (wider.selector, wider.argument) and scope != wider.scope and scope.startswith(around)


@dataclasses.dataclass
class Config:
    """A checked config: the winning binding of every key, and the ones it shadowed (weakest first)."""

    file: str
    overrides: tuple[str, ...]
    bindings: dict[str, Binding]
    shadowed: dict[str, list[Binding]]
    files: tuple[str, ...]
    imports: dict[str, str] = dataclasses.field(default_factory=dict)  # modules outside the plugins, and where each was asked for

    def resolve(self, value: Any, _through: frozenset[str] = frozenset()) -> Any:
        """A value with its macros replaced; one that leads to itself stays as it is."""
        while isinstance(value, Macro) and value.name in self.bindings and value.name not in _through:
            _through |= {value.name}
            value = self.bindings[value.name].value
        if isinstance(value, list):
            return [self.resolve(v, _through) for v in value]
        if isinstance(value, tuple):
            return tuple(self.resolve(v, _through) for v in value)
        if isinstance(value, dict):
            return {self.resolve(k, _through): self.resolve(v, _through) for k, v in value.items()}
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The resolved value of a macro or of `component.parameter`, or `default` where nothing binds it."""
        bound = self.bindings.get(name)
        return default if bound is None else self.resolve(bound.value)

    def text(self, *, extensible: bool = False) -> str:
        """The canonical gin text: imports and macros that are used first, then bindings, each sorted, all names in full.

        A binding of an included file that one of a narrower scope may replace is marked as such, so that it is no less a default
        where this text is read; with `extensible` every one is, as narrower ones may come on top.
        """
        used = _reached([b.value for b in self.bindings.values() if not b.is_macro], self.bindings)
        macros = sorted((b for b in self.bindings.values() if b.is_macro and b.key in used), key=lambda b: b.key)
        rest = sorted((b for b in self.bindings.values() if not b.is_macro), key=lambda b: b.key)
        imports = "".join(f"import {module}\n" for module in sorted(self.imports))
        scopes = {(b.scope, b.selector, b.argument) for b in rest}
        replaceable = {b.key for b in rest if b.included and (extensible or any(_within(b, *other) for other in scopes))}
        marks = dict.fromkeys(replaceable, f"  {_INCLUDED}")
        return imports + "".join(f"{b.key} = {format_value(b.value)}{marks.get(b.key, '')}\n" for b in macros + rest)

    def effective(self) -> dict[str, str]:
        """Every parameter binding with macros replaced, as text: what makes two configs the same run."""
        return {b.key: format_value(self.resolve(b.value)) for b in self.bindings.values() if not b.is_macro}

    @property
    def signature(self) -> str:
        """Eight hex digits that name this run: a hash of the effective bindings, and of what is imported beside the plugins."""
        imports = [f"import {module}" for module in sorted(self.imports)]
        canonical = "\n".join([*imports, *(f"{k} = {v}" for k, v in sorted(self.effective().items()))])
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    @property
    def stem(self) -> str:
        return Path(self.file.rpartition(":")[2]).stem

    def components(self) -> list[str]:
        """Full names of the components that are bound or referred to, sorted."""
        names = {b.selector for b in self.bindings.values() if not b.is_macro}
        for binding in self.bindings.values():
            names |= {v.name for v in _walk(binding.value) if isinstance(v, Reference)}
        return sorted(names)

    def plugins(self) -> list[str]:
        """The plugins this config needs."""
        return sorted({registry.find(name).plugin for name in self.components()} & registry.plugins().keys())


# --- files ------------------------------------------------------------------------------------------------------------


def config_root() -> Path:
    """The folder of the project's own gin files: the copy that a wheel carries, or `gin/` of a checkout."""
    top = Path(__file__).resolve().parent.parent
    packed = top / "repro" / "configs"  # looked for first: beside an installed core, `gin/` is the gin library
    return packed if packed.is_dir() else top / "gin"


def locate(name: str, relative_to: Path | None = None) -> Path:
    """Find a gin file: a path, a path below the config root, or `plugin:file` inside an installed plugin.

    Raises:
        ConfigError: if there is none; lists where it was looked for and the nearest names.
    """
    plugin, colon, inner = name.partition(":")
    if colon and not Path(name).exists():
        known = registry.plugins()
        if plugin not in known:
            near = registry.nearest(plugin, known) or sorted(known)
            raise ConfigError([f"{name}: no plugin {plugin!r} is installed; known: {', '.join(near)}"])
        folder = known[plugin].folder
        places = [folder / "gin" / inner] if folder else []
        places += [config_root() / plugin / inner, config_root() / inner]
    else:
        path = Path(name)
        if path.is_absolute():
            places = [path]
        else:
            places = [relative_to / path] if relative_to else []
            tail = Path(*path.parts[1:]) if path.parts and path.parts[0] == "gin" else path
            places += [Path.cwd() / path, config_root() / tail]
            # What an installed file includes is installed too, whatever the current folder holds.
            if relative_to and (_below(relative_to, [config_root()]) or not _below(relative_to, [Path.cwd()])):
                places[-2:] = reversed(places[-2:])
    for place in places:
        if place.is_file():
            return place
    available = ["gin/" + p.relative_to(config_root()).as_posix() for p in config_root().rglob("*.gin")]
    for owner in registry.plugins().values():
        inside = owner.folder / "gin" if owner.folder else None
        available += [f"{owner.name}:{p.relative_to(inside).as_posix()}" for p in inside.rglob("*.gin")] if inside else []
    near = registry.nearest(str(name), sorted(available))
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ConfigError([f"no gin file {name!r} (looked for {', '.join(str(p) for p in places)}){hint}"])


def _below(path: Path, roots: Iterable[Path]) -> bool:
    resolved = path.resolve()
    return any(resolved.is_relative_to(root.resolve()) for root in roots)


def _no_parameter(name: str, known: Sequence[str]) -> str:
    near = registry.nearest(name, known)
    return f"no parameter {name!r}; " + (f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(known) or 'none'}")


class _Reader:
    def __init__(self, allow_imports: bool):
        self.allow_imports = allow_imports
        self.problems: list[str] = []
        self.statements: list[tuple[Binding, str]] = []  # with the file that holds it
        self.files: list[str] = []
        self.imports: dict[str, str] = {}
        self.broken: set[str] = set()  # plugins of which it has been said
        self.roots: list[Path] = [config_root()] + [p.folder for p in registry.plugins().values() if p.folder]

    def file(self, path: Path, chain: tuple[Path, ...] = ()) -> None:
        resolved = path.resolve()
        if resolved in chain:
            cycle = " -> ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
            self.problems.append(f"{path}: include cycle: {cycle}")
            return
        self.files.append(str(path))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{path}: cannot be read: {error}")
            return
        self.parse(text, str(path), path.parent, (*chain, resolved))

    def parse(self, text: str, label: str, folder: Path, chain: tuple[Path, ...], *, source: str | None = None) -> None:
        seen: dict[str, str] = {}
        lines = text.split("\n")
        try:
            parser = config_parser.ConfigParser(text, _Delegate())
            for statement in parser:
                if isinstance(statement, config_parser.BlockDeclaration):
                    continue
                where = source or f"{label}:{statement.location.line_num}"
                if isinstance(statement, config_parser.IncludeStatement):
                    self.include(statement.filename, where, folder, chain)
                elif isinstance(statement, config_parser.ImportStatement):
                    self.importing(statement.module, where)
                else:
                    binding = self.binding(statement, where)
                    if binding is None:
                        continue
                    if binding.key in seen:
                        self.problems.append(
                            f"{where}: {binding.key} is bound twice in one place (first at {seen[binding.key]}); remove one"
                        )
                    seen.setdefault(binding.key, where)
                    if len(chain) > 1 or lines[statement.location.line_num - 1].endswith(_INCLUDED):
                        binding = dataclasses.replace(binding, included=True)
                    self.statements.append((binding, label))
        except SyntaxError as error:
            line = f":{error.lineno}" if error.lineno and source is None else ""
            self.problems.append(f"{source or label}{'' if source else line}: {str(error.msg).strip()}")
        except _UNREADABLE as error:
            self.problems.append(f"{source or label}: {_reason(error)}")

    def include(self, name: str, where: str, folder: Path, chain: tuple[Path, ...]) -> None:
        try:
            path = locate(name, folder)
        except ConfigError as error:
            self.problems += [f"{where}: include: {p}" for p in error.problems]
            return
        if not _below(path, [*self.roots, chain[0].parent]):
            self.problems.append(
                f"{where}: include {name!r} leaves the config folders ({path}); a gin file is code, copy it below one of them"
            )
            return
        self.file(path, chain)

    def importing(self, module: str, where: str) -> None:
        packages = ["core", *(p.package for p in registry.plugins().values())]
        if any(module == p or module.startswith(p + ".") for p in packages):
            return
        if self.allow_imports:
            try:
                registry.add_module(module)
                self.imports.setdefault(module, where)
            except (ValueError, ImportError) as error:
                self.problems.append(f"{where}: import {module}: {error}")
            return
        self.problems.append(
            f"{where}: `import {module}` would execute it; gin files import only installed plugins, which are found by name anyway. "
            "Remove the line, or pass --allow-import"
        )

    def binding(self, statement: Any, where: str) -> Binding | None:
        if not statement.arg_name:
            name = f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector
            return Binding("", name, "", statement.value, where)
        try:
            component = registry.find(statement.selector)
        except KeyError as error:
            self.problems.append(f"{where}: {error.args[0]}")
            return None
        self.usable(component, where)
        names = [p.name for p in component.parameters]
        if component.parameter(statement.arg_name) is None and not component.open_keywords:
            self.problems.append(f"{where}: {component.name} has {_no_parameter(statement.arg_name, names)}")
            return None
        if statement.arg_name in component.denied:
            self.problems.append(f"{where}: {component.name}.{statement.arg_name} is supplied by the program and cannot be bound")
            return None
        return Binding(statement.scope, component.name, statement.arg_name, self.full(statement.value, where), where)

    def usable(self, component: registry.Component, where: str) -> None:
        """Say once of a plugin that its component cannot be had, where that is known without importing it."""
        cause = registry.plugin_problems().get(component.plugin)
        if cause and component.plugin not in self.broken:
            self.broken.add(component.plugin)
            self.problems.append(
                f"{where}: {component.name}: plugin {component.plugin!r} (distribution {component.distribution}) is broken: {cause}"
            )

    def full(self, value: Any, where: str) -> Any:
        """A value with references in full names."""
        if isinstance(value, Reference):
            if value.evaluated:
                self.problems.append(
                    f"{where}: {value} makes an instance before the seed is set; pass the constructor, {str(value)[:-2]}"
                )
                return value
            try:
                component = registry.find(value.name)
            except KeyError as error:
                self.problems.append(f"{where}: {value}: {error.args[0]}")
                return value
            self.usable(component, where)
            return dataclasses.replace(value, name=component.name)
        if _infinite(value):
            self.problems.append(
                f"{where}: {value} is no value: gin writes finite numbers only; give one, or None where it may be left out"
            )
        if isinstance(value, list):
            return [self.full(v, where) for v in value]
        if isinstance(value, tuple):
            return tuple(self.full(v, where) for v in value)
        if isinstance(value, dict):
            return {self.full(k, where): self.full(v, where) for k, v in value.items()}
        return value

    def bindings(self) -> list[Binding]:
        """Everything bound, in order, with the references of macros in full names too."""
        return [dataclasses.replace(b, value=self.full(b.value, b.source)) if b.is_macro else b for b, _ in self.statements]


@dataclasses.dataclass
class Draft:
    """A gin file that is read and not yet checked as a whole: what the configs of a sweep share.

    A draft may still lack required values, which overrides supply. Each override is parsed once, however many of the
    configs use it.
    """

    file: str
    path: Path
    files: tuple[str, ...]
    bindings: dict[str, Binding]
    shadowed: dict[str, list[Binding]]
    problems: list[str]
    imports: dict[str, str]
    _parsed: dict[str, tuple[list[Binding], list[str]]] = dataclasses.field(default_factory=dict, repr=False)

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The checked config with these overrides on top.

        Raises:
            ConfigError: with every problem at once, as `read`.
        """
        winning = dict(self.bindings)
        shadowed = {key: list(old) for key, old in self.shadowed.items()}
        problems = list(self.problems)
        seen: dict[str, str] = {}
        for override in overrides:
            found, said = self._override(override)
            problems += said
            for binding in found:
                if binding.key in seen:
                    problems.append(f"{binding.source}: {binding.key} is already set by {seen[binding.key]}; give it once")
                seen[binding.key] = binding.source
                if binding.key in winning:
                    shadowed.setdefault(binding.key, []).append(winning[binding.key])
                winning[binding.key] = binding
        config = Config(self.file, tuple(overrides), winning, shadowed, self.files, self.imports)
        problems += _check_macros(config) + _check_types(config)
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        return config

    def required(self) -> list[str]:
        """Names that the files leave to the user (`= %gin.REQUIRED`)."""
        return [key for key, b in self.bindings.items() if isinstance(b.value, Macro) and b.value.name == REQUIRED]

    def text(self, overrides: Sequence[str] = ()) -> str:
        """The canonical gin text with these overrides, unchecked: a file from which further overrides give the same configs."""
        winning = dict(self.bindings)
        for override in overrides:
            winning.update((binding.key, binding) for binding in self._override(override)[0])
        return Config(self.file, tuple(overrides), winning, {}, self.files, self.imports).text(extensible=True)

    def _override(self, override: str) -> tuple[list[Binding], list[str]]:
        if override not in self._parsed:
            label = f"--set {override}"
            name, equals, value = override.partition("=")
            if not _encodable(override):
                shown = label.encode("utf-8", "backslashreplace").decode()
                self._parsed[override] = [], [f"{shown}: these bytes are not UTF-8; write the value in UTF-8"]
            elif not equals or not name.strip():
                self._parsed[override] = [], [f"{label}: want NAME=VALUE, e.g. --set train.steps=100"]
            elif not _NAME.fullmatch(name.strip()) or "\n" in value or "\r" in value:
                shown = label.replace("\n", "\\n").replace("\r", "\\r")
                self._parsed[override] = [], [f"{shown}: one --set is one NAME=VALUE on one line; give --set once for each"]
            else:
                reader = _Reader(allow_imports=False)
                text = f"{name.strip()} = {quoted(value.strip())}\n"
                reader.parse(text, label, self.path.parent, (self.path.resolve(),), source=label)
                self._parsed[override] = reader.bindings(), reader.problems
        return self._parsed[override]


def draft(file: str, *, allow_imports: bool = False) -> Draft:
    """Read a gin file and what it includes; the whole is checked by `Draft.config`.

    Raises:
        ConfigError: if there is no such file.
    """
    path = locate(file)
    reader = _Reader(allow_imports)
    reader.file(path)
    winning: dict[str, Binding] = {}
    shadowed: dict[str, list[Binding]] = {}
    for binding in reader.bindings():
        if binding.key in winning:
            shadowed.setdefault(binding.key, []).append(winning[binding.key])
        winning[binding.key] = binding
    return Draft(str(file), path, tuple(reader.files), winning, shadowed, reader.problems, reader.imports)


def read(file: str, overrides: Sequence[str] = (), *, allow_imports: bool = False) -> Config:
    """Read and check a gin file with `--set` overrides, without importing a plugin or torch.

    Args:
        file: a path, a path below the config root, or `plugin:file`.
        overrides: statements `name.parameter=value` or `MACRO=value`; strings may be written without quotes.
        allow_imports: let `import` statements name modules outside the plugins. What they register may be used in the lines
            that follow; as of a plugin, only their source is read here, and `apply` imports them.

    Raises:
        ConfigError: with every problem at once: syntax, unknown names (with the nearest), wrong types, duplicates,
            include cycles and escapes, imports, unknown, unused and required macros.
    """
    return draft(file, allow_imports=allow_imports).config(overrides)


def read_keys(path: Path, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Read a file of upper-case keys in gin syntax (`TIME = 60`), which configures something other than components.

    Args:
        path: the file.
        annotations: the keys there are, each with the type of its value as source text.

    Raises:
        ConfigError: with every problem at once: syntax, unknown keys (with the nearest), duplicates, wrong types, and
            anything that is not a key (bindings, references, macros, imports, includes).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    return parse_keys(text, str(path), annotations)


def parse_keys(text: str, label: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    """As `read_keys`, from text; `label` names it in errors."""
    problems: list[str] = []
    found: dict[str, Any] = {}
    try:
        statements = list(config_parser.ConfigParser(text, _Delegate()))
    except SyntaxError as error:
        raise ConfigError([f"{label}{f':{error.lineno}' if error.lineno else ''}: {str(error.msg).strip()}"]) from None
    except _UNREADABLE as error:
        raise ConfigError([f"{label}: {_reason(error)}"]) from None
    for statement in statements:
        where = f"{label}:{statement.location.line_num}" if "\n" in text else label
        if not isinstance(statement, config_parser.BindingStatement) or statement.arg_name or statement.scope:
            problems.append(f"{where}: only keys stand here: {', '.join(annotations)}")
            continue
        key, value = statement.selector, statement.value
        if key not in annotations:
            near = registry.nearest(key, annotations)
            problems.append(f"{where}: no key {key!r}; {'nearest' if near else 'there are'}: {', '.join(near or annotations)}")
        elif key in found:
            problems.append(f"{where}: {key} is given twice; remove one")
        elif any(map(_infinite, _walk(value))):
            problems.append(f"{where}: {key} = {format_value(value)}: numbers have to be finite")
        elif any(isinstance(v, (Reference, Macro)) for v in _walk(value)) or not accepts(annotations[key], value):
            problems.append(f"{where}: {key} must be {annotations[key]}, got {format_value(value)} ({type(value).__name__})")
        else:
            found[key] = value
    if problems:
        raise ConfigError(problems)
    return found


def quoted(text: str) -> str:
    """A value from the command line as gin text: itself where it parses, else a string."""
    try:
        config_parser.ConfigParser(f"x = {text}\n", _Delegate()).parse_statement()
    except (SyntaxError, ValueError, tokenize.TokenError):
        return repr(text)
    except _UNREADABLE:  # it parses and is no value: said where it is read
        return text
    return text


_NAME = re.compile(r"\w+([./]\w+)*")
# A bracket that is never closed is an error of the tokenizer's own; `{[1]: 2}` a TypeError; thousands of brackets are too deep.
_UNREADABLE = (ValueError, TypeError, RecursionError, MemoryError, tokenize.TokenError)


def _reason(error: BaseException) -> str:
    return f"cannot be read: {error}" if isinstance(error, (TypeError, RecursionError, MemoryError)) else str(error.args[0])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _infinite(value: Any) -> bool:
    """Whether a value is a number that is not finite: Python reads `1e400`, and writes what gin cannot read."""
    return isinstance(value, (float, complex)) and not (math.isfinite(value.real) and math.isfinite(value.imag))


def _cycles(macros: Mapping[str, Binding]) -> Iterator[list[str]]:
    """Macros that lead back to themselves, each circle with its first name again at the end."""
    left = {name: {v.name for v in _walk(b.value) if isinstance(v, Macro)} for name, b in macros.items()}
    while True:
        while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
            for name in leaves:
                del left[name]
        if not left:
            return
        path = [min(left)]
        while (following := min(left[path[-1]] & left.keys())) not in path:
            path.append(following)
        circle = path[path.index(following) :]
        yield [*circle, following]
        for name in circle:
            del left[name]


def _check_macros(config: Config) -> list[str]:
    problems = []
    macros = {b.selector: b for b in config.bindings.values() if b.is_macro}
    used: set[str] = set()
    queue = [b for b in config.bindings.values() if not b.is_macro]
    reached: set[str] = set()
    while queue:
        binding = queue.pop()
        for value in _walk(binding.value):
            if not isinstance(value, Macro):
                continue
            if value.name == REQUIRED:
                problems.append(
                    f"{binding.source}: {binding.key} is required and not set; add `{binding.key} = …` or --set {binding.key}=…"
                )
            elif value.name not in macros:
                near = registry.nearest(value.name, macros)
                problems.append(
                    f"{binding.source}: no macro %{value.name}" + (f"; nearest: {', '.join('%' + n for n in near)}" if near else "")
                )
            else:
                used.add(value.name)
                if value.name not in reached:
                    reached.add(value.name)
                    queue.append(macros[value.name])
    # What a stronger binding has replaced still explains a macro of a file; one given by --set must do something.
    mentioned = _reached([b.value for old in config.shadowed.values() for b in old], config.bindings)
    for circle in _cycles(macros):
        problems.append(
            f"{macros[circle[0]].source}: macro {circle[0]} leads back to itself: {' -> '.join(circle)}; give one a value"
        )
        used.update(circle)
    for name, macro in macros.items():
        if name not in used and (name not in mentioned or macro.source.startswith("--set ")):
            near = registry.nearest(name, set(macros) - {name} & used)
            problems.append(
                f"{macro.source}: macro {name} is set and never used" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
    return problems


# --- types ------------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "Path": lambda v: isinstance(v, str),
    "None": lambda v: v is None,
    "bytes": lambda v: isinstance(v, bytes),
}
_CONTAINERS = {"list": (list,), "List": (list,), "Sequence": (list, tuple), "Iterable": (list, tuple), "set": (set, list, tuple)}


def accepts(annotation: str | None, value: Any) -> bool:
    """Whether a gin value fits an annotation given as source text. What cannot be decided is accepted."""
    if annotation is None or isinstance(value, Macro):
        return True
    node = _annotation(annotation)
    return node is None or _fits(node, value)


@functools.cache
def _annotation(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _fits(node: ast.expr, value: Any) -> bool:
    if isinstance(value, Macro):
        return True
    if isinstance(node, ast.Constant):
        if node.value is None:
            return value is None
        return accepts(node.value, value) if isinstance(node.value, str) else True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _fits(node.left, value) or _fits(node.right, value)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    if name is not None:
        if name in _PLAIN:
            return _PLAIN[name](value)
        if name in ("Callable", "type", "Type"):
            return isinstance(value, Reference)
        if name in _CONTAINERS:
            return isinstance(value, _CONTAINERS[name])
        if name in ("tuple", "Tuple"):
            return isinstance(value, (tuple, list))
        if name in ("dict", "Dict", "Mapping"):
            return isinstance(value, dict)
        return True
    if isinstance(node, ast.Subscript):
        head = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        if head == "Literal":
            return any(_is_literal(i, value) for i in inner)
        if head == "Optional":
            return value is None or _fits(inner[0], value)
        if head == "Union":
            return any(_fits(i, value) for i in inner)
        if head in ("Callable", "type", "Type"):
            return isinstance(value, Reference)
        if head in _CONTAINERS:
            return isinstance(value, _CONTAINERS[head]) and all(_fits(inner[0], v) for v in value)
        if head in ("tuple", "Tuple"):
            if not isinstance(value, (tuple, list)):
                return False
            if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is Ellipsis:
                return all(_fits(inner[0], v) for v in value)
            return len(value) == len(inner) and all(_fits(i, v) for i, v in zip(inner, value))
        if head in ("dict", "Dict", "Mapping") and len(inner) == 2:
            return isinstance(value, dict) and all(_fits(inner[0], k) and _fits(inner[1], v) for k, v in value.items())
    return True


def _is_literal(node: ast.expr, value: Any) -> bool:
    """Whether an element of `Literal[…]` is the value; a name, which cannot be decided from the text, may be."""
    try:
        written = ast.literal_eval(node)
    except ValueError:
        return True
    return type(written) is type(value) and bool(written == value)


def _check_types(config: Config) -> list[str]:
    problems = []
    for binding in config.bindings.values():
        parameter = None if binding.is_macro else registry.find(binding.selector).parameter(binding.argument)
        problems += _misfit(config, binding, parameter.annotation) if parameter else []
    return problems


def _misfit(config: Config, binding: Binding, annotation: str | None) -> list[str]:
    """What is wrong with the type of a binding's value, if anything."""
    value = config.resolve(binding.value)
    if accepts(annotation, value) or any(isinstance(v, Macro) or _infinite(v) for v in _walk(value)):
        return []  # what is infinite, or has macros that lead nowhere, is wrong whatever the type and said so already
    via = f" (through {binding.value})" if isinstance(binding.value, Macro) else ""
    source = config.bindings[binding.value.name].source if via and binding.value.name in config.bindings else binding.source
    return [f"{source}: {binding.key} must be {annotation}, got {format_value(value)} ({type(value).__name__}){via}"]


# --- explaining -------------------------------------------------------------------------------------------------------


def why(config: Config, name: str) -> list[str]:
    """Where the value of a macro or parameter comes from: the winner, what it shadowed, and the default.

    Raises:
        ConfigError: if there is no such name.
    """
    key, component, argument = name, None, ""
    if name not in config.bindings and "." in name:
        head, argument = name.rsplit(".", 1)
        scope, _, selector = head.rpartition("/")
        try:
            component = registry.find(selector)
        except KeyError as error:
            raise ConfigError([str(error.args[0])]) from None
        key = (f"{scope}/" if scope else "") + f"{component.name}.{argument}"
        if component.parameter(argument) is None and _in_force(config, key) is None:
            near = registry.nearest(argument, [p.name for p in component.parameters])
            unseen = ", as far as its source says" if component.open_keywords else ""
            raise ConfigError([f"{component.name} has no parameter {argument!r}{unseen}; nearest: {', '.join(near) or 'none'}"])
    bound = _in_force(config, key)
    if bound is None and component is None:
        near = registry.nearest(name, config.bindings)
        raise ConfigError([f"nothing is called {name!r} here; nearest: {', '.join(near) or 'none'}"])
    lines = []
    if bound is not None:
        shown = format_value(bound.value)
        resolved = format_value(config.resolve(bound.value))
        lines.append(f"{key} = {resolved}" + (f"   (written {shown})" if shown != resolved else ""))
        outer = "" if bound.key == key else f"   ({bound.key}, which holds in the scope too)"
        lines.append(f"  set by      {bound.source}{outer}")
        for macro in _chain(bound.value, config.bindings):
            lines.append(f"  {'%' + macro.key:<11} {macro.source}: {format_value(macro.value)}")
            lines += _shadows(config.shadowed.get(macro.key, []))
        lines += _shadows(config.shadowed.get(bound.key, []))
        for wider in _wider(key) if not bound.is_macro else ():
            if wider in config.bindings and len(wider) < len(bound.key):
                lines += _shadows([*config.shadowed.get(wider, []), config.bindings[wider]], f" ({wider})")
        if not bound.is_macro:
            component, argument = registry.find(bound.selector), bound.argument
    if component is not None:
        parameter = component.parameter(argument)
        if parameter is not None:
            default = parameter.default if parameter.default is not None else "(none: required)"
            if bound is None:
                lines.append(f"{key} = {default}   (the constructor's default)")
            lines.append(f"  default     {component.file}:{component.line}: {default}")
    return lines


def _wider(key: str) -> list[str]:
    """The key of a parameter, then in the scopes around its own, as gin looks a value up: `a/b/x.y`, `a/x.y`, `x.y`."""
    scope, _, rest = key.rpartition("/")
    parts = scope.split("/") if scope else []
    return ["/".join([*parts[:depth], rest]) for depth in range(len(parts), -1, -1)]


def _in_force(config: Config, key: str) -> Binding | None:
    """The binding that gives the value of a macro, or of a parameter in a scope."""
    exact = config.bindings.get(key)
    if exact is not None or "." not in key:
        return exact
    return next((config.bindings[k] for k in _wider(key) if k in config.bindings and not config.bindings[k].is_macro), None)


def _chain(value: Any, bindings: Mapping[str, Binding]) -> list[Binding]:
    """The macros that a value refers to and those that they refer to, each once, in order."""
    found: dict[str, Binding] = {}
    queue = [value]
    while queue:
        for part in _walk(queue.pop(0)):
            if isinstance(part, Macro) and part.name in bindings and part.name not in found:
                found[part.name] = bindings[part.name]
                queue.append(bindings[part.name].value)
    return list(found.values())


def _shadows(weaker: Sequence[Binding], remark: str = "") -> list[str]:
    return [f"  shadows     {old.source}: {format_value(old.value)}{remark}" for old in reversed(weaker)]


def difference(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str | None, str | None]]:
    """Keys whose effective values differ, with both values (None where absent)."""
    return [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


# --- applying ---------------------------------------------------------------------------------------------------------


def apply(config: Config) -> None:
    """Load what the config names and hand it to gin. Imports torch (through the components).

    Raises:
        registry.PluginError: if a plugin that this config names does not import.
        ConfigError: if a module that the file imports cannot be, or if now that all is imported a component turns out to be
            given where another kind of object is wanted, or a binding not to fit a constructor that the source does not show.
    """
    import gin

    for module, where in config.imports.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # somebody's module may raise anything at all
            raise ConfigError([f"{where}: import {module}: {type(error).__name__}: {error}"]) from error
    for name in config.components():
        registry.load_component(name)
    problems = _check_constructors(config) or _check_references(config)
    if problems:
        raise ConfigError(problems)
    gin.clear_config()
    gin.parse_config(config.text())


def _check_constructors(config: Config) -> list[str]:
    """Bindings of constructors that the source does not show whole: names and types, now that the classes are there."""
    known = registry.registered()
    problems = []
    for binding in config.bindings.values():
        if binding.is_macro or not registry.find(binding.selector).open_keywords:
            continue
        try:
            parameters = inspect.signature(known[binding.selector].cls).parameters
        except (TypeError, ValueError):  # one that is not written in Python
            continue
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = {name: p for name, p in parameters.items() if p.kind not in kinds}
        if binding.argument in named:
            annotation = named[binding.argument].annotation
            problems += _misfit(
                config, binding, None if annotation is inspect.Parameter.empty else inspect.formatannotation(annotation)
            )
        elif not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            problems.append(f"{binding.source}: {binding.selector} has {_no_parameter(binding.argument, list(named))}")
    return problems


def _check_references(config: Config) -> list[str]:
    """References to components that do not make what the parameter is annotated with: decidable once both are imported."""
    known = registry.registered()
    problems = []
    for binding in config.bindings.values():
        value = config.resolve(binding.value)
        if binding.is_macro or not isinstance(value, Reference):
            continue
        owner = known[binding.selector].cls
        wanted = _wanted(owner, binding.argument)
        if _makes(known[value.name].cls, wanted):
            continue
        default = inspect.signature(owner).parameters[binding.argument].default
        kinds = {r.kind for r in known.values() if r.cls is default} or {r.kind for r in known.values()}
        plugins = {"core", "", *config.plugins()}
        fitting = sorted(
            name
            for name, r in known.items()
            if r.kind in kinds and _makes(r.cls, wanted, certainly=True) and registry.find(name).plugin in plugins
        )
        problems.append(
            f"{binding.source}: {binding.key} = {value}: {binding.argument} takes a component that makes {wanted.__name__}, and {value.name} "
            f"is of kind {known[value.name].kind}; {'it may be ' + ', '.join(fitting) if fitting else 'nothing in use does'}"
        )
    return problems


def _wanted(owner: Callable[..., Any], argument: str) -> Any:
    """What a constructor given for `argument` has to return, by its annotation; None where that says nothing."""
    try:
        hints = typing.get_type_hints(owner.__init__) if inspect.isclass(owner) else typing.get_type_hints(owner)  # type: ignore[misc]
    except (NameError, TypeError):  # a name that is imported for type checkers alone
        return None
    annotation = hints.get(argument)
    for part in [annotation, *typing.get_args(annotation)]:
        if typing.get_origin(part) is Callable:
            made = typing.get_args(part)[-1]
            if typing.get_origin(made) is Callable:
                return Callable
            decidable = isinstance(made, type) and made not in (Any, type(None)) and not getattr(made, "_is_protocol", False)
            return made if decidable else None
    return None


def _makes(component: Callable[..., Any], wanted: Any, *, certainly: bool = False) -> bool:
    """Whether calling `component` gives a `wanted`. What cannot be decided is yes, unless it has to be certain."""
    if wanted is None:
        return not certainly
    made = component
    if not isinstance(component, type):
        try:
            made = typing.get_type_hints(component).get("return")  # type: ignore[assignment]
        except (NameError, TypeError):
            made = None  # type: ignore[assignment]
    return issubclass(made, wanted) if isinstance(made, type) else not certainly


def configured(name: str) -> Callable[..., Any]:
    """The gin-configured version of a registered component, by full name."""
    import gin

    made: Callable[..., Any] = gin.get_configurable(name)
    return made


_GINS_OWN = re.compile(r"^  In call to configurable '[^']*' \(<.*>\)( in scope '[^']*')?$")


def said(error: BaseException) -> str:
    """What an exception says, without the line that gin appends for every configurable it passed through."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
    lines = text.splitlines()
    return "\n".join(line for line in lines if not _GINS_OWN.match(line)) or type(error).__name__


def operative_text() -> str:
    """What ran: every parameter of every component that was called, defaults included. Parses back to the same run.

    All names are in full: gin's own text has the shortest that are unambiguous among the plugins of this run, and other plugins
    may be installed where it is read.
    """
    import gin
    from gin import config as gin_config

    text: str = gin.operative_config_str(max_line_length=132)
    lines: list[str] = []
    heading = ""
    for statement in config_parser.ConfigParser(text, _Delegate()):
        if isinstance(statement, config_parser.ImportStatement):
            lines.append(statement.format())
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        scope = f"{statement.scope}/" if statement.scope else ""
        if not statement.arg_name:
            lines.append(f"{scope}{statement.selector} = {format_value(statement.value)}")
            continue
        name = scope + gin_config._REGISTRY.get_match(statement.selector).selector
        lines += ["", f"# {name}"] if name != heading else []
        lines.append(f"{name}.{statement.arg_name} = {format_value(statement.value)}")
        heading = name
    return "\n".join(lines) + "\n"


def unused(config: Config) -> list[str]:
    """Bindings that were asked for and took no effect (call this after everything is built)."""
    from gin import config as gin_config

    reached: dict[str, list[tuple[str, set[str]]]] = {}
    for (scope, selector), arguments in gin_config._OPERATIVE_CONFIG.items():
        reached.setdefault(selector, []).append((scope, set(arguments)))
    asked: dict[tuple[str, str], list[Binding]] = {}
    for binding in config.bindings.values():
        if not binding.is_macro:
            asked.setdefault((binding.selector, binding.argument), []).append(binding)
    lines = []
    for (selector, argument), rivals in asked.items():
        winners: dict[str, list[str]] = {}  # of each binding that was in force somewhere, the wider ones that it replaced there
        for scope, arguments in reached.get(selector, []):
            held = {b.key: b for b in rivals}
            around = [k for k in _wider((f"{scope}/" if scope else "") + f"{selector}.{argument}") if k in held]
            if argument in arguments and around:
                winners.setdefault(around[0], []).extend(around[1:])
        for binding in rivals:
            if binding.key in winners:
                continue
            stronger = next((config.bindings[winner] for winner, replaced in winners.items() if binding.key in replaced), None)
            if stronger is not None and binding.included:
                continue
            parts = binding.scope.split("/") if binding.scope else []
            called = [scope for scope, _ in reached.get(selector, []) if scope.split("/")[: len(parts)] == parts or not parts]
            reason = (
                f"{stronger.key} at {stronger.source} replaced it wherever it is built"
                if stronger is not None
                else "the caller supplies this value itself"
                if called
                else "nothing in this config builds it in that scope"
                if selector in reached
                else "nothing in this config builds that component"
            )
            lines.append(f"{binding.source}: {binding.key} = {format_value(binding.value)} took no effect: {reason}; remove it")
    return lines
