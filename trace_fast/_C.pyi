"""The native core: the entry points of csrc/trace_fast.h, with addresses in the place of arrays."""

from typing import Any

# the functions of trace_fast.h by name, with the same arguments in the same order; nothing is returned. Those of cuda
# are there if they are built: addresses are of a GPU's memory, and a queue is (index of the device, cudaStream_t)
cpu: Any
cuda: Any

def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine runs, slowest first."""

def instruction_set() -> str:
    """Return the instruction set in use: the fastest unless another was set."""

def set_instruction_set(name: str) -> None:
    """Use another of `instruction_sets()`."""

def has_cuda() -> bool:
    """Return whether the kernels for a GPU are built, and run on every GPU of this machine and under its driver."""
