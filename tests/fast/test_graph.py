"""Replayed work and copies that the host does not wait for, with `tests.fake_cuda` for a device."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import pytest
import torch

from mqa_gpt.fast import graph
from mqa_gpt.fast.graph import Replay, fetch, upload
from tests.fake_cuda import TapedGraph

DEVICE = torch.device("cuda", 1)


def test_the_first_run_is_ordinary_and_the_second_is_recorded_on_the_same_stream(cuda):
    replay, caller_s = Replay(cuda.action, DEVICE), cuda.stream
    replay()
    recording_s = cuda.events[0][0]
    assert recording_s is not caller_s
    assert cuda.events == [
        (recording_s, "waits for", caller_s),
        ("run", DEVICE, recording_s),
        (caller_s, "waits for", recording_s),
    ]
    cuda.events.clear()
    replay()
    replay()
    options = {"stream": recording_s, "capture_error_mode": "thread_local"}
    assert cuda.events == [("record", DEVICE, options), ("run", DEVICE, recording_s)]
    assert [graph.replays for graph in TapedGraph.made] == [2]


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels overlap on the stand-in for a device."""
    launch = pytest.importorskip("mqa_kernels.launch")
    monkeypatch.setenv("MQA_KERNELS_PDL", "1")
    monkeypatch.setattr(launch, "architecture", lambda device: 120)


@pytest.mark.parametrize("refused", ["launch", "recording"])
def test_where_overlap_is_refused_the_action_goes_on_without_it(
    cuda, overlapping, refused, monkeypatch
):
    launch = pytest.importorskip("mqa_kernels.launch")
    runs = []

    def action() -> None:
        overlaps = launch.overlap(DEVICE)["OVERLAP"]
        if overlaps and (refused == "launch" or len(runs) == 1):
            raise RuntimeError("Triton Error [CUDA]: invalid resource handle")
        runs.append((overlaps, cuda.stream))

    caller_s, replay = cuda.stream, Replay(action, DEVICE)
    if refused == "recording":
        replay()
    with pytest.warns(UserWarning, match="invalid resource handle.*one after the other"):
        replay()
    assert not replay.is_recorded
    assert cuda.stream is caller_s
    replay()
    assert replay.is_recorded
    expected = [True] * (refused == "recording") + [False, False]  # the last is recorded
    assert [overlaps for overlaps, _ in runs] == expected
    assert len({stream for _, stream in runs}) == 1


@pytest.mark.parametrize(
    ("error", "pdl"),
    [
        (RuntimeError("CUDA error: lost"), "0"),
        (torch.OutOfMemoryError("CUDA out of memory"), "1"),
        (RuntimeError("sizes do not match"), "1"),  # of a hook
        (ValueError("CUDA is misspelt"), "1"),
    ],
)
def test_other_errors_of_an_action_are_not_hidden(cuda, overlapping, error, pdl, monkeypatch):
    monkeypatch.setenv("MQA_KERNELS_PDL", pdl)
    replay = Replay(cuda.action, DEVICE)
    replay()

    def action() -> None:
        raise error

    monkeypatch.setattr(replay, "_action", action)
    with pytest.raises(type(error), match=str(error)):
        replay()
    assert os.environ["MQA_KERNELS_PDL"] == pdl


def test_an_error_that_remains_without_overlap_is_raised(cuda, overlapping):
    def action() -> None:
        raise RuntimeError("CUDA error: illegal address")

    with (
        pytest.warns(UserWarning, match="illegal address"),
        pytest.raises(RuntimeError, match="illegal address"),
    ):
        Replay(action, DEVICE)()


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [(RuntimeError("CUDA error: invalidated"), True), (torch.OutOfMemoryError("CUDA"), False)],
)
def test_a_graph_whose_recording_fails_outlives_its_replay(cuda, error, is_kept, monkeypatch):
    """Unless its memory is needed."""
    monkeypatch.setenv("MQA_KERNELS_PDL", "0")
    monkeypatch.setattr(graph, "UNFINISHED", [])
    actions = iter([None, error])

    def action() -> None:
        if (problem := next(actions)) is not None:
            raise problem

    replay = Replay(action, DEVICE)
    replay()
    with pytest.raises(type(error)):
        replay()
    failed = weakref.ref(TapedGraph.made.pop())
    error.__traceback__ = None
    del replay
    gc.collect()
    assert (failed() is not None) == is_kept


def in_a_thread(action: Callable[[], Any]) -> Any:
    """What the action returns in a thread of its own."""
    return ThreadPoolExecutor(1).submit(action).result(timeout=5)


def test_threads_and_devices_have_streams_of_their_own(cuda):
    streams = graph.RECORDING_STREAMS
    assert streams.on(DEVICE) is streams.on(torch.device("cuda", 1))
    assert streams.on(DEVICE) is not streams.on(torch.device("cuda", 0))
    assert streams.on(DEVICE) is not in_a_thread(lambda: streams.on(DEVICE))


def test_a_thread_records_only_what_it_has_run(cuda):
    """A generator may be asked for each of its tokens by another thread."""
    replay = Replay(cuda.action, DEVICE)
    replay()
    in_a_thread(replay)
    assert not TapedGraph.made  # the first run of that thread is an ordinary one
    replay()
    assert [graph.replays for graph in TapedGraph.made] == [1]


@pytest.mark.parametrize("runs_before", [0, 1], ids=["first run", "recording"])
def test_others_wait_for_a_first_run_and_a_recording_but_may_replay(cuda, runs_before):
    """While one replay is at work, others are called in threads of their own."""
    recorded, new = (Replay(cuda.action, DEVICE) for _ in range(2))
    recorded()
    recorded()
    threads: list[Thread] = []
    runs: list[bool] = []

    def action() -> None:
        if len(runs) == runs_before:
            in_a_thread(recorded)
            threads.append(Thread(target=new))
            threads[0].start()
            threads[0].join(0.1)
            assert threads[0].is_alive()
        runs.append(True)

    replay = Replay(action, DEVICE)
    for _ in range(runs_before + 1):
        replay()
    threads[0].join(20)
    assert not threads[0].is_alive()
    assert len(runs) == runs_before + 1
    assert TapedGraph.made[0].replays == 2


def test_a_list_goes_to_a_gpu_from_pinned_memory_without_a_wait(cuda):
    for values, dtype in (([3, 1], torch.int64), ([0.25, 0.1], torch.float64)):
        x = upload(values, DEVICE, dtype)
        assert (x.tolist(), x.dtype) == (values, dtype)
        assert cuda.events.pop() == ("to the device", DEVICE, True)
    assert upload([3, 1], torch.device("cpu")).tolist() == [3, 1]
    assert not cuda.events


def test_tensors_come_by_copies_that_the_host_waits_for_when_it_reads_them(cuda):
    x, y = torch.tensor([1, 2]), torch.tensor([0.5])
    lists = fetch([x, y], DEVICE)
    assert cuda.events == [("to the host", True)] * 2
    x += 1
    assert lists() == [[1, 2], [0.5]]
    assert cuda.events[2:] == ["the host waits"]


def test_on_a_cpu_what_is_fetched_does_not_change_either():
    x = torch.tensor([1, 2])
    lists = fetch([x], torch.device("cpu"))
    x += 1
    assert lists() == [[1, 2]]
