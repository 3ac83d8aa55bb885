"""Measure what edges do to masks: four sets of masks with known faults, before and after `trace_fast.propagate`.

    python scripts/propagation.py --data ../shared/data/dev_coco --method truth=0.5 --method mini \
        --method PiDiNet=maps:../shared/data/dev_coco/pidinet --method canny --method none -o build/propagation

The sets are `united`, all true masks of a photograph as one; `grid`, true masks on a grid of 16 pixels, as networks of
such tokens draw them; `felzenszwalb`, regions of color; `saliency`, the photograph's spectral residual. A method is one
of `trace-fast evaluate`; or truth, the contours of the annotators; or none. With a threshold behind another =, mode
"flood" is measured, too. Masks are kept, one file a photograph: interrupt the command at any time, and repeat it with
these or other methods.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import felzenszwalb
from torch.nn import functional
from tqdm import tqdm

import trace_fast
from trace_fast.evaluation import MaskScores, Photo, mask_ap, open_dataset, open_method
from trace_fast.evaluation.masks import compare_masks
from trace_fast.io.files import write_atomically
from trace_fast.io.images import read_image
from trace_fast.masks import MaskSet, coco
from trace_fast.masks.propagation import MIN_SHARE

TOKEN = 16  # pixels
SALIENT = 3  # times the mean saliency
SETS = ("united", "grid", "felzenszwalb", "saliency")


def draw_on_grid(masks: np.ndarray) -> np.ndarray:
    """Return masks (M, H, W) as tokens draw them that they cover by half; masks without a token are left out."""
    grid = [max(1, round(side / TOKEN)) for side in masks.shape[1:]]
    tokens = functional.adaptive_avg_pool2d(torch.from_numpy(masks).float(), grid) > 0.5
    drawn = functional.interpolate(tokens[None].float(), masks.shape[1:])[0].numpy() > 0
    return drawn[drawn.any((1, 2))]


def find_salient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return regions of an image (3, H, W) with a large spectral residual (Hou and Zhang), and their means."""
    size = image.shape[1:]
    small = functional.interpolate(torch.from_numpy(image.mean(0))[None, None], (64, 64), mode="area")[0, 0].numpy()
    spectrum = np.fft.fft2(small)
    logarithm = np.log(np.abs(spectrum) + 1e-9)
    residual = logarithm - ndimage.uniform_filter(logarithm, 3, mode="wrap")
    saliency = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    saliency = torch.from_numpy(ndimage.gaussian_filter(saliency, 2.5))[None, None]
    saliency = functional.interpolate(saliency, size, mode="bilinear")[0, 0].numpy()
    labels, count = ndimage.label(saliency > SALIENT * saliency.mean())
    masks = labels == np.arange(1, count + 1)[:, None, None]
    masks = masks[masks.sum((1, 2)) >= MIN_SHARE * labels.size]
    return masks, np.array([saliency[mask].mean() for mask in masks])


def make_sets(photo: Photo, truth: np.ndarray) -> dict[str, MaskSet]:
    """Return the masks of each set for a photograph and its true masks (M, H, W), M at least 1."""
    assert photo.image is not None
    image = read_image(photo.image)[0].numpy()
    regions = find_regions(image.transpose(1, 2, 0))
    salient, scores = find_salient(image)
    sets = {
        "united": truth.any(0)[None],
        "grid": draw_on_grid(truth),
        "felzenszwalb": regions == np.arange(regions.max() + 1)[:, None, None],
    }
    masks = {name: MaskSet(torch.from_numpy(stack), torch.ones(len(stack))) for name, stack in sets.items()}
    return masks | {"saliency": MaskSet(torch.from_numpy(salient), torch.from_numpy(scores).float())}


def find_regions(image: np.ndarray) -> np.ndarray:
    """Return Felzenszwalb's regions of color, (H, W) from 0, of an image (H, W, 3) in [0, 1]."""
    least = max(20, round(MIN_SHARE * image[..., 0].size))
    return felzenszwalb(image, scale=300, sigma=0.8, min_size=least)


@dataclass(frozen=True)
class Source:
    """A source of edges; `threshold` is the one of mode "flood", or None if that is not measured."""

    name: str
    edges: Callable[[Photo], np.ndarray]
    threshold: float | None

    def options(self) -> dict[str, dict[str, Any]]:
        """Return the options of `trace_fast.propagate` by the name of the row."""
        flood = {} if self.threshold is None else {"flood": {"mode": "flood", "threshold": self.threshold}}
        return {f"{self.name}, {mode}": options for mode, options in ({"fit": {}} | flood).items()}


def open_source(text: str) -> Source:
    """Open a source of edges, [NAME=]SPEC[=THRESHOLD]."""
    spec, _, end = text.rpartition("=")
    try:
        threshold = float(end)
    except ValueError:
        spec, threshold = text, None
    if spec == "truth":
        return Source(spec, lambda photo: photo.contours().lines.any(0).astype(np.float32), threshold)
    if spec == "none":
        return Source(spec, lambda photo: np.zeros(photo.contours().ignored.shape, np.float32), threshold)
    method = open_method(spec)
    return Source(method.name, method.edges, threshold)


def encode(masks: MaskSet) -> list[tuple[str, int, float]]:
    """Return each mask as RLE, its area and its score."""
    image = coco.encode_masks(masks.masks.numpy(), masks.scores.numpy())
    return [(mask.counts.decode(), mask.area, mask.score) for mask in image.instances]


def measure(photo: Photo, image: coco.ImageInstances, known: dict[str, Any], sources: Sequence[Source]) -> None:
    """Add to the encoded masks of a photograph, by "set, source, mode", those that are missing."""
    if not known:
        masks = image.masks()[[not instance.iscrowd for instance in image.instances]]
        known |= {f"{name}, before": encode(before) for name, before in make_sets(photo, masks).items()}
    sets = {}
    for source in sources:
        missing = [row for row in source.options() if f"{SETS[0]}, {row}" not in known]
        if not missing:
            continue
        if not sets:
            encoded = {name: decode(photo, image, known[f"{name}, before"]) for name in SETS}
            scores = {name: [mask.score for mask in masks.instances] for name, masks in encoded.items()}
            sets = {
                name: MaskSet(torch.from_numpy(masks.masks()), torch.tensor(scores[name], dtype=torch.float32))
                for name, masks in encoded.items()
            }
        edges = source.edges(photo)
        for row in missing:
            for name, before in sets.items():
                known[f"{name}, {row}"] = encode(trace_fast.propagate(before, edges, **source.options()[row]))


def decode(photo: Photo, image: coco.ImageInstances, entries: list) -> coco.ImageInstances:
    """Return masks that `encode` has encoded."""
    instances = [coco.Instance(counts.encode(), 1, area, False, score) for counts, area, score in entries]
    return coco.ImageInstances(image.id, image.height, image.width, photo.name, instances)


def write_row(name: str, scores: MaskScores, changes: dict[str, tuple[float, float, float]] | None) -> str:
    """Return a row of the table; changes come with their intervals."""
    cells = [name]
    for figure in ("ap", "ar100"):
        cells.append(f"{getattr(scores, figure):.3f}")
        cells.append("" if changes is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*changes[figure]))
    return f"| {' | '.join(cells)} |"


def parse_options(description: str | None) -> tuple[argparse.Namespace, list[Source]]:
    """Return the options of `collect`, and the sources of edges, of a command with this description."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="The data set, as for `trace-fast evaluate`.")
    parser.add_argument("--first", type=int, default=0, help="The first photograph, by name.")
    parser.add_argument("--every", type=int, default=1, help="Steps between photographs.")
    parser.add_argument("--rest", action="store_true", help="Take all the others instead.")
    parser.add_argument("--method", action="append", required=True, metavar="[NAME=]SPEC[=THRESHOLD]")
    parser.add_argument("-o", "--output", type=Path, required=True, help="The folder of masks.")
    options = parser.parse_args()
    return options, [open_source(text) for text in options.method]


def list_photos(options: argparse.Namespace) -> Iterable[Photo]:
    """Return the photographs that the options choose, with progress."""
    photos = open_dataset(options.data).photos
    chosen = range(options.first, len(photos), options.every)
    photos = [photo for index, photo in enumerate(photos) if (index in chosen) != options.rest]
    return tqdm(photos, unit="photo", disable=None)


def collect(
    options: argparse.Namespace, measure: Callable[[Photo, coco.ImageInstances, dict[str, Any]], None]
) -> tuple[coco.Instances, dict[str, coco.Instances]]:
    """Return the true masks of photographs, and the masks that `measure` adds for each one, by the name of a row.

    They are kept, one file a photograph. A photograph without an object is left out.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    truth: dict[int, coco.ImageInstances] = {}
    rows: dict[str, dict[int, coco.ImageInstances]] = {}
    for photo in list_photos(options):
        assert photo.instances is not None
        image = photo.instances()
        if all(instance.iscrowd for instance in image.instances):
            continue
        file = options.output / f"{photo.name}.json"
        masks = json.loads(file.read_bytes()) if file.exists() else {}
        count = len(masks)
        measure(photo, image, masks)
        if len(masks) > count:
            with write_atomically(file, "masks") as out:
                out.write(json.dumps(masks).encode())
        truth[image.id] = image
        for name, entries in masks.items():
            rows.setdefault(name, {})[image.id] = decode(photo, image, entries)
    return coco.Instances(truth, {}), {name: coco.Instances(images, {}) for name, images in rows.items()}


def main() -> None:
    """Measure what is not measured yet, and write the table."""
    options, sources = parse_options(__doc__)
    instances, results = collect(options, lambda *photo: measure(*photo, sources))
    lines = ["| masks | AP | change | AR100 | change |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in SETS:
        before = results[f"{name}, before"]
        lines.append(write_row(f"{name}, before", mask_ap(instances, before), None))
        for row in (row for source in sources for row in source.options()):
            after = results[f"{name}, {row}"]
            changes = compare_masks(instances, before, after)
            lines.append(write_row(f"{name}, {row}", mask_ap(instances, after), changes))
    print("\n".join(lines), f"{len(instances.images)} photographs.", sep="\n\n")


if __name__ == "__main__":
    main()
