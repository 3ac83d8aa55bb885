"""Refine the masks that SAM finds by itself: `python examples/sam_automatic_masks.py photo.jpg sam_vit_b.pth out.json`.

This needs the original package: pip install segment-anything. The records of `SamAutomaticMaskGenerator` go in, and
records of the same form come out.
"""

import json
import sys

import numpy as np
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

import trace_fast


def main(photo: str, checkpoint: str, out: str, kind: str = "vit_b", **options: float) -> None:
    """Write the refined records as JSON, with compressed RLE."""
    image = np.array(Image.open(photo).convert("RGB"))
    sam = sam_model_registry[kind](checkpoint=checkpoint)
    records = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options).generate(image)

    model = trace_fast.load("mini")
    records = trace_fast.propagate(records, model(image))
    with open(out, "w") as file:
        json.dump(records, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
