"""Builds trace_fast._C from csrc/ with ninja; metadata is in pyproject.toml, and torch is not needed to build.

TRACE_FAST_CUDA=1 adds the GPU kernels, for which nvcc must be on PATH. TRACE_FAST_SANITIZE=1 builds with the address
and undefined-behaviour sanitizers. Each is apart from the ordinary build.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = ["csrc/bindings.cpp", "csrc/common.cpp"]
CPU = ["csrc/cpu/attention.cpp", "csrc/cpu/contours.cpp", "csrc/cpu/divergence.cpp", "csrc/cpu/regions.cpp"]
GPU = ["csrc/cuda/regions.cu"]
HEADERS = ["csrc/trace_fast.h", "csrc/common.h", "csrc/regions.h", "csrc/cpu/simd.h"]

# each CPU kernel is compiled once per instruction set and chosen at run time
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = "-mavx2 -mfma"
    ISAS["avx512"] = "-mavx512f -mavx512vl -mavx512bw -mavx512dq"

CUDA = os.environ.get("TRACE_FAST_CUDA") == "1"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra " + " ".join(
    f"-gencode arch=compute_{sm},code=[sm_{sm},compute_{sm}]" for sm in (80, 90)
)
SANITIZE = os.environ.get("TRACE_FAST_SANITIZE") == "1"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread -Wall -Wextra -Wno-psabi"
if SANITIZE:
    FLAGS += " -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"


class NinjaBuild(build_ext):
    """Writes one ninja file and runs it; the folder stays, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension: there is only trace_fast._C."""
        kind = ("cuda" if CUDA else "cpu") + ("-sanitize" if SANITIZE else "")
        folder = Path("build", f"ninja-{kind}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        built = folder / target.name

        compiler = os.environ.get("CXX", "c++")
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        system = " -undefined dynamic_lookup" if sys.platform == "darwin" else " -ldl"
        lines = [
            f"flags = {FLAGS} {'-DTRACE_FAST_CUDA' if CUDA else ''} {os.environ.get('CXXFLAGS', '')}",
            f"headers = {' '.join(shlex.quote(f'-I{path}') for path in includes)}",
            "rule compile",
            f"  command = {compiler} $flags $isa $headers -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule compile_cuda",
            f"  command = nvcc {NVCC_FLAGS} -DTRACE_FAST_CUDA -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared $flags{system} $in $libraries {os.environ.get('LDFLAGS', '')} -o $out",
        ]
        objects = []

        def add(source: str, name: str, isa: str = "", rule: str = "compile") -> None:
            path = str(Path(source).resolve()).replace(" ", "$ ").replace(":", "$:")
            lines.extend([f"build {name}.o: {rule} {path}", f"  isa = {isa}"])
            objects.append(f"{name}.o")

        for source in CORE:
            add(source, Path(source).stem)
        for source in CPU:
            for isa, flags in ISAS.items():
                add(source, f"{Path(source).stem}.{isa}", f"-DTRACE_FAST_ISA=Isa::{isa} {flags}")
        for source in GPU if CUDA else []:
            add(source, f"{Path(source).stem}.cuda", rule="compile_cuda")
        lines.append(f"build {built.name}: link {' '.join(objects)}")
        if CUDA:
            lines.append(f"  libraries = {cudart()}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")

        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        shutil.copyfile(built, target)


def cudart() -> str:
    """How to link CUDA's runtime statically: nvcc says where it is."""
    told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    line = next(line for line in told.stderr.splitlines() if "LIBRARIES=" in line)
    return f"{line.partition('=')[2].replace(chr(34), '')} -lcudart_static -ldl -lrt"


if CUDA and shutil.which("nvcc") is None:
    raise SystemExit("trace_fast: TRACE_FAST_CUDA=1 needs nvcc, which is not on PATH; unset it to build for the CPU")

setup(
    ext_modules=[Extension("trace_fast._C", CORE + CPU + (GPU if CUDA else []), depends=[*HEADERS, *GPU])],
    cmdclass={"build_ext": NinjaBuild},
)
