"""Score the masks that edges alone give, beside regions that a user would find without them.

    python scripts/regions.py --data ../shared/data/dev_coco --method mini=0.35 \
        --method PiDiNet=maps:../shared/data/dev_coco/pidinet --method sobel -o build/regions

Rows are `trace_fast.instances` of the edges of each method, ranked, and, with a threshold behind another =, cut there;
`felzenszwalb`, regions of color, larger ones first; and `graph cut`, scikit-image's normalized cut of 400 superpixels,
likewise. Masks are kept, one file a photograph: interrupt the command at any time, and repeat it with these or other
methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from propagation import Source, collect, encode, find_regions, parse_options
from skimage.graph import cut_normalized, rag_mean_color
from skimage.segmentation import slic

import trace_fast
from trace_fast.evaluation import Photo, mask_ap
from trace_fast.io.images import read_image
from trace_fast.masks import MaskSet, coco


def list_regions(labels: np.ndarray) -> MaskSet:
    """Return the 100 largest regions of a label map, and their shares of the image as scores."""
    values, areas = np.unique(labels, return_counts=True)
    order = np.argsort(-areas, kind="stable")[:100]
    masks, shares = labels == values[order, None, None], areas[order] / labels.size
    return MaskSet(torch.from_numpy(masks), torch.from_numpy(shares))


def find_baselines(image: np.ndarray) -> dict[str, np.ndarray]:
    """Return the label maps of an image (H, W, 3) by methods that need no edges."""
    superpixels = slic(image, 400, start_label=1)
    return {
        "felzenszwalb": find_regions(image),
        "graph cut": cut_normalized(superpixels, rag_mean_color(image, superpixels, mode="similarity", sigma=0.3)),
    }


def measure(photo: Photo, image: coco.ImageInstances, known: dict[str, Any], sources: Sequence[Source]) -> None:
    """Add to the encoded masks of a photograph, by the name of a row, those that are missing."""
    assert photo.image is not None
    if not known:
        baselines = find_baselines(read_image(photo.image)[0].permute(1, 2, 0).numpy())
        known |= {name: encode(list_regions(labels)) for name, labels in baselines.items()}
    for source in sources:
        if source.name in known:
            continue
        edges = source.edges(photo)
        known[source.name] = encode(MaskSet(*trace_fast.instances(edges)))
        if source.threshold is not None:
            cut = MaskSet(*trace_fast.instances(edges, threshold=source.threshold))
            known[f"{source.name}, cut at {source.threshold}"] = encode(cut)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    options, sources = parse_options(__doc__)
    truth, results = collect(options, lambda *photo: measure(*photo, sources))
    print("| regions | AP | AR100 | 95 % interval |", "| --- | ---: | ---: | ---: |", sep="\n")
    for name, masks in results.items():
        scores = mask_ap(truth, masks, resamples=200)
        assert scores.intervals is not None
        low, high = scores.intervals["ar100"]
        print(f"| {name} | {scores.ap:.3f} | {scores.ar100:.3f} | {low:.3f} to {high:.3f} |")
    print(f"\n{len(truth.images)} photographs.")


if __name__ == "__main__":
    main()
