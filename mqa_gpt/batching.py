"""Continuous batching: many prompts through few places, each of which is never empty for long.

Rows that finish together are rare. A batch that waits for its slowest row computes less and less;
here a finished row's place goes to the next prompt, whose keys and values are copied there after a
prefill of its own (Yu et al. 2022, "Orca", iteration-level scheduling). Rows of different lengths
do not influence each other, so each row's tokens are those of its solo run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.generate import PREFILL_CHUNK, Token, _draws, _reports, _require_finite, prefill
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY, Sampling, choose

# Free places are filled once they are this share of all. A prefill interrupts the decoding of all
# rows for at least one reading of the weights, about a step, so it should start several prompts;
# but while places wait for it, steps are only partly used. With rows of L tokens, m places filled
# at a time cost 1/m + m L / (2 B^2) steps per prompt: least at m = B sqrt(2 / L), B / 8 for 128.
SHARE_TO_FILL = 1 / 8


@dataclass
class _Row:
    """A continuation under way.

    Attributes:
        name: what messages call its prompt.
        index: which one; prompt i's sample j is i * n + j.
        length: tokens of prompt and output.
        draws: the numbers that decide what is drawn, one per new token; none if greedy.
        count: new tokens.
        newest: the last of them.
    """

    name: str
    index: int
    length: int
    draws: list[float]
    count: int = 0
    newest: int = -1


class _Places:
    """The rows under way, in the first places of one cache that lasts for the whole run."""

    def __init__(self, model: GPT, count: int, length: int, sampling: Sampling) -> None:
        self._cache = KVCache.of(model, count, length)
        self._device = model.device
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            shape = (count, model.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=model.device)
        self.rows: list[_Row] = []

    @property
    def free(self) -> int:
        """Places without a row."""
        return self._cache.batch_size - len(self.rows)

    def add(self, row: _Row, prompt: list[int], cache: KVCache, cache_row: int) -> None:
        """Give the next place to a row whose prompt stands in a row of another cache."""
        place = len(self.rows)
        self._cache.copy_row(place, cache, cache_row)
        if self._seen is not None:
            self._seen[place] = False
            self._seen[place, prompt] = True
        self.rows.append(row)

    def remove(self, place: int) -> None:
        """Drop a row; the last one takes its place, so that the places in use are the first."""
        moved = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = moved
            self._cache.copy_row(place, self._cache, len(self.rows))
            if self._seen is not None:
                self._seen[place] = self._seen[len(self.rows)]

    @property
    def cache(self) -> KVCache:
        """What the rows hold: everything but their newest token, which is yet to be fed."""
        return self._cache.view([row.length - 1 for row in self.rows])

    @property
    def newest(self) -> Tensor:
        """(B, 1) int64: each row's newest token."""
        return torch.tensor([[row.newest] for row in self.rows], device=self._device)

    def choose(self, begin: int, logits: Tensor, sampling: Sampling) -> Tensor:
        """The next tokens of the rows from place `begin` on, (B,), from their logits (B, V)."""
        rows = self.rows[begin:]
        seen = None if self._seen is None else self._seen[begin : len(self.rows)]  # (B, V)
        u = None
        if not sampling.greedy:
            numbers = [row.draws[row.count] for row in rows]
            u = torch.tensor(numbers, dtype=torch.float64, device=self._device)  # (B,)
        chosen, are_finite = choose(logits, sampling, seen, u)  # (B,), (B,)
        for row, is_finite in zip(rows, are_finite.tolist(), strict=True):
            _require_finite(is_finite, row.name)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        for row, id_ in zip(rows, chosen.tolist(), strict=True):
            row.newest, row.length, row.count = id_, row.length + 1, row.count + 1
        return chosen


def stream_batched(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    names: Sequence[str] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Token]:
    """What `stream_tokens` does, with at most `batch_size` rows under way at a time.

    Prompts are begun in their order, and a prompt's samples share one prefill. The cache has
    `batch_size` rows as long as the longest prompt and its new tokens, however many prompts wait.
    Arguments are those of `stream_tokens`, and what messages call the prompts if not "prompt 0",
    "prompt 1", ...; each row's tokens come in order.
    """
    if not prompts or max_new_tokens == 0:
        return
    batch_size = min(batch_size, len(prompts) * n)
    with torch.inference_mode():
        length = max(map(len, prompts)) + max_new_tokens - 1  # the last token is never fed
        places = _Places(model, batch_size, length, sampling)
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    waiting = _prefilled(model, prompts, names, max_new_tokens, sampling, n, prefill_chunk, places)

    def next_tokens(begin: int, logits: Tensor) -> Iterator[Token]:
        """Choose for the rows from place `begin` on; those that end give up their places."""
        with torch.inference_mode():
            chosen = places.choose(begin, logits, sampling)
            reports = _reports(logits, chosen, logprobs)
        finished = []
        for place, report in enumerate(reports, begin):
            row = places.rows[place]
            token = Token(row.index, row.newest, None, *report)
            if should_stop(token):
                token = token._replace(finished="stop")
            elif row.count == max_new_tokens:
                token = token._replace(finished="length")
            if token.finished:
                finished.append(place)
            yield token
        with torch.inference_mode():
            for place in reversed(finished):  # so that the last row is never a finished one
                places.remove(place)

    while True:
        while not places.rows or places.free >= SHARE_TO_FILL * batch_size:
            begin, first = len(places.rows), []
            with torch.inference_mode():
                while places.free and (logits := next(waiting, None)) is not None:
                    first.append(logits)
            if not first:
                break
            yield from next_tokens(begin, torch.cat(first))
            del first, logits
        if not places.rows:
            return
        with torch.inference_mode():
            logits = model(places.newest, cache=places.cache)[:, 0].float()  # (B, V)
        yield from next_tokens(0, logits)


def _prefilled(
    model: GPT,
    prompts: list[list[int]],
    names: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    n: int,
    chunk: int,
    places: _Places,
) -> Iterator[Tensor]:
    """Give one row after the other a place, and its logits (1, V) to whoever asks for the next.

    Prompts for as many places as are free are read together; those samples of the last one that
    found none wait with its keys and values. These are freed with the last one that needs them:
    the places are decoded while this waits to be asked again.
    """
    begun = 0
    while begun < len(prompts):
        group = prompts[begun : begun + ceil(places.free / n)]
        cache = KVCache.of(model, len(group), max(map(len, group)))
        logits = prefill(model, cache, group, chunk).float()  # (B, V)
        for i, prompt in enumerate(group):
            for index in range((begun + i) * n, (begun + i + 1) * n):
                draws: list[float] = []
                if not sampling.greedy:
                    draws = _draws(sampling, [index], n, max_new_tokens, model.device)[0].tolist()
                row = _Row(names[begun + i], index, len(prompt), draws)
                places.add(row, prompt, cache, i)
                first = logits[i : i + 1]
                if index + 1 == (begun + len(group)) * n:
                    del cache, logits
                yield first
                del first
        begun += len(group)
