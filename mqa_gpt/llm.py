"""LLM: a checkpoint's model and tokenizer in one object that completes and infills text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from mqa_gpt.checkpoint import DEMO_DIR, load_model, read_config
from mqa_gpt.checks import shown
from mqa_gpt.errors import PromptError
from mqa_gpt.fim import infill_prompt, truncated_infill_prompt
from mqa_gpt.generate import Token, check_request, stream_drafted, stream_tokens
from mqa_gpt.hub import resolve
from mqa_gpt.memory import require_cache_room
from mqa_gpt.model import GPT
from mqa_gpt.packing import can_pack, pack
from mqa_gpt.sampling import Sampling
from mqa_gpt.speculation import Draft, check_draft
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
    """Token counts of one generation over all its rows, and its times in seconds.

    `drafted_tokens` and `accepted_tokens` are None without a draft.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second up to the first new token."""
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, each row's first left out: that one is the prefill's."""
        seconds = self.total_seconds - self.first_token_seconds
        return max(0, self.new_tokens - self.rows) / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        text = (
            f"prefill {self.prefill_rate:,.1f} tok/s | first token {self.first_token_seconds:.3f} s"
            f" | decode {self.decode_rate:,.1f} tok/s"
        )
        if self.drafted_tokens is not None:
            text += (
                f" | {self.accepted_tokens:,} of {self.drafted_tokens:,} drafted tokens accepted"
            )
        return text


class Options(TypedDict, total=False):
    """The options that every way of generating takes.

    The first six are described at `Sampling`. `stop` is a text or several, any of which ends a
    completion, as the control token of that name does too; `logprobs` is how many log-probabilities
    to report per token beside the chosen token's own; `draft` guesses ahead, so that the same
    tokens take fewer steps (`mqa_gpt.speculation`).
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    draft: Draft | None


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
        cut: tuple[int, int] = (0, 0),
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        draft: Draft | None = None,
        **sampling_options: Any,
    ) -> None:
        stops: Any = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, Sequence) or not all(isinstance(t, str) and t for t in stops):
            raise PromptError(f"stop is {shown(stop)}: it must be a non-empty text or several")
        end_of_text = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
        prompts = [ids or end_of_text for ids in prompts]
        sampling = Sampling(**sampling_options)
        prompts = check_request(model.config, prompts, max_new_tokens, sampling, n, logprobs)
        check_draft(draft, model.config)
        # Before the rows: a number that cannot fit would take all memory for them already.
        longest = max(map(len, prompts), default=0)
        require_cache_room(model, len(prompts) * n, longest + max_new_tokens)
        # A control token leaves no text in which its name could be found.
        named = [id_ for text in stops if (id_ := tokenizer.control_id(text)) is not None]
        end_ids = {*model.config.end_token_ids, *end_of_text, *named}
        self._rows = [_Row(tokenizer, end_ids, list(stops)) for _ in range(len(prompts) * n)]
        self._prompt_tokens = [len(prompt) for prompt in prompts for _ in range(n)]
        self._has_logprobs, self._cut = logprobs is not None, cut
        self._draft = draft
        stream = stream_tokens if draft is None else partial(stream_drafted, draft=draft)
        self._tokens = stream(
            model,
            prompts,
            max_new_tokens,
            sampling=sampling,
            n=n,
            should_stop=lambda token: self._rows[token.row].push(token),
            logprobs=logprobs,
        )
        if max_new_tokens == 0:
            for row in self._rows:
                row.finish("length")
        self.stats = Stats(rows=len(self._rows), prompt_tokens=sum(map(len, prompts)))

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
            row = self._rows[token.row]
            if token.finished == "length":
                row.finish("length")
            if piece := row.take():
                yield token.row, piece

    @property
    def completions(self) -> list[Completion]:
        """Everything generated so far, row by row."""
        return [
            Completion(
                text=row.text,
                token_ids=[token.id for token in row.tokens],
                finish_reason=row.finish_reason,
                prompt_tokens=prompt_tokens,
                logprobs=row.logprobs() if self._has_logprobs else None,
                top_logprobs=[list(t.top) for t in row.tokens] if self._has_logprobs else None,
                cut=self._cut,
            )
            for row, prompt_tokens in zip(self._rows, self._prompt_tokens, strict=True)
        ]

    def run(self) -> list[Completion]:
        """Generate to the end."""
        for _ in self:
            pass
        return self.completions


class LLM:
    """A model and its tokenizer: text in, text out.

    Attributes:
        model: the `GPT`; from `load` on a CPU its weights may be packed, which is for
            inference only (see `mqa_gpt.packing`).
        tokenizer: its `Tokenizer`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        name_or_dir: str | PathLike[str] | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        quantize: str | None = None,
    ) -> LLM:
        """Load a checkpoint with its tokenizer, ready to generate.

        On a CPU, float32 and 8-bit weights are packed for speed (see `mqa_gpt.packing`). To train
        or edit the model, take `LLM(GPT.from_pretrained(...), Tokenizer.from_pretrained(...))`.

        Args:
            name_or_dir: a folder or a name on the hub; None is the bundled demo checkpoint.
            revision, device, dtype, backend, quantize: see `mqa_gpt.checkpoint.load_model`.

        Raises:
            CheckpointError, ConfigError: the checkpoint cannot be had or used; says why.
        """
        folder = resolve(DEMO_DIR if name_or_dir is None else name_or_dir, revision)
        read_config(folder)  # a folder that is no checkpoint lacks more than a tokenizer
        tokenizer = Tokenizer.from_pretrained(folder)
        model = load_model(folder, device=device, dtype=dtype, backend=backend, quantize=quantize)
        if can_pack(model):
            pack(model)
        return cls(model, tokenizer)

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        n: Literal[1] = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int = 64,
        *,
        n: Literal[1] = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        n: int,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Any: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        n: int = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Any:
        """Complete one prompt or several, together.

        Args:
            prompt: text, or a list of texts. An empty one starts from end-of-text.
            max_new_tokens: at most this many new tokens per completion.
            n: samples per prompt, from one prefill of it.
            special_tokens: whether control tokens spelled out in a prompt, such as <fim_prefix>,
                act as such.
            options: see `Options`.

        Returns:
            For a text a `Completion`, with n > 1 a list of n; for a list of texts a list of these.

        Raises:
            PromptError: an unusable prompt or option.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        completions = self.begin(
            texts, max_new_tokens, n=n, special_tokens=special_tokens, **options
        ).run()
        if n > 1:
            samples = [completions[i : i + n] for i in range(0, len(completions), n)]
            return samples[0] if isinstance(prompt, str) else samples
        return completions[0] if isinstance(prompt, str) else completions

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Complete one prompt, piece by piece as the text becomes final.

        Arguments and errors are those of `generate`; errors come at once, not with the first piece.
        """
        generation = self.begin(
            [prompt], max_new_tokens, n=1, special_tokens=special_tokens, **options
        )
        return (piece for _, piece in generation)

    def infill(
        self,
        prefix: str,
        suffix: str,
        max_new_tokens: int = 64,
        *,
        mode: str = "psm",
        truncate: bool = False,
        **options: Unpack[Options],
    ) -> Completion:
        """Write what belongs between a prefix and a suffix (Bavarian et al. 2022).

        Args:
            prefix, suffix: plain text; control tokens spelled out in it stay text.
            mode: "psm" or "spm", the order in which the model is shown the two.
            truncate: cut the far ends of prefix and suffix where they exceed the context, instead
                of raising.
            options: see `Options`.

        Raises:
            CheckpointError: the checkpoint's tokenizer has no infilling tokens.
            PromptError: an unusable text or option.
        """
        return self.begin_infill(
            prefix, suffix, max_new_tokens, n=1, mode=mode, truncate=truncate, **options
        ).run()[0]

    def begin(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        *,
        n: int = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Generation:
        """Start completing prompts; what `generate` and `stream` run on, with their arguments."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"the prompt is {shown(prompts)}: it must be a text or a list of texts"
            )
        ids = [self.tokenizer.encode(p, special_tokens=special_tokens) for p in prompts]
        return Generation(self.model, self.tokenizer, ids, max_new_tokens, n=n, **options)

    def begin_infill(
        self,
        prefix: str,
        suffix: str,
        max_new_tokens: int = 64,
        *,
        n: int = 1,
        mode: str = "psm",
        truncate: bool = False,
        **options: Unpack[Options],
    ) -> Generation:
        """Start infilling, with the arguments of `infill`; n samples of it."""
        cut = (0, 0)
        if truncate:
            check_request(self.model.config, [], max_new_tokens)  # before reckoning with it
            room = self.model.config.n_positions - max_new_tokens
            fitted = truncated_infill_prompt(self.tokenizer, prefix, suffix, room, mode=mode)
            ids, cut = fitted.ids, (fitted.cut_prefix, fitted.cut_suffix)
        else:
            ids = infill_prompt(self.tokenizer, prefix, suffix, mode=mode)
            check_request(self.model.config, [], max_new_tokens)  # before reckoning with it
            context = self.model.config.n_positions
            if max_new_tokens < context < len(ids) + max_new_tokens:
                raise PromptError(
                    f"prefix and suffix take {len(ids):,} tokens and max_new_tokens is "
                    f"{max_new_tokens:,}: together they exceed the context of {context:,} tokens; "
                    "truncate=True (--truncate) leaves out what is farthest from the hole"
                )
        return Generation(
            self.model, self.tokenizer, [ids], max_new_tokens, n=n, cut=cut, **options
        )
