"""Fixtures every test file may use, and three environment variables that make the suite run as on another machine.

TRACE_FAST_TEST_ULP=1 changes the last bit of torch's results (see rounding.py), TRACE_FAST_TEST_INSTRUCTION_SET names
the instruction set of the native core where a test does not choose one, and OMP_NUM_THREADS is the number of threads.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# the processes of pytest-xdist share the cores; decided before anything imports torch
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import rounding
import torch
from op_examples import INSTRUCTION_SETS, NATIVE, TRITON, kernel_modules

from trace_fast import _C

# without a GPU the Triton kernels run in numpy; decided before anything imports triton
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if seed := os.environ.get("TRACE_FAST_TEST_ULP"):
    rounding.install(int(seed))
if name := os.environ.get("TRACE_FAST_TEST_INSTRUCTION_SET"):
    _C.set_instruction_set(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an element that nothing writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def odd_defaults() -> Iterator[None]:
    """Change the dtype and the device of tensors for which code states none."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the native core on each instruction set of this machine."""
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


@pytest.fixture(params=[*NATIVE, TRITON])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Force each implementation in turn, native by instruction set; return the device of its tensors.

    Triton runs on a GPU where there is one. Else its kernels are interpreted, and every address they use is checked.
    The files of ops that have CUDA kernels ask for "native-cuda", too.
    """
    name, _, instruction_set = request.param.partition("-")
    monkeypatch.setenv("TRACE_FAST_BACKEND", name)
    if instruction_set == "cuda":
        if not _C.has_cuda():
            pytest.skip("needs a build with TRACE_FAST_CUDA=1, and a GPU")
        yield torch.device("cuda", torch.cuda.current_device())
    elif name == "native":
        before = _C.instruction_set()
        _C.set_instruction_set(instruction_set)
        yield torch.device("cpu")
        _C.set_instruction_set(before)
    elif torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        check_addresses(monkeypatch)
        # numpy warns of infinity - infinity, which hardware does not
        with np.errstate(all="ignore"):
            yield torch.device("cpu")


def check_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an interpreted kernel fail where it reads or writes outside its tensors."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    extents: list[tuple[int, int]] = []
    take_arguments = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note_extents(self: Any, arguments: Any, keywords: Any) -> Any:
        prepared = take_arguments(self, arguments, keywords)
        extents.clear()
        for tensor in prepared[0]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                extents.append((tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()))
        return prepared

    def check(pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max())
            assert any(first <= low and high <= last for first, last in extents), "an address is outside its tensor"

    def checked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", note_extents)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


@pytest.fixture
def tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the tile of every Triton kernel, and does nothing on the native path.

    `interpreted_only` keeps the tiles of a GPU: numpy is fast on tiles that no multiprocessor holds.
    """

    def choose(rows: int, columns: int, polynomial: int = 0, interpreted_only: bool = False) -> None:
        if os.environ["TRACE_FAST_BACKEND"] == "triton" and not (interpreted_only and device.type == "cuda"):
            from trace_fast.kernels.launch import Config

            config = Config(rows, columns, 4, 1, polynomial)
            for module in kernel_modules():
                monkeypatch.setattr(module, "pick", lambda *_: config, raising=False)
                for name, value in list(vars(module).items()):
                    if isinstance(value, Config):
                        monkeypatch.setattr(module, name, config)

    return choose


@pytest.fixture(params=(0, 1), ids="offset{}".format)
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Surround the tensors that ops allocate for results with sentinels, at several offsets; check them afterwards."""
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    margin, new_empty = 64 + request.param, torch.Tensor.new_empty

    def guarded(like: torch.Tensor, *sizes: Any, dtype: torch.dtype | None = None, **keywords: Any) -> torch.Tensor:
        shape = torch.Size(sizes[0] if sizes and not isinstance(sizes[0], int) else sizes)
        buffer = new_empty(like, shape.numel() + 2 * margin, dtype=dtype, **keywords).fill_(-7)
        buffers.append((buffer, buffer[0].clone(), shape.numel()))
        poison = math.nan if buffer.is_floating_point() else -8
        return buffer[margin : margin + shape.numel()].view(shape).fill_(poison)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda x: guarded(x, x.shape))
    yield
    assert buffers
    for buffer, sentinel, size in buffers:
        assert (buffer[:margin] == sentinel).all()
        assert (buffer[margin + size :] == sentinel).all()


@pytest.fixture(params=(1, 2), ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pillow-heif a package that is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
