"""The engine of the last generation, kept because its recorded graphs can be replayed again."""

from __future__ import annotations

from collections.abc import Sequence

from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.request import Request
from mqa_gpt.model import GPT


class EnginePool:
    """Gives each generation an engine, the last one again if it fits.

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
