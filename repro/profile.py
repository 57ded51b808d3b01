"""FLOPs by operator and module, parameters, activation memory, latency and peak memory of a configured model.

    repro profile --gin gin/sdtps_rgbnt.gin                 the model of a config, on this machine
    repro profile --gin gin/sdtps/rgbnt201.gin --count      count only (meta device): needs no data and no weights, so what the
                                                            file requires and `--set` does not give is '-'
    repro profile --gin gin/sam3_fusion.gin --inputs 32     also the least, mean and most over 32 test samples of its data

Counts are exact multiply-accumulates (MACs); FLOPs are twice that. An operator that multiplies matrices and has no formula is
an error, not a zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from core import config as configs
from core import record
from repro import cli, show


def arguments(parser: argparse.ArgumentParser) -> None:
    cli.config_options(parser)
    parser.add_argument("--count", action="store_true", help="count only, on the meta device: no weights, no data, no timing")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples in the profiled batch (default 1)")
    parser.add_argument("--inputs", type=int, default=0, metavar="N", help="also count N test samples of the data, one by one")
    parser.add_argument("--data", default="runs", metavar="DIR", help="with --inputs: where a sample is made if ROOT is not given")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed forwards (default 10)")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="levels of the module tree to print (default 2)")
    parser.add_argument("--json", metavar="FILE", help="also write the profile as JSON")


def build(config: configs.Config) -> Any:
    """The task of a config, without its data, in the scope that the config refers to it with."""
    import gin

    configs.apply(config)
    bound = config.get(f"{configs.TRAIN}.task")
    if not isinstance(bound, configs.Reference):
        raise ValueError(f"{config.file} binds no trainer.train.task, so there is nothing to profile")
    with gin.config_scope(bound.scope or None):
        return configs.configured(bound.name)()


def main(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.inputs < 0 or (args.inputs and args.count):
        raise ValueError("--inputs counts what real samples lead to: at least 1 of them, and not with --count, which has no values")
    draft = configs.draft(args.gin, allow_imports=args.allow_import)
    given = {override.partition("=")[0].strip() for override in args.overrides}
    absent = [f"{name}='-'" for name in draft.required() if args.count and name not in given]
    config = draft.config([*args.overrides, *absent])
    task = build(config)
    import torch

    if args.inputs:
        task.prepare(Path(args.data))
    with torch.device("meta" if args.count else "cpu"):
        model = task.blueprint()
        try:
            found = of_task(task, model, batch=args.batch, repeats=args.repeats, timed=not args.count, inputs=args.inputs)
        except NotImplementedError as error:
            raise ValueError(str(error)) from None
    from rich.console import Console

    from core.profile import Compression, Profile, Spread

    console = Console(width=None if record.interactive() else 132)
    for table in Profile.from_dict(found["model"]).tables(depth=args.depth):
        console.print(table)
    if "compression" in found:
        _compression(Compression.from_dict(found["compression"]))
    elif "inputs" in found:
        print(f"MACs over test samples: {Spread.from_dict(found['inputs']).range.text()}")
    if args.json:
        asked = {"config": config.file, "overrides": list(config.overrides), "effective": config.effective()}
        record.write_json(Path(args.json), {**asked, **found})
    return 0


def _compression(found: Any) -> None:
    """Tokens and costs without and with token reduction, and whether the promise is seen in latency."""
    if found.tokens:
        show.table("tokens", ["module", "stage", "tokens", "of tokens in", "over inputs"], [list(r) for r in found.token_rows()])
    show.table(
        "token reduction",
        ["", f"before: {found.before}", f"after: {found.after}", "after / before"],
        [list(r) for r in found.rows()],
    )
    print(found.verdict)


def of_task(task: Any, model: Any, *, batch: int = 1, repeats: int = 5, timed: bool = True, inputs: int = 0) -> dict[str, Any]:
    """The profile of a task's model as plain data, with the comparison to the unpruned model where the task has one.

    Args:
        task: whose model it is; prepared, if `inputs` is not 0.
        model: on the device to profile on.
        batch: samples of the profiled forward.
        repeats: timed forwards.
        timed: measure latency and memory; else count only.
        inputs: test samples that are counted one by one as well.

    Raises:
        NotImplementedError: if the task names no inputs.
        core.profile.UncountedOperatorError: if an operator that multiplies matrices has no formula.
    """
    import torch

    from core import data, profile

    device = next(model.parameters()).device
    example = data.to_device(task.profile_inputs(batch), device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            after = profile.profile(model, example, repeats=repeats, timed=timed)
            found: dict[str, Any] = {"model": after.to_dict()}
            over = None
            if inputs:
                over = profile.spread(model, (data.to_device(one, device) for one in task.real_inputs(inputs)))
                found["inputs"] = over.to_dict()
            bare = task.unpruned(model)
            if bare is not None:
                before = profile.profile(bare.to(device).eval(), example, repeats=repeats, timed=timed)
                found["unpruned"] = before.to_dict()
                found["compression"] = profile.compression(
                    before, after, scopes=task.profile_scopes(model), over_inputs=over
                ).to_dict()
    finally:
        model.train(training)
    return found


if __name__ == "__main__":
    raise SystemExit(cli.verb("profile"))
