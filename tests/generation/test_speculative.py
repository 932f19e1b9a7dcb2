"""Drafts change the number of steps and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from mqa_gpt import GPT, LLM, DraftModel, PromptError, PromptLookup, generate
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.request import make_requests
from mqa_gpt.generation.speculative import (
    FIRST_COUNT,
    MAX_COUNT,
    MAX_PAUSE,
    Drafter,
    Speculation,
)
from mqa_gpt.sampling import SamplingParams
from tests.helpers import engine_tokens, our_model, reference_model, tiny_config

PROMPTS = [[5, 9, 33, 2, 7, 5, 9], [8], [4, 4, 17, 60, 61]]


class Oracle(Drafter):
    """Knows the answers, and lies about some tokens; keeps the rows it was asked for."""

    def __init__(self, answers: list[list[int]], truth: float, prompts: list[list[int]]) -> None:
        self.answers, self.truth, self.prompts = answers, truth, prompts
        self.rng = random.Random(0)
        self.asked: list[list[int]] = []

    def start(self, rows: int) -> Oracle:
        return self

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        self.asked.append(list(rows))
        n = len(self.answers) // len(self.prompts)
        guesses = []
        for row, text in zip(rows, texts, strict=True):
            done = len(text) - len(self.prompts[row // n])
            assert text[-done:] == self.answers[row][:done]  # what it is told is the output so far
            guess = self.answers[row][done : done + self.rng.randint(0, most)]
            guesses.append([t if self.rng.random() < self.truth else 3 for t in guess])
        return guesses


def model_of(seed: int = 0, **changes: object) -> GPT:
    config = tiny_config(**changes)
    return our_model(reference_model(config, seed), config)


def tokens_of(stream: Any) -> dict[int, list[Any]]:
    rows: dict[int, list[Any]] = {}
    for token in stream:
        rows.setdefault(token.row, []).append(token)
    return rows


@pytest.mark.parametrize("multi_query", [True, False], ids=["MQA", "MHA"])
@pytest.mark.parametrize("truth", [0.0, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({}, 1),
        ({"repetition_penalty": 1.3}, 1),
        ({"temperature": 0.9, "seed": 3}, 3),
        ({"temperature": 1.5, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, 2),
        ({"temperature": 1.2, "seed": 5, "repetition_penalty": 1.5}, 2),
    ],
    ids=["greedy", "penalty", "sampled", "filtered", "sampled-penalty"],
)
def test_tokens_ends_and_log_probabilities_are_those_of_the_plain_loop(
    multi_query: bool, truth: float, options: dict[str, Any], n: int
) -> None:
    model = model_of(multi_query=multi_query)
    sampling = SamplingParams(**options)
    settings: dict[str, Any] = {
        "n": n,
        "logprobs": 2,
        "end_ids": range(0, 97, 13),  # rows leave at different times
    }
    expected = tokens_of(engine_tokens(model, PROMPTS, 30, sampling, **settings))
    answers = [[token.id for token in expected[row]] for row in range(len(expected))]
    oracle = Oracle(answers, truth, PROMPTS)
    found = tokens_of(engine_tokens(model, PROMPTS, 30, sampling, drafter=oracle, **settings))
    assert found.keys() == expected.keys()
    for row, tokens in expected.items():
        for mine, theirs in zip(found[row], tokens, strict=True):
            assert (mine.id, mine.finished) == (theirs.id, theirs.finished)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]
    longest = max(map(len, answers))
    if truth == 1.0 and longest > 10:
        assert len(oracle.asked) < longest / 2


def test_a_row_at_the_end_of_the_context_is_finished_like_any_other() -> None:
    model = model_of(n_positions=40)
    prompts = [[7] * 30, [9, 1]]
    expected = generate(model, prompts, 10)
    assert generate(model, prompts, 10, draft=Oracle(expected, 1.0, prompts)) == expected
    assert generate(model, [[7] * 30], 10, draft=DraftModel(model)) == expected[:1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 1}], ids=["greedy", "drawn"])
def test_both_kinds_of_draft_give_the_plain_loops_tokens(options: dict[str, Any]) -> None:
    model, smaller = model_of(), model_of(seed=1, n_layer=1, n_positions=30)
    # A sharp pair, so that text repeats itself.
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [8], [4, 4, 17, 4, 4, 17]]
    expected = generate(model, prompts, 40, **options)
    for draft in (PromptLookup(), DraftModel(smaller), DraftModel(model)):
        assert generate(model, prompts, 40, draft=draft, **options) == expected
        assert generate(model, prompts, 40, draft=draft, **options) == expected  # used again


def drafted(model: GPT, draft: Drafter, slots: int | None = None) -> tuple[int, int]:
    """Tokens drafted and accepted in a generation."""
    requests = make_requests(model.config, PROMPTS, 40, drafter=draft)
    engine = Engine.for_requests(model, requests, slots=slots)
    for request in requests:
        engine.add(request)
    while engine.is_busy:
        engine.step()
    return engine.drafted


@pytest.mark.parametrize("slots", [None, 2])
def test_a_model_that_drafts_for_itself_is_always_right(slots: int | None) -> None:
    model = model_of()
    proposed, accepted = drafted(model, DraftModel(model), slots)
    assert accepted > 60
    # Guesses after a row's last token are lost, and nothing else.
    assert proposed - accepted <= len(PROMPTS) * MAX_COUNT


def test_rows_with_and_without_drafts_share_an_engine() -> None:
    model, smaller = model_of(), model_of(seed=1, n_layer=1)
    drafters = [PromptLookup(), None, DraftModel(smaller), DraftModel(model), None]
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8], [8], [4, 4, 17], [9, 1], [5, 6, 5, 6]]
    engine = Engine(model, 3, 60, drafts=True)
    for prompt, drafter in zip(prompts, drafters, strict=True):
        engine.add(make_requests(model.config, [prompt], 30, drafter=drafter)[0])
    rows: list[list[int]] = [[] for _ in prompts]
    while engine.is_busy:
        for token in engine.step():
            rows[token.row].append(token.id)
    assert rows == generate(model, prompts, 30)
    assert engine.drafted > (0, 0)


def test_two_generations_that_take_turns_share_a_drafter() -> None:
    model = model_of()
    for draft in (DraftModel(model), PromptLookup()):
        streams = [engine_tokens(model, PROMPTS[i:], 20, drafter=draft) for i in (0, 1)]
        found: list[dict[int, list[int]]] = [{}, {}]
        while any(streams):
            for i, stream in enumerate(streams):
                if stream is not None and (token := next(stream, None)) is not None:
                    found[i].setdefault(token.row, []).append(token.id)
                elif stream is not None:
                    streams[i] = None
        expected = generate(model, PROMPTS, 20)
        assert [found[0][row] for row in range(3)] == expected
        assert [found[1][row] for row in range(2)] == expected[1:]


class Faulty(Drafter):
    """Gives what a user's own drafter may give by mistake."""

    def __init__(self, guesses: Any) -> None:
        self.guesses = guesses

    def start(self, rows: int) -> Faulty:
        return self

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        for text in texts:
            text.clear()
        return self.guesses


@pytest.mark.parametrize("guesses", [[[97]], [[-1]], [[1.5]], [[1] * 99], [], [[1], [2]]])
def test_what_a_drafter_must_not_give_is_refused(guesses: Any) -> None:
    with pytest.raises(PromptError, match="drafter"):
        generate(model_of(), [[1, 2]], 8, draft=Faulty(guesses))


def test_a_drafter_cannot_change_what_was_generated() -> None:
    model = model_of()
    assert generate(model, [[1, 2]], 8, draft=Faulty([[4]])) == generate(model, [[1, 2]], 8)


def test_a_draft_model_drafts_nothing_beyond_its_context() -> None:
    draft = DraftModel(model_of(n_positions=8)).start(2)
    assert [len(guess) for guess in draft.propose([0, 1], [[1, 2, 3], [4, 5]], 5)] == [5, 5]
    assert draft.propose([0], [[1, 2, 3, 4, 5, 6, 7, 8]], 5) == [[]]


def test_a_draft_model_guesses_what_it_would_write_itself_as_rows_grow_and_leave() -> None:
    model = model_of()
    draft = DraftModel(model).start(3)
    texts = [[5, 9, 33, 2, 7], [8, 1], [4, 4, 17], [3]]
    for rows, growth in (([0, 1, 2], 0), ([0, 1, 2], 3), ([2, 0], 1), ([2, 3], 6)):
        for row in rows:
            texts[row] += [(11 * row + i) % 97 for i in range(growth + row * (growth > 0))]
        asked = [texts[row] for row in rows]
        assert draft.propose(rows, asked, 4) == generate(model, asked, 4)


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),
        ([1, 2, 3, 4, 9, 2, 3], [4, 9, 2]),  # two tokens are enough
        ([1, 2, 3, 4, 2, 3, 5, 1, 2, 3], [4, 2, 3]),  # three are surer than the latest two
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest counts
        ([7, 7, 7, 7], [7]),  # up to the end of what is known
        ([1, 2, 3, 9, 3], []),
        ([1, 2], []),
    ],
)
def test_what_followed_the_last_tokens_before_is_guessed(text: list[int], guess: list[int]) -> None:
    whole, in_steps = (PromptLookup().start(1) for _ in range(2))
    assert whole.propose([0], [text], 3) == [guess]
    for end in range(2, len(text)):
        in_steps.propose([0], [text[:end]], 3)
    assert in_steps.propose([0], [text], 3) == [guess]
    assert in_steps.propose([1], [[1, 2, 3]], 3) == [[]]  # rows do not see each other
    assert in_steps.propose([0], [text[-2:]], 3) == [[]]  # and what has left is forgotten


def test_drafts_grow_while_they_are_right_and_pause_ever_longer_while_they_are_wrong() -> None:
    run = Speculation(Steady(), 1, 97)

    def count() -> int:
        return len(run.propose([0], [[1]], 99)[0])

    assert count() == FIRST_COUNT
    run.record(FIRST_COUNT, FIRST_COUNT)
    assert count() == 2 * FIRST_COUNT
    for _ in range(5):
        run.record(8, 8)
    assert count() == MAX_COUNT
    assert len(run.propose([0], [[1]], 3)[0]) == 3  # as many as there is room for
    run.record(16, 5)
    assert count() == 6
    pauses = []
    for _ in range(9):
        run.record(4, 0)
        pauses.append(0)
        while count() == 0:
            pauses[-1] += 1
    assert pauses == [1, 3, 7, 15, 31, 63, MAX_PAUSE, MAX_PAUSE, MAX_PAUSE]
    assert count() == 1
    run.record(1, 1)
    run.record(2, 0)
    assert [count(), count()] == [0, 1]
    run.record(0, 0)  # nothing found is no failure
    assert count() == 1
    assert (run.proposed, run.accepted) == (4 + 40 + 16 + 36 + 1 + 2, 4 + 40 + 5 + 1)


class Steady(Drafter):
    """Guesses as much as it may."""

    def start(self, rows: int) -> Steady:
        return self

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        return [[1] * most]


def test_statistics_say_how_much_of_a_draft_was_accepted() -> None:
    llm = LLM.load()
    text = "def f(a):\n    return a\n\n\ndef g(a):\n    return"
    plain, drafted = (llm.begin([text], 24, n=1, draft=d) for d in (None, PromptLookup()))
    assert [c.text for c in plain.run()] == [c.text for c in drafted.run()]
    assert plain.stats.drafted_tokens is None
    assert "drafted" not in str(plain.stats)
    proposed, accepted = drafted.stats.drafted_tokens, drafted.stats.accepted_tokens
    assert proposed is not None
    assert accepted is not None
    assert 0 < accepted <= proposed
    assert str(drafted.stats).endswith(f"{accepted} of {proposed} drafted tokens accepted")


@pytest.mark.parametrize(
    ("draft", "message"),
    [("prompt", "must be a PromptLookup"), (DraftModel(GPT(tiny_config(vocab_size=96))), "96")],
)
def test_a_draft_that_does_not_fit_is_refused_at_once(draft: Any, message: str) -> None:
    model = model_of()
    with pytest.raises(PromptError, match=message):
        generate(model, PROMPTS, 4, draft=draft)
    with pytest.raises(PromptError, match=message):
        LLM(model, LLM.load().tokenizer).begin(["a"], 4, n=1, draft=draft)
