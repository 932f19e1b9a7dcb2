"""Recorded work that a CUDA device repeats, and lists that it gets without being waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Replay:
    """An action that does the same every time, as a CUDA graph from its second run on.

    The first run is an ordinary one, on the stream of recording: kernels are compiled and
    workspaces made by it, which must not happen while a graph is recorded.
    """

    def __init__(self, action: Callable[[], None], device: torch.device) -> None:
        self._action, self._device = action, device
        self._stream: Any = None  # of the thread that the first run was in
        self._graph: Any = None

    def __call__(self) -> None:
        """Start the action; the device is not waited for."""
        with torch.cuda.device(self._device):
            if self._graph is None:
                with RECORDING:
                    stream = RECORDING_STREAMS.on(self._device)
                    # Another thread's cuBLAS handle and workspace would be made while recording.
                    if self._stream is not stream:
                        self._run(stream)
                        return
                    self._graph = self._record(stream)
            self._graph.replay()

    def _run(self, stream: Any) -> None:
        caller_s = torch.cuda.current_stream()
        stream.wait_stream(caller_s)
        with torch.cuda.stream(stream):
            self._action()
        caller_s.wait_stream(stream)
        self._stream = stream

    def _record(self, stream: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what may not be called while a graph is recorded, like allocating memory,
        # is an error in this thread only, so others may go on with streams of their own. The graph
        # has a pool of memory of its own; one that is shared must not lose its last graph.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._action()
        return graph


class RecordingStreams(threading.local):
    """Each thread's stream of recording on each device, made when it is first asked for.

    One for all graphs of a thread, because cuBLAS keeps a workspace for each stream that it has
    seen. Not one for all threads: what another thread starts on a stream in recording would become
    part of the graph instead of running.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> Any:
        """The calling thread's stream on this device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


RECORDING_STREAMS = RecordingStreams()

# PyTorch allows one recording at a time in a process. First runs wait for it too, because PyTorch
# has few streams: after 32 it hands out the first one again.
RECORDING = threading.Lock()


def upload(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A list as a tensor on the device; a CUDA device is not waited for."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # From other memory than pinned the copy would wait for all that was started before.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
