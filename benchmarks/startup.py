"""How long the command line takes to answer where there is nothing to do, beside Python's own start.

    python benchmarks/startup.py --runs 20

Medians of the runs, by turns. A test holds that nothing heavy is imported (tests/test_cli.py): seconds are the machine's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

SLIMTUNE = (sys.executable, "-m", "slimtune")
COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "slimtune --help": (*SLIMTUNE, "--help"),
    "slimtune --version": (*SLIMTUNE, "--version"),
    "slimtune tuen (a bad command)": (*SLIMTUNE, "tuen"),
    "slimtune tune --help": (*SLIMTUNE, "tune", "--help"),
    "slimtune recipe": (*SLIMTUNE, "recipe"),
}


def seconds(command: tuple[str, ...]) -> float:
    """Of one run."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    own = statistics.median(taken["python -c pass"])
    print("| command | median | fastest | beyond Python's own |\n| --- | --- | --- | --- |")
    for name, each in taken.items():
        median = statistics.median(each)
        print(f"| {name} | {median:.3f} s | {min(each):.3f} s | {median - own:.3f} s |")


if __name__ == "__main__":
    main()
