"""Ctrl-C and SIGTERM end a run after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunInterruptedError(Exception):
    """A signal ended the run; its checkpoint is written.

    Args:
        step: steps that are done, for the message.

    Attributes:
        number: signal.SIGINT or signal.SIGTERM.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name} after step {step:,}")
        self.number = number


class Signals:
    """What has arrived so far.

    Attributes:
        received: the number of the first signal, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the second Ctrl-C ends the process at once."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """Note SIGINT and SIGTERM instead of being ended by them; in the main thread only."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {n: signal.signal(n, signals.handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
