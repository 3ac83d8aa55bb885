"""Scores for people: tables in Markdown, JSON, CSV and pandas, curves, and sheets of the best and the worst images."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trace_fast import ops
from trace_fast.evaluation.data import SIZES, Photo
from trace_fast.evaluation.edges import DISTANCE, SUPPRESSION, EdgeScores, compare_edges, harmonic
from trace_fast.evaluation.masks import MaskScores
from trace_fast.evaluation.methods import Method
from trace_fast.evaluation.panoptic import PanopticScores
from trace_fast.extras import require
from trace_fast.io import visualize
from trace_fast.io.arrays import array_to_tensor
from trace_fast.io.files import format_json, write_atomically

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Report", "contact_sheet", "difference_table", "edge_table", "mask_table", "panoptic_table", "plot_curves"]

SHOWN = 3  # best and worst images on a sheet, each
# right, wrong and missed, which readers with any color vision can distinguish
GREEN, ORANGE, BLUE = (0.0, 0.62, 0.45), (0.84, 0.37, 0.0), (0.0, 0.45, 0.85)
EDGE_FIGURES = ("images", "ods", "ois", "ap", "cldice", "threshold")
MASK_FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")


@dataclass(frozen=True, repr=False)
class Report:
    """The scores of an evaluation; `print` shows them as tables in Markdown.

    Attributes:
        edges: scores of edge maps by name of the method; empty where none was scored. Differences are to the first.
        masks: scores of masks by name of the results; empty where none were scored.
        panoptic: scores of panoptic segments by name of the results; empty where none were scored.
        parameters: number of network parameters by the names of `masks`, where masks were refined by edges; else None.
        notes: what was left out, a line each.
        distance: largest distance of a match of edges, as a share of the image's diagonal.
        suppression: how the ridges of edge maps were found; see `trace_fast.ops.suppress_nonmaxima`.
        photos: images that were scored, in the order of the scores of each image.
        methods: sources of the edge maps.
    """

    edges: Mapping[str, EdgeScores] = field(default_factory=dict)
    masks: Mapping[str, MaskScores] = field(default_factory=dict)
    panoptic: Mapping[str, PanopticScores] = field(default_factory=dict)
    parameters: Mapping[str, int | None] | None = None
    notes: Sequence[str] = ()
    distance: float = DISTANCE
    suppression: str = SUPPRESSION
    photos: Sequence[Photo] = ()
    methods: Sequence[Method] = ()

    def __str__(self) -> str:
        return "\n\n".join(self._sections("").values())

    def __repr__(self) -> str:
        return f"Report(edges={list(self.edges)}, masks={list(self.masks)}, panoptic={list(self.panoptic)})"

    def to_pandas(self) -> Any:
        """Return the scores as a table of pandas.

        Returns:
            DataFrame with a row for each method or results, indexed by task ("edges", "masks" or "panoptic") and name,
            and a column for each figure; those of other tasks are nan. Intervals are the columns FIGURE_low and
            FIGURE_high.

        Raises:
            RuntimeError: pandas is not installed.

        Example:
            >>> trace_fast.evaluate("coco", ["sobel", "mini"]).to_pandas().loc["edges"]["ods"]  # doctest: +SKIP
        """
        require("to_pandas", "pandas")
        pandas: Any = importlib.import_module("pandas")
        rows = [
            *({"task": "edges", "name": name, **_edge_row(scores)} for name, scores in self.edges.items()),
            *({"task": "masks", "name": name, **_mask_row(scores)} for name, scores in self.masks.items()),
            *({"task": "panoptic", "name": name, **_panoptic_row(scores)} for name, scores in self.panoptic.items()),
        ]
        return pandas.DataFrame(rows, columns=None if rows else ["task", "name"]).set_index(["task", "name"])

    def save(self, folder: str | Path, *, command: str = "") -> None:
        """Write the report as files; those of an earlier report are replaced.

        Of edges report.json, report.csv, report.md, differences.md (to the first method, paired), images.csv (F of
        each image at the threshold of ODS), curves.png and sheet_METHOD.png for each method, drawn from maps that are
        made again; of masks masks.json, masks.csv and masks.md; of panoptic segments panoptic.json and panoptic.md.

        Args:
            folder: it is created where it is missing.
            command: the command that made the report, for the files.

        Raises:
            RuntimeError: edges were scored, and matplotlib is not installed.
            OSError: the folder cannot be written to.

        Example:
            >>> trace_fast.evaluate("coco", ["sobel", "mini@iep"]).save("report")  # doctest: +SKIP
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._sections(command).items():
            _write(folder / f"{name}.md", f"{text}\n")
        if self.edges:
            self._save_edges(folder, command)
        if self.masks:
            results: dict[str, Any] = {name: vars(scores) for name, scores in self.masks.items()}
            more = {} if self.parameters is None else {"parameters": dict(self.parameters)}
            _write_json(folder / "masks.json", {"command": command, "results": results, **more})
            _write_csv(folder / "masks.csv", [("results", *MASK_FIGURES), *_rows(self.masks, MASK_FIGURES)])
        if self.panoptic:
            results = {name: dataclasses.asdict(scores) for name, scores in self.panoptic.items()}
            _write_json(folder / "panoptic.json", {"command": command, "results": results})

    def compare(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return how much better the edges of each other method are than those of the first.

        Returns:
            By the method's name, what `compare_edges` returns; empty for fewer than two methods.

        Example:
            >>> trace_fast.evaluate("coco", ["sobel", "mini"]).compare()["mini"]["ods"]  # doctest: +SKIP
        """
        scores = list(self.edges.items())
        return {name: compare_edges(entry, scores[0][1]) for name, entry in scores[1:]}

    def _sections(self, command: str) -> dict[str, str]:
        """Return the tables of the report, each with a footnote, by the names of their files."""
        sections = {}
        if self.edges:
            table = edge_table({name: scores.to_dict() for name, scores in self._by_ods().items()})
            images = next(iter(self.edges.values())).images
            sections["report"] = _add_footnote(table, f"{images} images", command)
            if len(self.edges) > 1:
                first = next(iter(self.edges))
                text = f"Difference to {first}, with the 95 % interval over the same resamples of the images"
                sections["differences"] = _add_footnote(difference_table(self.compare()), text, "")
        if self.panoptic:
            sections["panoptic"] = _add_footnote(panoptic_table(self.panoptic), "", command)
        if self.masks:
            table = mask_table({name: vars(scores) for name, scores in self.masks.items()}, self.parameters)
            sections["masks"] = _add_footnote(table, "Class-agnostic", command)
        return sections

    def _by_ods(self) -> dict[str, EdgeScores]:
        """Return the scores of edges, the best last."""
        return dict(sorted(self.edges.items(), key=lambda item: item[1].ods))

    def _save_edges(self, folder: Path, command: str) -> None:
        """Write the files of edges, but the table."""
        methods = self._by_ods()
        data = {
            "command": command,
            "distance": self.distance,
            "suppression": self.suppression,
            "notes": list(self.notes),
            "methods": {name: scores.to_dict() for name, scores in methods.items()},
            "differences": self.compare(),
            "curves": {
                name: {"precision": scores.precision.tolist(), "recall": scores.recall.tolist()}
                for name, scores in methods.items()
            },
        }
        _write_json(folder / "report.json", data)
        _write_csv(folder / "report.csv", [("method", *EDGE_FIGURES), *_rows(methods, EDGE_FIGURES)])
        columns = [[photo.name for photo in self.photos], *(scores.f_per_image for scores in methods.values())]
        _write_csv(folder / "images.csv", [("image", *methods), *zip(*columns, strict=True)])
        plot_curves(methods, folder / "curves.png")
        for method in self.methods:
            scores = self.edges[method.name]
            sheet = contact_sheet(method, scores, self.photos, distance=self.distance, suppression=self.suppression)
            visualize.write_picture(folder / f"sheet_{method.slug}.png", sheet)


def edge_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the scores of edges as a table in Markdown.

    Args:
        methods: by name, `EdgeScores.to_dict()` or the same from a report.json.
    """
    split = all(row["by"] for row in methods.values())
    head = ["method", "ODS", "95 % interval", "OIS", "AP", "clDice"]
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
    return _format_markdown(lines)


def difference_table(differences: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return differences of methods to a reference as a table in Markdown.

    Args:
        differences: by name of the method, what `compare_edges` returns or the same from a report.json.
    """
    lines = [
        ["difference", "ODS", "95 % interval", "OIS", "95 % interval", "AP", "95 % interval", "clDice", "95 % interval"]
    ]
    for name, row in differences.items():
        cells = ((f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}") for value, low, high in row.values())
        lines.append([name, *(cell for pair in cells for cell in pair)])
    return _format_markdown(lines)


def mask_table(results: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, int | None] | None = None) -> str:
    """Return the scores of masks as a table in Markdown.

    Args:
        results: by name, `MaskScores` as dicts or the same from a masks.json, where None stands for nan.
        parameters: number of network parameters by the same names, for a column of them; None for no such column.
    """
    head = ["masks", *["parameters"] * (parameters is not None)]
    head += ["AP", "95 % interval", "AP50", "AP75", "small", "medium", "large", "AR100"]
    lines = [head]
    for name, row in results.items():
        ends = [_format_score(end) for end in (row["intervals"]["ap"] if row["intervals"] else (row["ap"], row["ap"]))]
        size = None if parameters is None else parameters.get(name)
        line = [name, *["" if size is None else f"{size / 1e6:,.1f} M"] * (parameters is not None)]
        figures = ("ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
        line += [_format_score(row["ap"]), " to ".join(ends) if all(ends) else ""]
        lines.append([*line, *(_format_score(row[figure]) for figure in figures)])
    return _format_markdown(lines)


def _format_score(value: float | None) -> str:
    """Return a score; nothing where there is none, since the truth has no instance of a size."""
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def panoptic_table(results: Mapping[str, PanopticScores]) -> str:
    """Return the scores of panoptic segments, by name, as a table in Markdown."""
    lines = [["segments", "PQ", "SQ", "RQ", "PQ, things", "PQ, stuff", "classes"]]
    for name, scores in results.items():
        values = (scores.all.pq, scores.all.sq, scores.all.rq, scores.things.pq, scores.stuff.pq)
        lines.append([name, *(f"{value:.3f}" for value in values), str(scores.all.classes)])
    return _format_markdown(lines)


def plot_curves(scores: Mapping[str, EdgeScores], path: Path) -> None:
    """Plot precision over recall of each method, its ODS marked, on lines of equal F.

    Args:
        scores: by name of the method.
        path: PNG file to write.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    require("evaluate", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    recall = np.linspace(0.01, 1, 200)
    for f in np.arange(0.1, 1, 0.1):
        reached = recall > f / 2 + 1e-6
        axes.plot(recall[reached], f * recall[reached] / (2 * recall[reached] - f), color="0.88", linewidth=0.8)
        axes.annotate(f"F {f:.1f}", (1, f / (2 - f)), color="0.6", fontsize=7, ha="right", va="bottom")
    for name, curve in reversed(list(scores.items())):
        (line,) = axes.plot(curve.recall, curve.precision, label=f"{name}  (ODS {curve.ods:.3f})")
        best = int(np.argmax(harmonic(curve.precision, curve.recall)))
        axes.plot(curve.recall[best], curve.precision[best], marker="o", color=line.get_color())
    axes.legend(fontsize=8)
    with write_atomically(path, "evaluate") as file:
        figure.savefig(file, format="png", dpi=150)


def contact_sheet(
    method: Method,
    scores: EdgeScores,
    photos: Sequence[Photo],
    *,
    distance: float = DISTANCE,
    suppression: str = SUPPRESSION,
    height: int = 240,
) -> Image.Image:
    """Draw the best and the worst images of a method at the threshold of ODS: photo, map, and its comparison.

    Green pixels are right, orange ones wrong, blue ones missed; lines are drawn three pixels wide.

    Args:
        method: source of the maps, which are made again.
        scores: of the method.
        photos: in the order of `scores.f_per_image`.
        distance: of matching, as a share of the diagonal.
        suppression: how the ridges of the maps are found.
        height: of each picture, in pixels.
    """
    order = np.argsort(-scores.f_per_image, kind="stable")
    count = min(SHOWN, (len(order) + 1) // 2)
    chosen = [*order[:count], *order[count:][::-1][:count][::-1]]
    rows = []
    for index in chosen:
        photo = photos[index]
        edges = method.edges(photo)
        ridges = array_to_tensor(edges)[None]
        if method.suppress:
            ridges = ops.suppress_nonmaxima(ridges, suppression)
        comparison = _compare(ridges >= scores.threshold, photo, distance)
        pictures = [edges, comparison] if photo.image is None else [photo.image, edges, comparison]
        titles = [photo.name, method.name, f"F {scores.f_per_image[index]:.2f}: green right, orange wrong, blue missed"]
        rows.append(visualize.panel(pictures, titles[-len(pictures) :], height))
    return visualize.grid(rows, 1)


def _compare(ridges: torch.Tensor, photo: Photo, distance: float) -> np.ndarray:
    """Return right, wrong and missed pixels of ridges (1, H, W) bool in colors on white, (H, W, 3) float32."""
    contours = photo.contours()
    detected = ops.thin(ridges)
    annotators = array_to_tensor(contours.lines)
    radius = distance * float(np.hypot(*ridges.shape[1:]))
    pairs = [ops.match_contours(detected, lines[None], radius) for lines in annotators]
    right = torch.stack([matched[0] for matched, _ in pairs]).any(0)
    missed = torch.stack([lines & ~matched[0] for lines, (_, matched) in zip(annotators, pairs, strict=True)]).any(0)
    wrong = detected[0] & ~right & ~array_to_tensor(contours.ignored)
    picture = np.ones((*ridges.shape[1:], 3), np.float32)
    for pixels, color in ((missed, BLUE), (wrong, ORANGE), (right, GREEN)):
        wide = torch.nn.functional.max_pool2d(pixels[None].float(), 3, 1, 1)[0] > 0
        picture[wide.numpy()] = color
    return picture


def _edge_row(scores: EdgeScores) -> dict[str, Any]:
    """Return the figures of edges for a row of a table."""
    return {name: getattr(scores, name) for name in EDGE_FIGURES} | _interval_columns(scores.intervals)


def _mask_row(scores: MaskScores) -> dict[str, Any]:
    """Return the figures of masks for a row of a table."""
    figures = {name: value for name, value in vars(scores).items() if name != "intervals"}
    return figures | _interval_columns(scores.intervals or {})


def _panoptic_row(scores: PanopticScores) -> dict[str, Any]:
    """Return the figures of panoptic segments for a row of a table."""
    return vars(scores.all) | {"pq_things": scores.things.pq, "pq_stuff": scores.stuff.pq}


def _interval_columns(intervals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return intervals as two columns each."""
    return {
        f"{name}_{end}": value
        for name, interval in intervals.items()
        for end, value in zip(("low", "high"), interval, strict=True)
    }


def _add_footnote(table: str, text: str, command: str) -> str:
    """Return a table with a line about it below, where there is something to say."""
    footnote = "; ".join(part for part in (text, f"`{command}`" if command else "") if part)
    return f"{table}\n\n{footnote}." if footnote else table


def _format_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first line is its head."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _rows(scores: Mapping[str, Any], figures: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return a name and its figures for each row of a table."""
    return [(name, *(getattr(row, figure) for figure in figures)) for name, row in scores.items()]


def _write_json(path: Path, data: Any) -> None:
    _write(path, format_json(data))


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    with write_atomically(path, "evaluate") as file:
        file.write(text.encode())
