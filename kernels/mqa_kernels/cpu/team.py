"""Several threads run one function without a lock and share the items of each of its phases.

Every thread runs the whole function. In each phase it takes items until none is left, then waits
until the other threads have finished theirs. So no thread waits for one that has not started: a
helper that the system starts late finds the work done and returns.

    while True:
        item = take(counters, phase)
        if item >= items:
            break
        ...
        finish(counters, phase)
    wait(counters, phase, items)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mqa_kernels.cpu.simd import has_pause, part

_I64 = ir.IntType(64)
SPINS = 20_000  # looks at a counter before a thread offers its core to others: some 0.1 ms


def _add_one(which: int) -> Any:
    @intrinsic
    def add(typing: Any, counters: Any, phase: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, phase = arguments
            index = builder.add(builder.mul(phase, _I64(2 * 8)), _I64(which * 8))
            return builder.atomic_rmw("add", builder.gep(base, [index]), _I64(1), "seq_cst")

        return types.int64(counters, types.int64), emit

    return add


# A phase has two counters, each on a cache line of its own: items taken, items finished.
take, finish = _add_one(0), _add_one(1)


@intrinsic
def _finished(typing: Any, counters: Any, phase: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, phase = arguments
        index = builder.add(builder.mul(phase, _I64(2 * 8)), _I64(8))
        return builder.load_atomic(builder.gep(base, [index]), "seq_cst", 8)

    return types.int64(counters, types.int64), emit


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if has_pause:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(
                cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), []
            )
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def _yield(typing: Any) -> Any:
    """Let the system run another thread on this core."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), emit


@part
def wait(counters: Any, phase: int, items: int) -> None:
    """Return once all items of a phase are finished."""
    spins = 0
    while _finished(counters, phase) < items:
        spins += 1
        if spins < SPINS:
            _pause()
        else:
            _yield()


class Team:
    """The threads of this process that help a caller."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helpers: ThreadPoolExecutor | None = None
        self._count = 0
        self._process = 0

    def run(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        threads: int,
        owners: Sequence[Any] = (),
    ) -> None:
        """Call `function(*arguments, number)` in this thread, as number 0, and in helpers.

        Args:
            owners: objects whose memory the addresses point to. An interrupt may end this call
                while a helper still runs, so each helper keeps them until it ends.
        """
        calls: list[Future[None]] = []
        try:
            # No more threads to be had, or the interpreter is ending: this one does it all.
            with suppress(RuntimeError):
                for number in range(1, threads):
                    helpers = self._pool(threads - 1)
                    calls.append(helpers.submit(_help, function, arguments, number, owners))
            function(*arguments, 0)
        finally:
            for call in calls:
                if not call.cancel():  # it has begun, and may still use what the caller owns
                    call.result()

    def _pool(self, count: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._helpers is None or self._count < count or self._process != os.getpid():
                # A forked child has none of its parent's threads.
                self._helpers = ThreadPoolExecutor(count, "mqa-gpt")
                self._count, self._process = count, os.getpid()
            return self._helpers


def _help(
    function: Callable[..., None], arguments: tuple[Any, ...], number: int, owners: Sequence[Any]
) -> None:
    function(*arguments, number)


def new_counters(phases: int) -> np.ndarray:
    """Zero counters for a number of phases, each on a cache line of its own."""
    return np.zeros((phases, 2, 8), dtype=np.int64)
