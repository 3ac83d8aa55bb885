"""Parts of every training run: exact resuming, several processes, and the learning rate over the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from trace_fast.extras import require
from trace_fast.io.claims import claim_folder
from trace_fast.io.files import write_atomically, write_tensors
from trace_fast.ops import checks

__all__ = ["Process", "State", "list_differences", "read_progress", "require_same", "trapezoid"]

Item = TypeVar("Item")


def trapezoid(step: int, done: float, warmup: int, decay: float) -> float:
    """Return the learning rate of a step as a share of the peak.

    It rises linearly over the first steps, and falls linearly to zero at the end of the run.

    Args:
        step: number of the step, from 0.
        done: share of the run that is done, from 0 to 1.
        warmup: steps over which the rate rises.
        decay: last share of the run over which it falls, above 0.

    Example:
        >>> trapezoid(4, 0.1, warmup=10, decay=0.5)
        0.5
    """
    return min(1.0, (step + 1) / warmup, max(0.0, 1 - done) / decay)


@dataclass(frozen=True)
class Process:
    """This process among those that `accelerate launch` or `torchrun` started, or the only one without these.

    Attributes:
        index: of this process, from 0.
        count: number of processes.
        device: where this process trains.
    """

    index: int
    count: int
    device: torch.device

    @classmethod
    def connect(cls, device: str | None, op: str) -> Process:
        """Return this process, after connecting it to the others.

        Args:
            device: where to train, if there is no other process; None is the GPU where there is one.
            op: named in errors.

        Raises:
            ValueError: the device is no torch device.
            RuntimeError: the device is not present.
        """
        if device is not None:
            checks.device(op, device)
        require(op, "accelerate", extra="train")
        from accelerate import PartialState

        # NCCL's default of ten minutes is too short: the others wait until the last one has searched its images
        timeout = timedelta(days=1)
        state = PartialState(cpu=device is not None and torch.device(device).type == "cpu", timeout=timeout)
        chosen = torch.device(device) if device and state.num_processes == 1 else state.device
        return cls(state.process_index, state.num_processes, chosen)

    @property
    def share(self) -> slice:
        """The slice of a batch, or of a list of files, that this process works on."""
        return slice(self.index, None, self.count)

    @contextmanager
    def claim(self, folder: Path, op: str, part: int = 0) -> Iterator[None]:
        """Create a folder and keep other runs that write to it out, for all processes of this run.

        Args:
            folder: to write to.
            op: named in errors.
            part: of the folder, which other runs may write other parts of.

        Raises:
            RuntimeError: another run writes to the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with claim_folder(folder, op, part) if self.index == 0 else nullcontext():
            yield

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, item: Item) -> list[Item]:
        """Return the items of all processes, in their order."""
        items = [item] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(items, item)
        return items

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, computed in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of parameters over all processes, in place; a missing gradient counts as zeros."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.sum(parameter.grad)


def list_differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> str:
    """Return the differences between two descriptions, such as "rank 64 instead of 8"; empty if there is none.

    Args:
        stored: description in a file; a missing name counts as None.
        current: description of the run.
        prefix: written before every name.

    Example:
        >>> list_differences({"rank": 64, "seed": 0}, {"rank": 8, "seed": 0})
        'rank 64 instead of 8'
    """
    differences = []
    for name in dict(stored) | dict(current):
        old, new = stored.get(name), current.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences.append(list_differences(old, new, f"{prefix}{name}."))
        elif old != new:
            differences.append(f"{prefix}{name} {old} instead of {new}")
    return "; ".join(filter(None, differences))


def require_same(op: str, name: str, content: str, stored: str | None, current: str, path: Path) -> None:
    """Refuse a file whose description differs from that of the run.

    Args:
        op: named in errors.
        name: option that names the folder of the file.
        content: what the folder may hold, for errors.
        stored: description in the file, as JSON; None if it has none.
        current: description of the run, as JSON.
        path: of the file.

    Raises:
        ValueError: the descriptions differ, or the file has none.
    """
    if stored is None:
        difference = "a file of another version"
    else:
        difference = list_differences(json.loads(stored), json.loads(current))
    if difference:
        raise ValueError(f"{op}: {name} must be empty or hold {content}, got {difference} in {str(path)!r}")


def read_progress(path: Path, identity: str, op: str) -> dict[str, Any] | None:
    """Return the progress in the state file of a run, or None if there is no file.

    Args:
        path: the file.
        identity: options that a resumed run must share with the run before, as JSON.
        op: named in errors.

    Raises:
        ValueError: the file is damaged, or belongs to a run of another identity.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{op}: output must hold a state that is not damaged, got {str(path)!r}: {error}") from error
    require_same(op, "output", "a run of the same configuration", metadata.get("config"), identity, path)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


class State:
    """The state of a run in one safetensors file: weights, AdamW's moments, other tensors, and the progress as JSON.

    Args:
        path: the file.
        parameters: the parameters that are trained, by name.
        optimizer: AdamW over them.
        identity: options that a resumed run must share with the run before, as JSON.
        op: named in errors.
        others: other tensors that change, by name.
    """

    def __init__(
        self,
        path: Path,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        identity: str,
        op: str,
        others: Mapping[str, Tensor] | None = None,
    ):
        self.path, self.optimizer, self.identity, self.op = path, optimizer, identity, op
        self.parameters, self.others = dict(parameters), dict(others or {})

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that changes: `model.*`, AdamW's `exp_avg.*` and `exp_avg_sq.*`, and the others."""
        tensors = dict(self.others)
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors[f"model.{name}"] = parameter.data
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return tensors

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write the state, with the progress, for `resume` to read."""
        metadata = {"progress": json.dumps(progress), "config": self.identity}
        tensors = {name: value.contiguous() for name, value in self.tensors().items()}
        with write_atomically(self.path, self.op) as file:
            write_tensors(file, tensors, metadata)

    def resume(self) -> dict[str, Any] | None:
        """Load the state from the file and return its progress, or None if there is no file.

        Raises:
            ValueError: the file is damaged, or belongs to a run of another identity.
        """
        if (progress := read_progress(self.path, self.identity, self.op)) is None:
            return None
        values, tensors = load_file(self.path), self.tensors()
        shapes, expected = ({name: tensor.shape for name, tensor in group.items()} for group in (values, tensors))
        if shapes != expected:
            raise ValueError(
                f"{self.op}: output must be empty or hold a run of this version, got the weights of another version in "
                f"{str(self.path)!r}"
            )
        for name, value in tensors.items():
            value.copy_(values[name])
        for state in self.optimizer.state.values():
            state["step"].fill_(progress["step"])
        return progress
