"""The tokenizer files of a checkpoint to a tokenizer that is built from checked parts.

A `tokenizer.json` can ask for anything the `tokenizers` library has, and much of that panics, hangs
or loses text when its settings are wrong. This family needs little of it: byte-level BPE, with
digits split or not, and NFC at most. So the library never sees the file. It is read as JSON, every
part is checked, and a tokenizer is made of them through the library's constructors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mqa_gpt.checkpoints.files import is_there, read_json
from mqa_gpt.errors import CheckpointError, shown
from mqa_gpt.tokenizer import BYTE_OF_LETTER, TOKENIZER_FILE

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"

# StarCoder's file has 1.5 MB and 49,152 entries.
MAX_FILE_BYTES = 16_000_000
MAX_ENTRIES = 2**20  # merges too; ids are below it
MAX_ADDED = 10_000

# Bytes that UTF-8 never holds, or only in characters that are not assigned: StarCoder has no entry
# for most of them.
UNUSED = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}

BYTE_LEVEL = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}  # the defaults


class _UnusableError(Exception):
    """Why a file is not a tokenizer of this family."""


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the checkpoint in `folder`.

    It is read from `tokenizer.json`, or else from GPT-2's older `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: the files are missing, damaged, or describe a tokenizer of another family;
            names the file.
    """
    file = folder / TOKENIZER_FILE
    try:
        if is_there(file):
            return _build(_read(file))
        file = folder / VOCAB_FILE
        if is_there(file) and is_there(folder / MERGES_FILE):
            return _build(_describe(_read(file), _read_lines(folder / MERGES_FILE)))
    except _UnusableError as reason:
        raise CheckpointError(
            f"{file} is not a tokenizer that can be used: {reason}; use the file of the original "
            "checkpoint"
        ) from None
    raise CheckpointError(
        f"{folder} holds no {TOKENIZER_FILE}: copy it there from the checkpoint this model came "
        "from, or convert its tokenizer with transformers"
    )


def _read(file: Path) -> Any:
    _check_size(file)
    return read_json(file, CheckpointError, MAX_FILE_BYTES)


def _read_lines(file: Path) -> list[str]:
    _check_size(file)
    try:
        return file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({shown(str(error))}): get it again"
        ) from None


def _check_size(file: Path) -> None:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{file} has {size:,} bytes: a tokenizer's file has {MAX_FILE_BYTES:,} at most; get it "
            "again"
        )


def _describe(vocab: Any, lines: list[str]) -> dict[str, Any]:
    """What the `tokenizer.json` of a vocabulary and its merges would hold.

    Entries that are neither a byte nor made by a merge can only be control tokens. Whether digits
    were split before merging, as in StarCoder and not in GPT-2, shows in the merges: if they were,
    none makes an entry with a digit.
    """
    if not isinstance(vocab, dict):
        raise _UnusableError("it does not map entries to ids")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = {merge.replace(" ", "", 1) for merge in merges}
    control = [entry for entry in vocab if entry not in made and entry not in BYTE_OF_LETTER]
    pre_tokenizer: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
    if not any(re.search("[0-9]", entry) for entry in made):
        digits = {"type": "Digits", "individual_digits": True}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [digits, pre_tokenizer]}
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "added_tokens": [
            {"id": vocab[entry], "content": entry, "special": True} for entry in control
        ],
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel"},
    }


def _build(parts: Any) -> tokenizers.Tokenizer:
    """The tokenizer that a parsed `tokenizer.json` describes."""
    if not isinstance(parts, dict):
        raise _UnusableError(f"it holds a {type(parts).__name__}, not an object with a model")
    model, vocab = _model(parts.get("model"))
    tokenizer = tokenizers.Tokenizer(model)
    match parts.get("normalizer"):
        case None:
            pass
        case {"type": "NFC"}:
            tokenizer.normalizer = normalizers.NFC()
        case other:
            raise _refusal("normalizer", other, "NFC or none")
    match parts.get("pre_tokenizer"):
        case {"type": "ByteLevel"} as letters:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**_flags(letters, BYTE_LEVEL))
        case {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits"} as digits, {"type": "ByteLevel"} as letters],
        }:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(**_flags(digits, {"individual_digits": False})),
                    pre_tokenizers.ByteLevel(**_flags(letters, BYTE_LEVEL)),
                ]
            )
        case other:
            raise _refusal("pre_tokenizer", other, "ByteLevel, or Digits before ByteLevel")
    match parts.get("decoder"):
        case {"type": "ByteLevel"} as letters:
            tokenizer.decoder = decoders.ByteLevel(**_flags(letters, BYTE_LEVEL))
        case other:
            raise _refusal("decoder", other, "ByteLevel")
    match parts.get("post_processor"):
        case None:
            pass
        case {"type": "TemplateProcessing"} as template if not template.get("special_tokens"):
            pass  # as transformers 5 saves it; changes nothing
        case {"type": "ByteLevel"} as letters:
            tokenizer.post_processor = processors.ByteLevel(**_flags(letters, BYTE_LEVEL))
        case other:
            raise _refusal("post_processor", other, "one that adds no tokens, or none")
    _add_tokens(tokenizer, parts.get("added_tokens") or [], vocab)
    return tokenizer


def _model(part: Any) -> tuple[models.BPE, dict[str, int]]:
    """The model, and the ids of its vocabulary."""
    match part:
        case {"vocab": dict(vocab), "merges": list(merges)} if part.get("type", "BPE") == "BPE":
            pass
        case _:
            raise _refusal("model", part, "BPE with a vocab and merges")
    # An unknown token stands for what has no entry, and every byte will have one.
    used = {"type", "vocab", "merges", "unk_token", "fuse_unk"}
    for key, value in part.items():
        if key not in used and value:
            raise _UnusableError(f"its model has {shown(key)} {shown(value)}, which must be off")
    ids: Any = vocab.values()
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= MAX_ENTRIES:
        raise _UnusableError(f"its ids are not all integers from 0 to {MAX_ENTRIES - 1:,}")
    if len(set(ids)) < len(vocab):
        raise _UnusableError("it gives two entries the same id")
    missing = [b for letter, b in BYTE_OF_LETTER.items() if letter not in vocab and b not in UNUSED]
    if missing:
        raise _UnusableError(f"it has no entry for {len(missing)} bytes such as 0x{missing[0]:02X}")
    unknown = part.get("unk_token")
    if unknown and (not isinstance(unknown, str) or unknown not in vocab):
        raise _UnusableError(f"its unk_token {shown(unknown)} is not in its vocabulary")
    if len(merges) > MAX_ENTRIES:
        raise _UnusableError(f"it has more than {MAX_ENTRIES:,} merges")
    try:
        pairs: Any = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
        return models.BPE(vocab, pairs), vocab
    except Exception as error:  # the library raises nothing narrower
        raise _UnusableError(
            f"its merges are not pairs of entries that make an entry ({shown(str(error))})"
        ) from None


def _add_tokens(tokenizer: tokenizers.Tokenizer, tokens: Any, vocab: dict[str, int]) -> None:
    """Add the tokens that are found whole in a text, before it is split."""
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED:
        raise _UnusableError(f"its added_tokens are not a list of at most {MAX_ADDED:,}")
    ids = {}
    for token in tokens:
        match token:
            case {"id": int(id_), "content": str(content)} if _is_name(content):
                ids[content] = id_
            case _:
                raise _refusal("added token", token, "an id and 1 to 256 printable characters")
        flags = _flags(token, {"single_word": False, "lstrip": False, "rstrip": False})
        if any(flags.values()):
            raise _UnusableError(
                f"its token {shown(content)} strips or joins its surroundings: {shown(flags)}"
            )
    tokenizer.add_tokens(
        [
            AddedToken(t["content"], **_flags(t, {"normalized": False, "special": False}))
            for t in tokens
        ]
    )
    taken = set(vocab.values())
    for content, id_ in ids.items():
        actual = tokenizer.token_to_id(content)
        if id_ != actual:
            raise _UnusableError(
                f"its token {shown(content)} has the id {shown(id_)}, where {actual} is next"
            )
        if content not in vocab and id_ in taken:
            raise _UnusableError(f"its token {shown(content)} has the id {id_} of another entry")


def _is_name(content: str) -> bool:
    return 1 <= len(content) <= 256 and content.isprintable()


def _flags(part: Any, defaults: dict[str, bool]) -> dict[str, bool]:
    """The settings of a part that are named in `defaults`."""
    flags = {name: part.get(name, default) for name, default in defaults.items()}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise _UnusableError(f"{name} is {shown(value)}, not true or false")
    return flags


def _refusal(name: str, part: Any, accepted: str) -> _UnusableError:
    """That a part is not among those this family uses."""
    kind = part.get("type", part) if isinstance(part, dict) else part
    return _UnusableError(f"its {name} is {shown(kind)}: expected {accepted}")
