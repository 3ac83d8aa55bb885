"""Refine a file of CutLER's or MaskCut's: `python examples/cutler_results.py results.json photos/ refined.json`.

The photos are named after the ids of images, as COCO's are, such as photos/000000000139.jpg. A list of results stays a
list, a file with annotations keeps everything else that is in it.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import trace_fast
from trace_fast.masks import MaskSet, propagate, refine_results


def main(results: str, photos: str, refined: str) -> None:
    """Split masks where they cross an edge, and let them grow up to edges."""
    model = trace_fast.load("mini")

    def refine(masks: np.ndarray, scores: np.ndarray, image_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        (photo,) = Path(photos).glob(f"{image_id:012}.*")
        mask_set = MaskSet(torch.from_numpy(masks), torch.from_numpy(scores).float())
        mask_set = propagate(mask_set, model(photo))
        return mask_set.masks, mask_set.scores

    refine_results(results, refined, refine)


if __name__ == "__main__":
    main(*sys.argv[1:])
