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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache, StaticCache
from mqa_gpt.fast.cuda_graph import Replay, upload
from mqa_gpt.fast.flat import is_plain
from mqa_gpt.fast.fused_step import can_fuse, fused_hidden, fused_likeliest, fused_logits
from mqa_gpt.generation.decode import (
    Report,
    Token,
    draw_numbers,
    prefill_samples,
    report_rows,
    require_finite,
    tokens_seen,
)
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY, SamplingParams, choose, is_finite, log_probabilities

# Rows up to which finished ones stay in a batch that is replayed: they cost less than recording the
# step anew, since it takes the time of reading the weights either way.
FEW_ROWS = 16


class RowState(NamedTuple):
    """What choosing a token for each row reads and writes, on the device.

    Attributes:
        ids: (B, 1) int64, the newest tokens.
        position: (B, 1) int64, which of its draws comes next for each row.
        draws: (B, N) float64, the numbers that decide each row's N tokens; None if greedy.
        seen: (B, V) bool, the tokens that the rows hold; None without a repetition penalty.
        chosen: (B,) int64, for the host: `ids`, or -1 where the logits were not finite.
        reports: what `log_probabilities` says of them; empty if nobody asks.
    """

    ids: Tensor
    position: Tensor
    draws: Tensor | None
    seen: Tensor | None
    chosen: Tensor
    reports: tuple[Tensor, ...]

    def copy(self, rows: Sequence[int]) -> RowState:
        """A copy of these rows."""
        index = upload(rows, self.ids.device)
        return self._map(lambda x: x[index])

    def first(self, count: int) -> RowState:
        """The first rows, in the same memory."""
        return self._map(lambda x: x[:count])

    def write(self, rows: Sequence[int], others: RowState) -> None:
        """Make these rows those of `others`."""
        index = upload(rows, self.ids.device)
        for own, new in zip(self._tensors, others._tensors, strict=True):
            own[index] = new

    def _map(self, fn: Callable[[Tensor], Tensor]) -> RowState:
        return RowState(
            fn(self.ids),
            fn(self.position),
            None if self.draws is None else fn(self.draws),
            None if self.seen is None else fn(self.seen),
            fn(self.chosen),
            tuple(map(fn, self.reports)),
        )

    @property
    def _tensors(self) -> list[Tensor]:
        tensors = (self.ids, self.position, self.draws, self.seen, self.chosen, *self.reports)
        return [tensor for tensor in tensors if tensor is not None]


class DecodeState(NamedTuple):
    """All that a decode step reads and writes beside the weights, on the device.

    Attributes:
        cache: what the rows hold; not the newest tokens yet.
        rows: everything else.
    """

    cache: StaticCache
    rows: RowState

    def begin(
        self, row: int, prompt: list[int], draws: list[float], cache: KVCache, cache_row: int
    ) -> None:
        """Make `row` one whose prompt stands in a row of another cache, with these draws."""
        self.cache.copy_row(row, cache, cache_row)
        self.cache.lengths[row] = len(prompt)
        self.rows.position[row] = 0
        device = self.cache.lengths.device
        if self.rows.draws is not None:
            self.rows.draws[row, : len(draws)] = upload(draws, device, torch.float64)
        if self.rows.seen is not None:
            self.rows.seen[row] = False
            self.rows.seen[row, upload(prompt, device)] = True

    def end(self, rows: Sequence[int]) -> None:
        """Let these rows hold nothing; what a step computes of them is of no interest any more."""
        index = upload(rows, self.cache.lengths.device)
        self.cache.lengths[index] = 0
        self.rows.position[index] = 0

    def shrink(self, kept: Sequence[int]) -> tuple[DecodeState, list[int]]:
        """The state of these rows alone, as the first ones in the same memory.

        Returns:
            It, and which of the rows of before each of its rows is.
        """
        count = len(kept)
        order = list(range(count))
        empty = sorted(set(order).difference(kept))
        moved = sorted(row for row in kept if row >= count)
        for place, row in zip(empty, moved, strict=True):
            self.cache.copy_row(place, self.cache, row)
            self.cache.lengths[place] = self.cache.lengths[row]
            order[place] = row
        if moved:
            self.rows.write(empty, self.rows.copy(moved))
        return DecodeState(self.cache.first(count), self.rows.first(count)), order


def decode_step(model: GPT, state: DecodeState, sampling: SamplingParams) -> None:
    """Feed each row's newest token and choose the next. The same work every time."""
    logits = model(state.rows.ids, cache=state.cache)[:, 0].float()  # (B, V)
    choose_next(logits, state.rows, sampling)


def fused_step(model: GPT, state: DecodeState, sampling: SamplingParams) -> None:
    """The same by fused kernels, where `can_fuse`."""
    rows = state.rows
    x = fused_hidden(model, rows.ids, state.cache)  # (B, C)
    if sampling.greedy and rows.seen is None and not rows.reports:
        chosen, highest = fused_likeliest(model, x)  # (B,), (B,)
        take(chosen, is_finite(highest), rows)
    else:
        choose_next(fused_logits(model, x).float(), rows, sampling)


def choose_next(logits: Tensor, rows: RowState, sampling: SamplingParams) -> None:
    """Choose each row's next token by logits (B, V) float32."""
    u = None
    if rows.draws is not None:
        u = rows.draws.gather(1, rows.position)[:, 0]  # (B,)
        rows.position.add_(1)
    take(*choose(logits, sampling, rows.seen, u), rows)
    if rows.reports:
        new = log_probabilities(logits, rows.ids[:, 0], rows.reports[1].shape[1])
        for report, values in zip(rows.reports, new, strict=True):
            report.copy_(values)


def take(chosen: Tensor, are_finite: Tensor, rows: RowState) -> None:
    """Make the tokens (B,) the newest, where the logits were finite: (B,) bool."""
    rows.chosen.copy_(chosen).masked_fill_(~are_finite, -1)
    # Until the host has noticed a -1, any token can be fed.
    rows.ids.copy_(rows.chosen[:, None].clamp(min=0))
    if rows.seen is not None:
        rows.seen.scatter_(1, rows.ids, True)


class Decoder:
    """A batch that is being decoded: its state, and the step that carries it on."""

    def __init__(self, model: GPT, state: DecodeState, sampling: SamplingParams) -> None:
        self._model, self.state, self._sampling = model, state, sampling
        step = fused_step if can_fuse(model, state.cache.batch_size) else decode_step
        self._run: Callable[[], None] = partial(step, model, state, sampling)
        if model.device.type == "cuda":
            self._run = Replay(self._run, model.device)

    @classmethod
    def new(
        cls,
        model: GPT,
        cache: KVCache,
        sampling: SamplingParams,
        seen: Tensor | None,
        draws: Tensor | None,
        logprobs: int | None,
    ) -> Decoder:
        """A decoder for the rows of a filled cache, which becomes the decoder's own.

        Args:
            seen, draws: see `RowState`.
            logprobs: K, how many of the likeliest tokens to report, None for no reports at all.
        """
        B, device = cache.batch_size, model.device
        ids = torch.zeros((B, 1), dtype=torch.int64, device=device)
        reports: tuple[Tensor, ...] = ()
        if logprobs is not None:
            values = torch.zeros((B, logprobs), device=device)
            reports = (torch.zeros(B, device=device), torch.zeros_like(values).long(), values)
        rows = RowState(ids, torch.zeros_like(ids), draws, seen, ids[:, 0].clone(), reports)
        return cls(model, DecodeState(StaticCache(cache), rows), sampling)

    def choose(self, logits: Tensor, rows: Sequence[int] | None = None) -> None:
        """Choose the first tokens by the prefill's logits (B, V) float32, of all rows or these."""
        if rows is None:
            choose_next(logits, self.state.rows, self._sampling)
            return
        some = self.state.rows.copy(rows)
        choose_next(logits, some, self._sampling)
        self.state.rows.write(rows, some)

    def run(self) -> None:
        """Start one step; a CUDA device is not waited for."""
        self._run()

    def shrink(self, kept: Sequence[int]) -> tuple[Decoder, list[int]]:
        """A decoder for these rows of the batch, behind all steps that were started.

        It takes over the memory of this one, which must not run again.

        Returns:
            It, and which of the rows of before each of its rows is.
        """
        state, order = self.state.shrink(kept)
        return Decoder(self._model, state, self._sampling), order

    def fetch(self) -> Callable[[], list[list[Any]]]:
        """Begin to copy the newest `chosen` and `reports` to the host.

        Returns:
            What waits for the copy, not for any step started since, and gives the lists.
        """
        results = (self.state.rows.chosen, *self.state.rows.reports)
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


def can_replay(model: GPT) -> bool:
    """Whether decode steps of this model may be recorded and replayed.

    On a CUDA device they may, unless its cache is quantized, or the model is not plain: a replay
    would leave out Python code that somebody has put into it, and in training mode dropout is to
    differ at every step.
    """
    return model.device.type == "cuda" and model.cache_dtype is None and is_plain(model)


def stream_replayed(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Token]:
    """What `stream_plain` does, by steps that are all alike; see `mqa_gpt.generation.decode_graph`.

    The tokens are those of `stream_plain` too, except at near ties: fused kernels sum and round in
    another order, so where two tokens are about equally good, above all in 16 bits, the other one
    may be chosen.

    A step is started before anybody looks at the tokens of the one before, so that a GPU need not
    wait for its host. Rows that have ended are noticed one step late, and what they still generate
    is dropped; they leave the batch when that halves it.
    """
    if not prompts or max_new_tokens == 0:
        return
    with torch.inference_mode():
        rows = list(range(len(prompts) * n))
        decoder = _decoder(model, prompts, max_new_tokens, sampling, n, logprobs, prefill_chunk)
    unfinished = set(rows)

    for step in range(max_new_tokens):
        is_last = step == max_new_tokens - 1
        with torch.inference_mode():
            results = decoder.fetch()
            if not is_last:
                decoder.run()
            ids, *lists = results()
        reports: list[Report] = [(None, ())] * len(ids) if logprobs is None else report_rows(*lists)
        require_finite(
            all(id_ >= 0 for row, id_ in zip(rows, ids, strict=True) if row in unfinished)
        )
        for row, id_, report in zip(rows, ids, reports, strict=True):
            if row not in unfinished:
                continue
            token = Token(row, id_, None, *report)
            if should_stop(token):
                token = token._replace(finished="stop")
            elif is_last:
                token = token._replace(finished="length")
            if token.finished:
                unfinished.remove(row)
            yield token
        if not unfinished:
            return

        if len(rows) > FEW_ROWS and len(unfinished) <= len(rows) // 2:
            with torch.inference_mode():
                kept = [i for i, row in enumerate(rows) if row in unfinished]
                decoder, order = decoder.shrink(kept)
                rows = [rows[i] for i in order]


def _decoder(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    n: int,
    logprobs: int | None,
    chunk: int | None,
) -> Decoder:
    """The decoder that goes on behind the prompts, their first tokens chosen."""
    cache, logits = prefill_samples(model, prompts, max_new_tokens, n, chunk)
    seen = tokens_seen(prompts, n, logits) if sampling.repetition_penalty != 1 else None
    rows = list(range(len(logits)))
    draws = (
        None if sampling.greedy else draw_numbers(sampling, rows, n, max_new_tokens, model.device)
    )
    decoder = Decoder.new(model, cache, sampling, seen, draws, logprobs)
    decoder.choose(logits)
    return decoder
