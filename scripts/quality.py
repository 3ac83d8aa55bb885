"""Quality of the instance edges of an embedded model: every figure, table and picture, from one command.

    python scripts/quality.py --data ../shared/data/dev_coco -o build/quality

Truth: instance maps are resized to 256 x 256 (nearest neighbor); a pixel is on a boundary where a 4-neighbor has
another label and neither is a crowd; boundaries are dilated by 2 % of the side in all (3 pixels each way). A cell of
the 32 x 32 grid is positive where at least half of it is covered. Cells that a dilated crowd touches are left out, and
so are photos without a positive cell. Panoptic segments are treated alike; unlabeled pixels count as one more segment.
Every map is averaged to the same grid. Nothing is thinned or matched: these figures are not those of the ODS/OIS
benchmark of edges.

Figures: per photo, average precision (AP) and the best F over thresholds (OIS), averaged over photos; over the cells of
all photos, the best F of one threshold (ODS). Brackets hold 95 % of 1,000 bootstrap resamples of the photos. Gaps to
the control are paired by photo, with the standard error of the mean.

The control is the exact analog of ABDiv with attention rows replaced by colors: of the photo resized to the model's own
token grid, the absolute RGB difference of opposite neighbors, summed over both axes. The gain of a model is its gap.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from PIL import Image
from skimage import color, feature, filters
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import trace_fast
from trace_fast.backbones.base import NOISINGS
from trace_fast.backbones.mini import Mini, MiniBackbone
from trace_fast.io.images import read_image, resize
from trace_fast.tracer import TIMESTEPS, Tracer

GRID = 32  # cells per side that every method is scored on
SIDE = 256  # side of the squashed label maps, in pixels
GROWTH = 3  # pixels a boundary grows each way: 2 % of the side in all
CROWD = 65535
THRESHOLDS = 512  # quantiles of the pooled scores that ODS tries
RESAMPLES, SEED = 1000, 0
BATCH, SHEET = 4, 12  # photos in one scan, and on the contact sheet
CANDIDATES = (0, 99, 199, 299)  # timesteps of which block subsets, random weights and checkpoints take their best
CONTROL, SOBEL, PIDINET = "color difference (control)", "Sobel, 128 px", "PiDiNet, native size"
CEILING, DEFAULT = "ground truth itself (ceiling)", "ABDiv, as the settings of the model say"


def boundaries(labels: Tensor) -> Tensor:
    """Return the pixels of an integer map (h, w) with a 4-neighbor of another label; borders of crowds do not count."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    for values, marked in ((labels, edge), (labels.T, edge.T)):
        differs = (values[1:] != values[:-1]) & (values[1:] != CROWD) & (values[:-1] != CROWD)
        marked[1:] |= differs
        marked[:-1] |= differs
    return edge


def target(labels: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cells (GRID, GRID) of a label map (SIDE, SIDE): positive (bool), valid (bool), share of thin boundary."""
    cell = SIDE // GRID
    thin = torch.stack([boundaries(labels), labels == CROWD])[:, None].float()
    grown = functional.max_pool2d(thin, 2 * GROWTH + 1, stride=1, padding=GROWTH)
    edge, crowd = functional.avg_pool2d(grown, cell)[:, 0].numpy()
    return (edge >= 0.5) & (crowd == 0), crowd == 0, functional.avg_pool2d(thin, cell)[0, 0].numpy()


@dataclass
class Truth:
    """Cells of n photos, (n, GRID * GRID) each: positive and valid (bool), share of thin boundary (the ceiling)."""

    positive: np.ndarray
    valid: np.ndarray
    thin: np.ndarray

    @classmethod
    def read(cls, folder: Path, ids: list[int]) -> Truth:
        """Read the targets of the label maps `<id>.png` in a folder, ids padded to 12 digits."""
        paths = [folder / f"{id_:012d}.png" for id_ in ids]
        labels = [np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.NEAREST)) for path in paths]
        cells = [target(torch.from_numpy(image.astype(np.int64))) for image in labels]
        return cls(*(np.stack(maps).reshape(len(paths), -1) for maps in zip(*cells, strict=True)))


def ap_and_best_f(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Return average precision (sum over thresholds of precision times gain in recall) and best F of (cells,)."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # equal scores are taken or left together
    detected, hits, total = last + 1, hits[last], hits[-1]
    return (hits / detected * np.diff(hits, prepend=0)).sum() / total, (2 * hits / (detected + total)).max()


def per_photo(scores: np.ndarray, truth: Truth) -> np.ndarray:
    """Return AP and best F of every photo, (2, n); scores are (n, cells)."""
    rows = zip(scores, truth.positive, truth.valid, strict=True)
    return np.array([ap_and_best_f(row[valid], positive[valid]) for row, positive, valid in rows]).T


def pooled_best_f(scores: np.ndarray, truth: Truth, weights: np.ndarray) -> np.ndarray:
    """Return the best F of one threshold for all photos, (R,), weighted by (R, n); scores are (n, cells)."""
    thresholds = np.unique(np.quantile(scores[truth.valid], np.linspace(0, 1, THRESHOLDS, endpoint=False)))
    passed = np.searchsorted(thresholds, scores, side="right")  # how many thresholds a cell reaches

    def above(mask: np.ndarray) -> np.ndarray:
        rows = zip(passed, mask, strict=True)
        counts = [np.bincount(row[use], minlength=len(thresholds) + 1) for row, use in rows]
        return np.cumsum(np.array(counts)[:, ::-1], 1)[:, ::-1][:, 1:]  # (n, thresholds)

    detected, hits, total = above(truth.valid), above(truth.positive), truth.positive.sum(1)
    return (2 * (weights @ hits) / (weights @ detected + (weights @ total)[:, None])).max(1)


def measure(scores: np.ndarray, truth: Truth, control: np.ndarray) -> dict[str, Any]:
    """Return every figure of a method; its scores and those of the control are (n, cells)."""
    (ap, ois), count = per_photo(scores, truth), len(scores)
    resampled = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), resampled])  # the photos as they are, then the resamples
    draws = {"ap": weights @ ap / count, "ois": weights @ ois / count, "ods": pooled_best_f(scores, truth, weights)}
    figures = {name: float(values[0]) for name, values in draws.items()}
    intervals = {f"{name}_interval": np.percentile(values[1:], [2.5, 97.5]).tolist() for name, values in draws.items()}
    gap = ap - per_photo(control, truth)[0]
    return figures | intervals | {"gap": float(gap.mean()), "gap_error": float(gap.std(ddof=1) / count**0.5)}


def to_grid(maps: Tensor) -> np.ndarray:
    """Average maps (n, h, w) to (n, GRID * GRID); interpolate those that are coarser."""
    pool = resize if maps.shape[-1] < GRID else functional.adaptive_avg_pool2d
    return pool(maps[:, None], (GRID, GRID)).flatten(1).numpy()


def color_difference(image: Tensor) -> Tensor:
    """Return |right - left| + |below - above| over the channels, (B, 3, h, w) to (B, h, w), clamped to the grid."""
    padded = functional.pad(image, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    along = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return (across.abs() + along.abs()).sum(1)


def classic_maps(photo: Tensor, pidinet: np.ndarray, tokens: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the maps of a photo (1, 3, H, W), on the grid, that need no diffusion model; `pidinet` is (H, W)."""
    sizes = (128, 128), (SIDE, SIDE), photo.shape[-2:]
    small, middle, native = (color.rgb2gray(resize(photo, size)[0].numpy(), channel_axis=0) for size in sizes)
    marks = [feature.canny(middle, 1, 0.4 * high, high) for high in 0.05 * np.arange(1, 7)]
    maps = {
        CONTROL: color_difference(resize(photo, tokens))[0].numpy(),
        "Canny, 256 px, six thresholds averaged": filters.gaussian(np.mean(marks, 0), 2),
        "Sobel, native size": filters.sobel(native),
        SOBEL: filters.sobel(small),
        PIDINET: pidinet / 255,
    }
    return {name: to_grid(torch.from_numpy(values)[None].float())[0] for name, values in maps.items()}


@dataclass
class Photos:
    """The photos in memory: images (n, 3, *size), targets, and maps (n, cells) of other methods by name."""

    ids: list[int]
    images: Tensor
    truth: Truth
    classics: dict[str, np.ndarray]
    panoptic: list[int]  # rows of the photos that have panoptic segments
    segments: Truth

    @classmethod
    def read(cls, data: Path, size: tuple[int, int], tokens: tuple[int, int], limit: int | None = None) -> Photos:
        """Read all photos, or `limit` of them evenly by id, without those that have no positive cell."""
        ids = sorted(entry["id"] for entry in json.loads((data / "manifest.json").read_text()))
        ids = [ids[row] for row in np.linspace(0, len(ids) - 1, min(limit or len(ids), len(ids))).round().astype(int)]
        used = Truth.read(data / "inst", ids).positive.any(1)
        ids = np.array(ids)[used].tolist()
        truth = Truth.read(data / "inst", ids)
        images, classics = [], []
        for id_ in tqdm(ids, desc="photos"):
            photo = read_image(data / f"images/{id_:012d}.jpg")
            images.append(resize(photo, size))
            pidinet = np.asarray(Image.open(data / f"pidinet/{id_:012d}.png"))
            classics.append(classic_maps(photo, pidinet, tokens))
        stacked = {name: np.stack([maps[name] for maps in classics]) for name in classics[0]}
        random = np.random.default_rng(SEED).random(truth.thin.shape)
        peers = {"chance, random numbers": random} | stacked | {CEILING: truth.thin}
        rows = [row for row, id_ in enumerate(ids) if (data / f"panoptic/{id_:012d}.png").exists()]
        segments = Truth.read(data / "panoptic", [ids[row] for row in rows])
        return cls(ids, torch.cat(images), truth, peers, rows, segments)


def scan(tracer: Tracer, images: Tensor, label: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scan in batches; return KL curves (n, T - 1) and maps on the grid (T, n, cells)."""
    curves, maps = [], []
    for batch in tqdm(images.split(BATCH), desc=label, unit="batch"):
        kl, abdiv = tracer.scan(batch, **options)
        curves.append(kl.cpu().numpy())
        maps.append(to_grid(abdiv.flatten(0, 1).cpu()).reshape(*abdiv.shape[:2], -1))
    return np.concatenate(curves), np.concatenate(maps).swapaxes(0, 1)


def trace(tracer: Tracer, photos: Photos) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return maps (n, cells) of every way to read the model, by name, and findings about its KL curves."""
    images, backbone, settings = photos.images, tracer.backbone, tracer.backbone.settings
    batches = tqdm(images.split(BATCH), desc="settings of the model", unit="batch")
    rows = {DEFAULT: np.concatenate([to_grid(tracer(batch, return_abdiv=True).abdiv.cpu()) for batch in batches])}
    findings: dict[str, Any] = {"settings": vars(settings)}
    for noising in NOISINGS:
        curves, maps = scan(tracer, images, noising, noising=noising)
        chosen = curves.argmax(1) + 1  # the noisier map of the winning pair
        rows[f"ABDiv, {noising}, t*"] = maps[chosen, np.arange(len(chosen))]
        rows |= {f"ABDiv, {noising}, timestep {t}": maps[step] for step, t in enumerate(TIMESTEPS)}
        findings[noising] = {
            "best_timestep": TIMESTEPS[best_map(maps, photos.truth)],
            "interior_share": float(np.mean((chosen > 1) & (chosen < len(TIMESTEPS) - 1))),
            "t_star": {t: int((chosen == step).sum()) for step, t in enumerate(TIMESTEPS) if step},
            "kl": {"mean": curves.mean(0).tolist(), "percentiles_10_90": np.percentile(curves, [10, 90], 0).tolist()},
        }
    torch.manual_seed(SEED)
    untrained = Tracer(MiniBackbone(Mini(backbone.network.config), settings))
    every = list(range(len(backbone.attentions())))
    first, middle, last = (part.tolist() for part in np.array_split(every, 3))
    variants = {
        "first third of the blocks": (tracer, first),
        "middle third of the blocks": (tracer, middle),
        "last third of the blocks": (tracer, last),
        "all blocks": (tracer, every),
        "all blocks, random weights": (untrained, every),
    }
    for name, (which, subset) in variants.items():
        timestep, scores = scan_best(which, photos, name, blocks=subset)
        rows[f"ABDiv, gaussian, timestep {timestep}, {name}"] = scores
    return rows, findings


def scan_best(tracer: Tracer, photos: Photos, label: str, **options: Any) -> tuple[int, np.ndarray]:
    """Return the best of CANDIDATES with gaussian noising, and its maps (n, cells)."""
    _, maps = scan(tracer, photos.images, label, timesteps=CANDIDATES, noising="gaussian", **options)
    best = best_map(maps, photos.truth)
    return CANDIDATES[best], maps[best]


def best_map(maps: np.ndarray, truth: Truth) -> int:
    """Return the index of the map with the highest mean AP, of maps (T, n, cells)."""
    return int(np.argmax([per_photo(scores, truth)[0].mean() for scores in maps]))


def scaling(folder: Path, photos: Photos) -> list[dict[str, Any]]:
    """Return the figures of every checkpoint `images-*`, each at its best timestep."""
    points = []
    for path in sorted(folder.glob("images-*")):
        timestep, scores = scan_best(Tracer.from_pretrained(path), photos, path.name)
        figures = measure(scores, photos.truth, photos.classics[CONTROL])
        points.append({"images": int(path.name.removeprefix("images-")), "timestep": timestep} | figures)
    return points


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| | AP | OIS | ODS | AP minus control |", "|---|---|---|---|---|"]
    for name, figures in rows.items():
        line = f"| {name}"
        for key in ("ap", "ois", "ods"):
            line += " | {:.3f} [{:.3f}, {:.3f}]".format(figures[key], *figures[f"{key}_interval"])
        lines.append(f"{line} | {figures['gap']:+.3f} ± {figures['gap_error']:.3f} |")
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """Return the whole report as Markdown."""
    tracing, methods = report["tracing"], report["methods"]
    best = [f"ABDiv, {noising}, timestep {tracing[noising]['best_timestep']}" for noising in NOISINGS]
    short = [name for name in methods if name in best or not re.fullmatch(r"ABDiv, \w+, timestep \d+", name)]
    parts = [
        f"# Quality of `{report['model']}`\n\n## Instance boundaries, {report['photos']} photos",
        table({name: methods[name] for name in short}),
        f"The best timesteps are chosen on these photos.\n\n## Panoptic boundaries, {report['panoptic_photos']} photos",
        table({name: report["panoptic"][name] for name in short}),
        "## Timesteps",
        table({name: methods[name] for name in methods if name not in short or name in best}),
    ]
    for noising in NOISINGS:
        share = tracing[noising]["interior_share"]
        parts.append(f"With {noising} noising, t* lies strictly inside the grid on {share:.1%} of the photos.")
    if report["scaling"]:
        rows = {f"{point['images']:,} images, timestep {point['timestep']}": point for point in report["scaling"]}
        parts += ["## Scaling: the best timestep of each checkpoint", table(rows)]
    where = ", ".join(f"{name} {value}" for name, value in (report["machine"] | report["versions"]).items())
    return "\n\n".join([*parts, f"Made by `{report['command']}`; commit {report['commit']}; {where}.\n"])


def plot_kl(tracing: dict[str, Any], path: Path) -> None:
    """Draw the mean KL curve with the 10 to 90 % band of the photos, and how often each timestep is t*."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for offset, noising in zip((-18, 18), NOISINGS, strict=True):
        kl, counts = tracing[noising]["kl"], tracing[noising]["t_star"]
        left.plot(TIMESTEPS[1:], kl["mean"], "o-", label=noising)
        left.fill_between(TIMESTEPS[1:], *kl["percentiles_10_90"], alpha=0.2, linewidth=0)
        right.bar([timestep + offset for timestep in counts], counts.values(), 36, label=noising)
    left.set(xlabel="timestep t", ylabel="KL(SA(previous) || SA(t)), nats", yscale="log", xticks=TIMESTEPS[1:])
    right.set(xlabel="t*", ylabel="photos", xticks=TIMESTEPS[1:])
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_scaling(points: list[dict[str, Any]], path: Path) -> None:
    """Draw the gap to the control over the number of training images."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    errors = [1.96 * point["gap_error"] for point in points]
    axes.errorbar([p["images"] for p in points], [p["gap"] for p in points], errors, fmt="o-", capsize=3)
    axes.axhline(0, color="gray", linestyle="--")
    axes.set(xscale="log", xlabel="training images", ylabel="AP of ABDiv minus AP of the control (95 %)")
    figure.savefig(path, dpi=120)


def plot_sheet(photos: Photos, columns: dict[str, np.ndarray], path: Path) -> None:
    """Draw photos evenly by id, in two halves side by side; black is the 98th percentile of a method."""
    rows = np.linspace(0, len(photos.ids) - 1, min(SHEET, len(photos.ids))).round().astype(int)
    height, width = -(-len(rows) // 2), len(columns) + 1
    size = (3.2 * width, 1.65 * height)
    figure, grid = pyplot.subplots(height, 2 * width, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for position, row in enumerate(rows):
        tiles = grid[position % height, position // height * width :]
        tiles[0].imshow(photos.images[row].permute(1, 2, 0).clamp(0, 1))
        for tile, scores in zip(tiles[1:width], columns.values(), strict=True):
            tile.imshow(scores[row].reshape(GRID, GRID), cmap="gray_r", vmin=0, vmax=np.percentile(scores, 98))
    for column, label in enumerate(["photo", *columns] * 2):
        grid[0, column].set_title(label, fontsize=11)
    figure.savefig(path, dpi=100)


def provenance() -> dict[str, Any]:
    """Return the command, commit, machine and versions of this run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    processor = [*re.findall(r"model name\s*: (.*)", info), platform.processor()][0]
    return {
        "command": shlex.join(["python", "scripts/quality.py", *sys.argv[1:]]),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": {"processor": processor, "threads": torch.get_num_threads()},
        "versions": {"trace_fast": trace_fast.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "seed": SEED,
        "protocol": __doc__,
    }


def main() -> None:
    """Score every method and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with manifest.json, images, inst, panoptic and pidinet")
    add("--model", default="mini", help="name, or folder with config.json and model.safetensors")
    add("--checkpoints", type=Path, help="folder of checkpoints images-*, for the scaling curve")
    add("--limit", type=int, help="number of photos to use, evenly by id")
    add("-o", "--output", type=Path, default=Path("build/quality"))
    options = parser.parse_args()
    if options.limit is not None and options.limit < SHEET:
        parser.error(f"quality: limit must be at least {SHEET}, got {options.limit}")

    origin = provenance()  # before the work: the tree may change meanwhile
    tracer = Tracer.from_pretrained(options.model)
    size = tracer.backbone.settings.size
    photos = Photos.read(options.data, size, tracer.backbone.grid(size), options.limit)
    traced, tracing = trace(tracer, photos)
    maps = photos.classics | traced
    segments = {name: scores[photos.panoptic] for name, scores in maps.items()} | {CEILING: photos.segments.thin}
    report = origin | {
        "model": options.model,
        "photos": len(photos.ids),
        "panoptic_photos": len(photos.panoptic),
        "methods": {name: measure(scores, photos.truth, maps[CONTROL]) for name, scores in maps.items()},
        "panoptic": {name: measure(scores, photos.segments, segments[CONTROL]) for name, scores in segments.items()},
        "tracing": tracing,
        "scaling": scaling(options.checkpoints, photos) if options.checkpoints else [],
    }

    output, noising = options.output, tracer.backbone.settings.noising
    output.mkdir(parents=True, exist_ok=True)
    (output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "quality.md").write_text(markdown(report))
    plot_kl(tracing, output / "kl.png")
    if report["scaling"]:
        plot_scaling(report["scaling"], output / "scaling.png")
    names = {"Sobel": SOBEL, "PiDiNet": PIDINET, "ours": DEFAULT, "ours, t*": f"ABDiv, {noising}, t*"}
    columns = {"ground truth": photos.truth.thin} | {label: maps[name] for label, name in names.items()}
    plot_sheet(photos, columns, output / "contact_sheet.png")
    print(markdown(report))


if __name__ == "__main__":
    main()
