"""Text to ids and back: nothing lost, nothing injected, no half characters."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mqa_gpt.errors import CheckpointError, PromptError
from mqa_gpt.tokenizer import FIM_SPELLINGS, FimTokens, StreamDecoder, Tokenizer
from tests.helpers import shared_data

STARCODER, SANTACODER = FIM_SPELLINGS

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i)\n",
    "größe = '猫'",
]


def train(first: tuple[str, ...], last: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer with special tokens before and behind its vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 10, trainer)
    tokenizer.add_special_tokens(list(last))
    return tokenizer


STARCODER_LIKE = Tokenizer(train(("<|endoftext|>", *STARCODER)))
SANTACODER_LIKE = Tokenizer(train((), ("<|endoftext|>", *SANTACODER)))

# Text that is likely to hold control tokens, parts of them, and characters of several bytes.
HOSTILE = st.lists(
    st.sampled_from(["<|endoftext|>", *STARCODER, *SANTACODER, "<", "fim_", "middle>", "猫", "🐈"])
    | st.text(max_size=5)
).map("".join)
ANY_TEXT = st.text() | HOSTILE


@given(ANY_TEXT)
@example("\N{REPLACEMENT CHARACTER}")
@example("\r\n\t \x00  e\N{COMBINING ACUTE ACCENT}")
@pytest.mark.parametrize("tokenizer", [STARCODER_LIKE, SANTACODER_LIKE])
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(HOSTILE)
@pytest.mark.parametrize("tokenizer", [STARCODER_LIKE, SANTACODER_LIKE])
def test_plain_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text, special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("tokenizer", [STARCODER_LIKE, SANTACODER_LIKE])
def test_every_control_token_is_read_in_a_prompt_and_left_out_of_text(tokenizer):
    assert len(tokenizer.special_ids) == 5
    for id_ in tokenizer.special_ids:
        name = tokenizer.id_to_token(id_)
        ids = tokenizer.encode(f"a{name}b")
        assert ids == [tokenizer.token_id("a"), id_, tokenizer.token_id("b")]
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{name}b"


def test_control_tokens_are_found_by_name_in_both_spellings():
    assert STARCODER_LIKE.fim == FimTokens(prefix=1, suffix=2, middle=3, pad=4)
    assert STARCODER_LIKE.end_of_text_id == 0
    size = SANTACODER_LIKE.vocab_size
    assert SANTACODER_LIKE.fim == FimTokens(size - 4, size - 3, size - 2, size - 1)
    assert SANTACODER_LIKE.end_of_text_id == size - 5


def test_a_tokenizer_without_control_tokens_says_so():
    tokenizer = Tokenizer(train(()))
    assert tokenizer.fim is None
    assert tokenizer.end_of_text_id is None
    assert tokenizer.special_ids == frozenset()
    assert tokenizer.token_id("<fim_prefix>") is None


def test_the_padding_token_may_be_missing():
    prefix, suffix, middle, _ = STARCODER
    tokenizer = Tokenizer(train((middle, suffix, prefix)))
    assert tokenizer.fim == FimTokens(prefix=2, suffix=1, middle=0, pad=None)


def test_added_tokens_that_are_not_marked_special_are_not_injected_either():
    inner = train(("<|endoftext|>",))
    inner.add_tokens([AddedToken(name, special=False) for name in (*STARCODER, "<|user|>")])
    tokenizer = Tokenizer(inner)
    text = "".join(STARCODER) + "<|user|>"
    added = {tokenizer.token_id(name) for name in (*STARCODER, "<|user|>")}
    assert added.issuperset(tokenizer.encode(text))
    ids = tokenizer.encode(text, special_tokens=False)
    assert added.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.fim is not None
    assert tokenizer.special_ids.issuperset(tokenizer.fim)


def test_merges_that_spell_a_control_token_are_refused():
    merges = [("<", "f"), ("<f", "i"), ("<fi", "m"), ("<fim", ">")]
    entries = ["<fim_prefix>", *"<fim>_", *("".join(pair) for pair in merges)]
    inner = tokenizers.Tokenizer(models.BPE({e: i for i, e in enumerate(entries)}, merges))
    inner.add_special_tokens(["<fim>"])
    with pytest.raises(CheckpointError, match="'<fim>' out of plain text"):
        Tokenizer(inner).encode("<fim>", special_tokens=False)


def test_truncation_and_padding_stored_with_a_tokenizer_are_switched_off():
    inner = train(())
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    assert Tokenizer(inner).decode(Tokenizer(inner).encode(TEXTS[0])) == TEXTS[0]


@given(st.lists(st.integers(0, SANTACODER_LIKE.vocab_size + 3)))
def test_streamed_pieces_add_up_to_the_decoded_text_for_any_tokens(ids):
    decoder = StreamDecoder(SANTACODER_LIKE)
    pieces = [decoder.push(id_) for id_ in ids] + [decoder.flush()]
    assert "".join(pieces) == SANTACODER_LIKE.decode(ids)


@given(st.text(st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", codec="utf-8")))
@example("a🐈‍⬛b")
def test_streaming_never_shows_half_a_character_and_holds_back_none(text):
    decoder = StreamDecoder(STARCODER_LIKE)
    shown, sent = "", b""
    for id_ in STARCODER_LIKE.encode(text, special_tokens=False):
        shown += decoder.push(id_)
        sent += single_bytes(STARCODER_LIKE, id_)
        assert shown == sent.decode(errors="ignore")
    assert decoder.flush() == ""


def single_bytes(tokenizer: Tokenizer, id_: int) -> bytes:
    """The bytes of a token, by GPT-2's table of one letter per byte, computed independently."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(table[letter] for letter in tokenizer.id_to_token(id_))


def test_a_control_token_between_the_bytes_of_a_character_does_not_break_it():
    first, *rest = STARCODER_LIKE.encode("🐈")
    decoder = StreamDecoder(STARCODER_LIKE)
    pieces = [decoder.push(id_) for id_ in (first, 0, *rest)]
    assert "".join(pieces) == "🐈"


def test_bytes_that_will_never_be_a_character_are_not_held_back():
    first, *_ = STARCODER_LIKE.encode("🐈")
    decoder = StreamDecoder(STARCODER_LIKE)
    assert [decoder.push(first) for _ in range(4)] == ["", *3 * ["\N{REPLACEMENT CHARACTER}"]]


def test_what_is_left_of_a_cut_character_is_flushed_once():
    first, *_ = STARCODER_LIKE.encode("🐈")
    decoder = StreamDecoder(STARCODER_LIKE)
    assert decoder.push(first) == ""
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""
    assert decoder.push(STARCODER_LIKE.token_id("a")) == "a"


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_a_text_that_is_not_a_str_is_an_error_that_names_the_type(text):
    with pytest.raises(PromptError, match=f"text is {type(text).__name__}"):
        STARCODER_LIKE.encode(text)


def test_a_lone_surrogate_is_an_error_that_says_where():
    with pytest.raises(PromptError, match=r"U\+DC80\) at character 2"):
        STARCODER_LIKE.encode("ab\udc80")


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], [None]])
def test_ids_that_cannot_be_token_ids_are_errors(ids):
    with pytest.raises(PromptError, match="ids"):
        STARCODER_LIKE.decode(ids)


def test_ids_beyond_the_vocabulary_have_no_text():
    a = STARCODER_LIKE.token_id("a")
    assert STARCODER_LIKE.decode([STARCODER_LIKE.vocab_size, a, 2**40]) == "a"


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    train(("<|endoftext|>", *STARCODER)).save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.fim == STARCODER_LIKE.fim
    assert loaded.encode(TEXTS[0]) == STARCODER_LIKE.encode(TEXTS[0])


def test_a_folder_without_a_tokenizer_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name} holds no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def with_model(**changes: object) -> Callable[[str], str]:
    def damage(text: str) -> str:
        parts = json.loads(text)
        return json.dumps(parts | {"model": parts["model"] | changes})

    return damage


# The last two make tokenizers 0.23 abort the process, if they get there.
DAMAGES = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "a git-lfs pointer": lambda text: "version https://git-lfs.github.com/spec/v1\n",
    "a zip archive": lambda text: b"PK\x03\x04\xff\xfe",
    "nested too deep": lambda text: "[" * 100_000,
    "null": lambda text: "null",
    "no model": lambda text: json.dumps(json.loads(text) | {"model": []}),
    "merges of nothing": with_model(merges=[["nothing", "nowhere"]]),
    "prefix": with_model(continuing_subword_prefix="x"),
    "long prefix": with_model(continuing_subword_prefix="##é"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_tokenizer_file_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    train(()).save(str(path))
    damaged = damage(path.read_text("utf-8"))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def humaneval_texts() -> list[str]:
    with gzip.open(shared_data("humaneval/HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    return [task["prompt"] + task["canonical_solution"] for task in tasks]


def test_starcoders_tokenizer_agrees_with_transformers_on_humaneval():
    folder = shared_data("starcoder-tokenizer")
    tokenizer = Tokenizer.from_pretrained(folder)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in [*humaneval_texts(), "<fim_prefix>a<fim_suffix>c<fim_middle>", "1234 猫\n\n\t x"]:
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids
        expected = reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == expected
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == expected


def test_starcoders_control_tokens_have_their_published_ids():
    tokenizer = Tokenizer.from_pretrained(shared_data("starcoder-tokenizer"))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_ids == frozenset(range(19))
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.fim == FimTokens(prefix=1, suffix=3, middle=2, pad=4)
    assert tokenizer.token_id("<reponame>") == 18
