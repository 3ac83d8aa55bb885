"""Measure what each choice of a student is worth: score students side by side, and paired differences to the first.

    python scripts/ablations.py --data ../shared/data/dev_coco --method now=mini --method before=build/before \
        --method PiDiNet=maps:../shared/data/dev_coco/pidinet --blank now=mini -o build/ablations

Methods are those of `trace-fast evaluate`. With --blank a student is scored as its decoder sees photographs without
attention. Choices are made on every fifth photograph, the default; --rest scores all others. An interrupted run
continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from quality import provenance

from trace_fast import Detector
from trace_fast.evaluation import Method, Photo, Report, open_dataset, open_method, run, score_edges
from trace_fast.evaluation.methods import split_name
from trace_fast.io.images import read_image, resize

EVERY = 5


def make_blank_method(spec: str) -> Method:
    """Return a student, NAME=SPEC, whose decoder sees photographs without attention."""
    name, folder = split_name(spec)
    detector = Detector.from_pretrained(folder, device="cpu")

    def find(photo: Photo) -> np.ndarray:
        assert photo.image is not None
        pixels = read_image(photo.image)
        height, width = pixels.shape[-2:]
        photo_size = detector.decoder.photo_size((height, width), detector.size)
        with torch.no_grad():
            logits = detector.decoder(None, resize(pixels, photo_size))
        return resize(logits, (height, width)).sigmoid()[0, 0].numpy()

    identity = f"{open_method(spec, device='cpu').identity} blank"
    return Method(f"{name}, attention blanked", identity, find, threads=False)


def main() -> None:
    """Score, and write ablations.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="The photographs with instances.")
    add("--method", action="append", required=True, help="A source of edges, [NAME=]SPEC; may be repeated.")
    add("--blank", action="append", default=[], help="A student to score without attention, NAME=SPEC.")
    add("--rest", action="store_true", help="Score the photographs on which no choice was made.")
    add("-o", "--output", type=Path, required=True, help="The folder of the counts and of ablations.json.")
    options = parser.parse_args()
    methods = [open_method(spec, device="cpu") for spec in options.method] + list(map(make_blank_method, options.blank))
    photos = [
        photo for index, photo in enumerate(open_dataset(options.data).photos) if bool(index % EVERY) == options.rest
    ]
    photos = run.check_photos(photos, methods)[0]
    scores = {method.name: score_edges(run.count_all(photos, method, options.output / "counts")) for method in methods}
    report = Report(scores, photos=photos, methods=methods)
    print(report)
    result = provenance() | {
        "command": shlex.join(["python", "scripts/ablations.py", *sys.argv[1:]]),
        "photos": len(photos),
        "methods": {name: entry.to_dict() for name, entry in scores.items()},
        "differences": report.compare(),
    }
    name = "ablations-rest.json" if options.rest else "ablations.json"
    (options.output / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
