"""Measure what edges do to masks: four sets of masks with known faults, before and after `trace_fast.propagate`.

    python scripts/propagation.py --data ../shared/data/dev_coco --method truth --method mini \
        --method PiDiNet=maps:../shared/data/dev_coco/pidinet=0.5 --method canny --method none -o build/propagation

The sets are `united`, all true masks of a photograph as one; `grid`, true masks on a grid of 16 pixels, as networks of
such tokens draw them; `felzenszwalb`, regions of color; `saliency`, the photograph's spectral residual. A method is one
of `trace-fast evaluate`, with the threshold of mode "flood" behind another =; or truth, the contours of the annotators;
or none. Masks are kept, one file a photograph: interrupt and repeat the command at any time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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
FLOOD = {"truth": 0.5, "none": 0.5, "mini": 0.44, "canny": 0.5}  # thresholds of mode "flood"
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


def open_source(text: str) -> tuple[str, Callable[[Photo], np.ndarray], float]:
    """Return the name of a method, its edges and its threshold for mode "flood"."""
    if text == "truth":
        return text, lambda photo: photo.contours().lines.any(0).astype(np.float32), FLOOD[text]
    if text == "none":
        return text, lambda photo: np.zeros(photo.contours().ignored.shape, np.float32), FLOOD[text]
    spec, _, threshold = (text, "", FLOOD[text]) if text in FLOOD else text.rpartition("=")
    method = open_method(spec)
    return method.name, method.edges, float(threshold)


def measure(photo: Photo, sources: Sequence[tuple[str, Callable[[Photo], np.ndarray], float]]) -> dict[str, list]:
    """Return the masks of a photograph, before and after, by "set, method, mode", as RLE and scores."""
    assert photo.instances is not None
    truth = photo.instances()
    masks = truth.masks()[[not instance.iscrowd for instance in truth.instances]]
    if not len(masks):
        return {}
    edges = {name: (find(photo), threshold) for name, find, threshold in sources}
    results = {}
    for name, before in make_sets(photo, masks).items():
        results[f"{name}, before, "] = before
        for method, (strength, threshold) in edges.items():
            results[f"{name}, {method}, fit"] = trace_fast.propagate(before, strength)
            options = {"threshold": threshold, "mode": "flood"}
            results[f"{name}, {method}, flood"] = trace_fast.propagate(before, strength, **options)
    encoded = {key: coco.encode_masks(entry.masks.numpy(), entry.scores.numpy()) for key, entry in results.items()}
    return {
        key: [(mask.counts.decode(), mask.area, mask.score) for mask in image.instances]
        for key, image in encoded.items()
    }


def read_masks(photo: Photo, image: coco.ImageInstances, entries: list) -> coco.ImageInstances:
    """Return masks that `measure` has encoded."""
    instances = [coco.Instance(counts.encode(), 1, area, False, score) for counts, area, score in entries]
    return coco.ImageInstances(image.id, image.height, image.width, photo.name, instances)


def write_row(name: str, scores: MaskScores, changes: dict[str, tuple[float, float, float]] | None) -> str:
    """Return a row of the table; changes come with their intervals."""
    cells = [name]
    for figure in ("ap", "ar100"):
        cells.append(f"{getattr(scores, figure):.3f}")
        cells.append("" if changes is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*changes[figure]))
    return f"| {' | '.join(cells)} |"


def add_photo_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `list_photos`."""
    parser.add_argument("--data", type=Path, required=True, help="The data set, as for `trace-fast evaluate`.")
    parser.add_argument("--first", type=int, default=0, help="The first photograph, by name.")
    parser.add_argument("--every", type=int, default=1, help="Steps between photographs.")


def list_photos(options: argparse.Namespace) -> Iterable[Photo]:
    """Return the photographs that the options choose, with progress."""
    return tqdm(open_dataset(options.data).photos[options.first :: options.every], unit="photo", disable=None)


def main() -> None:
    """Measure every photograph that is not measured yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_photo_options(parser)
    parser.add_argument("--method", action="append", required=True, metavar="[NAME=]SPEC[=THRESHOLD]")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sources = [open_source(text) for text in options.method]
    truth, results = {}, {}
    for photo in list_photos(options):
        file = options.output / f"{photo.name}.json"
        if not file.exists():
            content = json.dumps(measure(photo, sources))
            with write_atomically(file, "propagation") as out:
                out.write(content.encode())
        assert photo.instances is not None
        image = photo.instances()
        for key, entries in json.loads(file.read_bytes()).items():
            truth[image.id] = image
            results.setdefault(key, {})[image.id] = read_masks(photo, image, entries)
    instances = coco.Instances(truth, {})
    lines = ["| masks | AP | change | AR100 | change |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in SETS:
        before = coco.Instances(results[f"{name}, before, "], {})
        lines.append(write_row(name, mask_ap(instances, before), None))
        for key in (key for key in results if key.startswith(f"{name}, ") and ", before" not in key):
            after = coco.Instances(results[key], {})
            lines.append(write_row(key, mask_ap(instances, after), compare_masks(instances, before, after)))
    text = "\n".join([*lines, "", f"{len(truth)} photographs."])
    (options.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
