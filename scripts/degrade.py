"""Write masks with known faults and edges without any, to measure boundary-guided propagation apart from edges.

    python scripts/degrade.py --data ../shared/data/dev_coco -o build/degraded
    trace-fast evaluate --data ../shared/data/dev_coco --table backbones --mode flood --threshold 0.5 \
        --baseline build/degraded/degraded.json \
        --method oracle=lines:build/degraded/oracle --method canny ... -o build/propagation

Instances that touch become one mask; every other instance of at least 200 pixels is cut in two along a random line, a
strip of 16 % of its width left out. `degraded.json` has the masks, `oracle/` the contours of the truth as edge maps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from trace_fast.evaluation import Photo, open_dataset
from trace_fast.masks.export import write_coco_results

SMALLEST, STRIP = 200, 0.08  # pixels; of the root of the area, either side of the cut


def group_touching(masks: np.ndarray) -> list[list[int]]:
    """Return the groups of masks (M, H, W) that touch, directly or through others."""
    labels = np.zeros(masks.shape[1:], int)
    for number, mask in enumerate(masks, 1):
        labels[mask] = number
    groups = {number: {number} for number in range(1, len(masks) + 1)}
    for one, other in ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])):
        pair = (one != other) & (one > 0) & (other > 0)
        for a, b in set(zip(one[pair].tolist(), other[pair].tolist(), strict=True)):
            if groups[a] is not groups[b]:
                groups[a] |= groups[b]
                for member in groups[b]:
                    groups[member] = groups[a]
    return [list(group) for group in sorted({tuple(sorted(group)) for group in groups.values()})]


def degrade(masks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Merge masks (M, H, W) where they touch, and cut the others."""
    degraded = []
    rows, columns = np.mgrid[: masks.shape[1], : masks.shape[2]]
    for group in group_touching(masks):
        mask = masks[[number - 1 for number in group]].any(0)
        area = int(mask.sum())
        if len(group) > 1 or area < SMALLEST:
            degraded.append(mask)
            continue
        y, x = np.argwhere(mask)[generator.integers(area)]
        angle = generator.uniform(0, np.pi)
        side = (rows - y) * np.sin(angle) + (columns - x) * np.cos(angle)
        parts = [mask & (sign * side > STRIP * area**0.5) for sign in (1, -1)]
        degraded += [part for part in parts if part.any()]
    return np.stack(degraded)


def write_oracle(photo: Photo, folder: Path) -> None:
    """Write the contours of a photo as an edge map."""
    lines = photo.contours().lines.any(0)
    Image.fromarray(lines.astype(np.uint8) * 255).save(folder / f"{photo.name}.png")


def main() -> None:
    """Write the masks and the edges of every photo that has instances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (options.output / "oracle").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(options.seed)
    photos = open_dataset(options.data).photos

    def results() -> Iterator[tuple[int, np.ndarray, None]]:
        for photo in tqdm(photos, disable=None):
            assert photo.instances is not None
            truth = photo.instances()
            masks = truth.masks()[[not instance.iscrowd for instance in truth.instances]]
            write_oracle(photo, options.output / "oracle")
            if len(masks):
                yield truth.id, degrade(masks, generator), None

    write_coco_results(options.output / "degraded.json", results())


if __name__ == "__main__":
    main()
