"""From logits to the next token: filters, draws and log-probabilities, all pure functions.

The filters are transformers' (`RepetitionPenaltyLogitsProcessor`, `TopKLogitsWarper`, ...) in
transformers' order: repetition penalty, temperature, top-k, top-p, min-p. Logits are float32
(B, V) throughout; a removed token's logit is -inf.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mqa_gpt.errors import PromptError, Range, in_ranges

# Far smaller temperatures would overflow the logits that they divide.
MIN_TEMPERATURE = 1e-6
RANGES = {
    "temperature": Range(0, 1e6, "that is 0, or from 1e-6 to 1e6"),
    "repetition_penalty": Range(1e-6, 1e6, "from 1e-6 to 1e6"),
    "top_p": Range(math.nextafter(0, 1), 1, "above 0 and at most 1", optional=True),
    "min_p": Range(0, 1, "from 0 to 1", optional=True),
    "top_k": Range(-1, optional=True),
    "seed": Range(optional=True),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Values that disable a filter in other libraries do so here: `top_k` 0 and -1, and `top_p` 1. A
    temperature of 0 leaves `top_k`, `top_p` and `min_p` without effect.

    Args:
        temperature: what the logits are divided by; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability
            (Holtzman et al. 2020).
        min_p: drop tokens less likely than this fraction of the likeliest (Nguyen et al. 2024).
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that
            prompt or output already hold (Keskar et al. 2019, section 4.1); 1 changes nothing.
        seed: makes draws repeatable. A row's draws depend on the seed and on which of its prompt's
            samples it is, never on the rest of the batch. None draws differently each time.

    Raises:
        PromptError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        found = in_ranges(PromptError, vars(self), RANGES)
        if 0 < found["temperature"] < MIN_TEMPERATURE:
            words = RANGES["temperature"].words
            raise PromptError(f"temperature is {self.temperature}: it must be a number {words}")
        for name, value in found.items():
            object.__setattr__(self, name, None if name == "top_k" and value in (0, -1) else value)

    @cached_property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


GREEDY = SamplingParams()


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that `seen` (B, V) bool marks less likely; (B, V)."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest logits of each row, and any equal to the k-th; (B, V)."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p, at least one; (B, V)."""
    ascending, order = logits.sort()  # (B, V)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p  # (B, V)
    drop[:, -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Drop tokens with less than p times the highest probability of the row; (B, V)."""
    probabilities = logits.softmax(-1)  # (B, V)
    highest = probabilities.amax(-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(probabilities < p * highest, float("-inf"))


def filter_logits(logits: Tensor, sampling: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """Apply everything `sampling` asks for, in transformers' order.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, the tokens that prompt or output hold; read by the repetition penalty.

    Returns:
        (B, V): greedy takes its argmax, sampling draws from its softmax.
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def forbid(logits: Tensor, row: int, ids: Collection[int]) -> Tensor:
    """A copy of logits (B, V) in which one row cannot choose these tokens."""
    allowed = logits.clone()
    allowed[row, list(ids)] = float("-inf")
    return allowed


def choose(
    logits: Tensor, sampling: SamplingParams, seen: Tensor | None = None, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether there is one.

    Args:
        logits, seen: as in `filter_logits`.
        u: as in `draw`; None takes the most likely token.

    Returns:
        (B,) int64, and (B,) bool: false where a row has NaN or +inf among its logits, or nothing
        but -inf, so that its token means nothing. Single -inf only rule tokens out.
    """
    filtered = filter_logits(logits, sampling, seen)  # (B, V)
    highest, best = likeliest(filtered)  # (B,), (B,)
    # NaN counts as highest, so checking this one number per row covers the vocabulary.
    return best if u is None else draw(filtered, u), is_finite(highest)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row of logits (B, V), and its first token; NaN counts as highest.

    On a CPU by NumPy: PyTorch's takes ten times as long, and its threads then spin for a while on
    the cores that the next step needs.
    """
    if logits.device.type != "cpu":
        highest, ids = logits.max(-1)
        return highest, ids
    ids = torch.from_numpy(logits.detach().numpy().argmax(-1))  # (B,)
    return logits.gather(1, ids[:, None])[:, 0], ids


def is_finite(x: Tensor) -> Tensor:
    """Neither NaN nor infinite; `torch.isfinite` in two kernels instead of four."""
    return x.abs() < math.inf


def log_probabilities(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logs of the model's probabilities, of the chosen tokens and of the likeliest.

    Args:
        logits: (B, V) float32, unfiltered.
        chosen: (B,) int64.
        count: K, how many of the likeliest to report.

    Returns:
        (B,) float32; the likeliest tokens (B, K) int64, likeliest first; theirs (B, K) float32.
    """
    logprobs = logits.log_softmax(-1)  # (B, V)
    values, ids = logprobs.topk(count)  # (B, K), (B, K)
    return logprobs.gather(1, chosen[:, None])[:, 0], ids, values


def uniforms(seed: int | None, sample: int, count: int) -> list[float]:
    """The numbers in [0, 1) that decide the first `count` draws of a prompt's `sample`-th sample.

    A stream of its own per (seed, sample), the same on every device and in every batch; without a
    seed another one in every call.
    """
    stream = random.Random(None if seed is None else f"{seed}:{sample}")
    return [stream.random() for _ in range(count)]


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: (B, V) float32.
        u: (B,) float64 in [0, 1).

    Returns:
        (B,) int64: the first token whose cumulative probability exceeds u. float64, because the
        rounding of 50,000 float32 sums would show in the rare tokens.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    target = u[:, None] * cumulative[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
