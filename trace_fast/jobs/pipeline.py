"""The way of images through a task: they are read, computed and finished in threads, and come out in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_fast.jobs.errors import FAILURES, describe, is_out_of_memory
from trace_fast.jobs.tasks import Photo, Result, Task
from trace_fast.progress import LOGGER

__all__ = ["compute_results"]

Content = Path | bytes | Exception
READERS = 4  # threads beside the network, at most, unless the caller chooses
WAITING = 8  # batches of images, at most, that are behind one whose batch is not full


def compute_results(
    task: Task,
    images: Iterable[tuple[str, Content]],
    workers: int | None = None,
    write: Callable[[Result], None] | None = None,
    raise_memory: bool = False,
) -> Iterator[Result]:
    """Yield the result of each image, in order; those that fail have an error.

    Where several threads may compute at a time, each takes an image from reading to writing, and torch uses no other
    threads for it: with several, the last bits of some sums depend on their number. Otherwise the thread of the caller
    computes with all threads of torch, so that an interrupt ends a long pass at once, and the others read the next
    images and finish the last ones.

    About 3 * workers images are in memory, and those that wait until a batch is full.

    Args:
        task: what to compute.
        images: name and file, or bytes, of each; an exception in their place is the reason why there are none.
        workers: number of threads. None is the number that torch has, where several may compute at a time; otherwise
            that of processor cores, at most 4.
        write: called in a thread with each result that has no error.
        raise_memory: raise where memory is full, in place of an error of the image.
    """
    threads = torch.get_num_threads()
    if workers is None:
        workers = threads if task.is_parallel else min(READERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, "trace-fast", torch.set_num_threads, (1 if task.is_parallel else threads,))
    pipeline = Pipeline(task, pool, workers, write)
    run = pipeline.run_images if task.is_parallel else pipeline.run_stages
    waiting: deque[tuple[str, Future[Result]]] = deque()
    try:
        for image in run(images):
            waiting.append(image)
            while waiting and (len(waiting) > 2 * workers or waiting[0][1].done()):
                yield take_result(*waiting.popleft(), raise_memory)
        while waiting:
            yield take_result(*waiting.popleft(), raise_memory)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def take_result(name: str, future: Future[Result], raise_memory: bool) -> Result:
    """Return the result of an image, or one with the reason of its failure."""
    try:
        return future.result()
    except FAILURES as error:
        if raise_memory and is_out_of_memory(error):
            raise
        LOGGER.debug("%s failed here:", name, exc_info=error)
        return Result(name, error=describe(error))


@dataclass(eq=False)
class Image:
    """An image on its way.

    Attributes:
        name: of the image.
        photo: its pixels, once they are read.
        result: its result to come; None while it waits for its pass.
    """

    name: str
    photo: Future[Photo]
    result: Future[Any] | None = None


@dataclass(frozen=True)
class Pipeline:
    """A task and the threads that work on it.

    Attributes:
        task: what to compute.
        pool: of threads.
        workers: their number.
        write: called with each result.
    """

    task: Task
    pool: ThreadPoolExecutor
    workers: int
    write: Callable[[Result], None] | None

    def run_images(self, images: Iterable[tuple[str, Content]]) -> Iterator[tuple[str, Future[Result]]]:
        """Yield the name of each image and its result to come, which one thread computes from the file on."""

        def work(name: str, content: Content) -> Result:
            photo = self.read(content)
            return self.finish(name, photo, *self.task.compute([name], [photo]))

        for name, content in images:
            yield name, self.pool.submit(work, name, content)

    def run_stages(self, images: Iterable[tuple[str, Content]]) -> Iterator[tuple[str, Future[Result]]]:
        """Yield the name of each image and its result to come, which the thread of the caller computes."""
        ordered: deque[Image] = deque()
        groups: dict[Hashable, list[Image]] = {}
        for image in self.read_ahead(images):
            ordered.append(image)
            if image.photo.exception() is None:
                key = self.task.get_group(image.photo.result())
                groups.setdefault(key, []).append(image)
                if len(groups[key]) == self.task.batch_size:
                    self.compute(groups.pop(key))
                elif len(ordered) >= WAITING * self.task.batch_size:
                    # the first group has the image that has waited longest
                    self.compute(groups.pop(next(iter(groups))))
            else:
                image.result = image.photo
            yield from take_computed(ordered)
        for group in groups.values():
            self.compute(group)
        yield from take_computed(ordered)

    def read_ahead(self, images: Iterable[tuple[str, Content]]) -> Iterator[Image]:
        """Yield images in order; as many more as there are threads are read meanwhile."""
        reading: deque[Image] = deque()
        for name, content in images:
            reading.append(Image(name, self.pool.submit(self.read, content)))
            if len(reading) > self.workers:
                yield reading.popleft()
        yield from reading

    def compute(self, images: list[Image]) -> None:
        """Compute images in one pass, and let threads finish them."""
        photos = [image.photo.result() for image in images]
        try:
            computed = self.task.compute([image.name for image in images], photos)
        except FAILURES as error:
            if len(images) > 1 and not is_out_of_memory(error):
                # one by one, since the others are no part of the failure
                for image in images:
                    self.compute([image])
                return
            for image in images:
                image.result = Future()
                image.result.set_exception(error)
            return
        for image, photo, values in zip(images, photos, computed, strict=True):
            image.result = self.pool.submit(self.finish, image.name, photo, values)

    def read(self, content: Content) -> Photo:
        """Return an image, or raise what stands in its place."""
        if isinstance(content, Exception):
            raise content
        return self.task.read(content)

    def finish(self, name: str, photo: Photo, computed: Any) -> Result:
        """Return the result of an image, and write it."""
        result = self.task.finish(name, photo, computed)
        if self.write is not None:
            self.write(result)
        return result


def take_computed(images: deque[Image]) -> Iterator[tuple[str, Future[Result]]]:
    """Remove the first images, up to one that waits for its pass, and yield their names and results to come."""
    while images and (result := images[0].result) is not None:
        yield images.popleft().name, result
