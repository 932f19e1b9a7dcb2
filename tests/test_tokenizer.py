"""Text to ids and back: nothing lost, nothing injected, no half characters."""

from __future__ import annotations

import gzip
import json
import unicodedata

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mqa_gpt.errors import CheckpointError, InputError, PromptError
from mqa_gpt.tokenizer import BYTE_OF_LETTER, FIM_SPELLINGS, FimTokens, StreamDecoder, Tokenizer
from tests.helpers import byte_tokenizer, shared_data

STARCODER, SANTACODER = FIM_SPELLINGS

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i)\n",
    "größe = '猫'",
]


def train(first: tuple[str, ...], last: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer with special tokens before and after its vocabulary."""
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


@given(st.lists(st.integers(0, SANTACODER_LIKE.vocab_size + 3)))
def test_decoding_agrees_with_transformers_for_any_ids(ids):
    inner = train((), ("<|endoftext|>", *SANTACODER))
    inner.add_tokens(["é", "你好", "é b"])  # stored as they are, though é is also GPT-2's 0xE9
    reference = PreTrainedTokenizerFast(tokenizer_object=inner)
    expected = reference.decode(ids, clean_up_tokenization_spaces=False)
    assert Tokenizer(inner).decode(ids, skip_special_tokens=False) == expected


def test_the_letters_of_bytes_are_those_of_tokenizers():
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    seen = set()
    for code in (*range(0xD800), *range(0xE000, 0x110000, 0x1000)):
        ((letters, _),) = pre_tokenizer.pre_tokenize_str(chr(code))
        assert bytes(BYTE_OF_LETTER[letter] for letter in letters) == chr(code).encode()
        seen.update(chr(code).encode())
    assert set(range(256)) - seen == {0xC0, 0xC1, *range(0xF5, 0x100)}  # not in UTF-8
    assert sorted(BYTE_OF_LETTER) == sorted(pre_tokenizers.ByteLevel.alphabet())


@given(HOSTILE)
@pytest.mark.parametrize("tokenizer", [STARCODER_LIKE, SANTACODER_LIKE])
def test_plain_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text, special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)


@given(st.lists(HOSTILE, max_size=5))
@pytest.mark.parametrize("tokenizer", [STARCODER_LIKE, SANTACODER_LIKE])
def test_a_batch_of_plain_texts_has_the_ids_of_each(tokenizer, texts):
    each = [tokenizer.encode(text, special_tokens=False) for text in texts]
    assert tokenizer.encode_batch(texts) == each


def test_a_batch_with_a_text_that_cannot_be_encoded_is_refused():
    with pytest.raises(PromptError, match="lone surrogate"):
        STARCODER_LIKE.encode_batch(["a", "\ud800"])


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


@pytest.mark.parametrize("name", ["<|endoftext|>", "<filename>", "<reponame>", "<gh_stars>"])
def test_control_tokens_of_documents_are_known_even_if_they_are_not_marked_special(name):
    inner = train(())
    inner.add_tokens([AddedToken(name, special=False)])
    assert Tokenizer(inner).special_ids == {inner.token_to_id(name)}


def test_markers_of_other_models_are_found_in_a_text():
    text = (
        "<|im_start|>a <|system|> <fim_prefix><fim-prefix> <|im_start|> <|endoftext|> <filename> <|"
    )
    assert STARCODER_LIKE.unknown_markers(text) == ["<|im_start|>", "<|system|>", "<fim-prefix>"]
    assert SANTACODER_LIKE.unknown_markers("<fim_middle> <fim-middle>") == ["<fim_middle>"]
    assert STARCODER_LIKE.unknown_markers("def f(x): return x <| y") == []


def test_two_tokenizers_have_the_same_vocabulary_if_every_id_means_the_same():
    assert STARCODER_LIKE.same_vocabulary(Tokenizer(train(("<|endoftext|>", *STARCODER))))
    middle_first = Tokenizer(train(("<|endoftext|>", *reversed(STARCODER))))
    assert not STARCODER_LIKE.same_vocabulary(middle_first)
    assert not STARCODER_LIKE.same_vocabulary(SANTACODER_LIKE)
    inner = train(())
    plain = Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))
    inner.add_special_tokens(["a"])  # the same entries, one of them a control token
    assert not plain.same_vocabulary(Tokenizer(inner))


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
    with pytest.raises(CheckpointError, match="'<fim>' out of plain text"):
        Tokenizer(inner).encode_batch(["<fim>"])


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
        sent += STARCODER_LIKE.decode_bytes([id_])
        assert shown == sent.decode(errors="ignore")
    assert decoder.flush() == ""


@given(st.lists(st.integers(0, STARCODER_LIKE.vocab_size)))
def test_streaming_holds_back_one_unfinished_character_at_most(ids):
    decoder, shown = StreamDecoder(STARCODER_LIKE), ""
    for n, id_ in enumerate(ids, start=1):
        shown += decoder.push(id_)
        assert STARCODER_LIKE.decode(ids[:n]) in (shown, shown + "\N{REPLACEMENT CHARACTER}")


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


def composing() -> Tokenizer:
    inner = train(("<|endoftext|>", *STARCODER))
    inner.normalizer = normalizers.NFC()
    return Tokenizer(inner)


@given(ANY_TEXT | st.text("\u1112\u1161\u11abe\u0301 ").map(lambda text: 9 * text))
@example("\u1112\u1161\u11ab" * 100)
@pytest.mark.parametrize("tokenizer", [STARCODER_LIKE, SANTACODER_LIKE, composing()])
def test_no_text_has_fewer_tokens_than_its_lower_bound(tokenizer, text):
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, special_tokens=False))


def test_the_lower_bound_holds_where_nine_bytes_become_one_token_of_three():
    first, second, third = "íķľ"  # the bytes of the syllable, in GPT-2's letters
    inner = byte_tokenizer()
    entries = inner.get_vocab() | {first + second: 256, first + second + third: 257}
    inner.model = models.BPE(entries, [(first, second), (first + second, third)])
    inner.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode("\u1112\u1161\u11ab") == [257]
    assert tokenizer.min_tokens("\u1112\u1161\u11ab") == 1


@pytest.mark.slow
def test_composing_shortens_no_character_by_more_than_the_lower_bound_allows():
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x110000)]):
        composed = unicodedata.normalize("NFC", character)
        longest = max(character, unicodedata.normalize("NFD", character), key=utf8_length)
        assert utf8_length(longest) <= 3 * utf8_length(composed)


def utf8_length(text: str) -> int:
    return len(text.encode())


def test_the_longest_entry_gives_the_lower_bound():
    tokenizer = Tokenizer(byte_tokenizer("<|endoftext|>", "<ß>", pair="ab"))
    assert tokenizer.max_token_bytes == len("<|endoftext|>")
    assert [tokenizer.min_tokens(n * "x") for n in (0, 1, 13, 14, 10_000_000)] == [
        0,
        1,
        1,
        2,
        769_231,
    ]
    assert Tokenizer(byte_tokenizer("<ßßß>")).max_token_bytes == 8
    assert Tokenizer(byte_tokenizer(pair="ab")).max_token_bytes == 2


def test_a_character_whose_bytes_have_no_entry_is_an_error_and_not_left_out():
    inner = byte_tokenizer()
    entries = {entry: id_ for entry, id_ in inner.get_vocab().items() if entry != "\xf1"}
    inner.model = models.BPE(entries, [])
    tokenizer = Tokenizer(inner)
    assert tokenizer.decode(tokenizer.encode("a\U0003ffff\U00080000")) == "a\U0003ffff\U00080000"
    for special_tokens in (True, False):
        with pytest.raises(PromptError, match=r"text holds U\+40000, which"):
            tokenizer.encode("a\U00040000", special_tokens=special_tokens)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_a_text_that_is_not_a_str_is_an_error_that_names_the_type(text):
    for act in (STARCODER_LIKE.encode, STARCODER_LIKE.min_tokens):
        with pytest.raises(PromptError, match=f"text is of type {type(text).__name__}"):
            act(text)


def test_a_lone_surrogate_is_an_error_that_says_where():
    for act in (STARCODER_LIKE.encode, STARCODER_LIKE.min_tokens):
        with pytest.raises(PromptError, match=r"U\+DC80\) at character 2"):
            act("ab\udc80")


@pytest.mark.parametrize("value", ["tokenizer.json", None, STARCODER_LIKE])
def test_what_is_no_tokenizer_is_refused(value):
    with pytest.raises(InputError, match=r"must be a tokenizers\.Tokenizer"):
        Tokenizer(value)


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], [None], "12", 5, None])
def test_ids_that_cannot_be_token_ids_are_errors(ids):
    with pytest.raises(PromptError, match="ids"):
        STARCODER_LIKE.decode(ids)


def test_ids_beyond_the_vocabulary_have_no_text():
    a = STARCODER_LIKE.token_id("a")
    assert STARCODER_LIKE.decode([STARCODER_LIKE.vocab_size, a, 2**40]) == "a"


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
