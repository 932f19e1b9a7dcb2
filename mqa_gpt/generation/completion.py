"""From the tokens that are generated to text: a completion in the making, its end, its times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, TypedDict

from mqa_gpt.cache import cache_bytes
from mqa_gpt.errors import PromptError, is_int, shown
from mqa_gpt.fim import check_mode, infill_prompt
from mqa_gpt.generation.batching import slots_beside, stream_batched
from mqa_gpt.generation.decode import Token
from mqa_gpt.generation.request import check_request, stream_tokens
from mqa_gpt.generation.speculative import Drafter, check_draft, stream_drafted
from mqa_gpt.machine import available_memory
from mqa_gpt.model import GPT
from mqa_gpt.sampling import SamplingParams
from mqa_gpt.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
        text: what was generated, up to the end token or stop string, without either.
        token_ids: every token that was generated, the one that ended it included.
        finish_reason: "stop" for an end token or stop string, "length" for `max_new_tokens`,
            "interrupted" where generation was broken off.
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
        """New tokens per second, each row's first left out: that one is the prefill's.

        None where there are no others.
        """
        tokens = self.new_tokens - self.rows
        seconds = self.total_seconds - (self.first_token_seconds or 0.0)
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    @property
    def rate(self) -> float | None:
        """New tokens per second of all the time, prefills included; None where there are none."""
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


class Options(TypedDict, total=False):
    """The options that every way of generating takes.

    The first six are described at `mqa_gpt.sampling.SamplingParams`. `stop` is a text or several,
    any of which ends a completion, as the control token of that name does too; `logprobs` is how
    many log-probabilities to report per token beside the chosen token's own; `draft` guesses ahead,
    so that the same tokens take fewer steps (`mqa_gpt.generation.speculative`).
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    draft: Drafter | None


def check_options(options: Mapping[str, Any]) -> None:
    """TypeError, as for any argument that there is not, unless all of these are `Options`."""
    for name in sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(
            f"there is no option {shown(name)}: accepted are {', '.join(Options.__annotations__)}"
        )


class _Row:
    """One continuation in the making: its tokens, and its text as far as it is final."""

    def __init__(self, tokenizer: Tokenizer, end_ids: set[int], stops: list[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._end_ids, self._stops = end_ids, stops
        self._handed_out = 0  # characters
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason = "interrupted"

    def push(self, token: Token) -> bool:
        """Take one token; True if it ends the row, by itself or by completing a stop string."""
        self.tokens.append(token)
        if token.id in self._end_ids:
            self.finish("stop")
        else:
            # No stop string that is complete only now can begin before this.
            begin = max(0, len(self.text) - max(map(len, self._stops), default=0))
            self.text += self._decoder.push(token.id)
            found = [at for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
            if found:
                self.text = self.text[: min(found)]
                self.finish_reason = "stop"
        return self.finish_reason == "stop"

    def finish(self, reason: str) -> None:
        """End the row; bytes that never became a character are shown as U+FFFD."""
        self.text += self._decoder.flush()
        self.finish_reason = reason

    def logprobs(self) -> list[float]:
        """The log-probabilities of the tokens so far, where they were asked for."""
        return [token.logprob for token in self.tokens if token.logprob is not None]

    def take(self) -> str:
        """Text not handed out yet, less an end that may turn out to begin a stop string."""
        end = len(self.text)
        if self.finish_reason == "interrupted":
            end -= max((_overlap(self.text, stop) for stop in self._stops), default=0)
        piece = self.text[self._handed_out : end]
        self._handed_out += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((k for k in range(len(stop) - 1, 0, -1) if text.endswith(stop[:k])), 0)


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str | tuple[str, str]],
    names: Sequence[str],
    *,
    special_tokens: bool,
    mode: str,
) -> list[list[int]]:
    """The ids of texts to continue and of pairs to infill, as `LLM.begin_many` takes them.

    Raises:
        PromptError: an unknown mode, or a prompt that cannot be encoded, which it names.
        CheckpointError: a pair, where the tokenizer has no infilling tokens.
    """
    check_mode(mode)
    ids = []
    for name, prompt in zip(names, prompts, strict=True):
        try:
            if isinstance(prompt, tuple) and len(prompt) == 2:
                ids.append(infill_prompt(tokenizer, *prompt, mode=mode))
            else:
                ids.append(tokenizer.encode(prompt, special_tokens=special_tokens))
        except PromptError as error:
            raise PromptError(f"{name}: {error}") from error
    return ids


class Generation:
    """Completions under way. Iterating runs the model and gives (row, new text) as text becomes
    final; prompt i's sample j is row i * n + j. What there is so far is in `completions` and
    `stats` at any time, after an interrupt too.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        n: int,
        batch_size: int | None = None,
        names: Sequence[str] | None = None,
        cut: tuple[int, int] = (0, 0),
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        draft: Drafter | None = None,
        **sampling_options: Any,
    ) -> None:
        stops: Any = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, Sequence) or not all(isinstance(t, str) and t for t in stops):
            raise PromptError(f"stop is {shown(stop)}: it must be a non-empty text or several")
        if batch_size is not None and (not is_int(batch_size) or batch_size < 1):
            raise PromptError(
                f"batch_size is {shown(batch_size)}: it must be an integer of at least 1"
            )
        if batch_size is not None and draft is not None:
            raise PromptError(
                "draft is for prompts that are completed all at once: leave it or batch_size out"
            )
        end_of_text = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
        prompts = [ids or end_of_text for ids in prompts]
        sampling = SamplingParams(**sampling_options)
        prompts = check_request(model.config, prompts, max_new_tokens, sampling, n, logprobs, names)
        check_draft(draft, model.config)
        count = len(prompts) * n
        # Before any row: a number that cannot fit would take all memory for them already.
        at_once = count if batch_size is None else min(batch_size, count)
        longest = max(map(len, prompts), default=0)
        copied = None if batch_size is None else slots_beside(ceil(at_once / n), longest)
        require_cache_room(model, at_once, longest + max_new_tokens, copied)
        # A control token leaves no text in which its name could be found.
        named = [id_ for text in stops if (id_ := tokenizer.control_id(text)) is not None]
        end_ids = {*model.config.end_token_ids, *end_of_text, *named}
        self._new_row = partial(_Row, tokenizer, end_ids, list(stops))
        self._rows: dict[int, _Row] = {}  # those begun
        self._unfinished = [n if max_new_tokens else 0] * len(prompts)  # rows of each prompt
        self._taken = 0  # prompts whose rows were given away
        self._n, self._max_new_tokens = n, max_new_tokens
        self._prompt_tokens = [len(prompt) for prompt in prompts]
        self._has_logprobs, self._cut = logprobs is not None, cut
        self._draft = draft
        stream: Any = stream_tokens
        if draft is not None:
            stream = partial(stream_drafted, draft=draft)
        elif batch_size is not None:
            stream = partial(stream_batched, batch_size=batch_size, names=names)
        self._tokens: Iterator[Token] = stream(
            model,
            prompts,
            max_new_tokens,
            sampling=sampling,
            n=n,
            should_stop=lambda token: self._row(token.row).push(token),
            logprobs=logprobs,
        )
        self.stats = Stats(rows=count, prompt_tokens=sum(self._prompt_tokens))
        if max_new_tokens == 0:
            self.stats.finished_rows = count

    def __iter__(self) -> Iterator[tuple[int, str]]:
        while True:
            begin = time.perf_counter()  # what the consumer does between tokens does not count
            token = next(self._tokens, None)
            self.stats.total_seconds += time.perf_counter() - begin
            if self._draft is not None:
                self.stats.drafted_tokens = self._draft.proposed
                self.stats.accepted_tokens = self._draft.accepted
            if token is None:
                return
            self.stats.new_tokens += 1
            if self.stats.new_tokens == 1:
                self.stats.first_token_seconds = self.stats.total_seconds
            row = self._row(token.row)
            if token.finished == "length":
                row.finish("length")
            if token.finished is not None:
                self.stats.finished_rows += 1
                self._unfinished[token.row // self._n] -= 1
            if piece := row.take():
                yield token.row, piece

    def _row(self, index: int) -> _Row:
        """A row, begun when it is first asked for."""
        if index not in self._rows:
            self._rows[index] = self._new_row()
            if self._max_new_tokens == 0:
                self._rows[index].finish("length")
        return self._rows[index]

    def _completion(self, index: int) -> Completion:
        """What there is of a row."""
        row = self._row(index)
        return Completion(
            text=row.text,
            token_ids=[token.id for token in row.tokens],
            finish_reason=row.finish_reason,
            prompt_tokens=self._prompt_tokens[index // self._n],
            logprobs=row.logprobs() if self._has_logprobs else None,
            top_logprobs=[list(t.top) for t in row.tokens] if self._has_logprobs else None,
            cut=self._cut,
        )

    @property
    def completions(self) -> list[Completion]:
        """Everything generated so far and not taken, row by row."""
        return [self._completion(row) for row in range(self._taken * self._n, self.stats.rows)]

    def take(self) -> Iterator[list[Completion]]:
        """The completions of the next prompts, in order, up to the first that is not finished.

        Each is given once and then forgotten, so that a long run does not fill the memory.
        """
        while self._taken < len(self._prompt_tokens) and not self._unfinished[self._taken]:
            rows = range(self._taken * self._n, (self._taken + 1) * self._n)
            completions = [self._completion(row) for row in rows]
            for row in rows:
                del self._rows[row]
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


def require_cache_room(model: GPT, rows: int, slots: int, copied: int | None = None) -> None:
    """Raise PromptError if the model's device cannot hold what generation needs for its cache.

    Args:
        rows, slots: size of the cache.
        copied: slots, of all rows together, that are held twice for a moment. By default those of
            several rows: when one leaves, the others are copied.
    """
    if copied is None:
        copied = 0 if rows == 1 else rows * slots
    dtype = model.cache_dtype or model.dtype
    needed = cache_bytes(model.config, dtype, slots=rows * slots + copied)
    room = available_memory(model.device)
    if room is not None and needed > room:
        raise PromptError(
            f"{rows:,} completions of {slots:,} tokens need {needed / 1e9:,.2f} GB for their keys "
            f"and values, but {room / 1e9:,.2f} GB are available on {model.device}: ask for less"
        )
