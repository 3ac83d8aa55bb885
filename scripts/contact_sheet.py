"""Lay photographs, the edges of several methods and the truth side by side, for photographs that nobody chose.

    python scripts/contact_sheet.py --data ../shared/data/dev_coco --count 24 \
        --method PiDiNet=maps:../shared/data/dev_coco/pidinet --method mini -o build/sheet.png

Every k-th photograph by name is taken, so that the sheet shows what a method does on ordinary ones. Methods are those
of `trace-fast evaluate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter
from tqdm import tqdm

from trace_fast.evaluation import open_dataset, open_method
from trace_fast.io import visualize

ROW = 150  # height of a photograph, in pixels


def make_sheet(data: Path, specs: list[str], count: int, columns: int) -> Image.Image:
    """Return the sheet, in columns of photographs, each with the edges of every method and the truth beside it."""
    photos = [photo for photo in open_dataset(data).photos if photo.image is not None]
    chosen = photos[:: max(1, len(photos) // count)][:count]
    methods = [open_method(spec) for spec in specs]
    titles = ["photograph", *(method.name for method in methods), "truth"]
    rows: list[Image.Image] = []
    for photo in tqdm(chosen, unit="photo"):
        truth = photo.contours().lines.any(0).astype(np.float32)
        truth = maximum_filter(truth, 3)  # lines of one pixel would fade when they are made smaller
        pictures = [photo.image, *(method.edges(photo) for method in methods), truth]
        rows.append(visualize.panel(pictures, titles if len(rows) < columns else [""] * len(titles), height=ROW))
    return visualize.grid(rows, columns)


def main() -> None:
    """Parse the command line and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="The data set, as for `trace-fast evaluate`.")
    parser.add_argument("--method", action="append", required=True, help="A method of edges; may be repeated.")
    parser.add_argument("--count", type=int, default=24, help="The number of photographs.")
    parser.add_argument("--columns", type=int, default=2, help="The number of photographs side by side.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="The picture to write.")
    options = parser.parse_args()
    visualize.write_picture(options.output, make_sheet(options.data, options.method, options.count, options.columns))


if __name__ == "__main__":
    main()
