"""Infilling prompts token by token, and the training transform's properties."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt.errors import CheckpointError, PromptError
from mqa_gpt.fim import MODES, fim_transform, infill_prompt, truncated_infill_prompt
from mqa_gpt.tokenizer import FIM_SPELLINGS, Tokenizer
from tests.helpers import byte_tokenizer

# "ab" is one token, so a cut inside it shows.
NAMES = ("<|endoftext|>", *FIM_SPELLINGS[0], "<filename>", "<reponame>")
STARCODER = Tokenizer(byte_tokenizer(*NAMES, pair="ab"))
SANTACODER = Tokenizer(byte_tokenizer("<|endoftext|>", *FIM_SPELLINGS[1], pair="ab"))
BOTH = pytest.mark.parametrize("tokenizer", [STARCODER, SANTACODER], ids=["star", "santa"])

HOSTILE = st.lists(
    st.sampled_from(["<|endoftext|>", *FIM_SPELLINGS[0], *FIM_SPELLINGS[1], "ab", "猫"])
    | st.text(max_size=4)
).map("".join)


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which | separates the tokens and ⟨p⟩ ⟨s⟩ ⟨m⟩ ⟨r⟩ ⟨f⟩ are control tokens."""
    control = dict(zip(("⟨p⟩", "⟨s⟩", "⟨m⟩"), tokenizer.fim[:3], strict=True))
    control["⟨r⟩"], control["⟨f⟩"] = map(tokenizer.token_id, ("<reponame>", "<filename>"))
    return [
        id_
        for part in text.split("|")
        for id_ in ([control[part]] if part in control else tokenizer.encode(part))
    ]


@BOTH
def test_psm_is_prefix_then_suffix_then_middle(tokenizer):
    ids = infill_prompt(tokenizer, "left", "right")
    assert ids == spell(tokenizer, "⟨p⟩|left|⟨s⟩|right|⟨m⟩")
    assert ids == infill_prompt(tokenizer, "left", "right", mode="psm")


@BOTH
def test_spm_is_the_variant_that_bigcode_trained(tokenizer):
    ids = infill_prompt(tokenizer, "left", "right", mode="spm")
    assert ids == spell(tokenizer, "⟨p⟩|⟨s⟩|right|⟨m⟩|left")


@BOTH
def test_an_infilling_prompt_reads_as_published_text(tokenizer):
    prefix, suffix, middle, _ = map(tokenizer.id_to_token, tokenizer.fim)
    psm = infill_prompt(tokenizer, "def f", "pass\n")
    assert psm == tokenizer.encode(f"{prefix}def f{suffix}pass\n{middle}")


@given(HOSTILE, HOSTILE, st.sampled_from(MODES))
@BOTH
def test_user_text_never_adds_a_control_token_to_an_infill(tokenizer, prefix, suffix, mode):
    ids = infill_prompt(tokenizer, prefix, suffix, mode=mode)
    control = [id_ for id_ in ids if id_ in tokenizer.special_ids]
    prefix_id, suffix_id, middle_id, _ = tokenizer.fim
    assert control == [prefix_id, suffix_id, middle_id]
    order = prefix + suffix if mode == "psm" else suffix + prefix
    assert tokenizer.decode(ids) == order


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"file_name": "a/<b>.py"}, "⟨f⟩|a/<b>.py\n"),
        ({"repo_name": "me/it"}, "⟨r⟩|me/it|\n"),
        ({"file_name": "c.py", "repo_name": "me/it"}, "⟨r⟩|me/it|⟨f⟩|c.py\n"),
    ],
)
def test_the_names_of_file_and_repository_are_the_first_line_of_the_prefix(names, line):
    ids = infill_prompt(STARCODER, "left", "right", **names)
    assert ids == spell(STARCODER, f"⟨p⟩|{line}|left|⟨s⟩|right|⟨m⟩")
    ids = infill_prompt(STARCODER, "left", "right", mode="spm", **names)
    assert ids == spell(STARCODER, f"⟨p⟩|⟨s⟩|right|⟨m⟩|{line}|left")


def test_truncation_keeps_the_names_of_file_and_repository():
    names = {"file_name": "c.py", "repo_name": "me/it"}
    line = spell(STARCODER, "⟨r⟩|me/it|⟨f⟩|c.py\n")
    room = 3 + len(line)
    cut = truncated_infill_prompt(STARCODER, "0123456789", "ABCDEF", room + 6, **names)
    assert cut.ids == spell(STARCODER, "⟨p⟩|⟨r⟩|me/it|⟨f⟩|c.py\n|789|⟨s⟩|ABC|⟨m⟩")
    assert (cut.cut_prefix, cut.cut_suffix) == (7, 3)
    with pytest.raises(
        PromptError, match=f"max_tokens is {room}: an infilling prompt needs {room}"
    ):
        truncated_infill_prompt(STARCODER, "a", "b", room, **names)


@pytest.mark.parametrize(
    ("name", "control"), [("file_name", "<filename>"), ("repo_name", "<reponame>")]
)
def test_names_that_the_tokenizer_has_no_control_token_for_are_refused(name, control):
    with pytest.raises(CheckpointError, match=f"{control}; leave the .* name out"):
        infill_prompt(SANTACODER, "a", "b", **{name: "x"})


@pytest.mark.parametrize("value", [3, b"x", "\udc80"])
@pytest.mark.parametrize("name", ["file", "repo"])
def test_a_name_that_is_no_text_is_refused(name, value):
    with pytest.raises(PromptError, match=f"the {name}.* name"):
        infill_prompt(STARCODER, "a", "b", **{f"{name}_name": value})


def test_a_tokenizer_without_infilling_tokens_cannot_infill():
    tokenizer = Tokenizer(byte_tokenizer("<|endoftext|>", "<fim_prefix>", "<fim_suffix>"))
    for act in (
        lambda: infill_prompt(tokenizer, "a", "b"),
        lambda: truncated_infill_prompt(tokenizer, "a", "b", 10),
        lambda: fim_transform("ab", tokenizer, random.Random(0), rate=1),
    ):
        with pytest.raises(CheckpointError, match="cannot infill"):
            act()


def test_an_unknown_mode_is_an_error_that_lists_the_modes():
    with pytest.raises(PromptError, match="'mps': expected one of psm, spm"):
        infill_prompt(STARCODER, "a", "b", mode="mps")


@pytest.mark.parametrize("text", ["\udc80", b"b", None])
def test_text_that_cannot_be_encoded_is_refused_on_either_side(text):
    for infill in (infill_prompt, partial(truncated_infill_prompt, max_tokens=9)):
        with pytest.raises(PromptError, match="prefix"):
            infill(STARCODER, text, "b")
        with pytest.raises(PromptError, match="suffix"):
            infill(STARCODER, "a", text)
    with pytest.raises(PromptError, match="text"):
        fim_transform(text, STARCODER, random.Random(0), rate=1)


def test_truncation_keeps_what_is_nearest_to_the_hole():
    cut = truncated_infill_prompt(STARCODER, "0123456789", "ABCDEFGHIJ", 3 + 6)
    assert cut.ids == spell(STARCODER, "⟨p⟩|789|⟨s⟩|ABC|⟨m⟩")
    assert (cut.cut_prefix, cut.cut_suffix) == (7, 7)


def test_a_short_side_leaves_its_room_to_the_other():
    cut = truncated_infill_prompt(STARCODER, "01", "ABCDEFGHIJ", 3 + 6, mode="spm")
    assert cut.ids == spell(STARCODER, "⟨p⟩|⟨s⟩|ABCD|⟨m⟩|01")
    assert (cut.cut_prefix, cut.cut_suffix) == (0, 6)
    cut = truncated_infill_prompt(STARCODER, "0123456789", "", 3 + 6)
    assert cut.ids == spell(STARCODER, "⟨p⟩|456789|⟨s⟩|⟨m⟩")
    assert (cut.cut_prefix, cut.cut_suffix) == (4, 0)


@given(HOSTILE, HOSTILE, st.integers(4, 80), st.sampled_from(MODES))
def test_truncation_uses_all_the_room_and_no_more(prefix, suffix, max_tokens, mode):
    whole = infill_prompt(STARCODER, prefix, suffix, mode=mode)
    cut = truncated_infill_prompt(STARCODER, prefix, suffix, max_tokens, mode=mode)
    assert len(cut.ids) == min(len(whole), max_tokens)
    assert len(cut.ids) + cut.cut_prefix + cut.cut_suffix == len(whole)
    if len(whole) <= max_tokens:
        assert cut.ids == whole


@pytest.mark.parametrize("max_tokens", [3, -1, None, 9.0, True])
def test_no_room_for_text_is_an_error(max_tokens):
    with pytest.raises(PromptError, match=f"max_tokens is {max_tokens}"):
        truncated_infill_prompt(STARCODER, "a", "b", max_tokens)


def test_a_side_far_too_long_is_cut_before_it_is_tokenized(monkeypatch):
    tokenizer = Tokenizer(byte_tokenizer(*NAMES))
    lengths = []
    encode = tokenizer.encode

    def recorded(text, **options):
        lengths.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", recorded)
    monkeypatch.setattr("mqa_gpt.fim.COUNTED", 50)
    monkeypatch.setattr(tokenizer, "max_token_bytes", 10)
    prefix, suffix = "p" * 1000 + "P", "S" + "s" * 2000
    cut = truncated_infill_prompt(tokenizer, prefix, suffix, 3 + 10)
    assert lengths == [100, 100]
    assert tokenizer.decode(cut.ids) == "ppppPSssss"
    assert (cut.cut_prefix, cut.cut_suffix) == (91 + 95, 191 + 95)  # at least
    with pytest.raises(PromptError, match="prefix"):
        truncated_infill_prompt(tokenizer, "\udc80" + prefix, suffix, 3 + 10)


def parts_of(ids: list[int], tokenizer: Tokenizer) -> tuple[str, str, str, str]:
    """mode, P, M, S of a transformed document; in SPM nothing separates P from M."""
    decode = tokenizer.decode
    prefix, suffix, middle, _ = tokenizer.fim
    assert ids[0] == prefix
    s, m = ids.index(suffix), ids.index(middle)
    assert s < m
    if s == 1:  # or PSM with an empty prefix, which looks the same
        return "spm", "", decode(ids[m + 1 :]), decode(ids[2:m])
    return "psm", decode(ids[1:s]), decode(ids[m + 1 :]), decode(ids[s + 1 : m])


@given(HOSTILE, st.integers(0, 2**32), st.sampled_from([0.0, 1.0]))
@BOTH
def test_a_transformed_document_reassembles_to_the_original(tokenizer, text, seed, spm_rate):
    ids = fim_transform(text, tokenizer, random.Random(seed), rate=1, spm_rate=spm_rate)
    _, prefix, middle, suffix = parts_of(ids, tokenizer)
    assert prefix + middle + suffix == text
    assert sum(id_ in tokenizer.special_ids for id_ in ids) == 3


@given(HOSTILE)
def test_at_rate_zero_a_document_is_encoded_as_plain_text(text):
    ids = fim_transform(text, STARCODER, random.Random(0), rate=0)
    assert ids == STARCODER.encode(text, special_tokens=False)


def test_half_of_the_documents_are_rearranged_and_half_of_those_are_spm():
    rng = random.Random(0)
    text = "x" * 1000  # so long that an empty part is rare
    results = [fim_transform(text, STARCODER, rng) for _ in range(1000)]
    rearranged = [ids for ids in results if ids[0] == STARCODER.fim.prefix]
    assert len(rearranged) / len(results) == pytest.approx(0.5, abs=0.08)  # 5 standard deviations
    spm = sum(parts_of(ids, STARCODER)[0] == "spm" for ids in rearranged)
    assert spm / len(rearranged) == pytest.approx(0.5, abs=0.11)


def test_both_cuts_are_uniform_over_all_positions_ends_included():
    rng = random.Random(0)
    text, n = "0123456789", 4000
    lengths = Counter()
    for _ in range(n):
        ids = fim_transform(text, STARCODER, rng, rate=1, spm_rate=0)
        _, prefix, middle, suffix = parts_of(ids, STARCODER)
        assert prefix + middle + suffix == text
        lengths[len(middle)] += 1
    # Of the 11 * 11 pairs of cuts, 11 are 0 apart and 2 * (11 - d) are d apart.
    for distance in range(11):
        share = (11 if distance == 0 else 2 * (11 - distance)) / 121
        assert lengths[distance] / n == pytest.approx(share, abs=5 * (share / n) ** 0.5)


@pytest.mark.parametrize(
    ("spm_rate", "layouts"),
    [
        (0, ["⟨p⟩|a|⟨s⟩|ab|⟨m⟩|b", "⟨p⟩|a|⟨s⟩|b|⟨m⟩|b|a", "⟨p⟩|ab|⟨s⟩|ab|⟨m⟩"]),
        (1, ["⟨p⟩|⟨s⟩|ab|⟨m⟩|a|b", "⟨p⟩|⟨s⟩|b|⟨m⟩|a|b|a", "⟨p⟩|⟨s⟩|ab|⟨m⟩|ab"]),
    ],
)
def test_each_part_is_tokenized_by_itself(spm_rate, layouts):
    results = [
        fim_transform("abab", STARCODER, random.Random(seed), rate=1, spm_rate=spm_rate)
        for seed in range(200)
    ]
    for layout in layouts:  # a cut inside "ab" makes two tokens of it
        assert spell(STARCODER, layout) in results


def test_the_transform_depends_on_nothing_but_its_generator():
    texts = ["abcdef" * 5, "", "x", "猫" * 9] * 5
    first, second = (
        [fim_transform(text, STARCODER, rng) for text in texts]
        for rng in (random.Random(7), random.Random(7))
    )
    assert first == second
