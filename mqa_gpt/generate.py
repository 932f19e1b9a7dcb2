"""Generation: a prefill that reads the prompts, then one token per row and step.

The prefill runs the prompts through the model together and fills the cache; it is limited by
arithmetic. Each decode step then feeds every row's newest token and reads all weights once; it is
limited by memory bandwidth. Rows of different lengths share both without influencing each other.
`stream_plain` is this loop. On CUDA devices `stream_replayed` takes its place, for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.checks import is_int, shown
from mqa_gpt.config import GPTConfig
from mqa_gpt.decode_graph import Decoder, can_replay
from mqa_gpt.errors import PromptError
from mqa_gpt.model import GPT
from mqa_gpt.sampling import (
    GREEDY,
    Sampling,
    choose,
    fresh_seed,
    log_probabilities,
    uniforms,
)
from mqa_gpt.speculation import MOST, Draft, check_draft

# Positions per row in one forward pass of the prefill: enough to keep the arithmetic busy, few
# enough that the activations of a long prompt (F times this many numbers per row) stay small.
PREFILL_CHUNK = 2048

# Rows up to which finished ones stay in a batch that is replayed: they cost less than recording the
# step anew, since it takes the time of reading the weights either way.
FEW_ROWS = 16

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


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    draft: Draft | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> list[list[int]]:
    """Continue each prompt; greedy unless a temperature is given.

    Args:
        model: in eval mode, or dropout stays active.
        prompts: token ids, rows of any lengths; an empty row starts from `bos_token_id`.
        max_new_tokens: at most this many per row.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.
        n: samples per prompt, all from one prefill of it.
        eos_token_id: the token or tokens that end a row; None never stops early.
        draft: what guesses ahead so that the same tokens take fewer steps (`mqa_gpt.speculation`).
        prefill_chunk: positions per row and forward pass while the prompts are read; lower it where
            the activations of a large batch of long prompts do not fit into memory.

    Returns:
        The new tokens of each row, the end token included where there is one; prompt i's sample j
        is row i * n + j.

    Raises:
        PromptError: a token outside the vocabulary, a prompt that leaves no room for
            `max_new_tokens` in the context, or an unusable option.
        FloatingPointError: a row's largest logit is NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    ends = () if eos_token_id is None else eos_token_id
    ends = ends if isinstance(ends, Sequence) else (ends,)
    if not all(is_int(token) for token in ends):
        raise PromptError(
            f"eos_token_id is {shown(eos_token_id)}: it must be a token id, a list of them or None"
        )
    if not is_int(prefill_chunk) or prefill_chunk < 1:
        raise PromptError(
            f"prefill_chunk is {shown(prefill_chunk)}: it must be an integer of at least 1"
        )
    prompts = check_request(model.config, prompts, max_new_tokens, sampling, n)
    check_draft(draft, model.config)
    rows: list[list[int]] = [[] for _ in range(len(prompts) * n)]
    stream = stream_tokens if draft is None else partial(stream_drafted, draft=draft)
    for token in stream(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        n=n,
        should_stop=lambda token: token.id in ends,
        prefill_chunk=prefill_chunk,
    ):
        rows[token.row].append(token.id)
    return rows


def check_request(
    config: GPTConfig,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    n: int = 1,
    logprobs: int | None = None,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """The prompts as lists, empty ones replaced by the start token, or PromptError.

    Arguments are those of `generate` and `stream_tokens`, and what messages call each prompt if
    not "prompt 0", "prompt 1", ...; all that can be wrong with them beyond `Sampling` is found
    here, before anything is computed.
    """
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise PromptError(
            f"max_new_tokens is {max_new_tokens!r}: it must be an integer of at least 0"
        )
    if not is_int(n) or n < 1:
        raise PromptError(f"n is {n!r}: it must be an integer of at least 1")
    if n > 1 and sampling.greedy:
        raise PromptError(
            f"n is {n} but temperature is 0, which gives the same tokens {n} times: "
            "set a temperature above 0 or leave n at 1"
        )
    if logprobs is not None and not (is_int(logprobs) and 0 <= logprobs <= config.vocab_size):
        raise PromptError(
            f"logprobs is {logprobs!r}: it must be an integer from 0 to the vocabulary's "
            f"{config.vocab_size}"
        )
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts are {shown(prompts)}: they must be a list of lists of token ids "
            "(LLM.generate takes text)"
        )
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    rows: list[list[int]] = []
    problems: dict[str, PromptError] = {}
    for name, prompt in zip(names, prompts, strict=True):
        try:
            rows.append(_check_prompt(config, prompt, max_new_tokens, name))
        except PromptError as error:
            problems[name] = error
    if problems:
        first, *others = problems
        some = ", ".join(others[:10]) + ", ..." * (len(others) > 10)
        more = f" ({len(others):,} more cannot be used: {some})" if others else ""
        raise PromptError(f"{problems[first]}{more}")
    return rows


def _check_prompt(
    config: GPTConfig, prompt: Sequence[int], max_new_tokens: int, name: str
) -> list[int]:
    """One prompt as a list, the start token if it is empty, or PromptError."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise PromptError(
            f"{name} is a {type(prompt).__name__}: it must be a list of token ids "
            "(LLM.generate takes text)"
        )
    row = list(prompt)
    if not row:
        if config.bos_token_id is None:
            raise PromptError(f"{name} is empty and the config has no bos_token_id")
        row = [config.bos_token_id]
    for token in row:
        if not is_int(token) or not 0 <= token < config.vocab_size:
            raise PromptError(
                f"{name} holds {shown(token)}: token ids are integers from 0 to "
                f"{config.vocab_size - 1}"
            )
    if len(row) + max_new_tokens > config.n_positions:
        raise PromptError(
            f"{name} has {len(row)} tokens and max_new_tokens is {max_new_tokens}: "
            f"together they exceed the context of {config.n_positions} tokens; "
            "shorten the prompt or ask for fewer"
        )
    return row


@torch.inference_mode()
def prefill(
    model: GPT, cache: KVCache, prompts: list[list[int]], chunk: int = PREFILL_CHUNK
) -> Tensor:
    """Read the prompts into an empty cache; the logits (B, V) behind each prompt's last token.

    Rows are padded on the right to the longest; the cache, told their true lengths, hides it.
    """
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    if min(lengths) < width:
        cache.limit(lengths)
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    ids = ids.to(model.device)  # (B, width)
    last = torch.tensor(lengths, device=model.device) - 1  # (B,)
    logits = torch.empty(())
    for begin in range(0, width, chunk):
        piece = ids[:, begin : begin + chunk]  # (B, T)
        at = last - begin  # (B,): index of each row's last token, if it lies in this piece
        inside = (at >= 0) & (at < piece.shape[1])  # (B,)
        new = model(piece, cache=cache, logits_at=at.clamp(0, piece.shape[1] - 1))  # (B, V)
        logits = new if begin == 0 else torch.where(inside[:, None], new, logits)
    cache.set_lengths(lengths)
    return logits


def stream_tokens(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Token]:
    """The tokens behind `generate`, step by step: `stream_replayed` where it can, else
    `stream_plain`.

    Args:
        prompts: what `check_request` made of them; nothing is checked here.
        should_stop: called once with each new token; True ends its row.
        logprobs: None for no log-probabilities, else how many of the most likely tokens to report
            beside the chosen one.

    Everything else is as in `generate`.
    """
    stream = stream_replayed if can_replay(model) else stream_plain
    return stream(
        model,
        prompts,
        max_new_tokens,
        sampling,
        n=n,
        should_stop=should_stop,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
    )


def stream_plain(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Token]:
    """The loop itself: prefill, then one token per row and step. See `stream_tokens`."""
    if not prompts or max_new_tokens == 0:
        return
    # A generator must not hold inference mode across its yields: the consumer would be in it too.
    with torch.inference_mode():
        rows = list(range(len(prompts) * n))  # which continuation each batch row is
        cache, logits = _start(model, prompts, max_new_tokens, n, prefill_chunk)
        seen = _tokens_seen(prompts, n, logits) if sampling.repetition_penalty != 1 else None
        draws = None if sampling.greedy else _draws(sampling, rows, n, max_new_tokens, model.device)

    for step in range(max_new_tokens):
        with torch.inference_mode():
            chosen = _choose(logits, sampling, seen, None if draws is None else draws[:, step])
            reports = _reports(logits, chosen, logprobs)
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
            logits = model(chosen[:, None], cache=cache)[:, 0].float()  # (B, V)


def stream_replayed(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Token]:
    """What `stream_plain` does, by steps that are all alike; see `mqa_gpt.decode_graph`.

    The tokens are those of `stream_plain` too, except at near ties: fused kernels sum and round in
    another order, so where two tokens are about equally good, above all in 16 bits, the other one
    may be chosen.

    A step is started before anybody looks at the tokens of the one before, so that a GPU need not
    wait for its host. Rows that have ended are noticed one step late, and what they still generate
    is dropped; they leave the batch when that halves it.
    """
    if not prompts or max_new_tokens == 0:
        return
    with torch.inference_mode():
        rows = list(range(len(prompts) * n))
        decoder = _decoder(model, prompts, max_new_tokens, sampling, n, logprobs, prefill_chunk)
    unfinished = set(rows)

    for step in range(max_new_tokens):
        is_last = step == max_new_tokens - 1
        with torch.inference_mode():
            results = decoder.fetch()
            if not is_last:
                decoder.run()
            ids, *lists = results()
        reports: list[Report] = (
            [(None, ())] * len(ids) if logprobs is None else _report_rows(*lists)
        )
        _require_finite(
            all(id_ >= 0 for row, id_ in zip(rows, ids, strict=True) if row in unfinished)
        )
        for row, id_, report in zip(rows, ids, reports, strict=True):
            if row not in unfinished:
                continue
            token = Token(row, id_, None, *report)
            if should_stop(token):
                token = token._replace(finished="stop")
            elif is_last:
                token = token._replace(finished="length")
            if token.finished:
                unfinished.remove(row)
            yield token
        if not unfinished:
            return

        if len(rows) > FEW_ROWS and len(unfinished) <= len(rows) // 2:
            with torch.inference_mode():
                kept = [i for i, row in enumerate(rows) if row in unfinished]
                rows, decoder = [rows[i] for i in kept], decoder.select(kept)


def stream_drafted(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    draft: Draft,
    sampling: Sampling = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[Token]:
    """The tokens of `stream_tokens` in fewer steps, each of which reads a draft too.

    See `mqa_gpt.speculation`. Rows get on at different speeds; each row's tokens come in order.
    """
    if not prompts or max_new_tokens == 0:
        return
    draft.begin()
    with torch.inference_mode():
        rows = list(range(len(prompts) * n))
        cache, logits = _start(model, prompts, max_new_tokens + MOST, n, prefill_chunk)
        seen = _tokens_seen(prompts, n, logits) if sampling.repetition_penalty != 1 else None
        draws = None if sampling.greedy else _draws(sampling, rows, n, max_new_tokens, model.device)
    texts = [list(prompts[row // n]) for row in rows]  # prompts and new tokens
    counts = [0] * len(rows)  # of new tokens
    guesses: list[list[int]] = [[] for _ in rows]
    logits = logits[:, None]  # (B, T, V): behind each row's newest token and behind its guesses

    while True:
        # One position of the step after the other: a row is undecided while all its guesses so far
        # were what the model chose, since only then the logits behind them are its own.
        unfinished, undecided = set(range(len(rows))), list(range(len(rows)))
        accepted = 0
        for position in range(logits.shape[1]):
            with torch.inference_mode():
                # Finished rows are computed along, and have no draws left.
                at = [min(count, max_new_tokens - 1) for count in counts]
                u = None if draws is None else draws[range(len(rows)), at]  # (B,)
                chosen = _choose(logits[:, position], sampling, seen, u)
                reports = _reports(logits[:, position], chosen, logprobs)
                if seen is not None:
                    seen[undecided, chosen[undecided]] = True
            ids = chosen.tolist()
            agreeing = []
            for i in undecided:
                texts[i].append(ids[i])
                counts[i] += 1
                token = Token(rows[i], ids[i], None, *reports[i])
                if should_stop(token):
                    token = token._replace(finished="stop")
                elif counts[i] == max_new_tokens:
                    token = token._replace(finished="length")
                agrees = position < len(guesses[i]) and guesses[i][position] == ids[i]
                accepted += agrees
                if token.finished:
                    unfinished.remove(i)
                elif agrees:
                    agreeing.append(i)
                yield token
            undecided = agreeing
            if not undecided:
                break
        draft.record(sum(map(len, guesses)), accepted)
        if not unfinished:
            return

        with torch.inference_mode():
            # The cache keeps what was agreed on: all tokens but the newest.
            cache.set_lengths([len(text) - 1 for text in texts])
            if len(unfinished) < len(rows):
                kept = sorted(unfinished)
                cache = cache.select(kept)
                rows, texts = [rows[i] for i in kept], [texts[i] for i in kept]
                counts = [counts[i] for i in kept]
                seen = None if seen is None else seen[kept]
                draws = None if draws is None else draws[kept]
            most = min(draft.next_count(), cache.max_length - cache.end - 1)
            guesses = draft.propose(rows, texts, most) if most > 0 else [[] for _ in rows]
            width = max(map(len, guesses))
            feed = [
                text[-1:] + guess + [0] * (width - len(guess))
                for text, guess in zip(texts, guesses, strict=True)
            ]
            logits = model(torch.tensor(feed, device=model.device), cache=cache).float()


def _start(
    model: GPT, prompts: list[list[int]], spare: int, n: int, chunk: int
) -> tuple[KVCache, Tensor]:
    """The prompts' cache, with room for `spare` tokens more, and logits, once per sample.

    The last token is returned without being fed, so it needs no slot.
    """
    slots = min(max(map(len, prompts)) + spare - 1, model.config.n_positions)
    cache = KVCache.of(model, len(prompts), slots)
    logits = prefill(model, cache, prompts, chunk).float()  # (B, V)
    if n > 1:
        cache = cache.select([i // n for i in range(len(prompts) * n)])
        logits = logits.repeat_interleave(n, 0)  # (B n, V)
    return cache, logits


def _draws(sampling: Sampling, rows: list[int], n: int, count: int, device: torch.device) -> Tensor:
    """The numbers that decide each row's draws, (B n, count) float64."""
    fresh = {row // n: fresh_seed() for row in rows}  # by prompt
    seeds = [fresh[row // n] if sampling.seed is None else sampling.seed for row in rows]
    numbers = [uniforms(seed, row % n, count) for seed, row in zip(seeds, rows, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _decoder(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    n: int,
    logprobs: int | None,
    chunk: int,
) -> Decoder:
    """The decoder that goes on behind the prompts, their first tokens chosen."""
    cache, logits = _start(model, prompts, max_new_tokens, n, chunk)
    seen = _tokens_seen(prompts, n, logits) if sampling.repetition_penalty != 1 else None
    rows = list(range(len(logits)))
    draws = None if sampling.greedy else _draws(sampling, rows, n, max_new_tokens, model.device)
    decoder = Decoder.new(model, cache, sampling, seen, draws, logprobs)
    decoder.choose(logits)
    return decoder


def _choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, u: Tensor | None) -> Tensor:
    """The next token of each row, (B,), from logits (B, V); drawn with u (B,) if not greedy."""
    chosen, is_finite = choose(logits, sampling, seen, u)  # (B,), (B,)
    _require_finite(bool(is_finite.all()))
    return chosen


def _require_finite(are_finite: bool, name: str | None = None) -> None:
    """Raise FloatingPointError unless they are, with a prompt's name where it is known."""
    if not are_finite:
        raise FloatingPointError(
            f"{'' if name is None else f'{name}: '}the model's logits are not finite: the weights "
            "hold NaN or infinity (see `mqa-gpt inspect --check-finite`) or overflow in the "
            "model's dtype; try float32"
        )


def _tokens_seen(prompts: list[list[int]], n: int, logits: Tensor) -> Tensor:
    """(B n, V) bool: the tokens that each row's prompt holds."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(len(logits)):
        seen[row, prompts[row // n]] = True
    return seen


def _reports(logits: Tensor, chosen: Tensor, count: int | None) -> list[Report]:
    """Per row the chosen token's log-probability and the `count` highest with their tokens."""
    if count is None:
        return [(None, ())] * len(chosen)
    return _report_rows(*(x.tolist() for x in log_probabilities(logits, chosen, count)))


def _report_rows(own: list[float], ids: list[list[int]], values: list[list[float]]) -> list[Report]:
    """What `log_probabilities` says, row by row."""
    return [
        (logprob, tuple(zip(row_ids, row_values, strict=True)))
        for logprob, row_ids, row_values in zip(own, ids, values, strict=True)
    ]
