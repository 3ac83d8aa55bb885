"""The README is true: its Python blocks run, and what it links to exists."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{index}" for index in range(len(BLOCKS))])
def test_python_block_runs(block, tmp_path, monkeypatch):
    from skimage import data, io

    monkeypatch.chdir(tmp_path)
    io.imsave("photo.jpg", data.coffee())
    exec(compile(block, str(README), "exec"), {})


def test_there_are_python_blocks():
    assert len(BLOCKS) >= 1


def test_links_to_files_resolve():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text()) + re.findall(r'src="([^"]+)"', README.read_text())
    assert links
    for link in links:
        assert os.path.exists(ROOT / link), link
