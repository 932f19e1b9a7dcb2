"""Progress on standard error: a line or bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from tqdm import tqdm  # type: ignore[import-untyped]

PERIOD = 15.0  # seconds between lines where there is no terminal


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A status line for stages without a step count, set by the function that this gives.

    A terminal shows each stage at once and nothing at the end. Elsewhere, as in a log, the current
    stage is printed every `PERIOD`, so that what is quick prints nothing.
    """
    if _is_terminal():
        with tqdm(bar_format="{desc}", leave=False) as line:
            yield line.set_description_str
        return
    stages: list[str] = []
    ended = Event()

    def report() -> None:
        while not ended.wait(PERIOD):
            with suppress(OSError, ValueError):  # stderr is closed
                print(*stages[-1:], file=sys.stderr, flush=True)

    def say(stage: str) -> None:
        stages[:] = [stage]

    reporter = Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield say
    finally:
        ended.set()
        reporter.join()


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """A progress bar, moved by the given function: how many are done, and a remark next to them.

    Where there is no terminal, a line as `status` prints it.
    """
    if not _is_terminal():
        with status() as say:
            yield lambda done, remark: say(f"{done:,} of {total:,} {unit}s, {remark}")
        return
    with tqdm(total=total, unit=unit, miniters=0, dynamic_ncols=True, leave=False) as bar:

        def show(done: int, remark: str) -> None:
            bar.set_postfix_str(remark, refresh=False)
            bar.update(done - bar.n)
            if done == total:
                bar.refresh()

        yield show


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
