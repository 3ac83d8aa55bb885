"""The contents of the page beside `trace_fast.scan`: the models, the attention of a token, and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from trace_fast.api import load
from trace_fast.backbones.loading.sources import Kind, find_source
from trace_fast.detector import Detector
from trace_fast.io import visualize
from trace_fast.io.arrays import mask_areas
from trace_fast.io.images import resize
from trace_fast.masks import paint_labels, write_coco_results, write_palette
from trace_fast.tracer import Tracer

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Models", "draw_attention", "find_region", "write_files"]

MOST_LABELS = 254  # of a label map of 8 bits with a palette
POINT_COLOR = (0, 255, 255)


@dataclass(frozen=True)
class Models:
    """The search of a model, and its student where it has one.

    Attributes:
        tracer: the search.
        detector: the student; None without one.
    """

    tracer: Tracer
    detector: Detector | None

    @classmethod
    def load(cls, model: str | Path, **options: Any) -> Models:
        """Load what there is of a model; a student that comes without its base is searched with its own network.

        Args:
            model: see `trace_fast.load`.
            options: of `trace_fast.load`, without `stage`.

        Example:
            >>> Models.load("mini", device="cpu").detector
            Detector('mini', size=(128, 128), timestep=0, device='cpu', dtype=torch.float32)
        """
        loaded = load(model, **options)
        if isinstance(loaded, Tracer):
            return cls(loaded, None)
        if find_source(model).kind is Kind.STUDENT:
            return cls(Tracer(loaded.backbone, name=loaded.name), loaded)
        return cls(Tracer.from_pretrained(model, **options), loaded)


def find_region(masks: Tensor, row: int, column: int) -> Tensor | None:
    """Return the smallest mask that holds a pixel, (H, W) bool; None where no mask does.

    Args:
        masks: (M, H, W) bool.
        row: of the pixel, from 0.
        column: of the pixel, from 0.

    Example:
        >>> masks = torch.ones(2, 3, 5, dtype=torch.bool)
        >>> masks[1, :, 2:] = False
        >>> int(find_region(masks, 0, 1).sum()), int(find_region(masks, 0, 4).sum())
        (6, 15)
    """
    holding = masks[masks[:, row, column]]
    return holding[int(mask_areas(holding).argmin())] if len(holding) else None


def draw_attention(
    tracer: Tracer, photo: Tensor, masks: Tensor, timestep: int, row: int, column: int, seed: int = 0
) -> tuple[Image.Image, str]:
    """Draw what the token of a pixel attends to over a photograph, and the outline of the region of the pixel.

    Args:
        tracer: the search, which runs once.
        photo: (1, 3, H, W) float32 in [0, 1].
        masks: (M, H, W) bool, the regions.
        timestep: to which the photograph is brought by Gaussian noise.
        row: of the pixel, from 0.
        column: of the pixel, from 0.
        seed: seed of the noise.

    Returns:
        The picture, in which the strongest attention is brightest, and a sentence on it.

    Example:
        >>> tracer, masks = Tracer.from_pretrained("mini", device="cpu"), torch.zeros(0, 48, 64, dtype=torch.bool)
        >>> picture, text = draw_attention(tracer, torch.rand(1, 3, 48, 64), masks, 99, 20, 50)
        >>> picture.size, text
        ((64, 48), 'Token (13, 25) of 32 x 32 at t = 99. It lies in no region.')
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    height, width = photo.shape[-2:]
    grid = tracer.backbone.finest_grid()
    token = [row * grid[0] // height, column * grid[1] // width]
    attention = tracer.attention(photo, timestep=timestep, seed=seed)[0, token[0] * grid[1] + token[1]].cpu()
    heat = resize((attention / attention.max()).view(1, 1, *grid).expand(-1, 3, -1, -1), (height, width))[0, 0]
    color = torch.from_numpy(colormaps["inferno"](heat.clamp(0, 1).numpy())[..., :3])
    pixels = 0.35 * photo[0].cpu().permute(1, 2, 0).mean(-1, keepdim=True) + 0.65 * color
    region = find_region(masks, row, column)
    if region is not None:
        outline = functional.max_pool2d(region[None].float(), 3, 1, 1)[0].bool() & ~region
        pixels[outline] = torch.tensor(POINT_COLOR, dtype=pixels.dtype) / 255
    picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
    radius = max(3, max(height, width) // 150)
    circle = [(column - radius, row - radius), (column + radius, row + radius)]
    ImageDraw.Draw(picture).ellipse(circle, outline=POINT_COLOR, width=max(1, radius // 3))
    inside = "no region" if region is None else f"a region of {float(region.float().mean()):.1%} of the photograph"
    share = 0.0 if region is None else float(attention[_shrink(region, grid)].sum())
    return picture, (
        f"Token ({token[0]}, {token[1]}) of {grid[0]} x {grid[1]} at t = {timestep}. It lies in {inside}"
        + (f", which gets {share:.0%} of its attention." if region is not None else ".")
    )


def write_files(folder: Path, name: str, edges: Tensor, masks: Tensor, scores: Tensor) -> list[Path]:
    """Write the edges as a PNG of 16 bits, the masks as a label map, and as COCO results with RLE.

    Args:
        folder: exists.
        name: of the files, before their endings.
        edges: (H, W) float in [0, 1].
        masks: (M, H, W) bool.
        scores: (M,) float.

    Returns:
        The files. There is no label map of more masks than 8 bits have room for.

    Example:
        >>> masks, scores = instances(edges, threshold=0.5)  # doctest: +SKIP
        >>> write_files(Path("out"), "photo", edges, masks, scores)  # doctest: +SKIP
    """
    files = [folder / f"{name}_edges.png", folder / f"{name}_coco.json"]
    visualize.write_png(files[0], edges, 16)
    write_coco_results(files[1], [(1, masks.cpu(), scores.cpu())])
    if len(masks) <= MOST_LABELS:
        files.append(folder / f"{name}_labels.png")
        write_palette(files[-1], paint_labels(masks).cpu().numpy())
    return files


def _shrink(region: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the tokens (h * w,) bool whose centers lie in a region (H, W) bool."""
    return functional.interpolate(region[None, None].float(), grid, mode="nearest-exact")[0, 0].bool().flatten()
