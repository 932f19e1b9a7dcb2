"""Drafts: cheap guesses at the next tokens, which let the model make several per step.

A decode step reads all weights to make one token per row, and would take hardly longer to make
several. So something cheap drafts them; the model reads the draft in one step and says at every
position which token it would have chosen itself. As far as draft and choice agree, the draft is
what the plain loop would have written; the first choice that differs replaces the rest (Leviathan
et al. 2023; Chen et al. 2023).

What the model would have chosen is defined when sampling too: a draw is a function of the logits
and of one random number per position (`sampling.draw`). So the output is the plain loop's token for
token, and with that its distribution. What is left is rounding: a step over several tokens sums in
another order than a step over one, which can tip a choice between equals.

The loop is `stream_drafted`; a draft is handed to `generate` or `LLM.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mqa_gpt.cache import KVCache
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, shown
from mqa_gpt.fast.flat import inline
from mqa_gpt.generation.decode import (
    Token,
    choose_finite,
    draw_numbers,
    prefill_samples,
    reports_of,
    tokens_seen,
)
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY, SamplingParams

FIRST, MOST = 4, 16  # tokens drafted at the beginning, and at most
LONGEST_PAUSE = 64  # steps


class Drafter:
    """What every kind of draft has: its record, and how much to draft in view of it.

    Attributes:
        proposed, accepted: tokens drafted in the latest generation, and how many of them the model
            chose too.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget everything: a new generation begins."""
        self.proposed = self.accepted = 0
        self._count, self._pause, self._failures = FIRST, 0, 0

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """Up to `most` tokens that may follow each text.

        Args:
            rows: which continuation each text is; a finished one does not come again.
            texts: prompt and new tokens so far, at least two; extended from call to call.
            most: at least 1.
        """
        raise NotImplementedError

    def next_count(self) -> int:
        """How many tokens to draft now: more while drafts are right, none for a while when wrong.

        A draft that fails costs the time of reading it, so failures in a row double the pause.
        """
        if self._pause:
            self._pause -= 1
            return 0
        return self._count

    def record(self, proposed: int, accepted: int) -> None:
        """Take note of how a step went, over all rows."""
        self.proposed += proposed
        self.accepted += accepted
        if accepted:
            self._failures = 0
            self._count = min(2 * self._count, MOST) if accepted == proposed else accepted + 1
        elif proposed:
            self._failures += 1
            self._count = max(self._count // 2, 1)
            self._pause = min(2**self._failures - 1, LONGEST_PAUSE)


class PromptLookup(Drafter):
    """Guesses that what followed the last tokens once follows them again (Saxena 2023).

    Good where the output repeats the prompt or itself: edits, and code that follows a pattern.

    Args:
        ngrams: lengths of what is looked up, the surest first.
    """

    def __init__(self, ngrams: Sequence[int] = (3, 2)) -> None:
        self._ngrams = tuple(ngrams)
        super().__init__()

    def begin(self) -> None:
        """See `Drafter`."""
        super().begin()
        # Per row: how much of its text is indexed, and where each n-gram last went on.
        self._indexed: dict[int, int] = {}
        self._continued: dict[int, dict[tuple[int, ...], int]] = {}

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """See `Drafter`; nothing for a row whose last tokens are new."""
        return [self._look_up(row, text, most) for row, text in zip(rows, texts, strict=True)]

    def _look_up(self, row: int, text: list[int], most: int) -> list[int]:
        continued = self._continued.setdefault(row, {})
        for end in range(self._indexed.get(row, 1), len(text)):
            for n in self._ngrams:
                if n <= end:
                    continued[tuple(text[end - n : end])] = end
        self._indexed[row] = len(text)
        for n in self._ngrams:
            if (at := continued.get(tuple(text[-n:]))) is not None:
                return text[at : at + most]
        return []


class DraftModel(Drafter):
    """Lets a smaller model with the same tokens guess, greedily.

    Args:
        model: the smaller model, in eval mode. Texts beyond its context get no draft.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        super().__init__()

    def begin(self) -> None:
        """See `Drafter`."""
        super().begin()
        self._rows: list[int] = []
        self._cache: KVCache | None = None
        self._held: list[int] = []  # how many of each text's first tokens the cache holds

    @torch.inference_mode()
    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """See `Drafter`; nothing for any row once the longest has outgrown the model's context."""
        model, device = self.model, self.model.device
        cache = self._cache_of(rows)
        missing = [len(text) - held for text, held in zip(texts, self._held, strict=True)]
        width = max(missing)
        most = min(most, cache.max_length - max(self._held) - width)
        if most < 1:
            return [[] for _ in texts]
        # Read what the cache lacks, padded on the right; this drops earlier guesses from it.
        cache.set_lengths(self._held)
        ids = torch.tensor(
            [
                text[len(text) - n :] + [0] * (width - n)
                for text, n in zip(texts, missing, strict=True)
            ],
            device=device,
        )  # (B, width)
        logits = model(
            ids, cache=cache, logits_at=torch.tensor(missing, device=device) - 1
        )  # (B, V)
        self._held = [len(text) for text in texts]
        cache.set_lengths(self._held)
        guesses = [logits.argmax(-1)]  # (B,) each
        forward = inline(model)
        while len(guesses) < most:
            guesses.append(forward(guesses[-1][:, None], cache)[:, 0].argmax(-1))
        return torch.stack(guesses, dim=1).tolist()

    def _cache_of(self, rows: Sequence[int]) -> KVCache:
        """The cache for these rows: new at first, then without those that are finished."""
        if self._cache is None:
            self._cache = self.model.new_cache(len(rows), self.model.config.n_positions)
            self._held = [0] * len(rows)
        elif list(rows) != self._rows:
            kept = [self._rows.index(row) for row in rows]
            self._cache = self._cache.select(kept)
            self._held = [self._held[i] for i in kept]
        self._rows = list(rows)
        return self._cache


def check_draft(draft: object, config: GPTConfig) -> None:
    """Raise PromptError unless `draft` is None or one that fits a model of this config."""
    if draft is not None and not isinstance(draft, Drafter):
        raise PromptError(
            f"draft is {shown(draft)}: it must be a PromptLookup(), a DraftModel(model) or None"
        )
    if isinstance(draft, DraftModel) and draft.model.config.vocab_size != config.vocab_size:
        raise PromptError(
            f"the draft model has {draft.model.config.vocab_size} tokens and the model has "
            f"{config.vocab_size}: they must have the same tokenizer"
        )


def stream_drafted(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    draft: Drafter,
    sampling: SamplingParams = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Token]:
    """The tokens of `stream_tokens` in fewer steps, each of which reads a draft too.

    See `mqa_gpt.generation.speculative`. Rows advance at different speeds; each row's
    tokens come in order.
    """
    if not prompts or max_new_tokens == 0:
        return
    draft.begin()
    with torch.inference_mode():
        rows = list(range(len(prompts) * n))
        cache, logits = prefill_samples(model, prompts, max_new_tokens + MOST, n, prefill_chunk)
        seen = tokens_seen(prompts, n, logits) if sampling.repetition_penalty != 1 else None
        draws = (
            None
            if sampling.greedy
            else draw_numbers(sampling, rows, n, max_new_tokens, model.device)
        )
    texts = [list(prompts[row // n]) for row in rows]  # prompts and new tokens
    counts = [0] * len(rows)  # of new tokens
    guesses: list[list[int]] = [[] for _ in rows]
    logits = logits[:, None]  # (B, T, V): behind each row's newest token and behind its guesses
    forward = inline(model)

    while True:
        # One position of the step after the other: a row is undecided while all its guesses so far
        # were what the model chose, since only then the logits behind them are its own.
        unfinished, undecided = set(range(len(rows))), list(range(len(rows)))
        accepted = 0
        for position in range(logits.shape[1]):
            with torch.inference_mode():
                # Finished rows are computed along, and have no draws left.
                at = [min(count, max_new_tokens - 1) for count in counts]
                u = None if draws is None else draws[range(len(rows)), at]  # (B,)
                chosen = choose_finite(logits[:, position], sampling, seen, u)
                reports = reports_of(logits[:, position], chosen, logprobs)
                if seen is not None:
                    seen[undecided, chosen[undecided]] = True
            ids = chosen.tolist()
            agreeing = []
            for i in undecided:
                texts[i].append(ids[i])
                counts[i] += 1
                token = Token(rows[i], ids[i], None, *reports[i])
                if should_stop(token):
                    token = token._replace(finished="stop")
                elif counts[i] == max_new_tokens:
                    token = token._replace(finished="length")
                agrees = position < len(guesses[i]) and guesses[i][position] == ids[i]
                accepted += agrees
                if token.finished:
                    unfinished.remove(i)
                elif agrees:
                    agreeing.append(i)
                yield token
            undecided = agreeing
            if not undecided:
                break
        draft.record(sum(map(len, guesses)), accepted)
        if not unfinished:
            return

        with torch.inference_mode():
            # The cache keeps what was agreed on: all tokens but the newest.
            cache.set_lengths([len(text) - 1 for text in texts])
            if len(unfinished) < len(rows):
                kept = sorted(unfinished)
                cache = cache.select(kept)
                rows, texts = [rows[i] for i in kept], [texts[i] for i in kept]
                counts = [counts[i] for i in kept]
                seen = None if seen is None else seen[kept]
                draws = None if draws is None else draws[kept]
            most = min(draft.next_count(), cache.max_length - cache.end - 1)
            guesses = draft.propose(rows, texts, most) if most > 0 else [[] for _ in rows]
            width = max(map(len, guesses))
            feed = [
                text[-1:] + guess + [0] * (width - len(guess))
                for text, guess in zip(texts, guesses, strict=True)
            ]
            logits = forward(torch.tensor(feed, device=model.device), cache).float()
