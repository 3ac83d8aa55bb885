"""Children that run inputs: a crash, a hang or missing memory ends a child alone, and is counted.

The parent imports everything once and runs no op, so that a child is a fork of it, in milliseconds. What a child has
to import nevertheless, the parent imports after it, for the next ones.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["FAULTS", "RefusedError", "Result", "Target", "UnclearError", "WrongError", "refusals", "run_cases"]

# kinds of failures, in the order of the table
FAULTS = ("crash", "hang", "wrong", "unclear")
MEMORY = 3 << 30  # bytes that a child may allocate
SECONDS = 20  # of processor time for one input
PATIENCE = 300  # seconds for one input, whatever it does
# errors that are raised on purpose; others, such as OverflowError, escape from below
NAMED = (OSError, RuntimeError, TypeError, ValueError)
ESCAPED = (NotImplementedError, RecursionError, UnicodeError)


class RefusedError(Exception):
    """The input was refused with an error that names its argument."""


class UnclearError(Exception):
    """The input was refused with an error that does not name its argument."""


class WrongError(Exception):
    """The result is wrong, and no error was raised."""


@dataclass(frozen=True)
class Target:
    """A way into the package, which is given hostile inputs.

    Attributes:
        name: in the table.
        run: takes random numbers, a level of difficulty from 1, and an empty folder for files; makes an input, gives
            it to the package and checks the result. It raises one of the exceptions above, or none where the input is
            accepted.
        share: of the inputs.
    """

    name: str
    run: Callable[[np.random.Generator, int, Path], None]
    share: float


@dataclass(frozen=True)
class Result:
    """The outcome of an input: "accepted", "refused", or one of `FAULTS` with a message."""

    seed: int
    outcome: str
    message: str = ""


@contextlib.contextmanager
def refusals(names: str) -> Iterator[None]:
    """Tell errors that name an argument, by a pattern that their message must match, from others."""
    try:
        yield
    except (RefusedError, UnclearError, WrongError):
        raise
    except Exception as error:
        clear = isinstance(error, NAMED) and not isinstance(error, ESCAPED) and re.search(names, str(error))
        summary = f"{type(error).__name__}: {error}"
        if clear:
            raise RefusedError(summary) from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UnclearError(f"{summary} [{Path(frame.filename).name}:{frame.lineno}]") from None


def run_cases(target: Target, seeds: Sequence[int], level: int, folder: Path) -> Iterator[Result]:
    """Run the inputs of these seeds in children, one after the other; a child that fails is followed by another."""
    rest = list(seeds)
    while rest:
        for result in _run_child(target, rest, level, folder):
            rest.remove(result.seed)
            yield result


def _run_child(target: Target, seeds: Sequence[int], level: int, folder: Path) -> Iterator[Result]:
    """Run inputs in a child until it ends."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            _work(target, seeds, level, folder, sender)
            os._exit(0)
        finally:
            os._exit(70)
    os.close(sender)
    current, reason, buffer = None, "", b""
    started, spent = time.monotonic(), _processor_time(child)
    try:
        while not reason:
            ready, _, _ = select.select([receiver], [], [], 0.5)
            if ready:
                content = os.read(receiver, 1 << 16)
                *lines, buffer = (buffer + content).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if isinstance(message, dict):
                        _import_modules(message["modules"])
                    elif len(message) == 1:
                        (current,) = message
                        started, spent = time.monotonic(), _processor_time(child)
                    else:
                        current = None
                        yield Result(*message)
                if not content:
                    reason = "end"
            elif _processor_time(child) - spent > SECONDS or time.monotonic() - started > PATIENCE:
                reason = "hang"
    finally:
        os.close(receiver)
        if reason != "end":
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if current is not None:
        yield Result(current, "hang" if reason == "hang" else "crash", f"exit status {status}")


def _import_modules(names: Sequence[str]) -> None:
    """Import modules; some of those of a child cannot be imported by their names alone."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _processor_time(process: int) -> float:
    """Return the seconds that a process has computed."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(target: Target, seeds: Sequence[int], level: int, folder: Path, sender: int) -> None:
    """Run inputs in this process, and report each."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # sanitizers reserve more than any limit
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    home, modules = os.getcwd(), set(sys.modules)
    for seed in seeds:
        os.write(sender, json.dumps([seed]).encode() + b"\n")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        outcome, message = "accepted", ""
        try:
            target.run(np.random.default_rng(seed), level, folder)
        except RefusedError as refusal:
            outcome, message = "refused", str(refusal)
        except WrongError as wrong:
            outcome, message = "wrong", str(wrong)
        except BaseException as error:  # a fault of the target itself, too, must be seen
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = (
                str(error) if isinstance(error, UnclearError) else f"{type(error).__name__}: {error} [{frame.lineno}]"
            )
            outcome, message = "unclear", text
        finally:
            os.chdir(home)
        os.write(sender, json.dumps([seed, outcome, message[:400]]).encode() + b"\n")
    os.write(sender, json.dumps({"modules": [name for name in sys.modules if name not in modules]}).encode() + b"\n")
