"""Completions of tasks: their prompts, and that they depend on nothing but the task and options."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mqa_gpt import LLM, Tokenizer
from mqa_gpt.errors import CheckpointError, InputError, PromptError
from mqa_gpt.evaluation.completing import complete, solution_bits
from mqa_gpt.evaluation.tasks import Task
from mqa_gpt.fim import MODES, infill_prompt, truncated_infill_prompt
from mqa_gpt.generation.score import score_ids
from tests.helpers import SPECIALS, byte_tokenizer, tiny_model

HOLES = [Task(i, "x" * i, "y" * (9 - i), "z" * (i + 1)) for i in range(8)]
TEXTS = [Task(f"t{i}", f"def f{i}():\n  ") for i in range(5)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = tiny_model(vocab_size=256 + len(SPECIALS), eos_token_id=0, bos_token_id=0)
    return LLM(model, Tokenizer(byte_tokenizer(*SPECIALS)))


def texts(llm: LLM, tasks: list[Task], **options: Any) -> list[list[str]]:
    found = complete(llm, tasks, options.pop("max_new_tokens", 6), **options)
    return [[sample.text for sample in samples] for samples in found]


@pytest.mark.parametrize("mode", MODES)
def test_a_hole_is_filled_as_infill_fills_it(llm: LLM, mode: str) -> None:
    for task, (sample,) in zip(HOLES, complete(llm, HOLES, 6, mode=mode), strict=True):
        assert sample == llm.infill(task.prefix, task.suffix or "", 6, mode=mode)


def test_a_text_is_continued_after_its_last_letter(llm: LLM) -> None:
    for task, (sample,) in zip(TEXTS, complete(llm, TEXTS, 6, stop="q"), strict=True):
        assert sample == llm.generate(task.prefix.rstrip(), 6, special_tokens=False, stop="q")
    blank = Task("blank", " \n")
    assert texts(llm, [blank]) == [[llm.generate("", 6).text]]


@pytest.mark.parametrize("tasks", [HOLES, TEXTS])
def test_samples_depend_on_task_and_seed_not_on_their_neighbours(
    llm: LLM, tasks: list[Task]
) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 5}
    together = texts(llm, tasks, batch_size=7, **options)
    assert [one for task in tasks for one in texts(llm, [task], **options)] == together
    assert texts(llm, tasks[2:], batch_size=2, **options) == together[2:]
    assert texts(llm, tasks, n=3, temperature=1.0, seed=6) != together
    assert len({sample for samples in together for sample in samples}) > len(tasks)


def test_the_prompt_keeps_what_is_nearest_and_says_what_it_leaves_out(llm: LLM) -> None:
    hole, text = Task("a", "p" * 500, "s" * 600, "z"), Task("b", "t" * 500)
    for task, cut in ((hole, (483, 584)), (text, (464, 0))):
        ((sample,),) = complete(llm, [task], 4, prompt_tokens=36)
        assert sample.prompt_tokens == 36
        assert sample.cut == cut
    ((sample,),) = complete(llm, [hole], 4)
    assert sample.prompt_tokens == llm.model.config.n_positions - 4


@pytest.mark.parametrize("mode", MODES)
def test_bits_are_those_of_the_solution_after_the_infilling_prompt(llm: LLM, mode: str) -> None:
    found = solution_bits(llm, HOLES, 6, mode=mode, batch_size=3)
    for task, bits in zip(HOLES, found, strict=True):
        prompt = infill_prompt(llm.tokenizer, task.prefix, task.suffix or "", mode=mode)
        assert bits == pytest.approx(bits_after(llm, prompt, task.solution or ""), rel=1e-5)


def test_bits_of_a_text_are_of_all_that_its_prompt_lacks(llm: LLM) -> None:
    task = Task("a", "def f():\n  ", solution="pass")
    expected = bits_after(llm, llm.tokenizer.encode("def f():"), "\n  pass")
    assert solution_bits(llm, [task], 6) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_is_shortened_so_that_the_whole_solution_is_predicted_from_it(
    llm: LLM, mode: str
) -> None:
    task, room = Task("a", "p" * 500, "s" * 600, "z" * 40), llm.model.config.n_positions - 39
    prompt = truncated_infill_prompt(llm.tokenizer, "p" * 500, "s" * 600, room, mode=mode).ids
    assert len(prompt) == room
    expected = bits_after(llm, prompt, "z" * 40)
    assert solution_bits(llm, [task], 4, mode=mode) == pytest.approx([expected], rel=1e-5)
    longer = Task("b", "p", "s", "z" * 500)  # than the context
    assert solution_bits(llm, [longer], 4, mode=mode)[0] > expected


def test_a_task_without_a_solution_has_no_bits(llm: LLM) -> None:
    with pytest.raises(InputError, match="task 'a' has no canonical_solution"):
        solution_bits(llm, [Task("a", "x")], 4)


def bits_after(llm: LLM, prompt: list[int], text: str) -> float:
    """-log2 of the probability of a text after a prompt."""
    ((*row,),) = score_ids(llm.model, [(prompt, llm.tokenizer.encode(text))])
    return -sum(logprob for logprob, _ in row) / math.log(2)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 112}, {"prompt_tokens": 3},
        {"prompt_tokens": 109}, {"mode": "pms"}, {"seed": 1.5}, {"batch_size": 0}, {"n": 2},
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_refused(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        texts(llm, HOLES, **options)


def test_a_tokenizer_without_infilling_tokens_fills_nothing() -> None:
    model = tiny_model(vocab_size=257)
    llm = LLM(model, Tokenizer(byte_tokenizer("<|endoftext|>")))
    with pytest.raises(CheckpointError, match="cannot infill"):
        texts(llm, HOLES)
