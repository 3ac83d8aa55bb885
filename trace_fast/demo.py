"""The first thing a newcomer runs: instance edges of a photograph, and how they were found."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from trace_fast.detector import Detector
from trace_fast.io import visualize
from trace_fast.tracer import Tracer

__all__ = ["PHOTOGRAPHS", "run"]

PHOTOGRAPHS = ("coffee", "chelsea", "astronaut")  # what scikit-image carries inside its package


def run(output: Path) -> Path:
    """Find the edges of the photographs that scikit-image carries, in one step; plot the KL curve of the search.

    Args:
        output: folder, made where it is missing.

    Returns:
        The panel of the first photograph.

    Raises:
        RuntimeError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise RuntimeError("demo: scikit-image must be installed: pip install scikit-image") from None
    output.mkdir(parents=True, exist_ok=True)
    tracer, detector = Tracer.from_pretrained("mini"), Detector.from_pretrained("mini")
    for name in PHOTOGRAPHS:
        photograph: np.ndarray = getattr(data, name)()
        started = time.perf_counter()
        edges = detector(photograph)
        seconds = time.perf_counter() - started
        result = tracer(photograph, return_kl=True)
        visualize.write_png(output / f"{name}.png", edges)
        pictures = [photograph, edges, visualize.overlay(photograph, edges)]
        panel = visualize.panel(pictures, ["photograph", "edges", "overlay"], height=320)
        visualize.write_picture(output / f"{name}_panel.png", panel)
        visualize.plot_curve(result, output / f"{name}_curve.png")
        height, width = photograph.shape[:2]
        assert result.kl is not None
        peak = result.timesteps[1:][result.kl[0].argmax()]
        print(
            f"{name}: {width} x {height} pixels, edges in {seconds:.2f} s, KL curve peaks at level {peak} -> "
            f"{output / f'{name}_panel.png'}"
        )
    return output / f"{PHOTOGRAPHS[0]}_panel.png"
