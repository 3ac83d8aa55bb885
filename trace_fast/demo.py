"""Results of sample photographs: edges, masks, and the KL curve of the search."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trace_fast.detector import Detector
from trace_fast.extras import require
from trace_fast.io import visualize
from trace_fast.masks.propagation import instances
from trace_fast.tracer import Tracer

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PHOTOS", "run"]

PHOTOS = ("coffee", "chelsea", "rocket", "stereo_motorcycle", "astronaut", "camera")  # scikit-image carries them
TITLES = ("photograph", "edges", "masks", "overlay")
COLUMNS = 2  # of the picture of all


def run(output: Path) -> Path:
    """Write the edges and masks of sample photographs by the student, and the KL curves of the search.

    Args:
        output: folder, created where it is missing.

    Returns:
        The picture of all photographs and their results, which the README shows.

    Raises:
        RuntimeError: a package is not installed.

    Example:
        >>> run(Path("demo")).name
        'grid.jpg'
    """
    require("demo", "skimage", "matplotlib")
    from skimage import data

    output.mkdir(parents=True, exist_ok=True)
    tracer, detector = Tracer.from_pretrained("mini"), Detector.from_pretrained("mini")
    rows: list[Image.Image] = []
    for name in PHOTOS:
        photo = getattr(data, name)()
        photo = np.asarray(photo[0] if isinstance(photo, tuple) else photo)  # the left one of a stereo pair
        started = time.perf_counter()
        edges = detector(photo)
        seconds = time.perf_counter() - started
        traced = tracer(photo, return_kl=True)
        visualize.write_png(output / f"{name}.png", edges)
        masks, _ = instances(edges, threshold=detector.region_threshold)
        pictures = [photo, edges, visualize.draw_masks(photo, masks), visualize.overlay(photo, edges)]
        visualize.write_picture(output / f"{name}_panel.png", visualize.panel(pictures, TITLES, height=320))
        titles = TITLES if len(rows) < COLUMNS else [""] * len(TITLES)
        rows.append(visualize.panel(pictures, titles, height=150))
        visualize.plot_curve(traced, output / f"{name}_curve.png")
        height, width = photo.shape[:2]
        assert traced.kl is not None
        peak = traced.timesteps[1:][traced.kl[0].argmax()]
        print(
            f"{name}: {width} x {height} pixels, edges in {seconds:.2f} s, KL curve peaks at timestep {peak} -> "
            f"{output / f'{name}_panel.png'}"
        )
    visualize.write_picture(output / "grid.jpg", visualize.grid(rows, COLUMNS))
    return output / "grid.jpg"
