"""Lay photographs, masks on a coarse grid, the masks after `trace_fast.propagate`, and `instances` side by side.

    python scripts/mask_sheet.py --data ../shared/data/dev_coco --method PiDiNet=maps:../shared/data/dev_coco/pidinet \
        --count 6 -o build/masks.png

Every k-th photograph by name is taken, so that the sheet shows ordinary ones. The masks before are the true masks on a
grid of 16 pixels, as networks of such tokens draw them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from propagation import draw_on_grid

import trace_fast
from trace_fast.evaluation import open_dataset, open_method
from trace_fast.io import visualize
from trace_fast.io.images import read_image

TITLES = ("photograph", "edges", "masks on a grid", "after, fit", "after, flood", "instances")


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="mini", help="A source of edges, as of `trace-fast evaluate`.")
    parser.add_argument("--threshold", type=float, default=0.5, help="The threshold of mode flood and of instances.")
    parser.add_argument("--count", type=int, default=6, help="The number of photographs.")
    parser.add_argument("--height", type=int, default=220, help="The height of a picture, in pixels.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    photos = [photo for photo in open_dataset(options.data).photos if photo.image is not None]
    method = open_method(options.method)
    rows = []
    for photo in photos[3 :: len(photos) // options.count][: options.count]:
        assert photo.image is not None
        assert photo.instances is not None
        image, edges = read_image(photo.image)[0], method.edges(photo)
        before = draw_on_grid(photo.instances().masks())
        stacks = [
            before,
            trace_fast.propagate(before, edges),
            trace_fast.propagate(before, edges, threshold=options.threshold, mode="flood"),
            trace_fast.instances(edges, threshold=options.threshold)[0].numpy(),
        ]
        pictures = [photo.image, edges, *(visualize.draw_masks(image, masks) for masks in stacks)]
        rows.append(visualize.panel(pictures, TITLES if not rows else [""] * len(TITLES), height=options.height))
    visualize.write_picture(options.output, visualize.grid(rows, 1))


if __name__ == "__main__":
    main()
