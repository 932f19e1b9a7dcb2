"""Generation in ten lines, and `generate`, which does the same with all options.

A language model gives the logits of the next token after every position. So generation is a loop:
read the prompts once (prefill, limited by arithmetic), choose a token from the logits, feed it,
choose again (decode, limited by reading the weights once per step). The KV cache keeps the keys and
values of all earlier positions, so that a step computes one position per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, is_int, require_int, shown
from mqa_gpt.fast.compiled import step_forward
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.prefill import prefill
from mqa_gpt.generation.request import make_requests
from mqa_gpt.generation.speculative import Drafter
from mqa_gpt.model import GPT
from mqa_gpt.sampling import SamplingParams


@torch.inference_mode()
def greedy_steps(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The plain loop: each step's tokens (B,) int64 and the logits (B, V) they were chosen by."""
    longest = max(map(len, prompts))
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    forward = step_forward(model)  # compiled, or the model itself
    logits = prefill(model, cache, prompts)  # (B, V)
    for step in range(max_new_tokens):
        ids = logits.argmax(-1)  # (B,)
        yield ids, logits
        if step < max_new_tokens - 1:
            logits = forward(ids[:, None], cache)[:, 0]  # (B, V)


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int | None = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    min_new_tokens: int = 0,
    draft: Drafter | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; greedy unless a temperature is given.

    Args:
        model: in eval mode, or dropout stays active.
        prompts: token ids, rows of any lengths; an empty row starts from `bos_token_id`.
        max_new_tokens: at most this many per row; None for as many as fit into the context.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingParams`.
        n: samples per prompt, all from one prefill of it.
        eos_token_id: the token or tokens that end a row; None never stops early.
        min_new_tokens: `eos_token_id` is not chosen before a row has this many new tokens.
        draft: proposes tokens for speculative decoding; the output stays the same
            (`PromptLookup`, `DraftModel`).
        prefill_chunk: positions per row and forward pass while the prompts are read; None for what
            is fast on the model's device. A small number helps where the activations of a large
            batch of long prompts do not fit into memory.

    Returns:
        The new tokens of each row, the end token included where there is one; prompt i's sample j
        is row i * n + j.

    Raises:
        PromptError: a token outside the vocabulary, a prompt that leaves no room for
            `max_new_tokens` in the context, or an unusable option.
        FloatingPointError: a row's largest logit is NaN or infinite.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if not isinstance(getattr(model, "config", None), GPTConfig):
        raise PromptError(f"the model is {shown(model)}: expected a GPT")
    if prefill_chunk is not None:
        prefill_chunk = require_int(PromptError, "prefill_chunk", prefill_chunk, 1)
    requests = make_requests(
        model.config,
        prompts,
        max_new_tokens,
        sampling,
        n=n,
        end_ids=_end_ids(eos_token_id, model.config),
        min_new_tokens=min_new_tokens,
        drafter=draft,
    )
    rows: list[list[int]] = [[] for _ in range(sum(request.n for request in requests))]
    engine = Engine.for_requests(model, requests, prefill_chunk=prefill_chunk)
    for request in requests:
        engine.add(request)
    while engine.is_busy:
        for token in engine.step():
            rows[token.row].append(token.id)
    return rows


def _end_ids(eos_token_id: Any, config: GPTConfig) -> list[int]:
    """The end tokens; PromptError for anything else than ids."""
    ids = () if eos_token_id is None else (eos_token_id,) if is_int(eos_token_id) else eos_token_id
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence) or not all(map(is_int, ids)):
        raise PromptError(
            f"eos_token_id is {shown(eos_token_id)}: it must be a token id, a list of them or None"
        )
    return [require_int(PromptError, "an end token", i, 0, config.vocab_size - 1) for i in ids]
