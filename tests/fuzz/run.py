"""Give hostile inputs to every target of the package, and count what becomes of them: `make fuzz MINUTES=10`.

An input follows from its target, level and seed alone. Failing inputs are tried again at lower levels, and the smallest
one of each kind is kept in build/fuzz with its files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# before anything imports torch: a child has one thread
os.environ["OMP_NUM_THREADS"] = "1"

from server import FAULTS, Result, Target, run_cases
from tables import print_table
from targets import TARGETS

BATCH = 100  # inputs of a child
LEVELS = 3
TRIES = 30  # seeds at each level, in search of a smaller input with the same failure
OUTCOMES = ("accepted", "refused", *FAULTS)


def fuzz(minutes: float, inputs: int, first: int, names: list[str], keep: Path) -> dict[str, Counter[str]]:
    """Run batches of all targets until the time is over or the inputs are tried; return counts by target."""
    targets = {target.name: target for target in TARGETS if not names or target.name in names}
    shares = sum(target.share for target in targets.values())
    numbers = {name: max(1, round(inputs * target.share / shares)) for name, target in targets.items()}
    counts: dict[str, Counter[str]] = {name: Counter() for name in targets}
    end, failures = time.monotonic() + 60 * minutes, set()
    with tempfile.TemporaryDirectory() as folder:
        for batch in itertools.count():
            # the target of which the largest part is left
            left = {name: numbers[name] - counts[name].total() for name in targets}
            name = max(left, key=lambda name: left[name] / numbers[name])
            if left[name] <= 0 or time.monotonic() > end:
                break
            seeds, level = range(first, first + min(BATCH, left[name])), 1 + batch % LEVELS
            first = seeds.stop
            for result in run_cases(targets[name], seeds, level, Path(folder, "case")):
                counts[name][result.outcome] += 1
                # numbers aside, equal messages are one fault
                kind = (name, result.outcome, re.sub(r"\d", "", result.message)[:60])
                if result.outcome in FAULTS and kind not in failures:
                    failures.add(kind)
                    keep_smallest(targets[name], result, level, Path(folder, "again"), keep)
            if batch % 20 == 19:
                print_counts(counts)
    return counts


def keep_smallest(target: Target, result: Result, level: int, case: Path, keep: Path) -> None:
    """Look for a smaller input that fails in the same way, and keep it with its files."""

    def is_same(other: Result) -> bool:
        return (other.outcome, other.message[:30]) == (result.outcome, result.message[:30])

    smallest, smallest_level = result, level
    for lower in range(1, level):
        same = [other for other in run_cases(target, range(TRIES), lower, case) if is_same(other)]
        if same:
            smallest, smallest_level = same[0], lower
            break
    list(run_cases(target, [smallest.seed], smallest_level, case))  # leaves its files in the folder
    path = keep / f"{target.name}-{result.outcome}-{smallest_level}-{smallest.seed}"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(case, path)
    description = {"target": target.name, "level": smallest_level, "seed": smallest.seed, "message": smallest.message}
    (path / "fuzz.json").write_text(json.dumps(description, indent=2) + "\n")
    print(f"{target.name}: {result.outcome}: {smallest.message} -> {path}", flush=True)


def print_counts(counts: dict[str, Counter[str]]) -> None:
    """Print the counts by target."""
    rows = [(name, sum(row.values()), *(row[outcome] for outcome in OUTCOMES)) for name, row in counts.items()]
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    names = ("target", "inputs", "accepted", "refused", "crashes", "hangs", "silently wrong", "unclear errors")
    print_table(names, rows)


def main() -> int:
    """Run the command, and return its exit status: 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="time after which no further batch begins")
    parser.add_argument("--inputs", type=int, default=10**9, help="inputs over all targets")
    parser.add_argument("--seed", type=int, default=None, help="first seed; the default follows from the time")
    parser.add_argument("--target", action="append", default=[], help="name of a target; repeat it for several")
    parser.add_argument("--level", type=int, help="with --seed: run this one input, and show what becomes of it")
    parser.add_argument("--keep", type=Path, default=Path("build", "fuzz"), help="folder of failing inputs")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    if options.level is not None:
        (target,) = (target for target in TARGETS if target.name in options.target)
        for result in run_cases(target, [first], options.level, options.keep / "case"):
            print(result)
        return 0
    counts = fuzz(options.minutes, options.inputs, first, options.target, options.keep)
    print_counts(counts)
    return int(any(row[fault] for row in counts.values() for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
