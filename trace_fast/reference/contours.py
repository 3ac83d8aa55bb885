"""Contours: thin lines of an edge map, and the pairs that detected and true ones form."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_fast.extras import require

__all__ = ["count_matches", "match_contours", "suppress_nonmaxima", "thin"]


def suppress_nonmaxima(edges: Tensor, method: str = "bsds") -> Tensor:
    """Keep an edge map where it is strongest across the edge, and set it to 0 elsewhere.

    The map is smoothed by (1 2 1) / 4 along both axes. A pixel stays unless the smoothed map, interpolated one pixel
    away along the normal of the edge on either side, is more than 1 % stronger. Normals follow from the second
    derivatives xx, xy, yy of a map smoothed by a triangle of radius 4. Benchmarks of edges threshold such ridges.

    Args:
        edges: (B, H, W) float.
        method: "bsds", with which scores on BSDS500 are published (the toolbox of Dollar and Zitnick, ICCV 2013): the
            derivatives are those of the smoothed map, normals have the angle atan(-sign(xy) yy / (xx + 0.00001)), and
            the outermost 5 pixels, at most half the image, fade linearly to 0 at the border. "hessian": the derivatives
            are those of the map itself, normals are the direction of the second derivative of the largest absolute
            value, and the border is as strong as the rest.

    Returns:
        (B, H, W) in the dtype of edges: the smoothed map, 0 where a neighbor is stronger.

    Example:
        >>> suppress_nonmaxima(torch.rand(1, 6, 9)).shape
        torch.Size([1, 6, 9])
    """
    height, width = edges.shape[1:]
    strength = _smooth(edges, 1)
    blurred = _smooth(strength if method == "bsds" else edges, 4)
    across, down = _slope(blurred, 2), _slope(blurred, 1)
    xx, xy, yy = _slope(across, 2), _slope(across, 1), _slope(down, 1)
    if method == "bsds":
        angle = torch.atan2(torch.where(xy > 0, -yy, yy), xx + 1e-5)
    else:
        # the eigenvector whose eigenvalue is the largest, or the smallest where the map bends down
        sign = torch.where(xx + yy > 0, 1, -1)
        angle = torch.atan2(2 * sign * xy, sign * (xx - yy)) / 2
    normal_y, normal_x = torch.sin(angle), torch.cos(angle)
    rows, columns = torch.meshgrid(torch.arange(height).to(edges), torch.arange(width).to(edges), indexing="ij")

    def interpolate(y: Tensor, x: Tensor) -> Tensor:
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        top, left = y.long(), x.long()
        bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        dy, dx = y - top, x - left
        batch = torch.arange(len(edges))[:, None, None]
        upper = (1 - dx) * strength[batch, top, left] + dx * strength[batch, top, right]
        lower = (1 - dx) * strength[batch, bottom, left] + dx * strength[batch, bottom, right]
        return (1 - dy) * upper + dy * lower

    sides = [interpolate(rows + sign * normal_y, columns + sign * normal_x) for sign in (1, -1)]
    ridges = torch.where(strength * 1.01 < torch.maximum(*sides), 0, strength)
    margin = min(5, height // 2, width // 2) if method == "bsds" else 0
    if margin:
        distances = [torch.minimum(position, position.amax() - position) for position in (rows, columns)]
        ridges = ridges * (distances[0] / margin).clamp(max=1) * (distances[1] / margin).clamp(max=1)
    return ridges


def thin(mask: Tensor) -> Tensor:
    """Thin a mask to lines one pixel wide (Guo and Hall, 1989).

    Passes from alternating sides remove the pixels that are neither an end, nor a bridge, nor inside, until nothing
    changes. Connected pixels stay connected (8-connectivity).

    Args:
        mask: (B, H, W) bool.

    Returns:
        (B, H, W) bool, a subset of the mask.

    Example:
        >>> thin(torch.ones(1, 3, 7, dtype=torch.bool)).int()[0, 1]
        tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.int32)
    """
    mask = mask.clone()
    unchanged_passes, second = 0, False
    while unchanged_passes < 2:
        padded = F.pad(mask, (1, 1, 1, 1))
        # neighbors from the east, counterclockwise
        steps = [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
        x = [padded[:, row : row + mask.shape[1], column : column + mask.shape[2]] for row, column in steps]
        runs = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).int() for i in (0, 2, 4, 6))
        pairs = sum((x[i] | x[i + 1]).int() for i in (0, 2, 4, 6))
        shifted_pairs = sum((x[i + 1] | x[(i + 2) % 8]).int() for i in (0, 2, 4, 6))
        neighbors = torch.minimum(torch.as_tensor(pairs), torch.as_tensor(shifted_pairs))
        protected = (x[5] | x[6] | ~x[3]) & x[4] if second else (x[1] | x[2] | ~x[7]) & x[0]
        removed = mask & (runs == 1) & (neighbors >= 2) & (neighbors <= 3) & ~protected
        mask &= ~removed
        unchanged_passes, second = 0 if removed.any() else unchanged_passes + 1, not second
    return mask


def match_contours(detected: Tensor, truth: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Pair the pixels of two masks within a distance, one to one.

    The number of pairs is the largest possible and, among all such pairings, the sum of distances is the smallest.
    Which pixels have a partner is not always unique; how many is.

    Args:
        detected: (B, H, W) bool.
        truth: (B, H, W) bool.
        distance: largest distance of a pair, in pixels, >= 0.

    Returns:
        The pixels of `detected`, and those of `truth`, that have a partner, (B, H, W) bool each.

    Example:
        >>> detected, truth = torch.eye(5).bool()[None], torch.eye(5).roll(1, 0).bool()[None]
        >>> [int(mask.sum()) for mask in match_contours(detected, truth, 1.0)]
        [4, 4]
    """
    # the distances of all pairs; the native op holds those within the distance alone
    require("match_contours", "scipy")
    from scipy.optimize import linear_sum_assignment

    matched = torch.zeros_like(detected), torch.zeros_like(truth)
    for index, pair in enumerate(zip(detected, truth, strict=True)):
        pixels = [mask.nonzero() for mask in pair]
        lengths = torch.cdist(*(points.double() for points in pixels))
        never = (distance + 1) * (min(lengths.shape) + 1)  # one more pair is worth any distances
        cost = torch.where(lengths <= distance, lengths, never)
        rows, columns = (torch.from_numpy(indices) for indices in linear_sum_assignment(cost.numpy()))
        within = cost[rows, columns] < never
        for mask, points, chosen in zip(matched, pixels, (rows, columns), strict=True):
            mask[index][tuple(points[chosen[within]].T)] = True
    return matched


def count_matches(
    edges: Tensor,
    truths: Tensor,
    thresholds: Tensor | Sequence[float],
    distance: float,
    *,
    ignored: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int = 1,
    thinning: bool = True,
) -> tuple[Tensor, Tensor]:
    """Count the pixels of an edge map that match the contours of its annotators, at each threshold.

    At each threshold the pixels of at least that strength are thinned and matched with each annotator's contours by
    `match_contours`. ODS, OIS and AP of edges are computed from these counts, summed over images; clDice from the last
    two columns.

    Args:
        edges: (H, W) float, usually ridges (`suppress_nonmaxima`).
        truths: (A, H, W) bool, one contour map per annotator.
        thresholds: (T,) float, or a sequence.
        distance: largest distance of a pair, in pixels, >= 0; 0.0075 of the image's diagonal is customary.
        ignored: (H, W) bool, where a detection without a partner is not counted; None for nowhere.
        groups: (A, H, W) uint8, the group of each contour pixel, to count matches by group; None for one group.
        num_groups: G, larger than any group.
        thinning: whether to thin; False where the edges are lines of one pixel at every threshold already.

    Returns:
        Counts (T, 6) int64, and the matched truth pixels by group, (T, G) int64. The columns of the counts are, in this
        order: truth pixels with a partner, summed over annotators; all truth pixels, summed over annotators; detected
        pixels with a partner in any annotator; all detected pixels that are matched or not ignored; those of them
        within the distance of any truth pixel; truth pixels within the distance of any detected pixel, summed over
        annotators.

    Example:
        >>> truth = torch.eye(9).bool()
        >>> counts, _ = count_matches(truth.float(), truth[None], [0.5], 1.0)
        >>> counts.tolist()
        [[9, 9, 9, 9, 9, 9]]
    """
    ignored = torch.zeros_like(edges, dtype=torch.bool) if ignored is None else ignored
    groups = torch.zeros_like(truths, dtype=torch.uint8) if groups is None else groups
    thresholds = torch.as_tensor(thresholds, dtype=edges.dtype)

    def near(mask: Tensor) -> Tensor:
        lengths = torch.cdist(torch.ones_like(mask).nonzero().double(), mask.nonzero().double())
        return (lengths <= distance).any(1).reshape(mask.shape)

    counts, by_group = [], []
    for threshold in thresholds:
        detected = edges >= threshold
        detected = thin(detected[None])[0] if thinning else detected
        pairs = [match_contours(detected[None], truth[None], distance) for truth in truths]
        matched = torch.stack([matched_detected[0] for matched_detected, _ in pairs]).any(0)
        hits = torch.stack([matched_truth[0] for _, matched_truth in pairs])
        counted = matched | (detected & ~ignored)
        columns = hits, truths, matched, counted, counted & near(truths.any(0)), truths & near(detected)
        counts.append(torch.stack([column.sum() for column in columns]))
        by_group.append(torch.bincount(groups[hits].long(), minlength=num_groups))
    return torch.stack(counts), torch.stack(by_group)


def _smooth(image: Tensor, radius: int) -> Tensor:
    """Smooth (B, H, W) by weights 1, .., radius + 1, .., 1 over their sum along both axes, mirrored at the border."""
    weights = radius + 1 - torch.arange(-radius, radius + 1).abs().to(image)
    for axis in (1, 2):
        size = image.shape[axis]
        index = (torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)) % (2 * size)
        index = torch.minimum(index, 2 * size - 1 - index)  # (size, 2 * radius + 1)
        image = (image.movedim(axis, -1)[..., index] @ weights / weights.sum()).movedim(-1, axis)
    return image


def _slope(image: Tensor, axis: int) -> Tensor:
    """Return half the difference of the neighbors along an axis, and the whole difference at either end."""
    size = image.shape[axis]
    before, after = (torch.arange(size) - 1).clamp(min=0), (torch.arange(size) + 1).clamp(max=size - 1)
    shape = [-1 if i == axis else 1 for i in range(image.ndim)]
    steps = (after - before).clamp(min=1).to(image).reshape(shape)
    return (image.index_select(axis, after) - image.index_select(axis, before)) / steps
