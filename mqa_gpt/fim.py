"""Fill-in-the-middle: the prompts of a model that infills, and the transform that trains one.

A document is cut into prefix P, middle M and suffix S, and the parts are reordered so that the
middle comes last: a left-to-right model then writes it knowing both sides (Bavarian et al. 2022;
BigCode's StarCoder and SantaCoder):

    PSM    <prefix> P <suffix> S <middle>    M
    SPM    <prefix><suffix> S <middle> P     M      (variant 2, as BigCode trained it)

Each part is tokenized by itself, and always as plain text: only this module inserts control tokens.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from mqa_gpt.errors import CheckpointError, PromptError, is_int, require_text, shown
from mqa_gpt.tokenizer import FILE_NAME, REPO_NAME, FimTokens, Tokenizer

MODES = ("psm", "spm")
CONTROL_TOKENS = 3  # of every infilling prompt: prefix, suffix, middle
COUNTED = 1_000_000  # characters of a side that are always tokenized, to count what is cut off


class TruncatedPrompt(NamedTuple):
    """An infilling prompt that was made to fit: `ids`, and the tokens cut off on either side.

    A side of more than a million characters may be cut before it is tokenized: its count is then a
    lower bound.
    """

    ids: list[int]
    cut_prefix: int
    cut_suffix: int


def infill_prompt(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    mode: str = "psm",
    file_name: str | None = None,
    repo_name: str | None = None,
) -> list[int]:
    """The ids after which the model writes what stands between `prefix` and `suffix`.

    StarCoder's training documents could begin with a line that says where they come from,
    `<reponame>REPO<filename>FILE`, and were cut for infilling with it (Li et al. 2023): it is the
    first line of the prefix.

    Args:
        tokenizer: one with fill-in-the-middle tokens.
        prefix, suffix: plain text; names of control tokens in them are text like any other.
        mode: "psm" or "spm", the order of the parts.
        file_name: path of the file in its repository, such as "src/main.py".
        repo_name: such as "bigcode/starcoder".

    Raises:
        CheckpointError: the tokenizer lacks the control tokens.
        PromptError: an unknown mode, or a text that cannot be encoded.
    """
    fim = _check(tokenizer, prefix, suffix, mode)
    before = _source_line(tokenizer, file_name, repo_name)
    before += tokenizer.encode(prefix, special_tokens=False)
    return _arrange(fim, before, tokenizer.encode(suffix, special_tokens=False), mode)


def truncated_infill_prompt(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    max_tokens: int,
    *,
    mode: str = "psm",
    file_name: str | None = None,
    repo_name: str | None = None,
) -> TruncatedPrompt:
    """`infill_prompt` of at most `max_tokens`, keeping what is nearest to the hole.

    Each side may take half of the room, and what the other leaves free; the line of file and
    repository name is kept.

    Raises:
        CheckpointError, PromptError: as `infill_prompt`; or `max_tokens` leaves no room for text.
    """
    fim = _check(tokenizer, prefix, suffix, mode)
    source = _source_line(tokenizer, file_name, repo_name)
    taken = CONTROL_TOKENS + len(source)
    if not is_int(max_tokens) or max_tokens <= taken:
        raise PromptError(
            f"max_tokens is {shown(max_tokens)}: an infilling prompt needs {taken} tokens before "
            "there is room for text; ask for fewer new tokens"
        )
    room = int(max_tokens) - taken
    # More characters than `room` tokens can hold would be tokenized needlessly.
    fits = max(room * tokenizer.max_token_bytes, COUNTED)
    before = tokenizer.encode(prefix[-fits:], special_tokens=False)
    after = tokenizer.encode(suffix[:fits], special_tokens=False)
    kept_after = min(len(after), max(room // 2, room - len(before)))
    kept_before = min(len(before), room - kept_after)
    first = len(before) - kept_before
    return TruncatedPrompt(
        ids=_arrange(fim, source + before[first:], after[:kept_after], mode),
        cut_prefix=tokenizer.min_tokens(prefix[:-fits]) + first,
        cut_suffix=tokenizer.min_tokens(suffix[fits:]) + len(after) - kept_after,
    )


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
        rng: the source of all choices.
        rate: share of documents that are rearranged; the others are encoded as they are.
        spm_rate: share of the rearranged ones that become SPM; the rest become PSM.

    Raises:
        CheckpointError: the tokenizer has no fill-in-the-middle tokens.
        PromptError: a text that cannot be encoded.
    """
    require_text("text", text)
    if rng.random() >= rate:
        return tokenizer.encode(text, special_tokens=False)
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    mode = "spm" if rng.random() < spm_rate else "psm"
    prompt = infill_prompt(tokenizer, text[:start], text[end:], mode=mode)
    return prompt + tokenizer.encode(text[start:end], special_tokens=False)


def check_mode(mode: str) -> None:
    """Raise PromptError unless it is one of the two."""
    if mode not in MODES:
        raise PromptError(f"mode is {shown(mode)}: expected one of {', '.join(MODES)}")


def _check(tokenizer: Tokenizer, prefix: str, suffix: str, mode: str) -> FimTokens:
    """The control tokens, once the arguments are found to be usable."""
    check_mode(mode)
    require_text("prefix", prefix)
    require_text("suffix", suffix)
    if tokenizer.fim is None:
        raise CheckpointError(
            "this checkpoint cannot infill: its tokenizer has no fill-in-the-middle tokens such "
            "as <fim_prefix>; use one that was trained to, for example starcoderbase-1b"
        )
    return tokenizer.fim


def _source_line(tokenizer: Tokenizer, file_name: str | None, repo_name: str | None) -> list[int]:
    """Ids of the line before the code that names its repository and file; empty without names."""
    ids = []
    for control, what, name in (
        (REPO_NAME, "repository", repo_name),
        (FILE_NAME, "file", file_name),
    ):
        if name is None:
            continue
        require_text(f"the {what} name", name)
        control_id = tokenizer.control_id(control)
        if control_id is None:
            raise CheckpointError(
                f"this checkpoint was not trained with {what} names: its tokenizer has no "
                f"{control}; leave the {what} name out"
            )
        ids += [control_id, *tokenizer.encode(name, special_tokens=False)]
    return ids + tokenizer.encode("\n", special_tokens=False) if ids else ids


def _arrange(fim: FimTokens, before: list[int], after: list[int], mode: str) -> list[int]:
    if mode == "psm":
        return [fim.prefix, *before, fim.suffix, *after, fim.middle]
    return [fim.prefix, fim.suffix, *after, fim.middle, *before]
