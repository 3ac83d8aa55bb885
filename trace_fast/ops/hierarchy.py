"""Hierarchies of regions: the watershed of an edge map, and the tree in which regions merge at their boundaries.

The native core runs on the CPU; tensors of a GPU are copied there and back.
"""

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch
from trace_fast.ops.dispatch import register

__all__ = ["merge_tree", "watershed"]

BOUNDARY = 68  # bytes of a boundary in csrc/cpu/hierarchy.cpp, with its places in the heap and in the table


@register(cuda="cpu")
def watershed(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Run the fastest implementation of `trace_fast.reference.watershed`.

    Note:
        edges are float32 with any strides and fewer than 2^31 pixels per image; nan counts as 0. Images run on
        different threads. Tensors of a GPU are copied to the CPU and back.

    Raises:
        TypeError: edges is not a float32 tensor.
        ValueError: edges is not (B, H, W) or too large.
    """
    op = "watershed"
    checks.tensor(op, "edges", edges, "B H W", {}, torch.float32)
    checks.image(op, "edges", edges)
    # the labels, and heights, depths, order and queue of each image, if there are as many threads
    checks.memory(op, "edges", edges, 20 * edges.numel())
    if dispatch.choose(op, edges.device) == "reference":
        checks.values(op, edges=edges)
        return reference.watershed(edges)
    return _watershed(edges)


@register(cuda="cpu")
def merge_tree(labels: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Run the fastest implementation of `trace_fast.reference.merge_tree`.

    Note:
        labels are int32 and edges float32, with any strides and fewer than 2^30 pixels; nan counts as 0. It runs on
        one thread. Tensors of a GPU are copied to the CPU and back.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ, the image is too large, or labels are not 1 to n, each present.
    """
    op = "merge_tree"
    sizes: dict[str, int] = {}
    checks.tensor(op, "labels", labels, "H W", sizes, torch.int32)
    checks.tensor(op, "edges", edges, "H W", sizes, torch.float32)
    checks.same_device(op, labels=labels, edges=edges)
    pixels = labels.numel()
    if pixels >= 2**30:
        raise ValueError(f"{op}: labels must be fewer than 2^30 pixels, got {sizes['H']} * {sizes['W']}")
    # at most two boundaries begin at a pixel
    checks.memory(op, "labels", labels, 2 * BOUNDARY * pixels)
    backend = dispatch.choose(op, labels.device)
    checks.values(op, labels=labels)
    low, count = (int(bound) for bound in labels.aminmax())
    if low < 1 or count > pixels:
        raise ValueError(f"{op}: labels must be from 1 to n, got {low} to {count} on {pixels} pixels")
    missing = (torch.bincount(labels.flatten(), minlength=count + 1)[1:] == 0).nonzero()
    if len(missing):
        raise ValueError(f"{op}: labels must have each of 1 to {count}, got none of {int(missing[0]) + 1}")
    if backend == "reference":
        return reference.merge_tree(labels, edges)
    return _merge_tree(labels, edges, count)


@dispatch.custom_op("trace_fast::watershed")
def _watershed(edges: Tensor) -> tuple[Tensor, Tensor]:
    from trace_fast import _C

    host, (batch, height, width) = edges.cpu().contiguous(), edges.shape
    labels, counts = host.new_empty(host.shape, dtype=torch.int32), host.new_empty(batch, dtype=torch.int32)
    outputs = labels.data_ptr(), counts.data_ptr()
    _C.cpu.watershed(host.data_ptr(), batch, height, width, *outputs, dispatch.count_threads())
    return labels.to(edges.device), counts.to(edges.device)


@_watershed.register_fake
def _(edges: Tensor) -> tuple[Tensor, Tensor]:
    return edges.new_empty(edges.shape, dtype=torch.int32), edges.new_empty(edges.shape[0], dtype=torch.int32)


@dispatch.custom_op("trace_fast::merge_tree")
def _merge_tree(labels: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the tree of `count` regions."""
    from trace_fast import _C

    regions, strengths, (height, width) = labels.cpu().contiguous(), edges.cpu().contiguous(), labels.shape
    parents, levels = regions.new_empty(2 * count - 1), strengths.new_empty(2 * count - 1)
    inputs = regions.data_ptr(), strengths.data_ptr(), height, width, count
    _C.cpu.merge_tree(*inputs, parents.data_ptr(), levels.data_ptr())
    return parents.to(labels.device), levels.to(labels.device)


@_merge_tree.register_fake
def _(labels: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(2 * count - 1), edges.new_empty(2 * count - 1)
