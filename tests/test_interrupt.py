"""Ctrl-C in the middle of an op: it ends at once, on the thread that computes and on those that help it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from trace_fast import _C, ops

# the core asks every 50 ms; the rest is for machines with other work
LATENCY = 0.5


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(height, width):
    return random(1, height, width) > 0.5


# by op, a function that returns arguments with which it takes long
ARGUMENTS = {
    "accumulate_attention": lambda: (
        torch.zeros(1, 6000, 6000).fill_(1),
        random(1, 16, 6000, 32),
        random(1, 16, 6000, 32, seed=1),
        1.0,
    ),
    "attend": lambda: tuple(random(1, 16, 6000, 64, seed=seed) for seed in range(3)),
    "readout": lambda: (random(1, 32, 6000, 64), random(1, 32, 6000, 64, seed=1), random(6000, 64)),
    "accumulate_resized": lambda: (torch.zeros(1, 6400, 6400), random(1, 1600, 1600), (40, 40), (80, 80), 1.0),
    "random_walk": lambda: (random(2, 64, 96), random(64, 96), 5, 10, 2**31 - 1),
    "match_contours": lambda: (blobs(300, 400), blobs(300, 400).flip(1), 60.0),
    "thin": lambda: (torch.ones(1, 3000, 4000, dtype=torch.bool),),
    "merge_tree": lambda: (torch.arange(1, 1_000_001, dtype=torch.int32).view(1000, 1000), random(1000, 1000)),
}


@pytest.fixture(autouse=True)
def handler():
    """Let Ctrl-C raise even where the tests run in the background, which ignores it."""
    ops.thin(blobs(8, 8))  # the first op imports parts of torch, which a later one could not import again
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(work):
    """Call a function until Ctrl-C comes, after 0.2 seconds, and return the seconds that it then took to end."""
    times = []

    def send():
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    try:  # before the timer starts: a busy machine may need longer for the next line
        threading.Timer(0.2, send).start()
        while True:  # a fast machine needs several calls to take that long
            work()
    except KeyboardInterrupt:
        return time.monotonic() - times[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_ops_end_at_once(name, threads):
    arguments = ARGUMENTS[name]()
    assert interrupt(lambda: getattr(ops, name)(*arguments)) < LATENCY


def test_a_walk_ends_at_once_and_the_next_op_runs():
    masks, edges = random(2, 24, 40), random(24, 40)
    assert interrupt(lambda: ops.random_walk(masks, edges, 5, 10, 2**31 - 1)) < LATENCY
    assert torch.isfinite(ops.random_walk(masks, edges, 5, 10, 3)).all()


def test_a_handler_that_does_not_raise_changes_nothing():
    calls = []
    # it calls an op itself
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(ops.thin(blobs(8, 8))))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        masks, edges = random(2, 24, 40), random(24, 40)
        walked = ops.random_walk(masks, edges, 5, 10, 20_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls
    assert torch.equal(walked, ops.random_walk(masks, edges, 5, 10, 20_000))


def test_other_threads_are_not_asked():
    # Python runs handlers in the main thread alone
    masks, edges, walked = random(2, 24, 40), random(24, 40), []
    thread = threading.Thread(target=lambda: walked.append(ops.random_walk(masks, edges, 5, 10, 5_000)))
    thread.start()
    interrupt(lambda: time.sleep(60))
    thread.join()
    assert torch.equal(walked[0], ops.random_walk(masks, edges, 5, 10, 5_000))


def test_memory_that_is_missing_is_an_error_on_every_thread(threads):
    # the core is called without the checks of the op: no thread ends the process
    size = 1 << 40
    with pytest.raises(MemoryError):
        _C.cpu.thin(1, 1, size, size // 1024, 1, threads)
