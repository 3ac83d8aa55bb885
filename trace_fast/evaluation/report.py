"""Scores as files that people look at: JSON, CSV, a Markdown table, curves, and sheets of the best and worst images."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trace_fast import ops
from trace_fast.evaluation.data import SIZES, Photo
from trace_fast.evaluation.edges import DISTANCE, EdgeScores, harmonic
from trace_fast.evaluation.masks import MaskScores
from trace_fast.evaluation.methods import Method
from trace_fast.evaluation.panoptic import PanopticScores
from trace_fast.io import visualize
from trace_fast.io.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "contact_sheet",
    "edge_table",
    "mask_table",
    "plot_curves",
    "write_masks",
    "write_panoptic",
    "write_report",
]

SHOWN = 3  # best and worst images on a sheet, each
# right, wrong and missed, which readers with any colour vision tell apart
GREEN, RED, BLUE = (0.0, 0.62, 0.45), (0.84, 0.37, 0.0), (0.0, 0.45, 0.85)


def write_report(
    folder: Path,
    scores: Mapping[str, EdgeScores],
    photos: Sequence[Photo],
    methods: Sequence[Method],
    *,
    command: str,
    notes: Sequence[str] = (),
    distance: float = DISTANCE,
) -> None:
    """Write scores of methods on the same photos.

    Files are report.json, report.csv, report.md, images.csv (F of each at the threshold of ODS), curves.png, and
    sheet_METHOD.png for each.

    Args:
        folder: where to; files of an earlier report are replaced.
        scores: by the name of the method.
        photos: in the order of the scores.
        methods: by whom; the sheets are drawn from maps made again.
        command: that made the report.
        notes: what was left out.
        distance: of matching, as a share of the diagonal.
    """
    ordered = dict(sorted(scores.items(), key=lambda item: item[1].ods))
    data: dict[str, Any] = {
        "command": command,
        "distance": distance,
        "notes": list(notes),
        "methods": {name: each.summary() for name, each in ordered.items()},
        "curves": {
            name: {"precision": each.precision.tolist(), "recall": each.recall.tolist()}
            for name, each in ordered.items()
        },
    }
    _write(folder / "report.json", json.dumps(data, indent=1) + "\n")
    figures = ("images", "ods", "ois", "ap", "cldice", "threshold")
    _write(folder / "report.csv", _csv([("method", *figures), *_rows(ordered, figures)]))
    names = [photo.name for photo in photos]
    columns = [names, *(each.best for each in ordered.values())]
    _write(folder / "images.csv", _csv([("image", *ordered), *zip(*columns, strict=True)]))
    images = next(iter(ordered.values())).images
    _write(folder / "report.md", f"{edge_table(data['methods'])}\n\n{images} images; `{command}`.\n")
    plot_curves(ordered, folder / "curves.png")
    for method in methods:
        sheet = contact_sheet(method, scores[method.name], photos, distance=distance)
        visualize.write_picture(folder / f"sheet_{method.slug}.png", sheet)


def edge_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores of methods, `EdgeScores.summary` or what a report.json holds of it, as a Markdown table."""
    split = all(row["by"] for row in methods.values())
    head = ["method", "ODS", "95 %", "OIS", "AP", "clDice"]
    head += ["recall: touching", "background", *SIZES] * split
    lines = [head]
    for name, row in methods.items():
        low, high = row["intervals"]["ods"]
        line = [name, f"{row['ods']:.3f}", f"{low:.3f} to {high:.3f}"]
        line += [f"{row[figure]:.3f}" for figure in ("ois", "ap", "cldice")]
        if split:
            shares = [row["by"]["side"][side] for side in ("touching", "background")]
            shares += [row["by"]["size"][size] for size in SIZES]
            line += [f"{share:.3f}" if pixels else "" for share, pixels in shares]
        lines.append(line)
    return _markdown(lines)


def mask_table(results: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, int | None] | None = None) -> str:
    """Scores of masks, `MaskScores` as dicts or what a masks.json holds of them, as a Markdown table."""
    head = ["masks", *["parameters"] * (parameters is not None)]
    head += ["AP", "95 %", "AP50", "AP75", "small", "medium", "large", "AR100"]
    lines = [head]
    for name, row in results.items():
        low, high = row["intervals"]["ap"] if row["intervals"] else (row["ap"], row["ap"])
        size = None if parameters is None else parameters.get(name)
        line = [name, *["" if size is None else f"{size / 1e6:,.1f} M"] * (parameters is not None)]
        figures = ("ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
        cells = [f"{row['ap']:.3f}", f"{low:.3f} to {high:.3f}", *(f"{row[figure]:.3f}" for figure in figures)]
        # the truth may have no instance of a size
        lines.append([*line, *("" if cell.startswith("nan") else cell for cell in cells)])
    return _markdown(lines)


def write_masks(
    folder: Path, scores: Mapping[str, MaskScores], command: str, parameters: Mapping[str, int | None] | None = None
) -> None:
    """Write scores of masks: masks.json, masks.csv and masks.md.

    Args:
        folder: where to.
        scores: by the name of the results.
        command: that made them.
        parameters: of the networks whose edges refined the results, by the same names; None for a table without them.
    """
    figures = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    data: dict[str, Any] = {"command": command, "results": {name: vars(each) for name, each in scores.items()}}
    if parameters is not None:
        data["parameters"] = dict(parameters)
    _write(folder / "masks.json", json.dumps(data, indent=1) + "\n")
    _write(folder / "masks.csv", _csv([("results", *figures), *_rows(scores, figures)]))
    table = mask_table(data["results"], parameters)
    _write(folder / "masks.md", f"{table}\n\nClass-agnostic; `{command}`.\n")


def write_panoptic(folder: Path, scores: Mapping[str, PanopticScores], command: str) -> None:
    """Write panoptic quality: panoptic.json and panoptic.md.

    Args:
        folder: where to.
        scores: by the name of the results.
        command: that made them.
    """
    data = {"command": command, "results": {name: dataclasses.asdict(each) for name, each in scores.items()}}
    _write(folder / "panoptic.json", json.dumps(data, indent=1) + "\n")
    head = ["segments", "PQ", "SQ", "RQ", "PQ, things", "PQ, stuff", "classes"]
    lines = [head]
    for name, each in scores.items():
        values = (each.all.pq, each.all.sq, each.all.rq, each.things.pq, each.stuff.pq)
        lines.append([name, *(f"{value:.3f}" for value in values), str(each.all.classes)])
    _write(folder / "panoptic.md", f"{_markdown(lines)}\n\n`{command}`.\n")


def plot_curves(scores: Mapping[str, EdgeScores], path: Path) -> None:
    """Precision over recall of each method, its ODS marked, on lines of equal F.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("evaluate: needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    recall = np.linspace(0.01, 1, 200)
    for f in np.arange(0.1, 1, 0.1):
        reached = recall > f / 2 + 1e-6
        axes.plot(recall[reached], f * recall[reached] / (2 * recall[reached] - f), color="0.88", linewidth=0.8)
        axes.annotate(f"F {f:.1f}", (1, f / (2 - f)), color="0.6", fontsize=7, ha="right", va="bottom")
    for name, each in reversed(list(scores.items())):
        (line,) = axes.plot(each.recall, each.precision, label=f"{name}  (ODS {each.ods:.3f})")
        best = int(np.argmax(harmonic(each.precision, each.recall)))
        axes.plot(each.recall[best], each.precision[best], marker="o", color=line.get_color())
    axes.legend(fontsize=8)
    with write_atomically(path, "evaluate") as file:
        figure.savefig(file, format="png", dpi=150)


def contact_sheet(
    method: Method, scores: EdgeScores, photos: Sequence[Photo], *, distance: float = DISTANCE, height: int = 240
) -> Image.Image:
    """The best and the worst images of a method at the threshold of ODS: photo, map, and what was found.

    Green pixels are found, orange ones wrong, blue ones missed; lines are drawn three pixels wide.
    """
    from PIL import Image

    order = np.argsort(-scores.best, kind="stable")
    count = min(SHOWN, (len(order) + 1) // 2)
    chosen = [*order[:count], *order[count:][::-1][:count][::-1]]
    rows = []
    for index in chosen:
        photo = photos[index]
        edges = method.edges(photo)
        found = _compare(method, edges, photo, scores.threshold, distance)
        pictures = [edges, found] if photo.image is None else [photo.image, edges, found]
        titles = [photo.name, method.name, f"F {scores.best[index]:.2f}: found, wrong, missed"]
        rows.append(visualize.panel(pictures, titles[-len(pictures) :], height))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + 12 for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 12
    return sheet


def _compare(method: Method, edges: np.ndarray, photo: Photo, threshold: float, distance: float) -> np.ndarray:
    """Found, wrong and missed pixels of a map in colours on white, (H, W, 3) float32."""
    contours = photo.contours()
    ridges = torch.from_numpy(np.ascontiguousarray(edges))[None]
    if method.suppress:
        ridges = ops.suppress_nonmaxima(ridges)
    detected = ops.thin(ridges >= threshold)
    drawn = torch.from_numpy(contours.drawn)
    pairs = [ops.match_contours(detected, each[None], distance * float(np.hypot(*edges.shape))) for each in drawn]
    right = torch.stack([of_detected[0] for of_detected, _ in pairs]).any(0)
    missed = torch.stack([each & ~of_truth[0] for each, (_, of_truth) in zip(drawn, pairs, strict=True)]).any(0)
    wrong = detected[0] & ~right & ~torch.from_numpy(contours.ignored)
    picture = np.ones((*edges.shape, 3), np.float32)
    for pixels, colour in ((missed, BLUE), (wrong, RED), (right, GREEN)):
        wide = torch.nn.functional.max_pool2d(pixels[None].float(), 3, 1, 1)[0] > 0
        picture[wide.numpy()] = colour
    return picture


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _rows(scores: Mapping[str, Any], figures: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(name, *(getattr(each, figure) for figure in figures)) for name, each in scores.items()]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with write_atomically(path, "evaluate") as file:
        file.write(text.encode())
