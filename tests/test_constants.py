"""Constants that are cached, and those that CUDA graphs read."""

import weakref

import torch

from trace_fast.ops import constants
from trace_fast.ops.constants import cache_constants


def test_constants_are_made_once():
    numbers = []

    @cache_constants(maxsize=2)
    def count(number: int) -> torch.Tensor:
        numbers.append(number)
        return torch.full((3,), number)

    assert count(1) is count(1) and count.__name__ == "count"
    assert numbers == [1]
    for number in (2, 3, 1):
        count(number)
    assert numbers == [1, 2, 3, 1]


def test_constants_of_a_graph_outlive_the_cache(monkeypatch):
    @cache_constants(maxsize=2)
    def count(number: int) -> torch.Tensor:
        return torch.full((3,), number)

    before = weakref.ref(count(1))
    with monkeypatch.context() as patch:
        patch.setattr(constants, "is_capturing", lambda: True)
        of_the_graph = weakref.ref(count(2))
    for number in range(3, 70):
        count(number)
    assert before() is None
    assert of_the_graph() is not None and of_the_graph().tolist() == [2, 2, 2]
    assert not constants.is_capturing()
