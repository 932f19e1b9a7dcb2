"""From requests to text: completions while they are generated, with their counts and times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mqa_gpt.generation.batching import Engine, EnginePool, Token
from mqa_gpt.generation.request import Request
from mqa_gpt.generation.stop import RowText
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
        text: what was generated, up to the end token or stop string, without either.
        token_ids: every token that was generated, the one that ended it included.
        finish_reason: "stop" for an end token or stop string, "length" for `max_new_tokens`,
            "interrupted" where generation did not finish.
        prompt_tokens: the prompt's length in tokens.
        logprobs: per token the natural log of its probability; None if not asked for.
        top_logprobs: per token the likeliest tokens as (id, logprob); None if not asked for.
        cut: tokens of an infilling's prefix and suffix that `truncate` left out.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    cut: tuple[int, int] = (0, 0)


@dataclass
class Stats:
    """Counts of one generation over all its rows, and its times in seconds.

    `first_token_seconds` is None before there is a token; `drafted_tokens` and `accepted_tokens`
    are None without a draft.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int = 0
    finished_rows: int = 0
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second up to the first new token; None before it."""
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second without each row's first, which is the prefill's; None if none."""
        tokens = self.new_tokens - self.rows
        seconds = self.total_seconds - (self.first_token_seconds or 0.0)
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    @property
    def rate(self) -> float | None:
        """New tokens per second of the total time, prefills included; None where there are none."""
        return self.new_tokens / self.total_seconds if self.new_tokens else None

    def __str__(self) -> str:
        parts = []
        if self.prefill_rate is not None:
            parts.append(f"prefill {self.prefill_rate:,.1f} tok/s")
            parts.append(f"first token {self.first_token_seconds:.3f} s")
        if self.decode_rate is not None:
            parts.append(f"decode {self.decode_rate:,.1f} tok/s")
        if self.drafted_tokens is not None:
            parts.append(
                f"{self.accepted_tokens:,} of {self.drafted_tokens:,} drafted tokens accepted"
            )
        return " | ".join(parts)


@dataclass
class _Output:
    """One continuation so far."""

    text: RowText
    finish_reason: str = "interrupted"
    tokens: list[Token] = field(default_factory=list)

    def push(self, token: Token) -> None:
        """Take the next token, after which the row may be finished."""
        self.tokens.append(token)
        if token.finished == "stop":  # the end token has no text
            self.finish("stop")
            return
        self.text.push(token.id)
        if self.text.is_stopped:
            self.finish_reason = "stop"
        elif token.finished is not None:
            self.finish(token.finished)

    def finish(self, reason: str) -> None:
        """End the row."""
        self.text.finish()
        self.finish_reason = reason

    @property
    def is_finished(self) -> bool:
        """Whether no further token belongs to it."""
        return self.finish_reason != "interrupted"


class Generation:
    """A generation in progress.

    Iterating runs the model and gives (row, new text) as text becomes final; prompt i's sample j is
    row i * n + j. What there is so far is in `completions` and `stats` at any time, after an
    interrupt too.

    Args:
        requests: all with the same number of samples.
        slots: how many rows run at a time; None for all of them.
        pool: where its engine comes from; None for one of its own.
        cut: see `Completion`.

    Raises:
        PromptError: the device has no room for the keys and values.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        slots: int | None = None,
        pool: EnginePool | None = None,
        cut: tuple[int, int] = (0, 0),
    ) -> None:
        self._tokenizer, self._requests, self._cut = tokenizer, requests, cut
        self._pool = EnginePool() if pool is None else pool
        self._n = requests[0].n if requests else 1
        self._outputs: dict[int, _Output] = {}  # those begun
        self._unfinished = [r.n if r.max_new_tokens else 0 for r in requests]  # rows per request
        self._taken = 0  # requests whose completions were returned
        self.stats = Stats(
            rows=sum(request.n for request in requests),
            prompt_tokens=sum(len(request.prompt) for request in requests),
            finished_rows=sum(0 if r.max_new_tokens else r.n for r in requests),
        )
        begin = time.perf_counter()
        engine = self._pool.take(model, requests, slots)
        self.stats.total_seconds = time.perf_counter() - begin
        self._stream = self._generate(engine)  # one, so that a second iteration continues the first

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._stream

    def _generate(self, engine: Engine) -> Iterator[tuple[int, str]]:
        stats, begin = self.stats, time.perf_counter()
        numbers = [engine.add(request) for request in self._requests]
        first = numbers[0].start if numbers else 0  # a reused engine continues its numbering
        drafts = any(request.drafter is not None for request in self._requests)
        while engine.is_busy:
            tokens = engine.step()
            # What the consumer does between steps does not count.
            stats.total_seconds += time.perf_counter() - begin
            if stats.first_token_seconds is None:
                stats.first_token_seconds = stats.total_seconds
            if drafts:
                stats.drafted_tokens, stats.accepted_tokens = engine.drafted
            for token in tokens:
                row = token.row - first
                output = self._output(row)
                if output.is_finished:  # by a stop string earlier in this step
                    continue
                stats.new_tokens += 1
                output.push(token)
                if output.is_finished:
                    if token.finished is None:
                        engine.cancel(token.row)
                    stats.finished_rows += 1
                    self._unfinished[row // self._n] -= 1
                if piece := output.text.take():
                    yield row, piece
            begin = time.perf_counter()
        self._pool.give_back(engine)

    def _output(self, row: int) -> _Output:
        """A row, begun when it is first asked for."""
        if row not in self._outputs:
            request = self._requests[row // self._n]
            self._outputs[row] = _Output(RowText(self._tokenizer, request))
            if request.max_new_tokens == 0:
                self._outputs[row].finish("length")
        return self._outputs[row]

    def _completion(self, row: int) -> Completion:
        """What there is of a row."""
        output, request = self._output(row), self._requests[row // self._n]
        logprobs = top = None
        if request.logprobs is not None:
            logprobs = [token.logprob for token in output.tokens if token.logprob is not None]
            top = [list(token.top) for token in output.tokens]
        return Completion(
            text=output.text.text,
            token_ids=[token.id for token in output.tokens],
            finish_reason=output.finish_reason,
            prompt_tokens=len(request.prompt),
            logprobs=logprobs,
            top_logprobs=top,
            cut=self._cut,
        )

    @property
    def completions(self) -> list[Completion]:
        """Everything generated so far and not yet taken, row by row."""
        return [self._completion(row) for row in range(self._taken * self._n, self.stats.rows)]

    def take(self) -> Iterator[list[Completion]]:
        """The completions of the next prompts, in order, up to the first that is not finished.

        Each is returned once and then forgotten, so that a long run does not fill the memory.
        """
        while self._taken < len(self._requests) and not self._unfinished[self._taken]:
            rows = range(self._taken * self._n, (self._taken + 1) * self._n)
            completions = [self._completion(row) for row in rows]
            for row in rows:
                del self._outputs[row]
            self._taken += 1
            yield completions

    def run(self) -> list[Completion]:
        """Generate to the end."""
        for _ in self:
            pass
        return self.completions

    def run_in_order(self) -> Iterator[list[Completion]]:
        """Generate to the end; each prompt's completions once those before it are finished."""
        for _ in self:
            yield from self.take()
        yield from self.take()
