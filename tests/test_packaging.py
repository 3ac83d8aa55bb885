"""The distributions, what they install and need, the cost of an import, and the code of the native core."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trace_fast
from trace_fast import _C
from trace_fast.extras import EXTRAS, require

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("PIL", "accelerate", "diffusers", "matplotlib", "peft", "timm", "transformers", "triton", "typer")


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run Python in a separate process; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Build the source distribution; return the folder it is unpacked in."""
    folder = tmp_path_factory.mktemp("sdist")
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})")
    (archive,) = folder.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)  # early releases of Python 3.11 know no filters
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Build a wheel from the source distribution, without optimization to save time."""
    folder = tmp_path_factory.mktemp("wheel")
    python(
        "-c",
        f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})",
        cwd=sdist,
        CXXFLAGS="-O0",
    )
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """Install the wheel without extras; return the Python of an environment that has what it requires, and no more.

    Packages are linked from the environment of the tests, which costs a second instead of a download.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (installed,) = site.glob("*.dist-info")
    pending, linked = [PathDistribution(installed)], set()
    while pending:
        for line in pending.pop().requires or []:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in linked or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            linked.add(name)
            pending.append(distribution(name))
            root = Path(str(pending[-1].locate_file("")))
            for top in {file.parts[0] for file in pending[-1].files or []} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(root / top)
    assert {"torch", "numpy", "pillow", "safetensors", "tqdm"} <= linked
    return folder / "bin" / "python"


def run_bare(bare: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run the Python of a bare environment, which does not see this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [bare, *arguments], cwd=bare.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_the_description_has_no_links_of_the_repository(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        description = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in description and "\n## Sixty seconds\n" in description
    assert "CONTRIBUTING.md says which files" in description
    assert "](https://arxiv.org/abs/2503.07982)" in description
    assert re.findall(r"\]\((?!https:)|<img", description) == []


def test_every_file_states_one_version():
    stated = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert stated == PROJECT["version"] == trace_fast.__version__


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [line.split()[0] for line in listed.splitlines()] == phony.split()


@pytest.mark.slow
def test_sdist_holds_the_files_of_a_build(sdist):
    needed = ["pyproject.toml", "setup.py", "LICENSE", "README.md", "kernels/jit/__init__.py"]
    needed += [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert [name for name in needed if not (sdist / name).is_file()] == []


@pytest.mark.slow
def test_sdist_holds_no_tests(sdist):
    # setuptools takes test_*.py by itself, without the modules that they share
    assert not (sdist / "tests").exists()


@pytest.mark.slow
def test_wheel_installs_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("trace_fast-0.1.0.dist-info/top_level.txt").split() == [b"trace_fast"]
    assert {name.split("/")[0] for name in names} == {"trace_fast", "trace_fast-0.1.0.dist-info"}
    native = next(name for name in names if name.startswith("trace_fast/_C.") and name.endswith((".so", ".pyd")))
    for name in (native, "trace_fast/_C.pyi", "trace_fast/py.typed", "trace_fast/kernels/__init__.py"):
        assert name in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "trace_fast").rglob("*.py")}
    assert sources <= set(names)
    for name in ("model.safetensors", "config.json", "README.md", "student/decoder.safetensors", "student/config.json"):
        assert f"trace_fast/weights/mini/{name}" in names


@pytest.mark.slow
def test_the_core_finds_edges_and_masks_without_extras(bare):
    done = run_bare(bare, ROOT / "scripts" / "smoke.py")
    assert done.returncode == 0, done.stderr
    assert f" of {bare.parent.parent}" in done.stdout


@pytest.mark.slow
def test_the_core_names_the_extra_of_a_model(bare):
    code = f"""
import trace_fast
from importlib.util import find_spec
assert not [name for name in {[*EXTRAS, "triton"]} if find_spec(name)]
for model in ("sdxl", "owner/name", "dinov2-b"):
    try:
        trace_fast.load(model)
    except RuntimeError as error:
        print(error)
"""
    done = run_bare(bare, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "load: diffusers must be installed: pip install 'trace_fast[diffusion]'",
        "load: huggingface_hub must be installed: pip install 'trace_fast[diffusion]'",
        "load: transformers must be installed: pip install 'trace_fast[encoders]'",
    ]


@pytest.mark.slow
def test_the_command_without_its_extra_is_one_sentence(bare):
    done = run_bare(bare, "-m", "trace_fast", "edges", "photo.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "trace-fast: typer must be installed: pip install 'trace_fast[cli]'\n"


def get_extra(extra: str) -> dict[str, Requirement]:
    """Return what an extra requires, by name; those that it includes are followed."""
    requirements = {}
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == "trace_fast":
            for included in requirement.extras:
                requirements |= get_extra(included)
        else:
            requirements[requirement.name] = requirement
    return requirements


@pytest.mark.parametrize("package", EXTRAS)
def test_an_extra_brings_the_package_that_names_it(package):
    name, extra = EXTRAS[package]
    assert name in get_extra(extra)
    assert name in get_extra("all")


def test_every_import_is_of_the_core_or_of_an_extra():
    core = {"torch", "numpy", "PIL", "safetensors", "tqdm", "trace_fast", *sys.stdlib_module_names}
    imported = set()
    for path in (ROOT / "trace_fast").rglob("*.py"):
        if "kernels" in path.parts:  # launched where triton is
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert "diffusers" in imported
    assert sorted(imported - core - set(EXTRAS)) == []


def test_a_missing_package_names_its_extra(monkeypatch):
    require("seeds", "scipy", "matplotlib")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RuntimeError, match=r"^seeds: scipy must be installed: pip install 'trace_fast\[eval\]'$"):
        require("seeds", "matplotlib", "scipy")
    with pytest.raises(RuntimeError, match=r"^scenes: scipy must be installed: pip install 'trace_fast\[train\]'$"):
        require("scenes", "scipy", extra="train")


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> list[set[str]]:
    """Import the package, then find edges of a student and of its base; return the packages imported by then, twice.

    The imports of torch itself cannot be avoided, and are left out.
    """
    from tiny import embedded, student

    folder = tmp_path_factory.mktemp("lean")
    embedded(folder)
    student(folder / "student", folder, (32, 48), "pixels", channels=4)
    code = f"""
import sys, torch
old = set(sys.modules)
import trace_fast
print(*set(sys.modules) - old)
image = torch.rand(3, 20, 30)
for stage in (1, 2):
    assert trace_fast.edges(image, model={str(folder)!r}, stage=stage, device="cpu").shape == (1, 1, 20, 30)
print(*set(sys.modules) - old)
"""
    lines = python("-c", code).splitlines()
    assert len(lines) == 2
    return [{name.split(".")[0] for name in line.split()} for line in lines]


@pytest.mark.slow
def test_import_is_lean(modules):
    assert "trace_fast" in modules[0]
    assert sorted(modules[0] & set(HEAVY)) == []


@pytest.mark.slow
def test_a_student_of_the_embedded_network_runs_on_torch_alone(modules):
    assert sorted(modules[1] & set(HEAVY) - {"triton"}) == []  # torch itself imports it with the first registered op


@pytest.mark.slow
def test_training_does_not_import_the_evaluation():
    """Only `trace_fast.evaluation` opens the ground truth of a data set."""
    code = "import sys, trace_fast.training.distillation, trace_fast.training.mini; print(*sys.modules)"
    modules = python("-c", code).split()
    assert "trace_fast.training.scenes.dataset" in modules
    assert [name for name in modules if name.startswith("trace_fast.evaluation")] == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"TRACE_FAST_CUDA": "1"},
            "trace_fast: TRACE_FAST_CUDA=1 needs nvcc, which is not on PATH; unset it to build for the CPU",
        ),
        (
            {"CXX": "no-c++ -O2"},
            "trace_fast: a C++17 compiler must be installed, got none named 'no-c++ -O2' on PATH; install g++ or "
            "clang, or set CXX",
        ),
    ],
)
def test_a_missing_compiler_stops_with_one_line(setting, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, **setting, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [message]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_logarithm_or_exponential_comes_from_libm():
    names = subprocess.run(["nm", "-D", "-u", _C.__file__], capture_output=True, text=True, check=True).stdout
    imported = {line.split()[-1].split("@")[0] for line in names.splitlines()}
    assert imported.isdisjoint({"exp", "expf", "exp2", "exp2f", "log", "logf", "log2", "log2f"})
    assert not any("GOMP" in name for name in imported)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 registers")
def test_kernels_use_whole_registers():
    code = subprocess.run(["objdump", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    lines = code.splitlines()
    # the multiply-adds of the polynomials and products, and the shift that takes a logarithm's exponent
    for register in ("%zmm", "%ymm"):
        assert sum("vfmadd" in line and register in line for line in lines) > 50
        assert any("vpsrad" in line and register in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["torch's", "its"])
def test_threads_of_the_core_are_torchs_where_torch_is_loaded(threads):
    # the core alone, which finds an OpenMP runtime in the process or starts threads itself
    code = f"""
import importlib.util, sys
{"import torch" if threads == "torch's" else ""}
import numpy as np
spec = importlib.util.spec_from_file_location("trace_fast._C", {_C.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
maps = np.random.default_rng(0).random((2, 3, 96, 96), dtype=np.float32)
maps /= maps.sum(-1, keepdims=True)
results = [np.full(3, np.nan, np.float32) for _ in range(3)]
for threads, kl in zip((1, 2, 5), results):
    core.cpu.step_kl(maps[0].ctypes.data, maps[1].ctypes.data, 3, 96, kl.ctypes.data, threads)
exact = (maps[0].astype(float) * np.log(maps[0].astype(float) / maps[1])).sum(-1).mean(-1)
np.testing.assert_allclose(results[0], exact, rtol=1e-5)
assert all((kl == results[0]).all() for kl in results)
assert ("torch" in sys.modules) == {threads == "torch's"}
"""
    python("-c", code)
