"""Divergence of attention maps on the GPU, over time and over space, reading each map in device memory once.

A program processes a block of grid columns and a tile of keys, one grid row after the other: it reads the row of tokens
below, whose logarithms and those of the two rows before stay in registers; the neighbors to the right and left were
read one row before and are still in the nearest cache. Tiles of keys write partial sums, which a second kernel adds in
a fixed order: every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_fast.kernels.launch import INTERPRETED, Config, check_grid, on_device, pick

__all__ = ["measure_divergence"]

LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(2.0**-126)  # probabilities are clamped to it from below
PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)  # whether kernels may hold NVIDIA's assembly


@triton.jit
def log2(x):
    """Return log2 of max(x, TINY) by one instruction, to two units in the last place; NaN gives NaN.

    Triton's log2 takes 25 instructions on an NVIDIA GPU, and would limit the kernel instead of memory.
    """
    x = tl.maximum(x, TINY, propagate_nan=tl.PropagateNan.ALL)
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def load_tokens(attention, token, column, tokens, rows):
    """Load rows of a map at a tile of keys, float32: (WIDTH, COLUMNS). Values outside are 1, their logarithms 0."""
    inside = (rows & (token < tokens))[:, None] & (column < tokens)[None, :]
    pointers = attention + tl.cast(token, tl.int64)[:, None] * tokens + column[None, :]
    return tl.load(pointers, inside, 1.0).to(tl.float32)


@triton.jit
def divergence_kernel(previous, current, step_sums, score_sums, height, width, tokens, segment, STEP: tl.constexpr,
                      ABDIV: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Sum over a tile of keys the divergence of the step, over all tokens of the program, and the score of each token.

    Program (strip of WIDTH grid columns, tile of COLUMNS keys, image and segment of grid rows).
    """
    strips, tiles, segments = tl.num_programs(0), tl.num_programs(1), tl.cdiv(height, segment)
    image, part = tl.cast(tl.program_id(2), tl.int64) // segments, tl.program_id(2) % segments
    x = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    left, right = tl.maximum(x - 1, 0), tl.minimum(x + 1, width - 1)
    rows = x < width
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    previous += image * tokens * tokens
    current += image * tokens * tokens
    score_sums += (image * tiles + tl.program_id(1)) * tokens
    first, end = part * segment, tl.minimum((part + 1) * segment, height)

    log_here = log2(load_tokens(current, first * width + x, column, tokens, rows))
    log_above = log_here
    if ABDIV:
        log_above = log2(load_tokens(current, tl.maximum(first - 1, 0) * width + x, column, tokens, rows))
    step = tl.zeros((WIDTH, COLUMNS), tl.float32)
    for y in range(first, end):
        below = load_tokens(current, tl.minimum(y + 1, height - 1) * width + x, column, tokens, rows)
        log_below = log2(below)
        if STEP:
            before = load_tokens(previous, y * width + x, column, tokens, rows)
            step += before * (log2(before) - log_here)
        if ABDIV:
            ahead = load_tokens(current, y * width + right, column, tokens, rows)
            behind = load_tokens(current, y * width + left, column, tokens, rows)
            score = ahead * (log2(ahead) - log2(behind)) + below * (log_below - log_above)
            tl.store(score_sums + y * width + x, tl.sum(score, 1), rows)
            log_above = log_here
        log_here = log_below
    if STEP:
        program = (tl.program_id(2) * tiles + tl.program_id(1)) * strips + tl.program_id(0)
        tl.store(step_sums + program, tl.sum(step))


@triton.jit
def finish_kernel(step_sums, score_sums, kl, scores, tokens, steps, tiles, STEP: tl.constexpr, ABDIV: tl.constexpr,
                  STEPS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Add the partial sums of one image in order; write TOKENS scores and the mean divergence of the step, in nats."""
    image = tl.cast(tl.program_id(1), tl.int64)
    if ABDIV:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        score_sums += image * tiles * tokens
        total = tl.zeros((TOKENS,), tl.float32)
        for tile in range(tiles):
            total += tl.load(score_sums + tile * tokens + token, token < tokens, 0.0)
        tl.store(scores + image * tokens + token, total * LN2, token < tokens)
    if STEP and tl.program_id(0) == 0:
        index = tl.arange(0, STEPS)
        step = tl.zeros((STEPS,), tl.float32)
        for start in range(0, steps, STEPS):
            step += tl.load(step_sums + image * steps + start + index, start + index < steps, 0.0)
        tl.store(kl + image, tl.sum(step) * (LN2 / tokens))


# tiles of WIDTH tokens by COLUMNS keys, large tiles first, by bytes of a number; Triton 3.6 spills 8 x 256 of bfloat16
CONFIGS = {
    4: (Config(8, 256, 4, 1), Config(8, 128, 4, 1), Config(4, 128, 2, 1)),
    2: (Config(8, 128, 4, 1), Config(4, 128, 2, 1)),
}
SEGMENT = 16  # grid rows of one program; it reads two more
RESIDENT = 4  # programs that a multiprocessor needs to hide the latency of memory
FINISH = Config(128, 256, 4, 1)  # numbers of scores and of steps that the second kernel adds at once


def launch_grid(config: Config, batch: int, height: int, width: int, tokens: int) -> tuple[int, int, int]:
    """Return the programs by strip of the grid, by tile of keys, and by image and segment of grid rows."""
    return triton.cdiv(width, config.rows), triton.cdiv(tokens, config.columns), batch * triton.cdiv(height, SEGMENT)


def pick_tile(current: Tensor, height: int, width: int) -> Config:
    """Return the tile for maps (B, N, N) of a grid."""
    batch, tokens, _ = current.shape
    configs, sides = CONFIGS[current.dtype.itemsize], (width, tokens)
    return pick(configs, lambda c: launch_grid(c, batch, height, width, tokens), sides, current.device, RESIDENT)


def measure_divergence(
    previous: Tensor | None, current: Tensor, size: tuple[int, int] | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Return KL(previous || current) (B,) and ABDiv of current (B, *size).

    The first is not computed if previous is None, the second if size is None.
    """
    batch, tokens, _ = current.shape
    # the divergence of a step does not depend on the grid
    height, width = size or (triton.cdiv(tokens, 64), min(tokens, 64))
    config = config or pick_tile(current, height, width)
    strips, tiles, _ = grid = launch_grid(config, batch, height, width, tokens)
    check_grid("step_kl_abdiv", *grid)
    steps = strips * tiles * triton.cdiv(height, SEGMENT)
    flags = {"STEP": previous is not None, "ABDIV": size is not None}
    step_sums = current.new_empty(batch * steps, dtype=torch.float32)
    score_sums = current.new_empty(batch * tiles * tokens if size else 0, dtype=torch.float32)
    kl = current.new_empty(batch, dtype=torch.float32)
    scores = current.new_empty((batch, *(size or (0, 0))), dtype=torch.float32)
    with on_device(current):
        divergence_kernel[grid](
            current if previous is None else previous, current, step_sums, score_sums, height, width, tokens, SEGMENT,
            **flags, WIDTH=config.rows, COLUMNS=config.columns, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        finish_kernel[triton.cdiv(tokens, FINISH.rows) if size else 1, batch](
            step_sums, score_sums, kl, scores, tokens, steps, tiles,
            **flags, TOKENS=FINISH.rows, STEPS=FINISH.columns, num_warps=FINISH.warps, num_stages=FINISH.stages,
        )  # fmt: skip
    return kl, scores
