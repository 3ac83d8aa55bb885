"""Edges as pictures: PNG files, overlays, side-by-side panels, and the KL curve of a trace.

Every file is written beside its final place and moved there whole: a write that fails or is interrupted leaves what
was there before.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.io.arrays import array_to_tensor, mask_areas, mask_boxes
from trace_fast.io.files import write_atomically
from trace_fast.io.images import read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from trace_fast.io.images import ImageLike
    from trace_fast.tracer import TraceOutput

__all__ = ["draw_masks", "overlay", "panel", "plot_curve", "write_picture", "write_png"]

# magenta is rare in photographs, and no grey competes with it
_COLOUR = (1.0, 0.0, 0.6)
# of PNG files: half the time of the usual 6, for 3 to 9 % more bytes; other formats ignore it
_LEVEL = 3


def write_png(path: str | os.PathLike[str], edges: np.ndarray | Tensor, bits: int = 8) -> None:
    """Write edges as a greyscale PNG file: black is 0, white is 1, rounded to the nearest level.

    Args:
        path: the file, ending in .png; replaced if it exists.
        edges: (H, W), (1, H, W) or (1, 1, H, W) float in [0, 1], array or tensor on any device.
        bits: 8 (256 levels) or 16 (65536 levels, for thresholds finer than 1/255).

    Raises:
        TypeError: edges is no float array or tensor.
        ValueError: shape, range, bits or ending; a batch has one file per image.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> write_png("photo_edges.png", trace_fast.edges("photo.jpg"), bits=16)
    """
    if bits not in (8, 16):
        raise ValueError(f"write_png: bits must be 8 or 16, got {bits!r}")
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"write_png: path must end in .png, got '{path}'")
    planes = _to_planes(edges, "write_png")
    if len(planes) != 1:
        raise ValueError(f"write_png: edges must be of one image, got {len(planes)}: write one file for each")

    from PIL import Image

    levels = np.rint(planes[0].double().numpy() * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    with write_atomically(path, "write_png") as file:
        Image.fromarray(levels).save(file, format="PNG", compress_level=_LEVEL)


def write_picture(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a PIL image, such as an overlay or a panel, in the format its ending names.

    Args:
        path: the file, with an ending Pillow knows; replaced if it exists.
        picture: what to write.

    Raises:
        ValueError: Pillow does not know the ending of path.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> write_picture("photo_overlay.png", overlay("photo.jpg", edges))
    """
    from PIL import Image

    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"write_picture: path must have the ending of a picture format, got '{path}'")
    with write_atomically(path, "write_picture") as file:
        picture.save(file, format=kind, compress_level=_LEVEL)


def overlay(image: ImageLike, edges: np.ndarray | Tensor) -> Any:
    """Draw edges over their photo in magenta; the photo is dimmed and half drained of its colour, so that they read.

    Args:
        image: anything `trace_fast.edges` takes, except a list.
        edges: (H, W), (B, H, W) or (B, 1, H, W) float in [0, 1], array or tensor, of the image's size; an edge of
            strength e covers the photo with opacity e.

    Returns:
        PIL image of mode RGB and the photo's size; a list of B for a (B, C, H, W) tensor.

    Raises:
        TypeError: a kind or dtype of image or edges that is not accepted.
        ValueError: edges differ from the image in number or size, or are outside [0, 1].

    Example:
        >>> write_picture("photo_overlay.png", overlay("photo.jpg", trace_fast.edges("photo.jpg")))
    """
    photo = read_image(image).cpu()
    opacity = _to_planes(edges, "overlay")[:, None]
    if opacity.shape[0] != photo.shape[0] or opacity.shape[2:] != photo.shape[2:]:
        raise ValueError(
            f"overlay: edges must be of the image's number and size, {_spell(photo)}, got {_spell(opacity)}"
        )
    grey = photo.mean(dim=1, keepdim=True)
    colour = torch.tensor(_COLOUR, dtype=torch.float32, device="cpu").reshape(1, 3, 1, 1)
    pictures = _to_pil(torch.lerp(0.75 * (photo + grey) / 2, colour, opacity))
    return pictures if isinstance(image, Tensor) and image.ndim == 4 else pictures[0]


def draw_masks(image: ImageLike, masks: np.ndarray | Tensor) -> Image.Image:
    """Draw masks over their photo, each in a colour of its own with a white outline; smaller ones lie on top.

    Args:
        image: anything `trace_fast.edges` takes, except a list or a batch.
        masks: (M, H, W) bool, array or tensor on any device, of the image's size.

    Returns:
        PIL image of mode RGB and the photo's size.

    Raises:
        TypeError: masks is no bool array or tensor.
        ValueError: masks are not (M, H, W) of the image's size, or there is a batch.

    Example:
        >>> masks, _ = instances(trace_fast.edges("photo.jpg"), threshold=0.5)
        >>> write_picture("photo_masks.png", draw_masks("photo.jpg", masks))
    """
    photo = read_image(image).cpu()
    masks = masks if isinstance(masks, Tensor) else np.asarray(masks)
    kind = str(masks.dtype).removeprefix("torch.")
    if kind != "bool":
        raise TypeError(f"draw_masks: masks must be bool, got {kind}")
    stack = masks.cpu() if isinstance(masks, Tensor) else array_to_tensor(masks)
    if len(photo) != 1 or stack.ndim != 3 or stack.shape[1:] != photo.shape[2:]:
        raise ValueError(f"draw_masks: masks must be (M, H, W) of the image, {_spell(photo)}, got {tuple(stack.shape)}")
    # in place, and each mask in its box alone: copies of a large photo are what would take time and memory
    picture = photo[0].add_(photo[0].mean(dim=0, keepdim=True)).div_(2)
    corners = mask_boxes(stack).tolist()
    for index in mask_areas(stack).argsort(descending=True, stable=True).tolist():
        left, top, right, bottom = corners[index]
        # and a pixel around, which makes its border an outline but where the photo ends
        rows, columns = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
        mask, place = stack[index, rows, columns], picture[:, rows, columns]
        # hues a golden ratio apart never come close soon
        colour = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.95)
        place.lerp_(torch.tensor(colour, dtype=torch.float32, device="cpu")[:, None, None], 0.55 * mask.float())
        place.masked_fill_(mask & ~_inside(mask), 1)
    return _to_pil(picture[None])[0]


def panel(images: Sequence[Any], titles: Sequence[str], height: int | None = None) -> Image.Image:
    """Set pictures side by side on white, each under its title.

    Args:
        images: pictures of any accepted kind; edges (H, W) count as grey ones.
        titles: one line of text for each; "" for none.
        height: of the pictures, in pixels; they are scaled to it, keeping their aspect. None takes the first one's.

    Returns:
        PIL image of mode RGB.

    Raises:
        ValueError: no images, a different number of titles, a batch among the images, or a height below 1.

    Example:
        >>> edges = trace_fast.edges("photo.jpg")
        >>> sheet = panel(["photo.jpg", edges, overlay("photo.jpg", edges)], ["photo", "edges", "overlay"])
    """
    if not images or len(images) != len(titles):
        raise ValueError(f"panel: titles must be one for each image, got {len(titles)} for {len(images)} images")
    if height is not None and height < 1:
        raise ValueError(f"panel: height must be at least 1, got {height}")

    from PIL import Image, ImageDraw, ImageFont

    photos = [read_image(image).cpu() for image in images]
    for photo in photos:
        if len(photo) != 1:
            raise ValueError(f"panel: images must be single pictures, got a batch of {len(photo)}")
    height = height or photos[0].shape[2]
    pictures = []
    for photo in photos:
        width = max(1, round(photo.shape[3] * height / photo.shape[2]))
        pictures.append(_to_pil(photo)[0].resize((width, height), Image.Resampling.LANCZOS))

    # everything in proportion to the pictures
    text = max(10, height // 20)
    gap = text // 2
    font = ImageFont.load_default(text)
    columns = [
        max(picture.width, round(font.getlength(title))) for picture, title in zip(pictures, titles, strict=True)
    ]
    top = 2 * text if any(titles) else 0
    sheet = Image.new("RGB", (sum(columns) + gap * (len(columns) - 1), top + height), "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for picture, title, column in zip(pictures, titles, columns, strict=True):
        sheet.paste(picture, (left + (column - picture.width) // 2, top))
        draw.text((left + column // 2, top // 2), title, fill="black", font=font, anchor="mm")
        left += column + gap
    return sheet


def plot_curve(output: TraceOutput, path: str | os.PathLike[str] | None = None) -> Figure:
    """Plot the KL curve of a trace, with the level whose map was read, t*, marked on it.

    A point at t is KL(SA(X_prev) || SA(X_t)), the change from the level visited before. One line for each image.

    Args:
        output: a trace whose `kl` is kept.
        path: a picture file to write (.png, .pdf, .svg: what matplotlib knows), or None to write none.

    Returns:
        The matplotlib figure.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: output has no KL curve, or matplotlib does not know the ending of path.

    Example:
        >>> plot_curve(Tracer.from_pretrained()("photo.jpg", return_kl=True), "photo_curve.png")
    """
    if output.kl is None:
        raise ValueError("plot_curve: output must hold a KL curve, got kl=None; trace with return_kl=True")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plot_curve: needs matplotlib: pip install matplotlib") from error

    levels = output.timesteps[1:].tolist()  # a step belongs to its noisier end
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="timestep t", ylabel="KL(previous || t), nats")
    axes.set_title(f"{output.model}, {output.noising}", fontsize="medium")
    for index, (read, curve) in enumerate(zip(output.timestep.tolist(), output.kl.tolist(), strict=True)):
        peak = max(range(len(curve)), key=curve.__getitem__)
        name = f"t* = {levels[peak]}" if len(output.kl) == 1 else f"image {index}, t* = {levels[peak]}"
        (line,) = axes.plot(levels, curve, marker=".", label=name)
        axes.plot(levels[peak], curve[peak], marker="o", markersize=9, color=line.get_color())
        label = None if read == levels[peak] else f"read at {read}"
        axes.axvline(read, color=line.get_color(), linestyle=":", label=label)
    if len(output.kl) <= 10:  # beyond that a legend hides the curves
        axes.legend()
    if path is not None:
        with write_atomically(path, "plot_curve") as file:
            figure.savefig(file, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=150)
    return figure


def _to_planes(edges: np.ndarray | Tensor, op: str) -> Tensor:
    """Edges in any of their shapes as (B, H, W) float32 on the CPU, checked to lie in [0, 1]."""
    if not isinstance(edges, (np.ndarray, Tensor)):
        raise TypeError(f"{op}: edges must be an array or a tensor, got {type(edges).__name__}")
    if not (edges.is_floating_point() if isinstance(edges, Tensor) else edges.dtype.kind == "f"):
        raise TypeError(f"{op}: edges must be float, got {edges.dtype}")
    if isinstance(edges, Tensor):
        planes = edges.detach().to("cpu", torch.float32)
    else:
        # a copy in native byte order with positive strides, which is what torch takes
        planes = torch.from_numpy(np.array(edges, dtype=np.float32, order="C"))
    shape = tuple(planes.shape)
    if planes.ndim == 4 and shape[1] == 1:
        planes = planes[:, 0]
    elif planes.ndim == 2:
        planes = planes[None]
    if planes.ndim != 3 or planes.numel() == 0:
        raise ValueError(f"{op}: edges must be (H, W), (B, H, W) or (B, 1, H, W), none of them 0, got shape {shape}")
    low, high = (bound.item() for bound in planes.aminmax())
    # one comparison that a NaN fails too; resampling may overshoot by a rounding error
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise ValueError(f"{op}: edges must be finite and in [0, 1], got values from {low:g} to {high:g}")
    return planes.clamp(0, 1)


def _inside(mask: Tensor) -> Tensor:
    """The pixels of a mask (H, W) bool whose eight neighbours, as far as there are any, belong to it, too."""
    for axis in (0, 1):
        steps, kept = mask.shape[axis] - 1, mask.clone()
        kept.narrow(axis, 1, steps).logical_and_(mask.narrow(axis, 0, steps))
        kept.narrow(axis, 0, steps).logical_and_(mask.narrow(axis, 1, steps))
        mask = kept
    return mask


def _to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] to B PIL images of mode RGB."""
    from PIL import Image

    pixels = pictures.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _spell(planes: Tensor) -> str:
    count, _, height, width = planes.shape
    return f"{count} of {height} x {width}"
