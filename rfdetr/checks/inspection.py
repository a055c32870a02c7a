"""Image inspection in parallel processes, behind the cache."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from tqdm import TMonitor, tqdm

from rfdetr.checks.cache import FactsCache, FileStamp, Inspected
from rfdetr.checks.image_probe import ImageFacts, probe_bytes, read_content
from rfdetr.data.decode import Levels
from rfdetr.data.spawn import usable_cores

BATCH = 32
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Item = TypeVar("Item")
Paths = tuple[str, ...]
Task = Callable[[Paths, int], list[Inspected]]


def hash_batch(paths: Paths, _max_pixels: int) -> list[Inspected]:
    """Content hashes only; the facts of readable files are a placeholder."""
    results = []
    for path in paths:
        _, content, problem = read_content(path)
        results.append(Inspected(content, problem or ImageFacts("ok")))
    return results


def inspect_batch(paths: Paths, max_pixels: int, levels: Levels | None = None) -> list[Inspected]:
    """Hash and decode each file."""
    results = []
    for path in paths:
        data, content, problem = read_content(path)
        results.append(Inspected(content, problem or probe_bytes(data, max_pixels, levels)))
    return results


def inspect_images(
    paths: Sequence[str],
    cache: FactsCache,
    *,
    max_pixels: int,
    levels: Levels | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Inspected]:
    """Inspect image files, in order; the results of unchanged files come from the cache.

    `levels` are the grey levels of 16-bit and float images that become 0 and 255.
    """

    def run(task: Task, chosen: Sequence[str], label: str) -> list[Inspected]:
        batches = [tuple(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
        with tqdm(total=len(chosen), desc=label, unit="image", disable=not progress) as bar:
            results = _in_processes(task, batches, max_pixels, workers, bar)
        return [found for batch in results for found in batch]

    stamps = {stamp.path: stamp for stamp in map(_stamp, dict.fromkeys(paths)) if stamp}
    known = cache.known_files(stamps.values())
    sizes = cache.known_sizes()
    left = [path for path in stamps if path not in known]

    moved = [path for path in left if stamps[path].size in sizes]
    if moved:
        hashes = dict(zip(moved, run(hash_batch, moved, "reading"), strict=True))
        contents = cache.known_contents({found.hash for found in hashes.values()})
        fresh = {
            path: Inspected(found.hash, contents[found.hash])
            for path, found in hashes.items()
            if found.hash in contents
        }
    else:
        fresh = {}
    unknown = [path for path in left if path not in fresh]
    if unknown:
        decode = partial(inspect_batch, levels=levels)
        fresh.update(zip(unknown, run(decode, unknown, "decoding"), strict=True))
    if fresh:
        cache.store((stamps[path], found) for path, found in fresh.items())
    known.update(fresh)
    absent = Inspected("", ImageFacts("missing"))
    return [known.get(path, absent) for path in paths]


def _stamp(path: str) -> FileStamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path object per image costs more than the call
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return FileStamp(path, -1, -1)  # reading it reports what is wrong
    return FileStamp(path, status.st_size, status.st_mtime_ns)


def _in_processes(
    task: Task,
    batches: Sequence[Paths],
    max_pixels: int,
    workers: int | None,
    bar: tqdm[Any],
) -> list[list[Inspected]]:
    workers = min(workers or usable_cores(), len(batches))
    if workers <= 1:
        results = []
        for batch in batches:
            results.append(task(batch, max_pixels))
            bar.update(len(batch))
        return results
    done: dict[int, list[Inspected]] = {}
    with ProcessPoolExecutor(workers, mp_context=process_context()) as pool:
        with child_setup():
            futures = {pool.submit(task, batch, max_pixels): i for i, batch in enumerate(batches)}
        for future in as_completed(futures):
            try:
                done[futures[future]] = future.result()
            except BrokenProcessPool:  # a decoder killed its process: inspect each file alone
                continue
            bar.update(len(batches[futures[future]]))
    for i, batch in enumerate(batches):
        if i not in done:
            done[i] = [_in_own_process(task, path, max_pixels) for path in batch]
            bar.update(len(batch))
    return [done[i] for i in range(len(batches))]


def _in_own_process(task: Task, path: str, max_pixels: int) -> Inspected:
    with ProcessPoolExecutor(1, mp_context=process_context()) as pool:
        with child_setup():
            future: Future[list[Inspected]] = pool.submit(task, (path,), max_pixels)
        try:
            return future.result()[0]
        except BrokenProcessPool:
            return Inspected("", ImageFacts("unreadable", "the decoder crashed on this file"))


def in_forks(
    task: Callable[[Sequence[Item]], Any], items: Sequence[Item], *, workers: int
) -> list[Any]:
    """The results of `task` for consecutive shares of the items, one process each.

    Forked processes inherit the task and what it refers to without copying. Where processes cannot
    be forked, this process does all the work.
    """
    context = process_context()
    if workers < 2 or len(items) < 2 or context.get_start_method() != "fork":
        return [task(items)]
    _inherited[:] = [(task, items)]
    share = -(-len(items) // workers)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_do_share, i, i + share) for i in range(0, len(items), share)]
        _inherited.clear()
        return [future.result() for future in futures]


_inherited: list[tuple[Callable[[Sequence[Any]], Any], Sequence[Any]]] = []


def _do_share(start: int, stop: int) -> Any:
    task, items = _inherited[0]
    return task(items[start:stop])


def process_context() -> multiprocessing.context.BaseContext:
    """Fork if no other thread could hold a lock, otherwise spawn."""
    forkable = "fork" in multiprocessing.get_all_start_methods()
    alone = all(
        thread is threading.main_thread() or isinstance(thread, TMonitor)
        for thread in threading.enumerate()
    )
    return multiprocessing.get_context("fork" if forkable and alone else "spawn")


@contextmanager
def child_setup() -> Iterator[None]:
    """Child processes started inside use one thread each and do not run the caller's script.

    A spawned child imports the main module; a script without the usual `__name__` guard would start
    the complete check again in every child.
    """
    kept = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    main = sys.modules["__main__"]
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
