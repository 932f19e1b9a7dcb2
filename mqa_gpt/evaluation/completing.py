"""Complete tasks with the engine: each task's samples, in order, the same in every run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mqa_gpt.errors import PromptError, require_int
from mqa_gpt.evaluation.tasks import Task
from mqa_gpt.fim import check_mode, truncated_infill_prompt
from mqa_gpt.generation.completion import Completion, Generation
from mqa_gpt.generation.prompts import request_options
from mqa_gpt.generation.request import Request
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

    A prefix is continued without the white space at its end: the model writes the line break, since
    one token may hold it together with the indentation that follows. A completion depends on its
    task, the options and the seed alone, not on the tasks beside it.

    Args:
        max_new_tokens: at most this many for each.
        mode: of infilling, "psm" or "spm".
        prompt_tokens: show the model at most so many tokens; None for what fits into the context.
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
    context = llm.model.config.n_positions
    check_mode(mode)
    seed = require_int(PromptError, "seed", seed, -(2**63))
    batch_size = require_int(PromptError, "batch_size", batch_size, 1)
    max_new_tokens = require_int(PromptError, "max_new_tokens", max_new_tokens, 1, context - 4)
    most = context - max_new_tokens  # of a prompt
    if prompt_tokens is not None:
        most = require_int(PromptError, "prompt_tokens", prompt_tokens, 4, most)
    options = {**options, "max_new_tokens": max_new_tokens}
    requests: list[Request] = []
    cuts: list[tuple[int, int]] = []
    for task in tasks:
        digest = hashlib.sha256(f"{seed} {task.id}".encode()).digest()
        own = {**options, "seed": int.from_bytes(digest[:8], "little")}
        request, cut = _request(llm, task, own, n, mode, most)
        requests.append(request)
        cuts.append(cut)
    generation = Generation(llm.model, llm.tokenizer, requests, slots=batch_size)
    return (
        [dataclasses.replace(sample, cut=cut) for sample in samples]
        for cut, samples in zip(cuts, generation.run_in_order(), strict=True)
    )


def _request(
    llm: LLM, task: Task, options: Mapping[str, Any], n: int, mode: str, most: int
) -> tuple[Request, tuple[int, int]]:
    """What is asked for a task, and the tokens that its prompt of at most `most` leaves out."""
    config, tokenizer = llm.model.config, llm.tokenizer
    if task.suffix is None:
        asked = request_options(config, tokenizer, options, n=n)
        # More characters than `most` tokens can hold would be tokenized needlessly.
        text = task.prefix.rstrip()
        kept = text[-most * tokenizer.max_token_bytes :]
        ids = tokenizer.encode(kept, special_tokens=False)
        cut = (max(0, len(ids) - most) + tokenizer.min_tokens(text[: len(text) - len(kept)]), 0)
        return asked.request(ids[-most:] or [tokenizer.end_of_text_id], str(task.id)), cut
    asked = request_options(config, tokenizer, options, n=n, end_ids=tokenizer.special_ids)
    prompt = truncated_infill_prompt(tokenizer, task.prefix, task.suffix, most, mode=mode)
    return asked.request(prompt.ids, str(task.id)), (prompt.cut_prefix, prompt.cut_suffix)
