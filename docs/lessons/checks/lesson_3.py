"""Checks of lesson 3's exercises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from checks import checker
from mqa_gpt.attention import (
    attention_probabilities,
    attention_scores,
    causal_mask,
    reference_attention,
    weighted_values,
)


def _softmax(f: Callable[..., Tensor]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, N in ((3, 8, 4), (2, 10, 4), (1, 3, 8), (4, 33, 16)):
        # All below 0, so that a column after the end that counts as 0 is the maximum.
        x = -1 - 5 * torch.rand(rows, columns, generator=generator)  # (rows, columns)
        got = f(x, N)
        at = f"for x {rows} x {columns} and N = {N}"
        if not isinstance(got, Tensor) or got.shape != x.shape:
            return f"{at}, expected a tensor of x's shape"
        if got.isnan().any():
            return f"{at}, there is NaN: was every column stored, and is -inf - -inf in it?"
        sums = got.sum(1)  # (rows,)
        if not torch.allclose(sums, torch.ones(rows)):
            worst = sums[(sums - 1).abs().argmax()]
            hint = "multiply the old sum by alpha whenever the maximum grows"
            if columns % N:
                hint = "load the columns after the end as -inf, so that they do not count"
            return f"{at}, the probabilities of a row have the sum {worst:.4f}, not 1; {hint}"
        if not torch.allclose(got, x.softmax(1), atol=1e-6):
            return f"{at}, rows have the sum 1, but they are not the probabilities of x"
    large = torch.tensor([[200.0, 199.0, -300.0, 0.0, 201.0]])  # (1, 5)
    if not torch.allclose(f(large, 2), large.softmax(1), atol=1e-6):
        return "it fails for scores of 200, where exp overflows: subtract the maximum first"
    return None


def _keys_read(f: Callable[..., int]) -> str | None:
    for M, H, T, start in (
        (16, 4, 6, 10),
        (8, 4, 8, 0),
        (16, 3, 11, 5),
        (16, 32, 4, 7),
        (16, 8, 1, 99),
    ):
        seen = causal_mask(start, T, start + T, torch.device("cpu"))[0]  # (T, S)
        seen = seen.repeat_interleave(H, 0)  # (T * H, S)
        for tile in range(-(-T * H // M)):
            rows = seen[tile * M : (tile + 1) * M]  # (M, S), or fewer in the last tile
            expected, got = int(rows.any(0).sum()), f(tile, M, H, T, start)
            if got == expected:
                continue
            hint = ""
            if got == expected - 1:
                hint = "; keys count from 0, so a query at position p sees p + 1 of them"
            elif got == start + (tile + 1) * M:
                hint = "; H rows are one position"
            elif got == expected + 1 and tile < len(seen) // M:
                hint = "; row (tile + 1) * M is the first of the next tile"
            elif got > start + T:
                hint = "; the last tile may have rows after the last token"
            elif got == expected - start:
                hint = "; the cached keys are read too"
            call = f"keys_read(tile={tile}, M={M}, H={H}, T={T}, start={start})"
            return f"{call} gives {got}, expected {expected}{hint}"
    return None


def _combine(f: Callable[..., Tensor]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for H, D, sizes, offset in ((1, 4, (3, 3), 0), (4, 8, (9, 2, 5), 0), (2, 4, (6, 1), 200)):
        s = 2 * torch.randn(H, sum(sizes), generator=generator) + offset  # (H, S)
        v = torch.randn(sum(sizes), D, generator=generator)  # (S, D)
        parts = list(zip(s.split(sizes, 1), v.split(sizes), strict=True))
        outs = torch.stack([scores.softmax(1) @ values for scores, values in parts])  # (P, H, D)
        lses = torch.stack([scores.logsumexp(1) for scores, _ in parts])  # (P, H)
        got, expected = f(outs, lses), s.softmax(1) @ v  # (H, D)
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            return (
                f"for outs {tuple(outs.shape)} it gives {shape}, expected {tuple(expected.shape)}"
            )
        if torch.allclose(got, expected, atol=1e-5):
            continue
        if not got.isfinite().all():
            return (
                f"for scores around {offset} it is not finite: subtract the largest lse before exp"
            )
        if torch.allclose(got, outs.mean(0), atol=1e-5):
            return "this is the plain mean: a part weighs as much as its sum of exp(s), exp(lse)"
        if torch.allclose(got, (lses.exp()[:, :, None] * outs).sum(0)):
            return "divide by the sum of all weights"
        if torch.allclose(got, (lses.softmax(1)[:, :, None] * outs).sum(0)):
            return "the weights of a head's parts have the sum 1: dimension 0 of lses, not 1"
        if torch.allclose(got, (lses[:, :, None] * outs).sum(0) / lses.sum(0)[:, None]):
            return "lse is a logarithm: a part weighs exp(lse)"
        return f"for {len(sizes)} parts it differs by {(got - expected).abs().max():.2g}"
    outs, lses = torch.ones(2, 1, 4), torch.tensor([[1.0], [-torch.inf]])  # (P, H, D), (P, H)
    outs[1] = 0
    if not torch.allclose(f(outs, lses), outs[0]):
        return "a part without keys (lse = -inf) must have the weight 0"
    return None


def _windowed(q: Tensor, k: Tensor, v: Tensor, start: int, window: int) -> Tensor:
    """Attention (1, T, H, D) of q (1, T, H, D) to the last `window` of k and v (1, S, 1, D)."""
    T, S, scale = q.shape[1], k.shape[1], q.shape[3] ** -0.5
    scores = attention_scores(q, k, start, scale)  # (1, H, T, S)
    too_old = causal_mask(start - window, T, S, q.device)[:, None]  # (1, 1, T, S)
    scores = scores.masked_fill(too_old, -torch.inf)
    return weighted_values(attention_probabilities(scores), v)


def _window_attention(f: Callable[..., Tensor]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for T, H, start, window in ((6, 4, 20, 7), (1, 8, 70, 5), (9, 3, 0, 4), (20, 4, 40, 33)):
        q = torch.randn(1, T, H, 16, generator=generator)  # (1, T, H, D)
        k, v = torch.randn(2, 1, start + T, 1, 16, generator=generator)  # (1, S, 1, D) each
        got, expected = f(q, k, v, start, window), _windowed(q, k, v, start, window)
        at = f"for T = {T}, H = {H}, start = {start} and window = {window}"
        if not isinstance(got, Tensor) or got.shape != q.shape:
            return f"{at}, expected a tensor of q's shape"
        if got.isnan().any():
            return (
                f"{at}, there is NaN: while a row has seen no key, m and m_new are -inf, and "
                "-inf - -inf is NaN; subtract 0 there"
            )
        if not torch.allclose(got, expected, atol=1e-5):
            hint = ""
            if torch.allclose(got, reference_attention(q, k, v, start, 0.25), atol=1e-5):
                hint = "; it sees all positions before its own"
            for wrong in (window - 1, window + 1):
                if torch.allclose(got, _windowed(q, k, v, start, wrong), atol=1e-5):
                    hint = f"; it sees {wrong} positions: the query's own is one of the {window}"
            return f"{at} it differs by {(got - expected).abs().max():.2g}{hint}"
    q = torch.randn(1, 2, 4, 16, generator=generator)
    k, v = torch.randn(2, 1, 102, 1, 16, generator=generator)
    k[:, :64] = v[:, :64] = torch.nan
    if f(q, k, v, 100, 9).isnan().any():
        return (
            "right, but it reads old keys that no row sees: begin at the first block of the window"
        )
    return None


check = checker(
    softmax=(
        _softmax,
        "Attention needs no second pass: it sums exp(s - m) v, and divides at the end.",
    ),
    keys_read=(
        _keys_read,
        "The H rows of a position end at the same key, so a folded tile masks little.",
    ),
    combine=(_combine, "Any number of programs can share the keys of one query."),
    window_attention=(_window_attention, "You have changed an attention kernel."),
)
