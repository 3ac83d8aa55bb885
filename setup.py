"""Build trace_fast._C from csrc/ with ninja; metadata is in pyproject.toml, and torch is not needed to build.

TRACE_FAST_CUDA=1 adds the GPU kernels, for which nvcc must be on PATH. TRACE_FAST_SANITIZE=1 builds with the address
and undefined-behavior sanitizers. Each has a build folder apart from the ordinary one.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE, CPU, GPU, HEADERS = (
    sorted(path.as_posix() for pattern in patterns for path in Path().glob(pattern))
    for patterns in (["csrc/*.cpp"], ["csrc/cpu/*.cpp"], ["csrc/cuda/*.cu"], ["csrc/*.h", "csrc/cpu/*.h"])
)

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


def read_description() -> str:
    """Return README.md for package indexes, where pictures and links of the repository would lead nowhere."""
    text = re.sub(r"<img [^>]*>\n+", "", Path("README.md").read_text(encoding="utf-8"))
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


class NinjaBuild(build_ext):
    """A build by ninja, whose folder stays, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension: there is only trace_fast._C."""
        variant = ("cuda" if CUDA else "cpu") + ("-sanitize" if SANITIZE else "")
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise SystemExit(
                f"trace_fast: a C++17 compiler must be installed, got none named {compiler!r} on PATH; install g++ or "
                "clang, or set CXX"
            )
        folder = Path("build", f"ninja-{variant}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        (folder / "build.ninja").write_text("\n".join([*rules(compiler), *edges(target.name)]) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        # a process that has loaded the old file keeps it
        part = target.with_suffix(".part")
        shutil.copyfile(folder / target.name, part)
        os.replace(part, target)


def rules(compiler: str) -> list[str]:
    """Return the variables and rules of the ninja file."""
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    system = " -undefined dynamic_lookup" if sys.platform == "darwin" else " -ldl"
    return [
        f"flags = {FLAGS} {'-DTRACE_FAST_CUDA' if CUDA else ''} {os.environ.get('CXXFLAGS', '')}",
        f"headers = {' '.join(shlex.quote(f'-I{path}') for path in includes)}",
        "rule compile",
        "  description = compile $out",
        f"  command = {compiler} $flags $isa $headers -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_cuda",
        "  description = compile $out",
        f"  command = nvcc {NVCC_FLAGS} -DTRACE_FAST_CUDA -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = link $out",
        f"  command = {compiler} -shared $flags{system} $in $libraries {os.environ.get('LDFLAGS', '')} -o $out",
    ]


def edges(library: str) -> list[str]:
    """Return the lines of the ninja file that compile every source and link the library."""
    # source, name of the object, flags of the instruction set, rule
    sources = [(source, Path(source).stem, "", "compile") for source in CORE]
    for source in CPU:
        for isa, flags in ISAS.items():
            sources.append((source, f"{Path(source).stem}.{isa}", f"-DTRACE_FAST_ISA=Isa::{isa} {flags}", "compile"))
    if CUDA:
        sources += [(source, f"{Path(source).stem}.cuda", "", "compile_cuda") for source in GPU]

    lines = []
    for source, name, isa, rule in sources:
        path = str(Path(source).resolve()).replace(" ", "$ ").replace(":", "$:")
        lines += [f"build {name}.o: {rule} {path}", f"  isa = {isa}"]
    lines.append(f"build {library}: link {' '.join(f'{name}.o' for _, name, *_ in sources)}")
    if CUDA:
        lines.append(f"  libraries = {cuda_runtime()}")
    return lines


def cuda_runtime() -> str:
    """Return the options that link CUDA's runtime statically, from the folder that nvcc names."""
    dry_run = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    line = next(line for line in dry_run.stderr.splitlines() if "LIBRARIES=" in line)
    return f"{line.partition('=')[2].replace(chr(34), '')} -lcudart_static -ldl -lrt"


if CUDA and shutil.which("nvcc") is None:
    raise SystemExit("trace_fast: TRACE_FAST_CUDA=1 needs nvcc, which is not on PATH; unset it to build for the CPU")

setup(
    long_description=read_description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("trace_fast._C", CORE + CPU + (GPU if CUDA else []), depends=[*HEADERS, *GPU])],
    cmdclass={"build_ext": NinjaBuild},
)
