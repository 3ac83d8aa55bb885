"""The mean self-attention map of a forward pass, over heads and blocks, accumulated while the network runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from trace_fast import ops

__all__ = ["MeanAttention"]


class MeanAttention:
    """The mean of the maps of all blocks that are read.

    Pass `on_attention` and `attend` to the backbone's capture, run the network, and call `finish`. Blocks of a coarser
    grid share another map, which is resized to the finest grid after the last block.

    Args:
        total: (B, N, N) float32 or bfloat16 over the finest grid, which becomes the mean.
        grids: (h, w) in tokens of every block that is read, in order.

    Example:
        >>> mean = MeanAttention(torch.empty(1, 6, 6), [(2, 3)])
        >>> mean.clear()
        >>> mean.on_attention(0, torch.rand(1, 4, 6, 8), torch.rand(1, 4, 6, 8))
        >>> mean.finish().sum(-1)
        tensor([[1., 1., 1., 1., 1., 1.]])
    """

    def __init__(self, total: Tensor, grids: Sequence[tuple[int, int]]):
        self.grids = list(grids)
        self.finest = max(self.grids, key=math.prod)
        self.totals = {self.finest: total}
        for grid in set(self.grids) - {self.finest}:
            self.totals[grid] = total.new_empty(len(total), math.prod(grid), math.prod(grid))

    def clear(self) -> None:
        """Start a pass: what was accumulated before is forgotten."""
        for total in self.totals.values():
            total.zero_()

    def on_attention(
        self, index: int, query: Tensor, key: Tensor, lse: Tensor | None = None, others: Tensor | None = None
    ) -> None:
        """Add the map of a block; the arguments are those of a capture.

        Args:
            index: of the block in `grids`.
            query: (B, H, N, d) float.
            key: (B, H, N, d) float.
            lse: see `ops.accumulate_attention`.
            others: see `ops.accumulate_attention`.
        """
        total = self.totals[self.grids[index]]
        ops.accumulate_attention(total, query, key, 1 / len(self.grids), lse=lse, others=others)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, first: int = 0) -> Tensor:
        """Attend in the place of a block, and add its map on the way; see `ops.attend`."""
        return ops.attend(query, key, value, self.totals[self.grids[index]], 1 / len(self.grids), first=first)

    def finish(self) -> Tensor:
        """Return `total`, the mean over heads and blocks; rows sum to 1."""
        total = self.totals[self.finest]
        for grid, coarse in self.totals.items():
            if grid != self.finest:
                ops.accumulate_resized(total, coarse, grid, self.finest, 1.0)
        return total
