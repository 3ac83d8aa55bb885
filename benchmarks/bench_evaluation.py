"""Scoring edges: counts of 20 photographs at 99 thresholds, beside a plain implementation on scipy and scikit-image.

The photographs are PiDiNet's maps of `../shared/data/dev_coco`; both start from the same ridges and the same contours.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from skimage import morphology

from trace_fast import ops
from trace_fast.evaluation import open_dataset, read_map
from trace_fast.evaluation.edges import DISTANCE, THRESHOLDS

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "dev_coco"
PHOTOS = 20


@functools.cache
def inputs():
    """Ridges (H, W) float32, contours (1, H, W) bool and the largest distance in pixels of each photograph."""
    photos = open_dataset(DATA).photos[:PHOTOS]
    maps = [torch.from_numpy(read_map(DATA / "pidinet" / f"{photo.name}.png")) for photo in photos]
    contours = [torch.from_numpy(photo.contours().lines) for photo in photos]
    ridges = [ops.suppress_nonmaxima(edges[None])[0] for edges in maps]
    return [(r, c, DISTANCE * float(np.hypot(*r.shape))) for r, c in zip(ridges, contours, strict=True)]


@functools.cache
def count_plainly():
    """Return matched and detected pixels (photographs, T, 2), by libraries; computed once."""
    rows = []
    for ridges, contours, distance in inputs():
        truth = cKDTree(np.argwhere(contours[0].numpy()))
        for threshold in THRESHOLDS:
            detected = np.argwhere(morphology.thin(ridges.numpy() >= np.float32(threshold)))
            if not len(detected):
                rows.append((0, 0))
                continue
            # pairs at distance 0 are kept as such
            near = truth.sparse_distance_matrix(cKDTree(detected), distance, output_type="coo_matrix")
            near.data[:] = 1
            rows.append((int((maximum_bipartite_matching(near.tocsr(), perm_type="column") >= 0).sum()), len(detected)))
    return np.array(rows).reshape(PHOTOS, -1, 2)


def count_natively():
    """Count with the native implementation, likewise."""
    counts = [ops.count_matches(ridges, lines, THRESHOLDS, distance)[0] for ridges, lines, distance in inputs()]
    return torch.stack(counts).numpy()[:, :, [2, 3]]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the photographs of {DATA}")
@pytest.mark.parametrize("provider", ["scipy and scikit-image", "native"])
def bench_count_matches(provider, measure):
    inputs()
    call = count_natively if provider == "native" else count_plainly
    measure(f"scoring the edges of {PHOTOS} photographs", provider, call, once=provider != "native")
    # minutes, so that what was timed is what is compared
    np.testing.assert_array_equal(count_natively(), count_plainly())
