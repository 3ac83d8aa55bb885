"""The code of the Triton kernels for sm_80 and sm_90, compiled without a GPU, and the committed table of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_examples import kernel_names

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from trace_fast.kernels import attention, divergence  # noqa: E402
from trace_fast.kernels.launch import INTERPRETED, MULTIPROCESSORS, Config, check_grid, pick  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TABLE = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
ARCHITECTURES = (80, 90)
DTYPES = {2: "bfloat16", 4: "float32"}
HEAD_SIZES = (40, 64, 72, 80, 128, 160)

# every tabulated kernel in the configuration for heads of 72 channels, and one of them for every size of head; then
# shapes for which the compiler writes other code: arguments that are 1, sizes that no tile divides, one output of two;
# last, what the examples of the ops launch, which need no case in the table
SCRIPT = """
import itertools, json, sys
sys.path += sys.argv[1:]
import compile_kernels as benchmark
import torch
from op_examples import TRITON_OPS, example
from trace_fast import ops
from trace_fast.kernels import divergence
from trace_fast.ops import dispatch

def chosen(case):
    row = case.row
    wanted = row["kernel"] == "row_statistics" or row.get("channels", 72) == 72
    return wanted and row["shipped"] and case.picked and row["dtype"] == "bfloat16"

rows = []
for architecture, case in itertools.product(benchmark.ARCHITECTURES, filter(chosen, benchmark.cases())):
    kernel = benchmark.compile_case(case, architecture)
    resources = benchmark.resources(kernel, architecture)
    rows.append({**case.row, "sm": architecture, "tile": list(case.config), **resources, "ptx": kernel.asm["ptx"]})

others = []
for dtype, (heads, tokens, channels) in itertools.product((torch.bfloat16, torch.float32), ((1, 1, 1), (5, 51, 13))):
    for case in benchmark.attention_cases(dtype, heads, tokens, channels):
        if case.row["shipped"] and case.picked:
            benchmark.compile_case(case, 90)
            others.append(case.row["kernel"])
for tokens in (1, 51):
    maps = torch.empty(1, tokens, tokens)
    with benchmark.compiling(90) as compiled:
        divergence.measure_divergence(maps, maps, None)
        divergence.measure_divergence(None, maps, (tokens, 1))
        masses = torch.empty(tokens), torch.empty(1)
        benchmark.attention.accumulate_resized(maps, maps, (tokens, 1), (tokens, 1), 1.0, masses)
    others += compiled

examples = {}
dispatch.choose = lambda op, device: "triton"
for architecture in benchmark.ARCHITECTURES:
    with benchmark.compiling(architecture) as compiled:
        for op in TRITON_OPS:
            arguments, options = example(op)
            getattr(ops, op)(*arguments, **options)
    examples[architecture] = list(compiled)
json.dump({"rows": rows, "others": others, "examples": examples}, sys.stdout)
"""


def compile_anew(script, cache):
    """Return what a script prints, in a process that does not interpret kernels and has no compiled ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", script, str(ROOT / "scripts"), str(ROOT / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows as the table has them, with the code, compiled anew."""
    return json.loads(compile_anew(SCRIPT, tmp_path_factory.mktemp("cache")))


def tabulated():
    """Names of the kernels in the table: those that have configurations to choose from."""
    return {row["kernel"] for row in TABLE["kernels"]}


@pytest.mark.slow
def test_every_kernel_compiles_for_both_architectures(compiled):
    for architecture in ARCHITECTURES:
        names = {row["kernel"] for row in compiled["rows"] if row["sm"] == architecture}
        assert names == tabulated()
        assert names | set(compiled["examples"][str(architecture)]) == kernel_names()


@pytest.mark.slow
def test_kernels_compile_for_a_single_token_and_for_sizes_that_no_tile_divides(compiled):
    assert set(compiled["others"]) == tabulated()


@pytest.mark.slow
def test_products_are_those_of_tensor_cores(compiled):
    for row in compiled["rows"]:
        if "channels" in row:
            assert re.search(r"\b(mma\.sync|wgmma\.mma_async)\S*bf16\.bf16", row["ptx"]), row["kernel"]
    # a whole warp group multiplies where its 64 rows are there
    wide = [row for row in compiled["rows"] if row["sm"] == 90 and row["kernel"] == "add_probabilities"]
    assert wide and all("wgmma.mma_async" in row["ptx"] for row in wide)


@pytest.mark.slow
def test_exponentials_and_logarithms_are_instructions(compiled):
    for row in compiled["rows"]:
        # the file and function of an inlined call are only named
        assert not re.search(r"^\s*(@!?%\w+\s+)?call\b", row["ptx"], re.MULTILINE), row["kernel"]
        if "channels" in row:
            assert "ex2.approx.ftz.f32" in row["ptx"], row["kernel"]
        elif row["kernel"] == "divergence":
            assert "lg2.approx.ftz.f32" in row["ptx"]


# the kernel holds assembly of NVIDIA, at which the compiler for AMD would stop
HIP = """
import sys
sys.path += sys.argv[1:]
import torch
torch.version.hip = "6.4"
import compile_kernels as benchmark
from trace_fast.kernels import divergence

target = benchmark.GPUTarget("hip", "gfx942", 64)
benchmark.GPUTarget = lambda *_: target
maps = torch.empty(1, 51, 51)
with benchmark.compiling(942) as compiled:
    divergence.measure_divergence(maps, maps, (3, 17))
print(compiled["divergence"].asm["amdgcn"])
"""


@pytest.mark.slow
def test_the_divergence_compiles_for_rocm(tmp_path):
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton compiles for NVIDIA alone")
    assert "v_log_f32" in compile_anew(HIP, tmp_path)


@pytest.mark.slow
def test_features_are_read_16_bytes_at_a_time(compiled):
    rows = [row for row in compiled["rows"] if row["kernel"] == "row_statistics"]
    assert {row["channels"] for row in rows} >= set(HEAD_SIZES)
    for row in rows:
        # keys on their way to shared memory, queries on theirs to registers
        sizes = re.findall(r"cp\.async\.c\S+ \[[^\]]*\], \[[^\]]*\], (\w+)", row["ptx"])
        assert sizes and set(sizes) == {"0x10"}, (row["channels"], row["sm"])
        loads = re.findall(r"ld\.global\S*", row["ptx"])
        assert loads and set(loads) == {"ld.global.v4.b32"}, (row["channels"], row["sm"])


@pytest.mark.slow
def test_maps_are_read_and_written_16_bytes_at_a_time(compiled):
    for row in compiled["rows"]:
        if row["kernel"] == "divergence":
            assert set(re.findall(r"ld\.global\S*", row["ptx"])) == {"ld.global.v4.b32"}
        elif row["kernel"] == "add_probabilities":
            assert set(re.findall(r"st\.global\S*", row["ptx"])) == {"st.global.v4.b32"}


@pytest.mark.slow
def test_table_is_what_is_compiled(compiled):
    if TABLE["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {TABLE['triton']}, installed is {triton.__version__}")
    recorded = {identity(row): (row["registers"], row["spilled"]) for row in TABLE["kernels"]}
    measured = {identity(row): (row["registers"], row["spilled"]) for row in compiled["rows"]}
    assert {row: recorded.get(row) for row in measured} == measured


def identity(row):
    """Return what distinguishes a row from the others."""
    return row["kernel"], row.get("lse", False), row["dtype"], row.get("channels"), row["sm"], tuple(row["tile"])


def test_table_has_every_kernel_and_configuration():
    shipped = [
        (kernel, DTYPES[size], tuple(config))
        for size, kernels in attention.CONFIGS.items()
        for kernel, limits in kernels.items()
        for configs in limits.values()
        for config in configs
    ]
    for size, dtype in DTYPES.items():
        shipped += [("divergence", dtype, tuple(config)) for config in divergence.CONFIGS[size]]
        shipped.append(("finish", dtype, tuple(divergence.FINISH)))
        shipped.append(("accumulate_resized", dtype, tuple(attention.RESIZED)))
    assert {kernel for kernel, *_ in shipped} == tabulated()
    rows = [row for row in TABLE["kernels"] if row["shipped"]]
    listed = {(row["kernel"], row["dtype"], tuple(row["tile"]), row["sm"]) for row in rows}
    missing = {(*case, architecture) for case in shipped for architecture in ARCHITECTURES} - listed
    assert missing == set()


def test_every_configuration_fits_a_multiprocessor():
    shared = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
    for row in TABLE["kernels"]:
        threads = 32 * row["tile"][2]
        assert row["shared"] <= shared[row["sm"]], row
        assert row["registers"] * threads <= 65536, row


def test_every_spill_has_its_reason():
    assert [row for row in TABLE["kernels"] if row["spilled"] and not row.get("reason", "").strip()] == []
    # what a network on a GPU runs in does not spill
    spilling = {row["dtype"] for row in TABLE["kernels"] if row["shipped"] and row["spilled"]}
    assert spilling <= {"float32"}


def test_a_grid_that_does_not_fill_the_device_is_cut_smaller():
    configs = Config(128, 128, 8, 3), Config(64, 64, 4, 3), Config(32, 32, 4, 2)
    assert MULTIPROCESSORS == 132
    for side, expected in ((64, 2), (512, 2), (1024, 1), (2048, 0)):

        def grid(config, side=side):
            return triton.cdiv(side, config.rows), triton.cdiv(side, config.columns)

        assert pick(configs, grid, (side, side), torch.device("cpu")) == configs[expected]


def test_a_grid_that_leaves_multiprocessors_idle_at_the_end_is_cut_smaller():
    # rows of SDXL's 20 heads on 132 multiprocessors: 160 large tiles take two turns, 320 small ones three halves
    configs = Config(128, 128, 8, 3), Config(64, 128, 4, 3), Config(64, 64, 4, 3)

    def picked(heads, tokens):
        return pick(
            configs, lambda config: (triton.cdiv(tokens, config.rows), heads), (tokens, tokens), torch.device("cpu")
        )

    assert picked(20, 1024) == configs[1]
    assert picked(16, 1024) == configs[0]


def test_a_batch_beyond_the_grid_of_a_gpu_is_refused():
    check_grid("step_kl", 2**20, 65535, 65535)
    with pytest.raises(ValueError, match=r"step_kl: a batch must be at most 65535 programs .* got \(1, 2, 65536\)"):
        check_grid("step_kl", 1, 2, 65536)
    query = torch.empty(1, device="meta").expand(65536, 1, 1, 8)
    features = attention.Features(query, query, 1.0)
    with pytest.raises(ValueError, match=r"readout: a batch must be at most 65535 .* got \(1, 65536\); split it"):
        features.pick("readout", features.row_grid)
    maps = torch.empty(65536, 1, 1, device="meta")
    with pytest.raises(ValueError, match=r"step_kl_abdiv: a batch must be at most 65535"):
        divergence.measure_divergence(None, maps, (1, 1))


@triton.jit
def shifted_copy_kernel(source, target, read, write, size: tl.constexpr):
    """Copy `size` numbers from an offset to an offset."""
    index = tl.arange(0, size)
    tl.store(target + write + index, tl.load(source + read + index).to(target.dtype.element_ty))


@pytest.mark.skipif(not INTERPRETED, reason="addresses are checked by the interpreter")
@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize(("read", "write"), [(-1, 0), (1, 0), (0, -1), (0, 1)])
def test_an_address_outside_its_tensor_is_caught(read, write, device):
    # inside the storage, so that nothing is harmed; outside the views
    source, target = torch.ones(2, 24, device=device)[:, 4:20].unbind()
    shifted_copy_kernel[1,](source, target, 0, 0, size=16)
    with pytest.raises(Exception, match="an address is outside its tensor"):
        shifted_copy_kernel[1,](source, target, read, write, size=16)


@pytest.mark.parametrize("device", ["triton"], indirect=True)
def test_kernels_round_to_bfloat16_as_torch_does(device):
    source = torch.cat([torch.randn(12), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, torch.inf, 3.4e38])]).to(device)
    target = torch.empty(16, dtype=torch.bfloat16, device=device)
    shifted_copy_kernel[1,](source, target, 0, 0, size=16)
    assert torch.equal(target, source.bfloat16())
