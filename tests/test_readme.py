"""The pages are true: Python blocks and commands run; links and make targets exist; the README is short."""

import json
import re
import shlex
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

import trace_fast

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "benchmarks" / "README.md"]
TEXTS = {page: page.read_text() for page in PAGES if page.name != "CONTRIBUTING.md"}


def find_blocks(language):
    """Return the blocks of a language of all pages, with the name of the page."""
    blocks = [
        (page, block)
        for page, text in TEXTS.items()
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]
    return [pytest.param(block, id=f"{page.name}-{index}") for index, (page, block) in enumerate(blocks)]


BLOCKS = find_blocks("python")
SHELL = [parameter.values[0] for parameter in find_blocks("sh")]
COMMANDS = re.findall(r"^trace-fast .*$", "".join(SHELL), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block, tmp_path, monkeypatch):
    import diffusers

    for package in re.findall(r"^import (datasets|pandas|ray)$", block, re.MULTILINE):
        pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    if "BatchEdges" in block:
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[data]'")

    from skimage import data, io
    from tiny import pipeline

    # a network of the same class instead of several gigabytes
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pipeline("sd15", tmp_path)
    )
    monkeypatch.chdir(tmp_path)
    io.imsave("photo.jpg", data.coffee())
    exec(compile(block, "page", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path):
    from skimage import data, io

    for folder in ("photos", "shards"):
        (tmp_path / folder).mkdir()
    io.imsave(tmp_path / "photos" / "coffee.jpg", data.coffee())
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as archive:
        archive.add(tmp_path / "photos" / "coffee.jpg", "coffee.jpg")
    program = Path(sys.executable).with_name("trace-fast")
    words = shlex.split(command)[1:]
    subprocess.run([program, *words], cwd=tmp_path, check=True)
    written = {path.name for path in (tmp_path / words[words.index("-o") + 1]).iterdir() if path.name[0] != "."}
    extras = {f"coffee_{kind}" for kind in ("overlay.jpg", "curve.png") if f"--{kind.partition('.')[0]}" in words}
    assert written == ({"a.tar"} if "shards/" in words else {"coffee.png", *extras})


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 150


def test_every_page_is_checked():
    assert README in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 1
    assert len(COMMANDS) >= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links or page != README
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_resolve(page):
    for link, anchor in re.findall(r"\]\(([^)#:]*\.md)?#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / link if link else page).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_page_is_on_the_site():
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT)) for page in PAGES if page.name != "SECURITY.md")


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    named = set(re.findall(r"^::: trace_fast\.(\w+)$", pages, re.MULTILINE))
    whole = {name for name in named if isinstance(getattr(trace_fast, name), types.ModuleType)}
    covered = named.union(*(getattr(trace_fast, name).__all__ for name in whole))
    modules = {"ops", "training", "__version__"}  # twins of the reference's; the functions and their options
    assert sorted(set(trace_fast.__all__) - covered - modules) == []


def test_every_subpackage_is_in_the_tree():
    _, _, tree = (ROOT / "docs" / "kernels.md").read_text().partition("## The tree")
    packages = {path.parent.name for path in (ROOT / "trace_fast").glob("*/__init__.py")} - {"kernels"}  # kernels/jit
    assert "jobs" in packages
    assert sorted(name for name in packages if f"/{name}/`" not in tree and f"`{name}/`" not in tree) == []


def test_every_op_is_on_the_page_of_kernels():
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert [name for name in trace_fast.ops.__all__ if f"`{name}`" not in page] == []


def test_the_card_of_the_embedded_student_has_the_scores_of_the_table():
    card = (ROOT / "trace_fast" / "weights" / "mini" / "student" / "README.md").read_text()
    stated = {name: float(value) for name, value in re.findall(r"\{type: (\w+), value: ([\d.]+)\}", card)}
    report = json.loads((ROOT / "benchmarks" / "results" / "edges-inst.json").read_text())
    measured = report["methods"]["mini"]
    assert stated == {name: round(measured[name], 3) for name in ("ods", "ois", "ap", "cldice")}
