"""Fixtures every test file may use."""

from collections.abc import Iterator

import pytest
import torch

from trace_fast import _C


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the native core on each instruction set of this machine."""
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


@pytest.fixture(params=(1, 2), ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
