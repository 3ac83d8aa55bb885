"""`trace-fast check`: the behavior of a model on the machine at hand, as a report that can be attached to an issue."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trace_fast.attention import MeanAttention
from trace_fast.backbones import has_student
from trace_fast.backbones.base import constant
from trace_fast.backbones.capture import AttendBlock
from trace_fast.detector import Detector
from trace_fast.extras import require
from trace_fast.io import visualize
from trace_fast.io.files import format_json, write_atomically
from trace_fast.io.images import read_image, resize
from trace_fast.ops.dispatch import backends
from trace_fast.scan import Scan, draw_abdiv, scan_photo
from trace_fast.tracer import Tracer

__all__ = ["Report", "check"]

PHOTOS = ("coffee", "chelsea", "rocket")  # scikit-image carries them
PACKAGES = ("trace_fast", "torch", "triton", "diffusers", "transformers", "timm", "accelerate", "numpy")
POSTER = {"boundary": 0.114, "inside": 0.027}  # nats, of the paper's authors, for one picture
HEIGHT = 240  # of a row of the picture, in pixels

Result = TypeVar("Result")


@dataclass(frozen=True)
class Report:
    """The measurements of `check`.

    Attributes:
        machine: versions, device and the backend of every op.
        model: name, size, dtype, parameters and how it is searched.
        capture: blocks and grids that are read; whether the network's output is the same while query and key are read;
            how far it is from that in the search, and rows of the mean map from a sum of 1.
        stages: seconds of each stage and, on a GPU, its peak memory in MiB; of a pass and the student in a second run.
        photos: the KL curve of each photograph, in nats, its t*, and the timestep that the model reads.
        divergence: mean ABDiv, in nats, where a disc of one photograph lies on another: on its outline and inside.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    capture: dict[str, Any]
    stages: dict[str, dict[str, float]]
    photos: dict[str, dict[str, Any]]
    divergence: dict[str, Any]

    def __str__(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# Check of {self.model['name']}"]
        for title, part in (("Machine", self.machine), ("Model", self.model), ("Capture", self.capture)):
            lines += ["", f"## {title}", "", *(f"- {name}: {value}" for name, value in part.items())]
        lines += ["", "## Stages", "", "| stage | seconds | peak MiB |", "| --- | ---: | ---: |"]
        for name, stage in self.stages.items():
            memory = f"{stage['MiB']:.0f}" if "MiB" in stage else "not measured on a CPU"
            lines.append(f"| {name} | {stage['seconds']:.3f} | {memory} |")
        lines += ["", "## KL curve, in nats", ""]
        for name, photo in self.photos.items():
            curve = ", ".join(f"{timestep}: {kl:.4f}" for timestep, kl in photo["kl"].items())
            text = (
                f"t* {photo['t*']}, read at {photo['read']}; {curve}"
                if curve
                else "none, since an encoder has no timesteps"
            )
            lines.append(f"- {name}: {text}")
        lines += ["", "## Mean ABDiv, in nats", "", "| timestep | on the boundary | inside |", "| ---: | ---: | ---: |"]
        for timestep, values in self.divergence.items():
            lines.append(f"| {timestep} | {values['boundary']:.4f} | {values['inside']:.4f} |")
        lines.append(f"| the authors' poster, another picture | {POSTER['boundary']} | {POSTER['inside']} |")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write report.md and report.json.

        Args:
            folder: exists.
        """
        for name, text in (("report.md", f"{self}\n"), ("report.json", format_json(asdict(self)))):
            with write_atomically(Path(folder) / name, "check") as file:
                file.write(text.encode())


def check(model: str | Path = "mini", output: str | Path | None = None, **options: Any) -> Report:
    """Measure what a model does on this machine: capture, speed, the KL curve, and ABDiv inside and across objects.

    Args:
        model: see `trace_fast.load`.
        output: folder, which exists, for report.md, report.json and panel.png; None writes none.
        options: of `Tracer.from_pretrained`, such as `device` and `offload`.

    Returns:
        The report; `print` shows it.

    Raises:
        RuntimeError: scikit-image, which has the photographs, is not installed, or as `trace_fast.load`.
        ValueError: as `trace_fast.load`.

    Example:
        >>> check("mini", device="cpu").capture["blocks"]  # doctest: +SKIP
        '6 of 6, 6 x (32, 32)'
    """
    require("check", "skimage")
    from skimage import data

    tracer, loading = measure(lambda: Tracer.from_pretrained(model, **options), repeat=False)
    photos = {name: read_image(getattr(data, name)()) for name in PHOTOS}
    capture, stages = check_capture(tracer, photos["coffee"])
    scans = {}
    for name, photo in photos.items():
        scans[name], stages["search"] = measure(functools.partial(scan_photo, tracer, photo), repeat=False)
    if has_student(model):
        detector = Detector.from_pretrained(model, **options)
        _, stages["student"] = measure(lambda: detector.edges(photos["coffee"]))
    report = Report(
        describe_machine(tracer),
        describe_model(tracer),
        capture,
        {"loading": loading, **stages},
        {name: describe_scan(scan) for name, scan in scans.items()},
        check_divergence(tracer, photos["coffee"], photos["chelsea"]),
    )
    if output is not None:
        report.save(output)
        visualize.write_picture(Path(output) / "panel.png", draw_panel(photos, scans))
    return report


def measure(call: Callable[[], Result], repeat: bool = True) -> tuple[Result, dict[str, float]]:
    """Return the result of a call, its seconds and, on a GPU, the peak of memory in MiB; a second call is measured."""
    if repeat:
        call()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = call()
    if gpu:
        torch.cuda.synchronize()
    stage = {"seconds": time.perf_counter() - started}
    return result, stage | ({"MiB": torch.cuda.max_memory_allocated() / 2**20} if gpu else {})


def describe_machine(tracer: Tracer) -> dict[str, Any]:
    """Return versions, the device, and the backend of every op."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = tracer.device
    servers: dict[str, list[str]] = {}
    for op, row in backends().items():
        servers.setdefault(row["cuda" if device.type == "cuda" else "cpu"], []).append(op)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "device": f"{device} ({name}), {torch.get_num_threads()} threads",
        **{f"ops by {server}": ", ".join(ops) for server, ops in servers.items()},
    }


def describe_model(tracer: Tracer) -> dict[str, Any]:
    """Return how a model is searched."""
    backbone = tracer.backbone
    return {
        "name": tracer.name,
        "family": type(backbone).__name__,
        "network": type(backbone.network).__name__,
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "dtype": str(tracer.dtype),
        "size": list(tracer.size),
        "timestep": tracer.timestep,
        "noising": "none" if backbone.schedule is None else backbone.settings.noising,
    }


@torch.no_grad()
def check_capture(tracer: Tracer, photo: Tensor) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Run the network with and without capture.

    Args:
        tracer: the search.
        photo: (1, 3, H, W) float32 in [0, 1].

    Returns:
        `Report.capture`, and the stages that it consists of.
    """
    backbone = tracer.backbone
    grids = backbone.read_grids()
    tokens = math.prod(backbone.finest_grid())
    pixels = resize(photo.to(tracer.device), tracer.size)
    sample, encoding = measure(lambda: backbone.encode(pixels))
    timestep = constant((0,), tracer.device)
    mean = MeanAttention(sample.new_empty((1, tokens, tokens), dtype=torch.float32), grids)

    def predict_captured(attend: AttendBlock | None = None) -> Tensor:
        mean.clear()
        with backbone.capture(mean.on_attention, attend=attend):
            return backbone.predict(sample, timestep)

    plain, pass_alone = measure(lambda: backbone.predict(sample, timestep))
    captured = predict_captured()
    searched, capturing = measure(lambda: predict_captured(mean.attend))
    rows = mean.finish().double().sum(-1)
    counts = ", ".join(f"{count} x {grid}" for grid, count in Counter(grids).items())
    capture = {
        "blocks": f"{len(grids)} of {len(backbone.attentions())}, {counts}",
        "output is the same bit by bit": bool(torch.equal(captured, plain)),
        # there blocks may attend and make their maps at once
        "largest difference of the output in the search": float((searched - plain).abs().max()),
        "largest output": float(plain.abs().max()),
        "largest distance of the sum of a row from 1": float((rows - 1).abs().max()),
    }
    return capture, {"encoding": encoding, "pass alone": pass_alone, "pass with capture": capturing}


def describe_scan(scan: Scan) -> dict[str, Any]:
    """Return the KL curve, t*, and the timestep that the model reads."""
    timesteps, kl = scan.timesteps, scan.output.kl
    return {
        "kl": {} if kl is None else dict(zip(timesteps[1:], kl[0].tolist(), strict=True)),
        "t*": None if scan.peak is None else timesteps[scan.peak],
        "read": timesteps[scan.read],
    }


def check_divergence(tracer: Tracer, background: Tensor, photo: Tensor) -> dict[str, Any]:
    """Measure ABDiv where a disc of one photograph lies on another.

    Args:
        tracer: the search.
        background: (1, 3, H, W) float32 in [0, 1].
        photo: likewise, of any size; it is resized to that of the background.

    Returns:
        By timestep, the one that is read and t*, the mean in nats of the tokens whose opposite neighbors lie on two
        sides of the disc's outline, and of those inside it whose neighbors lie inside, too.
    """
    height, width = tracer.backbone.finest_grid()
    size = background.shape[-2:]
    row, column = (torch.linspace(-1, 1, side) for side in size)
    disc = (row[:, None] ** 2 + column**2 < 0.36)[None, None].float()
    scan = scan_photo(tracer, torch.lerp(background, resize(photo, (size[0], size[1])), disc))
    tokens = functional.interpolate(disc, (height, width), mode="nearest-exact")
    padded = functional.pad(tokens, (1, 1, 1, 1), mode="replicate")[0, 0] > 0
    across = padded[1:-1, :-2] != padded[1:-1, 2:]
    down = padded[:-2, 1:-1] != padded[2:, 1:-1]
    inside = functional.avg_pool2d(tokens, 3, 1, 1)[0, 0] > 0.99
    chosen = {scan.read, *([] if scan.peak is None else [scan.peak])}
    return {
        str(scan.timesteps[index]): {
            "boundary": float(scan.abdiv[index][across | down].mean()),
            "inside": float(scan.abdiv[index][inside].mean()),
        }
        for index in sorted(chosen)
    }


def draw_panel(photos: dict[str, Tensor], scans: dict[str, Scan]) -> Any:
    """Draw a row for each photograph: itself, the edges of the search, and ABDiv at a few timesteps."""
    rows = []
    for name, photo in photos.items():
        scan = scans[name]
        shown = sorted({*range(0, len(scan.timesteps), 3), scan.peak or 0})
        pictures: list[Any] = [photo[0], scan.output.edges[0, 0]]
        pictures += [np.asarray(draw_abdiv(scan, index, photo.shape[-2:])) for index in shown]
        rows.append(visualize.panel(pictures, [name, "edges", *map(scan.describe, shown)], height=HEIGHT))
    return visualize.grid(rows, 1)
