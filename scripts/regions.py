"""Score the masks that edges alone give, beside regions that a user would find without them.

    python scripts/regions.py --data ../shared/data/dev_coco --method mini \
        --method PiDiNet=maps:../shared/data/dev_coco/pidinet --method sobel --every 5

Rows are `trace_fast.instances` of the edges of each method, ranked; `felzenszwalb`, regions of color, larger ones
first; and `graph cut`, scikit-image's normalized cut of 400 superpixels, likewise.
"""

from __future__ import annotations

import argparse

import numpy as np
from propagation import add_photo_options, find_regions, list_photos
from skimage.graph import cut_normalized, rag_mean_color
from skimage.segmentation import slic

import trace_fast
from trace_fast.evaluation import mask_ap, open_method
from trace_fast.io.images import read_image
from trace_fast.masks import coco


def list_regions(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 100 largest regions of a label map as masks, and their shares of the image as scores."""
    values, areas = np.unique(labels, return_counts=True)
    order = np.argsort(-areas, kind="stable")[:100]
    return labels == values[order, None, None], areas[order] / labels.size


def find_baselines(image: np.ndarray) -> dict[str, np.ndarray]:
    """Return the label maps of an image (H, W, 3) by methods that need no edges."""
    superpixels = slic(image, 400, start_label=1)
    return {
        "felzenszwalb": find_regions(image),
        "graph cut": cut_normalized(superpixels, rag_mean_color(image, superpixels, mode="similarity", sigma=0.3)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photo_options(parser)
    parser.add_argument("--method", action="append", required=True, metavar="[NAME=]SPEC")
    options = parser.parse_args()
    methods = [open_method(spec) for spec in options.method]
    truth: dict[int, coco.ImageInstances] = {}
    results: dict[str, dict[int, coco.ImageInstances]] = {}
    for photo in list_photos(options):
        assert photo.instances is not None
        assert photo.image is not None
        image = photo.instances()
        if not image.instances:
            continue
        truth[image.id] = image
        ranked = {method.name: trace_fast.instances(method.edges(photo)) for method in methods}
        masks = {name: (stack.numpy(), scores.numpy()) for name, (stack, scores) in ranked.items()}
        baselines = find_baselines(read_image(photo.image)[0].permute(1, 2, 0).numpy())
        masks |= {name: list_regions(labels) for name, labels in baselines.items()}
        for name, (stack, scores) in masks.items():
            results.setdefault(name, {})[image.id] = coco.encode_masks(stack, scores, id=image.id)
    print("| regions | AP | AR100 | 95 % |", "| --- | ---: | ---: | ---: |", sep="\n")
    for name, images in results.items():
        scores = mask_ap(coco.Instances(truth, {}), coco.Instances(images, {}), resamples=200)
        assert scores.intervals is not None
        low, high = scores.intervals["ar100"]
        print(f"| {name} | {scores.ap:.3f} | {scores.ar100:.3f} | {low:.3f} to {high:.3f} |")
    print(f"\n{len(truth)} photographs.")


if __name__ == "__main__":
    main()
