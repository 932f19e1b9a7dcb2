"""Fill-in-the-middle: the prompts of a model that infills, and the transform that trains one.

A document is cut into prefix P, middle M and suffix S, and the parts are put in an order in which
the middle comes last, so that a left-to-right model writes it knowing both sides
(Bavarian et al. 2022; BigCode's StarCoder and SantaCoder):

    PSM    <prefix> P <suffix> S <middle>    M
    SPM    <prefix><suffix> S <middle> P     M      (variant 2, as BigCode trained it)

Each part is tokenized by itself, and always as plain text: only this module inserts control tokens.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from mqa_gpt.errors import CheckpointError, PromptError
from mqa_gpt.tokenizer import FimTokens, Tokenizer

MODES = ("psm", "spm")
CONTROL_TOKENS = 3  # of every infilling prompt: prefix, suffix, middle


class TruncatedPrompt(NamedTuple):
    """An infilling prompt that was made to fit: `ids`, and the tokens cut off on either side."""

    ids: list[int]
    cut_prefix: int
    cut_suffix: int


def infill_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, mode: str = "psm"
) -> list[int]:
    """The ids after which the model writes what stands between `prefix` and `suffix`.

    Args:
        tokenizer: one with fill-in-the-middle tokens.
        prefix, suffix: plain text; names of control tokens in them are text like any other.
        mode: "psm" or "spm", the order of the parts.

    Raises:
        CheckpointError: the tokenizer has no fill-in-the-middle tokens.
        PromptError: an unknown mode, or a text that cannot be encoded.
    """
    fim, before, after = _encode_sides(tokenizer, prefix, suffix, mode)
    return _arrange(fim, before, after, mode)


def truncated_infill_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, max_tokens: int, *, mode: str = "psm"
) -> TruncatedPrompt:
    """`infill_prompt` of at most `max_tokens`, keeping what is nearest to the hole.

    Each side may take half of the room, and what the other leaves free.

    Raises:
        CheckpointError, PromptError: as `infill_prompt`; or `max_tokens` leaves no room for text.
    """
    room = max_tokens - CONTROL_TOKENS
    if room < 1:
        raise PromptError(
            f"max_tokens is {max_tokens}: an infilling prompt needs {CONTROL_TOKENS} control "
            "tokens and room for text; ask for fewer new tokens"
        )
    fim, before, after = _encode_sides(tokenizer, prefix, suffix, mode)
    kept_after = min(len(after), max(room // 2, room - len(before)))
    kept_before = min(len(before), room - kept_after)
    cut_prefix, cut_suffix = len(before) - kept_before, len(after) - kept_after
    ids = _arrange(fim, before[cut_prefix:], after[:kept_after], mode)
    return TruncatedPrompt(ids, cut_prefix, cut_suffix)


def fim_transform(
    text: str,
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    rate: float = 0.5,
    spm_rate: float = 0.5,
) -> list[int]:
    """The ids of a training document, rearranged for infilling with probability `rate`.

    The two cuts are character positions drawn uniformly from [0, len(text)]; any part may be
    empty. `<|endoftext|>` is not added: packing puts it between documents.

    Args:
        text: the document.
        tokenizer: one with fill-in-the-middle tokens.
        rng: where the choices come from.
        rate: share of documents that are rearranged; the others are encoded as they are.
        spm_rate: share of the rearranged ones that become SPM; the rest is PSM.

    Raises:
        CheckpointError: the tokenizer has no fill-in-the-middle tokens.
        PromptError: a text that cannot be encoded.
    """
    if rng.random() >= rate:
        return tokenizer.encode(text, special_tokens=False)
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    mode = "spm" if rng.random() < spm_rate else "psm"
    prompt = infill_prompt(tokenizer, text[:start], text[end:], mode=mode)
    return prompt + tokenizer.encode(text[start:end], special_tokens=False)


def check_mode(mode: str) -> None:
    """Raise PromptError unless it is one of the two."""
    if mode not in MODES:
        raise PromptError(f"mode is {mode!r}: accepted are {', '.join(MODES)}")


def _encode_sides(
    tokenizer: Tokenizer, prefix: str, suffix: str, mode: str
) -> tuple[FimTokens, list[int], list[int]]:
    if tokenizer.fim is None:
        raise CheckpointError(
            "this checkpoint cannot infill: its tokenizer has no fill-in-the-middle tokens such "
            "as <fim_prefix>; use one that was trained to, for example starcoderbase-1b"
        )
    check_mode(mode)
    before = tokenizer.encode(prefix, special_tokens=False)
    after = tokenizer.encode(suffix, special_tokens=False)
    return tokenizer.fim, before, after


def _arrange(fim: FimTokens, before: list[int], after: list[int], mode: str) -> list[int]:
    if mode == "psm":
        return [fim.prefix, *before, fim.suffix, *after, fim.middle]
    return [fim.prefix, fim.suffix, *after, fim.middle, *before]
