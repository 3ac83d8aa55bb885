"""Lay photographs, the masks of `trace-fast segment`, and masks before and after `trace_fast.propagate` side by side.

    python scripts/mask_sheet.py --data ../shared/data/dev_coco --method mini --threshold 0.35 --name 000000000127 \
        --name 000000000459 --name 000000000790 --name 000000174375 --name 000000278528 --name 000000401416 \
        -o docs/pictures/masks.jpg

"no hierarchy" has the regions that edges above the threshold enclose, which is how `segment` once found them. The masks
on a grid are the true masks on a grid of 16 pixels, as networks of such tokens draw them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from propagation import MIN_SHARE, draw_on_grid

import trace_fast
from trace_fast.evaluation import open_dataset, open_method
from trace_fast.io import visualize
from trace_fast.io.images import read_image

TITLES = ("photograph", "edges", "no hierarchy", "segment", "masks on a grid", "after, fit", "after, flood")


def find_enclosed(edges: np.ndarray, threshold: float) -> np.ndarray:
    """Return the regions (M, H, W) that edges (H, W) above a threshold enclose, without the tiny ones."""
    labels = trace_fast.ops.label_regions(torch.from_numpy(edges >= threshold)[None])[0][0].numpy()
    masks = labels == np.arange(1, labels.max() + 1)[:, None, None]
    return masks[masks.mean((1, 2)) >= MIN_SHARE]


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="mini", help="A source of edges, as of `trace-fast evaluate`.")
    parser.add_argument("--threshold", type=float, required=True, help="The threshold of segment and of mode flood.")
    parser.add_argument("--name", action="append", required=True, help="A photograph; may be repeated.")
    parser.add_argument("--height", type=int, default=160, help="The height of a picture, in pixels.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    photos = {photo.name: photo for photo in open_dataset(options.data).photos}
    method = open_method(options.method)
    rows = []
    for photo in map(photos.__getitem__, options.name):
        assert photo.image is not None
        assert photo.instances is not None
        image, edges = read_image(photo.image)[0], method.edges(photo)
        before = draw_on_grid(photo.instances().masks())
        stacks = [
            find_enclosed(edges, options.threshold),
            trace_fast.instances(edges, threshold=options.threshold)[0].numpy(),
            before,
            trace_fast.propagate(before, edges),
            trace_fast.propagate(before, edges, threshold=options.threshold, mode="flood"),
        ]
        pictures = [photo.image, edges, *(visualize.draw_masks(image, masks) for masks in stacks)]
        rows.append(visualize.panel(pictures, TITLES if not rows else [""] * len(TITLES), height=options.height))
    visualize.write_picture(options.output, visualize.grid(rows, 1))


if __name__ == "__main__":
    main()
