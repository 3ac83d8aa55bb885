"""The hierarchy of the regions of an edge map: the tree in which its basins merge at their boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trace_fast import ops

__all__ = ["Hierarchy", "Nodes"]


@dataclass(frozen=True)
class Hierarchy:
    """The tree in which the basins of an edge map merge: n leaves, and then n - 1 unions of two, on the CPU.

    Attributes:
        parents: (2n - 1,) int64, the node of which each is a part, always a later one; the last is its own.
        levels: (2n - 1,) float32, strength of the boundary at which the parts of a node merged, 0 for a leaf.
    """

    parents: Tensor
    levels: Tensor

    @staticmethod
    def of(edges: Tensor) -> tuple[Tensor, Hierarchy]:
        """Return the basin of each pixel, (H, W) int64 from 0, and the hierarchy of edges (H, W) float32."""
        labels = ops.watershed(edges[None])[0][0]
        parents, levels = ops.merge_tree(labels, edges)
        return labels.long() - 1, Hierarchy(parents.cpu().long(), levels.cpu())

    def cut(self, least: float) -> Tensor:
        """Return the largest node of a level below `least` that contains each leaf, (n,) int64."""
        nodes = torch.arange(len(self.parents), device="cpu")
        tops = torch.where((self.levels < least)[self.parents], self.parents, nodes)
        # each step doubles how far a node looks
        while not torch.equal(tops, further := tops[tops]):
            tops = further
        return tops[: len(nodes) // 2 + 1]

    def order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order the leaves so that those of every node follow each other.

        Returns:
            The place of each leaf, (n,) int64; and for each node the first place of its leaves and the one behind the
            last, (2n - 1,) int64 each.
        """
        nodes, parents = len(self.parents), self.parents.tolist()
        counts = [1] * (nodes // 2 + 1) + [0] * (nodes // 2)
        for node in range(nodes - 1):
            counts[parents[node]] += counts[node]
        first, taken = [0] * nodes, [0] * nodes
        for node in reversed(range(nodes - 1)):
            first[node] = first[parents[node]] + taken[parents[node]]
            taken[parents[node]] += counts[node]
        start, sizes = (torch.tensor(values, dtype=torch.int64, device="cpu") for values in (first, counts))
        return start[: nodes // 2 + 1], start, start + sizes


@dataclass(frozen=True)
class Nodes:
    """The pixels of the nodes of a hierarchy.

    Attributes:
        places: (H, W) int32, the leaf of each pixel, by its place in the order of `Hierarchy.order`.
        start: (2n - 1,) int64, the first place of each node.
        stop: (2n - 1,) int64, the place behind its last.
        areas: (2n - 1,) int64, in pixels.
    """

    places: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    areas: np.ndarray

    @staticmethod
    def of(basins: Tensor, tree: Hierarchy) -> Nodes:
        """Return the nodes of a hierarchy, given the basin of each pixel (H, W)."""
        order, first, behind = tree.order()
        places = order.to(torch.int32)[basins.cpu()].numpy()
        start, stop = first.numpy(), behind.numpy()
        areas = sum_leaves(np.bincount(places.ravel(), minlength=len(order)), start, stop)
        return Nodes(places, start, stop, areas)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over the pixels of each node, (2n - 1,) float64, of values (H, W)."""
        leaves = np.bincount(self.places.ravel(), values.ravel(), minlength=len(self.start) // 2 + 1)
        return sum_leaves(leaves, self.start, self.stop)

    def count(self, mask: np.ndarray, box: tuple[slice, slice], nodes: np.ndarray) -> np.ndarray:
        """Return how many pixels of a mask, bool and cropped to a box, each of some nodes has."""
        leaves = np.bincount(self.places[box][mask], minlength=len(self.start) // 2 + 1)
        return sum_leaves(leaves, self.start[nodes], self.stop[nodes])

    def make_mask(self, node: int, box: tuple[slice, slice] = np.s_[:, :]) -> np.ndarray:
        """Return a node as a mask, bool and cropped to a box."""
        # places before the first become large numbers
        offsets = (self.places[box] - np.int32(self.start[node])).view(np.uint32)
        return offsets < np.uint32(self.stop[node] - self.start[node])

    def make_masks(self, nodes: Sequence[int]) -> np.ndarray:
        """Return nodes as masks (k, H, W) bool."""
        height, width = self.places.shape
        masks = np.zeros((len(nodes), height, width), bool)
        # the last row that is assigned to a leaf stays
        rows, flat = np.repeat(np.arange(height), width), self.places.ravel()
        first, last = np.zeros((2, len(self.start) // 2 + 1), np.int64)
        last[flat], first[flat[::-1]] = rows, rows[::-1]
        for mask, node in zip(masks, nodes, strict=True):
            leaves = slice(self.start[node], self.stop[node])
            box = np.s_[first[leaves].min() : last[leaves].max() + 1, :]
            mask[box] = self.make_mask(node, box)
        return masks


def sum_leaves(values: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return the sums over nodes of values of the leaves, (n,) by their places."""
    sums = np.concatenate([values[:0].sum(keepdims=True), np.cumsum(values)])
    return sums[stop] - sums[start]
