"""What a command is at, where no count of steps would say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped]


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on standard error that the given function rewrites, gone at the end.

    Like the progress bars, on a terminal only.
    """
    with tqdm(bar_format="{desc}", leave=False, disable=None) as line:
        yield line.set_description_str
