"""Whatever a tokenizer's files or a prompt hold: they work, or raise a typed error, soon.

`MQA_GPT_FUZZ` is the number of inputs per test. Input i depends on i alone, so a failure can be
repeated; after a crash of the process, the file that caused it is still in the test's folder.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mqa_gpt.errors import CheckpointError, PromptError
from mqa_gpt.tokenizer import FIM_SPELLINGS, StreamDecoder, Tokenizer
from tests.helpers import byte_tokenizer

INPUTS = int(os.environ.get("MQA_GPT_FUZZ", "200"))
SECONDS, BYTES = 10, 2_000_000_000  # what one input may take

SOUND = json.loads(byte_tokenizer("<|endoftext|>", *FIM_SPELLINGS[0], "<é>", pair="ab").to_str())
TEXTS = [
    "",
    "ab <fim_prefix><|endoftext|><é>",
    "größe = '猫🐈'  # 12345\r\n\t\x00",
    "e\u0301\u1112\u1161\u11ab",
]

# Every component of the library, most of them with settings that it does not survive.
NORMALIZERS: list[Any] = [
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": ""},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    *({"type": name} for name in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents")),
    *({"type": name} for name in ("Lowercase", "ByteLevel", "BertNormalizer")),
]
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: list[Any] = [
    {"type": "FixedLength", "length": 0},
    {"type": "Split", "pattern": {"Regex": "(a*)*$"}, "behavior": "Isolated", "invert": False},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Punctuation", "behavior": "Removed"},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "Sequence", "pretokenizers": [DIGITS, LETTERS]},
    {"type": "Sequence", "pretokenizers": [LETTERS, LETTERS]},
    *({"type": name} for name in ("WhitespaceSplit", "UnicodeScripts", "BertPreTokenizer")),
    LETTERS,
    DIGITS,
]
DECODERS: list[Any] = [
    {"type": "Strip", "content": "a", "start": 2**63, "stop": 2**63},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
    {"type": "WordPiece", "prefix": "é", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    LETTERS,
]
PROCESSORS: list[Any] = [
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]},
    {"type": "BertProcessing", "sep": ["x", 2**32], "cls": ["x", 0]},
    LETTERS,
]
JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**16,
        2**20,
        2**28,
        2**32,
        2**63,
        10**30,
        0.5,
        1e308,
        "",
        "a",
    ),
    *(
        "ab",
        "<x>",
        "é",
        "\x1b[2J",
        "\udc80",
        "Ġ" * 300,
        "a b",
        "a b c",
        "#version",
        "BPE",
        "ByteLevel",
    ),
    *([], {}, [[]], ["a", "b"], ["a", "c"], {"type": "BPE"}, {"a": 1}, [{}] * 50, [0] * 300),
    *(
        {"id": 262, "content": "<x>", "special": True},
        {"id": 5, "content": "a", "normalized": True},
    ),
]


@pytest.fixture(autouse=True)
def memory_limit() -> Iterator[None]:
    """An allocation beyond the limit ends the process or raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def inputs() -> Iterator[random.Random]:
    """The source of randomness of each input, which may take `SECONDS`."""
    try:
        for i in range(INPUTS):
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # a hang in the library
            start = time.perf_counter()
            yield random.Random(i)
            assert time.perf_counter() - start < SECONDS, f"input {i}"
    finally:
        faulthandler.cancel_dump_traceback_later()


def mutate(rng: random.Random, value: Any) -> Any:
    """The value with something in it replaced, removed, repeated or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        # Large parts, such as the vocabulary, are as likely as small ones.
        key = rng.choice(list(value))
        pool = {
            "normalizer": NORMALIZERS,
            "pre_tokenizer": PRE_TOKENIZERS,
            "decoder": DECODERS,
            "post_processor": PROCESSORS,
        }.get(key, JUNK)
        match rng.randrange(5):
            case 0:
                del value[key]
            case 1:
                value[key] = pick(rng, pool)
            case 2:
                value[rng.choice([k for k in JUNK if isinstance(k, str)])] = pick(rng, JUNK)
            case _:
                value[key] = mutate(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                del value[at]
            case 1:
                value.insert(at, pick(rng, JUNK))
            case 2:
                return [copy.deepcopy(v) for _ in range(rng.choice([2, 100])) for v in value]
            case 3:
                rng.shuffle(value)
            case _:
                value[at] = mutate(rng, value[at])
        return value
    if isinstance(value, str) and value and rng.random() < 0.5:
        return "".join(rng.choices(value + "aé猫\x00 ", k=rng.randrange(9)))
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.randrange(-3, 4)
    return pick(rng, JUNK)


def pick(rng: random.Random, pool: list[Any]) -> Any:
    return copy.deepcopy(rng.choice(pool))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                changed[at:at] = rng.choice([b"0", b'"', b"{", b"]", b",", b"\\ud800", b"\xff"])
            case 2:
                del changed[at : at + rng.randrange(9)]
            case _:
                end = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[min(at, end) : end][:500]
    return bytes(changed)


def check(folder: Path) -> bool:
    """Whether the files load; what they load must work, and an error must be fit to print."""
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except CheckpointError as error:
        message = str(error)
        assert str(folder) in message
        assert message.isprintable()
        assert len(message) < 1000
        return False
    for text in TEXTS:
        for special_tokens in (True, False):
            try:
                ids = tokenizer.encode(text, special_tokens=special_tokens)
            except (CheckpointError, PromptError) as error:
                message = str(error)
                assert message.isprintable()
                continue
            assert tokenizer.min_tokens(text) <= len(ids)
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            assert decoded == tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
            if not special_tokens:  # nothing is lost; add_prefix_space adds a space
                assert decoded.removeprefix(" ") in (text, unicodedata.normalize("NFC", text))
            decoder = StreamDecoder(tokenizer)
            streamed = "".join(map(decoder.push, ids)) + decoder.flush()
            assert streamed == tokenizer.decode(ids)
    tokenizer.decode(range(400), skip_special_tokens=False)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert Tokenizer.from_pretrained(folder).same_vocabulary(tokenizer)
    return True


def test_a_tokenizer_file_with_changed_parts(tmp_path):
    loaded = 0
    for rng in inputs():
        value: Any = copy.deepcopy(SOUND)
        for _ in range(rng.randrange(1, 4)):
            value = mutate(rng, value)
        (tmp_path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
        loaded += check(tmp_path)
    assert INPUTS / 10 < loaded < INPUTS * 9 / 10  # neither outcome is rare


def test_a_tokenizer_file_with_changed_bytes(tmp_path):
    sound = json.dumps(SOUND, ensure_ascii=False).encode()
    for rng in inputs():
        (tmp_path / "tokenizer.json").write_bytes(mutate_bytes(rng, sound))
        check(tmp_path)


def test_the_older_files_with_changed_bytes(tmp_path):
    vocab = json.dumps(SOUND["model"]["vocab"], ensure_ascii=False).encode()
    for rng in inputs():
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
        (tmp_path / "vocab.json").write_bytes(
            mutate_bytes(rng, vocab) if rng.random() < 0.5 else vocab
        )
        (tmp_path / "merges.txt").write_bytes(mutate_bytes(rng, b"#version: 0.2\na b\nab <\n"))
        check(tmp_path)


def test_a_prompt_of_anything(tmp_path):
    tokenizer = Tokenizer(byte_tokenizer("<|endoftext|>", *FIM_SPELLINGS[0], pair="ab"))
    parts = [
        *tokenizer._tokenizer.get_vocab(),
        *map(chr, range(0x250)),
        "\ud83d",
        "\udc08",
        "猫",
        "🐈",
    ]
    for rng in inputs():
        text = "".join(rng.choices(parts, k=rng.choice([1, 9, 1000]))) * rng.choice([1, 1, 1, 200])
        tokenizer.unknown_markers(text)
        try:
            ids = tokenizer.encode(text, special_tokens=rng.random() < 0.5)
        except PromptError as error:
            message = str(error)
            assert "surrogate" in message
        else:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert tokenizer.min_tokens(text) <= len(ids)
