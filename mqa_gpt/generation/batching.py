"""Continuous batching: many prompts through few places, each of which is never empty for long.

Rows that finish together are rare. A batch that waits for its slowest row computes less and less;
here a finished row's place goes to the next prompt, whose keys and values are copied there after a
prefill of its own (Yu et al. 2022, "Orca", iteration-level scheduling). Rows of different lengths
do not influence each other, so each row's tokens are those of its solo run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.fast.flat import inline
from mqa_gpt.generation.decode import (
    PREFILL_POSITIONS,
    Report,
    Token,
    draw_numbers,
    prefill,
    report_rows,
    reports_of,
    require_finite,
)
from mqa_gpt.generation.decode_graph import FEW_ROWS, Decoder, can_replay
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY, SamplingParams, choose

# Free places are filled once they are this share of all. A prefill interrupts the decoding of all
# rows for at least one reading of the weights, about a step, so it should start several prompts;
# but while places wait for it, steps are only partly used. With rows of L tokens, m places filled
# at a time cost 1/m + m L / (2 B^2) steps per prompt: least at m = B sqrt(2 / L), B / 8 for 128.
SHARE_TO_FILL = 1 / 8


Results = list[tuple[int, int, Report]]  # place, new token, what is reported of it


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


class _Request(NamedTuple):
    """What is asked of all rows; see `stream_batched`."""

    max_new_tokens: int
    sampling: SamplingParams
    n: int
    logprobs: int | None
    prefill_chunk: int | None

    def draws(self, index: int, device: torch.device) -> list[float]:
        """The numbers that decide a continuation's draws; none if greedy."""
        if self.sampling.greedy:
            return []
        return draw_numbers(self.sampling, [index], self.n, self.max_new_tokens, device)[0].tolist()


class _Places:
    """The rows under way, in the first places of one cache that lasts for the whole run."""

    def __init__(self, model: GPT, count: int, length: int, request: _Request) -> None:
        self._model, self._request = model, request
        self._forward = inline(model)
        self._cache = model.new_cache(count, length)
        self._seen: Tensor | None = None
        if request.sampling.repetition_penalty != 1:
            shape = (count, model.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=model.device)
        self._first: Tensor | None = None  # logits of the rows that were added last
        self.rows: dict[int, _Row] = {}

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
        self.rows[place] = row

    def begin(self, logits: Tensor) -> None:
        """Take the logits (n, V) float32 behind the prompts of the n rows that were added last."""
        self._first = logits

    def advance(self) -> Results:
        """One more token of the rows that were added last, or else of all rows."""
        logits, self._first = self._first, None
        if logits is None:
            lengths = [row.length - 1 for row in self.rows.values()]  # the newest is yet to be fed
            newest = [[row.newest] for row in self.rows.values()]
            ids = torch.tensor(newest, device=self._model.device)  # (B, 1)
            logits = self._forward(ids, self._cache.view(lengths))[:, 0].float()  # (B, V)
        places = range(len(self.rows) - len(logits), len(self.rows))
        rows = [self.rows[place] for place in places]
        seen = None if self._seen is None else self._seen[places.start : places.stop]  # (B, V)
        u = None
        if not self._request.sampling.greedy:
            numbers = [row.draws[row.count] for row in rows]
            u = torch.tensor(numbers, dtype=torch.float64, device=logits.device)  # (B,)
        chosen, are_finite = choose(logits, self._request.sampling, seen, u)  # (B,), (B,)
        for row, is_finite in zip(rows, are_finite.tolist(), strict=True):
            require_finite(is_finite, row.name)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        reports = reports_of(logits, chosen, self._request.logprobs)
        return list(zip(places, chosen.tolist(), reports, strict=True))

    def remove(self, finished: list[int], *, are_more: bool) -> None:
        """Drop these rows; others move into their places, so that those in use are the first.

        Args:
            are_more: whether prompts are waiting, which makes no difference here.
        """
        for place in reversed(finished):  # so that the last row is never a finished one
            last = len(self.rows) - 1
            moved = self.rows.pop(last)
            if place < last:
                self.rows[place] = moved
                self._cache.copy_row(place, self._cache, last)
                if self._seen is not None:
                    self._seen[place] = self._seen[last]


class _ReplayedPlaces:
    """The same by steps that are recorded and replayed (`mqa_gpt.generation.decode_graph`).

    A step computes all places, with a row or without, and is started before anybody looks at the
    tokens of the one before. So a row that has ended computes one token more, for which its place
    has a slot more, and `draws` a number. An empty place writes to its slots from 0 on. Some row
    ends every `max_new_tokens` steps at most, and then all empty places begin at 0 again, so that
    they never come to the end of their slots.
    """

    def __init__(self, model: GPT, count: int, length: int, request: _Request) -> None:
        device, sampling = model.device, request.sampling
        cache = model.new_cache(count, length + 1)
        seen = draws = None
        if sampling.repetition_penalty != 1:
            shape = (count, model.config.vocab_size)
            seen = torch.zeros(shape, dtype=torch.bool, device=device)
        if not sampling.greedy:
            shape = (count, request.max_new_tokens + 1)
            draws = torch.zeros(shape, dtype=torch.float64, device=device)
        self._request = request
        self._decoder = Decoder.new(model, cache, sampling, seen, draws, request.logprobs)
        self._added: list[int] = []
        self.rows: dict[int, _Row] = {}

    @property
    def _count(self) -> int:
        return self._decoder.state.cache.batch_size

    @property
    def free(self) -> int:
        """Places without a row."""
        return self._count - len(self.rows)

    def add(self, row: _Row, prompt: list[int], cache: KVCache, cache_row: int) -> None:
        """Give a place to a row whose prompt stands in a row of another cache."""
        place = next(place for place in range(self._count) if place not in self.rows)
        self._decoder.state.begin(place, prompt, row.draws, cache, cache_row)
        self.rows[place] = row
        self._added.append(place)

    def begin(self, logits: Tensor) -> None:
        """Choose first tokens by the logits (n, V) float32 of the n rows that were added last."""
        self._decoder.choose(logits, self._added)
        self._added = []

    def advance(self) -> Results:
        """The newest token of every row; the step that makes the next ones is under way then."""
        results = self._decoder.fetch()
        if any(row.count + 1 < self._request.max_new_tokens for row in self.rows.values()):
            self._decoder.run()
        ids, *lists = results()
        reports: list[Report] = report_rows(*lists) if lists else [(None, ())] * len(ids)
        for place, row in self.rows.items():
            require_finite(ids[place] >= 0, row.name)
        return [(place, ids[place], reports[place]) for place in self.rows]

    def remove(self, finished: list[int], *, are_more: bool) -> None:
        """Drop these rows. Where no prompts are waiting, so are places when half are empty."""
        for place in finished:
            del self.rows[place]
        kept = sorted(self.rows)
        if kept and not are_more and self._count > FEW_ROWS and len(kept) <= self._count // 2:
            self._decoder, order = self._decoder.shrink(kept)
            self.rows = {i: self.rows[place] for i, place in enumerate(order)}
        elif finished:
            self._decoder.state.end([i for i in range(self._count) if i not in self.rows])


def stream_batched(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: SamplingParams = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    names: Sequence[str] | None = None,
    prefill_chunk: int | None = None,
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
    request = _Request(max_new_tokens, sampling, n, logprobs, prefill_chunk)
    with torch.inference_mode():
        length = max(map(len, prompts)) + max_new_tokens - 1  # the last token is never fed
        kind = _ReplayedPlaces if can_replay(model) else _Places
        places: _Places | _ReplayedPlaces = kind(model, batch_size, length, request)
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    waiting = _prefilled(model, prompts, names, request, places)
    left = len(prompts) * n  # rows that have no place yet

    while True:
        if left and (not places.rows or places.free >= SHARE_TO_FILL * batch_size):
            with torch.inference_mode():
                added = list(islice(waiting, places.free))  # (1, V) each
                left -= len(added)
                places.begin(torch.cat(added))
                del added
        if not places.rows:
            return
        with torch.inference_mode():
            results = places.advance()
        finished = []
        for place, id_, report in results:
            row = places.rows[place]
            row.newest, row.length, row.count = id_, row.length + 1, row.count + 1
            token = Token(row.index, id_, None, *report)
            if should_stop(token):
                token = token._replace(finished="stop")
            elif row.count == max_new_tokens:
                token = token._replace(finished="length")
            if token.finished:
                finished.append(place)
            yield token
        with torch.inference_mode():
            places.remove(finished, are_more=left > 0)


def _prefilled(
    model: GPT,
    prompts: list[list[int]],
    names: Sequence[str],
    request: _Request,
    places: _Places | _ReplayedPlaces,
) -> Iterator[Tensor]:
    """Give one row after the other a place, and its logits (1, V) to whoever asks for the next.

    Prompts for free places are read together, as many as `read_together` says; those samples of the
    last one that found no place wait with its keys and values. These are freed with the last one
    that needs them: the places are decoded while this waits to be asked again.
    """
    n, begun = request.n, 0
    while begun < len(prompts):
        group = read_together(prompts[begun : begun + ceil(places.free / n)])
        cache = model.new_cache(len(group), max(map(len, group)))
        chunk = request.prefill_chunk
        logits, row_of = _prefill_longest_first(model, cache, group, chunk)  # (B, V)
        for i, prompt in enumerate(group):
            for index in range((begun + i) * n, (begun + i + 1) * n):
                row = _Row(names[begun + i], index, len(prompt), request.draws(index, model.device))
                places.add(row, prompt, cache, row_of[i])
                first = logits[row_of[i]][None]
                if index + 1 == (begun + len(group)) * n:
                    del cache, logits
                yield first
                del first
        begun += len(group)


def _prefill_longest_first(
    model: GPT, cache: KVCache, prompts: list[list[int]], chunk: int | None
) -> tuple[Tensor, list[int]]:
    """`prefill` in the order that computes the least padding.

    Returns:
        The logits (B, V) float32 of the cache's rows, and the row of each prompt.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    logits = prefill(model, cache, [prompts[i] for i in order], chunk).float()  # (B, V)
    return logits, sorted(range(len(prompts)), key=order.__getitem__)


def read_together(prompts: list[list[int]]) -> list[list[int]]:
    """The first prompts, as many as one forward pass reads, padded to the longest; at least one.

    With more at once nothing would be faster, but their cache could be as large as the places, and
    where lengths differ more would be padding.
    """
    longest = 0
    for i, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if i > 0 and (i + 1) * longest > PREFILL_POSITIONS:
            return prompts[:i]
    return prompts


def slots_beside(prompts: int, longest: int) -> int:
    """The most slots of the cache beside the places, for so many free ones and such prompts."""
    return min(prompts * longest, max(longest, PREFILL_POSITIONS))
