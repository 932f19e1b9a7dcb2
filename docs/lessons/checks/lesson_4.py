"""Checks of lesson 4, fill in the middle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from checks import checker
from mqa_gpt import LLM
from mqa_gpt.fim import infill_prompt
from mqa_gpt.generation.score import score_ids
from mqa_gpt.training.packing import CONTEXT, LEFT_TO_RIGHT, MIDDLE
from mqa_gpt.training.packing import middle_left as library_middle_left


@cache
def _demo() -> LLM:
    return LLM.load(dtype="float32", backend="sdpa")


def _reusable(f: Callable[..., int]) -> str | None:
    cases = [([5, 6, 7, 8], [5, 6, 9, 8], 2), ([1, 2], [1, 2, 3], 2), ([4, 5], [5, 4], 0)]
    cases += [([1, 2, 3], [1, 2], 2), ([], [1], 0), ([3, 1, 4, 1], [3, 1, 4, 1], 4)]
    for old, new, right in cases:
        got = f(old, new)
        if got == right:
            continue
        if got == sum(a == b for a, b in zip(old, new, strict=False)):
            return (
                f"for {old} and {new} it gives {got}, but {right} is right: after the first token "
                "that differs nothing can be kept, since later keys and values depend on it"
            )
        return (
            f"for {old} and {new} it gives {got}, but {right} is right: count equal tokens from "
            "the beginning, up to the end of the shorter prompt"
        )
    return None


def _middle_loss(f: Callable[..., float]) -> str | None:
    llm = _demo()
    encode, end = llm.tokenizer.encode, llm.tokenizer.end_of_text_id
    prompt = infill_prompt(llm.tokenizer, "for i in", ":\n    print(i)\n")
    for middle in (encode(" range(10)"), encode(" names"), []):
        answer = [*middle, end]
        ((*scored,),) = score_ids(llm.model, [(prompt, answer)])
        losses = torch.tensor([-logprob for logprob, _ in scored])
        got, right = float(f(llm.model, prompt, middle, end)), losses.mean().item()
        if abs(got - right) < 1e-3 * max(right, 1):
            continue
        hint = "the logits at index i are those of token i + 1"
        if middle and abs(got - losses[:-1].mean().item()) < 1e-3:
            hint = "the end belongs to the middle: it is what the model has to learn"
        elif abs(got - losses.sum().item()) < 1e-3 * losses.sum().item():
            hint = "divide the sum by the number of tokens"
        elif abs(got + right) < 1e-3 * max(right, 1):
            hint = "a loss is the negative log-probability"
        elif abs(got - _whole_loss(llm, [*prompt, *answer])) < 1e-3:
            hint = "leave out the loss of the prompt"
        return f"for a middle of {len(middle)} tokens it gives {got:.3f}, not {right:.3f}: {hint}"
    return None


def _whole_loss(llm: LLM, ids: list[int]) -> float:
    (scored,) = score_ids(llm.model, [(ids[:1], ids[1:])])
    return -sum(logprob for logprob, _ in scored) / len(scored)


def _middle_left(f: Callable[..., torch.Tensor]) -> str | None:
    C, M, N = CONTEXT, MIDDLE, LEFT_TO_RIGHT
    cases = [[[C, C, M, M, M, M]], [[C, M, M, C, M, M, M, N]], [[M, M], [N, N]], [[M, C], [C, M]]]
    for case in cases:
        kinds = torch.tensor(case, dtype=torch.uint8)
        got, right = f(kinds), library_middle_left(kinds)
        if got is None or got.shape != right.shape:
            return (
                f"for kinds of shape {list(kinds.shape)} it should give a tensor of the same shape"
            )
        if torch.allclose(got.float(), right, atol=1e-6):
            continue
        hint = "each run of MIDDLE is a middle of its own, and every other label is 0"
        if torch.allclose(got.float(), 1 - right, atol=1e-6):
            hint = "this is the share that is written, not the share that is left"
        elif not got[kinds == M].eq(1).any():
            hint = "the first label of a middle has 1: all of it is left"
        elif got[kinds == M].eq(0).any():
            hint = "the last label of a middle of n has 1/n: it is still to be predicted"
        elif got[kinds == M].eq(1).all():
            hint = "it falls in equal steps, from 1 to 1/n"
        shown = [[round(x, 3) for x in row] for row in got.tolist()]
        return f"for kinds {case} it gives {shown}: {hint}"
    return None


check = checker(
    reusable=(
        _reusable,
        "In SPM the suffix stays in the cache while you type at the end of the prefix; in PSM it "
        "has to be read again.",
    ),
    middle_loss=(
        _middle_loss,
        "Training runs log this mean over all middles as the loss of infilling.",
    ),
    middle_left=(
        _middle_left,
        "A model that predicts this knows at every token how far away the end is.",
    ),
)
