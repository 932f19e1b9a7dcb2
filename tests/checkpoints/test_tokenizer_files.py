"""Tokenizer files: those of the family load as they are, all others are refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

from mqa_gpt.checkpoints.tokenizer_files import MAX_ENTRIES, MAX_FILE_BYTES, load_tokenizer
from mqa_gpt.errors import CheckpointError
from mqa_gpt.tokenizer import FIM_SPELLINGS, Tokenizer
from tests.helpers import byte_tokenizer, shared_data

NAMES = ("<|endoftext|>", *FIM_SPELLINGS[0])
SOUND = json.loads(byte_tokenizer(*NAMES, pair="ab").to_str())
TEXT = "def f(x):\n    return 'größe 猫' + str(1234)\n"


def write(folder: Path, value: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def changed(**parts: Any) -> dict[str, Any]:
    """The sound file with some of its parts replaced."""
    return SOUND | parts


def with_model(**parts: Any) -> dict[str, Any]:
    return SOUND | {"model": SOUND["model"] | parts}


def with_token(**parts: Any) -> dict[str, Any]:
    tokens = SOUND["added_tokens"]
    return SOUND | {"added_tokens": [tokens[0] | parts, *tokens[1:]]}


def entries(*, without: str = "", **more: Any) -> dict[str, Any]:
    """The vocabulary with some entries more or fewer."""
    return {e: id_ for e, id_ in SOUND["model"]["vocab"].items() if e != without} | more


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    loaded = Tokenizer.from_pretrained(write(tmp_path, SOUND))
    assert loaded.fim == (1, 2, 3, 4)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert loaded.encode("ab") == [loaded.token_id("ab")]
    (tmp_path / "tokenizer.json").write_text(loaded.to_json(), encoding="utf-8")
    assert json.loads(Tokenizer.from_pretrained(tmp_path).to_json()) == SOUND


def test_starcoders_file_is_written_as_the_library_writes_it():
    folder = shared_data("starcoder-tokenizer")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).to_str() == library.to_str()


def test_what_transformers_saves_is_loaded_and_encodes_the_same(tmp_path):
    vocab = entries()
    saved = GPT2Tokenizer(vocab=vocab, merges=[("a", "b")], additional_special_tokens=["<|new|>"])
    saved.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    text = f"ab<|new|>{TEXT}<|endoftext|><fim_prefix>"
    assert loaded.encode(text) == reference.encode(text, add_special_tokens=False)
    assert loaded.special_ids >= set(reference.all_special_ids)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("digits", [None, True, False])
@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_every_accepted_part_encodes_as_in_the_library(
    tmp_path, normalizer, digits, add_prefix_space
):
    library = byte_tokenizer(*NAMES, pair="ab")
    library.add_tokens(["e\u0301", "\N{KELVIN SIGN}"])
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)]
    if digits is not None:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=digits))
    library.pre_tokenizer = pre_tokenizers.Sequence(parts) if digits is not None else parts[0]
    if normalizer is not None:
        library.normalizer = normalizer
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_pretrained(tmp_path)
    for text in (TEXT, " 12 345", "e\u0301 \N{KELVIN SIGN}K\N{COMBINING ACUTE ACCENT}"):
        assert loaded.encode(text) == library.encode(text).ids


def write_older_files(folder: Path, vocab: dict[str, int], merges: list[str]) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def test_starcoders_vocabulary_and_merges_alone_make_its_tokenizer(tmp_path):
    folder = shared_data("starcoder-tokenizer")
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    loaded = Tokenizer.from_pretrained(write_older_files(tmp_path, model["vocab"], model["merges"]))
    reference = Tokenizer.from_pretrained(folder)
    assert loaded.same_vocabulary(reference)
    with gzip.open(shared_data("humaneval/HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        for task in map(json.loads, file):
            text = task["prompt"] + task["canonical_solution"]
            assert loaded.encode(text) == reference.encode(text)
    text = "<fim_prefix>x  = 12345 \n<filename>"
    assert loaded.encode(text) == reference.encode(text)


def test_a_vocabulary_that_merges_digits_does_not_split_them_as_gpt2(tmp_path):
    vocab = entries(**{"Ġ1": 300, "Ġ12": 301})
    loaded = Tokenizer.from_pretrained(write_older_files(tmp_path, vocab, ["Ġ 1", "Ġ1 2"]))
    reference = GPT2Tokenizer(vocab=vocab, merges=[("Ġ", "1"), ("Ġ1", "2")])
    text = "x =  12 123<|endoftext|>"
    assert loaded.encode(text) == reference.encode(text)
    assert loaded.token_id("Ġ12") in loaded.encode(text)
    assert loaded.fim == (1, 2, 3, 4)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_of_the_older_files_alone_is_not_a_tokenizer(tmp_path, name):
    write_older_files(tmp_path, SOUND["model"]["vocab"], [])
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [([], []), ({}, []), (entries(), ["a"]), (entries(), ["a b c"]), (entries(), ["a nowhere"])],
)
def test_damaged_older_files_are_errors_that_name_them(tmp_path, vocab, merges):
    with pytest.raises(CheckpointError, match=r"vocab\.json is not a tokenizer"):
        Tokenizer.from_pretrained(write_older_files(tmp_path, vocab, merges))


def test_merges_that_are_not_utf8_are_an_error_that_names_them(tmp_path):
    write_older_files(tmp_path, entries(), [])
    (tmp_path / "merges.txt").write_bytes(b"\xff \xfe\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name} holds no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        json.dumps(SOUND).encode()[:1000],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK\x03\x04\xff\xfe",
        b"[" * 100_000,
        b'{"model": ' + b"9" * 10_000 + b"}",
        bytes(1000),
    ],
    ids=["empty", "cut off", "git-lfs pointer", "zip", "nested deeply", "long number", "NULs"],
)
def test_a_file_that_is_not_json_is_an_error_that_names_it(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_file_that_is_far_too_large_is_not_read(tmp_path, name):
    if name != "tokenizer.json":
        write_older_files(tmp_path, entries(), [])
    with (tmp_path / name).open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # NULs that take no room on the disk
    with pytest.raises(CheckpointError, match=rf"{name} has 16,000,001 bytes"):
        Tokenizer.from_pretrained(tmp_path)


LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
REFUSED = {
    "null": (None, "it holds a NoneType, not an object"),
    "a list": ([SOUND], "it holds a list, not an object"),
    "no model": (changed(model=[]), "its model is []"),
    "another model": (with_model(type="WordPiece"), "its model is 'WordPiece'"),
    "no merges": (with_model(merges={}), "its model is 'BPE': expected BPE with a vocab"),
    "dropout": (with_model(dropout=0.5), "'dropout' 0.5, which must be off"),
    "prefix": (with_model(continuing_subword_prefix="##é"), "'continuing_subword_prefix' '##é'"),
    "suffix": (with_model(end_of_word_suffix="</w>"), "'end_of_word_suffix' '</w>'"),
    "byte fallback": (with_model(byte_fallback=True), "'byte_fallback' True"),
    "ignored merges": (with_model(ignore_merges=True), "'ignore_merges' True"),
    "unknown setting": (with_model(new="\x1b[2J"), r"'new' '\x1b[2J'"),
    "missing unk_token": (with_model(unk_token="<unk>"), "its unk_token '<unk>' is not in"),
    "unk_token of a list": (with_model(unk_token=["a"]), "its unk_token ['a'] is not in"),
    "merge of nothing": (with_model(merges=[["nothing", "nowhere"]]), "its merges are not pairs"),
    "merge to nothing": (with_model(merges=["a c"]), "its merges are not pairs"),
    "merge of three": (with_model(merges=["a b c"]), "its merges are not pairs"),
    "merge of numbers": (with_model(merges=[[1, 2]]), "its merges are not pairs"),
    "merge of null": (with_model(merges=[None]), "its merges are not pairs"),
    "no vocabulary": (with_model(vocab={}), "its ids are not all integers"),
    "negative id": (with_model(vocab=entries(x=-1)), "its ids are not all integers"),
    "huge id": (with_model(vocab=entries(xx=2**28)), "integers from 0 to 1,048,575"),
    "fraction": (with_model(vocab=entries(xx=300.5)), "its ids are not all integers"),
    "true": (with_model(vocab=entries(xx=True)), "its ids are not all integers"),
    "two of an id": (with_model(vocab=entries(xx=5)), "two entries the same id"),
    "no byte": (with_model(vocab=entries(without="x")), "no entry for 1 bytes such as 0x78"),
    "surrogate": (with_model(vocab=entries(**{"\udc80": 300})), "its merges are not pairs"),
    "many merges": (with_model(merges=[0] * (MAX_ENTRIES + 1)), "more than 1,048,576 merges"),
    "added object": (changed(added_tokens={"a": 1}), "its added_tokens are not a list"),
    "many added": (changed(added_tokens=[{}] * 10_001), "not a list of at most 10,000"),
    "added null": (changed(added_tokens=[None]), "its added token is None"),
    "added nothing": (with_token(content=""), "its added token is"),
    "added text": (with_token(content="x" * 257), "1 to 256 printable characters"),
    "added number": (with_token(content=3), "its added token is"),
    "added surrogate": (with_token(content="\udc80"), "its added token is"),
    "added control": (with_token(content="\x1b[2J"), r"\x1b[2J"),
    "wrong id": (with_token(id=3), "'<|endoftext|>' has the id 3, where 0 is next"),
    "new wrong id": (with_token(id=3, content="<x>"), "'<x>' has the id 3, where 262 is next"),
    "taken id": (
        with_token(id=263, content="<x>") | {"model": with_model(vocab=entries(xx=263))["model"]},
        "'<x>' has the id 263 of another entry",
    ),
    "strip": (with_token(lstrip=True), "'<|endoftext|>' strips or joins its surroundings"),
    "single word": (
        with_token(single_word=True),
        "'<|endoftext|>' strips or joins its surroundings",
    ),
    "special": (with_token(special="yes"), "special is 'yes', not true or false"),
    "normalizer": (
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "its normalizer is 'Precompiled': expected NFC or none",
    ),
    "normalizers": (
        changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        "its normalizer is 'Sequence'",
    ),
    "no pre_tokenizer": (changed(pre_tokenizer=None), "its pre_tokenizer is None"),
    "FixedLength": (
        changed(pre_tokenizer={"type": "FixedLength", "length": 0}),
        "its pre_tokenizer is 'FixedLength': expected ByteLevel, or Digits before ByteLevel",
    ),
    "pre_tokenizers": (
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [LETTERS, DIGITS]}),
        "its pre_tokenizer is 'Sequence'",
    ),
    "flag": (
        changed(pre_tokenizer=LETTERS | {"use_regex": 1}),
        "use_regex is 1, not true or false",
    ),
    "no decoder": (changed(decoder=None), "its decoder is None: expected ByteLevel"),
    "decoder": (
        changed(decoder={"type": "Strip", "content": "x", "start": 2**60, "stop": 1}),
        "its decoder is 'Strip'",
    ),
    "post_processor": (
        changed(post_processor={"type": "BertProcessing", "sep": ["a", 0], "cls": ["a", 0]}),
        "its post_processor is 'BertProcessing'",
    ),
    "template": (
        changed(post_processor={"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}),
        "its post_processor is 'TemplateProcessing': expected one that adds no tokens",
    ),
}


@pytest.mark.parametrize(("value", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_this_family_does_not_use_is_refused_by_name(tmp_path, value, reason):
    with pytest.raises(CheckpointError) as raised:
        Tokenizer.from_pretrained(write(tmp_path, value))
    message = str(raised.value)
    assert f"{tmp_path / 'tokenizer.json'} is not a tokenizer that can be used: " in message
    assert reason in message
    assert message.isprintable()
    assert len(message) < 600


def test_a_null_that_means_the_default_is_accepted(tmp_path):
    older = {"dropout": None, "unk_token": "", "continuing_subword_prefix": "", "fuse_unk": True}
    del (model := with_model(**older)["model"])["type"]
    loaded = Tokenizer.from_pretrained(write(tmp_path, changed(model=model, added_tokens=None)))
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert loaded.special_ids == frozenset()


def test_the_library_would_not_survive_what_is_refused():
    """Why files are checked before: a panic passes `except Exception`."""
    broken = {"type": "FixedLength", "length": 0}
    library = tokenizers.Tokenizer.from_str(json.dumps(changed(pre_tokenizer=broken)))
    assert isinstance(library.model, models.BPE)
    with pytest.raises(BaseException, match="chunk size must be non-zero") as raised:
        library.encode("text")
    assert not isinstance(raised.value, Exception)
