"""Continuous batching: requests come in at any time, and each step extends all active rows.

Rows finish at different times, and a static batch would idle until its slowest row ends. So a row
occupies a slot of the cache only while it runs, and the next waiting prompt is read into a slot
that became free (Yu et al. 2022, "Orca", iteration-level scheduling). Rows of different lengths
share a step without influencing each other: each row's tokens are those of its solo run. The
compiled forward pass makes that exact; elsewhere sums may run in another order, and round so.

    engine = Engine(model, slots=16, length=1024)
    engine.add(request)                     # at any time, also between steps
    while engine.is_busy:
        for token in engine.step():
            ...                             # engine.cancel(token.row) ends a row at once
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache, cache_bytes
from mqa_gpt.errors import PromptError
from mqa_gpt.generation.prefill import prefill
from mqa_gpt.generation.replay import GraphStepper, can_replay
from mqa_gpt.generation.request import Request
from mqa_gpt.generation.speculative import MAX_COUNT
from mqa_gpt.generation.steps import Choice, ModelStepper, Row, Stepper
from mqa_gpt.machine import available_memory
from mqa_gpt.model import GPT
from mqa_gpt.sampling import uniforms

# Free slots are filled once they are this share of all. A prefill interrupts the decoding of all
# rows for at least one reading of the weights, about a step, so it should start several prompts;
# but while slots wait for it, steps are only partly used. With rows of N tokens, m slots filled at
# a time cost 1/m + m N / (2 B^2) steps per prompt: least at m = B sqrt(2 / N), B / 8 for N = 128.
MIN_FREE_SHARE = 1 / 8

# Lengths of engines that record graphs are rounded up to a multiple of this, so that requests of
# slightly different lengths fit into the same engine.
LENGTH_STEP = 256


class Token(NamedTuple):
    """One generated token.

    Attributes:
        row: its row number, from `Engine.add`.
        id: the token.
        finished: "stop" or "length" if it is the row's last, else None.
        logprob: natural log of the model's probability for it, before any filter; None unless
            log-probabilities were asked for.
        top: the most likely tokens at this position as (id, logprob), likeliest first.
    """

    row: int
    id: int
    finished: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class _Waiting:
    """A request whose rows of these numbers have no slots yet."""

    request: Request
    numbers: range


class Engine:
    """Runs requests on a model: rows are added, stepped and cancelled.

    The model's modules, hooks and attention are those of the first step: replace them between
    engines, not while one runs.

    Args:
        model: in eval mode.
        slots: how many rows run at a time; others wait.
        length: of each slot, in positions: no prompt with its new tokens may be longer. Rounded up
            where graphs are recorded.
        drafts: whether requests may have drafters, which CUDA graphs cannot replay.
        prefill_chunk: see `prefill`.

    Raises:
        PromptError: the device has no room for the cache.
    """

    def __init__(
        self,
        model: GPT,
        slots: int,
        length: int,
        *,
        drafts: bool = False,
        prefill_chunk: int | None = None,
    ) -> None:
        can_record = can_replay(model) and not drafts
        if can_record:
            length = _rounded(length, model)
        dtype = model.dtype if model.cache_class is KVCache else torch.int8
        device, needed = model.device, cache_bytes(model.config, dtype, slots, length)
        room = available_memory(device)
        if room is not None and needed > room:
            raise PromptError(
                f"{slots:,} completions of {length:,} tokens need {needed / 1e9:,.2f} GB for their "
                f"keys and values, but {room / 1e9:,.2f} GB are available on {device}: ask for less"
            )
        self.slots, self.length = slots, length
        self.model, self._drafts, self._chunk = model, drafts, prefill_chunk
        spare = MAX_COUNT if drafts else 0  # a draft may reach beyond a row's last token
        size = min(length + spare, model.config.n_positions)
        kind = GraphStepper if can_record else ModelStepper
        self._stepper: Stepper = kind(model, slots, size)
        self._used = 0  # slots that have held a row
        self._has_failed = False
        self._waiting: deque[_Waiting] = deque()
        self._cancelled: set[int] = set()  # rows that wait
        self._running: list[Row] = []  # by slot
        self._rows = 0
        # The logits (V,) after a prompt some of whose samples still wait.
        self._logits: dict[Request, Tensor] = {}

    @classmethod
    def for_requests(
        cls,
        model: GPT,
        requests: Sequence[Request],
        *,
        slots: int | None = None,
        prefill_chunk: int | None = None,
    ) -> Engine:
        """An engine as large as these requests need; they have yet to be added.

        Args:
            slots: at most this many; None runs all rows together.
        """
        count, length = _size_for(requests, slots)
        drafts = any(request.drafter is not None for request in requests)
        return cls(model, count, length, drafts=drafts, prefill_chunk=prefill_chunk)

    def fits(self, requests: Sequence[Request], slots: int | None) -> bool:
        """Whether it can replay its graphs for these requests, and is not much larger than a new
        engine would be."""
        count, length = _size_for(requests, slots)
        length = _rounded(length, self.model)
        return (
            self.is_reusable
            and count <= self.slots <= (self.slots if slots is None else slots)
            and length <= self.length <= 4 * length
            and all(request.drafter is None for request in requests)
        )

    @property
    def is_busy(self) -> bool:
        """Whether a row runs or waits."""
        return bool(self._running or self._waiting)

    @property
    def drafted(self) -> tuple[int, int]:
        """Tokens drafted so far, and how many of them the model chose too."""
        return self._stepper.drafted

    @property
    def is_reusable(self) -> bool:
        """Whether it has recorded graphs that later requests can replay."""
        is_idle = not self.is_busy and not self._has_failed
        return is_idle and isinstance(self._stepper, GraphStepper) and self._stepper.is_valid()

    def add(self, request: Request) -> range:
        """Queue a request and return its row numbers, which are never reused.

        Raises:
            PromptError: the request is longer than the slots, or has a drafter without `drafts`.
        """
        if len(request.prompt) + request.max_new_tokens > self.length:
            raise PromptError(
                f"{request.name} has {len(request.prompt):,} tokens and {request.max_new_tokens:,} "
                f"are wanted, but this engine's rows have {self.length:,} positions: ask for fewer"
            )
        if request.drafter is not None and not self._drafts:
            raise PromptError(f"{request.name} has a drafter: make the engine with drafts=True")
        numbers = range(self._rows, self._rows + request.n)
        self._rows += request.n
        if request.max_new_tokens:
            self._waiting.append(_Waiting(request, numbers))
        return numbers

    @torch.inference_mode()
    def cancel(self, row: int) -> None:
        """End a row at once; it gets no further tokens. A row that has ended is left alone."""
        if any(row in waiting.numbers for waiting in self._waiting):
            self._cancelled.add(row)
        for slot, running in enumerate(self._running):
            if running.number == row:
                self._release([slot])
                return

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Run one step and return its tokens: one per row, several with a drafter.

        Right after a prefill these are the first tokens of the newly admitted rows only.

        Raises:
            FloatingPointError: a row's largest logit is NaN or infinite.
            RuntimeError: an earlier step raised; the engine cannot go on.
        """
        if self._has_failed:
            raise RuntimeError("an earlier step of this engine raised: make a new engine")
        self._has_failed = True  # until this step has ended
        tokens = self._step()
        self._has_failed = False
        return tokens

    def _step(self) -> list[Token]:
        free = self.slots - len(self._running)
        if self._waiting and (not self._running or free >= MIN_FREE_SHARE * self.slots):
            self._admit(self._next_rows(free))
        if not self._running:
            return []
        tokens, finished = [], []
        for slot, choices in self._stepper.advance(self._running):
            for choice in choices:
                token = self._take(self._running[slot], choice)
                tokens.append(token)
                if token.finished is not None:
                    finished.append(slot)
                    break
        self._release(finished)
        return tokens

    def _take(self, row: Row, choice: Choice) -> Token:
        """Append a row's next token."""
        row.ids.append(choice.id)
        row.count += 1
        finished = None
        if choice.id in row.request.end_ids:
            finished = "stop"
        elif row.count == row.request.max_new_tokens:
            finished = "length"
        return Token(row.number, choice.id, finished, choice.logprob, choice.top)

    def _next_rows(self, most: int) -> list[Row]:
        """The first rows that wait."""
        rows: list[Row] = []
        while self._waiting and len(rows) < most:
            waiting = self._waiting[0]
            request, number = waiting.request, waiting.numbers[0]
            waiting.numbers = waiting.numbers[1:]
            if not waiting.numbers:
                self._waiting.popleft()
            if number in self._cancelled:
                self._cancelled.remove(number)
                continue
            sample = request.n - len(waiting.numbers) - 1
            draws: list[float] = []
            if not request.sampling.greedy:
                # A graph begins a token more than a row has before it is known to have ended.
                draws = uniforms(request.seed, sample, request.max_new_tokens + 1)
            rows.append(Row(request, number, draws, list(request.prompt)))
        return rows

    def _admit(self, rows: list[Row]) -> None:
        """Give rows the next slots, their prompts in the cache and their first logits."""
        if not rows:  # all that waited were cancelled
            self._logits.clear()
            return
        following = self._waiting[0].request if self._waiting else None
        if following is not None:
            # The order is free: the longest first wastes little padding.
            rows.sort(key=lambda row: -len(row.request.prompt))
        first, running = len(self._running), self._running
        # Where each prompt is: in the slot of a sample that runs, or in the next to be read.
        slot_of = {row.request: i for i, row in enumerate(running) if row.request in self._logits}
        new = [r for r in dict.fromkeys(row.request for row in rows) if r not in slot_of]
        slot_of |= {request: first + i for i, request in enumerate(new)}
        end = first + len(rows)
        if first < self._used:
            # What other rows left there is hidden, but 0 times NaN is NaN (see `KVCache.limit`).
            self._stepper.cache.clear(first, min(end, self._used))
        self._used = max(self._used, end)
        if new:
            owner = {row.request: row for row in reversed(rows)}  # the first of its samples
            labels = [owner[request] for request in new]
            cache = self._stepper.cache.rows(first, [0] * len(new), labels)
            prompts = [request.prompt for request in new]
            logits = prefill(self.model, cache, prompts, self._chunk).float()  # (B, V)
            self._logits |= dict(zip(new, logits, strict=True))
        # From the last row on, so that a prompt is not overwritten before its copies are made.
        for slot, row in reversed(list(enumerate(rows, first))):
            if slot != slot_of[row.request]:
                self._stepper.cache.copy_row(slot, slot_of[row.request])
        self._running += rows
        begun = torch.stack([self._logits[row.request] for row in rows])  # (B, V)
        self._stepper.begin(first, rows, begun)
        self._logits = {r: x.clone() for r, x in self._logits.items() if r is following}

    def _release(self, slots: list[int]) -> None:
        """Drop the rows of these slots; the last rows fill the gaps."""
        for slot in reversed(slots):  # so that the last row is never one that leaves
            last = len(self._running) - 1
            self._stepper.remove(slot, last)
            self._running[slot] = self._running[last]
            del self._running[last]


class EnginePool:
    """Gives each generation an engine, the last one again if it fits: graphs are recorded once.

    A kept engine holds its KV cache and its graphs until another size is asked for, or `clear`.
    """

    def __init__(self) -> None:
        self._idle: list[Engine] = []  # at most one; pop and append are safe among threads

    def take(self, model: GPT, requests: Sequence[Request], slots: int | None = None) -> Engine:
        """An engine for these requests, which have yet to be added.

        Args:
            slots: how many rows run at a time, at most; None for all of them.

        Raises:
            PromptError: the device has no room for the cache that they need.
        """
        while self._idle:
            engine = self._idle.pop()
            if engine.model is model and engine.fits(requests, slots):
                return engine
            del engine  # before another one's cache is allocated
        return Engine.for_requests(model, requests, slots=slots)

    def give_back(self, engine: Engine) -> None:
        """Keep an engine that is idle, if it has graphs."""
        if engine.is_reusable:
            self._idle[:] = [engine]

    def clear(self) -> None:
        """Free the memory of the kept engine."""
        self._idle.clear()


def _size_for(requests: Sequence[Request], slots: int | None) -> tuple[int, int]:
    """How many slots, at most `slots`, of which length run these requests."""
    rows = sum(request.n for request in requests)
    length = max((len(r.prompt) + r.max_new_tokens for r in requests), default=1)
    return max(1, rows if slots is None else min(slots, rows)), length


def _rounded(length: int, model: GPT) -> int:
    """A length to record graphs for, which other requests may use too."""
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, model.config.n_positions)
