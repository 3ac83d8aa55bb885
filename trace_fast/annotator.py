"""A detector in the form of ControlNet's annotators, as diffusers and controlnet_aux call them."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch

from trace_fast.api import load
from trace_fast.detector import Detector
from trace_fast.ops import checks

__all__ = ["ControlNetAnnotator"]


class ControlNetAnnotator:
    """Make pictures of instance edges, called as the annotators of controlnet_aux are.

    Edges are white on black in three channels, which diffusers' ControlNet pipelines take as they are.

    Args:
        model: what `trace_fast.load` takes, with a student; a `Detector` is used as it is.
        options: further arguments of `trace_fast.load`, such as `device`.

    Raises:
        TypeError, ValueError, RuntimeError: see `trace_fast.load`.

    Example:
        >>> annotator = ControlNetAnnotator("mini", device="cpu")
        >>> annotator(np.zeros((48, 64, 3), np.uint8), image_resolution=128).size
        (192, 128)
    """

    def __init__(self, model: Any = "mini", **options: Any):
        detector: Any = load(model, stage=2, **options)
        self.detector: Detector = detector

    @classmethod
    def from_pretrained(cls, model: Any = "mini", **options: Any) -> Self:
        """Load a student, as the class itself does; controlnet_aux calls its annotators so.

        Args:
            model: see `ControlNetAnnotator`.
            options: see `ControlNetAnnotator`.
        """
        return cls(model, **options)

    def to(self, device: torch.device | str) -> Self:
        """Move the detector to a device, in place, and return the annotator.

        Args:
            device: where to run from now on.

        Raises:
            TypeError, ValueError, RuntimeError: see `Detector.to`.
        """
        self.detector.to(device)
        return self

    def __call__(
        self,
        input_image: Any,
        detect_resolution: int = 512,
        image_resolution: int = 512,
        output_type: str = "pil",
        **ignored: Any,
    ) -> Any:
        """Return the picture of the edges of one image.

        Args:
            input_image: a PIL image, a path, an (H, W) or (H, W, C) array or a (C, H, W) tensor, as in
                `trace_fast.edges`. The color channels of arrays and tensors are in the order of the detector's
                `channel_order`, RGB unless it was loaded with another.
            detect_resolution: shorter side in pixels that the image is resized to before the detector sees it. This
                and `image_resolution` keep the aspect ratio up to the rounding of both sides to multiples of 64.
            image_resolution: shorter side of the result in pixels.
            output_type: "pil" or "np".
            ignored: options of other annotators, such as `safe` and `scribble`, which have no effect.

        Returns:
            A PIL image of mode RGB, or an (H, W, 3) uint8 array; 255 is an edge of probability 1.

        Raises:
            TypeError: the image is of a kind or dtype that is not listed, or a resolution is not an integer.
            ValueError: output_type or a resolution is not what is said above, the image is a batch, or its shape or
                values are not usable.
        """
        checks.choice("edges", "output_type", output_type, "pil", "np")
        picture = self.detector(input_image, detect_resolution, image_resolution, "pil")
        if isinstance(picture, list):
            if len(picture) != 1:
                raise ValueError(f"edges: image must be one image, got {len(picture)}")
            picture = picture[0]
        picture = picture.convert("RGB")
        return picture if output_type == "pil" else np.array(picture)
