"""Seconds and bytes on the device: the one place where the benchmarks tell a GPU from a CPU.

GPU times are CUDA events around one replay of a CUDA graph, so that they hold no launch cost, with
an L2 cache that holds nothing of use at the start. CPU times are the wall clock's; the kernels run
there under Triton's interpreter, to try out the code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.measure import interleaved

Action = Callable[[], object]

FLUSH_BYTES = 256 << 20  # several times the L2 cache of an H100 (50 MB), H200 (60 MB) or B200 (126)


class Clock:
    """Measures actions on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.has_gpu = device.type == "cuda"
        self._flush = torch.ones(FLUSH_BYTES // 4, device=device) if self.has_gpu else None

    def synchronize(self) -> None:
        """Wait for the device; raises the errors of kernels that ran before."""
        if self.has_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Action) -> float:
        """One run of an action on the device, from a cold L2 cache."""
        if self._flush is None:
            return self.wall(action)
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Reading evicts. So would writing, but writing back takes bandwidth from the action's first
        # microseconds.
        self._flush.sum()
        begin.record()
        action()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def wall(self, action: Action) -> float:
        """One run on the host's clock, launches included."""
        self.synchronize()
        begin = time.perf_counter()
        action()
        self.synchronize()
        return time.perf_counter() - begin

    def recorder(self) -> Callable[[Action], Action]:
        """A function that turns actions into replays of CUDA graphs; on a CPU, into themselves.

        Its graphs share one memory pool, which is safe while they take turns and no result is read.
        """
        if not self.has_gpu:
            return lambda action: action
        pool = torch.cuda.graph_pool_handle()

        def record(action: Action) -> Action:
            stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):  # compiling and setting up must not be captured
                action()
                action()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                action()
            return graph.replay

        return record

    def times(
        self, actions: Mapping[str, Action], repeats: int, label: str
    ) -> dict[str, dict[str, Any]]:
        """`interleaved` for actions on the device."""
        timed = {name: partial(self.seconds, action) for name, action in actions.items()}
        return interleaved(timed, repeats, label)

    def peak_bytes(self, action: Action) -> int | None:
        """The most device memory an action adds to what is allocated; None on a CPU."""
        if not self.has_gpu:
            return None
        action()  # allocates workspaces that stay
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def release(self) -> None:
        """Return the memory that the allocator keeps for freed tensors."""
        if self.has_gpu:
            torch.cuda.empty_cache()
