"""Complete tasks with the engine: each task's samples, in order, the same in every run.

The prompt of a hole is the text around it with the control tokens. The prompt of a text to continue
is its prefix without the white space at the end, which the model writes itself: one token may hold
a line break and the indentation after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from mqa_gpt.errors import InputError, PromptError, require_int, shown
from mqa_gpt.evaluation.tasks import Task
from mqa_gpt.fim import COUNTED, check_mode, truncated_infill_prompt
from mqa_gpt.generation.completion import Completion, Generation
from mqa_gpt.generation.prompts import request_options
from mqa_gpt.generation.request import Request
from mqa_gpt.generation.score import score_ids
from mqa_gpt.llm import BATCH_SIZE, LLM


def complete(
    llm: LLM,
    tasks: Sequence[Task],
    max_new_tokens: int,
    *,
    mode: str = "psm",
    prompt_tokens: int | None = None,
    n: int = 1,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Iterator[list[Completion]]:
    """Complete tasks: fill the hole where there is a suffix, else continue the prefix.

    A completion depends on its task, the options and the seed alone, not on the tasks beside it.

    Args:
        max_new_tokens: at most this many for each.
        mode: of infilling, "psm" or "spm".
        prompt_tokens: the most tokens that the model is shown; None for what fits into the context.
            What is farthest from the completion is left out, and counted in `Completion.cut`.
        n: samples of each task.
        seed: of sampling; each task draws from a stream of its own.
        batch_size: rows that run at a time.
        options: see `mqa_gpt.Options`.

    Returns:
        Each task's n samples, as soon as they and all before them are finished.

    Raises:
        PromptError: an unusable option.
        CheckpointError: a hole, where the tokenizer has no infilling tokens.
    """
    most = _most(llm, max_new_tokens, prompt_tokens)
    check_mode(mode)
    seed = require_int(PromptError, "seed", seed, -(2**63))
    batch_size = require_int(PromptError, "batch_size", batch_size, 1)
    options = {**options, "max_new_tokens": max_new_tokens}
    requests: list[Request] = []
    cuts: list[tuple[int, int]] = []
    for task in tasks:
        digest = hashlib.sha256(f"{seed} {task.id}".encode()).digest()
        own = {**options, "seed": int.from_bytes(digest[:8], "little")}
        ends = () if task.suffix is None else llm.tokenizer.special_ids
        asked = request_options(llm.model.config, llm.tokenizer, own, n=n, end_ids=ends)
        ids, cut = _prompt(llm, task, mode, most)
        requests.append(asked.request(ids, str(task.id)))
        cuts.append(cut)
    generation = Generation(llm.model, llm.tokenizer, requests, slots=batch_size)
    return (
        [dataclasses.replace(sample, cut=cut) for sample in samples]
        for cut, samples in zip(cuts, generation.run_in_order(), strict=True)
    )


def solution_bits(
    llm: LLM,
    tasks: Sequence[Task],
    max_new_tokens: int,
    *,
    mode: str = "psm",
    prompt_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[float]:
    """-log2 of the probability that the model gives to each task's solution.

    The prompts are those of `complete`, shortened where prompt and solution together do not fit
    into the context. What the prompt lacks of the white space at the end of a text counts as part
    of its solution. Arguments and errors are those of `complete` too.

    Raises:
        InputError: a task without a solution.
    """
    most = _most(llm, max_new_tokens, prompt_tokens)
    check_mode(mode)
    pairs = []
    for task in tasks:
        if task.solution is None:
            raise InputError(f"task {shown(task.id)} has no canonical_solution: it has no bits")
        text = task.solution
        if task.suffix is None:
            text = task.prefix[len(task.prefix.rstrip()) :] + text
        solution = llm.tokenizer.encode(text, special_tokens=False)
        # The solution's last token is predicted, not read. Of a prompt, 4 tokens remain at least.
        room = max(4, llm.model.config.n_positions + 1 - len(solution))
        ids, _ = _prompt(llm, task, mode, min(most, room))
        pairs.append((ids, solution))
    rows = score_ids(llm.model, pairs, batch_size=batch_size)
    return [-math.fsum(logprob for logprob, _ in row) / math.log(2) for row in rows]


def _most(llm: LLM, max_new_tokens: int, prompt_tokens: int | None) -> int:
    """How many tokens a prompt may have."""
    context = llm.model.config.n_positions
    most = context - require_int(PromptError, "max_new_tokens", max_new_tokens, 1, context - 4)
    if prompt_tokens is None:
        return most
    return require_int(PromptError, "prompt_tokens", prompt_tokens, 4, most)


def _prompt(llm: LLM, task: Task, mode: str, most: int) -> tuple[list[int], tuple[int, int]]:
    """What comes before a completion, and how many tokens of prefix and suffix it leaves out."""
    tokenizer = llm.tokenizer
    if task.suffix is not None:
        prompt = truncated_infill_prompt(tokenizer, task.prefix, task.suffix, most, mode=mode)
        return prompt.ids, (prompt.cut_prefix, prompt.cut_suffix)
    text = task.prefix.rstrip()
    # As in `truncated_infill_prompt`: of a longer text, most would be tokenized needlessly.
    kept = text[-max(most * tokenizer.max_token_bytes, COUNTED) :]
    ids = tokenizer.encode(kept, special_tokens=False)
    left_out = tokenizer.min_tokens(text[: len(text) - len(kept)]) + max(0, len(ids) - most)
    return ids[-most:], (left_out, 0)
