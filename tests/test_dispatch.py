"""The registry of ops: documentation, the table of backends, the variable that forces one, and missing backends."""

import doctest
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from op_examples import COPIED_OPS, CPU_OPS, NATIVE_OPS, TRITON_OPS, example, kernel_modules
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

import trace_fast
from trace_fast import _C, ops, reference
from trace_fast.ops import dispatch
from trace_fast.testing import random_maps


def run(op, device="cpu"):
    """Run an op on the example of its documentation."""
    arguments, options = example(op, device)
    return getattr(ops, op)(*arguments, **options)


def fake_gpu(monkeypatch, major, minor):
    """Let torch see a GPU of a compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major, minor=minor))


class SpiedKernel:
    """A Triton kernel that records each launch."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append("triton")
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """Record "triton", "native" or "native on cuda" for each launch of a kernel."""
    pytest.importorskip("triton")
    launches = []

    def spy(backend, function):
        def call(*arguments):
            launches.append(backend)
            return function(*arguments)

        return call

    for module in kernel_modules():
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, SpiedKernel(kernel, launches))
    for backend, kernels in (("native", _C.cpu), ("native on cuda", _C.cuda)):
        for name, function in list(vars(kernels).items()):
            if not name.startswith("_"):
                monkeypatch.setattr(kernels, name, spy(backend, function))
    return launches


class TestDeclaration:
    def test_ops_and_reference_have_the_same_names(self):
        assert ops.__all__ is reference.__all__
        assert set(dispatch.CUDA_BACKENDS) == set(ops.__all__)
        assert len(set(ops.__all__)) == len(ops.__all__)

    @pytest.mark.parametrize("op", ops.__all__)
    def test_signatures_agree(self, op):
        assert inspect.signature(getattr(ops, op)) == inspect.signature(getattr(reference, op))

    @pytest.mark.parametrize("op", ops.__all__)
    def test_documentation_is_that_of_the_reference_and_what_the_op_adds(self, op):
        text, specification = (
            [line for line in inspect.getdoc(getattr(module, op)).splitlines() if line] for module in (ops, reference)
        )
        sections = ["Args:", "Returns:", "Note:", "Raises:", "Example:"]
        if inspect.signature(getattr(ops, op)).return_annotation is None:
            sections.remove("Returns:")
        assert [line for line in text if line in sections] == sections
        assert [line for line in text if line in specification] == specification
        assert "fastest implementation" not in "".join(text)

    @pytest.mark.parametrize("module", [ops, reference], ids=lambda module: module.__name__)
    @pytest.mark.parametrize("op", ops.__all__)
    def test_examples(self, op, module):
        function, output = getattr(module, op), []
        test = doctest.DocTestParser().get_doctest(function.__doc__, {"torch": torch, op: function}, op, None, 0)
        assert test.examples
        assert doctest.DocTestRunner().run(test, out=output.append).failed == 0, "".join(output)


class TestTable:
    @pytest.mark.parametrize("has_cuda", [False, True])
    def test_by_default(self, instruction_set, has_cuda, monkeypatch):
        monkeypatch.setattr(dispatch, "has_cuda", lambda: has_cuda)
        monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
        monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
        table = trace_fast.backends()
        cuda = dict.fromkeys(TRITON_OPS, "triton") | dict.fromkeys(CPU_OPS, "unavailable")
        cuda |= dict.fromkeys(NATIVE_OPS, "native (cuda)" if has_cuda else "native (cpu)")
        cuda |= dict.fromkeys(COPIED_OPS, "native (cpu)")
        assert table == {op: {"cpu": f"native ({instruction_set})", "cuda": cuda[op]} for op in ops.__all__}
        assert str(table).splitlines()[0].split() == ["op", "cpu", "cuda"]

    def test_reference_forced(self, monkeypatch):
        monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
        cuda = dict.fromkeys(ops.__all__, "reference") | dict.fromkeys(CPU_OPS, "unavailable")
        assert trace_fast.backends() == {op: {"cpu": "reference", "cuda": cuda[op]} for op in ops.__all__}

    @pytest.mark.parametrize("has_cuda", [False, True])
    def test_native_forced(self, instruction_set, has_cuda, monkeypatch):
        monkeypatch.setattr(dispatch, "has_cuda", lambda: has_cuda)
        monkeypatch.setenv("TRACE_FAST_BACKEND", "native")
        cuda = dict.fromkeys(NATIVE_OPS, "native (cuda)" if has_cuda else "native (cpu)")
        cuda |= dict.fromkeys(COPIED_OPS, "native (cpu)")
        expected = {
            op: {"cpu": f"native ({instruction_set})", "cuda": cuda.get(op, "unavailable")} for op in ops.__all__
        }
        assert trace_fast.backends() == expected

    @pytest.mark.parametrize("interpreted", [False, True])
    def test_triton_forced(self, interpreted, monkeypatch):
        monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
        monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
        monkeypatch.setattr(dispatch, "_interprets", lambda: interpreted)
        triton = {"cpu": "triton (interpreted)" if interpreted else "unavailable", "cuda": "triton"}
        others = {"cpu": "unavailable", "cuda": "unavailable"}
        assert trace_fast.backends() == {op: triton if op in TRITON_OPS else others for op in ops.__all__}


class TestChoice:
    @pytest.mark.parametrize("op", ops.__all__)
    def test_what_is_forced_runs_and_nothing_else(self, op, device, launched, request):
        native = "native" in request.node.name
        device = "cpu" if op in CPU_OPS else device
        if not native and op not in TRITON_OPS:
            with pytest.raises(RuntimeError, match=f"{op}: there is no triton kernel; unset TRACE_FAST_BACKEND"):
                run(op, device)
        else:
            run(op, device)
            assert set(launched) == {"native" if native else "triton"}

    @pytest.mark.parametrize("device", ["native-cuda"], indirect=True)
    @pytest.mark.parametrize("op", NATIVE_OPS)
    def test_native_forced_on_a_gpu(self, op, device, launched):
        run(op, device)
        assert set(launched) == {"native on cuda"}

    def test_gradients_run_what_is_forced(self, device, launched, request):
        (query, key, values), _ = example("readout", device)
        out = ops.readout(query.requires_grad_(), key, values)
        launched.clear()
        out.sum().backward()
        assert set(launched) == {"native" if "native" in request.node.name else "triton"}

    @pytest.mark.parametrize("op", ops.__all__)
    def test_is_made_once_per_call(self, op, monkeypatch):
        choose, questions = dispatch.choose, []

        def counted(*arguments):
            questions.append(arguments)
            return choose(*arguments)

        monkeypatch.setattr(dispatch, "choose", counted)
        run(op)
        assert len(questions) == 1

    @pytest.mark.parametrize("op", ops.__all__)
    def test_native_serves_the_cpu_by_default(self, op, monkeypatch, launched):
        monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
        run(op)
        assert set(launched) == {"native"}

    @pytest.mark.gpu
    @pytest.mark.parametrize("op", TRITON_OPS)
    def test_triton_serves_the_gpu_by_default(self, op, monkeypatch, launched):
        monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
        run(op, "cuda")
        assert set(launched) == {"triton"}

    @pytest.mark.parametrize("op", ops.__all__)
    def test_reference_can_be_forced(self, op, monkeypatch, launched):
        monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
        (arguments, options), (copies, _) = example(op), example(op)
        results = getattr(ops, op)(*arguments, **options), arguments
        expected = getattr(reference, op)(*copies, **options), copies
        # the same code; arguments are compared because some are updated in place
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
        assert launched == []


@pytest.mark.parametrize(
    "op", ["attention_map", "accumulate_attention", "attend", "accumulate_resized", "resize_attention"]
)
def test_ops_without_a_gradient_name_themselves_and_the_argument(op):
    (arguments, options), names = example(op), list(inspect.signature(getattr(ops, op)).parameters)
    for index, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            tensors = [*arguments[:index], value.requires_grad_(), *arguments[index + 1 :]]
            with pytest.raises(
                RuntimeError, match=rf"^{op}: there is no gradient; detach {names[index]} or call under"
            ):
                getattr(ops, op)(*tensors, **options)
            value.requires_grad_(False)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("op", ops.__all__)
def test_tensors_without_values(op, kind):
    """An op whose steps follow the values refuses tensors that have none; others return such tensors."""
    convert = (lambda tensor: tensor.to("meta")) if kind == "meta" else FakeTensorMode().from_tensor
    arguments, options = tree_map_only(torch.Tensor, convert, example(op))
    follows = op in (*CPU_OPS, "merge_masks", "merge_tree")
    if follows or (kind == "meta" and op in ("label_regions", "flood_fill", "watershed")):
        with pytest.raises(
            ValueError, match=rf"^{op}: \w+ must (have values, got a tensor of|be on the cpu, got meta)"
        ):
            getattr(ops, op)(*arguments, **options)
    else:
        out = getattr(ops, op)(*arguments, **options)
        tensors = [value for value in (out, *arguments, *options.values()) if isinstance(value, torch.Tensor)]
        assert all(value.is_meta or isinstance(value, FakeTensor) for value in tensors)


class TestMissing:
    @pytest.mark.parametrize("op", ops.__all__)
    def test_native_kernel_of_a_device(self, op, monkeypatch):
        monkeypatch.setenv("TRACE_FAST_BACKEND", "native")
        if op in CPU_OPS:
            with pytest.raises(ValueError, match=f"{op}: .* must be on the cpu, got meta"):
                run(op, "meta")
        else:
            with pytest.raises(RuntimeError, match=r"\w+: there is no native kernel on meta; unset TRACE_FAST_BACKEND"):
                run(op, "meta")
        messages = dict.fromkeys(TRITON_OPS, "there is no native kernel on cuda")
        messages |= dict.fromkeys(CPU_OPS, "there is no kernel on cuda; move the tensors to the cpu")
        if op in COPIED_OPS + NATIVE_OPS:
            assert dispatch.choose(op, "cuda") == "native"
            return
        with pytest.raises(RuntimeError, match=f"{op}: {messages[op]}"):
            dispatch.choose(op, "cuda")

    def test_cuda_kernels(self, monkeypatch):
        elsewhere = torch.empty(2, 3, device="meta")
        monkeypatch.setattr(dispatch, "has_cuda", lambda: True)
        assert dispatch.for_core(elsewhere) is elsewhere
        monkeypatch.setattr(dispatch, "has_cuda", lambda: False)
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            dispatch.for_core(elsewhere)

    @pytest.mark.gpu
    @pytest.mark.parametrize("op", COPIED_OPS + NATIVE_OPS)
    def test_cuda_kernels_of_tensors_on_a_gpu(self, op, monkeypatch, launched):
        monkeypatch.setattr(dispatch, "has_cuda", lambda: False)
        result, expected = run(op, "cuda"), run(op)
        assert set(launched) == {"native"}
        torch.testing.assert_close(result, tree_map_only(torch.Tensor, torch.Tensor.cuda, expected), rtol=0, atol=0)

    @pytest.mark.parametrize("op", TRITON_OPS)
    def test_triton_kernel_of_a_device(self, op, monkeypatch):
        launch = pytest.importorskip("trace_fast.kernels.launch")
        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
        for device in ("cpu", "meta"):
            match = rf"\w+: there is no triton kernel on {device}; unset TRACE_FAST_BACKEND, or set TRITON_INTERPRET=1"
            with pytest.raises(RuntimeError, match=match):
                run(op, device)

    @pytest.mark.parametrize("op", TRITON_OPS)
    def test_triton(self, op, monkeypatch):
        monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
        monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
        match = r"\w+: triton is not installed; run `pip install triton` or set TRACE_FAST_BACKEND=reference"
        with pytest.raises(RuntimeError, match=match):
            run(op)
        # nor does a GPU on which nothing was forced fall back
        monkeypatch.delenv("TRACE_FAST_BACKEND")
        with pytest.raises(RuntimeError, match=f"{op}: triton is not installed"):
            dispatch.choose(op, "cuda")
        assert trace_fast.backends()[op]["cuda"] == "unavailable"

    @pytest.mark.parametrize("op", TRITON_OPS)
    def test_gpu_that_triton_runs_on(self, op, monkeypatch):
        fake_gpu(monkeypatch, 7, 5)
        monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
        assert dispatch.choose(op, "cuda") == trace_fast.backends()[op]["cuda"] == "reference"
        monkeypatch.setenv("TRACE_FAST_BACKEND", "triton")
        match = f"{op}: triton needs a GPU of compute capability 8.0 or above, got 7.5; unset TRACE_FAST_BACKEND"
        with pytest.raises(RuntimeError, match=match):
            dispatch.choose(op, "cuda")
        fake_gpu(monkeypatch, 8, 0)
        assert dispatch.choose(op, "cuda") == "triton"

    @pytest.mark.parametrize("op", ops.__all__)
    def test_native_core(self, op, monkeypatch):
        monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
        monkeypatch.setattr(dispatch, "_build_error", ImportError("no _C"))
        with pytest.raises(RuntimeError, match=r"\w+: the native core is not built \(no _C\); run .*=reference"):
            run(op)
        assert trace_fast.backends()[op]["cpu"] == "unavailable"
        monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
        run(op)


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


@pytest.mark.parametrize("op", ops.__all__)
def test_sparse_tensors_are_refused(op):
    arguments, options = example(op)
    changed = [x.to_sparse() if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises((TypeError, ValueError), match="must be dense"):
        getattr(ops, op)(*changed, **options)


def test_ops_do_not_import_the_compiler():
    """Importing it takes longer than finding the first edges does."""
    code = """
import sys, torch, trace_fast
photo = torch.rand(1, 3, 48, 64)
edges = trace_fast.load("mini", device="cpu", size=(32, 48)).edges(photo)[0, 0]
trace_fast.load("mini", stage=1, device="cpu", size=(32, 48)).edges(photo)
trace_fast.instances(edges, k=3)
trace_fast.propagate(torch.ones(48, 64, dtype=torch.int64), edges)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
