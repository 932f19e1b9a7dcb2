"""The engine of the last generation, kept because its recorded graphs can be replayed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mqa_gpt.cache import KVCache, cache_bytes
from mqa_gpt.errors import PromptError
from mqa_gpt.generation.batching import Engine, size_for
from mqa_gpt.generation.replay import can_replay
from mqa_gpt.generation.request import Request
from mqa_gpt.machine import available_memory
from mqa_gpt.model import GPT

# Lengths of engines that record graphs are rounded up to a multiple of this, so that requests of
# slightly different lengths fit into the same engine.
LENGTH_STEP = 256


class EnginePool:
    """Gives each generation an engine, the last one again if it fits.

    A kept engine holds its KV cache and its graphs until another size is asked for, or `clear`.
    """

    def __init__(self) -> None:
        self._idle: list[Engine] = []  # at most one; pop and append are safe among threads

    def require_room(
        self, model: GPT, requests: Sequence[Request], slots: int | None = None
    ) -> None:
        """Raise PromptError if the device has no room for the cache that these requests need.

        Args:
            slots: how many rows run at a time, at most; None for all of them.
        """
        if any(_fits(engine, model, requests, slots) for engine in self._idle):
            return  # it has its cache already
        self.clear()
        count, length = _size(model, requests, slots)
        dtype = model.dtype if model.cache_class is KVCache else torch.int8
        needed = cache_bytes(model.config, dtype, count, length)
        room = available_memory(model.device)
        if room is not None and needed > room:
            raise PromptError(
                f"{count:,} completions of {length:,} tokens need {needed / 1e9:,.2f} GB for their "
                f"keys and values, but {room / 1e9:,.2f} GB are available on {model.device}: ask "
                "for less"
            )

    def take(self, model: GPT, requests: Sequence[Request], slots: int | None = None) -> Engine:
        """An engine for these requests, which have yet to be added."""
        while self._idle:
            engine = self._idle.pop()
            if _fits(engine, model, requests, slots):
                return engine
        count, length = _size(model, requests, slots)
        return Engine(model, count, length, drafts=_has_drafts(requests))

    def give_back(self, engine: Engine) -> None:
        """Keep an engine that is idle, if it has graphs."""
        if engine.is_reusable:
            self._idle[:] = [engine]

    def clear(self) -> None:
        """Free the memory of the kept engine."""
        self._idle.clear()


def _has_drafts(requests: Sequence[Request]) -> bool:
    return any(request.drafter is not None for request in requests)


def _size(model: GPT, requests: Sequence[Request], slots: int | None) -> tuple[int, int]:
    count, length = size_for(requests, slots)
    if can_replay(model) and not _has_drafts(requests):
        length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, model.config.n_positions)
    return count, length


def _fits(engine: Engine, model: GPT, requests: Sequence[Request], slots: int | None) -> bool:
    """Whether an idle engine can run these requests as a new one would, and is not much larger."""
    count, length = _size(model, requests, slots)
    return (
        engine.model is model
        and engine.is_reusable
        and not _has_drafts(requests)
        and count <= engine.slots <= (engine.slots if slots is None else slots)
        and length <= engine.length <= 4 * length
    )
