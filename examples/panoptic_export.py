"""Turn a map of classes into panoptic segments: `python examples/panoptic_export.py photo.jpg classes.png out/`.

The map has a class from 1 to 254 at each pixel, 0 for none, 255 for void. Classes are things here, so that edges split
them into instances. out/ gets panoptic.json and a PNG file, in COCO's form.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import trace_fast
from trace_fast.masks import make_panoptic_segments, semantic_masks, write_panoptic


def main(photo: str, classes: str, out: str) -> None:
    """Split the mask of each class by edges, and write what remains without overlaps."""
    class_map = np.array(Image.open(classes))
    tags = [tag for tag in np.unique(class_map).tolist() if 0 < tag < 255]
    model = trace_fast.load("mini")
    masks = trace_fast.propagate(semantic_masks(class_map, tags), model(photo))
    Path(out).mkdir(exist_ok=True)
    write_panoptic(
        Path(out) / "panoptic.json",
        Path(out) / "panoptic",
        [(1, Path(photo).name, *make_panoptic_segments(masks))],
        [{"id": tag, "name": str(tag), "isthing": 1} for tag in tags],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
