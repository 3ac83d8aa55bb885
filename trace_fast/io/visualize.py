"""Pictures of results: PNG files of edges, overlays, masks, side-by-side panels, and the KL curve of a trace.

Files are written atomically: a write that fails or is interrupted leaves the file of before.
"""

from __future__ import annotations

import colorsys
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trace_fast.extras import require
from trace_fast.io.arrays import array_to_tensor, dtype_name, mask_areas, mask_boxes
from trace_fast.io.files import write_atomically
from trace_fast.io.images import read_edge_map, read_edge_maps, read_image
from trace_fast.ops import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from trace_fast.io.images import ImageLike
    from trace_fast.tracer import TraceOutput

__all__ = [
    "draw_edges",
    "draw_masks",
    "encode_picture",
    "encode_png",
    "grid",
    "overlay",
    "panel",
    "plot_curve",
    "plot_output",
    "show",
    "write_picture",
    "write_png",
]

# magenta is rare in photographs, and stands out from every gray
EDGE_COLOR = (1.0, 0.0, 0.6)
CACHED_PIXELS = 2**16  # of an image that is drawn in parts
PLOT_DPI = 150
SHOWN_HEIGHT = 320  # of the pictures of `show`, in pixels
# half the time of Pillow's default of 6, for 3 to 9 % more bytes
PNG_COMPRESSION = 3
# by bits of a pixel: runs alone are found in two thirds of the time, in fewer bytes; of 16 bits there are few runs
EDGE_COMPRESSION = {8: {"compress_level": 1, "compress_type": zlib.Z_RLE}, 16: {"compress_level": 1}}


def write_png(path: str | os.PathLike[str], edges: np.ndarray | Tensor, bits: int = 8) -> None:
    """Write the edges of one image as a grayscale PNG file: black is 0 and white is 1.

    Args:
        path: the file, ending in .png; replaced if it exists.
        edges: (H, W), (1, H, W) or (1, 1, H, W) float in [0, 1], array or tensor on any device.
        bits: 8 (256 levels) or 16 (65536 levels, for thresholds finer than 1/255); edges are rounded to the nearest
            level.

    Raises:
        TypeError: edges is not a float array or tensor.
        ValueError: edges have another shape or range or are of several images, or bits or the ending is another.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> write_png("photo_edges.png", trace_fast.edges("photo.jpg"), bits=16)
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"write_png: path must end in .png, got '{path}'")
    content = encode_png(edges, bits)
    with write_atomically(path, "write_png") as file:
        file.write(content)


def encode_png(edges: np.ndarray | Tensor, bits: int = 8) -> bytes:
    """Return the bytes of the file that `write_png` writes.

    Args:
        edges: see `write_png`.
        bits: see `write_png`.

    Raises:
        TypeError, ValueError: see `write_png`.

    Example:
        >>> encode_png(torch.rand(48, 64))[1:4]
        b'PNG'
    """
    checks.choice("write_png", "bits", bits, 8, 16)
    edge_map = read_edge_map("write_png", edges).cpu().numpy()

    from PIL import Image

    # an error of rounding of float32 would show in 16 bits
    levels = edge_map * np.float32(255) if bits == 8 else edge_map.astype(np.float64) * 65535
    picture = Image.fromarray(np.rint(levels).astype(np.uint8 if bits == 8 else np.uint16))
    return encode_picture(picture, "PNG", **EDGE_COMPRESSION[bits])


def encode_picture(picture: Image.Image, image_format: str, **options: Any) -> bytes:
    """Return the bytes of a file with a picture.

    Args:
        picture: in a mode that the format can store.
        image_format: name of the format in Pillow.
        options: of the format's writer.

    Raises:
        OSError: the format cannot store the picture.

    Example:
        >>> encode_picture(overlay("photo.jpg", edges), "PNG")[1:4]
        b'PNG'
    """
    file = io.BytesIO()
    # formats other than PNG ignore the compression level
    picture.save(file, format=image_format, **({"compress_level": PNG_COMPRESSION} | options))
    return file.getvalue()


def write_picture(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a PIL image, such as an overlay or a panel, in the format that the ending of its path names.

    Args:
        path: the file, with an ending that Pillow knows; replaced if it exists.
        picture: the image, in a mode that the format can store.

    Raises:
        ValueError: Pillow does not know the ending of path.
        OSError: the format cannot store the picture.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> write_picture("photo_overlay.png", overlay("photo.jpg", edges))
    """
    from PIL import Image

    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if image_format is None:
        raise ValueError(f"write_picture: path must have the ending of an image format, got '{path}'")
    content = encode_picture(picture, image_format)
    with write_atomically(path, "write_picture") as file:
        file.write(content)


def overlay(image: ImageLike, edges: np.ndarray | Tensor) -> Any:
    """Draw edges in magenta over their image, which is dimmed and half desaturated.

    Args:
        image: anything that `trace_fast.edges` takes, except a list.
        edges: (H, W), (B, H, W) or (B, 1, H, W) float in [0, 1], array or tensor, of the image's size; an edge of
            strength e covers the image with opacity e.

    Returns:
        PIL image of mode RGB and the image's size; a list of B for a (B, C, H, W) tensor.

    Raises:
        TypeError: image or edges have a type or dtype that is not accepted.
        ValueError: edges differ from the image in number or size, or are outside [0, 1].

    Example:
        >>> write_picture("photo_overlay.png", overlay("photo.jpg", trace_fast.edges("photo.jpg")))
    """
    photo = read_image(image).cpu()
    opacity = read_edge_maps("overlay", edges).cpu()[:, None]
    if opacity.shape[0] != photo.shape[0] or opacity.shape[2:] != photo.shape[2:]:
        raise ValueError(
            f"overlay: edges must be of the image's number and size, {_describe_size(photo)}, "
            f"got {_describe_size(opacity)}"
        )
    pictures = [draw_edges(pixels, one[0]) for pixels, one in zip(photo, opacity, strict=True)]
    return pictures if isinstance(image, Tensor) and image.ndim == 4 else pictures[0]


def draw_edges(photo: Tensor, opacity: Tensor) -> Image.Image:
    """Draw edges over an image, as `overlay` does, without a check or a copy of either.

    Args:
        photo: (3, H, W) float32 in [0, 1], on the CPU.
        opacity: (H, W) float32 in [0, 1], on the CPU.

    Returns:
        PIL image of mode RGB.

    Example:
        >>> draw_edges(torch.rand(3, 48, 64), torch.rand(48, 64)).size
        (64, 48)
    """
    from PIL import Image

    color = torch.tensor(EDGE_COLOR, dtype=torch.float32, device="cpu").reshape(3, 1, 1)
    _, height, width = photo.shape
    pixels = np.empty((height, width, 3), np.uint8)
    # rows that stay in the processor's cache: a pass over the memory of a large image takes longer than its arithmetic
    step = max(1, CACHED_PIXELS // width)
    for top in range(0, height, step):
        rows = slice(top, top + step)
        part = photo[:, rows]
        dimmed = (part + part.mean(dim=0, keepdim=True)).mul_(0.375)
        levels = dimmed.lerp_(color, opacity[rows]).mul_(255).round_().to(torch.uint8)
        pixels[rows] = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def draw_masks(image: ImageLike, masks: np.ndarray | Tensor) -> Image.Image:
    """Draw masks over their image, each in a different color with a white outline; smaller masks lie on top.

    Args:
        image: anything that `trace_fast.edges` takes, except a list or a batch.
        masks: (M, H, W) bool, array or tensor on any device, of the image's size.

    Returns:
        PIL image of mode RGB and the image's size.

    Raises:
        TypeError: masks is not a bool array or tensor.
        ValueError: masks are not (M, H, W) of the image's size, or image is a batch.

    Example:
        >>> masks, _ = instances(trace_fast.edges("photo.jpg"), threshold=0.5)
        >>> write_picture("photo_masks.png", draw_masks("photo.jpg", masks))
    """
    photo = read_image(image).cpu()
    masks = masks if isinstance(masks, Tensor) else np.asarray(masks)
    if dtype_name(masks) != "bool":
        raise TypeError(f"draw_masks: masks must be bool, got {dtype_name(masks)}")
    stack = masks.cpu() if isinstance(masks, Tensor) else array_to_tensor(masks)
    if len(photo) != 1 or stack.ndim != 3 or stack.shape[1:] != photo.shape[2:]:
        raise ValueError(
            f"draw_masks: masks must be (M, H, W) of the image, {_describe_size(photo)}, got {tuple(stack.shape)}"
        )
    # in place, and each mask within its box: copies of a large image would take most of the time and memory
    picture = photo[0].add_(photo[0].mean(dim=0, keepdim=True)).div_(2)
    corners = mask_boxes(stack).tolist()
    for index in mask_areas(stack).argsort(descending=True, stable=True).tolist():
        left, top, right, bottom = corners[index]
        # with a pixel around it, so that its border is an outline except at the border of the image
        rows, columns = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
        mask, pixels = stack[index, rows, columns], picture[:, rows, columns]
        # steps of the golden ratio keep successive hues apart
        color = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.95)
        pixels.lerp_(torch.tensor(color, dtype=torch.float32, device="cpu")[:, None, None], 0.55 * mask.float())
        pixels.masked_fill_(mask & ~_find_interior(mask), 1)
    return _to_pil(picture[None])[0]


def panel(images: Sequence[Any], titles: Sequence[str], height: int | None = None) -> Image.Image:
    """Place images side by side on white, each under its title.

    Args:
        images: images of any kind that `trace_fast.edges` takes; edges (H, W) are drawn as gray images.
        titles: one line of text for each image; "" for none.
        height: height to which images are scaled, in pixels; their aspect ratio is kept. None takes that of the first.

    Returns:
        PIL image of mode RGB.

    Raises:
        ValueError: there are no images, the number of titles differs, an image is a batch, or height is below 1.

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
            raise ValueError(f"panel: images must be single images, got a batch of {len(photo)}")
    height = height or photos[0].shape[2]
    pictures = []
    for photo in photos:
        width = max(1, round(photo.shape[3] * height / photo.shape[2]))
        pictures.append(_to_pil(photo)[0].resize((width, height), Image.Resampling.LANCZOS))

    # text and gaps are in proportion to the pictures
    text = max(10, height // 20)
    gap = text // 2
    font = ImageFont.load_default(text)
    columns = [
        max(picture.width, round(font.getlength(title))) for picture, title in zip(pictures, titles, strict=True)
    ]
    top = 2 * text if any(titles) else 0
    sheet = Image.new("RGB", (sum(columns) + gap * (len(columns) - 1), top + height), "white")
    canvas = ImageDraw.Draw(sheet)
    left = 0
    for picture, title, column in zip(pictures, titles, columns, strict=True):
        sheet.paste(picture, (left + (column - picture.width) // 2, top))
        canvas.text((left + column // 2, top // 2), title, fill="black", font=font, anchor="mm")
        left += column + gap
    return sheet


def grid(pictures: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Place pictures in rows and columns on white.

    Args:
        pictures: PIL images of any size, such as panels; rows are filled first.
        columns: number of columns, each as wide as the widest picture.
        gap: between pictures, in pixels.

    Returns:
        PIL image of mode RGB.

    Raises:
        ValueError: there are no pictures, or columns is below 1.

    Example:
        >>> sheet = grid([overlay(path, trace_fast.edges(path)) for path in ("one.jpg", "two.jpg")], columns=2)
    """
    if not pictures or columns < 1:
        raise ValueError(f"grid: pictures must be in at least 1 column, got {len(pictures)} pictures in {columns}")
    from PIL import Image

    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(picture.width for picture in pictures)
    size = (columns * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1))
    sheet, top = Image.new("RGB", size, "white"), 0
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + gap), top))
        top += height + gap
    return sheet


def show(
    image: ImageLike, edges: np.ndarray | Tensor | None = None, masks: np.ndarray | Tensor | None = None
) -> Image.Image:
    """Return one picture of an image and its results, side by side, which a notebook shows.

    In a program, `show(...).show()` opens it in a viewer, and `show(...).save("result.png")` writes it.

    Args:
        image: anything that `trace_fast.edges` takes, except a list or a batch.
        edges: (H, W), (1, H, W) or (1, 1, H, W) float in [0, 1], of the image's size; drawn alone and over the image.
        masks: (M, H, W) bool, of the image's size; drawn over the image.

    Returns:
        PIL image of mode RGB, at most 320 pixels high below its titles.

    Raises:
        TypeError, ValueError: see `overlay` and `draw_masks`.

    Example:
        >>> edges = trace_fast.edges("photo.jpg")
        >>> trace_fast.show("photo.jpg", edges, trace_fast.instances(edges)[0]).mode
        'RGB'
    """
    pictures: dict[str, Any] = {"image": image}
    if edges is not None:
        edge_map = read_edge_map("show", edges)
        pictures |= {"edges": edge_map, "overlay": overlay(image, edge_map)}
    if masks is not None:
        pictures["masks"] = draw_masks(image, masks)
    height = min(SHOWN_HEIGHT, read_image(image).shape[2])
    return panel(list(pictures.values()), list(pictures), height)


def plot_output(output: TraceOutput) -> Figure:
    """Plot a trace: edges and, where the output has them, ABDiv and the KL curve, a row for each image.

    Args:
        output: of `trace_fast.Tracer`; with return_kl=True and return_abdiv=True it has all three.

    Returns:
        The matplotlib figure.

    Raises:
        RuntimeError: matplotlib is not installed.

    Example:
        >>> figure = plot_output(Tracer.from_pretrained()("photo.jpg", return_kl=True))
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    maps = {"edges": output.edges[:, 0]} | ({} if output.abdiv is None else {"ABDiv, nats": output.abdiv})
    rows, columns = len(output.edges), len(maps) + (output.kl is not None)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False)):
        for plot, (name, values) in zip(axes, maps.items(), strict=False):
            plot.set_axis_off()
            plot.set_title(f"{name}, timestep {int(output.timestep[index])}", fontsize="medium")
            shown = plot.imshow(values[index].cpu().numpy(), cmap="gray", vmin=0, vmax=1 if name == "edges" else None)
            figure.colorbar(shown, ax=plot)
        if output.kl is not None:
            _plot_steps(axes[-1], output, index, "")
            axes[-1].legend()
    return figure


def plot_curve(output: TraceOutput, path: str | os.PathLike[str] | None = None) -> Figure:
    """Plot the KL curve of a trace, and mark its peak t* and the timestep whose map was read.

    A point at timestep t is KL(SA(X_prev) || SA(X_t)), the change of the self-attention map since the timestep before
    (TRACE, Section 3.1). There is one line for each image.

    Args:
        output: a trace made with return_kl=True.
        path: the file to write, in a format that matplotlib knows such as .png, .pdf or .svg; None writes no file.

    Returns:
        The matplotlib figure.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: output has no KL curve, or matplotlib does not know the ending of path.
        FileNotFoundError: the folder of path does not exist.

    Example:
        >>> plot_curve(Tracer.from_pretrained()("photo.jpg", return_kl=True), "photo_curve.png")
    """
    if output.kl is None:
        raise ValueError("plot_curve: output must have a KL curve, got kl=None; trace with return_kl=True")
    require("plot_curve", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{output.model}, {output.noising}", fontsize="medium")
    for index in range(len(output.kl)):
        _plot_steps(axes, output, index, "" if len(output.kl) == 1 else f"image {index}, ")
    if len(output.kl) <= 10:  # beyond that a legend hides the curves
        axes.legend()
    if path is not None:
        with write_atomically(path, "plot_curve") as file:
            figure.savefig(file, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=PLOT_DPI)
    return figure


def _plot_steps(axes: Any, output: TraceOutput, index: int, name: str) -> None:
    """Plot the KL curve of one image of a trace, with its peak and the timestep that was read."""
    assert output.kl is not None
    timesteps = output.timesteps[1:].tolist()  # each step is plotted at its noisier end
    curve, read = output.kl[index].tolist(), int(output.timestep[index])
    peak = max(range(len(curve)), key=curve.__getitem__)
    (line,) = axes.plot(timesteps, curve, marker=".", label=f"{name}t* = {timesteps[peak]}")
    axes.plot(timesteps[peak], curve[peak], marker="o", markersize=9, color=line.get_color())
    label = None if read == timesteps[peak] else f"read at {read}"
    axes.axvline(read, color=line.get_color(), linestyle=":", label=label)
    axes.set_xlabel("timestep t")
    axes.set_ylabel("KL(previous || t), nats")


def _find_interior(mask: Tensor) -> Tensor:
    """Return the pixels of a mask (H, W) bool whose eight neighbors within the image belong to the mask, too."""
    for axis in (0, 1):
        steps, eroded = mask.shape[axis] - 1, mask.clone()
        eroded.narrow(axis, 1, steps).logical_and_(mask.narrow(axis, 0, steps))
        eroded.narrow(axis, 0, steps).logical_and_(mask.narrow(axis, 1, steps))
        mask = eroded
    return mask


def _to_pil(pictures: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [0, 1] to B PIL images of mode RGB."""
    from PIL import Image

    pixels = pictures.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _describe_size(images: Tensor) -> str:
    """Describe the number and size of images (B, C, H, W) for a message."""
    count, _, height, width = images.shape
    return f"{count} of {height} x {width}"
