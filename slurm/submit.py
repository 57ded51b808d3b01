"""SLURM, through submitit: one array of runs, submitted at once; what the queue says of them; and how to cancel them.

Nothing here needs accounting: states come from each run's own status file, the queue only says what still waits or runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.job import NOTE, Job, note
from slurm.profile import Profile

ANSWER_S = 20


class SlurmError(OSError):
    """SLURM is not here, does not answer, or refuses; the message says which and what to do."""


def _ask(*command: str) -> str:
    """Output of a SLURM command.

    Raises:
        SlurmError: if it is not installed, does not answer in time, or fails.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"no {command[0]} on the path: SLURM is not installed here; run this on a login node, or use --launcher local"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"SLURM does not answer ({shlex.join(command)}, {ANSWER_S} s); is its controller up?") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError(f"{command[0]}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout


def check(profile: Profile) -> None:
    """Whether SLURM is here and has what the profile names.

    Raises:
        SlurmError: if sbatch is missing or no controller answers.
        ValueError: if the partition does not exist.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError("no sbatch on the path: SLURM is not installed here; run this on a login node, or use --launcher local")
    known = _ask("sinfo", "--noheader", "--all", "--format=%R").split()
    if profile.partition is not None:
        missing = [p for p in profile.partition.split(",") if p not in known]
        if missing:
            raise ValueError(f"no partition {missing[0]!r}; this cluster has: {', '.join(sorted(set(known)))}")


def job_folder(path: Path) -> Path:
    """Make or check the folder for submitit's files, which are pickles: it must be ours and nobody else may write it.

    Raises:
        SlurmError: if it belongs to another user or is no folder.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise SlurmError(f"{path} is not a folder; job files are read back as pickles, so it must be one of your own")
    if facts.st_uid != os.geteuid():
        raise SlurmError(
            f"{path} belongs to user {facts.st_uid}, not to you ({os.geteuid()}); job files are read back as pickles, use another --runs"
        )
    path.chmod(0o700)
    return path


def _largest_array() -> int:
    """How many tasks one array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), flags=re.M)
    return int(found[1]) if found else 1001


def submit(jobs: Sequence[Job], folder: Path, profile: Profile, name: str) -> list[str]:
    """Submit the jobs as one array (more where the cluster's largest array is smaller) and return their ids.

    The sbatch script stays in `folder`. The jobs run and requeue without this process.

    Raises:
        SlurmError: if SLURM is missing or refuses; what it said is in the message.
        ValueError: if the partition does not exist.
    """
    check(profile)
    job_folder(folder)
    import submitit

    chunk = _largest_array()
    setup = [f"export {key}={shlex.quote(value)}" for key, value in sorted(jobs[0].environment.items())] if jobs else []
    ids: list[str] = []
    for first in range(0, len(jobs), chunk):
        part = jobs[first : first + chunk]
        for job in part:
            job.path.mkdir(parents=True, exist_ok=True)
            note(
                job.path, launcher="slurm", job="", command=list(job.command), submitted=time.time(), started=None, ended=None, exit=None,
                requeues=0, limit=job.limit, message="",
            )  # fmt: skip
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=profile.requeues + 1)
        executor.update_parameters(
            name=name, timeout_min=profile.minutes, mem_gb=profile.memory_gb, nodes=profile.nodes, tasks_per_node=profile.tasks,
            cpus_per_task=profile.cpus, gpus_per_node=profile.gpus or None, slurm_partition=profile.partition,
            slurm_array_parallelism=profile.parallel, slurm_signal_delay_s=profile.signal_s, slurm_qos=profile.qos,
            slurm_account=profile.account, slurm_constraint=profile.constraint, slurm_nodelist=profile.nodelist,
            slurm_exclude=profile.exclude, slurm_setup=setup + profile.setup,
            slurm_additional_parameters={"requeue": True, **profile.extra},
        )  # fmt: skip
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what sbatch says; we raise it
                made = [executor.submit(job) for job in part]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            said = [re.sub(r"^(sbatch: )?(error: )?", "", line.strip()) for line in str(error).splitlines()]
            _tidy(folder)
            refusal = "sbatch: " + ("; ".join(s for s in said if s and not s.startswith("Try ")) or "refused")
            for job in part:
                (job.path / NOTE).unlink(missing_ok=True)
            raise SlurmError(refusal) from None
        for job, done in zip(part, made):
            note(job.path, job=done.job_id, script=str(done.paths.submission_file))
            ids.append(done.job_id)
    return ids


def _tidy(folder: Path) -> None:
    """After a refusal: the job files that were written for it."""
    for path in [*folder.glob("*.pkl"), *folder.glob(".submission_file_*.sh")]:
        if re.fullmatch(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh", path.name) and not path.is_symlink():
            path.unlink(missing_ok=True)


def queue() -> dict[str, tuple[str, str]] | None:
    """State and reason of this user's jobs that wait or run, by id (`123_4` for array tasks); None if SLURM cannot be asked."""
    try:
        said = _ask("squeue", "--noheader", "--array", f"--user={os.geteuid()}", "--format=%F|%K|%A|%T|%r")
    except SlurmError:
        return None
    found = {}
    for line in said.splitlines():
        array, task, job, state, reason = line.strip().split("|", 4)
        found[f"{array}_{task}" if task not in ("N/A", "") else job] = (state, reason)
    return found


def cancel(ids: Sequence[str]) -> None:
    """End jobs: the runs among them get SIGTERM and write a checkpoint.

    Raises:
        SlurmError: if SLURM refuses.
    """
    if ids:
        _ask("scancel", *ids)
