"""The verbs of the command line. Help, listing and checking import neither torch nor a plugin."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence

VERBS = {
    "run": "train and evaluate one reproduction, from a gin file",
    "config": "check a gin file, say where a value comes from, compare two runs",
    "list": "components: name, kind, plugin, paper, where installed from",
    "data": "make a sample data set, or check a real one against its published counts",
    "verify": "golden cases and claims, each with a measured figure",
    "profile": "FLOPs, parameters, latency, memory, compression ratio",
    "report": "one self-contained HTML page of runs, and its tables in Markdown and CSV",
    "compare": "two runs side by side",
    "sweep": "many runs, here or on SLURM",
    "status": "how the runs of a sweep stand",
    "cancel": "stop the runs of a sweep",
    "export": "a trained module as torch.export or ONNX, checked against PyTorch",
    "claims": "the ledger: what is reproduced, what is not, what nobody has run",
    "new": "a third-party plugin package that works before the first edit",
}

EXIT_FAILED, EXIT_USAGE = 1, 2


def available() -> dict[str, str]:
    """The verbs whose file is installed."""
    return {name: said for name, said in VERBS.items() if importlib.util.find_spec(f"repro.{name}") is not None}


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The argument parser of one verb (imports that verb's file only)."""
    module = importlib.import_module(f"repro.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"repro {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.arguments(parser)
    return parser


def config_options(
    parser: argparse._ActionsContainer, *, file: bool = True, required: bool = True, told: str = "override a macro or a parameter"
) -> None:
    """The options of every verb that reads a config: `--gin` (unless the verb asks for its file otherwise), `--set`, `--allow-import`."""
    if file:
        parser.add_argument("--gin", required=required, metavar="FILE", help="a gin file: a path, gin/NAME.gin, or PLUGIN:FILE")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides", help=f"{told} (repeatable)")
    parser.add_argument("--allow-import", action="store_true", help="let the gin file import modules outside the plugins")


def expected_errors() -> tuple[type[BaseException], ...]:
    """Errors that are the user's news rather than ours; a type is looked up only where its module is loaded already."""
    found: list[type[BaseException]] = [ValueError, OSError, FloatingPointError]
    for module, name in (
        ("core.config", "ConfigError"), ("core.registry", "PluginError"), ("core.record", "RunBusy"), ("core.checkpoint", "CheckpointError"),
        ("core.export", "ExportError"),
    ):  # fmt: skip
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def verb(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one verb and turn what goes wrong into one message and an exit status.

    0 done; 1 failed; 2 the request cannot be carried out as asked; 75 stopped by a signal with a checkpoint; 130 ^C.
    """
    parser = parser_of(name)
    arguments = parser.parse_args(argv)
    try:
        return _printed(lambda: int(importlib.import_module(f"repro.{name}").main(arguments) or 0))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, (*expected_errors(), KeyError)) or os.environ.get("REPRO_TRACEBACK"):
            traceback.print_exc()
            return EXIT_FAILED
        from core.config import said

        for line in said(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, (FloatingPointError, OSError, RuntimeError)) else EXIT_USAGE


def _printed(act: Callable[[], int]) -> int:
    """The status of what prints: failed, without a word, where nobody reads it to the end (`| head`)."""
    try:
        status = act()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        from core import record

        record.silence()
        return EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """`repro VERB …`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return _printed(lambda: _main(words))


def _main(words: list[str]) -> int:
    verbs = available()
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, verbs))
        print("usage: repro VERB [options]      (also: python -m repro.VERB)\n")
        for name, said in verbs.items():
            print(f"  {name:<{width}}  {said}")
        print("\n`repro VERB --help` shows a verb's options.")
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("ginrepro"))
        return 0
    if words[0] == "completion":
        return _completion(words[1:])
    if words[0] not in verbs:
        from difflib import get_close_matches

        near = get_close_matches(words[0], verbs, n=3)
        print(
            f"error: no verb {words[0]!r}; {'nearest: ' + ', '.join(near) if near else 'known: ' + ', '.join(verbs)}",
            file=sys.stderr,
        )
        return EXIT_USAGE
    return verb(words[0], words[1:])


def _completion(words: Sequence[str]) -> int:
    """`repro completion bash|zsh|tcsh`: a static completion script on standard output (extra `completion`)."""
    try:
        import shtab
    except ImportError:
        print("error: shell completion needs shtab; pip install 'ginrepro[completion]'", file=sys.stderr)
        return EXIT_USAGE
    shell = words[0] if words else "bash"
    if shell not in shtab.SUPPORTED_SHELLS:
        print(f"error: no completion for {shell!r}; one of {', '.join(shtab.SUPPORTED_SHELLS)}", file=sys.stderr)
        return EXIT_USAGE
    top = argparse.ArgumentParser(prog="repro")
    branches = top.add_subparsers()
    for name, said in available().items():
        module = importlib.import_module(f"repro.{name}")
        module.arguments(branches.add_parser(name, help=said))
    print(shtab.complete(top, shell=shell))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
