"""scripts/hed.py: the network with random weights, and the layout of the file of weights."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SPEC = importlib.util.spec_from_file_location("hed", Path(__file__).parent.parent / "scripts/hed.py")
hed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hed)

WIDTHS = (2, 3, 4, 5, 6)


def keras_arrays():
    """Return random arrays by the paths of the file of weights: kernels are (height, width, inputs, outputs)."""
    generator = np.random.default_rng(0)
    arrays, channels = {}, 3
    for block, (width, count) in enumerate(zip(WIDTHS, hed.CONVOLUTIONS, strict=True), 1):
        for index in range(count):
            path = f"block{block}/layers/conv2d{f'_{index}' if index else ''}/vars"
            arrays[f"{path}/0"] = generator.normal(0, 0.1, (3, 3, channels, width)).astype(np.float32)
            arrays[f"{path}/1"] = generator.normal(0, 0.1, width).astype(np.float32)
            channels = width
        arrays[f"dsn{block}/vars/0"] = generator.normal(0, 0.1, (1, 1, width, 1)).astype(np.float32)
        arrays[f"dsn{block}/vars/1"] = np.zeros(1, np.float32)
    arrays["fuse/vars/0"] = np.full((1, 1, 5, 1), 0.2, np.float32)
    arrays["fuse/vars/1"] = np.zeros(1, np.float32)
    return arrays


def make_network(arrays):
    network = hed.HED(WIDTHS)
    network.load_state_dict(hed.convert_weights(arrays))
    return network.eval()


@pytest.mark.parametrize("shape", [(16, 16), (37, 52), (64, 33)])
def test_edges_have_the_size_of_the_image(shape):
    with torch.inference_mode():
        edges = make_network(keras_arrays())(torch.rand(2, 3, *shape))
    assert edges.shape == (2, *shape)
    assert torch.isfinite(edges).all() and edges.min() >= 0 and edges.max() <= 1


def test_side_maps_are_fused_by_their_weights():
    arrays = keras_arrays()
    for block in range(1, 6):
        arrays[f"dsn{block}/vars/0"][:] = 0
        arrays[f"dsn{block}/vars/1"][:] = block
    arrays["fuse/vars/0"][0, 0, :, 0] = [0.1, -0.2, 0.3, 0.4, -0.5]
    arrays["fuse/vars/1"][:] = 0.7
    with torch.inference_mode():
        edges = make_network(arrays)(torch.rand(1, 3, 20, 30))
    expected = torch.tensor(0.1 * 1 - 0.2 * 2 + 0.3 * 3 + 0.4 * 4 - 0.5 * 5 + 0.7).sigmoid()
    torch.testing.assert_close(edges, expected.expand(1, 20, 30))


def test_channels_are_blue_first_without_the_mean():
    arrays = {path: np.zeros_like(array) for path, array in keras_arrays().items()}
    arrays["block1/layers/conv2d/vars/0"][1, 1, 0, 0] = 0.01  # the first input channel, unmoved
    arrays["block1/layers/conv2d_1/vars/0"][1, 1, 0, 0] = 1
    arrays["dsn1/vars/0"][0, 0, 0, 0] = arrays["fuse/vars/0"][0, 0, 0, 0] = 1
    image = torch.rand(1, 3, 18, 23, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        edges = make_network(arrays)(image)
    blue = (image[:, 2] * 255 - 104.00699).relu() / 100
    torch.testing.assert_close(edges, blue.sigmoid())


def test_maps_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name, size in (("a", (31, 20)), ("b", (24, 40))):
        Image.new("RGB", size, "gray").save(tmp_path / "images" / f"{name}.jpg")
    network = make_network(keras_arrays())
    monkeypatch.setattr(hed, "load_network", lambda weights: network)
    monkeypatch.setattr(sys, "argv", ["hed.py", str(tmp_path / "images"), "-o", str(tmp_path / "maps")])
    hed.main()
    before = (tmp_path / "maps/a.png").read_bytes()
    with Image.open(io.BytesIO(before)) as picture:
        assert (picture.mode, picture.size) == ("L", (31, 20))
    (tmp_path / "maps/b.png").write_bytes(b"kept")
    hed.main()
    assert (tmp_path / "maps/a.png").read_bytes() == before
    assert (tmp_path / "maps/b.png").read_bytes() == b"kept"


def test_missing_requirements_are_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(SystemExit, match="hed: needs h5py: pip install h5py"):
            hed.load_network(tmp_path / "x.h5")
    monkeypatch.setitem(sys.modules, "h5py", type(sys)("h5py"))
    with pytest.raises(SystemExit, match=r"hed: weights must be a file, got '.*x\.h5'"):
        hed.load_network(tmp_path / "x.h5")
