"""The loop: a prefill that reads the prompts, then one token per row and step.

The prefill runs the prompts through the model together and fills the cache; it is limited by
arithmetic. Each decode step then feeds every row's newest token and reads all weights once; it is
limited by memory bandwidth. Rows of different lengths share both without influencing each other.

`stream_plain` is the loop. Three others write the same tokens, faster: `decode_graph` replays
recorded steps on a CUDA device, `speculation` feeds guesses too, `batching` gives the places of
finished rows to other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.fast.flat import inline
from mqa_gpt.model import GPT
from mqa_gpt.sampling import (
    GREEDY,
    SamplingParams,
    choose,
    fresh_seed,
    log_probabilities,
    uniforms,
)

# Positions of all rows together in one forward pass of the prefill: enough to keep the arithmetic
# busy, few enough that the activations (F times this many numbers) stay small beside the weights.
PREFILL_POSITIONS = 8192

# On a CPU fewer: so many that an activation of the MLP, (B, T, F), takes these bytes, since its
# caches hold that, and memory for it is not asked of the system anew in every layer.
CPU_PREFILL_BYTES = 6 << 20

# But at least so many of each row, since attention is slow with fewer.
PREFILL_LEAST = 32

Report = tuple[float | None, tuple[tuple[int, float], ...]]  # logprob and top of a `Token`


class Token(NamedTuple):
    """One generated token.

    Attributes:
        row: which continuation it belongs to; prompt i's sample j is row i * n + j.
        id: the token.
        finished: "stop" or "length" if it is the row's last, else None.
        logprob: natural log of the model's probability for it, before any filter; None unless
            log-probabilities were asked for.
        top: the most likely tokens at this position as (id, logprob), likeliest first.
    """

    row: int
    id: int
    finished: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def prefill(
    model: GPT, cache: KVCache, prompts: list[list[int]], chunk: int | None = None
) -> Tensor:
    """Read the prompts into an empty cache; the logits (B, V) behind each prompt's last token.

    Rows are padded on the right to the longest; the cache, told their true lengths, hides it. They
    are fed by pieces, without the last rows that have ended: so with the longest prompts first
    little of what is computed is padding.

    Args:
        chunk: positions per row and forward pass; None for what is fast on the model's device.
    """
    if chunk is None:
        positions = PREFILL_POSITIONS
        if model.device.type == "cpu":
            positions = CPU_PREFILL_BYTES // (model.config.inner_size * model.dtype.itemsize)
        chunk = max(positions // len(prompts), PREFILL_LEAST)
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    if min(lengths) < width:
        cache.limit(lengths)
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    ids = ids.to(model.device)  # (B, width)
    last = torch.tensor(lengths, device=model.device) - 1  # (B,)
    logits: Tensor | None = None  # (B, V)
    for begin in range(0, width, chunk):
        count = max(row for row, length in enumerate(lengths) if length > begin) + 1  # b
        piece = ids[:count, begin : begin + chunk]  # (b, T)
        end = begin + piece.shape[1]
        some = cache.view([begin] * count)
        if any(begin < length <= end for length in lengths):
            at = (last[:count] - begin).clamp(0, end - begin - 1)  # (b,)
            new = model(piece, cache=some, logits_at=at)  # (b, V)
            if logits is not None:
                # Rows that end in a later piece are replaced again there.
                new = torch.where((last[:count] >= begin)[:, None], new, logits[:count])
                new = torch.cat((new, logits[count:]))
            logits = new  # of all rows the first time, since no row has ended before
        else:
            model(piece, cache=some, logits_at=last[:0])
        cache.advance(end - begin)
    cache.set_lengths(lengths)
    assert logits is not None
    return logits


def stream_plain(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Token]:
    """The loop itself: prefill, then one token per row and step. See `generation.stream_tokens`."""
    if not prompts or max_new_tokens == 0:
        return
    # A generator must not hold inference mode across its yields: the consumer would be in it too.
    with torch.inference_mode():
        rows = list(range(len(prompts) * n))  # which continuation each batch row is
        cache, logits = prefill_samples(model, prompts, max_new_tokens, n, prefill_chunk)
        seen = tokens_seen(prompts, n, logits) if sampling.repetition_penalty != 1 else None
        draws = (
            None
            if sampling.greedy
            else draw_numbers(sampling, rows, n, max_new_tokens, model.device)
        )
    forward = inline(model)

    for step in range(max_new_tokens):
        with torch.inference_mode():
            chosen = choose_finite(
                logits, sampling, seen, None if draws is None else draws[:, step]
            )
            reports = reports_of(logits, chosen, logprobs)
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)

        is_last = step == max_new_tokens - 1
        kept = []
        for i, (row, id_) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            token = Token(row, id_, None, *reports[i])
            if should_stop(token):
                token = token._replace(finished="stop")
            elif is_last:
                token = token._replace(finished="length")
            else:
                kept.append(i)
            yield token
        if not kept:
            return

        with torch.inference_mode():
            if len(kept) < len(rows):  # finished rows leave the batch
                rows = [rows[i] for i in kept]
                cache, chosen = cache.select(kept), chosen[kept]
                seen = None if seen is None else seen[kept]
                draws = None if draws is None else draws[kept]
            logits = forward(chosen[:, None], cache)[:, 0].float()  # (B, V)


def prefill_samples(
    model: GPT, prompts: list[list[int]], spare: int, n: int, chunk: int | None
) -> tuple[KVCache, Tensor]:
    """The prompts' cache, with room for `spare` tokens more, and logits, once per sample.

    The last token is returned without being fed, so it needs no slot.
    """
    slots = min(max(map(len, prompts)) + spare - 1, model.config.n_positions)
    cache = model.new_cache(len(prompts), slots)
    # In the prompts' order, so that row i of what a hook sees is prompt i's.
    logits = prefill(model, cache, prompts, chunk).float()  # (B, V)
    if n > 1:
        cache = cache.select([i // n for i in range(len(prompts) * n)])
        logits = logits.repeat_interleave(n, 0)  # (B n, V)
    return cache, logits


def draw_numbers(
    sampling: SamplingParams, rows: list[int], n: int, count: int, device: torch.device
) -> Tensor:
    """The numbers that decide each row's draws, (B n, count) float64."""
    fresh = {row // n: fresh_seed() for row in rows}  # by prompt
    seeds = [fresh[row // n] if sampling.seed is None else sampling.seed for row in rows]
    numbers = [uniforms(seed, row % n, count) for seed, row in zip(seeds, rows, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def choose_finite(
    logits: Tensor, sampling: SamplingParams, seen: Tensor | None, u: Tensor | None
) -> Tensor:
    """The next token of each row, (B,), from logits (B, V); drawn with u (B,) if not greedy."""
    chosen, is_finite = choose(logits, sampling, seen, u)  # (B,), (B,)
    require_finite(bool(is_finite.all()))
    return chosen


def require_finite(are_finite: bool, name: str | None = None) -> None:
    """Raise FloatingPointError unless they are, with a prompt's name where it is known."""
    if not are_finite:
        raise FloatingPointError(
            f"{'' if name is None else f'{name}: '}the model's logits are not finite: the weights "
            "hold NaN or infinity (see `mqa-gpt inspect --check-finite`) or overflow in the "
            "model's dtype; try float32"
        )


def tokens_seen(prompts: list[list[int]], n: int, logits: Tensor) -> Tensor:
    """(B n, V) bool: the tokens that each row's prompt holds."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(len(logits)):
        seen[row, prompts[row // n]] = True
    return seen


def reports_of(logits: Tensor, chosen: Tensor, count: int | None) -> list[Report]:
    """Per row the chosen token's log-probability and the `count` highest with their tokens."""
    if count is None:
        return [(None, ())] * len(chosen)
    return report_rows(*(x.tolist() for x in log_probabilities(logits, chosen, count)))


def report_rows(own: list[float], ids: list[list[int]], values: list[list[float]]) -> list[Report]:
    """What `log_probabilities` says, row by row."""
    return [
        (logprob, tuple(zip(row_ids, row_values, strict=True)))
        for logprob, row_ids, row_values in zip(own, ids, values, strict=True)
    ]
