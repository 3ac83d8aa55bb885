"""Types of results as type checkers see them: mypy and pyright read a few lines of a user."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api

LINES = {
    "edges(array)": "ndarray",
    "edges('photo.jpg', model='sdxl', seed=1)": "ndarray",
    "edges(tensor)": "Tensor",
    "edges([tensor, tensor])": "list[Tensor]",
    "edges(['a.jpg', 'b.jpg'])": "list[ndarray]",
    "edges(array, output_type='pil')": "Any",
    "load('mini')": "Tracer | Detector",
    "load('mini', stage=1)": "Tracer",
    "load('mini', stage=2, device='cpu')": "Detector",
    "load(stage=2)(tensor, image_resolution=512)": "Tensor",
    "load(stage=2)([array])": "list[ndarray]",
    "load(stage=2)(array, 512, 512, 'pil')": "Any",
    "load(stage=1)(array)": "TraceOutput",
    "load(stage=1)([array], return_kl=True)": "list[TraceOutput]",
    "propagate(array, tensor)": "ndarray",
    "propagate(tensor, array, mode='flood', threshold=0.5)": "Tensor",
    "propagate([{'mask': array}], array)": "list[dict[str, ndarray]]",
    "propagate(open_masks(array)[0], array)": "MaskSet",
    "instances(array)": "tuple[Tensor, Tensor]",
}

HEAD = """import numpy as np
import torch
from trace_fast import edges, instances, load, propagate
from trace_fast.masks import open_masks
array, tensor = np.zeros((2, 3)), torch.zeros(2, 3)
"""


@pytest.fixture
def program(tmp_path):
    """Write a program that reveals the types of all lines."""
    path = tmp_path / "user.py"
    path.write_text(HEAD + "".join(f"reveal_type({line})\n" for line in LINES))
    return path


def shorten(text):
    """Return the name of a type without modules, and without what arrays hold."""
    text = re.sub(r"\b[a-z_]\w*\.", "", text)
    return re.sub(r"ndarray\[tuple\[[^\]]*\], dtype\[\w+\]\]", "ndarray", text)


@pytest.mark.slow
def test_mypy(program, tmp_path):
    words = [str(program), "--cache-dir", str(tmp_path), "--follow-imports=silent"]
    output, errors, _ = api.run(words)
    types = [shorten(text) for text in re.findall(r'Revealed type is "(.*)"', output)]
    assert types == list(LINES.values()), output + errors


@pytest.mark.slow
def test_pyright(program):
    pytest.importorskip("basedpyright", reason="needs basedpyright: pip install basedpyright")
    # it does not see packages that are installed in place
    config = {"extraPaths": [str(Path(__file__).parents[1])], "typeCheckingMode": "basic", "include": [program.name]}
    (program.parent / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(program.parent)], capture_output=True, text=True, check=False)
    messages = [diagnostic["message"] for diagnostic in json.loads(done.stdout)["generalDiagnostics"]]
    types = [shorten(text) for message in messages for text in re.findall(r' is "(.*)"$', message)]
    assert types == list(LINES.values()), messages
