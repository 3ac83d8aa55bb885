"""Regions and masks: labeling, growth and random walks between edges, and merging of overlapping masks."""

import torch
from torch import Tensor

from trace_fast import reference
from trace_fast.ops import checks, dispatch
from trace_fast.ops.constants import cache_constants
from trace_fast.ops.dispatch import register

__all__ = ["flood_fill", "label_regions", "merge_masks", "random_walk"]


@register(cuda="native")
def label_regions(barrier: Tensor, connectivity: int = 4) -> tuple[Tensor, Tensor]:
    """Run the fastest implementation of `trace_fast.reference.label_regions`.

    Note:
        barrier has any strides and fewer than 2^31 pixels per image.

    Raises:
        TypeError: barrier is not a bool tensor.
        ValueError: barrier is not (B, H, W) or too large, or connectivity is neither 4 nor 8.
    """
    op = "label_regions"
    checks.tensor(op, "barrier", barrier, "B H W", {}, torch.bool)
    checks.image(op, "barrier", barrier)
    checks.choice(op, "connectivity", connectivity, 4, 8)
    _, height, width = barrier.shape
    # the labels, and the words and the runs of one image, of which a row has at most half as many as pixels
    runs = height * (width + 1) // 2
    checks.memory(op, "barrier", barrier, 4 * barrier.numel() + 8 * height * (width // 64 + 1) + 4 * runs)
    backend = dispatch.choose(op, barrier.device)
    if backend == "reference":
        checks.values(op, barrier=barrier)
        return reference.label_regions(barrier, connectivity)
    return _label_regions(barrier, connectivity)


@register(cuda="native")
def flood_fill(seeds: Tensor, barrier: Tensor, connectivity: int = 4, claim_barrier: bool = False) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.flood_fill`.

    Note:
        seeds and barrier have any strides and fewer than 2^31 pixels per image.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, seeds are too large, or connectivity is neither 4 nor 8.
    """
    op = "flood_fill"
    sizes: dict[str, int] = {}
    checks.tensor(op, "seeds", seeds, "B H W", sizes, torch.int32)
    checks.tensor(op, "barrier", barrier, "B H W", sizes, torch.bool)
    checks.same_device(op, seeds=seeds, barrier=barrier)
    checks.image(op, "seeds", seeds)
    checks.choice(op, "connectivity", connectivity, 4, 8)
    checks.choice(op, "claim_barrier", claim_barrier, False, True)
    # the labels, and a byte for each pixel of one image
    checks.memory(op, "seeds", seeds, 4 * seeds.numel() + (sizes["H"] + 2) * (sizes["W"] + 1))
    backend = dispatch.choose(op, seeds.device)
    if backend == "reference":
        checks.values(op, seeds=seeds, barrier=barrier)
        return reference.flood_fill(seeds, barrier, connectivity, claim_barrier)
    return _flood_fill(seeds, barrier, connectivity, bool(claim_barrier))


@register(cuda="native")
def random_walk(masks: Tensor, edges: Tensor, radius: int = 5, beta: float = 10, steps: int = 256) -> Tensor:
    """Run the fastest implementation of `trace_fast.reference.random_walk`.

    Note:
        masks and edges are float32 with any strides; the result is float32. The walk is computed step by step; memory
        holds the affinities of one image, half a disc of `radius` per pixel.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, a number is too small, or affinities exceed the memory.
    """
    op = "random_walk"
    sizes: dict[str, int] = {}
    batched = isinstance(masks, Tensor) and masks.ndim == 4
    checks.tensor(op, "masks", masks, "B M H W" if batched else "M H W", sizes, torch.float32)
    shared_edges = not (batched and isinstance(edges, Tensor) and edges.ndim == 3)
    checks.tensor(op, "edges", edges, "H W" if shared_edges else "B H W", sizes, torch.float32)
    checks.same_device(op, masks=masks, edges=edges)
    checks.image(op, "masks", masks)
    checks.integer(op, "radius", radius, 1)
    checks.integer(op, "steps", steps, 0, 2**31 - 1)
    checks.number(op, "beta", beta, 0)
    # no two pixels are farther apart
    radius = min(radius, sizes["H"] + sizes["W"] - 1)
    # half a disc of affinities for each pixel of an image, and of a margin around it
    pixels = (sizes["H"] + radius) * (sizes["W"] + 15 + radius)
    checks.memory(op, "masks", masks, 4 * masks.numel() + 6 * (radius - 1) ** 2 * pixels)
    backend = dispatch.choose(op, masks.device)
    if backend == "reference":
        return reference.random_walk(masks, edges, radius, beta, steps)
    if not shared_edges:
        return _random_walk(masks, edges, radius, float(beta), steps)
    return _random_walk(masks.flatten(0, -3)[None], edges[None], radius, float(beta), steps).reshape(masks.shape)


@register(cuda="native")
def merge_masks(masks: Tensor, iou: float = 0.5, scores: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the fastest implementation of `trace_fast.reference.merge_masks`.

    Note:
        masks have any strides and fewer than 2^31 pixels each; scores are float32, float64, float16 or bfloat16.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices differ from each other, masks are too large, or iou is outside [0, 1].
    """
    op = "merge_masks"
    sizes: dict[str, int] = {}
    checks.tensor(op, "masks", masks, "M H W", sizes, torch.bool)
    checks.image(op, "masks", masks)
    checks.number(op, "iou", iou, 0, 1)
    if scores is not None:
        checks.tensor(op, "scores", scores, "M", sizes, torch.float32, torch.float64, torch.float16, torch.bfloat16)
        checks.same_device(op, masks=masks, scores=scores)
    checks.memory(op, "masks", masks, masks.numel() + masks.numel() // 8)
    backend = dispatch.choose(op, masks.device)
    checks.values(op, masks=masks)
    if backend == "reference":
        return reference.merge_masks(masks, iou, scores)
    groups = _merge_masks(masks, float(iou))
    unions = int(groups.max()) + 1 if len(groups) else 0
    merged = _unite_masks(masks, groups, unions)
    return merged, groups, None if scores is None else reference.regions.highest(scores, groups, unions)


def _queue(device: torch.device) -> tuple[int, int]:
    """Return the index of a GPU and its current stream, on which kernels are queued."""
    stream = torch.cuda.current_stream(device)
    return stream.device.index, stream.cuda_stream


@dispatch.custom_op("trace_fast::label_regions")
def _label_regions(barrier: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    from trace_fast import _C

    device, barrier = barrier.device, dispatch.for_core(barrier)
    (batch, height, width), diagonal = barrier.shape, connectivity == 8
    labels = barrier.new_empty(barrier.shape, dtype=torch.int32)
    inputs = barrier.data_ptr(), batch, height, width, diagonal
    if barrier.is_cuda:
        _C.cuda.label_roots(*inputs, labels.data_ptr(), _queue(barrier.device))
        return reference.regions.number_roots(labels, barrier)
    counts = barrier.new_empty(batch, dtype=torch.int32)
    _C.cpu.label_regions(*inputs, labels.data_ptr(), counts.data_ptr(), dispatch.count_threads())
    return labels.to(device), counts.to(device)


@_label_regions.register_fake
def _(barrier: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    labels = barrier.new_empty(barrier.shape, dtype=torch.int32)
    return labels, labels.new_empty(barrier.shape[0])


@dispatch.custom_op("trace_fast::flood_fill")
def _flood_fill(seeds: Tensor, barrier: Tensor, connectivity: int, claim_barrier: bool) -> Tensor:
    from trace_fast import _C

    device, seeds, barrier = seeds.device, dispatch.for_core(seeds), dispatch.for_core(barrier)
    batch, height, width = seeds.shape
    labels, diagonal = seeds.new_empty(seeds.shape), connectivity == 8
    inputs = seeds.data_ptr(), barrier.data_ptr(), batch, height, width, diagonal, claim_barrier
    if seeds.is_cuda:
        keys, fronts = seeds.new_empty((height, width), dtype=torch.int64), seeds.new_empty(2, height, width)
        scratch = keys.data_ptr(), fronts.data_ptr(), seeds.new_empty(3).data_ptr()
        _C.cuda.flood_fill(*inputs, labels.data_ptr(), *scratch, _queue(seeds.device))
    else:
        _C.cpu.flood_fill(*inputs, labels.data_ptr(), dispatch.count_threads())
    return labels.to(device)


@_flood_fill.register_fake
def _(seeds: Tensor, barrier: Tensor, connectivity: int, claim_barrier: bool) -> Tensor:
    return seeds.new_empty(seeds.shape)


@dispatch.custom_op("trace_fast::random_walk")
def _random_walk(masks: Tensor, edges: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    from trace_fast import _C

    device, masks, edges = masks.device, dispatch.for_core(masks), dispatch.for_core(edges)
    batch, count, height, width = masks.shape
    if masks.is_cuda:
        return _walk_on_cuda(masks, edges, radius, beta, steps)
    walked, threads = masks.new_empty(masks.shape), dispatch.count_threads()
    pointers, sizes = (masks.data_ptr(), edges.data_ptr()), (batch, count, height, width)
    _C.cpu.random_walk(*pointers, *sizes, radius, beta, steps, walked.data_ptr(), threads)
    return walked.to(device)


def _walk_on_cuda(masks: Tensor, edges: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """Run the CUDA kernel of the walk, image by image."""
    from trace_fast import _C

    _, count, height, width = masks.shape
    passing = 1 - edges.clamp(0, 1)
    powers, ahead = passing**beta, _neighbor_steps(radius, masks.device)
    walked = masks * passing[:, None]
    others, affinities = torch.empty_like(walked), masks.new_empty(len(ahead), height, width)
    sizes, scratch = (len(ahead), count, height, width, steps), affinities.data_ptr()
    for start, other, power in zip(walked, others, powers, strict=True):
        pointers = start.data_ptr(), other.data_ptr(), power.data_ptr(), ahead.data_ptr()
        _C.cuda.random_walk(*pointers, *sizes, scratch, _queue(masks.device))
    return walked if steps % 2 == 0 else others


@cache_constants(maxsize=8)
def _neighbor_steps(radius: int, device: torch.device) -> Tensor:
    """Return `reference.regions.neighbor_steps`, (K, 2) int32, cached on the device."""
    return torch.tensor(reference.regions.neighbor_steps(radius), dtype=torch.int32, device=device).view(-1, 2)


@_random_walk.register_fake
def _(masks: Tensor, edges: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    return masks.new_empty(masks.shape)


@dispatch.custom_op("trace_fast::merge_masks")
def _merge_masks(masks: Tensor, iou: float) -> Tensor:
    """Return the index of the union that contains each mask, (M,) int64."""
    from trace_fast import _C

    device, masks, (count, height, width) = masks.device, dispatch.for_core(masks), masks.shape
    if masks.is_cuda:
        return reference.regions.group_masks(masks, iou, _shared_on_cuda)
    groups = masks.new_empty(count, dtype=torch.int64)
    _C.cpu.merge_masks(masks.data_ptr(), count, height, width, iou, groups.data_ptr(), dispatch.count_threads())
    return groups.to(device)


def _shared_on_cuda(masks: Tensor) -> Tensor:
    """Return the number of pixels that each two masks share, (M, M) int32, from the CUDA kernel."""
    from trace_fast import _C

    count, pixels = len(masks), masks[:1].numel()
    words = masks.new_empty((count, (pixels + 31) // 32), dtype=torch.int32)
    shared = masks.new_empty((count, count), dtype=torch.int32)
    _C.cuda.shared_pixels(masks.data_ptr(), count, pixels, words.data_ptr(), shared.data_ptr(), _queue(masks.device))
    return shared


@_merge_masks.register_fake
def _(masks: Tensor, iou: float) -> Tensor:
    return masks.new_empty(masks.shape[0], dtype=torch.int64)


@dispatch.custom_op("trace_fast::unite_masks")
def _unite_masks(masks: Tensor, groups: Tensor, unions: int) -> Tensor:
    """Return the union of the masks (M, H, W) of each group (M,) int64, (unions, H, W)."""
    from trace_fast import _C

    device, masks, groups = masks.device, dispatch.for_core(masks), dispatch.for_core(groups)
    count, height, width = masks.shape
    inputs = masks.data_ptr(), groups.data_ptr(), count, height * width
    if masks.is_cuda:
        merged = masks.new_zeros(unions, height, width)
        _C.cuda.unite_masks(*inputs, merged.data_ptr(), _queue(masks.device))
    else:
        merged = masks.new_empty(unions, height, width)
        _C.cpu.unite_masks(*inputs, unions, merged.data_ptr(), dispatch.count_threads())
    return merged.to(device)


@_unite_masks.register_fake
def _(masks: Tensor, groups: Tensor, unions: int) -> Tensor:
    return masks.new_empty(unions, *masks.shape[1:])
