"""A model's parts as torch.export programs and ONNX files, each read back and compared with PyTorch before it counts.

    repro export --run runs/sam3_fusion-0123abcd                     the best checkpoint of a run
    repro export --gin gin/sam3_fusion.gin --out DIR                 the model of a config with its initial weights
    repro export --run DIR --only encoder --sizes batch=1,tokens=33  one part, compared at these sizes only

What a model offers as parts, and which of their axes may change size, is the model's business (`export_parts`). ONNX needs the
extra `export`: pip install 'ginrepro[export]'; `--format torch` needs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import config as configs
from core import record
from repro import cli


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="a run folder; its best checkpoint is exported")
    source.add_argument("--gin", metavar="FILE", help="a gin file; its model with initial weights, or those of --weights")
    cli.config_options(parser, file=False, told="with --gin: override a macro or a parameter")
    parser.add_argument("--weights", metavar="FILE", help="with --gin: a checkpoint, run folder or weight file to load strictly")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: export/ in the run folder, or runs/export/NAME)")
    parser.add_argument("--format", nargs="+", choices=("torch", "onnx"), default=["torch", "onnx"], help="default: both")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument(
        "--sizes",
        action="append",
        default=[],
        metavar="NAME=N,…",
        help="sizes of the named axes to compare at (repeatable; default: the example's, all ones, and each axis longer)",
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="largest difference allowed (default 1e-4)")


def main(args: argparse.Namespace) -> int:
    if args.run and (args.overrides or args.weights):
        raise ValueError("--set and --weights go with --gin; a run folder is exported as it ran")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance must be positive, got {args.tolerance}")
    wanted = [_sizes(text) for text in args.sizes]
    model, folder, said = _trained(Path(args.run), args) if args.run else _configured(args)
    if not hasattr(model, "export_parts"):
        raise ValueError(f"{type(model).__name__} names no parts to export (it has no method export_parts)")
    from core import export
    from repro import show

    parts = _chosen(model.eval().export_parts(), args.only)
    folder = Path(args.out) if args.out else folder
    print(f"{said}, {sum(p.numel() for p in model.parameters()):,} parameters, to {folder}")
    done: list[export.Exported] = []

    def tried(part: export.Part) -> list[dict[str, int]]:
        return [{k: v for k, v in sizes.items() if k in part.sizes()} for sizes in wanted] or export.other_sizes(part)

    def told(one: export.Exported) -> None:
        done.append(one)
        print(f"  {one.path.name:<16} {one.bytes:>12,} bytes   agrees within {one.worst:.1e}", flush=True)

    try:
        export.export(parts, folder, args.format, tolerance=args.tolerance, sizes=tried, told=told)
    finally:
        if done:
            rows = [_row(one, parts) for one in done]
            record.write_json(folder / "export.json", {"source": said, "tolerance": args.tolerance, "files": rows})
    show.table(
        "exported and compared with PyTorch",
        ["file", "inputs", "dynamic axes", "sizes tried", "largest difference"],
        [[r["file"], r["inputs"], r["dynamic"], r["tried"], f"{r['worst']:.1e}"] for r in rows],
        "Difference: relative to the largest value of the output, or to 1.",
    )
    return 0


def _row(one: Any, parts: Sequence[Any]) -> dict[str, Any]:
    part = next(p for p in parts if p.name == one.part)
    return {
        "file": one.path.name, "bytes": one.bytes, "worst": one.worst,
        "inputs": ", ".join(f"{k} {'×'.join(map(str, v.shape))}" for k, v in part.inputs.items()),
        "dynamic": ", ".join(part.sizes()) or "none",
        "tried": "; ".join(",".join(f"{k}={n}" for k, n in s.items()) or "as they are" for s in one.sizes),
    }  # fmt: skip


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or not value.isdigit() or int(value) < 1:
            raise ValueError(f"--sizes wants NAME=N,… with N of at least 1, such as batch=1,tokens=33; got {text!r}")
        sizes[name.strip()] = int(value)
    return sizes


def _chosen(parts: Sequence[Any], only: Sequence[str] | None) -> list[Any]:
    names = [p.name for p in parts]
    for name in only or ():
        if name not in names:
            raise ValueError(f"--only {name}: the model has the parts {', '.join(names)}")
    return [p for p in parts if not only or p.name in only]


def _configured(args: argparse.Namespace) -> tuple[Any, Path, str]:
    from repro import profile

    config = configs.read(args.gin, args.overrides, allow_imports=args.allow_import)
    task = profile.build(config)
    from core import checkpoint, trainer

    trainer.seed_everything(int(config.get(f"{configs.TRAIN}.seed", 0)))
    model = task.blueprint()
    said = f"{config.file} with initial weights"
    if args.weights:
        checkpoint.load_model(model, trainer.initial_weights(args.weights), what=args.weights)
        said = f"{config.file} with the weights of {args.weights}"
    return model, Path("runs") / "export" / config.stem, said


def _trained(run: Path, args: argparse.Namespace) -> tuple[Any, Path, str]:
    if not (run / "config.gin").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.gin")
    from repro import profile

    task = profile.build(configs.read(str(run / "config.gin"), [], allow_imports=args.allow_import))
    from core import checkpoint, trainer

    model = task.model()
    checkpoint.load_model(model, trainer.initial_weights(str(run)), what=str(run))
    return model, run / "export", f"{run} (best checkpoint)"


if __name__ == "__main__":
    raise SystemExit(cli.verb("export"))
