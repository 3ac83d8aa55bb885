"""Types of results as type checkers see them: mypy runs on a few lines of a user."""

import re

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
}


HEAD = """import numpy as np
import torch
from trace_fast import edges, load
array, tensor = np.zeros((2, 3)), torch.zeros(2, 3)
"""


@pytest.mark.slow
def test_types_of_results(tmp_path):
    (tmp_path / "user.py").write_text(HEAD + "".join(f"reveal_type({line})\n" for line in LINES))
    words = [str(tmp_path / "user.py"), "--cache-dir", str(tmp_path), "--follow-imports=silent"]
    output, errors, _ = api.run(words)
    array_type = re.compile(r"ndarray\[tuple\[Any, \.\.\.\], numpy\.dtype\[Any\]\]")
    types = [array_type.sub("ndarray", text) for text in re.findall(r'Revealed type is "(.*)"', output)]
    # without the names of modules
    assert [re.sub(r"\w+\.", "", text) for text in types] == list(LINES.values()), output + errors
