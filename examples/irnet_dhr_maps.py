"""Refine the masks of IRNet or DHR: `python examples/irnet_dhr_maps.py photo.jpg masks.npy refined.npy`.

IRNet's .npy files hold {"score", "mask", "class"}, DHR's .pt files {"keys", "masks"} with soft masks; the result has
the same form. DHR's .png files are maps of classes with a palette, and so is the result.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import trace_fast
from trace_fast.masks import paint_labels, semantic_masks, write_palette


def main(photo: str, masks: str, refined: str) -> None:
    """Read the masks by the ending of their file, refine them, and write them likewise."""
    model = trace_fast.load("mini")
    edges = model(photo)
    ending = Path(masks).suffix
    if ending == ".npy":
        fields = np.load(masks, allow_pickle=True).item()
        np.save(refined, trace_fast.propagate(fields, edges), allow_pickle=True)
    elif ending == ".pt":
        fields = torch.load(masks, weights_only=False)
        torch.save(trace_fast.propagate(fields, edges, cut=0.5), refined)
    else:
        class_map = np.array(Image.open(masks))
        tags = [tag for tag in np.unique(class_map).tolist() if 0 < tag < 255]
        mask_set = trace_fast.propagate(semantic_masks(class_map, tags), edges)
        painted = paint_labels(mask_set.masks, mask_set.classes.tolist()).numpy()
        write_palette(refined, np.where(class_map == 255, 255, painted))


if __name__ == "__main__":
    main(*sys.argv[1:])
