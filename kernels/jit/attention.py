"""Attention on the GPU: the head mean accumulated in place, and linear readouts that never form the map.

Logits are in units of log 2, so that an exponential is one instruction. A head of d channels is multiplied as two
parts, its largest power of two and the rest (72 = 64 + 16), instead of being padded to the next power (128). Sums are
float32. Launchers take tensors that trace_fast/ops/attention.py has checked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from trace_fast.kernels.launch import Config, alignment, check_grid, on_device, pick

__all__ = [
    "Features",
    "accumulate_attention",
    "accumulate_resized",
    "add_probabilities",
    "exclude_keys",
    "readout",
    "readout_backward",
    "row_statistics",
]

LOG2E = tl.constexpr(1.4426950408889634)
# the share of a row's mass that must be left where the mass of other keys is subtracted: rounding errors grow by its
# reciprocal
LEAST_SHARE = tl.constexpr(1 / 32)


@triton.jit
def locate_head(query, key, heads, query_image, query_head, key_image, key_head, ALIGN: tl.constexpr):
    """Return the head of the second program axis: its index, its image, and the starts of its queries and keys."""
    map_ = tl.cast(tl.program_id(1), tl.int64)
    image, head = map_ // heads, map_ % heads
    query += (image * query_image + head * query_head) * ALIGN
    key += (image * key_image + head * key_head) * ALIGN
    return map_, image, query, key


@triton.jit
def load_rows(pointer, stride, first, tokens, START: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
              ROWS: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Load rows first .. first + ROWS of features, channels START .. START + WIDTH: (ROWS, WIDTH), zero outside.

    Strides are in units of ALIGN elements, so that the compiler knows that every row starts at such a multiple.
    """
    row = tl.arange(0, ROWS)
    channel = START + tl.arange(0, WIDTH)
    pointer += tl.cast(first, tl.int64) * stride * ALIGN
    pointers = pointer + (row * stride)[:, None] * ALIGN + channel[None, :]
    if START + WIDTH > CHANNELS:
        return tl.load(pointers, (first + row < tokens)[:, None] & (channel < CHANNELS)[None, :], 0.0)
    elif EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, (first + row < tokens)[:, None], 0.0)


@triton.jit
def load_head(pointer, stride, first, tokens, WIDE: tl.constexpr, TAIL: tl.constexpr, CHANNELS: tl.constexpr,
              ROWS: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Load both parts of the rows of a head, (ROWS, WIDE) and (ROWS, TAIL); without a tail, the first part twice."""
    wide = load_rows(pointer, stride, first, tokens, 0, WIDE, CHANNELS, ROWS, EVEN, ALIGN)
    tail = wide
    if TAIL > 0:
        tail = load_rows(pointer, stride, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
    return wide, tail


@triton.jit
def store_rows(pointer, first, tokens, values, START: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """Write (ROWS, WIDTH) at row `first` and channel START of a contiguous (tokens, CHANNELS), within its bounds."""
    row = first + tl.arange(0, ROWS)
    channel = START + tl.arange(0, WIDTH)
    inside = (row < tokens)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pointer + tl.cast(row, tl.int64)[:, None] * CHANNELS + channel[None, :], values, inside)


@triton.jit
def multiply(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply the rows of a by the rows of b, over both parts of the head: (A, B) float32."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL > 0:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision=PRECISION)
    return product


@triton.jit
def exp2_polynomial(x):
    """Return 2^x for x <= 0, by multiply-adds, to two units in the last place; 0 from about 2^-127 down, NaN for NaN.

    The special-function unit of a multiprocessor computes 16 exponentials per clock, its multiply-add units 128
    operations. The former limits the kernels, so a part of the exponentials is faster on the latter.
    """
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)  # the power of -127 has exponent bits 0 and is 0
    shifted = x + 12582912.0  # after 1.5 * 2^23 is added, the low bits hold the nearest integer
    f = x - (shifted - 12582912.0)
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    # minimax for (2^f - 1) / f on [-1/2, 1/2], relative error of 2^f 9e-8
    p = 0.001326472726 * f + 0.00967151271
    p = p * f + 0.05550733744
    p = p * f + 0.2402224208
    p = p * f + 0.6931469776
    p = p * f + 1.0
    return p * power


@triton.jit
def exponentials(x, POLYNOMIAL: tl.constexpr):
    """Return 2^x, (M, N): the last N / POLYNOMIAL columns by polynomials, or none if POLYNOMIAL is 0.

    Columns are halved until that part is left; the same threads hold both halves, so that no data moves between them.
    """
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if POLYNOMIAL == 0:
        return tl.exp2(x)
    elif POLYNOMIAL == 1:
        return exp2_polynomial(x)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
        both = tl.join(tl.exp2(left), exponentials(right, POLYNOMIAL // 2))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (ROWS, 2 * HALF))


@triton.jit
def sum_row(q, q_tail, key, key_row, tokens, scale, CHANNELS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
            EVEN: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            POLYNOMIAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Return the maximum of each row of logits and the sum of exp2(logit - maximum): two of (ROWS,) float32."""
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tokens, COLUMNS):
        k, k_tail = load_head(key, key_row, start, tokens, WIDE, TAIL, CHANNELS, COLUMNS, EVEN, ALIGN)
        logits = multiply(q, q_tail, k, k_tail, TAIL, PRECISION)
        if not EVEN:
            logits = tl.where((start + tl.arange(0, COLUMNS) < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1) * scale)
        masses = exponentials(logits * scale - higher[:, None], POLYNOMIAL)
        total = total * tl.exp2(highest - higher) + tl.sum(masses, 1)
        highest = higher
    return highest, total


@triton.jit
def row_statistics_kernel(query, key, top, mass, heads, tokens, query_image, query_head, query_row, key_image,
                          key_head, key_row, scale, CHANNELS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
                          EVEN: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                          POLYNOMIAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute the maximum of each row of logits and the sum of exp2(logit - maximum), for a block of rows of a head."""
    first = tl.program_id(0) * ROWS
    map_, _, query, key = locate_head(query, key, heads, query_image, query_head, key_image, key_head, ALIGN)
    q, q_tail = load_head(query, query_row, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
    highest, total = sum_row(q, q_tail, key, key_row, tokens, scale, CHANNELS, WIDE, TAIL, EVEN, ALIGN, ROWS, COLUMNS,
                             POLYNOMIAL, PRECISION)  # fmt: skip
    row = first + tl.arange(0, ROWS)
    at = map_ * tokens + row
    tl.store(top + at, highest, row < tokens)
    tl.store(mass + at, total, row < tokens)


@triton.jit
def exclude_keys_kernel(lse, query, key, others, own_lse, heads, tokens, other_tokens, query_image, query_head,
                        query_row, key_image, key_head, key_row, others_image, others_head, others_row, scale,
                        CHANNELS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr,
                        ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POLYNOMIAL: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """Compute the log-sum-exp over the keys alone from that over keys and others, for a block of rows of a head.

    The mass of the others is subtracted. A block of which a row has less than LEAST_SHARE left goes through the keys.
    """
    first = tl.program_id(0) * ROWS
    map_, image, query, key = locate_head(query, key, heads, query_image, query_head, key_image, key_head, ALIGN)
    others += (image * others_image + map_ % heads * others_head) * ALIGN
    q, q_tail = load_head(query, query_row, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
    row = first + tl.arange(0, ROWS)
    whole = tl.load(lse + map_ * tokens + row, row < tokens, 0.0) * LOG2E
    share = tl.full((ROWS,), 1.0, tl.float32)
    for start in range(0, other_tokens, COLUMNS):
        k, k_tail = load_head(others, others_row, start, other_tokens, WIDE, TAIL, CHANNELS, COLUMNS, False, ALIGN)
        logits = multiply(q, q_tail, k, k_tail, TAIL, PRECISION)
        logits = tl.where((start + tl.arange(0, COLUMNS) < other_tokens)[None, :], logits, float("-inf"))
        share -= tl.sum(exponentials(logits * scale - whole[:, None], POLYNOMIAL), 1)
    share = tl.where(row < tokens, share, 1.0)
    own = whole + tl.log2(share)
    if tl.min(share) < LEAST_SHARE:
        highest, total = sum_row(q, q_tail, key, key_row, tokens, scale, CHANNELS, WIDE, TAIL, EVEN, ALIGN, ROWS,
                                 COLUMNS, POLYNOMIAL, PRECISION)  # fmt: skip
        own = tl.where(share < LEAST_SHARE, highest + tl.log2(total), own)
    tl.store(own_lse + map_ * tokens + row, own / LOG2E, row < tokens)


@triton.jit
def add_probabilities_kernel(total, query, key, top, mass, heads, tokens, query_image, query_head, query_row,
                                key_image, key_head, key_row, scale, weight, CHANNELS: tl.constexpr,
                                WIDE: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
                                ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, LSE: tl.constexpr,
                                POLYNOMIAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add weight * sum over heads of the probabilities to one tile of the map; the sum stays in registers.

    If LSE, `top` holds natural log-sum-exps, and `mass` is not read.
    """
    # programs go through GROUP tiles of rows for each tile of columns: those that run at once share keys in the cache
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(tokens, COLUMNS)
    tile, group = tl.program_id(0), tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    first, start = (group * GROUP + within % height) * ROWS, within // height * COLUMNS
    image = tl.cast(tl.program_id(1), tl.int64)
    row, column = first + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)

    query += image * query_image * ALIGN
    key += image * key_image * ALIGN
    top += image * heads * tokens
    mass += image * heads * tokens
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(heads):
        q, q_tail = load_head(query, query_row, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
        k, k_tail = load_head(key, key_row, start, tokens, WIDE, TAIL, CHANNELS, COLUMNS, EVEN, ALIGN)
        highest = tl.load(top + row, row < tokens, 0.0)
        factor = tl.full((ROWS,), 1.0, tl.float32) * weight
        if LSE:
            highest *= LOG2E
        else:
            factor /= tl.load(mass + row, row < tokens, 1.0)
        logits = multiply(q, q_tail, k, k_tail, TAIL, PRECISION)
        mean += exponentials(logits * scale - highest[:, None], POLYNOMIAL) * factor[:, None]
        query += query_head * ALIGN
        key += key_head * ALIGN
        top += tokens
        mass += tokens

    pointers = total + (image * tokens + row)[:, None] * tokens + column[None, :]
    if EVEN:
        tl.store(pointers, (tl.load(pointers).to(tl.float32) + mean).to(total.dtype.element_ty))
    else:
        inside = (row < tokens)[:, None] & (column < tokens)[None, :]
        before = tl.load(pointers, inside, 0.0).to(tl.float32)
        tl.store(pointers, (before + mean).to(total.dtype.element_ty), inside)


@triton.jit
def accumulate_resized_kernel(total, attention, down_mass, across_mass, height, width, target_height, target_width,
                              step_down, step_across, weight, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Add weight * U attention diag(1/c) U^T to one tile of the finer map, read directly from the coarse map."""
    tokens, fine = height * width, target_height * target_width
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.cast(tl.program_id(2), tl.int64)
    attention += image * tokens * tokens
    spread = tl.zeros((ROWS, COLUMNS), tl.float32)
    for key_corner in tl.static_range(4):
        y, y_share = find_neighbor(column // target_width, step_down, height, key_corner // 2)
        x, x_share = find_neighbor(column % target_width, step_across, width, key_corner % 2)
        inside = column < fine
        share = y_share * x_share
        share /= tl.load(down_mass + y, inside, 1.0) * tl.load(across_mass + x, inside, 1.0)
        mixed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for query_corner in tl.static_range(4):
            v, v_share = find_neighbor(row // target_width, step_down, height, query_corner // 2)
            u, u_share = find_neighbor(row % target_width, step_across, width, query_corner % 2)
            begin = tl.cast(v * width + u, tl.int64) * tokens
            pointers = attention + begin[:, None] + (y * width + x)[None, :]
            mixed += (v_share * u_share)[:, None] * tl.load(pointers, (row < fine)[:, None] & inside[None, :], 0.0)
        spread += share[None, :] * mixed
    pointers = total + (image * fine + row)[:, None] * fine + column[None, :]
    inside = (row < fine)[:, None] & (column < fine)[None, :]
    before = tl.load(pointers, inside, 0.0).to(tl.float32)
    tl.store(pointers, (before + weight * spread).to(total.dtype.element_ty), inside)


@triton.jit
def find_neighbor(position, step, size, SECOND: tl.constexpr):
    """Return one of the two coarse points around a fine point, and its weight (bilinear, align_corners=False)."""
    source = tl.maximum((position + 0.5) * step - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    if SECOND:
        return tl.minimum(first + 1, size - 1), source - first
    else:
        return first, 1.0 - (source - first)


@triton.jit
def readout_kernel(query, key, values, parts, lse, heads, tokens, columns, query_image, query_head, query_row,
                   key_image, key_head, key_row, scale, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
                   TAIL: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, POLYNOMIAL: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Compute probabilities times values, and log-sum-exps, of a block of rows of a head, in one pass over the keys."""
    first = tl.program_id(0) * ROWS
    map_, _, query, key = locate_head(query, key, heads, query_image, query_head, key_image, key_head, ALIGN)
    q, q_tail = load_head(query, query_row, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUES), tl.float32)
    for start in range(0, tokens, COLUMNS):
        k, k_tail = load_head(key, key_row, start, tokens, WIDE, TAIL, CHANNELS, COLUMNS, EVEN, ALIGN)
        logits = multiply(q, q_tail, k, k_tail, TAIL, PRECISION)
        if not EVEN:
            logits = tl.where((start + tl.arange(0, COLUMNS) < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1) * scale)
        fade = tl.exp2(highest - higher)
        masses = exponentials(logits * scale - higher[:, None], POLYNOMIAL)
        total = total * fade + tl.sum(masses, 1)
        value = load_values(values, start, tokens, columns, VALUES, COLUMNS)
        sums = tl.dot(masses.to(value.dtype), value, sums * fade[:, None], input_precision=PRECISION)
        highest = higher
    row = first + tl.arange(0, ROWS)
    tl.store(lse + map_ * tokens + row, highest + tl.log2(total), row < tokens)
    store_values(parts + map_ * tokens * columns, first, tokens, columns, sums / total[:, None], VALUES, ROWS)


@triton.jit
def load_values(values, first, tokens, columns, VALUES: tl.constexpr, ROWS: tl.constexpr):
    """Load rows first .. first + ROWS of a contiguous (tokens, columns): (ROWS, VALUES), zero outside."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, VALUES)
    inside = (row < tokens)[:, None] & (column < columns)[None, :]
    return tl.load(values + row[:, None] * columns + column[None, :], inside, 0.0)


@triton.jit
def store_values(values, first, tokens, columns, result, VALUES: tl.constexpr, ROWS: tl.constexpr):
    """Write (ROWS, VALUES) at row `first` of a contiguous (tokens, columns), within its bounds."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, VALUES)
    inside = (row < tokens)[:, None] & (column < columns)[None, :]
    tl.store(values + row[:, None] * columns + column[None, :], result, inside)


@triton.jit
def readout_keys_kernel(grad, delta, query, key, values, lse, grad_key, grad_values, heads, tokens, columns,
                        query_image, query_head, query_row, key_image, key_head, key_row, scale, natural,
                        CHANNELS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, VALUES: tl.constexpr,
                        EVEN: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """Compute the gradients of a block of keys and of values, of one head; the map is transposed, COLUMNS by ROWS."""
    start = tl.program_id(0) * COLUMNS
    map_, image, query, key = locate_head(query, key, heads, query_image, query_head, key_image, key_head, ALIGN)
    k, k_tail = load_head(key, key_row, start, tokens, WIDE, TAIL, CHANNELS, COLUMNS, EVEN, ALIGN)
    value = load_values(values, start, tokens, columns, VALUES, COLUMNS)
    key_sums = tl.zeros((COLUMNS, WIDE), tl.float32)
    tail_sums = tl.zeros((COLUMNS, TAIL if TAIL > 0 else 16), tl.float32)
    value_sums = tl.zeros((COLUMNS, VALUES), tl.float32)
    for first in range(0, tokens, ROWS):
        q, q_tail = load_head(query, query_row, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
        above = load_values(grad + image * tokens * columns, first, tokens, columns, VALUES, ROWS)
        row = first + tl.arange(0, ROWS)
        # rows beyond the last have no probabilities
        mass = tl.load(lse + map_ * tokens + row, row < tokens, float("inf"))
        slope = tl.load(delta + map_ * tokens + row, row < tokens, 0.0)
        logits = multiply(k, k_tail, q, q_tail, TAIL, PRECISION)
        p = tl.exp2(logits * scale - mass[None, :])
        value_sums = tl.dot(p.to(value.dtype), above, value_sums, input_precision=PRECISION)
        p *= tl.dot(value, tl.trans(above), input_precision=PRECISION) - slope[None, :]
        key_sums = tl.dot(p.to(k.dtype), q, key_sums, input_precision=PRECISION)
        if TAIL > 0:
            tail_sums = tl.dot(p.to(k.dtype), q_tail, tail_sums, input_precision=PRECISION)
    grad_key += map_ * tokens * CHANNELS
    store_rows(grad_key, start, tokens, key_sums * natural, 0, WIDE, CHANNELS, COLUMNS)
    if TAIL > 0:
        store_rows(grad_key, start, tokens, tail_sums * natural, WIDE, TAIL, CHANNELS, COLUMNS)
    store_values(grad_values + map_ * tokens * columns, start, tokens, columns, value_sums, VALUES, COLUMNS)


@triton.jit
def readout_queries_kernel(grad, delta, query, key, values, lse, grad_query, heads, tokens, columns,
                           query_image, query_head, query_row, key_image, key_head, key_row, scale, natural,
                           CHANNELS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, VALUES: tl.constexpr,
                           EVEN: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           PRECISION: tl.constexpr):  # fmt: skip
    """Compute the gradient of a block of queries of one head."""
    first = tl.program_id(0) * ROWS
    map_, image, query, key = locate_head(query, key, heads, query_image, query_head, key_image, key_head, ALIGN)
    q, q_tail = load_head(query, query_row, first, tokens, WIDE, TAIL, CHANNELS, ROWS, EVEN, ALIGN)
    above = load_values(grad + image * tokens * columns, first, tokens, columns, VALUES, ROWS)
    row = first + tl.arange(0, ROWS)
    mass = tl.load(lse + map_ * tokens + row, row < tokens, 0.0)
    slope = tl.load(delta + map_ * tokens + row, row < tokens, 0.0)
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    tail_sums = tl.zeros((ROWS, TAIL if TAIL > 0 else 16), tl.float32)
    for start in range(0, tokens, COLUMNS):
        k, k_tail = load_head(key, key_row, start, tokens, WIDE, TAIL, CHANNELS, COLUMNS, EVEN, ALIGN)
        value = load_values(values, start, tokens, columns, VALUES, COLUMNS)
        logits = multiply(q, q_tail, k, k_tail, TAIL, PRECISION)
        if not EVEN:  # a key beyond the last has zero channels, which a huge probability would turn into NaN
            logits = tl.where((start + tl.arange(0, COLUMNS) < tokens)[None, :], logits, float("-inf"))
        p = tl.exp2(logits * scale - mass[:, None])
        p *= tl.dot(above, tl.trans(value), input_precision=PRECISION) - slope[:, None]
        sums = tl.dot(p.to(k.dtype), k, sums, input_precision=PRECISION)
        if TAIL > 0:
            tail_sums = tl.dot(p.to(k.dtype), k_tail, tail_sums, input_precision=PRECISION)
    grad_query += map_ * tokens * CHANNELS
    store_rows(grad_query, first, tokens, sums * natural, 0, WIDE, CHANNELS, ROWS)
    if TAIL > 0:
        store_rows(grad_query, first, tokens, tail_sums * natural, WIDE, TAIL, CHANNELS, ROWS)


# tiles by element size, kernel, and the number of channels of a head (both parts) up to which they fit; large tiles
# first, see `pick`. The resources of each are in benchmarks/results/kernels.json
CONFIGS: dict[int, dict[str, dict[int, tuple[Config, ...]]]] = {
    2: {
        "row_statistics": {
            80: (Config(128, 128, 8, 3), Config(64, 128, 4, 3), Config(64, 64, 4, 3)),
            160: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
            256: (Config(64, 64, 4, 2), Config(32, 32, 4, 2)),
        },
        "exclude_keys": {
            160: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
            256: (Config(64, 64, 4, 2), Config(32, 32, 4, 2)),
        },
        "add_probabilities": {
            80: (Config(128, 128, 8, 3), Config(64, 64, 4, 3)),
            128: (Config(128, 128, 8, 2), Config(64, 64, 4, 2)),
            160: (Config(64, 128, 8, 2), Config(64, 64, 4, 2)),
            256: (Config(64, 64, 4, 2), Config(32, 32, 4, 2)),
        },
        "readout": {
            80: (Config(128, 128, 8, 3), Config(64, 64, 4, 3)),
            160: (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
            256: (Config(64, 64, 4, 2), Config(32, 32, 4, 2)),
        },
        "readout_keys": {
            48: (Config(64, 128, 8, 2), Config(64, 64, 4, 2)),
            80: (Config(32, 128, 8, 2), Config(32, 64, 4, 2)),
            256: (Config(32, 32, 4, 1),),
        },
        "readout_queries": {
            64: (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
            80: (Config(64, 64, 8, 2), Config(32, 64, 4, 2)),
            256: (Config(32, 32, 4, 1),),
        },
    },
    4: {
        "row_statistics": {80: (Config(64, 32, 4, 2),), 256: (Config(16, 32, 4, 1),)},
        "exclude_keys": {80: (Config(64, 32, 4, 2),), 256: (Config(16, 32, 4, 1),)},
        "add_probabilities": {80: (Config(64, 32, 4, 2),), 160: (Config(16, 32, 4, 2),), 256: (Config(16, 32, 4, 1),)},
        "readout": {80: (Config(64, 32, 4, 2),), 256: (Config(16, 16, 4, 1),)},
        "readout_keys": {64: (Config(32, 32, 4, 1),), 256: (Config(16, 16, 4, 1),)},
        "readout_queries": {64: (Config(32, 32, 4, 1),), 256: (Config(16, 16, 4, 1),)},
    },
}
RESIZED = Config(8, 256, 8, 1)
GROUP = 8


def candidates(kernel: str, element_size: int, channels: int) -> tuple[Config, ...]:
    """Return the configurations of a kernel for heads of this number of channels."""
    return next(configs for limit, configs in CONFIGS[element_size][kernel].items() if channels <= limit)


class Features:
    """Query and key as the kernels need them: one dtype, contiguous channels, a positive scale in units of log 2."""

    def __init__(self, query: Tensor, key: Tensor, scale: float):
        if query.dtype != key.dtype:
            query, key = query.float(), key.float()
        if scale <= 0:
            query, scale = query * (0.0 if scale == 0 else -1.0), abs(scale) or 1.0
        self.query, self.key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        self.batch, self.heads, self.tokens, self.channels = query.shape
        self.scale = scale * LOG2E.value
        # the largest power of two in the channels, and the rest; a product needs at least 16
        self.wide = max(16, 1 << self.channels.bit_length() - 1)
        rest = self.channels - self.wide
        self.tail = max(16, triton.next_power_of_2(rest)) if rest > 0 else 0
        self.align = alignment(self.query, self.key)
        strides = *self.query.stride()[:3], *self.key.stride()[:3]
        self.strides = [stride // self.align for stride in strides]  # of image, head and row, for query and key

    def pick(self, kernel: str, grid: Callable[[Config], tuple[int, ...]]) -> Config:
        """Return the fastest configuration of a kernel for heads of this size, on a grid."""
        configs = candidates(kernel, self.query.element_size(), self.wide + self.tail)
        config = pick(configs, grid, (self.tokens, self.tokens), self.query.device)
        check_grid(kernel, *grid(config))
        return config

    def row_grid(self, config: Config) -> tuple[int, int]:
        """Return the grid of one program per block of rows of each head."""
        return triton.cdiv(self.tokens, config.rows), self.batch * self.heads

    def column_grid(self, config: Config) -> tuple[int, int]:
        """Return the grid of one program per block of columns of each head."""
        return triton.cdiv(self.tokens, config.columns), self.batch * self.heads

    def tile_grid(self, config: Config) -> tuple[int, int]:
        """Return the grid of one program per tile of each map."""
        return triton.cdiv(self.tokens, config.rows) * triton.cdiv(self.tokens, config.columns), self.batch

    def constants(self, config: Config) -> dict[str, object]:
        """Return the compile-time arguments that the kernels of the family share."""
        return {
            "CHANNELS": self.channels,
            "WIDE": self.wide,
            "TAIL": self.tail,
            "EVEN": self.tokens % config.rows == 0 and self.tokens % config.columns == 0,
            "ALIGN": self.align,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            # a product of float32 is three of tf32, which keep the mantissa
            "PRECISION": "tf32x3" if self.query.dtype == torch.float32 else "ieee",
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def row_statistics(features: Features, config: Config | None = None) -> Tensor:
    """Return the maximum of each row of logits in units of log 2, and the sum of 2^(logit - maximum): (2, B, H, N)."""
    x = features
    config = config or x.pick("row_statistics", x.row_grid)
    statistics = x.query.new_empty((2, x.batch, x.heads, x.tokens), dtype=torch.float32)
    row_statistics_kernel[x.row_grid(config)](
        x.query, x.key, *statistics, x.heads, x.tokens, *x.strides, x.scale,
        **x.constants(config), POLYNOMIAL=config.polynomial,
    )  # fmt: skip
    return statistics


def exclude_keys(features: Features, lse: Tensor, others: Tensor, config: Config | None = None) -> Tensor:
    """Return the log-sum-exp (B, H, N) over the keys alone, of that over the keys and others (B, H, T, d)."""
    x = features
    others = others.to(x.query.dtype)
    others = others if others.stride(-1) == 1 else others.contiguous()
    align = alignment(x.query, x.key, others)
    strides = [stride // align for tensor in (x.query, x.key, others) for stride in tensor.stride()[:3]]
    config = config or x.pick("exclude_keys", x.row_grid)
    own_lse = lse.new_empty(lse.shape)
    exclude_keys_kernel[x.row_grid(config)](
        lse, x.query, x.key, others, own_lse, x.heads, x.tokens, others.shape[2], *strides, x.scale,
        **{**x.constants(config), "ALIGN": align}, POLYNOMIAL=config.polynomial,
    )  # fmt: skip
    return own_lse


def add_probabilities(
    total: Tensor, features: Features, statistics: Tensor, weight: float, config: Config | None = None
) -> None:
    """Add weight * head mean of the probabilities to total (B, N, N), given the statistics of the rows.

    The statistics are those of `row_statistics`, or the log-sum-exp (1, B, H, N).
    """
    x = features
    config = config or x.pick("add_probabilities", x.tile_grid)
    add_probabilities_kernel[x.tile_grid(config)](
        total, x.query, x.key, statistics[0], statistics[-1], x.heads, x.tokens, *x.strides, x.scale, weight / x.heads,
        **x.constants(config), GROUP=GROUP, LSE=len(statistics) == 1, POLYNOMIAL=config.polynomial,
    )  # fmt: skip


def accumulate_attention(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    weight: float,
    scale: float,
    lse: Tensor | None = None,
    others: Tensor | None = None,
) -> None:
    """Add the map in a pass over the keys, after one for the statistics of the rows unless `lse` gives them."""
    with on_device(total):
        features = Features(query, key, scale)
        if lse is None:
            statistics = row_statistics(features)
        elif others is None:
            statistics = lse.contiguous()[None]
        else:
            statistics = exclude_keys(features, lse.contiguous(), others)[None]
        add_probabilities(total, features, statistics, weight)


def accumulate_resized(
    total: Tensor,
    attention: Tensor,
    size: tuple[int, int],
    target: tuple[int, int],
    weight: float,
    masses: tuple[Tensor, Tensor],
) -> None:
    """Add a coarse map (B, N, N) to total (B, M, M); `masses` are the column sums of the interpolation, by axis."""
    fine, config = total.shape[1], RESIZED
    with on_device(total):
        accumulate_resized_kernel[triton.cdiv(fine, config.rows), triton.cdiv(fine, config.columns), len(total)](
            total, attention, *masses, *size, *target, size[0] / target[0], size[1] / target[1], weight,
            ROWS=config.rows, COLUMNS=config.columns, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def readout(query: Tensor, key: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return probabilities times values (N, C) for each head, (B, H, N, C), and log2 of the row sums of exp(logits)."""
    x = Features(query, key, scale)
    config = x.pick("readout", x.row_grid)
    columns = values.shape[1]
    parts = values.new_empty((x.batch, x.heads, x.tokens, columns), dtype=torch.float32)
    lse = parts.new_empty((x.batch, x.heads, x.tokens))
    with on_device(query):
        readout_kernel[x.row_grid(config)](
            x.query, x.key, values.to(x.query.dtype).contiguous(), parts, lse, x.heads, x.tokens, columns,
            *x.strides, x.scale, **x.constants(config), VALUES=_padded(columns), POLYNOMIAL=config.polynomial,
        )  # fmt: skip
    return parts, lse


def readout_backward(
    grad: Tensor, query: Tensor, key: Tensor, values: Tensor, parts: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and, by head, values, from grad (B, N, C) of each head's product `parts`."""
    x = Features(query, key, scale)
    columns = values.shape[1]
    grad = grad.to(x.query.dtype).contiguous()
    # the mean that is subtracted from each row of dP, computed from the same rounded numbers as dP
    delta = (grad.float()[:, None] * parts).sum(-1)  # (B, H, N)
    inputs = grad, delta, x.query, x.key, values.to(x.query.dtype).contiguous(), lse
    sizes = x.heads, x.tokens, columns, *x.strides, x.scale
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    grad_values = delta.new_empty((x.batch, x.heads, x.tokens, columns))
    with on_device(query):
        config = x.pick("readout_keys", x.column_grid)
        readout_keys_kernel[x.column_grid(config)](
            *inputs, grad_key, grad_values, *sizes, abs(scale), **x.constants(config), VALUES=_padded(columns),
        )  # fmt: skip
        config = x.pick("readout_queries", x.row_grid)
        readout_queries_kernel[x.row_grid(config)](
            *inputs, grad_query, *sizes, scale, **x.constants(config), VALUES=_padded(columns),
        )  # fmt: skip
    return grad_query, grad_key, grad_values


def _padded(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))
