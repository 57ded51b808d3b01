"""A model's parts as torch.export programs and ONNX files, each read back and compared with PyTorch before it counts.

    repro export --run runs/sam3_fusion-0123abcd                     the best checkpoint of a run
    repro export --gin gin/sam3_fusion.gin --out DIR                 the model of a config with its initial weights
    repro export --run DIR --only encoder --sizes batch=1,tokens=33  one part, compared at these sizes only

What a model offers as parts, and which of their axes may change size, is the model's business (`export_parts`). ONNX needs the
extra `export`: pip install 'ginrepro[export]'; `--format torch` needs nothing.

The model of a run is built as the run built it, for which its data are opened (a generated sample is made again). Where they are gone,
it is built at the sizes that the config gives for that, and its weights must fit all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import config as configs
from core import record, registry
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
    from core import export
    from repro import show

    parts = _chosen(model.eval().export_parts(), args.only)
    _require_axes(wanted, parts)
    folder = Path(args.out) if args.out else folder
    print(f"{said}, {sum(p.numel() for p in model.parameters()):,} parameters, to {folder}")
    done: list[export.Exported] = []

    def tried(part: export.Part) -> list[dict[str, int]]:
        asked = [{k: n for k, n in sizes.items() if k in part.sizes()} for sizes in wanted]
        return [sizes for sizes in asked if sizes] or export.other_sizes(part)

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
        if name.strip() in sizes:
            raise ValueError(f"--sizes {text}: {name.strip()} is given twice; for more than one size repeat --sizes")
        sizes[name.strip()] = int(value)
    return sizes


def _require_axes(wanted: Sequence[dict[str, int]], parts: Sequence[Any]) -> None:
    """ValueError for a size of an axis that none of the parts has: nothing would be compared at it."""
    axes = {part.name: list(part.sizes()) for part in parts}
    known = {name for names in axes.values() for name in names}
    for name in dict.fromkeys(name for sizes in wanted for name in sizes):
        if name not in known:
            near = registry.nearest(name, known)
            have = "; ".join(f"{part}: {', '.join(names) or 'none'}" for part, names in axes.items())
            raise ValueError(
                f"--sizes {name}: no part to export has an axis of this name{f'; nearest: {near[0]}' if near else ''} ({have})"
            )


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
    _require_parts(model)
    said = f"{config.file} with initial weights"
    if args.weights:
        checkpoint.load_model(model, trainer.initial_weights(args.weights), what=args.weights)
        said = f"{config.file} with the weights of {args.weights}"
    return model, Path("runs") / "export" / config.stem, said


def _trained(run: Path, args: argparse.Namespace) -> tuple[Any, Path, str]:
    if not (run / "config.gin").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.gin")
    from repro import profile

    config = configs.read(str(run / "config.gin"), [], allow_imports=args.allow_import)
    task = profile.build(config)
    from core import checkpoint, trainer

    model, without = _rebuilt(task, run, int(config.get(f"{configs.TRAIN}.seed", 0)))
    _require_parts(model)
    weights = trainer.initial_weights(str(run))
    try:
        checkpoint.load_model(model, weights, what=str(run))
    except checkpoint.CheckpointError as error:
        if not without:
            raise
        raise checkpoint.CheckpointError(
            f"{error}. It was built without what the run had: {without}. Bring that back, or give --gin {run / 'config.gin'} --weights {run}, with the sizes by --set"
        ) from error
    if without:
        print(f"note: built at the sizes of the config, as the run cannot be set up again: {without}")
    return model, run / "export", f"{run} (best checkpoint)" + (", built without its data" if without else "")


def _rebuilt(task: Any, run: Path, seed: int) -> tuple[Any, str]:
    """The model as the run built it; where its data or files are gone, the task's blueprint, and what is gone.

    Raises:
        ValueError: if the task builds nothing without them.
    """
    from core import trainer

    try:
        trainer.seed_everything(seed)
        task.prepare(run.parent)
        trainer.seed_everything(seed)
        return task.model(), ""
    except cli.expected_errors() as error:
        gone = " ".join(configs.said(error).split()).rstrip(".")
    try:
        return task.blueprint(), gone
    except Exception as error:
        cause = f"{type(error).__name__}: {configs.said(error)}"
        raise ValueError(
            f"{run} cannot be set up again ({gone}), and {type(task).__name__} builds no model without that ({cause}). Bring it back"
        ) from error


def _require_parts(model: Any) -> None:
    if not hasattr(model, "export_parts"):
        raise ValueError(f"{type(model).__name__} names no parts to export (it has no method export_parts)")


if __name__ == "__main__":
    raise SystemExit(cli.verb("export"))
