"""CUDA graphs: recorded work that a device repeats, and copies that its host does not wait for."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mqa_gpt.attention import HAS_TRITON


class Replay:
    """An action that does the same every time, as a CUDA graph from its second run on.

    The first run is an ordinary one, on the recording stream: it compiles kernels and makes
    workspaces, which capture forbids. Where the device refuses kernels that overlap, above all in a
    graph, the action is run again without overlap and recorded at its next run.
    """

    def __init__(self, action: Callable[[], None], device: torch.device) -> None:
        self._action, self._device = action, device
        self._streams: list[Any] = []  # of the threads that have run it
        self._graph: Any = None

    def __call__(self) -> None:
        """Start the action; the device is not waited for."""
        with torch.cuda.device(self._device):
            if self._graph is None:
                with RECORDING:
                    stream = RECORDING_STREAMS.on(self._device)
                    try:
                        # Another thread's cuBLAS handle would be made while recording.
                        if all(stream is not other for other in self._streams):
                            self._run(stream)
                            return
                        self._graph = self._record(stream)
                    except RuntimeError as error:
                        if not stop_overlap(self._device, error):
                            raise
                        self._run(stream)  # compiles the kernels again
                        return
            self._graph.replay()

    @property
    def is_recorded(self) -> bool:
        """Whether there is a graph: Python is not called any more."""
        return self._graph is not None

    def _run(self, stream: Any) -> None:
        caller_s = torch.cuda.current_stream()
        stream.wait_stream(caller_s)
        with torch.cuda.stream(stream):
            self._action()
        caller_s.wait_stream(stream)
        self._streams.append(stream)

    def _record(self, stream: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what may not be called while a graph is recorded, like allocating memory,
        # is an error in this thread only, so others may go on with streams of their own. The graph
        # has a pool of memory of its own; one that is shared must not lose its last graph.
        recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        # A recording that fails does not give back the stream, so that is done around it.
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                self._action()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):  # whose memory is needed
                UNFINISHED.append(graph)
            raise
        return graph


def stop_overlap(device: torch.device, error: RuntimeError) -> bool:
    """Let the kernels of `mqa_kernels` not overlap from now on, because of an error.

    Some GPUs refuse programmatic dependent launches in a graph (seen elsewhere on sm_120).

    Returns:
        False if overlap cannot be the reason: there was none, memory ran out, or the error is not
        of CUDA, but of code that runs in the action, such as somebody's hook.
    """
    is_of_cuda = "CUDA" in str(error) and not isinstance(error, torch.OutOfMemoryError)
    if not HAS_TRITON or not is_of_cuda:  # PyTorch and Triton raise different kinds
        return False
    from mqa_kernels import launch

    if not launch.overlap(device)["OVERLAP"]:
        return False
    os.environ["MQA_KERNELS_PDL"] = "0"
    warnings.warn(
        f"kernels that overlap could not be started or recorded on {device} ({error}); from here "
        "on they run one after the other. MQA_KERNELS_PDL=0 in the environment avoids the attempt",
        stacklevel=2,
    )
    return True


class Recorder(Protocol):
    """Somebody who is shown tensors by Python code inside the action of a `Replay`."""

    def take(self) -> Any:
        """What was recorded in the last call of the action, which is forgotten."""

    def repeat(self, taken: Any, labels: Sequence[Any]) -> None:
        """Record it again, with what its tensors hold now."""


class WatchedReplay:
    """A replayed action in which somebody records tensors.

    Python is shown the tensors of the call that becomes a graph. They are the graph's own memory,
    which each replay overwrites, so they are copied after each.
    """

    def __init__(self, replay: Replay, recorders: Sequence[Recorder]) -> None:
        self._replay = replay
        self._recorders = [weakref.ref(recorder) for recorder in recorders]
        self._taken: list[Any] = []

    def serves(self, recorders: Sequence[Recorder]) -> bool:
        """Whether it records for these."""
        return [ref() for ref in self._recorders] == list(recorders)

    def __call__(self, labels: Sequence[Any]) -> None:
        """Start the action; what it computes is for these rows."""
        self._replay()
        if not self._replay.is_recorded:
            return
        recorders = [recorder for ref in self._recorders if (recorder := ref()) is not None]
        assert len(recorders) == len(self._recorders)  # their contexts are open
        if not self._taken:
            self._taken = [recorder.take() for recorder in recorders]
        for recorder, taken in zip(recorders, self._taken, strict=True):
            recorder.repeat(taken, labels)


class RecordingStreams(threading.local):
    """Each thread's recording stream on each device, made when it is first needed.

    One for all graphs of a thread, because cuBLAS keeps a workspace per stream. Not one for all
    threads: what another thread starts on a recording stream would become part of the graph.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> Any:
        """The calling thread's stream on this device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


RECORDING_STREAMS = RecordingStreams()

# Graphs whose recording failed. Where CUDA refuses to end a recording, PyTorch up to 2.11 asks its
# graph at every later allocation, even if the graph is no more (pytorch #180395). So it is kept.
UNFINISHED: list[Any] = []

# PyTorch allows one recording at a time in a process. First runs take turns with it, because
# PyTorch has few streams: after 32 it hands out the first one again.
RECORDING = threading.Lock()


def fetch(tensors: Sequence[Tensor], device: torch.device) -> Callable[[], list[list[Any]]]:
    """Begin to copy tensors to the host.

    Returns:
        What waits for the copies, not for work started since, and gives the tensors as lists.
    """
    if device.type != "cuda":
        clones = [tensor.clone() for tensor in tensors]
        return lambda: [clone.tolist() for clone in clones]
    # Only copies to pinned memory are asynchronous.
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for pinned, tensor in zip(copies, tensors, strict=True):
        pinned.copy_(tensor, non_blocking=True)
    copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))

    def wait() -> list[list[Any]]:
        copied.synchronize()
        return [pinned.tolist() for pinned in copies]

    return wait


def upload(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A list as a tensor on the device; a CUDA device is not waited for."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # A copy from pageable memory would wait for all work that was started before.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
