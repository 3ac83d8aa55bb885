"""Parts of a job: each process of many does one, and nothing else connects them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ALONE", "Part", "find_device", "find_part", "parse_part"]


@dataclass(frozen=True)
class Part:
    """The part of the inputs that this process works on.

    Attributes:
        index: from 0.
        count: of the parts, each of one process.
    """

    index: int = 0
    count: int = 1

    @property
    def share(self) -> slice:
        """The slice of a list of inputs that is this part."""
        return slice(self.index, None, self.count)


ALONE = Part()  # all inputs


def parse_part(name: str, text: str) -> Part:
    """Return the part that an option names.

    Args:
        name: of the option, for the message.
        text: such as "0/4".

    Raises:
        ValueError: the text is not I/N with I below N.

    Example:
        >>> parse_part("--part", "1/4")
        Part(index=1, count=4)
    """
    if not (numbers := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)):
        raise ValueError(f"{name} must be two numbers such as 0/4, got {text!r}")
    part = Part(int(numbers[1]), int(numbers[2]))
    if part.index >= part.count:
        raise ValueError(f"{name} must be from 0/N to one below N/N, got {text!r}")
    return part


def find_part(environment: Mapping[str, str] = os.environ) -> Part:
    """Return the part of this process, as torchrun, accelerate launch or srun say in the environment.

    Args:
        environment: its variables.

    Example:
        >>> find_part({"RANK": "1", "WORLD_SIZE": "4"})
        Part(index=1, count=4)
    """
    # a script of sbatch that starts no tasks has SLURM_NTASKS, too, but not the number of a step's tasks
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        with contextlib.suppress(KeyError, ValueError):
            part = Part(int(environment[index]), int(environment[count]))
            if 0 <= part.index < part.count:
                return part
    return ALONE


def find_device(gpus: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the GPU of this process, where torchrun, accelerate launch or srun start several that see the same GPUs.

    Args:
        gpus: that this process sees.
        environment: its variables.

    Returns:
        The device; None where there is no choice.

    Example:
        >>> find_device(2, {"LOCAL_RANK": "3"})
        'cuda:1'
    """
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        with contextlib.suppress(KeyError, ValueError):
            rank = int(environment[name])
            return f"cuda:{rank % gpus}" if gpus > 1 else None
    return None
