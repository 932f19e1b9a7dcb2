"""Tasks of gpu_report.py divided among processes: most of their time goes into compiling."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

Row = dict[str, Any]
Task = tuple[Any, ...]

CONTAGIOUS = ("CUDA error", "AcceleratorError", "BrokenProcessPool")


def in_processes(
    function: Callable[..., Row], tasks: list[Task], workers: int, deadline: float
) -> Iterator[Row]:
    """`function` of each task, in no particular order.

    A kernel that reads wrong memory ends the use of the GPU for its whole process. So tasks that
    failed in that way are tried once more, each in a process of its own: what fails there is at
    fault itself.

    Args:
        workers: how many processes; 0 for this one alone.
        deadline: by `time.monotonic`; tasks that are not done by then are skipped.
    """
    if not workers or time.monotonic() > deadline:
        for task in tasks:
            is_late = time.monotonic() > deadline
            yield skipped(task) if is_late else attempt(function, task)
        return
    suspects = []
    for task, row in zip(tasks, run(function, tasks, workers, deadline), strict=True):
        if any(sign in row.get("error", "") for sign in CONTAGIOUS):
            suspects.append(task)
        else:
            yield row
    with ThreadPoolExecutor(workers) as threads:
        alone = [threads.submit(lambda t: [*run(function, [t], 1, deadline)], t) for t in suspects]
        for future in alone:
            yield from future.result()


def run(
    function: Callable[..., Row], tasks: list[Task], workers: int, deadline: float
) -> Iterator[Row]:
    """One row per task, in order, from a new pool of processes."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(attempt, function, task) for task in tasks]
        for future, task in zip(futures, tasks, strict=True):
            yield wait(future, task, deadline)
        pool.shutdown(wait=False, cancel_futures=True)
        if time.monotonic() > deadline:  # what still runs may hang, and would slow down the rest
            for process in multiprocessing.active_children():
                process.kill()
                process.join()


def wait(future: Future[Row], task: Task, deadline: float) -> Row:
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return skipped(task)
    except Exception:  # the process died
        return failure(task)


def attempt(function: Callable[..., Row], task: Task) -> Row:
    """What the function says, or the error that it ends with."""
    try:
        return function(*task)
    except Exception:
        return failure(task)


def skipped(task: Task) -> Row:
    return {"task": repr(task), "skipped": "no time left"}


def failure(task: Task) -> Row:
    return {"task": repr(task), "passed": False, "error": traceback.format_exc()}
