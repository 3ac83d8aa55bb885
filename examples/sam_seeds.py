"""Prompt SAM with a point and a box of each region: `python examples/sam_seeds.py photo.jpg sam_vit_b.pth masks.png`.

This needs the original package: pip install segment-anything. The checkpoint is one of the three that it names.
"""

import sys

import numpy as np
import torch
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry

import trace_fast
from trace_fast.io import draw_masks, write_picture
from trace_fast.masks import make_predictor_prompts, seeds


def main(photo: str, checkpoint: str, picture: str, kind: str = "vit_b") -> None:
    """Draw the mask that SAM gives to each of the 8 largest regions."""
    image = np.array(Image.open(photo).convert("RGB"))
    predictor = SamPredictor(sam_model_registry[kind](checkpoint=checkpoint))
    predictor.set_image(image)

    model = trace_fast.load("mini")
    prompts = make_predictor_prompts(
        seeds(model(image), 8, threshold=model.region_threshold),
        size=image.shape[:2],
        side=predictor.transform.target_length,
    )
    tensors = {name: torch.from_numpy(array).to(predictor.device) for name, array in prompts.items()}
    masks, _, _ = predictor.predict_torch(**tensors, multimask_output=False)  # (k, 1, H, W)
    write_picture(picture, draw_masks(image, masks[:, 0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
