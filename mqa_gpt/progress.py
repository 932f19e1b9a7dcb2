"""A status line for stages that have no step count."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm  # type: ignore[import-untyped]

INTERVAL = 30.0  # seconds between the lines of a command whose output is redirected


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Give a function that shows on standard error what a command is doing.

    On a terminal it rewrites one line, which is gone at the end. Elsewhere, as in a log, it prints
    a line every `INTERVAL` seconds at most, and nothing for what takes less.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        with tqdm(bar_format="{desc}", leave=False) as line:
            yield line.set_description_str
        return
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= INTERVAL and sys.stderr is not None:
            with suppress(OSError):  # the reader closed the pipe
                print(text, file=sys.stderr, flush=True)
            last = now

    yield say
