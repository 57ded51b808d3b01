"""How long the command line takes to answer: `repro --help`, `repro list`, `repro config FILE`, seconds of CPU.

    python benchmarks/command_line.py

Each is a process of its own; the figure is the minimum of several, and beside it that of a bare `python -c pass`.
Limits: 0.2 s for help, 0.4 s for list, 0.4 s for config.
"""

import resource
import subprocess
import sys

REPEATS = 7
COMMANDS = {"--help": 0.2, "list": 0.4, "config gin/sdtps_rgbnt.gin": 0.4}


def seconds(argv: list[str]) -> float:
    """Least CPU time of a child process, user and system."""
    found = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> int:
    base = seconds([sys.executable, "-c", "pass"])
    print(f"{'python -c pass':<36} {base:.3f} s")
    slow = 0
    for words, limit in COMMANDS.items():
        taken = seconds([sys.executable, "-m", "repro", *words.split()])
        print(f"{'repro ' + words:<36} {taken:.3f} s   (limit {limit} s, {taken / base:.1f} times a bare Python)")
        slow += taken > limit
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
