"""CUDA without a GPU: the fixtures `cuda` and `graphs`.

A fake graph records a step's operations once and then repeats them with the same arguments, as a
CUDA graph does. Asynchronous copies to the host arrive when a later event is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mqa_gpt import sampling
from mqa_gpt.fast import graph
from mqa_gpt.fast.graph import RecordingStreams, Replay
from mqa_gpt.generation import batching
from mqa_gpt.generation.replay import GraphStepper


class Tape(TorchDispatchMode):
    """Records operations as they run, to repeat them as a CUDA graph would.

    A repeated operation gets the arguments it was recorded with: the same numbers and tensors, or
    the new results of the operations whose results it was given. In the end the tensors that were
    made while recording, the graph's own memory, hold the new results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        made: dict[int, Any] = {}
        for func, args, kwargs, before in self.operations:
            args, kwargs = tree_map(partial(current, made), (args, kwargs))
            now = func(*args, **kwargs)
            made |= {id(a): b for a, b in zip(tree_leaves(before), tree_leaves(now), strict=True)}
        for *_, before in self.operations:
            for old in tree_leaves(before):
                if isinstance(old, Tensor) and made[id(old)] is not old:
                    old.copy_(made[id(old)])


def current(made: dict[int, Any], x: Any) -> Any:
    return made.get(id(x), x)


class TapedGraph:
    """A stand-in for `torch.cuda.CUDAGraph`.

    Operations run while they are recorded and not at the first replay; CUDA does the opposite, with
    the same result.
    """

    made: ClassVar[list[TapedGraph]] = []

    def __init__(self) -> None:
        TapedGraph.made.append(self)
        self.tape, self.replays = Tape(), 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays > 1:
            self.tape.replay()


class FakeCuda:
    """A stand-in for the parts of `torch.cuda` in use, which records the calls.

    Attributes:
        events: the calls, in order.
        device, stream: the current ones.
    """

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.device: Any = None
        self.stream: Any = FakeStream(self)

    def pinned(self, make: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        """The result of `make`, in fake pinned memory if the options ask for it."""
        if not options.pop("pin_memory", False):
            return make(*arguments, **options)
        made = make(*arguments, **options).as_subclass(Pinned)
        made.cuda = self
        return made

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def record(self, graph: TapedGraph, **options: Any) -> Iterator[None]:
        """Like PyTorch's, it does not give back the stream if recording fails."""
        self.events.append(("record", self.device, options))
        before, self.stream = self.stream, options["stream"]
        with graph.tape:
            yield
        self.stream = before

    def action(self) -> None:
        """An action for tests to replay."""
        self.events.append(("run", self.device, self.stream))


class Pinned(Tensor):
    """Pinned host memory, which a device reads and writes asynchronously."""

    cuda: FakeCuda

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Pinned:
        """Copy the source; if non-blocking, hold garbage until the copy arrives."""
        self.cuda.events.append(("to the host", non_blocking))
        if not non_blocking:
            return super().copy_(source)
        self.fill_(77)
        self.cuda.stream.pending.append((self, source.clone()))
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """A copy on the device; here that is the CPU."""
        self.cuda.events.append(("to the device", device, non_blocking))
        return self.as_subclass(Tensor).clone()


class FakeEvent:
    """A stand-in for `torch.cuda.Event`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def record(self, stream: FakeStream) -> None:
        self._before = list(stream.pending)

    def synchronize(self) -> None:
        """Deliver the copies that were pending on the stream when the event was recorded."""
        self._cuda.events.append("the host waits")
        for pinned, values in self._before:
            pinned.as_subclass(Tensor).copy_(values)


class FakeStream:
    """A stand-in for `torch.cuda.Stream`.

    Attributes:
        pending: copies to pinned memory that have not arrived, with their values.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.pending: list[tuple[Pinned, Tensor]] = []

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.events.append((self, "waits for", other))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The stand-in for `torch.cuda` during a test; no recording stream exists yet."""
    fake = FakeCuda()
    for name, stub in (
        ("device", fake.on_device),
        ("stream", fake.on_stream),
        ("current_stream", lambda device=None: fake.stream),
        ("Event", lambda: FakeEvent(fake)),
        ("Stream", lambda device: FakeStream(fake)),
        ("CUDAGraph", TapedGraph),
        ("graph", fake.record),
    ):
        monkeypatch.setattr(torch.cuda, name, stub)
    for name in ("empty", "tensor"):
        monkeypatch.setattr(torch, name, partial(fake.pinned, getattr(torch, name)))
    monkeypatch.setattr(graph, "RECORDING_STREAMS", RecordingStreams())
    monkeypatch.setattr(TapedGraph, "made", [])
    return fake


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines run steps as on a CUDA device, but call them instead of recording them."""
    monkeypatch.setattr(batching, "can_replay", lambda model: True)


@pytest.fixture
def graphs(
    cuda: FakeCuda, replayed: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[TapedGraph]]:
    """Record graphs on the CPU; the list of those that engines record during the test."""

    def recorded(self: GraphStepper, *arguments: Any) -> Replay:
        return Replay(plain(self, *arguments), self._model.device)

    plain = GraphStepper._recorded
    monkeypatch.setattr(GraphStepper, "_recorded", recorded)
    monkeypatch.setattr(sampling, "likeliest", lambda logits: logits.max(-1))  # not NumPy's
    yield TapedGraph.made
    assert TapedGraph.made
