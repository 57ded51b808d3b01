"""Ends the workers of a local queue whose controller has died. Started by the queue as a process of its own.

Reads `+PID` and `-PID` lines (process group leaders that began and ended) from standard input. When that closes, every
leader still there is asked to stop (SIGTERM: it writes a checkpoint), and after the seconds given its group is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time


def guard(grace_s: float) -> None:
    """Follow standard input to its end, then leave no worker behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    alive: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        alive.add(pid) if line[0] == "+" else alive.discard(pid)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + grace_s
    while alive and time.monotonic() < until:
        alive = {pid for pid in alive if _there(pid)}
        time.sleep(0.1)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    guard(float(sys.argv[1]))
