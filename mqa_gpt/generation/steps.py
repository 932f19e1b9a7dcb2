"""How rows get their next tokens: the interface of a stepper, and the one that calls the model.

A stepper owns the cache whose first slots hold the engine's rows. `ModelStepper` runs anywhere: it
calls the compiled forward pass where there is one, else the model's modules, and reads drafts.
`mqa_gpt.generation.replay` has the one that replays CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.fast.compiled import Forward, step_forward
from mqa_gpt.generation.request import Request
from mqa_gpt.generation.speculative import Speculation
from mqa_gpt.model import GPT
from mqa_gpt.sampling import SamplingParams, choose, forbid, log_probabilities

RowOptions = tuple[SamplingParams, int | None]  # sampling without its seed, and logprobs


@dataclass(eq=False)
class Row:
    """One active row: a continuation of a prompt.

    Attributes:
        request: what is asked.
        number: its number in the engine.
        draws: the numbers in [0, 1) that decide what is drawn, one per new token; empty if greedy.
        ids: of prompt and output.
        count: new tokens.
    """

    request: Request
    number: int
    draws: list[float] = field(repr=False)
    ids: list[int] = field(repr=False)
    count: int = 0

    @property
    def newest(self) -> int:
        """The last token, which is chosen but not yet fed."""
        return self.ids[-1]

    def suppresses_end(self, count: int) -> bool:
        """Whether end tokens are suppressed for new token `count`, from 0."""
        return bool(self.request.end_ids) and count < self.request.min_new_tokens


class Choice(NamedTuple):
    """A token that was chosen; `logprob` and `top` as in `Token`."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


# For each row that has new tokens its slot and the tokens, usually one.
Results = list[tuple[int, list[Choice]]]


class Stepper(Protocol):
    """What runs decode steps over the rows in the first slots of a cache."""

    drafted: tuple[int, int]  # tokens drafted so far, and how many of them the model chose too

    @property
    def cache(self) -> KVCache:
        """The cache that prompts are prefilled into before `begin`."""

    def begin(self, slot: int, rows: Sequence[Row], logits: Tensor) -> None:
        """Take over rows whose prompts are in the slots from `slot` on.

        Args:
            logits: (B, V) float32, after each row's prompt.
        """

    def advance(self, rows: Sequence[Row]) -> Results:
        """New tokens of some rows or all; `rows[i]` is in slot i.

        Raises:
            FloatingPointError: a row's logits are not finite; names its prompt.
        """

    def remove(self, slot: int, last: int) -> None:
        """Remove the row in `slot`, and move the one in the slot `last` there."""


class ModelStepper:
    """Calls the model once per step, for one token per row or for a draft.

    Attributes:
        cache: (slots, length) positions.
        drafted: see `Stepper`.
    """

    def __init__(self, model: GPT, slots: int, length: int) -> None:
        self.cache = model.new_cache(slots, length)
        self.drafted = 0, 0
        self._speculations: dict[int, Speculation] = {}  # by id of the drafter, while it has rows
        self._model = model
        self._forward: Forward | None = None  # made at the first step, as a first token needs none
        self._begun: tuple[int, Tensor] | None = None  # first slot and logits (B, V) of new rows
        self._view: KVCache | None = None  # the slots of the rows, while these stay the same
        self._seen: Tensor | None = None  # (slots, V) bool, once a request penalises repetition

    def begin(self, slot: int, rows: Sequence[Row], logits: Tensor) -> None:
        """See `Stepper`."""
        self._begun, self._view = (slot, logits), None
        for i, row in enumerate(rows, slot):
            if row.request.sampling.repetition_penalty != 1:
                if self._seen is None:
                    shape = (self.cache.batch_size, logits.shape[1])
                    self._seen = torch.zeros(shape, dtype=torch.bool, device=logits.device)
                self._seen[i] = False
                self._seen[i, row.ids] = True

    def advance(self, rows: Sequence[Row]) -> Results:
        """See `Stepper`: the first tokens of the rows that were begun last, or else a step."""
        if self._begun is not None:
            (slot, logits), self._begun = self._begun, None
            new = rows[slot : slot + len(logits)]
            first = self._choose(logits, new, range(slot, slot + len(new)), [0] * len(new))
            return [(i, [choice]) for i, choice in enumerate(first, slot)]
        if self._view is None:  # the cache lacks each row's newest token only
            self._view = self.cache.rows(0, [len(row.ids) - 1 for row in rows], tuple(rows))
        cache = self._view
        guesses = self._guess(rows, cache.max_length - cache.end - 1)
        width = max(map(len, guesses))
        if width > 0:
            self._view = None  # it will hold guesses that are not accepted
        feed = [
            [row.newest, *guess, *[0] * (width - len(guess))]
            for row, guess in zip(rows, guesses, strict=True)
        ]
        ids = torch.tensor(feed, device=self._model.device)  # (B, T)
        if self._forward is None:
            self._forward = step_forward(self._model)
        logits = self._forward(ids, cache).float()  # (B, T, V)
        return list(enumerate(self._accept(logits, rows, guesses)))

    def remove(self, slot: int, last: int) -> None:
        """See `Stepper`."""
        self._view = None
        if slot != last:
            self.cache.copy_row(slot, last)
            if self._seen is not None:
                self._seen[slot] = self._seen[last]

    def _guess(self, rows: Sequence[Row], room: int) -> list[list[int]]:
        """The draft of each row, empty without a drafter."""
        guesses: list[list[int]] = [[] for _ in rows]
        drafters = {id(d): d for row in rows if (d := row.request.drafter) is not None}
        for gone in self._speculations.keys() - drafters.keys():
            del self._speculations[gone]
        for key, drafter in drafters.items():
            if key not in self._speculations:
                self._speculations[key] = Speculation(
                    drafter, self.cache.batch_size, self._model.config.vocab_size
                )
            slots = [i for i, row in enumerate(rows) if row.request.drafter is drafter]
            drafted = self._speculations[key].propose(
                [rows[i].number for i in slots], [rows[i].ids for i in slots], room
            )
            for i, guess in zip(slots, drafted, strict=True):
                guesses[i] = guess
        return guesses

    def _accept(
        self, logits: Tensor, rows: Sequence[Row], guesses: list[list[int]]
    ) -> list[list[Choice]]:
        """Each row's tokens from logits (B, T, V): choices for as long as they match its guesses.

        One position after the other: only while all of a row's guesses were what the model chose
        are the logits after them the row's own.
        """
        if logits.shape[1] == 1:
            counts = [row.count for row in rows]
            return [[c] for c in self._choose(logits[:, 0], rows, range(len(rows)), counts)]
        chosen: list[list[Choice]] = [[] for _ in rows]
        undecided = list(range(len(rows)))
        for position in range(logits.shape[1]):
            some = [rows[i] for i in undecided]
            part = logits[:, position]  # (B, V)
            part = part if len(some) == len(rows) else part[undecided]  # (b, V)
            counts = [row.count + position for row in some]
            for i, choice in zip(
                undecided, self._choose(part, some, undecided, counts), strict=True
            ):
                chosen[i].append(choice)
            undecided = [
                i for i in undecided
                if guesses[i][position : position + 1] == [chosen[i][-1].id]
                and rows[i].count + position + 1 < rows[i].request.max_new_tokens
            ]  # fmt: skip
            if not undecided:
                break
        for key, speculation in self._speculations.items():
            own = [i for i, row in enumerate(rows) if id(row.request.drafter) == key]
            proposed = sum(len(guesses[i]) for i in own)
            accepted = sum(
                choice.id == guess
                for i in own
                for choice, guess in zip(chosen[i], guesses[i], strict=False)
            )
            speculation.record(proposed, accepted)
            self.drafted = self.drafted[0] + proposed, self.drafted[1] + accepted
        return chosen

    def _choose(
        self, logits: Tensor, rows: Sequence[Row], slots: Sequence[int], counts: list[int]
    ) -> list[Choice]:
        """The next token of each row from logits (B, V), rows with equal options together.

        Args:
            slots: of the rows.
            counts: how many new tokens precede each row's.
        """
        groups = by_options(rows)
        choices: list[Choice] = [Choice(-1)] * len(rows)
        for (sampling, logprobs), group in groups.items():
            part = logits if len(groups) == 1 else logits[group]  # (b, V)
            allowed = part
            for k, i in enumerate(group):
                if rows[i].suppresses_end(counts[i]):
                    allowed = forbid(allowed, k, rows[i].request.end_ids)
            at = [slots[i] for i in group]
            seen = None
            if sampling.repetition_penalty != 1 and self._seen is not None:
                seen = self._seen[at]  # (b, V)
            u = None
            if not sampling.greedy:
                numbers = [rows[i].draws[counts[i]] for i in group]
                u = torch.tensor(numbers, dtype=torch.float64, device=part.device)  # (b,)
            ids, are_finite = choose(allowed, sampling, seen, u)  # (b,), (b,)
            if not are_finite.all():
                raise not_finite(rows[group[are_finite.tolist().index(False)]])
            if seen is not None and self._seen is not None:
                self._seen[at, ids] = True
            for i, choice in zip(group, choices_of(part, ids, logprobs), strict=True):
                choices[i] = choice
        return choices


def choices_of(logits: Tensor, ids: Tensor, logprobs: int | None) -> list[Choice]:
    """The chosen ids (B,) with their log-probabilities by logits (B, V), if asked for."""
    if logprobs is None:
        return [Choice(id_) for id_ in ids.tolist()]
    own, likeliest, values = (x.tolist() for x in log_probabilities(logits, ids, logprobs))
    return report_choices(ids.tolist(), own, likeliest, values)


def report_choices(
    ids: list[int], own: list[float], likeliest: list[list[int]], values: list[list[float]]
) -> list[Choice]:
    """Choices from what `log_probabilities` says of them, row by row."""
    return [
        Choice(id_, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for id_, logprob, row_ids, row_values in zip(ids, own, likeliest, values, strict=True)
    ]


def by_options(rows: Sequence[Row]) -> dict[RowOptions, list[int]]:
    """The indices of the rows that share their options."""
    asked = [(row.request.sampling, row.request.logprobs) for row in rows]
    if all(options == asked[0] for options in asked):  # the common case, without hashing
        return {asked[0]: list(range(len(rows)))}
    groups: dict[RowOptions, list[int]] = {}
    for i, options in enumerate(asked):
        groups.setdefault(options, []).append(i)
    return groups


def not_finite(row: Row) -> FloatingPointError:
    """The error about a row whose logits are NaN or infinite."""
    return FloatingPointError(
        f"{row.request.name}: the model's logits are not finite: the weights hold NaN or "
        "infinity (see `mqa-gpt inspect --check-finite`) or overflow in the model's dtype; "
        "try float32"
    )
