"""Signals are noted, and handled as before afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mqa_gpt.training.signals import RunInterruptedError, caught_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handler_comes_back(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with caught_signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == number
    assert signal.getsignal(number) is handler
    message = f"interrupted by {number.name} after step 1,200"
    assert str(RunInterruptedError(number, 1200)) == message


def test_the_second_ctrl_c_ends_at_once() -> None:
    with caught_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    seen = []

    def work() -> None:
        with caught_signals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]
