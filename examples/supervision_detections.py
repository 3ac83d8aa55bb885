"""Refine and draw supervision's `Detections`: `python examples/supervision_detections.py photo.jpg out.png`.

This needs supervision: pip install supervision. Detections come from any model that it supports; here they are
rectangles, so that the example runs by itself.
"""

import sys

import numpy as np
import supervision as sv
from PIL import Image

import trace_fast


def detect(image: np.ndarray) -> sv.Detections:
    """Return the left and the right half of an image, in place of a model's results."""
    masks = np.zeros((2, *image.shape[:2]), bool)
    middle = image.shape[1] // 2
    masks[0, :, :middle], masks[1, :, middle:] = True, True
    return sv.Detections(sv.mask_to_xyxy(masks).astype(np.float32), masks, class_id=np.array([0, 1]))


def main(photo: str, picture: str) -> None:
    """Draw the detections, refined: boxes, classes, tracks and further data follow their masks."""
    image = np.array(Image.open(photo).convert("RGB"))
    model = trace_fast.load("mini")
    detections = trace_fast.propagate(detect(image), model(image))
    Image.fromarray(sv.MaskAnnotator().annotate(image.copy(), detections)).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
