"""Measure each choice of the distillation: students of the embedded model, one choice changed at a time.

    python scripts/ablations.py --images PHOTOGRAPHS --data ../shared/data/dev_coco -o build/ablations

All students are trained on the same number of photographs for the same number of steps, and scored by the functions of
`trace-fast evaluate` beside their teachers. One control is a student whose decoder reads the photograph and no
attention; another, without a model, is the color gradient of the photograph at the size of the labels. The embedded
student is scored as it is and with its attention set to zero. In rows "L2" the squared distance of attention rows
takes the place of their divergence, scaled to the same mean (as in the paper's comparison of KL and L2). An
interrupted run continues where it stopped: finished shards, students and counts stay.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from quality import provenance
from scipy.ndimage import gaussian_filter
from torch import Tensor

from trace_fast import Detector, Tracer, decoder, ops
from trace_fast.evaluation import Method, Report, open_dataset, open_method, run, score_edges
from trace_fast.io.images import read_image, resize
from trace_fast.training.distillation import DistillConfig, distill
from trace_fast.training.labels import make_labels

SMALL, LARGE = (128, 128), (256, 256)  # input sizes of teachers, in pixels; students have the small one
LABEL_SIZE = (256, 256)  # in pixels, that of the decoder's logits
BASE: dict[str, Any] = {
    "teacher_size": LARGE,
    "teacher_timestep": 0,
    "decoder": "pixels",
    "labels": "sharpened",
    "rate": 3e-4,
    "decoder_rate": 4e-3,
    "batch": 4,
    "warmup": 20,
    "dtype": "bfloat16",
}
STUDENTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "binarized labels": {"labels": "binarized"},
    "soft labels, not sharpened": {"labels": "soft"},
    "ternary labels": {"labels": "ternary"},
    "binary labels": {"labels": "binary"},
    "no reconstruction": {"reconstruction": 0.0},
    "the paper's decoder, soft labels": {"decoder": "conv", "decoder_rate": 1e-2, "labels": "soft"},
    "no adapters": {"rate": 0.0},
    "no attention (control)": {"rate": 0.0, "blind": True},
    "teacher at 128 pixels": {"teacher_size": SMALL},
    "teacher at 128 pixels, t*": {"teacher_size": SMALL, "teacher_timestep": "iep"},
    "teacher at 128 pixels, L2": {"teacher_size": SMALL, "distance": True},
}
divergence = ops.abdiv


def squared_distance(attention: Tensor, height: int, width: int) -> Tensor:
    """Return ABDiv with the squared distance of rows in place of their divergence, and its mean: (B, h, w)."""
    maps = attention.unflatten(1, (height, width))
    rows, columns = torch.arange(height), torch.arange(width)
    down = maps[:, (rows + 1).clamp(max=height - 1)] - maps[:, (rows - 1).clamp(min=0)]
    across = maps[:, :, (columns + 1).clamp(max=width - 1)] - maps[:, :, (columns - 1).clamp(min=0)]
    distance = (down**2).sum(-1) + (across**2).sum(-1)
    return distance * (divergence(attention, height, width).mean((1, 2)) / distance.mean((1, 2)))[:, None, None]


def train(config: DistillConfig, *, blind: bool, distance: bool) -> Path:
    """Train a student; return its folder. Blind ones read zeros for attention; `distance`: the search measures L2."""
    with mock.patch.object(ops, "abdiv", squared_distance if distance else divergence):
        if not blind:
            return distill(config)
        with mock.patch.object(decoder.AttentionReadout, "result", blank_result):
            return distill(config)


def blank_result(readout: decoder.AttentionReadout) -> Tensor:
    """Return zeros in place of the readout."""
    return 0 * get_result(readout)


get_result = decoder.AttentionReadout.result


def make_student_method(name: str, folder: Path | str, *, blind: bool) -> Method:
    """Return a student as a method of the evaluation; a blind one reads zeros for attention."""
    method = open_method(f"{name}={folder}", device="cpu")
    if not blind:
        return method
    detector = Detector.from_pretrained(folder, device="cpu")

    def find(photo: Any) -> Any:
        with mock.patch.object(decoder.AttentionReadout, "result", blank_result):
            return detector.edges(read_image(photo.image))[0, 0].numpy()

    return replace(method, edges=find, identity=f"{method.identity} blind")


def make_teacher_method(
    size: tuple[int, int], timestep: str | int, *, distance: bool = False, sharpened: bool = False
) -> Method:
    """Return the embedded model's search at a size; if `sharpened`, as labels are."""
    tracer = Tracer.from_pretrained("mini", device="cpu", size=size)
    name = f"teacher at {size[0]} pixels, {'t*' if timestep == 'iep' else f'timestep {timestep}'}"
    name += ", L2" * distance + ", sharpened" * sharpened

    def find(photo: Any) -> Any:
        with mock.patch.object(ops, "abdiv", squared_distance if distance else divergence):
            if not sharpened:
                return tracer(photo.image, timestep=timestep).edges[0, 0].numpy()
            whole = read_image(photo.image)
            small = resize(whole, LABEL_SIZE)
            abdiv = tracer(small, timestep=timestep, return_abdiv=True).abdiv
            label, _ = make_labels(abdiv, LABEL_SIZE, small, "sharpened", 0.0, tracer.backbone.settings.edge_scale)
            return resize(label, tuple(whole.shape[-2:]))[0, 0].numpy()

    return Method(
        name, f"{name} {LABEL_SIZE} {tracer.backbone.settings}", find, lambda photo: photo.image, threads=False
    )


def make_gradient_method() -> Method:
    """Return the control without a model: length of the color gradient, smoothed by one pixel, at the labels' size."""

    def find(photo: Any) -> Any:
        whole = read_image(photo.image)
        smooth = gaussian_filter(resize(whole, LABEL_SIZE)[0].numpy(), (0, 1, 1))
        length = np.square(np.gradient(smooth, axis=(1, 2))).sum((0, 1)) ** 0.25  # a square root spreads it
        return resize(torch.from_numpy(length)[None, None], tuple(whole.shape[-2:]))[0, 0].clamp(0, 1).numpy()

    name = f"color gradient at {LABEL_SIZE[0]} pixels (control)"
    return Method(name, name, find, lambda photo: photo.image, threads=False)


def main() -> None:
    """Train, score, and write ablations.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="photographs to distill from")
    add("--data", type=Path, required=True, help="photographs with instances, to score on")
    add("-o", "--output", type=Path, required=True)
    add("--labels-dir", type=Path, help="folder of finished shards, one folder for each teacher")
    add("--photographs", type=int, default=128, help="number of photographs to distill from")
    add("--epochs", type=float, default=4)
    add("--every", type=int, default=1, help="score one photograph in this many")
    add("--only", nargs="*", choices=STUDENTS, help="train and score only these students")
    options = parser.parse_args()
    origin = provenance() | {"command": shlex.join(["python", "scripts/ablations.py", *sys.argv[1:]])}

    students = {name: STUDENTS[name] for name in options.only or STUDENTS}
    methods = [
        make_gradient_method(),
        make_teacher_method(LARGE, 0),
        make_teacher_method(LARGE, 0, sharpened=True),
        make_teacher_method(SMALL, 0),
        make_teacher_method(SMALL, "iep"),
        make_teacher_method(SMALL, 0, distance=True),
        make_student_method("embedded student", "mini", blind=False),
        make_student_method("embedded student, attention blanked", "mini", blind=True),
    ]
    for name, changes in students.items():
        values = {**BASE, "blind": False, "distance": False, **changes}
        blind, distance = values.pop("blind"), values.pop("distance")
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        search = f"{values['teacher_size'][0]}-{values['teacher_timestep']}{'-L2' if distance else ''}"
        config = DistillConfig(
            images=options.images,
            output=options.output / "students" / slug,
            labels_dir=(options.labels_dir or options.output / "labels") / search,
            size=SMALL,
            rank=16,
            limit=options.photographs,
            epochs=options.epochs,
            device="cpu",
            **values,
        )
        methods.append(make_student_method(name, train(config, blind=blind, distance=distance), blind=blind))
    photos = run.check_photos(open_dataset(options.data).photos[:: options.every], methods)[0]
    scores = {method.name: score_edges(run.count_all(photos, method, options.output / "counts")) for method in methods}
    Report(scores, photos=photos, methods=methods).save(options.output, command=origin["command"])
    rows = {
        name: {"ods": score.ods, "ois": score.ois, "ap": score.ap, "cldice": score.cldice}
        for name, score in scores.items()
    }
    result = origin | {"photographs": options.photographs, "epochs": options.epochs, "photos": len(photos)}
    (options.output / "ablations.json").write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
