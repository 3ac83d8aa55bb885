"""Conversion of inputs: images of every accepted kind become float32 RGB, and edge maps float32, both in [0, 1]."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trace_fast.io.arrays import array_to_tensor, check_values, dtype_name
from trace_fast.io.pictures import MAX_PIXELS, decode, open_picture
from trace_fast.ops import checks

if TYPE_CHECKING:
    from PIL import Image

    # one image whose edges are an array
    PictureLike = str | os.PathLike[str] | Image.Image | np.ndarray
    # one image, or a (B, C, H, W) tensor of several
    ImageLike = PictureLike | Tensor
    Picture = TypeVar("Picture", bound=PictureLike)  # of lists

__all__ = [
    "CHANNEL_ORDERS",
    "MAX_PIXELS",
    "MIN_SIDE",
    "OUTPUT_TYPES",
    "check_channel_order",
    "check_output_type",
    "convert_edges",
    "error_context",
    "fit_resolution",
    "map_images",
    "read_edge_map",
    "read_edge_maps",
    "read_image",
    "resize",
    "restore_edges",
]

Result = TypeVar("Result")  # of a function of an image

MIN_SIDE = 16  # smallest accepted side, in pixels
OUTPUT_TYPES = ("np", "pt", "pil")
CHANNEL_ORDERS = ("rgb", "bgr")

EDGES_HINT = "; trace_fast.evaluation.read_map reads a PNG file of edges"
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
# half a level of 8 bits: what is written as 0 is somewhat above
LEAST_PROBABILITY = 0.5 / 255
# resampling leaves [0, 1] by rounding errors, which are clamped and not refused
ROUNDING = 1e-4


@contextlib.contextmanager
def error_context(index: int) -> Iterator[None]:
    """Name the image that an error belongs to, as a note on the exception.

    Args:
        index: position of the image in the caller's list, from 0.

    Example:
        >>> with error_context(2):
        ...     read_image("missing.jpg")
        Traceback (most recent call last):
        FileNotFoundError: edges: image must be an existing file, got 'missing.jpg'
        image 2 of the list, counted from 0
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"image {index} of the list, counted from 0")
        raise


def map_images(function: Callable[[Any], Result], image: Any) -> Result | list[Result]:
    """Return the result of a function for an image, or a list of those for several images; errors name the image.

    Args:
        function: called with one image; it reads the image by `read_image`.
        image: one image, or a list or tuple of images.

    Raises:
        ValueError: the list is empty.

    Example:
        >>> map_images(lambda image: tuple(read_image(image).shape), [np.zeros((20, 31)), np.zeros((16, 24))])
        [(1, 3, 20, 31), (1, 3, 16, 24)]
    """
    if not (isinstance(image, (list, tuple)) and image):
        return function(image)  # `read_image` refuses an empty list
    results = []
    for index, item in enumerate(image):
        with error_context(index):
            results.append(function(item))
    return results


def read_image(image: ImageLike, channel_order: str = "rgb") -> Tensor:
    """Read one image of any accepted kind as float32 RGB in [0, 1].

    Gray images are repeated to RGB, and transparent ones are composited on white. uint8 is divided by 255 and uint16 by
    65535. Floats must be in [0, 1] already; rounding errors of up to 1e-4 are clamped.

    Args:
        image: one of
            - str or path: a file of a raster format that Pillow can read; the first frame of an animation;
            - PIL image of any mode, rotated by its EXIF orientation; modes I;16 and I are read as uint16, F as float;
            - NumPy array (H, W) or (H, W, C), uint8, uint16, float16, float32 or float64;
            - tensor (H, W), (C, H, W) or (B, C, H, W), uint8, uint16, float16, bfloat16, float32 or float64.
            C is 1 (gray), 3 (RGB) or 4 (RGBA). Arrays are always channels last and tensors channels first. Each side
            must have at least 16 pixels, so that a wrong layout is never taken for a right one. Images of every kind
            may have at most `MAX_PIXELS` pixels.
        channel_order: "bgr" for arrays and tensors as OpenCV has them: blue, green, red and perhaps alpha. It has no
            effect on files and PIL images, which state the order themselves.

    Returns:
        (B, 3, H, W) float32 in [0, 1], which never shares memory with `image`; B = 1 except for a (B, C, H, W) tensor.
        It is on the device of a tensor, otherwise on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: image is of another kind, or of a dtype that is not listed (bool and signed integers have no range).
        ValueError: the shape, size or range is not accepted, the path is a folder, a damaged file or not an image, or
            channel_order is unknown.

    Example:
        >>> read_image(np.zeros((48, 64), dtype=np.uint8)).shape
        torch.Size([1, 3, 48, 64])
    """
    check_channel_order(channel_order)
    if isinstance(image, Tensor):
        planes = _from_torch(image)
    elif isinstance(image, np.ndarray):
        planes = _from_array(image)
    elif isinstance(image, (str, os.PathLike)):
        planes = _from_file(image)
    else:
        planes = _from_object(image)
    if channel_order == "bgr" and isinstance(image, (Tensor, np.ndarray)) and planes.shape[1] >= 3:
        planes = planes[:, [2, 1, 0, *range(3, planes.shape[1])]]
    return _to_rgb(_to_unit(planes))


def convert_edges(edges: Tensor, image: ImageLike, output_type: str | None = None) -> Any:
    """Convert edges to the kind of their image, or to a given kind.

    Args:
        edges: (B, 1, H, W) float in [0, 1].
        image: the argument of `read_image`; only its kind matters.
        output_type: None follows the image: "pt" for a tensor, "np" for everything else.

    Returns:
        - "np": float32 array, (B, H, W) for a (B, C, H, W) tensor, (H, W) for every other image;
        - "pt": float32 tensor (B, 1, H, W), on the device of a tensor image, otherwise on the device of the edges;
        - "pil": PIL image of mode L, 255 = edge; a list of B for a (B, C, H, W) tensor.

    Raises:
        ValueError: output_type is not one of these.
        RuntimeError: edges that leave torch are not finite.

    Example:
        >>> convert_edges(torch.rand(1, 1, 48, 64), "photo.jpg").shape
        (48, 64)
    """
    check_output_type(output_type)
    edges = edges.detach().to(torch.float32)
    if output_type == "pt" or (output_type is None and isinstance(image, Tensor)):
        return edges.to(image.device) if isinstance(image, Tensor) else edges
    planes = edges[:, 0].cpu()  # (B, H, W)
    if not planes.isfinite().all():
        raise RuntimeError("edges: edges must be finite, got NaN; load the model with dtype=torch.float32")
    is_batch = isinstance(image, Tensor) and image.ndim == 4
    if output_type != "pil":
        return planes.numpy() if is_batch else planes[0].numpy()

    from PIL import Image

    pictures = [Image.fromarray(plane.mul(255).round().to(torch.uint8).numpy()) for plane in planes]
    return pictures if is_batch else pictures[0]


def check_output_type(output_type: str | None) -> None:
    """Require a known output type; callers check it before they compute anything.

    Args:
        output_type: None or one of `OUTPUT_TYPES`.

    Raises:
        ValueError: output_type is neither.

    Example:
        >>> check_output_type("pil")
    """
    checks.choice("edges", "output_type", output_type, *OUTPUT_TYPES, None)


def check_channel_order(channel_order: str) -> None:
    """Require a known order of color channels; callers check it before they compute anything.

    Args:
        channel_order: one of `CHANNEL_ORDERS`.

    Raises:
        ValueError: channel_order is another value.

    Example:
        >>> check_channel_order("bgr")
    """
    checks.choice("edges", "channel_order", channel_order, *CHANNEL_ORDERS)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample images with an antialiased bilinear filter; the aspect ratio is not kept.

    Args:
        image: (B, C, H, W) float.
        size: (height, width) in pixels.

    Returns:
        (B, C, height, width) of the same dtype; the image itself if it has that size already.

    Raises:
        ValueError: image is not (B, C, H, W), or size has a side below 1 or more than `MAX_PIXELS` pixels.

    Example:
        >>> resize(torch.rand(2, 3, 48, 64), (30, 20)).shape
        torch.Size([2, 3, 30, 20])
    """
    if image.ndim != 4:
        raise ValueError(f"resize: image must be (B, C, H, W), got shape {tuple(image.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"resize: size must be (height, width), both at least 1, got {tuple(size)}")
    if math.prod(size) > MAX_PIXELS:
        raise ValueError(f"resize: size must be at most {MAX_PIXELS} pixels, got {size[0]} x {size[1]}")
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def restore_edges(edges: np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge edges that are at the size of a decoder's output, as `trace_fast.Detector.edges` does.

    Args:
        edges: (h, w), (1, h, w) or (1, 1, h, w) float in [0, 1], array or tensor: a result of
            `trace_fast.Detector.grid_edges`, or a file of `trace-fast edges --grid` divided by 255 or 65535.
        size: (height, width) of the image, in pixels.

    Returns:
        (height, width) float32 in [0, 1], on the device of a tensor, otherwise on the CPU.

    Raises:
        TypeError: edges is not an array or a tensor, or not of floats.
        ValueError: edges have another shape or range, or size is below 1 or too large.

    Example:
        >>> restore_edges(np.full((2, 3), 0.25), (4, 6))[0, 0]
        tensor(0.2500)
    """
    edge_map = read_edge_map("restore_edges", edges)
    # logits, not probabilities, so that edges stay sharp; those of 0 and 1 are not finite
    logits = edge_map.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY).logit()
    return resize(logits[None, None], size)[0, 0].sigmoid()


def read_edge_map(op: str, edges: np.ndarray | Tensor) -> Tensor:
    """Read the edges of one image as float32 in [0, 1].

    This is the one reader of edge maps: every function that takes edges accepts the same shapes, dtypes and values.

    Args:
        op: name of the calling function, for the message.
        edges: (H, W), (1, H, W) or (1, 1, H, W) float in [0, 1], array or tensor on any device; rounding errors of up
            to 1e-4 are clamped.

    Returns:
        (H, W) float32 on the device of a tensor, otherwise on the CPU; without gradients, and not sharing memory.

    Raises:
        TypeError: edges is not an array or a tensor, or not of floats.
        ValueError: the shape is another, there are several images, or a value is not finite or outside [0, 1].

    Example:
        >>> read_edge_map("overlay", np.zeros((1, 48, 64), dtype=np.float16)).shape
        torch.Size([48, 64])
    """
    maps = read_edge_maps(op, edges)
    if len(maps) != 1:
        raise ValueError(f"{op}: edges must be of one image, got {len(maps)}")
    return maps[0]


def read_edge_maps(op: str, edges: np.ndarray | Tensor) -> Tensor:
    """Read the edges of several images of one size as float32 in [0, 1].

    Args:
        op: name of the calling function, for the message.
        edges: (H, W), (B, H, W) or (B, 1, H, W), see `read_edge_map`.

    Returns:
        (B, H, W) float32, see `read_edge_map`.

    Raises:
        TypeError, ValueError: see `read_edge_map`.

    Example:
        >>> read_edge_maps("overlay", torch.zeros(2, 1, 48, 64)).shape
        torch.Size([2, 48, 64])
    """
    if not isinstance(edges, (np.ndarray, Tensor)):
        raise TypeError(f"{op}: edges must be an array or a tensor, got {type(edges).__name__}{EDGES_HINT}")
    if dtype_name(edges) not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: edges must be float16, bfloat16, float32 or float64, got {dtype_name(edges)}{EDGES_HINT}"
        )
    if isinstance(edges, Tensor):
        check_values(f"{op}: edges", edges)
    if edges.ndim >= 2 and math.prod(edges.shape[-2:]) > MAX_PIXELS:
        raise ValueError(f"{op}: edges must have at most {MAX_PIXELS} pixels, got shape {tuple(edges.shape)}")
    values = (edges.detach() if isinstance(edges, Tensor) else array_to_tensor(edges)).to(torch.float32)
    maps = values[:, 0] if values.ndim == 4 and values.shape[1] == 1 else values[None] if values.ndim == 2 else values
    if maps.ndim != 3 or not maps.numel():
        raise ValueError(
            f"{op}: edges must be (H, W), (B, H, W) or (B, 1, H, W) and not empty, got shape {tuple(values.shape)}"
        )
    return _clamp_to_unit(f"{op}: edges must be finite and in [0, 1]", maps)


def fit_resolution(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the size that ControlNet's annotators resize an image to.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        resolution: of the shorter side, in pixels.

    Returns:
        (height, width), each rounded to a multiple of 64, and at least 64.

    Raises:
        ValueError: the size has more than `MAX_PIXELS` pixels.

    Example:
        >>> fit_resolution(480, 640, 512)
        (512, 704)
    """
    scale = resolution / min(height, width)
    rows, columns = (64 * max(1, round(side * scale / 64)) for side in (height, width))
    if rows * columns > MAX_PIXELS:
        raise ValueError(
            f"edges: resolution must be small enough for {MAX_PIXELS} pixels, got {resolution} for {height} x {width}"
        )
    return rows, columns


def _from_torch(image: Tensor) -> Tensor:
    """Check a tensor image and add the dimensions that it lacks: (B, C, H, W)."""
    dtypes = (torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if image.dtype not in dtypes:
        raise TypeError(
            f"edges: image must be a tensor of uint8, uint16, float16, bfloat16, float32 or float64, got {image.dtype}"
        )
    check_values("edges: image", image)
    shape = tuple(image.shape)
    planes = image[None, None] if image.ndim == 2 else image[None] if image.ndim == 3 else image
    if planes.ndim != 4 or planes.shape[1] not in (1, 3, 4):
        hint = "; a tensor is channels first" if image.ndim > 2 and shape[-1] in (1, 3, 4) else ""
        raise ValueError(
            "edges: image must be a tensor (H, W), (C, H, W) or (B, C, H, W) with C = 1, 3 or 4, "
            f"got shape {shape}{hint}"
        )
    if planes.shape[0] == 0:
        raise ValueError(f"edges: image must hold at least one image, got shape {shape}")
    _check_size(planes.shape[2], planes.shape[3])
    return planes


def _from_array(image: np.ndarray) -> Tensor:
    """Check an array image and copy it to a tensor (1, C, H, W)."""
    if image.dtype.name not in ("uint8", "uint16", "float16", "float32", "float64"):
        raise TypeError(
            f"edges: image must be an array of uint8, uint16, float16, float32 or float64, got {image.dtype}"
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        hint = "; an array is channels last" if image.ndim == 3 and image.shape[0] in (1, 3, 4) else ""
        raise ValueError(
            f"edges: image must be an array (H, W) or (H, W, C) with C = 1, 3 or 4, got shape {image.shape}{hint}"
        )
    _check_size(image.shape[0], image.shape[1])
    # torch takes native byte order and positive strides
    pixels = np.array(image, dtype=image.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(pixels.reshape(*image.shape[:2], -1)).permute(2, 0, 1)[None]


def _from_file(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file: (1, C, H, W)."""
    name = repr(os.fsdecode(path))
    if os.path.isdir(path):
        raise ValueError(f"edges: image must be a file, got the folder {name}")
    if not os.path.exists(path):
        raise FileNotFoundError(f"edges: image must be an existing file, got {name}")
    with open(path, "rb") as file:
        return _from_pil(open_picture("edges: image", file, name), name)


def _from_object(image: object) -> Tensor:
    """Read a PIL image, or refuse an object of any other type: (1, C, H, W)."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return _from_pil(image, "a PIL image")
    if isinstance(image, (list, tuple)) and not image:
        raise ValueError(f"edges: image must hold at least one image, got an empty {type(image).__name__}")
    raise TypeError(f"edges: image must be a path, a PIL image, a NumPy array or a tensor, got {type(image).__name__}")


def _from_pil(picture: Image.Image, name: str) -> Tensor:
    """Decode a PIL image of any mode: (1, C, H, W) uint8, uint16 or float32."""
    from PIL import ImageOps

    _check_size(picture.height, picture.width, f" in {name}")
    decode("edges: image", picture, name)
    # pixels with damaged EXIF data are taken as upright
    with contextlib.suppress(Exception):
        picture = ImageOps.exif_transpose(picture)

    if picture.mode.startswith("I"):
        pixels = np.asarray(picture)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 65535:
            raise ValueError(f"edges: image must be in [0, 65535] in mode I, got values from {low} to {high} in {name}")
        return torch.from_numpy(pixels.astype(np.uint16))[None, None]
    if picture.mode == "F":
        return torch.from_numpy(np.array(picture))[None, None]
    if picture.mode == "La":  # Pillow converts this premultiplied mode in two steps
        picture = picture.convert("LA")
    has_alpha = picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    pixels = np.array(picture.convert("RGBA" if has_alpha else "RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _check_size(height: int, width: int, where: str = "") -> None:
    """Require an image that is neither too small nor too large."""
    if height < MIN_SIDE or width < MIN_SIDE:
        raise ValueError(
            f"edges: image must be at least {MIN_SIDE} pixels high and wide, got {height} x {width}{where}"
        )
    if height * width > MAX_PIXELS:
        raise ValueError(f"edges: image must have at most {MAX_PIXELS} pixels, got {height} x {width}{where}")


def _to_unit(planes: Tensor) -> Tensor:
    """Scale (B, C, H, W) of an accepted dtype to float32 in [0, 1]."""
    values = planes.to(torch.float32)
    if planes.dtype == torch.uint8:
        return values / 255
    if planes.dtype == torch.uint16:
        return values / 65535
    return _clamp_to_unit("edges: image must be finite and in [0, 1] as a float", values)


def _clamp_to_unit(requirement: str, values: Tensor) -> Tensor:
    """Clamp rounding errors outside [0, 1], and refuse what is farther outside."""
    low, high = (bound.item() for bound in values.aminmax())
    # NaN fails the comparison
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(f"{requirement}, got values from {low:g} to {high:g}")
    return values.clamp(0, 1)


def _to_rgb(values: Tensor) -> Tensor:
    """Convert (B, 1 | 3 | 4, H, W) to contiguous (B, 3, H, W): repeat gray, composite alpha on white."""
    if values.shape[1] == 1:
        return values.repeat(1, 3, 1, 1)
    if values.shape[1] == 4:
        values = torch.lerp(torch.ones_like(values[:, :3]), values[:, :3], values[:, 3:])
    return values.contiguous()
