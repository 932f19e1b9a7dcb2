"""Progress on standard error: a line or bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic

from tqdm import tqdm  # type: ignore[import-untyped]

# Seconds between lines where there is no terminal: at first, and at most. They grow with the time
# that has passed, so that the log of a long job stays short.
PERIOD, LONGEST_PERIOD = 15.0, 300.0


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A status line for stages without a step count, set by the function that this gives.

    A terminal shows each stage at once and nothing at the end. Elsewhere, as in a log, the current
    stage is printed after `PERIOD` and then now and then, so that what is quick prints nothing.
    """
    if _is_terminal():
        with tqdm(bar_format="{desc}", leave=False) as line:
            yield line.set_description_str
        return
    stages: list[str] = []
    ended = Event()

    def report() -> None:
        period = PERIOD
        while not ended.wait(period):
            period = min(1.2 * period, LONGEST_PERIOD)
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

    Where there is no terminal, a line as `status` prints it, with the time that is left.
    """
    if not _is_terminal():
        begin: list[tuple[int, float]] = []  # the first count and when it was

        def text(done: int, remark: str) -> str:
            begin[:] = begin or [(done, monotonic())]
            count, seconds = done - begin[0][0], monotonic() - begin[0][1]
            left = ""
            if count and done < total:
                left = f", {duration_text(seconds / count * (total - done))} left"
            return f"{done:,} of {total:,} {unit}s, {remark}{left}"

        with status() as say:
            yield lambda done, remark: say(text(done, remark))
        return
    with tqdm(total=total, unit=unit, miniters=0, dynamic_ncols=True, leave=False) as bar:

        def show(done: int, remark: str) -> None:
            bar.set_postfix_str(remark, refresh=False)
            bar.update(done - bar.n)
            if done == total:
                bar.refresh()

        yield show


def duration_text(seconds: float) -> str:
    """Such as "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
