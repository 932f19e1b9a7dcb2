"""Score given text: the log-probability of each of its tokens, in batches of windows.

A text that is longer than the model's context is read in windows that overlap: each token is scored
once, in the first window that reaches it, with the tokens before it in that window as its context.
Windows are read in chunks through a KV cache, so that the logits of all positions, the largest
tensor by far, never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.errors import PromptError, require_int, shown
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer

# Numbers in the logits of one chunk: 128 MB in float32.
CHUNK_LOGITS = 1 << 25
MIN_CHUNK = 32  # positions; attention is slow with fewer

Pair = tuple[Sequence[int], Sequence[int]]  # context and what follows it, as ids


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        token_ids: the text's tokens.
        logprobs: natural log of each token's probability; None for a first token that nothing
            precedes, not even end-of-text.
        is_greedy: whether each token is the likeliest one.
        bytes: the text's length in UTF-8.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    is_greedy: list[bool]
    bytes: int

    @property
    def logprob(self) -> float:
        """Natural log of the text's probability."""
        return math.fsum(x for x in self.logprobs if x is not None)

    @property
    def loss(self) -> float:
        """Nats per token, the negative mean of `logprobs`."""
        return -self.logprob / max(1, sum(x is not None for x in self.logprobs))

    @property
    def perplexity(self) -> float:
        """exp(loss), per token: not comparable between tokenizers."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text, comparable between tokenizers."""
        return -self.logprob / math.log(2) / self.bytes


class Window(NamedTuple):
    """Tokens `begin` to before `end` of a text, read to score those from `first` on."""

    begin: int
    first: int
    end: int


def windows(first: int, length: int, window: int, stride: int) -> list[Window]:
    """The windows that score tokens `first` to `length - 1` of a text, each once.

    Args:
        first: at least 1, as a token is predicted from those before it.
        window: how many tokens the model reads at most; the window's last is only predicted.
        stride: how many tokens each window scores but the first, which scores all it predicts; so
            at least window - stride tokens precede each. The last window begins earlier, so that
            it is full.
    """
    found = []
    while first < length:
        kept = max(window - stride, 1)
        begin = max(0, min(first - kept, length - 1 - window))
        end = min(length, begin + window + 1)
        found.append(Window(begin, first, end))
        first = end
    return found


def score_ids(
    model: GPT,
    pairs: Sequence[Pair],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    advance: Callable[[int, int], None] | None = None,
) -> list[list[tuple[float, bool]]]:
    """For each pair, each following token's log-probability and whether it is the likeliest.

    Args:
        pairs: token ids of a context, at least one, and of what follows it.
        window, stride: see `windows`; None for the model's context, and half of the window.
        batch_size: windows that are read at a time.
        advance: called with how many windows are done, and of how many.

    Raises:
        PromptError: an option or a token that cannot be used, or an empty context.
    """
    context = model.config.n_positions
    window = require_int(PromptError, "window", context if window is None else window, 1, context)
    half = max(window // 2, 1)
    stride = require_int(PromptError, "stride", half if stride is None else stride, 1, window)
    batch_size = require_int(PromptError, "batch_size", batch_size, 1)
    texts = [[*before, *after] for before, after in pairs]
    for (before, _), text in zip(pairs, texts, strict=True):
        if not before:
            raise PromptError("a context is empty: a token is predicted from those before it")
        if wrong := [x for x in text if not 0 <= x < model.config.vocab_size]:
            raise PromptError(
                f"a text holds token {shown(wrong[0])}: the model has {model.config.vocab_size:,}"
            )
    tasks = [
        (i, part)
        for i, (before, _) in enumerate(pairs)
        for part in windows(len(before), len(texts[i]), window, stride)
    ]
    tasks.sort(key=lambda task: task[1].begin - task[1].end)  # the longest first: little padding
    results: list[list[tuple[float, bool]]] = [[(0.0, False)] * len(after) for _, after in pairs]
    for done in range(0, len(tasks), batch_size):
        batch = tasks[done : done + batch_size]
        rows = [texts[i][part.begin : part.end] for i, part in batch]
        scores = _score_rows(model, rows, [part.first - part.begin for _, part in batch])
        for (i, part), row in zip(batch, scores, strict=True):
            at = part.first - len(pairs[i][0])
            results[i][at : at + len(row)] = row
        if advance is not None:
            advance(done + len(batch), len(tasks))
    return results


@torch.inference_mode()
def _score_rows(
    model: GPT, rows: Sequence[list[int]], firsts: Sequence[int]
) -> list[list[tuple[float, bool]]]:
    """Score each row's tokens from its `first` on; the longest row comes first."""
    device, B = model.device, len(rows)
    lengths = [len(row) - 1 for row in rows]  # what is read: the last token is only predicted
    width = lengths[0]
    padded = torch.tensor([row + [0] * (width + 1 - len(row)) for row in rows], device=device)
    ids, targets = padded[:, :-1], padded[:, 1:]  # (B, width) each
    cache = KVCache(model.config, B, width, dtype=model.dtype, device=device)
    if lengths[-1] < width:
        cache.limit(lengths)
    chunk = max(CHUNK_LOGITS // (model.config.vocab_size * B), MIN_CHUNK)
    logprobs = torch.zeros((B, width), device=device)
    likeliest = torch.zeros((B, width), dtype=torch.bool, device=device)
    for begin in range(0, width, chunk):
        b = sum(length > begin for length in lengths)
        end = min(begin + chunk, width)
        piece, view = ids[:b, begin:end], cache.rows(0, [begin] * b)
        if end < min(firsts[:b]):  # nothing is predicted here: no logits
            model(piece, cache=view, logits_at=torch.zeros(0, dtype=torch.int64, device=device))
        else:
            logits = model(piece, cache=view)  # (b, T, V)
            chosen, is_likeliest = token_logprobs(logits, targets[:b, begin:end])
            logprobs[:b, begin:end], likeliest[:b, begin:end] = chosen, is_likeliest
        cache.advance(end - begin)
    pairs = zip(logprobs.tolist(), likeliest.tolist(), strict=True)
    return [
        list(zip(values[first - 1 : n], flags[first - 1 : n], strict=True))
        for (values, flags), first, n in zip(pairs, firsts, lengths, strict=True)
    ]


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax of logits (..., V) at ids (...), float32, and whether they are the argmax."""
    logits = logits.float()
    own = logits.gather(-1, ids[..., None])[..., 0]
    return own - logits.logsumexp(-1), logits.argmax(-1) == ids


def score_texts(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[str | tuple[str, str]],
    *,
    special_tokens: bool = True,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    advance: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score texts, or pairs of a context and what follows it; see `LLM.score`."""
    pairs: list[Pair] = []
    start = tokenizer.end_of_text_id
    for i, text in enumerate(texts):
        context, scored = text if isinstance(text, tuple) and len(text) == 2 else ("", text)
        if not isinstance(context, str) or not isinstance(scored, str) or not scored:
            raise PromptError(
                f"text {i} is {shown(text)}: it must be a text that is not empty, or a pair of a "
                "context and such a text"
            )
        before = tokenizer.encode(context, special_tokens=special_tokens)
        after = tokenizer.encode(scored, special_tokens=special_tokens)
        if not before and start is not None:
            before = [start]
        pairs.append((before, after))
    # Without an end-of-text token, a text's own first token is the context of the others.
    unscored = [0 if before else 1 for before, _ in pairs]
    scorable = [
        (before or after[:1], after[skip:])
        for (before, after), skip in zip(pairs, unscored, strict=True)
    ]
    found = score_ids(
        model, scorable, window=window, stride=stride, batch_size=batch_size, advance=advance
    )
    return [
        Score(
            token_ids=list(after),
            logprobs=[None] * skip + [value for value, _ in row],
            is_greedy=[False] * skip + [flag for _, flag in row],
            bytes=len((text[1] if isinstance(text, tuple) else text).encode()),
        )
        for text, (_, after), skip, row in zip(texts, pairs, unscored, found, strict=True)
    ]
