"""Run-length encodings (RLE) and polygons of masks, in COCO's form."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_fast.extras import require
from trace_fast.io.pictures import MAX_PIXELS

__all__ = [
    "LEAST",
    "MOST",
    "check_pixels",
    "decode_mask",
    "decode_run_lengths",
    "encode_rles",
    "encode_segmentation",
    "import_mask_api",
    "read_integer",
    "read_rle_size",
]

MAX_COORDINATE = 2**20  # of polygons, in pixels
MAX_PERIMETER = 2**23  # of polygons, in pixels; the time and memory to rasterize them grow in proportion
LEAST, MOST = -(2**63), 2**63 - 1  # integers of a file must fit into 64 bits


def import_mask_api(op: str) -> Any:
    """Import pycocotools.mask, or explain how to install it."""
    require(op, "pycocotools")
    from pycocotools import mask

    return mask


def encode_rles(op: str, masks: np.ndarray) -> list[bytes]:
    """Encode masks (M, H, W) bool as the counts of compressed RLE."""
    api = import_mask_api(op)
    if not len(masks):
        return []
    return [rle["counts"] for rle in api.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))]


def read_rle_size(segmentation: Any) -> tuple[int, int]:
    """Read the height and width of an RLE."""
    size = segmentation.get("size") if isinstance(segmentation, Mapping) else None
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"segmentation must be RLE with its size, got {reprlib.repr(segmentation)}")
    height, width = (read_integer({"size": side}, "size", 1) for side in size)
    check_pixels("size", height, width)
    return height, width


def check_pixels(name: str, height: int, width: int) -> None:
    """Require an image that is not larger than an image file may be."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name} must be at most {MAX_PIXELS} pixels, got {height} x {width}")


def encode_segmentation(api: Any, segmentation: Any, height: int, width: int, notes: Counter[str]) -> bytes:
    """Check polygons or RLE, and return the counts of a compressed RLE."""
    if isinstance(segmentation, list) and segmentation:
        return _encode_polygons(api, segmentation, height, width, notes)
    if not isinstance(segmentation, Mapping):
        raise ValueError(f"segmentation must be polygons or RLE, got {reprlib.repr(segmentation)}")
    return _encode_rle(api, segmentation, height, width)


def _encode_polygons(api: Any, polygons: Sequence[Any], height: int, width: int, notes: Counter[str]) -> bytes:
    """Check polygons, and rasterize them to the counts of one compressed RLE."""
    encodable = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon)
        except (ValueError, OverflowError):
            points = np.empty((0, 0))
        is_odd = points.ndim != 1 or points.dtype.kind not in "iuf" or len(points) % 2 == 1
        # as floats: the absolute value of the least integer is negative
        if is_odd or not (np.abs(points.astype(np.float64)) < MAX_COORDINATE).all():
            raise ValueError(f"polygon must be an even number of finite coordinates, got {reprlib.repr(polygon)}")
        corners = points.astype(np.float64).reshape(-1, 2)
        perimeter = np.abs(corners - np.roll(corners, 1, 0)).max(1, initial=0).sum()
        if perimeter > MAX_PERIMETER:
            raise ValueError(f"polygon must be at most {MAX_PERIMETER} pixels around, got {perimeter:.0f}")
        # fewer than three points cover no pixel, and pycocotools would read two as a box
        if len(points) < 6:
            notes["polygons of fewer than three points, which are left out"] += 1
        else:
            encodable.append(polygon)
    empty = {"size": [height, width], "counts": [height * width]}
    return bytes(api.merge(api.frPyObjects(encodable or [empty], height, width))["counts"])


def _encode_rle(api: Any, rle: Mapping[str, Any], height: int, width: int) -> bytes:
    """Check an RLE of any form, and return the counts of a compressed RLE."""
    size, counts = read_rle_size(rle), rle.get("counts")
    if size != (height, width):
        raise ValueError(f"segmentation must be of its image's size {(height, width)}, got {size}")
    if isinstance(counts, list):
        if not all(type(run) is int for run in counts):
            raise ValueError(f"counts must be integers, got {reprlib.repr(counts)}")
        runs = np.array(counts, dtype=object)
    elif isinstance(counts, (str, bytes)):
        counts = counts.encode() if isinstance(counts, str) else counts
        runs = decode_run_lengths(counts)
    else:
        raise ValueError(f"counts must be a list or a string, got {reprlib.repr(counts)}")
    # each of them first: a sum of 64 bits may overflow to the right number
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"counts must be at least 0 and sum to {height} * {width}, got {reprlib.repr(runs.tolist())}")
    if isinstance(counts, list):
        return bytes(api.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"])
    return counts


def decode_mask(counts: bytes, height: int, width: int) -> np.ndarray:
    """Decode a compressed RLE: (height, width) bool."""
    # runs are outside and inside the mask in turn, down the columns
    runs = decode_run_lengths(counts)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def decode_run_lengths(counts: bytes) -> np.ndarray:
    """Decode the run lengths of a compressed RLE, int64; pycocotools would read past the end of truncated strings.

    A length is written in groups of five bits, the lowest first, each as a character from "0" on. Bit 5 is set if
    another group follows, and bit 4 of the last group is the sign. From the fourth on, lengths are written as the
    difference from the length before the last.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    last = codes & 32 == 0
    if not codes.size or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError(f"counts must be a compressed RLE, got {reprlib.repr(counts)}")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    digit = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if digit.max() > 6:  # 35 bits
        raise ValueError(f"counts must be a compressed RLE of 32-bit lengths, got {reprlib.repr(counts)}")
    runs = np.add.reduceat((codes & 31) << 5 * digit, starts)
    runs -= np.where(codes[ends] & 16, 32 << 5 * digit[ends], 0)
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs


def read_integer(entry: Mapping[str, Any], key: str, least: int = LEAST) -> int:
    """Read an integer of 64 bits, which may be written as a float such as 1.0."""
    value = entry.get(key)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_whole = is_whole or (isinstance(value, float) and value.is_integer())
    if value is None or not is_whole or not least <= value <= MOST:
        bound = f" of at least {least}" if least > LEAST else " of 64 bits" if is_whole else ""
        raise ValueError(f"{key} must be an integer{bound}, got {reprlib.repr(value)}")
    return int(value)
