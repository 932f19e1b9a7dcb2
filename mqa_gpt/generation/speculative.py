"""Speculative decoding: cheap guesses at the next tokens let the model make several per step.

A decode step reads all weights to make one token per row, and would take hardly longer to make
several. So something cheap drafts them; the model reads the draft in one step and says at every
position which token it would have chosen itself. As far as draft and choice agree, the draft is
what the plain loop would have written; the first choice that differs replaces the rest (Leviathan
et al. 2023; Chen et al. 2023).

What the model would have chosen is defined when sampling too: a draw is a function of the logits
and of one random number per position (`sampling.draw`). So the output is the plain loop's token for
token, and with that its distribution. The compiled forward pass makes that exact. Elsewhere a step
over several tokens may sum in another order than a step over one, which can tip a near tie.

A drafter is handed to `generate` or `LLM.generate` as `draft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, is_int, shown
from mqa_gpt.fast.compiled import step_forward
from mqa_gpt.model import GPT

FIRST_COUNT, MAX_COUNT = 4, 16  # tokens drafted at first, and at most
MAX_PAUSE = 64  # steps


class Proposer(Protocol):
    """A drafter at work in one generation, with what it keeps between steps."""

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """Up to `most` tokens that may follow each text.

        Args:
            rows: each text's row number; never reused.
            texts: prompt and new tokens so far, at least one; they grow from call to call.
            most: at least 1.
        """


class Drafter:
    """Base class; `start` returns a new proposer for each generation."""

    def start(self, rows: int) -> Proposer:
        """A proposer for at most this many continuations at a time."""
        raise NotImplementedError


class PromptLookup(Drafter):
    """Proposes the tokens after the last occurrence of the current n-gram (Saxena 2023).

    Good where the output repeats the prompt or itself: edits, and code that follows a pattern.

    Args:
        ngrams: lengths of the n-grams, longest first.
    """

    def __init__(self, ngrams: Sequence[int] = (3, 2)) -> None:
        is_list = isinstance(ngrams, Sequence) and not isinstance(ngrams, str | bytes)
        if not is_list or not ngrams or not all(is_int(n) and n > 0 for n in ngrams):
            raise PromptError(f"ngrams is {shown(ngrams)}: it must be a list of integers above 0")
        self.ngrams = tuple(map(int, ngrams))

    def start(self, rows: int) -> Proposer:
        """See `Drafter`."""
        return _Lookup(self.ngrams)


class _Lookup:
    """Per row, how much of its text is indexed, and where each n-gram last continued."""

    def __init__(self, ngrams: tuple[int, ...]) -> None:
        self._ngrams = ngrams
        self._indexed: dict[int, int] = {}
        self._continued: dict[int, dict[tuple[int, ...], int]] = {}

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """See `Proposer`; nothing for a row whose last tokens are new."""
        for gone in self._indexed.keys() - set(rows):
            del self._indexed[gone], self._continued[gone]
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
    """Lets a smaller model with the same tokenizer guess, greedily.

    Args:
        model: the smaller model, in eval mode. No row gets a draft once one has outgrown its
            context.
    """

    def __init__(self, model: GPT) -> None:
        if not isinstance(model, GPT):
            raise PromptError(f"the draft model is {shown(model)}: it must be a GPT")
        self.model = model

    def start(self, rows: int) -> Proposer:
        """See `Drafter`."""
        return _ModelProposer(self.model, rows)


class _ModelProposer:
    """A draft model's cache: row `rows[i]` is in slot i, which holds its first `held[i]` tokens."""

    def __init__(self, model: GPT, slots: int) -> None:
        self._model = model
        self._cache = model.new_cache(slots, model.config.n_positions)
        self._rows: list[int] = []
        self._held: list[int] = []

    @torch.inference_mode()
    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """See `Proposer`; nothing for any row once the longest has outgrown the model's context."""
        self._update(rows)
        text_of = dict(zip(rows, texts, strict=True))
        ordered = [text_of[row] for row in self._rows]
        missing = [len(text) - held for text, held in zip(ordered, self._held, strict=True)]
        width = max(missing)
        most = min(most, self._cache.max_length - max(self._held) - width)
        if most < 1:
            return [[] for _ in rows]
        # Read what the cache lacks, padded on the right; the guesses of earlier steps are dropped.
        cache = self._cache.rows(0, self._held, tuple(self._rows))
        device = self._model.device
        padded = [
            text[len(text) - n :] + [0] * (width - n)
            for text, n in zip(ordered, missing, strict=True)
        ]
        last = torch.tensor(missing, device=device) - 1  # (B,)
        ids = torch.tensor(padded, device=device)  # (B, width)
        logits = self._model(ids, cache=cache, logits_at=last)  # (B, V)
        self._held = [len(text) for text in ordered]
        cache.set_lengths(self._held)
        guesses = [logits.argmax(-1)]  # (B,) each
        forward = step_forward(self._model)
        while len(guesses) < most:
            guesses.append(forward(guesses[-1][:, None], cache)[:, 0].argmax(-1))
        drafted = dict(zip(self._rows, torch.stack(guesses, dim=1).tolist(), strict=True))
        return [drafted[row] for row in rows]

    def _update(self, rows: Sequence[int]) -> None:
        """Drop the rows that are gone and begin those that are new."""
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot] in rows:
                continue
            last = len(self._rows) - 1
            if slot < last:
                self._cache.copy_row(slot, last)
            self._rows[slot], self._held[slot] = self._rows[last], self._held[last]
            del self._rows[last], self._held[last]
        new = [row for row in rows if row not in self._rows]
        self._rows += new
        self._held += [0] * len(new)


class Speculation:
    """One drafter in one generation: its proposer, and how much to draft given its acceptance rate.

    Attributes:
        proposed, accepted: tokens drafted so far, and how many of them the model chose too.
    """

    def __init__(self, drafter: Drafter, rows: int, vocab_size: int) -> None:
        self._proposer, self._vocab_size = drafter.start(rows), vocab_size
        self.proposed = self.accepted = 0
        self._count, self._pause, self._failures = FIRST_COUNT, 0, 0

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], room: int
    ) -> list[list[int]]:
        """Guesses for each text: at most `room` tokens, none while the drafter pauses.

        Raises:
            PromptError: the drafter gave something else than token ids.
        """
        most = min(self._next_count(), room)
        if most < 1:
            return [[] for _ in rows]
        # Copies, so that a drafter of the caller's cannot change what was generated.
        guesses: Any = self._proposer.propose(list(rows), [list(text) for text in texts], most)
        if not isinstance(guesses, list) or len(guesses) != len(rows):
            raise PromptError(
                f"the drafter gave {shown(guesses)} for {len(rows)} texts: it must give a list "
                "with one list of ids, possibly empty, for each"
            )
        for guess in guesses:
            if (
                not isinstance(guess, list)
                or len(guess) > most
                or not all(is_int(id_) and 0 <= id_ < self._vocab_size for id_ in guess)
            ):
                raise PromptError(
                    f"the drafter proposed {shown(guess)}: it must give at most {most} token ids "
                    f"from 0 to {self._vocab_size - 1}"
                )
        return [list(map(int, guess)) for guess in guesses]

    def _next_count(self) -> int:
        """How many tokens to draft now.

        A wrong draft costs the time of reading it: failures in a row double the pause.
        """
        if self._pause:
            self._pause -= 1
            return 0
        return self._count

    def record(self, proposed: int, accepted: int) -> None:
        """Count a step's guesses over all rows: more are drafted while they are right."""
        self.proposed += proposed
        self.accepted += accepted
        if accepted:
            self._failures = 0
            is_right = accepted == proposed
            self._count = min(2 * self._count, MAX_COUNT) if is_right else accepted + 1
        elif proposed:
            self._failures += 1
            self._count = max(self._count // 2, 1)
            self._pause = min(2**self._failures - 1, MAX_PAUSE)


def check_drafter(drafter: object, config: GPTConfig) -> None:
    """Raise PromptError unless `drafter` is None or one that fits a model of this config."""
    if drafter is not None and not isinstance(drafter, Drafter):
        raise PromptError(
            f"draft is {shown(drafter)}: it must be a PromptLookup(), a DraftModel(model) or None"
        )
    if isinstance(drafter, DraftModel) and drafter.model.config.vocab_size != config.vocab_size:
        raise PromptError(
            f"the draft model has {drafter.model.config.vocab_size} tokens and the model has "
            f"{config.vocab_size}: they must have the same tokenizer"
        )
