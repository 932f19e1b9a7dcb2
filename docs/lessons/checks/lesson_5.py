"""Checks of lesson 5's exercises."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from checks import checker
from mqa_gpt import PromptLookup
from mqa_gpt.sampling import keep_min_p


def _min_p(f: Callable[..., Tensor]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for B, V, p in ((1, 50, 0.1), (3, 20, 0.2), (2, 100, 0.01), (2, 10, 0.0), (2, 10, 1.0)):
        logits = 3 * torch.randn(B, V, generator=generator)  # (B, V)
        got, expected = f(logits.clone(), p), keep_min_p(logits, p)
        if not isinstance(got, Tensor) or got.shape != logits.shape:
            return f"for logits {B} x {V}, expected a tensor of that shape"
        if torch.equal(got, expected):
            continue
        probabilities = logits.softmax(-1)  # (B, V)
        if torch.equal(
            got, logits.masked_fill(probabilities < p * probabilities.amax(), -torch.inf)
        ):
            return "each row has a highest probability of its own"
        if torch.equal(got, logits.masked_fill(probabilities < p, -torch.inf)):
            return "p is a share of the row's highest probability, not a probability"
        if torch.equal(got, logits.masked_fill(logits < p * logits.amax(-1, True), -torch.inf)):
            return "compare probabilities, not logits"
        if ((got >= 0) & (got <= 1)).all():
            return "these are probabilities: give logits, with -inf for what is dropped"
        kept, wanted = got.isfinite().sum(1).tolist(), expected.isfinite().sum(1).tolist()
        return f"for logits {B} x {V} and p = {p} it keeps {kept} tokens per row, expected {wanted}"
    return None


def _new_tokens(f: Callable[..., list[int]]) -> str | None:
    cases = (
        ([5, 6, 7], [5, 6, 8, 9], [5, 6, 8]),
        ([5, 6, 7], [4, 6, 7, 8], [4]),
        ([5, 6], [5, 6, 7], [5, 6, 7]),
        ([], [3], [3]),
        ([2, 2, 2, 2], [2, 3, 2, 2, 2], [2, 3]),
    )
    for draft, choices, expected in cases:
        got = f(list(draft), list(choices))
        got = list(got) if isinstance(got, tuple) else got
        if got == expected:
            continue
        hint = ""
        if got == expected[:-1]:
            hint = "; the choice after the last right guess is the model's own: it counts too"
        elif isinstance(got, list) and len(got) > len(expected):
            hint = "; after the first guess that differs, the choices follow a wrong text"
        elif got == [*expected[:-1], *draft[len(expected) - 1 : len(expected)]]:
            hint = "; where they differ, the model's choice is right, not the guess"
        return f"for the draft {draft} and the choices {choices} it gives {got}{hint}"
    return None


def _look_up(f: Callable[..., list[int]]) -> str | None:
    stream = random.Random(0)
    for trial in range(60):
        ngrams = ((3, 2), (3, 2), (2,), (4, 3, 1))[trial % 4]
        text = [stream.randrange(4) for _ in range(stream.randrange(4, 24))]
        count = 1 + trial % 5
        got = f(list(text), count, ngrams)
        (expected,) = PromptLookup(ngrams).start(1).propose([0], [text], count)
        if got == expected:
            continue
        hint = ""
        if got == [] or (len(ngrams) > 1 and got == _propose(text, count, ngrams[1:])):
            hint = "; the longest n-gram comes first, and the next one only if that is new"
        elif isinstance(got, list) and len(got) > count:
            hint = f"; count is {count}, and it gives {len(got)} tokens"
        elif any(
            text[at - n : at] == text[-n:] and text[at : at + count] == got
            for n in ngrams
            for at in range(n, len(text))
        ):
            hint = "; the last earlier occurrence counts"
        return f"look_up({text}, {count}, {ngrams}) gives {got}, expected {expected}{hint}"
    return None


def _propose(text: list[int], count: int, ngrams: tuple[int, ...]) -> list[int]:
    return PromptLookup(ngrams).start(1).propose([0], [text], count)[0]


def _best_count(f: Callable[..., int]) -> str | None:
    flat, steep = [1.0] * 9, [1.0 + k for k in range(9)]
    middle = [1 + 0.15 * k for k in range(17)]
    for a, costs in (
        (0.5, flat),
        (0.9, steep),
        (0.0, middle),
        (0.3, middle),
        (0.8, middle),
        (1.0, middle),
    ):
        tokens = [sum(a**i for i in range(k + 1)) for k in range(len(costs))]
        speeds = [t / cost for t, cost in zip(tokens, costs, strict=True)]
        got, expected = f(a, list(costs)), max(range(len(costs)), key=speeds.__getitem__)
        if got == expected:
            continue
        hint = ""
        if got == expected + 1:
            hint = "; a step with k guesses makes k + 1 tokens at most, and costs costs[k]"
        elif expected == 0:
            hint = "; no guess at all is a choice too"
        elif got == len(costs) - 1:
            hint = "; more guesses also cost more"
        shown = f"[{costs[0]:g}, {costs[1]:g}, ..., {costs[-1]:g}]"
        return f"for a = {a} and the costs {shown} it gives {got}, expected {expected}{hint}"
    return None


check = checker(
    min_p=(_min_p, "The bar moves with the likeliest token, so a certain model keeps few."),
    new_tokens=(_new_tokens, "At least one token: no step is lost, even if all guesses are wrong."),
    look_up=(_look_up, "It needs no second model, and suits text that repeats itself."),
    best_count=(
        _best_count,
        "The library finds it while it runs: longer drafts while they are right.",
    ),
)
