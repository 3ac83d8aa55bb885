"""`trace_fast.evaluate`: a folder of photographs with ground truth, edges or masks to score on it, and a report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trace_fast.backbones import has_student
from trace_fast.evaluation import run
from trace_fast.evaluation.data import CROWD, DataSet, Photo, open_dataset
from trace_fast.evaluation.edges import DISTANCE, RESAMPLES, SUPPRESSION, EdgeScores, score_edges
from trace_fast.evaluation.masks import MaskScores, mask_ap
from trace_fast.evaluation.methods import Method, open_method, split_name
from trace_fast.evaluation.panoptic import PanopticScores, panoptic_quality
from trace_fast.evaluation.refined import refine_all
from trace_fast.evaluation.report import Report
from trace_fast.masks import coco
from trace_fast.ops import checks
from trace_fast.ops.contours import SUPPRESSIONS
from trace_fast.progress import LOGGER

__all__ = ["evaluate"]

Annotations = coco.Instances | coco.Panoptic


def evaluate(
    data: str | Path,
    methods: Any = (),
    results: Any = (),
    *,
    table: str | None = None,
    baseline: str | Path | None = None,
    threshold: float | Sequence[float] | None = None,
    mode: str = "fit",
    truth: str | Path | None = None,
    ignore: Sequence[int] = (CROWD,),
    distance: float = DISTANCE,
    suppression: str = SUPPRESSION,
    limit: int | None = None,
    device: str | None = None,
    skip_bad: bool = False,
    cache: str | Path | None = None,
) -> Report:
    """Score edge maps against instance boundaries, and masks against instances.

    Edge maps are scored by ODS, OIS and AP as BSDS500 defines them, by clDice, and by recall where instances touch;
    masks by class-agnostic AP and AR as COCO defines them; panoptic segments by PQ, SQ and RQ. Intervals are 95 % of
    1,000 resamples of the images. With `table`, the masks of a baseline are scored as they are, and again split and
    completed by the edges of each method. All files are read once before anything is counted, so that faults are
    reported first.

    Args:
        data: folder with photographs, in `images` or itself, and ground truth.
        methods: sources of edge maps, each [NAME=]SPEC: sobel, canny, maps:FOLDER or maps:FILE (a tar or parquet file
            of `trace-fast edges`), lines:FOLDER (thin already), MODEL (its student where it has one), or MODEL@iep,
            MODEL@TIMESTEP (its search); or a model in memory, such as a Tracer, or a `Method`. One, a list, or a
            dictionary by name.
        results: files of masks, each [NAME=]FILE: a JSON file of COCO results, or of panoptic segments beside their
            folder of PNG files. One, a list, or a dictionary of files by name.
        table: "backbones" refines the masks of `baseline` by the edges of each method, "components" by those of the
            steps of one MODEL (a fixed timestep, t*, its student where it has one); None scores the edges.
        baseline: JSON file of COCO results, with `table`.
        threshold: strength in (0, 1] from which an edge separates masks, with `table`; one, or one for each method.
            None is that of `trace_fast.propagate`; modes other than "fit" need one.
        mode: "fit", "flood" or "walk", the way in which masks are refined, with `table`; see `trace_fast.propagate`.
        truth: ground truth, a folder of label maps, of folders of mask files or of BSDS .mat files, or a COCO JSON
            file, below `data` or anywhere; None is the first that exists of inst, panoptic, masks, ground_truth,
            groundTruth, and in annotations/ instances_SPLIT.json of a folder SPLIT (val, where there are several).
        ignore: labels of maps that are crowd or void.
        distance: largest distance of a match of edges, as a share of the image's diagonal.
        suppression: "bsds" or "hessian", the way in which ridges of edge maps are found; published scores are those of
            "bsds". See `trace_fast.ops.suppress_nonmaxima`.
        limit: number of images to score, the first; None is all.
        device: where named models run; None is the GPU where there is one, else the CPU.
        skip_bad: leave out images and results that have a problem, instead of raising.
        cache: folder where the counts of each image are kept, so that an interrupted call continues where it was; None
            keeps nothing.

    Returns:
        The report: `print` it, `.save` it, or use `.edges`, `.masks` and `.panoptic`, scores by name.

    Raises:
        ValueError: an argument is not allowed, there is no ground truth, or files have problems; all are listed.
        RuntimeError: a package is not installed, or a device is not present.
        OSError: a file is missing or cannot be read.

    Example:
        >>> report = trace_fast.evaluate("coco", ["sobel", "HED=maps:hed", "mini"])  # doctest: +SKIP
        >>> print(report, report.edges["mini"].ods)  # doctest: +SKIP
    """
    checks.choice("evaluate", "table", table, "backbones", "components", None)
    named = _name_methods(methods, table)
    files = _name_results(results)
    checks.choice("evaluate", "suppression", suppression, *SUPPRESSIONS)
    _check_choices(named, files, table, baseline, limit)
    thresholds = _repeat_threshold(threshold, len(named), optional=table is None or mode == "fit")
    annotations = _read_results(files, baseline, skip_bad)
    dataset = open_dataset(data, truth, ignore, skip_bad)
    opened = _open_methods(named, device)
    photos, notes = _select_photos(dataset, opened, limit, skip_bad)
    notes += _describe_left_out(annotations)
    if not photos:
        raise ValueError(f"evaluate: data must hold an image with contours, got none in '{data}'")

    panoptic = _score_panoptic(annotations, dataset)
    with tempfile.TemporaryDirectory() if cache is None else nullcontext(cache) as folder:
        if table is None:
            scored, refining = opened, []
        else:
            scored, refining = [], list(zip(opened, thresholds, strict=True))
        edges = {
            method.name: _score_method(photos, method, Path(folder) / "counts", distance, suppression)
            for method in scored
        }
        masks = _score_masks(photos, annotations, refining, mode, Path(folder) / "refined")
    first = next(iter(annotations), "")
    parameters = {f"{first} + {method.name}": method.parameters for method, _ in refining}
    return Report(
        edges, masks, panoptic, parameters if refining else None, notes, distance, suppression, photos, scored
    )


def _name_methods(methods: Any, table: str | None) -> list[tuple[str | None, Any]]:
    """Return name and specification of each method; a name is None where the specification says it."""
    if isinstance(methods, Mapping):
        named = list(methods.items())
    elif isinstance(methods, (str, Path)) or not isinstance(methods, Iterable):
        named = [(None, methods)]
    else:
        named = [(None, method) for method in methods]
    if table != "components":
        return named
    if len(named) != 1 or not isinstance(named[0][1], (str, Path)) or "@" in str(named[0][1]):
        raise ValueError(
            'evaluate: methods must be one MODEL without a timestep for table="components", got '
            f"{', '.join(str(spec) for _, spec in named) or 'none'}"
        )
    name, model = split_name(str(named[0][1])) if named[0][0] is None else named[0]
    steps = ("@0", "@iep", *[""] * has_student(model))
    return [(f"{name}{step}", f"{model}{step}") for step in steps]


def _name_results(results: Any) -> dict[str, Path]:
    """Return the files of results by name: NAME of [NAME=]FILE, else the file's own without its ending."""
    if isinstance(results, Mapping):
        return {name: Path(file) for name, file in results.items()}
    files: dict[str, Path] = {}
    for result in [results] if isinstance(results, (str, Path)) else results:
        name, _, file = result.rpartition("=") if isinstance(result, str) else ("", "", result)
        name = name or Path(file).stem
        if name in files:
            raise ValueError(f"evaluate: results must have different names, such as NAME=FILE, got {name} twice")
        files[name] = Path(file)
    return files


def _check_choices(named: Sized, files: Sized, table: str | None, baseline: Any, limit: int | None) -> None:
    """Refuse choices that do not fit each other."""
    if (table is None) != (baseline is None):
        raise ValueError(f"evaluate: table and baseline must be given together, got {table!r} and {baseline!r}")
    if not named and (table is not None or not files):
        raise ValueError(f"evaluate: methods must be given{' for a table' if table else ', or results'}, got none")
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate: limit must be at least 1 or None, got {limit}")


def _repeat_threshold(
    threshold: float | Sequence[float] | None, count: int, *, optional: bool
) -> Sequence[float | None]:
    """Return the threshold of each method; None may stand for a default where it is optional."""
    if threshold is None:
        if not optional:
            raise ValueError("evaluate: threshold must be given with another mode than fit, got None")
        return [None] * count
    thresholds = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
    if not all(0 < value <= 1 for value in thresholds):
        raise ValueError(f"evaluate: threshold must be above 0 and at most 1, got {thresholds}")
    if len(thresholds) not in (1, count or 1):
        raise ValueError(f"evaluate: threshold must be one, or one for each of {count} methods, got {len(thresholds)}")
    return thresholds if len(thresholds) == count else thresholds * count


def _read_results(files: Mapping[str, Path], baseline: str | Path | None, skip_bad: bool) -> dict[str, Annotations]:
    """Read the baseline, if there is one, and the files of results, in this order."""
    annotations: dict[str, Annotations] = {}
    if baseline is not None:
        name = Path(baseline).stem
        if name in files:
            raise ValueError(f"evaluate: results must have other names than the baseline, got {name}")
        annotations[name] = coco.read_annotations(baseline, results=True, skip_bad=skip_bad)
        if isinstance(annotations[name], coco.Panoptic):
            raise ValueError(f"evaluate: baseline must be a file of masks, got panoptic segments in '{baseline}'")
    for name, file in files.items():
        annotations[name] = coco.read_annotations(file, results=True, skip_bad=skip_bad)
    return annotations


def _open_methods(named: Sequence[tuple[str | None, Any]], device: str | None) -> list[Method]:
    """Open the methods; their names, and files named after them, must differ."""
    methods = [open_method(spec, name=name, device=device) for name, spec in named]
    names = [method.name for method in methods]
    if len({method.slug for method in methods}) < len(methods):
        raise ValueError(f"evaluate: methods must have different names, such as NAME=SPEC, got {', '.join(names)}")
    return methods


def _select_photos(
    dataset: DataSet, methods: Sequence[Method], limit: int | None, skip_bad: bool
) -> tuple[list[Photo], list[str]]:
    """Return the photos to score, and notes of what is left out, which are logged, too."""
    photos, problems, notes = run.check_photos(dataset.photos[:limit], methods)
    problems, notes = dataset.problems + problems, dataset.notes + notes
    for note in notes:
        LOGGER.warning(note)
    if problems and not skip_bad:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n  ".join(problems)
        raise ValueError(
            f"evaluate: data must be free of problems, got {count}; skip_bad leaves these images out:\n  {lines}"
        )
    return photos, notes + problems


def _describe_left_out(annotations: Mapping[str, Annotations]) -> list[str]:
    """Return a note for each result that was left out, and log it."""
    instances = {name: entry for name, entry in annotations.items() if isinstance(entry, coco.Instances)}
    notes = [f"left out of {name}: {line}" for name, entry in instances.items() for line in entry.left_out]
    for note in notes:
        LOGGER.warning(note)
    return notes


def _score_method(
    photos: Sequence[Photo], method: Method, folder: Path, distance: float, suppression: str
) -> EdgeScores:
    """Return the scores of a method's edge maps; counts are kept in a folder."""
    counts = run.count_all(photos, method, folder, distance=distance, suppression=suppression)
    return score_edges(counts, resamples=RESAMPLES)


def _score_panoptic(annotations: Mapping[str, Annotations], dataset: DataSet) -> dict[str, PanopticScores]:
    """Return the scores of those results that are panoptic segments."""
    segments = {name: entry for name, entry in annotations.items() if isinstance(entry, coco.Panoptic)}
    if segments and dataset.panoptic is None:
        raise ValueError(
            f"evaluate: truth must be a JSON file of panoptic segments for the results {', '.join(segments)}, "
            f"got {dataset.photos[0].truth if dataset.photos else 'no photos'}"
        )
    return {name: panoptic_quality(dataset.panoptic, entry) for name, entry in segments.items() if dataset.panoptic}


def _score_masks(
    photos: Sequence[Photo],
    annotations: Mapping[str, Annotations],
    refining: Sequence[tuple[Method, float | None]],
    mode: str,
    folder: Path,
) -> dict[str, MaskScores]:
    """Return the scores of those results that are masks, and of the first refined by methods at a threshold each."""
    masks = {name: entry for name, entry in annotations.items() if isinstance(entry, coco.Instances)}
    if not masks:
        return {}
    truth = run.read_truth(photos)
    masks = {name: _select_images(name, entry, truth) for name, entry in masks.items()}
    first = next(iter(annotations))
    for method, threshold in refining:
        masks[f"{first} + {method.name}"] = refine_all(
            photos, truth, masks[first], method, folder, threshold=threshold, mode=mode
        )
    return {name: mask_ap(truth, entry, resamples=RESAMPLES) for name, entry in masks.items()}


def _select_images(name: str, results: coco.Instances, truth: coco.Instances) -> coco.Instances:
    """Return the results of those images that the truth has."""
    images = {number: image for number, image in results.images.items() if number in truth.images}
    # a detector that finds nothing has results, too: their AP is 0
    if results.images and not images:
        raise ValueError(f"evaluate: results must be of these photos, got none of their ids in '{name}'")
    return coco.Instances(images, {})
