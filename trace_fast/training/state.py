"""What training runs share: states to resume from exactly, and the learning rate over a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from trace_fast.io.files import write_atomically
from trace_fast.ops import checks

__all__ = ["Process", "State", "differences", "read_progress", "require_same", "trapezoid"]

Found = TypeVar("Found")


def trapezoid(step: int, done: float, warmup: int, decay: float) -> float:
    """Share of the peak learning rate: risen over `warmup` steps, falling to zero over the last `decay` share of a run.

    `done` is the share of the run that lies behind, from 0 to 1.
    """
    return min(1.0, (step + 1) / warmup, max(0.0, 1 - done) / decay)


@dataclass(frozen=True)
class Process:
    """One of several that work together, as `accelerate launch` or `torchrun` starts them; alone without these."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None, op: str) -> Process:
        """The process that this is; `op` is named in the error of a device that is not there."""
        if device is not None:
            checks.device(op, device)
        from accelerate import PartialState

        # all wait for the last one's shards, longer than the ten minutes that NCCL would
        patience = timedelta(days=1)
        state = PartialState(cpu=device is not None and torch.device(device).type == "cpu", timeout=patience)
        alone = state.num_processes == 1
        return cls(state.process_index, state.num_processes, torch.device(device) if device and alone else state.device)

    @property
    def share(self) -> slice:
        """Which of the photographs of a batch are this process's."""
        return slice(self.index, None, self.count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, found: Found) -> list[Found]:
        """What each has found, the same list for all."""
        every = [found] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(every, found)
        return every

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The same for the gradients of parameters; one that a process has none of counts as zeros."""
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.sum(parameter.grad)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], place: str = "") -> str:
    """What differs between two descriptions, such as "rank 64 there, 8 here"; empty where nothing does.

    `place` goes before every name. A name that is missing is None.
    """
    told = []
    for name in dict(there) | dict(here):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            told.append(differences(old, new, f"{place}{name}."))
        elif old != new:
            told.append(f"{place}{name} {old} there, {new} here")
    return "; ".join(filter(None, told))


def require_same(op: str, what: str, found: str | None, wanted: str, path: Path) -> None:
    """Refuse a file of a run whose `what`, as JSON, is another; None is that of another version."""
    if told := "another version" if found is None else differences(json.loads(found), json.loads(wanted)):
        raise ValueError(f"{op}: output must be empty or hold a run of the same {what}, got {told} in {str(path)!r}")


def read_progress(path: Path, identity: str, op: str) -> dict[str, Any] | None:
    """Progress of the run whose state a file holds; None where there is no file.

    Raises:
        ValueError: the file is damaged, or of a run with another identity.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{op}: output must hold a whole state, got {str(path)!r}: {error}") from error
    require_same(op, "configuration", metadata.get("config"), identity, path)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


class State:
    """The state of a run in one safetensors file: weights, AdamW's moments, more tensors, and progress as JSON.

    Args:
        path: the file; replaced whole.
        parameters: what is trained, by name.
        optimiser: AdamW over them.
        identity: what a run must share with the one it resumes.
        op: named in errors.
        more: other tensors that change, by name.
    """

    def __init__(
        self,
        path: Path,
        parameters: Mapping[str, torch.nn.Parameter],
        optimiser: torch.optim.Optimizer,
        identity: str,
        op: str,
        more: Mapping[str, Tensor] | None = None,
    ):
        self.path, self.optimiser, self.identity, self.op = path, optimiser, identity, op
        self.parameters, self.more = dict(parameters), dict(more or {})

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, by name: `model.*`, AdamW's `exp_avg.*` and `exp_avg_sq.*`, and the others."""
        tensors = dict(self.more)
        for name, parameter in self.parameters.items():
            state = self.optimiser.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors[f"model.{name}"] = parameter.data
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return tensors

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write what `resume` reads."""
        metadata = {"progress": json.dumps(progress), "config": self.identity}
        content = save({name: value.contiguous() for name, value in self.tensors().items()}, metadata)
        with write_atomically(self.path, self.op) as file:
            file.write(content)

    def resume(self) -> dict[str, Any] | None:
        """Take over the state in the file, and return its progress; None where there is no file.

        Raises:
            ValueError: the file is damaged, or of a run with another identity.
        """
        if (progress := read_progress(self.path, self.identity, self.op)) is None:
            return None
        values, tensors = load_file(self.path), self.tensors()
        if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in values.items()}:
            raise ValueError(
                f"{self.op}: output must be empty or hold a run of this version, got the weights of another in "
                f"{str(self.path)!r}"
            )
        for name, value in tensors.items():
            value.copy_(values[name])
        for state in self.optimiser.state.values():
            state["step"].fill_(progress["step"])
        return progress
