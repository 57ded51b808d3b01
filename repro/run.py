"""Train and evaluate one reproduction, from a gin file.

The run folder is named by the file and a hash of its effective bindings, so the same request finds the same folder: a
finished run is shown and not repeated, an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import config as configs
from core import record, registry
from repro import cli, show


def arguments(parser: argparse.ArgumentParser) -> None:
    cli.config_options(parser)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)")
    parser.add_argument("--out", metavar="DIR", help="this very run folder instead of one named by hash")
    parser.add_argument("--fresh", action="store_true", help="throw away what the run folder holds and start over")
    parser.add_argument("--no-profile", action="store_true", help="do not count FLOPs and measure latency after training")
    parser.add_argument("--wandb", metavar="PROJECT", help="mirror scalars to Weights & Biases (extra wandb)")
    parser.add_argument("--quiet", action="store_true", help="print the result only")


def folder_of(config: configs.Config, arguments: argparse.Namespace) -> Path:
    """The run folder of a config."""
    return Path(arguments.out) if arguments.out else Path(arguments.runs) / f"{config.stem}-{config.signature}"


def main(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    # Threads that spin while they wait make a shared machine ten times slower; torch reads this when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = configs.read(args.gin, args.overrides, allow_imports=args.allow_import)
    path = folder_of(config, args)
    rank = int(os.environ.get("RANK", "0"))
    before = record.status(path)
    if before is not None and before.state == "finished" and not args.fresh and _same(path, config):
        if rank == 0:
            if not record.read_json(path / "result.json"):
                raise ValueError(f"{path} is finished, but its result.json is missing or damaged; --fresh runs it again")
            with record.unread():
                print(f"{path} is finished already (--fresh starts over)\n")
                show.result(path)
        return 0
    if args.fresh:
        _refuse_foreign(path)
    with record.RunFolder(path, writes=rank == 0, chatty=not args.quiet) as run:
        other = (path / "config.gin").is_file() and not _same(path, config)
        if other and not args.fresh and rank == 0 and _trained(path):
            raise ValueError(f"{path} holds a run of another config; give another --out, or --fresh to throw it away")
        if (other or args.fresh) and rank == 0:
            _clear(path, all_of_it=args.fresh)
        with record.Signals():  # one that comes before training is kept for its first step
            return _train(run, config, args, started)


def _same(path: Path, config: configs.Config) -> bool:
    return record.read_json(path / "run.json").get("signature") == config.signature


def _trained(path: Path) -> bool:
    """Whether a run folder holds what could be lost: a run that failed while it was built has nothing."""
    return any(path.glob("checkpoints/*")) or any(
        f.is_file() and f.stat().st_size for f in (path / "metrics.jsonl", path / "result.json")
    )


def _refuse_foreign(path: Path) -> None:
    """ValueError if a folder holds anything and no run: it is nobody's to throw away."""
    held = sorted(e.name for e in path.iterdir()) if path.is_dir() else []
    if held and not {"config.gin", "run.json", "status.json"} & set(held):
        raise ValueError(f"{path} is not a run folder, it holds {', '.join(held[:3])}; --fresh clears no other, give another --out")
    below = record.nested(path)
    if below is not None:
        raise ValueError(
            f"{path} holds other runs, such as {below}; --fresh does not clear them, give another --out or move them away"
        )


def _clear(path: Path, *, all_of_it: bool) -> None:
    for entry in path.iterdir():
        if entry.name in (".lock", "status.json"):
            continue
        if all_of_it or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in record.WRITTEN):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _train(run: record.RunFolder, config: configs.Config, args: argparse.Namespace, started: float) -> int:
    run.log(f"run folder  {run.path}")
    run.write("config.gin", f"# asked: {config.file}" + "".join(f"  --set {o}" for o in config.overrides) + "\n" + config.text())
    configs.apply(config)
    from core import checkpoint, distributed, trainer

    describe(run, config)
    run.timing({"attempt": run.attempts})
    if args.wandb:
        run.mirror_to(args.wandb, config.effective())
    built: list[Any] = []

    def on_built(task: Any, model: Any) -> None:
        lines = configs.unused(config)
        if lines:
            raise configs.ConfigError(lines)
        run.write("operative.gin", configs.operative_text())
        built[:] = [task, model]
        total = sum(p.numel() for p in model.parameters())
        run.log(f"config      {args.gin}  ({configs.PRECEDENCE})")
        run.log(f"model       {total:,} parameters, plugin {', '.join(config.plugins()) or 'none'}")

    try:
        outcome = configs.configured(configs.TRAIN)(run, on_built)
    except trainer.Stopped as stop:
        run.say(state="stopped", step=stop.step, message=configs.said(stop))
        run.log(configs.said(stop))
        return record.EXIT_STOPPED
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
            run.say(state="failed", message=f"{type(error).__name__}: {configs.said(error)}")
        raise
    finally:
        distributed.stop()
    if not run.writes:
        return 0
    task, model = built
    run.write("operative.gin", configs.operative_text())
    best_step = outcome.best_step if outcome.best_step >= 0 else outcome.step
    run.write("result.json", {
        "step": outcome.step, "metrics": outcome.last, "best": outcome.best or outcome.last, "best_step": best_step, "first": outcome.first,
        "expected": dict(task.expected()),
        "tables": [{"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows], "note": t.note} for t in task.tables(outcome.last)],
    })  # fmt: skip
    with checkpoint.preserved_random_state():
        _extras(run, task, model, args)
    run.timing({"step": outcome.step, "total_s": time.perf_counter() - started})
    run.say(state="finished", step=outcome.step, message="")
    with record.unread():
        if not args.quiet:
            print()
        show.result(run.path)
    return 0


def describe(run: record.RunFolder, config: configs.Config) -> None:
    """run.json and diff.patch: everything needed to say where a number of this run comes from.

    A run that goes on keeps under `history` what its earlier attempts ran with, oldest first; where that is not what runs now, it is said.
    """
    source, diff = record.provenance()
    code = {"plugins": _passports(config.plugins()), "imports": {m: registry.module_hash(m) for m in sorted(config.imports)}}
    history = _history(run, source, diff, code) if run.writes else []
    if diff:
        run.write("diff.patch", diff)
    run.write("run.json", {
        "history": history,
        "signature": config.signature, "config": config.file, "overrides": list(config.overrides), "files": list(config.files),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "source": source, "environment": record.environment(),
        **code, "seed": config.get(f"{configs.TRAIN}.seed", 0), "effective": config.effective(),
    })  # fmt: skip


def _history(run: record.RunFolder, source: dict[str, Any], diff: str, code: dict[str, dict[str, Any]]) -> list[Any]:
    """What earlier attempts of a run with a checkpoint ran with. Warns where code or versions differ from the last of them."""
    before = record.read_json(run.path / "run.json")
    if not before or not any(run.path.glob("checkpoints/*")):
        return []
    history = [h for h in before.get("history") or [] if isinstance(h, dict)]
    patch = run.path / "diff.patch"
    old = patch.read_text(encoding="utf-8") if patch.is_file() else ""
    then: dict[str, Any] = {"source": before.get("source"), **{part: before.get(part) or {} for part in code}}
    then["versions"] = (before.get("environment") or {}).get("versions") or {}
    now = {"source": source, **code, "versions": record.environment()["versions"]}
    if then == now and old == diff:
        return history
    if old:
        kept = f"diff-{len(history)}.patch"
        run.write(kept, old)
        then["diff"] = kept
        patch.unlink()
    changed = [f"{n} {then['versions'].get(n)} -> {v}" for n, v in now["versions"].items() if then["versions"].get(n) != v]
    for part, facts in code.items():
        changed += [f"{part.removesuffix('s')} {n}" for n, fact in facts.items() if then[part].get(n) != fact]
    changed += ["uncommitted changes"] if old != diff else []
    earlier, commit = (then["source"] or {}).get("commit"), source.get("commit")
    changed += [f"commit {str(earlier)[:8]} -> {str(commit)[:8]}"] if earlier != commit else []
    run.log(
        f"WARNING: this run goes on with other code than it began with: {', '.join(changed) or 'see history'}; run.json keeps both"
    )
    return [*history, then]


def _passports(names: Sequence[str]) -> dict[str, Any]:
    known = registry.plugins()
    return {
        n: {"distribution": known[n].distribution, "version": known[n].version, "sha256": registry.load_plugin(n).sha256}
        for n in names
    }


def _extras(run: record.RunFolder, task: Any, model: Any, args: argparse.Namespace) -> None:
    """Pictures, files of the task's own, profile. What fails here is said and does not undo a finished training."""
    pictures = run.path / "pictures"
    pictures.mkdir(exist_ok=True)
    for what, write, folder in (("pictures", task.pictures, pictures), ("files of the task", task.leave, run.path)):
        try:
            write(model, folder)
        except Exception as error:
            run.log(f"WARNING: {what}: {type(error).__name__}: {error}")
    if not any(pictures.iterdir()):
        pictures.rmdir()
    if args.no_profile:
        return
    from repro import profile

    try:
        run.write("profile.json", profile.of_task(task, model))
    except NotImplementedError:
        run.log("profile: this task names no inputs for one")
    except Exception as error:
        run.log(f"WARNING: profile: {type(error).__name__}: {error}")


if __name__ == "__main__":
    raise SystemExit(cli.verb("run"))
