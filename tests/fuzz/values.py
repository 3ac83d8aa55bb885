"""Hostile values, arrays, tensors, trees of JSON and bytes."""

from __future__ import annotations

import copy
import decimal
import fractions
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NUMBERS",
    "choose",
    "distort_array",
    "distort_bytes",
    "distort_tensor",
    "distort_tree",
    "dump_json",
    "hostile",
]

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 255, 256, 65535, 65536, -(2**31), 2**31 - 1, 2**31, 2**32, -(2**63), 2**63 - 1, 2**63, 2**64,
    10**30, 0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e19, 1e30, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, "", "a", "1", "nan", "\0", "../..", "\ud800", [], {}, [[]], [None], {"a": 1}, [[[]]], [1, [2]],
    "9" * 400, ["a"] * 3, {"size": [2, 3]},
)  # fmt: skip
# of Python alone, not of JSON
OBJECTS: tuple[Any, ...] = (
    b"", b"\xff", (), object(), np.float32(1.5), np.int8(-1), np.uint64(2**64 - 1), np.bool_(True), 1j, range(3),
    fractions.Fraction(1, 3), decimal.Decimal("0.1"), np.array([]), np.array(1.0), np.nan, torch.tensor(1.0), set(),
    torch.tensor([1, 2]), lambda: None, int, Ellipsis, slice(None), "x" * 10_000,
)  # fmt: skip


def choose(random: np.random.Generator, options: Any) -> Any:
    """Return one of some options."""
    options = list(options)
    return options[int(random.integers(len(options)))]


def hostile(random: np.random.Generator, objects: bool = False) -> Any:
    """Return a number or something else where perhaps another one belongs."""
    kind = random.random()
    if kind < 0.6:
        return choose(random, NUMBERS)
    return copy.copy(choose(random, OBJECTS if objects and kind < 0.8 else OTHERS))


def distort_tree(random: np.random.Generator, tree: Any, changes: int, objects: bool = False) -> Any:
    """Return a copy of nested lists and dicts in which some nodes are reoffsetd, repeated or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(changes):
        nodes = list(list_nodes(tree))
        if not nodes:
            return hostile(random, objects)
        # the number of a level is a share, not the number of its nodes: all kinds of nodes get their turn
        parent, key = choose(random, nodes)
        action = random.random()
        if action < 0.7:
            parent[key] = hostile(random, objects)
        elif action < 0.85:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[f"{key}{'_' * int(random.integers(2))}"] = copy.deepcopy(choose(random, list(parent.values())))
    return tree


def list_nodes(tree: Any) -> Any:
    """Yield (parent, key) of every node below the root; of long lists the first ones."""
    items: Any = ()
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree[:8]))
    for key, value in items:
        yield tree, key
        yield from list_nodes(value)


def distort_bytes(random: np.random.Generator, content: bytes, changes: int) -> bytes:
    """Return bytes of which some are changed, removed, repeated or reoffsetd."""
    data = bytearray(content)
    for _ in range(changes):
        if not data:
            return bytes(data)
        # headers, which say how the rest is read, are at the beginning
        offset = int(random.integers(len(data) if random.random() < 0.4 else min(len(data), 64)))
        action = random.random()
        if action < 0.35:
            data[offset] = int(random.integers(256))
        elif action < 0.55:
            data[offset] ^= 1 << int(random.integers(8))
        elif action < 0.7:
            width = choose(random, (1, 2, 4, 8))
            value = choose(random, (0, 1, 2**15, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1))
            data[offset : offset + width] = (value % 2 ** (8 * width)).to_bytes(
                width, choose(random, ("little", "big"))
            )
        elif action < 0.8:
            del data[offset:]
        elif action < 0.9:
            del data[offset : offset + int(random.integers(1, 16))]
        else:
            other = int(random.integers(len(data)))
            data[offset:offset] = data[other : other + int(random.integers(1, 64))]
    return bytes(data)


class SubArray(np.ndarray):
    """A subclass that changes nothing."""


class SubTensor(torch.Tensor):
    """A subclass that changes nothing."""


def distort_array(random: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Return an array of the same values, stored in another way."""
    ways: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: np.asfortranarray(x),
        lambda x: x[::-1].copy()[::-1],
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: x.view(SubArray),
        lambda x: np.ma.masked_array(x),
        lambda x: np.ascontiguousarray(x.T).T,
        lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape),
        lambda x: np.lib.stride_tricks.as_strided(x.copy(), x.shape, x.strides, writeable=False),
    ]
    return choose(random, ways)(array)


def distort_tensor(random: np.random.Generator, tensor: Tensor) -> Tensor:
    """Return a tensor of the same values, stored in another way; some ways are no ordinary tensors."""
    ways: list[Callable[[Tensor], Any]] = [
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.repeat_interleave(x, 2, -1)[..., ::2],
        lambda x: torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape),
        lambda x: x.flip(-1).contiguous().flip(-1),
        lambda x: x.as_subclass(SubTensor),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
        lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.half() if x.is_floating_point() else x.long(),
        lambda x: x.double(),
        lambda x: x.to(torch.complex64),
        lambda x: x[None],
        lambda x: x[0],
        lambda x: x[:0],
        lambda x: x[..., :0],
        lambda x: x[..., :1],
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x[:1].expand(x.shape),
        lambda x: x.new_tensor(0).expand(10**9, 10**9, 3),
    ]
    try:
        return choose(random, ways)(tensor)
    except (IndexError, NotImplementedError, TypeError):  # there is no such way for this shape or dtype
        return tensor


def dump_json(random: np.random.Generator, tree: Any) -> bytes:
    """Return a tree as JSON, in one of the ways in which files are written."""
    text = json.dumps(tree, indent=choose(random, (None, 1)), ensure_ascii=bool(random.random() < 0.5))
    encoding = choose(random, ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"))
    return text.encode(encoding, "surrogatepass")
