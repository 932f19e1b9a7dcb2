"""The time of each part of the compiled forward pass, while it runs as always.

The pass is compiled once more with other functions in the place of its phases. Each runs the phase,
then reads the clock.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any
from unittest.mock import patch

import numpy as np

from mqa_gpt.errors import InputError
from mqa_kernels.cpu import forward as forward_module
from mqa_kernels.cpu import program
from mqa_kernels.cpu.simd import at, kernel, pointer

PHASES = ("embed", "norms", "linear", "append", "attention")  # functions that `forward` calls
INTEGERS, INTS = np.empty(0, np.int64), np.empty(0, np.intc)

# The parts in the order of their phases.
BLOCK = (
    *("ln_1, ln_2", "attn.c_attn", "cache", "attention", "attn.c_proj"),
    *("ln_1, ln_2", "mlp.c_fc", "mlp.c_proj"),
)


def parts_of(layers: int) -> tuple[str, ...]:
    """The parts of a pass, one after the other."""
    return ("wte, wpe", *BLOCK * layers, "ln_f", "lm_head")


@contextmanager
def timed_forward(layers: int, *, of_process: bool = False) -> Iterator[dict[str, float]]:
    """While the context lasts, compiled passes of a model with `layers` layers read the clock.

    Args:
        of_process: whether to count the processor's time of this process.

    Yields:
        The seconds of each part, to which every pass adds its own.

    Raises:
        InputError: the system has no `clock_gettime`.
    """
    if not hasattr(time, "clock_gettime") or sys.platform == "win32":
        raise InputError("this system has no clock_gettime, by which phases are timed")
    compiled, which, stamps = _compiled(layers)
    which[:] = time.CLOCK_PROCESS_CPUTIME_ID if of_process else time.CLOCK_MONOTONIC

    seconds: dict[str, float] = defaultdict(float)
    call = program.Program.__call__

    def timed_call(*arguments: Any, **options: Any) -> Any:
        stamps.fill(0)
        logits = call(*arguments, **options)
        nanoseconds = stamps[:, 0] * 10**9 + stamps[:, 1]
        ends = nanoseconds[nanoseconds > 0]
        for name, elapsed in zip(parts_of(layers), np.diff(ends), strict=True):
            seconds[name] += float(elapsed) / 1e9
        return logits

    with (
        patch.object(program, "_compiled", lambda: compiled),
        patch.object(program.Program, "__call__", timed_call),
    ):
        yield seconds


@cache
def _compiled(layers: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The pass with a clock in it; which clock (1,); and its stamps, seconds and nanoseconds at the
    start and after each phase, which has a number."""
    which = np.zeros(1, np.intc)
    stamps = np.zeros((1 + program.PHASES * layers + 3, 2), np.int64)
    read_clock = _clock(which, stamps)
    names = {name: _timed(getattr(forward_module, name), read_clock) for name in PHASES}
    plain = forward_module.forward
    timed = FunctionType(plain.__code__, vars(forward_module) | names, "forward")
    return kernel(timed), which, stamps


def _clock(which: np.ndarray, stamps: np.ndarray) -> Any:
    """A compiled function of a phase's number that writes the time to its row of `stamps`.

    The first thread to leave a phase does so. One that the system started late runs through the
    phases when they are long finished.
    """
    gettime = ctypes.CDLL(None).clock_gettime
    gettime.argtypes, gettime.restype = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)], ctypes.c_int
    clock, address = which.ctypes.data, stamps.ctypes.data

    def read_clock(phase):  # type: ignore[no-untyped-def]
        stamp = at(pointer(address, INTEGERS), 2 * phase)
        if stamp[1] == 0:
            gettime(pointer(clock, INTS)[0], stamp)

    return kernel(read_clock)


def _timed(phase: Any, read_clock: Any) -> Any:
    """The same phase, which reads the clock at its end, and the first one at its start too."""
    # numba cannot copy an inlined one into a function with *arguments.
    phase = kernel(getattr(phase, "py_func", phase))

    def timed(team, number, *arguments):  # type: ignore[no-untyped-def]
        if number == 0:
            read_clock(0)
        following = phase(team, number, *arguments)
        read_clock(following)
        return following

    return kernel(timed)
