"""trace_fast.jobs.pipeline: results in order, from threads that compute and from batches; what fails fails alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trace_fast import Detector
from trace_fast.jobs.errors import describe, is_out_of_memory
from trace_fast.jobs.finder import EdgeFinder
from trace_fast.jobs.pipeline import compute_results
from trace_fast.jobs.tasks import EdgesTask, Result

# threads compute, one thread does, or it computes batches
WAYS = [(True, 1), (False, 1), (False, 3)]


class Numbers:
    """A task that adds one to the length of bytes; those of one group are even, or odd."""

    op, file_kinds = "edges", ["png"]

    def __init__(self, is_parallel=True, batch_size=1):
        self.is_parallel, self.batch_size, self.passes, self.threads = is_parallel, batch_size, [], set()

    def read(self, content):
        return len(content)

    def get_group(self, photo):
        return photo % 2

    def compute(self, names, photos):
        self.passes.append(photos)
        self.threads.add((threading.current_thread().name, torch.get_num_threads()))
        if "bad" in names:
            raise ValueError("no <image at 0x7f00>")
        return [photo + 1 for photo in photos]

    def finish(self, name, photo, computed):
        time.sleep(0.01 * (name == "slow"))
        return Result(name, photo, computed)


@pytest.fixture(params=WAYS, ids=str)
def task(request):
    return Numbers(*request.param)


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [None, 1, 2, 5])
def test_results_are_in_order(task, workers):
    names = ["slow", "a", "bad", "slow", *"bcdefghij", "missing"]
    images = [(name, ValueError("gone") if name == "missing" else b"1" * index) for index, name in enumerate(names)]
    results = list(compute_results(task, iter(images), workers))
    assert [(result.name, result.width) for result in results] == [
        (name, None if name in ("bad", "missing") else index + 1) for index, name in enumerate(names)
    ]
    assert {result.name: result.error for result in results if result.error} == {"bad": "no <image>", "missing": "gone"}


def test_few_images_are_in_memory(task):
    ahead = []

    def list_images():
        for index in range(200):
            ahead.append(index)
            # each second one is of the first group, but the last
            yield str(index), b"1" * (index % 2 if index < 100 else 1)

    for done, _ in enumerate(compute_results(task, list_images(), 2)):
        assert len(ahead) - done <= 3 * 2 + 2 + 8 * task.batch_size * (task.batch_size > 1)
    assert done == 199


def test_batches_are_full_where_they_can_be():
    task = Numbers(False, 3)
    images = [(str(index), b"1" * index) for index in range(10)]
    list(compute_results(task, images, 2))
    assert task.passes == [[0, 2, 4], [1, 3, 5], [6, 8], [7, 9]]
    # an image does not wait for its group until the end
    task.passes.clear()
    list(compute_results(task, [("even", b""), *[(str(index), b"1" * 99) for index in range(500)]], 2))
    assert task.passes[-1] != [0] and [0] in task.passes


def test_each_image_has_one_thread_of_torch(set_threads):
    set_threads(8)

    def run(task, workers):
        list(compute_results(task, [("slow", b"")] * 20, workers))
        return {number for _, number in task.threads}, len(task.threads)

    assert run(Numbers(), 2) == ({1}, 2)
    assert run(Numbers(), None) == ({1}, 8)
    one = Numbers(False)
    assert run(one, 2) == ({8}, 1) and {name for name, _ in one.threads} == {threading.current_thread().name}
    assert torch.get_num_threads() == 8


def test_full_memory_is_raised_where_it_would_be_a_result():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert is_out_of_memory(error)
    for failure in (error, MemoryError()):
        (result,) = compute_results(Numbers(), [("a", failure)], 1)
        assert result.error == describe(failure)
        with pytest.raises(type(failure)):
            list(compute_results(Numbers(), [("a", failure)], 1, raise_memory=True))


def test_a_full_memory_is_that_of_the_whole_batch():
    class Full(Numbers):
        def compute(self, names, photos):
            self.passes.append(photos)
            raise MemoryError

    task = Full(False, 3)
    assert [result.error for result in compute_results(task, [("a", b"")] * 3, 1)] == ["MemoryError"] * 3
    assert len(task.passes) == 1


class TestStudents:
    """The embedded student in several threads, and in batches."""

    @pytest.fixture
    def photos(self):
        random = torch.Generator().manual_seed(0)
        return [torch.rand(1, 3, height, 48, generator=random) for height in (24, 36, 36, 36, 24, 25, 36)]

    def test_replicas_run_at_a_time(self, photos):
        model = Detector.from_pretrained("mini", device="cpu", size=(32, 48))
        expected = [model.edges(photo) for photo in photos]
        replica = model.replicated()
        theirs, own = (set(map(id, one.backbone.network.parameters())) for one in (model, replica))
        assert theirs == own and not set(model.backbone.network.modules()) & set(replica.backbone.network.modules())
        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                results = pool.map(lambda one: [one.edges(photo) for photo in photos], (model, replica))
                for edges in results:
                    assert all(map(torch.equal, edges, expected))

    def test_threads_do_not_wait_for_each_other(self, photos):
        """Hold the first of two threads inside its pass until the second one is there, too."""
        finder = EdgeFinder("mini", device="cpu", size=(32, 48))
        assert finder.is_parallel and not finder.replicas
        barrier = threading.Barrier(2, timeout=20)

        def wait(*_):
            barrier.wait()

        finder.loaded.decoder.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(finder.find, [photos[:1]] * 6))
        assert len(finder.replicas) == 2

    def test_batches_give_one_result_whatever_they_hold(self, photos):
        finder = EdgeFinder("mini", device="cpu", size=(32, 48), batch_size=3)
        assert not finder.is_parallel and finder.get_group(photos[0]) == finder.get_group(photos[5])
        assert finder.get_group(photos[0]) != finder.get_group(photos[1])
        alone = [finder.find([photo])[0][0] for photo in photos]
        for batch in ([0, 4], [5, 0, 4], [1, 2, 3], [3, 6, 1]):
            outputs = finder.find([photos[index] for index in batch])
            assert all(torch.equal(edges, alone[index]) for (edges, _), index in zip(outputs, batch, strict=True))
            assert [edges.shape for edges, _ in outputs] == [photos[index][:, :1].shape for index in batch]
        single = EdgeFinder("mini", device="cpu", size=(32, 48))
        for photo, edges in zip(photos, alone, strict=True):
            torch.testing.assert_close(edges, single.find([photo])[0][0], rtol=0, atol=1e-4)

    def test_what_runs_in_several_threads(self):
        assert not EdgeFinder("mini", stage=1, device="cpu", size=(32, 48)).is_parallel
        large = EdgeFinder("mini", device="cpu", size=(32, 48))
        large.loaded.backbone.network.register_parameter("more", torch.nn.Parameter(torch.empty(10**8, device="meta")))
        assert not large.is_parallel

    def test_batches_need_a_student(self):
        task = EdgesTask(EdgeFinder("mini", stage=1, device="cpu", size=(32, 48), batch_size=2))
        with pytest.raises(ValueError, match="edges: grid and batches must be of a student, got the search of mini"):
            task.settings  # noqa: B018


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
@pytest.mark.parametrize("is_kept", [True, False])
def test_memory_is_kept_for_the_next_image(is_kept):
    """Write 32 MiB twice: the second time the system gives no page, unless the environment chooses."""
    code = """
import resource
from trace_fast.jobs.memory import keep_memory
keep_memory()
faults = []
for _ in range(3):
    b"x" * 2**25
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {} if is_kept else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 10) == is_kept
