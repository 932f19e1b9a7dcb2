"""The decode step in a form that a CUDA graph can record.

A decode step runs hundreds of small kernels, and starting each of them from Python takes longer
than most of them run. A CUDA graph starts them all with one call: it repeats recorded work, the
same kernels with the same arguments at the same addresses. So nothing in the step may come from the
host or depend on a number there. Here the newest tokens, the rows' lengths, the keys and values,
the numbers that decide draws and which of them is next all are in buffers on the device, which the
step reads and writes in place; and attention gets all positions of the cache with the lengths that
say how many of them to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.fast.fused_step import can_fuse, fused_argmax, fused_hidden, fused_logits
from mqa_gpt.fast.graph import Replay, upload
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY, SamplingParams, choose, is_finite, log_probabilities

Reports = tuple[Tensor, Tensor, Tensor]  # what `log_probabilities` gives


class StaticCache(KVCache):
    """A cache whose use is the same at every decode step, so that a CUDA graph can repeat it.

    It shares the memory of another cache. Nothing depends on numbers of the host: each row's one
    new token is written at `lengths`, and attention gets all positions. The caller ensures that
    there is room.

    Args:
        cache: whose memory it shares.
        lengths: (B,) int64 on the device.
        active: (B,) int64, 1 for rows that grow by a step and 0 for the others.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, active: Tensor) -> None:
        self.kv, self.lengths, self.active = cache.kv[:, : len(lengths)], lengths, active
        self.dtype, self.end = cache.dtype, self.max_length
        self._ragged, self._limits = True, None
        self._rows = torch.arange(len(lengths), device=self.kv.device)  # (B,)

    def require_room(self, T: int) -> None:
        """Raise ValueError unless T is 1."""
        if T != 1:
            raise ValueError(f"{T} tokens per row: a static cache takes one at a time")

    def store(self, layer: int, kv: Tensor) -> Tensor:
        """Write kv (B, 1, G, 2D) of one layer; all its positions, (B, max_length, G, 2D)."""
        slots = self.kv[layer]  # (B, max_length, G, 2D)
        slots[self._rows, self.lengths] = kv[:, 0]
        return slots

    def advance(self, T: int) -> None:
        """Count the token that every layer has appended to every row."""
        self.lengths += self.active


@dataclass(frozen=True)
class StepState:
    """What a decode step reads and writes besides weights and cache, on the device; B slots.

    Attributes:
        ids: (B, 1) int64, the newest tokens.
        lengths: (B,) int64, what the cache holds of each row: all tokens but the newest.
        active: (B,) int64, 1 where there is a row, else 0.
        position: (B, 1) int64, which of its draws is next for each row.
        draws: (B, N) float64, the numbers that decide each row's draws.
        chosen: (B,) int64, for the host: `ids`, or -1 where the logits were not finite.
        seen: (B, V) bool, the tokens that the rows hold; None until a row's repetition is
            penalised.
    """

    ids: Tensor
    lengths: Tensor
    active: Tensor
    position: Tensor
    draws: Tensor
    chosen: Tensor
    seen: Tensor | None = None

    @classmethod
    def empty(cls, slots: int, draws: int, device: torch.device) -> StepState:
        """A state without rows."""
        zeros = torch.zeros((slots, 1), dtype=torch.int64, device=device)
        numbers = torch.zeros((slots, draws), dtype=torch.float64, device=device)
        row = zeros[:, 0]
        return cls(zeros, row.clone(), row.clone(), zeros.clone(), numbers, row.clone())

    def first(self, count: int) -> StepState:
        """The first slots, in the same memory."""
        return replace(self, **{name: tensor[:count] for name, tensor in self._tensors().items()})

    def copy(self, slots: Sequence[int]) -> StepState:
        """A copy of these slots."""
        index = upload(slots, self.ids.device)
        return replace(self, **{name: tensor[index] for name, tensor in self._tensors().items()})

    def write(self, slots: Sequence[int], other: StepState) -> None:
        """Make these slots those of `other`."""
        index = upload(slots, self.ids.device)
        for name, tensor in self._tensors().items():
            tensor[index] = getattr(other, name)

    def end(self, slot: int) -> None:
        """Let a slot hold no row; what a step computes for it is ignored."""
        self.active[slot] = self.lengths[slot] = self.position[slot] = 0

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def greedy_step(model: GPT, cache: KVCache) -> tuple[Callable[[], None], StepState]:
    """The step of a CUDA device for all rows of a filled cache, and its state, for measuring.

    Calling it feeds each row's newest token, token 0 at first, and chooses the next; on a CUDA
    device it is replayed from the second call on. `state.lengths` says where the rows continue.
    """
    state = StepState.empty(cache.batch_size, 0, model.device)
    state.lengths.copy_(cache.lengths)
    state.active.fill_(1)
    static = StaticCache(cache, state.lengths, state.active)
    step = partial(decode_step, model, static, state, GREEDY)
    return (Replay(step, model.device) if model.device.type == "cuda" else step), state


def decode_step(
    model: GPT,
    cache: StaticCache,
    state: StepState,
    sampling: SamplingParams,
    reports: Reports | None = None,
) -> None:
    """Feed each row's newest token and choose the next. The same work every time."""
    if can_fuse(model, cache.batch_size):
        x = fused_hidden(model, state.ids, cache)  # (B, C)
        if sampling.greedy and sampling.repetition_penalty == 1 and reports is None:
            chosen, highest = fused_argmax(model, x)  # (B,), (B,)
            take(chosen, is_finite(highest), state, seen=None)
            return
        logits = fused_logits(model, x).float()  # (B, V)
    else:
        logits = model(state.ids, cache=cache)[:, 0].float()  # (B, V)
    choose_next(logits, state, sampling, reports)


def step_logits(model: GPT, cache: StaticCache, state: StepState, out: Tensor) -> None:
    """Feed each row's newest token; the logits go to `out` (B, V) float32."""
    if can_fuse(model, cache.batch_size):
        out.copy_(fused_logits(model, fused_hidden(model, state.ids, cache)))
    else:
        out.copy_(model(state.ids, cache=cache)[:, 0])


def choose_next(
    logits: Tensor,
    state: StepState,
    sampling: SamplingParams,
    reports: Reports | None = None,
    allowed: Tensor | None = None,
) -> None:
    """Choose each row's next token by logits (B, V) float32.

    Args:
        allowed: the logits with the tokens that are ruled out at -inf; None where none are.
    """
    u = None
    if not sampling.greedy:
        u = state.draws.gather(1, state.position)[:, 0]  # (B,)
    state.position.add_(state.active[:, None])
    seen = None if sampling.repetition_penalty == 1 else state.seen
    chosen, are_finite = choose(logits if allowed is None else allowed, sampling, seen, u)
    take(chosen, are_finite, state, seen)
    if reports is not None:
        new = log_probabilities(logits, state.ids[:, 0], reports[1].shape[1])
        for report, values in zip(reports, new, strict=True):
            report.copy_(values)


def take(chosen: Tensor, are_finite: Tensor, state: StepState, seen: Tensor | None) -> None:
    """Make the tokens (B,) the newest, where the logits were finite: (B,) bool."""
    state.chosen.copy_(chosen).masked_fill_(~are_finite, -1)
    # Until the host has noticed a -1, any token can be fed.
    state.ids.copy_(state.chosen[:, None].clamp(min=0))
    if seen is not None:
        seen.scatter_(1, state.ids, True)
