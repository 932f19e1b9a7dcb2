"""benchmarks/cpu/phases.py: the clock inside the compiled pass."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba, the extra 'cpu', is not installed")

from benchmarks.cpu import phases


def test_the_first_thread_to_leave_a_phase_tells_when_it_ended_and_late_ones_change_nothing():
    stamps = np.zeros((3, 2), np.int64)
    which = np.array([time.CLOCK_MONOTONIC], np.intc)
    read_clock = phases._clock(which, stamps)
    read_clock(0)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    read_clock(1)
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    seconds, nanoseconds = stamps[1].tolist()
    assert before <= seconds * 10**9 + nanoseconds <= after
    written = stamps.copy()
    read_clock(1)
    assert (stamps == written).all()
    assert stamps[2].tolist() == [0, 0]
