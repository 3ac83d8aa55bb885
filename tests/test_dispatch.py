"""Which implementation serves: the table, the variable that forces one, and what happens when it is missing."""

import pytest
import torch

import trace_fast
from trace_fast import _C, ops, reference
from trace_fast.ops import dispatch
from trace_fast.testing import random_maps


def arguments(device="cpu"):
    """Small arguments of every op."""
    query, key = torch.ones(2, 1, 2, 6, 4, device=device)
    attention = torch.full((1, 6, 6), 1 / 6, device=device)
    resize = attention, (2, 3), (4, 6)
    masks = torch.ones(2, 3, 4, dtype=torch.bool, device=device)
    return {
        "attention_map": (query, key),
        "accumulate_attention": (attention.clone(), query, key, 0.5),
        "accumulate_resized": (torch.zeros(1, 24, 24, device=device), *resize, 0.5),
        "resize_attention": resize,
        "readout": (query, key, torch.ones(6, 3, device=device)),
        "step_kl": (attention, attention),
        "abdiv": (attention, 2, 3),
        "step_kl_abdiv": (attention, attention, 2, 3),
        "label_regions": (masks,),
        "flood_fill": (masks.int(), ~masks),
        "random_walk": (masks.float(), torch.zeros(3, 4, device=device)),
        "merge_masks": (masks,),
    }


# what an op calls: names in `_C`, and kernels by module in `trace_fast.kernels`
NATIVE = {op: {op} for op in dispatch.OPS}
NATIVE |= {"attention_map": {"accumulate_attention"}, "resize_attention": {"accumulate_resized"}}
NATIVE |= {"merge_masks": {"merge_masks", "unite_masks"}}
TRITON = {
    "attention_map": {"row_statistics_kernel", "add_probabilities_kernel"},
    "accumulate_attention": {"row_statistics_kernel", "add_probabilities_kernel"},
    "accumulate_resized": {"accumulate_resized_kernel"},
    "resize_attention": {"accumulate_resized_kernel"},
    "readout": {"readout_kernel"},
    "step_kl": {"divergence_kernel", "finish_kernel"},
    "abdiv": {"divergence_kernel", "finish_kernel"},
    "step_kl_abdiv": {"divergence_kernel", "finish_kernel"},
}
CUDA = [op for op in dispatch.OPS if op not in TRITON]  # those whose GPU kernels are in the native core


class Spied:
    """A kernel that notes its name when it is launched."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.add(self.name)
        return self.kernel[grid]


def spied(name, function, launched):
    """A native entry point that notes its name when it is called."""

    def call(*arguments):
        launched.add(name)
        function(*arguments)

    return call


@pytest.fixture
def launched(monkeypatch):
    """Names of the native entry points and the Triton kernels that have run."""
    kernels = pytest.importorskip("trace_fast.kernels.attention"), pytest.importorskip("trace_fast.kernels.divergence")
    names = set()
    for module in kernels:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Spied(name, kernel, names))
    for name in {name for found in NATIVE.values() for name in found} | {"readout_backward"}:
        monkeypatch.setattr(_C, name, spied(name, getattr(_C, name), names))
    return names


@pytest.mark.parametrize("op", dispatch.OPS)
def test_what_is_forced_runs_and_nothing_else(op, device, launched, request):
    native = "native" in request.node.name
    if op in CUDA and not native:
        with pytest.raises(RuntimeError, match=f"{op}: there is no triton kernel; unset TRACE_FAST_BACKEND"):
            getattr(ops, op)(*arguments(device)[op])
    else:
        getattr(ops, op)(*arguments(device)[op])
        assert launched == (NATIVE if native else TRITON)[op]


def test_gradients_run_what_is_forced(device, launched, request):
    query, key, values = arguments(device)["readout"]
    out = ops.readout(query.requires_grad_(), key, values)
    launched.clear()
    out.sum().backward()
    triton = {"readout_keys_kernel", "readout_queries_kernel"}
    assert launched == ({"readout_backward"} if "native" in request.node.name else triton)


def test_table(instruction_set, monkeypatch):
    monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    table = trace_fast.backends()
    assert set(table) == set(ops.__all__) - set(ops.contours.__all__)  # which are for the CPU alone
    cuda = "native (cuda)" if _C.has_cuda() else "reference"
    for op, row in table.items():
        assert row == {"cpu": f"native ({instruction_set})", "cuda": cuda if op in CUDA else "triton"}
    assert str(table).splitlines()[0].split() == ["op", "cpu", "cuda"]


@pytest.mark.parametrize(
    ("choice", "row", "regions"),
    [
        ("reference", {"cpu": "reference", "cuda": "reference"}, {"cpu": "reference", "cuda": "reference"}),
        (
            "native",
            {"cpu": "native (baseline)", "cuda": "unavailable"},
            {"cpu": "native (baseline)", "cuda": "native (cuda)" if _C.has_cuda() else "unavailable"},
        ),
        ("triton", {"cpu": "unavailable", "cuda": "triton"}, {"cpu": "unavailable", "cuda": "unavailable"}),
    ],
)
def test_table_of_what_is_forced(choice, row, regions, monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", choice)
    monkeypatch.setattr(_C, "instruction_set", lambda: "baseline")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_interprets", lambda: False)
    assert trace_fast.backends() == {op: regions if op in CUDA else row for op in dispatch.OPS}
    monkeypatch.setattr(dispatch, "_interprets", lambda: True)
    interpreted = {**row, "cpu": "triton (interpreted)"} if choice == "triton" else row
    assert trace_fast.backends()["abdiv"] == interpreted


def test_native_serves_the_cpu_by_default(monkeypatch, launched):
    monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
    for op, values in arguments().items():
        launched.clear()
        getattr(ops, op)(*values)
        assert launched == NATIVE[op]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_serves_the_gpu_by_default(monkeypatch, launched):
    monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
    values = arguments("cuda")
    for op, kernels in TRITON.items():
        launched.clear()
        getattr(ops, op)(*values[op])
        assert launched == kernels


def test_reference_can_be_forced(monkeypatch, launched):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    for op, values in arguments().items():
        copies = [[x.clone() if isinstance(x, torch.Tensor) else x for x in values] for _ in range(2)]
        result, expected = getattr(ops, op)(*copies[0]), getattr(reference, op)(*copies[1])
        if op.startswith("accumulate"):
            result, expected = copies[0][0], copies[1][0]
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert launched == set()


@pytest.mark.parametrize("op", dispatch.OPS)
def test_native_forced_and_missing_raises(op, monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"\w+: there is no native kernel on meta; unset TRACE_FAST_BACKEND"):
        getattr(ops, op)(*arguments("meta")[op])
    monkeypatch.setattr(dispatch, "_CUDA", False)
    missing = "the native core is built without CUDA; build it" if op in CUDA else "there is no native kernel on cuda"
    with pytest.raises(RuntimeError, match=f"{op}: {missing}"):
        dispatch.choose(op, "cuda")


@pytest.mark.parametrize("op", TRITON)
def test_triton_forced_where_it_does_not_run_raises(op, monkeypatch):
    launch = pytest.importorskip("trace_fast.kernels.launch")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
    for device in ("cpu", "meta"):
        match = rf"\w+: there is no triton kernel on {device}; unset TRACE_FAST_BACKEND, or set TRITON_INTERPRET=1"
        with pytest.raises(RuntimeError, match=match):
            getattr(ops, op)(*arguments(device)[op])


@pytest.mark.parametrize("op", TRITON)
def test_triton_that_is_not_installed_raises(op, monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
    match = r"\w+: triton is not installed; run `pip install triton` or set TRACE_FAST_BACKEND=reference"
    with pytest.raises(RuntimeError, match=match):
        getattr(ops, op)(*arguments()[op])
    # nor does a GPU that nothing was forced on fall back
    monkeypatch.delenv("TRACE_FAST_BACKEND")
    with pytest.raises(RuntimeError, match=f"{op}: triton is not installed"):
        dispatch.choose(op, "cuda")
    assert trace_fast.backends()[op]["cuda"] == "unavailable"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_missing_build_raises_unless_the_reference_is_asked_for(op, monkeypatch):
    monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_build_error", ImportError("no _C"))
    with pytest.raises(RuntimeError, match=r"\w+: the native core is not built \(no _C\); run .*=reference"):
        getattr(ops, op)(*arguments()[op])
    assert trace_fast.backends()[op]["cpu"] == "unavailable"
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    getattr(ops, op)(*arguments()[op])


def test_unknown_choice_raises(monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "fastest")
    match = "abdiv: TRACE_FAST_BACKEND must be reference, native or triton, got fastest"
    with pytest.raises(ValueError, match=match):
        ops.abdiv(random_maps(1, 6)[0], 2, 3)
    with pytest.raises(ValueError, match="TRACE_FAST_BACKEND must be"):
        trace_fast.backends()


def test_unknown_instruction_set_raises():
    with pytest.raises(ValueError, match=r"name must be one of instruction_sets\(\), got mmx"):
        _C.set_instruction_set("mmx")
