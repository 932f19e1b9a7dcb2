"""The decode step as something that can be recorded once and replayed: a CUDA graph.

A decode step runs hundreds of small kernels, and starting each of them from Python takes longer
than most of them run. A CUDA graph starts them all with one call: it repeats recorded work, the
same kernels with the same arguments at the same addresses. So nothing in the step may come from the
host or depend on a number there. Here the newest tokens, the rows' lengths, the keys and values,
the numbers that decide draws and which of them is next all lie in buffers on the device, which the
step reads and writes in place; and it works on all slots of the cache, however many are filled.

A graph is recorded for one batch of one generation, which costs the time of calling the step once
more from Python. So it never has more rows or slots than are asked for, and cannot outlive the
model's weights, hooks and options that went into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from mqa_gpt.attention import is_own
from mqa_gpt.cache import KVCache, StaticCache
from mqa_gpt.fused_step import (
    PLAIN_MODULES,
    can_fuse,
    fused_hidden,
    fused_likeliest,
    fused_logits,
)
from mqa_gpt.model import GPT, MultiQueryAttention
from mqa_gpt.sampling import Sampling, choose, is_finite, log_probabilities


class DecodeState(NamedTuple):
    """All that a decode step reads and writes beside the weights, on the device.

    Attributes:
        cache: what the rows hold; not the newest tokens yet.
        ids: (B, 1) int64, the newest tokens.
        position: (1,) int64, which of the draws comes next.
        draws: (B, N) float64, the numbers that decide each row's N tokens; None if greedy.
        seen: (B, V) bool, the tokens that the rows hold; None without a repetition penalty.
        chosen: (B,) int64, for the host: `ids`, or -1 where the logits were not finite.
        reports: what `log_probabilities` says of them; empty if nobody asks.
    """

    cache: StaticCache
    ids: Tensor
    position: Tensor
    draws: Tensor | None
    seen: Tensor | None
    chosen: Tensor
    reports: tuple[Tensor, ...]

    def select(self, rows: Sequence[int]) -> DecodeState:
        """A copy of these rows of the batch."""
        index = torch.tensor(rows, device=self.ids.device)
        return DecodeState(
            StaticCache(self.cache.select(rows)),
            self.ids[index],
            self.position,
            None if self.draws is None else self.draws[index],
            None if self.seen is None else self.seen[index],
            self.chosen[index],
            tuple(report[index] for report in self.reports),
        )


def decode_step(model: GPT, state: DecodeState, sampling: Sampling) -> None:
    """Feed each row's newest token and choose the next. The same work every time."""
    logits = model(state.ids, cache=state.cache)[:, 0].float()  # (B, V)
    choose_next(logits, state, sampling)


def fused_step(model: GPT, state: DecodeState, sampling: Sampling) -> None:
    """The same by fused kernels, where `can_fuse`."""
    x = fused_hidden(model, state.ids, state.cache)  # (B, C)
    if sampling.greedy and state.seen is None and not state.reports:
        chosen, highest = fused_likeliest(model, x)  # (B,), (B,)
        take(chosen, is_finite(highest), state)
    else:
        choose_next(fused_logits(model, x).float(), state, sampling)


def choose_next(logits: Tensor, state: DecodeState, sampling: Sampling) -> None:
    """Choose each row's next token by logits (B, V) float32."""
    u = None
    if state.draws is not None:
        u = state.draws.index_select(1, state.position)[:, 0]  # (B,)
        state.position.add_(1)
    take(*choose(logits, sampling, state.seen, u), state)
    if state.reports:
        new = log_probabilities(logits, state.ids[:, 0], state.reports[1].shape[1])
        for report, values in zip(state.reports, new, strict=True):
            report.copy_(values)


def take(chosen: Tensor, are_finite: Tensor, state: DecodeState) -> None:
    """Make the tokens (B,) the newest, where the logits were finite: (B,) bool."""
    state.chosen.copy_(chosen).masked_fill_(~are_finite, -1)
    # Until the host has noticed a -1, any token can be fed.
    state.ids.copy_(state.chosen[:, None].clamp(min=0))
    if state.seen is not None:
        state.seen.scatter_(1, state.ids, True)


class Decoder:
    """A batch that is being decoded: its state, and the step that carries it on."""

    def __init__(self, model: GPT, state: DecodeState, sampling: Sampling) -> None:
        self._model, self.state, self._sampling = model, state, sampling
        step = fused_step if can_fuse(model, len(state.ids)) else decode_step
        self._run: Callable[[], None] = partial(step, model, state, sampling)
        if model.device.type == "cuda":
            self._run = Replay(self._run, model.device)

    @classmethod
    def new(
        cls,
        model: GPT,
        cache: KVCache,
        sampling: Sampling,
        seen: Tensor | None,
        draws: Tensor | None,
        logprobs: int | None,
    ) -> Decoder:
        """A decoder for the rows of a filled cache, which becomes the decoder's own.

        Args:
            seen, draws: see `DecodeState`.
            logprobs: K, how many of the likeliest tokens to report, None for no reports at all.
        """
        B, device = cache.batch_size, model.device
        ids = torch.zeros((B, 1), dtype=torch.int64, device=device)
        reports: tuple[Tensor, ...] = ()
        if logprobs is not None:
            values = torch.zeros((B, logprobs), device=device)
            reports = (torch.zeros(B, device=device), torch.zeros_like(values).long(), values)
        state = DecodeState(
            StaticCache(cache),
            ids,
            torch.zeros_like(ids[0]),
            draws,
            seen,
            ids[:, 0].clone(),
            reports,
        )
        return cls(model, state, sampling)

    def choose(self, logits: Tensor) -> None:
        """Choose the first tokens by the prefill's logits (B, V) float32."""
        choose_next(logits, self.state, self._sampling)

    def run(self) -> None:
        """Start one step; a CUDA device is not waited for."""
        self._run()

    def select(self, rows: Sequence[int]) -> Decoder:
        """A decoder for some rows of the batch, behind all steps that were started."""
        return Decoder(self._model, self.state.select(rows), self._sampling)

    def fetch(self) -> Callable[[], list[list[Any]]]:
        """Begin to copy the newest `chosen` and `reports` to the host.

        Returns:
            What waits for the copy, not for any step started since, and gives the lists.
        """
        results = (self.state.chosen, *self.state.reports)
        if self._model.device.type != "cuda":
            copies = [result.clone() for result in results]
            return lambda: [copy.tolist() for copy in copies]
        # Only copies to pinned memory let the host go on.
        copies = [
            torch.empty(result.shape, dtype=result.dtype, pin_memory=True) for result in results
        ]
        for copy, result in zip(copies, results, strict=True):
            copy.copy_(result, non_blocking=True)
        copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._model.device))

        def wait() -> list[list[Any]]:
            copied.synchronize()
            return [copy.tolist() for copy in copies]

        return wait


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


def can_replay(model: GPT) -> bool:
    """Whether decode steps of this model may be recorded and replayed.

    On a CUDA device they may, unless its cache is quantized, or somebody has put Python code of
    their own into the step, which a replay would leave out: hooks, modules of other types, a
    `forward` or `attend` of a module's own. In training mode dropout is to differ at every step.
    """
    if model.device.type != "cuda" or model.cache_dtype is not None:
        return False
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    return all(_is_plain(module) for module in model.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a module of ours as we made it, in eval mode."""
    if type(module) not in PLAIN_MODULES or "forward" in vars(module):
        return False
    if isinstance(module, MultiQueryAttention) and not is_own(module.attend):
        return False
    return not (module.training or module._forward_hooks or module._forward_pre_hooks)
