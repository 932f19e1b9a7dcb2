"""LLM: text in, text out, with a model that recites a script so that every piece is known."""

import dataclasses
import time
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import transformers

from mqa_gpt import (
    GPT,
    LLM,
    CheckpointError,
    GPTConfig,
    KVCache,
    PromptError,
    PromptLookup,
    Tokenizer,
    generate,
)
from mqa_gpt import llm as llm_module
from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.fast import compiled
from mqa_gpt.generation import batching
from mqa_gpt.machine import INSTALL_NUMBA, peak_memory
from tests.helpers import (
    SPECIALS,
    byte_tokenizer,
    our_model,
    reference_model,
    shapes_fed,
    tiny_config,
)


class Reciting(GPT):
    """Says `script` one token after the other after a prompt of any length, the last forever."""

    def __init__(self, script: list[int], prompt_length: int, vocab_size: int) -> None:
        super().__init__(
            GPTConfig(
                vocab_size, 256, n_embd=2, n_layer=1, n_head=1, eos_token_id=0, bos_token_id=0
            )
        )
        self.script, self.prompt_length = script, prompt_length

    def forward(
        self, ids: torch.Tensor, cache: KVCache | None = None, logits_at: object = None
    ) -> torch.Tensor:
        assert cache is not None
        cache.advance(ids.shape[1])
        logits = torch.zeros(len(ids), self.config.vocab_size)
        at = min(cache.end - self.prompt_length, len(self.script) - 1)
        logits[:, self.script[at]] = 9.0
        return logits if logits_at is not None else logits[:, None]


def reciting(
    text: str, *, prompt_length: int = 1, end: bool = True, after: int | None = None
) -> LLM:
    """A model that writes a text, then a token `after` if there is one, then the end."""
    tokenizer = Tokenizer(byte_tokenizer(*SPECIALS))
    script = tokenizer.encode(text) + [after] * (after is not None) + [0] * end
    return LLM(Reciting(script, prompt_length, tokenizer.vocab_size).eval(), tokenizer)


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = Tokenizer(byte_tokenizer(*SPECIALS))
    config = tiny_config(vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0)
    return LLM(our_model(reference_model(config), config), tokenizer)


def test_a_completion_ends_at_end_of_text_without_showing_it():
    llm = reciting("hello")
    completion = llm.generate("x")
    assert (completion.text, completion.finish_reason) == ("hello", "stop")
    assert completion.token_ids == [*llm.tokenizer.encode("hello"), 0]
    assert completion.prompt_tokens == 1


def test_a_completion_ends_after_max_new_tokens():
    completion = reciting("hello").generate("x", max_new_tokens=3)
    assert (completion.text, completion.finish_reason) == ("hel", "length")


def test_end_of_text_of_the_tokenizer_ends_a_completion_whatever_the_config_says():
    llm = reciting("hello")
    object.__setattr__(llm.model.config, "eos_token_id", 200)
    assert llm.generate("x").text == "hello"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("llo w", "he"),
        (["zzz", "wor"], "hello "),
        (["o", "ll"], "he"),
        (["lo w", "w"], "hel"),
        (["w", "lo w"], "hel"),
        ("h", ""),
        ("hello world!", "hello world"),
    ],
)
def test_text_ends_before_the_first_stop_string_wherever_token_borders_are(stop, text):
    completion = reciting("hello world").generate("x", stop=stop)
    assert (completion.text, completion.finish_reason) == (text, "stop")


def test_the_name_of_a_control_token_as_stop_string_ends_at_the_token():
    llm = reciting("abc<fim_prefix>def")
    completion = llm.generate("x", stop=["<fim_prefix>", "nowhere"])
    assert (completion.text, completion.finish_reason) == ("abc", "stop")
    assert llm.generate("x").text == "abcdef"


def test_generation_ends_with_the_token_that_completes_a_stop_string():
    llm = reciting("hello world")
    assert llm.generate("x", stop="ll").token_ids == llm.tokenizer.encode("hell")


@pytest.mark.parametrize("stop", [None, "lo w", ["lo!", "world, "], "d\N{SNOWMAN}"])
def test_streamed_pieces_add_up_to_the_completion(stop):
    text = "hello w\N{LATIN SMALL LETTER O WITH DIAERESIS}rld\N{SNAKE}\N{SNOWMAN}"
    llm = reciting(text)
    pieces = list(llm.stream("x", stop=stop))
    assert "".join(pieces) == llm.generate("x", stop=stop).text
    assert all("\ufffd" not in piece and piece for piece in pieces)


def test_text_that_might_begin_a_stop_string_is_held_back_until_it_does_not():
    assert list(reciting("abcabd").stream("x", stop="abd")) == ["abc"]
    assert list(reciting("abcab").stream("x", stop="abd")) == ["abc", "ab"]


def test_a_character_cut_by_the_token_limit_is_shown_as_a_replacement():
    llm = reciting("a\N{SNAKE}")
    assert llm.generate("x", max_new_tokens=3).text == "a\ufffd"
    assert "".join(llm.stream("x", max_new_tokens=3)) == "a\ufffd"


def test_one_text_gives_one_completion_and_a_list_gives_a_list(llm):
    assert llm.generate("a", 4).text == llm.generate(["a"], 4)[0].text
    samples = llm.generate("a", 4, n=3, temperature=1.0, seed=0)
    assert len(samples) == 3
    nested = llm.generate(["b", "a"], 4, n=3, temperature=1.0, seed=0)
    assert [len(row) for row in nested] == [3, 3]
    assert nested[1] == samples


def test_a_prompt_in_a_batch_is_completed_as_it_is_alone(llm):
    prompts = ["def f(x):", "", "import os\nimport \N{SNAKE}"]
    together = llm.generate(prompts, 30, temperature=1.0, seed=3)
    assert together == [llm.generate(p, 30, temperature=1.0, seed=3) for p in prompts]


def test_an_empty_prompt_starts_from_end_of_text(llm):
    assert llm.generate("", 9).token_ids == llm.generate("<|endoftext|>", 9).token_ids
    assert llm.generate("", 9).prompt_tokens == 1


def test_control_tokens_in_a_prompt_act_unless_told_not_to(llm):
    assert llm.generate("<fim_prefix>a", 1).prompt_tokens == 2
    assert llm.generate("<fim_prefix>a", 1, special_tokens=False).prompt_tokens == 13


def test_infilling_treats_control_tokens_in_its_texts_as_text(llm):
    completion = llm.infill("a<fim_middle>", "<|endoftext|>b", 4)
    assert completion.prompt_tokens == 3 + len("a<fim_middle>") + len("<|endoftext|>b")


def test_infilling_runs_the_model_on_the_fim_prompt(llm):
    tok = llm.tokenizer
    psm = f"<fim_prefix>{'ab'}<fim_suffix>{'cd'}<fim_middle>"
    spm = f"<fim_prefix><fim_suffix>{'cd'}<fim_middle>{'ab'}"
    assert tok.fim is not None
    assert llm.infill("ab", "cd", 8).token_ids == llm.generate(psm, 8).token_ids
    assert llm.infill("ab", "cd", 8, mode="spm").token_ids == llm.generate(spm, 8).token_ids
    assert llm.infill("ab", "cd", 8).token_ids != llm.infill("ab", "cd", 8, mode="spm").token_ids


def test_infilling_beyond_the_context_is_an_error_or_is_cut_around_the_hole(llm):
    room = llm.model.config.n_positions - 8 - 3
    prefix, suffix = "p" * 100, "s" * 20
    with pytest.raises(PromptError, match="context"):
        llm.infill(prefix, suffix, 8)
    completion = llm.infill(prefix, suffix, 8, truncate=True)
    assert completion.cut == (120 - room, 0)
    assert completion.prompt_tokens == room + 3
    assert llm.infill("ab", "cd", 8, truncate=True).cut == (0, 0)


def test_truncation_reckons_only_with_a_usable_number_of_new_tokens(llm):
    with pytest.raises(PromptError, match="max_new_tokens"):
        llm.infill("a", "b", "many", truncate=True)


def test_a_checkpoint_without_fim_tokens_says_that_it_cannot_infill(llm):
    plain = LLM(llm.model, Tokenizer(byte_tokenizer("<|endoftext|>")))
    with pytest.raises(CheckpointError, match="cannot infill"):
        plain.infill("a", "b")


def test_log_probabilities_come_one_per_token(llm):
    completion = llm.generate("ab", 5, logprobs=2)
    assert completion.logprobs is not None
    assert completion.top_logprobs is not None
    assert len(completion.logprobs) == len(completion.top_logprobs) == 5
    # Greedy: the chosen token is the likeliest.
    for id_, logprob, top in zip(
        completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
    ):
        assert top[0] == (id_, logprob)
        assert top[0][1] >= top[1][1]
    assert llm.generate("ab", 5).logprobs is None


def test_what_was_generated_before_an_interrupt_is_kept():
    generation = reciting("hello").begin(["x"])
    pieces = iter(generation)
    assert next(pieces) == (0, "h")
    assert next(pieces) == (0, "e")
    completion = generation.completions[0]
    assert (completion.text, completion.finish_reason) == ("he", "interrupted")


def test_statistics_count_tokens_and_time():
    generation = reciting("hello").begin(["x"])
    generation.run()
    stats = generation.stats
    assert (stats.rows, stats.prompt_tokens, stats.new_tokens) == (1, 1, 6)
    assert 0 < stats.first_token_seconds < stats.total_seconds
    assert stats.decode_rate == pytest.approx(5 / (stats.total_seconds - stats.first_token_seconds))
    assert stats.prefill_rate == pytest.approx(1 / stats.first_token_seconds)


def test_no_new_tokens_give_an_empty_completion(llm):
    completion = llm.generate("abc", 0)
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("", "length", [])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (b"bytes", {}, "expected a list of texts, or a text"),
        (None, {}, "prompts are None"),
        (3, {}, "prompts are 3"),
        ("a", {"stop": 5}, "stop is 5"),
        ("a", {"temperature": 10**400}, "temperature"),
        ([None], {}, "NoneType"),
        (["a", ("b", "c")], {}, "^prompt 1 is a pair: infill and generate_many take pairs$"),
        (["ok", "\ud800"], {}, "surrogate"),
        ("a", {"stop": ""}, "stop"),
        ("a", {"stop": [3]}, "stop"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens"),
        ("a", {"n": 0}, "n is 0"),
        ("a", {"n": 2}, "n is 2 but temperature is 0"),
        ("a", {"n": 10**12, "temperature": 1.0}, "n is 1000000000000: .* 100,000"),
        ("a", {"logprobs": -1}, "logprobs"),
        ("a" * 200, {}, "200 tokens"),
        ("a", {"top_p": 2.0, "temperature": 1.0}, "top_p"),
    ],
)
def test_unusable_input_is_named(llm, prompt, options, words):
    with pytest.raises(PromptError, match=words):
        llm.generate(prompt, **options)


@pytest.mark.parametrize("name", ["temprature", "max_tokens", "cut"])
def test_an_unknown_option_is_named_with_the_known_ones(llm, name):
    says = f"^unknown option '{name}': expected one of temperature, .*, logprobs, draft$"
    for begin in (llm.stream, llm.generate, partial(llm.infill, "a")):
        with pytest.raises(TypeError, match=says):
            begin("a", **{name: 5})


def test_the_first_of_several_unknown_options_is_named(llm):
    with pytest.raises(TypeError, match="unknown option 'a'"):
        llm.begin("a", **dict.fromkeys("gfedcba", 5))


def test_a_model_says_what_it_is():
    for dtype in ("float16", "float32"):
        llm = LLM.load(dtype=dtype, device="cpu")
        assert repr(llm) == f"LLM(5,457,664 parameters, {dtype} on cpu)"
    llm = LLM.load(quantize="int8", device="cpu")
    assert repr(llm) == "LLM(5,457,664 parameters, int8 on cpu)"
    llm = reciting("hello")
    count = sum(parameter.numel() for parameter in llm.model.parameters())
    assert repr(llm) == f"LLM({count:,} parameters, float32 on cpu)"


def test_streaming_names_unusable_input_before_the_first_piece(llm):
    with pytest.raises(PromptError, match="surrogate"):
        llm.stream("\udfff")


def test_streaming_and_infilling_give_one_completion_and_take_no_number_of_samples(llm):
    with pytest.raises(TypeError, match="n"):
        llm.stream("a", n=2)
    with pytest.raises(TypeError, match="n"):
        llm.infill("a", "b", n=2)


def test_time_that_the_reader_of_a_stream_takes_is_not_counted():
    generation = reciting("hello").begin(["x"])
    for _ in generation:
        time.sleep(0.05)
    assert generation.stats.total_seconds < 0.05 * len("hello")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.0, "seed": 2}])
def test_many_prompts_give_in_order_what_each_gives_alone(llm, batch_size, options):
    prompts = ["def f(x):", "", "import os\nimport \N{SNAKE}", "a" * 60, "b", "ab", "\n\n"]
    free = llm.generate(prompts[0], 25, **(options | {"n": 1})).text
    options = options | {"stop": [free[5:7], "e"]}
    alone = [llm.generate(p, 25, **options) for p in prompts]
    assert list(llm.generate_many(prompts, 25, batch_size=batch_size, **options)) == alone
    rows = [row for a in alone for row in (a if isinstance(a, list) else [a])]
    assert {row.finish_reason for row in rows} == {"stop", "length"}


def test_a_pair_among_many_prompts_is_infilled_and_its_control_tokens_are_text(llm):
    pair = ("ab<fim_middle>", "cd")
    for mode in ("psm", "spm"):
        many = llm.generate_many(["ab", pair, "<fim_middle>"], 8, mode=mode)
        assert list(many) == [
            llm.generate("ab", 8),
            llm.infill(*pair, 8, mode=mode),
            llm.generate("<fim_middle>", 8),
        ]


def test_a_completion_is_given_once_it_and_all_before_it_are_finished():
    llm = reciting("hello")
    generation = llm.begin(["x"] * 5, batch_size=2)
    given = []
    for completions in generation.run_in_order():
        given += completions
        assert generation.stats.finished_rows in (len(given), len(given) + 1)
    assert [completion.text for completion in given] == ["hello"] * 5
    assert generation.completions == []
    assert not generation._outputs  # given away, so that a long run does not fill the memory
    assert (generation.stats.rows, generation.stats.new_tokens) == (5, 30)


def test_looking_for_finished_completions_does_not_go_through_all_samples():
    generation = reciting("hello").begin(["x"], n=100, temperature=0.01, batch_size=5)
    with mock.patch.object(generation, "_output", wraps=generation._output) as asked:
        (samples,) = generation.run_in_order()
    assert [sample.text for sample in samples] == ["hello"] * 100
    assert asked.call_count < 3 * generation.stats.new_tokens


def test_many_completions_before_an_interrupt_are_those_that_were_not_given_yet():
    generation = reciting("hello").begin(["x"] * 3, batch_size=1)
    assert len(next(generation.run_in_order())) == 1
    second, third = generation.completions
    assert (second.text, second.finish_reason) == ("h", "interrupted")
    assert (third.text, third.token_ids) == ("", [])


def test_many_prompts_take_the_memory_of_those_under_way(llm, monkeypatch):
    config, room = llm.model.config, 20
    prompts = ["a" * (room - 5)] * 9

    def has_slots(slots):
        needed = cache_bytes(config, torch.float32, 1, slots)
        monkeypatch.setattr(batching, "available_memory", lambda device: needed)

    for rows in (1, 4):
        has_slots(rows * room)
        with pytest.raises(PromptError, match="9 completions of 20 tokens need"):
            llm.generate(prompts, 5)
        assert len(list(llm.generate_many(prompts, 5, batch_size=rows))) == 9
        has_slots(rows * room - 1)
        with pytest.raises(PromptError, match=f"{rows} completions of 20 tokens need"):
            llm.generate_many(prompts, 5, batch_size=rows)
    # However many samples: those that wait take nothing.
    has_slots(4 * room)
    before = peak_memory()
    next(iter(llm.begin(prompts, 5, batch_size=4, n=100_000, temperature=1.0)))
    assert peak_memory() - before < 100e6


def test_no_prompts_and_no_new_tokens_are_nothing_to_do(llm):
    assert list(llm.generate_many([])) == []
    empty = llm.generate_many(["a", "b"], 0)
    assert [(c.text, c.finish_reason, c.prompt_tokens) for c in empty] == [("", "length", 1)] * 2


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("text", {}, "prompts are 'text'"),
        (None, {}, "prompts are None"),
        (["a", 5], {}, "prompt 1: text is of type int"),
        (["a", ("b", "c", "d")], {}, "prompt 1: text is of type tuple"),
        (["a", ("b", None)], {}, "prompt 1: suffix is of type NoneType"),
        (["a", "\ud800"], {}, "prompt 1: .* surrogate"),
        (["a", ("b", "c")], {"mode": "pms"}, "^mode is 'pms'"),
        (["a"], {"mode": "pms"}, "^mode is 'pms'"),
        (["a", "b" * 200, "c", "d" * 300], {}, r"^prompt 1 has 200 .*\(1 more .*: prompt 3\)$"),
        (["a" * 200] * 30, {}, r"\(29 more cannot be used: prompt 1, .*, prompt 10, \.\.\.\)$"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
        (["a"], {"batch_size": 1.5}, "batch_size is 1.5"),
        (["a"], {"batch_size": True}, "batch_size is True"),
        (["a"], {"draft": PromptLookup()}, "draft .* or batch_size"),
        (["a"], {"n": 2}, "n is 2 but temperature is 0"),
        (["a"], {"stop": ""}, "stop"),
    ],
)
def test_unusable_input_among_many_is_named_before_the_model_runs(llm, prompts, options, words):
    with pytest.raises(PromptError, match=words):
        llm.generate_many(prompts, **options)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_is_saved_is_loaded_as_it_was_tokenizer_and_all(llm, tmp_path, quantize):
    llm.save(tmp_path / "plain")
    saved = LLM(
        GPT.from_pretrained(tmp_path / "plain", quantize=quantize),
        Tokenizer.from_pretrained(tmp_path / "plain"),
    )
    saved.save(tmp_path / "x", max_shard_size=50_000)
    weights = GPT.from_pretrained(tmp_path / "x").state_dict()
    torch.testing.assert_close(weights, saved.model.state_dict(), rtol=0, atol=0)
    loaded = LLM.load(tmp_path / "x")
    assert loaded.tokenizer.to_json() == llm.tokenizer.to_json()
    assert loaded.generate("<fim_prefix>a", 9).prompt_tokens == 2
    if quantize is None:
        assert loaded.generate("ab", 9) == llm.generate("ab", 9)


def test_what_is_saved_has_a_tokenizer_that_transformers_reads(llm, tmp_path):
    llm.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\t<fim_prefix>\N{SNAKE}"
    assert theirs(text).input_ids == llm.tokenizer.encode(text)


def test_the_demo_checkpoint_has_no_revisions():
    with pytest.raises(CheckpointError, match="revision is 'main'"):
        LLM.load(revision="main")


# ------------------------------------------------------- what ends a completion, and what must not


def test_a_filling_ends_at_any_control_token():
    other = SPECIALS.index("<fim_prefix>")
    filling = reciting("ab", prompt_length=5, after=other).infill("x", "y", 8)
    assert (filling.text, filling.finish_reason, filling.token_ids[-1]) == ("ab", "stop", other)
    completion = reciting("ab", after=other).generate("x", 8)
    assert completion.token_ids[-2:] == [other, 0]  # which may go on


def test_a_completion_has_min_new_tokens_and_may_ignore_the_end():
    llm = reciting("ab")
    assert llm.generate("x", 8).text == "ab"
    longer = llm.generate("x", 8, min_new_tokens=6)
    assert len(longer.token_ids) >= 6
    assert longer.text.startswith("ab")
    endless = llm.generate("x", 8, ignore_eos=True)
    assert (len(endless.token_ids), endless.finish_reason) == (8, "length")
    stopped = llm.generate("x", 8, stop="b", min_new_tokens=2)
    assert stopped.text.startswith("ab")  # a stop string neither ends it before that
    with pytest.raises(PromptError, match="ignore_eos is 1"):
        llm.generate("x", ignore_eos=1)


def test_as_many_tokens_as_fit_and_the_end_of_a_prompt_that_is_too_long(llm):
    context = llm.model.config.n_positions
    whole = llm.generate("a" * 10, None, ignore_eos=True)
    assert len(whole.token_ids) + whole.prompt_tokens == context
    text = "b" * 50 + "a" * context
    with pytest.raises(PromptError, match="context"):
        llm.generate(text, 4)
    kept = llm.begin([text], 4, truncate=True).run()[0]
    assert kept.prompt_tokens == context - 4
    assert kept.text == llm.generate("a" * (context - 4), 4).text


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(llm):
    text = "a b " * 5_000_000
    begin = time.perf_counter()
    for call in (
        lambda: llm.generate(text),
        lambda: llm.infill(text, ""),
        lambda: llm.generate_many(["x", text]),
    ):
        with pytest.raises(PromptError, match="20,000,000 characters, at least"):
            call()
    assert time.perf_counter() - begin < 5


def test_prompts_of_one_run_may_have_options_of_their_own(llm):
    own = [{"max_new_tokens": 3}, {"temperature": 1.0, "seed": 4}, {}]
    prompts = ["a", "b", "c"]
    many = llm.begin(prompts, 6, per_prompt=own, batch_size=2).run()
    alone = [
        llm.generate(p, **{"max_new_tokens": 6} | o) for p, o in zip(prompts, own, strict=True)
    ]
    assert [c.token_ids for c in many] == [c.token_ids for c in alone]
    with pytest.raises(PromptError, match=r"prompt 1: .*temperature"):
        llm.begin(prompts, 6, per_prompt=[{}, {"temperature": -1}, {}])


def test_tokenizer_and_model_of_two_savings_are_not_mixed(tmp_path, monkeypatch):
    LLM(GPT.from_pretrained(DEMO_DIR), Tokenizer.from_pretrained(DEMO_DIR)).save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_bytes()
    load_model = llm_module.load_model

    def saved_over(folder, **options):
        (tmp_path / "new").write_bytes(text)
        (tmp_path / "new").replace(tmp_path / "tokenizer.json")
        return load_model(folder, **options)

    assert LLM.load(tmp_path).generate("a", 1).token_ids
    monkeypatch.setattr(llm_module, "load_model", saved_over)
    with pytest.raises(CheckpointError, match="saved over while it was read"):
        LLM.load(tmp_path)


def test_16_bit_weights_run_in_a_dtype_that_is_fast_and_a_note_says_so(monkeypatch):
    assert LLM.load(dtype="float16").model.dtype == torch.float16
    assert LLM.load(dtype="float16").notes == []
    chosen = LLM.load()  # the demo is float16, which no CPU multiplies fast here
    assert chosen.model.dtype == torch.float32
    (note,) = chosen.notes
    assert "float32" in note
    assert "--dtype float16" in note
    assert GPT.from_pretrained(DEMO_DIR).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "is_said"),
    [({}, True), ({"dtype": "float64"}, False), ({"backend": "sdpa"}, False)],
    ids=str,
)
def test_without_numba_a_note_says_what_would_be_faster_and_how_to_get_it(
    options, is_said, monkeypatch
):
    """Where the compiled forward pass would run."""
    options = {"dtype": "float32", "device": "cpu"} | options
    assert LLM.load(**options).notes == []
    monkeypatch.setattr(compiled, "HAS_NUMBA", False)
    found = LLM.load(**options).notes
    if is_said:
        (note,) = found
        assert note == (
            "numba is not installed, which makes generation faster on a CPU: run "
            f"{INSTALL_NUMBA} in the checkout"
        )
    else:
        assert found == []


def test_rows_that_stop_while_repetition_is_penalised_leave_the_others_alone():
    llm = LLM.load(dtype="float32")
    prompts = ["def f(x):\n    return", "import os\n\ndef g", "class A:"]
    options = {"repetition_penalty": 1.2, "stop": ")", "logprobs": 1}
    together = llm.generate(prompts, 40, **options)
    assert [c.text for c in together] == [llm.generate(p, 40, **options).text for p in prompts]


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_a_pair_among_many_prompts_is_infilled_and_cut_as_by_itself(mode):
    other = SPECIALS.index("<fim_prefix>")
    llm = reciting("ab", prompt_length=5, after=other)
    (filling,) = llm.generate_many([("x", "y")], 8, mode=mode)
    assert (filling.text, filling.token_ids[-1]) == ("ab", other)  # it ends at a control token
    llm = reciting("ab", prompt_length=248)
    (cut,) = llm.begin([("x" * 900, "y")], 8, mode=mode, truncate=True).run()
    assert cut.token_ids == llm.infill("x" * 900, "y", 8, mode=mode, truncate=True).token_ids
    assert cut.prompt_tokens == 248


def test_a_second_iteration_continues_the_first(llm):
    generation = llm.begin(["a"], 6)
    stream = iter(generation)
    next(stream)
    assert generation.run()[0].token_ids == llm.generate("a", 6).token_ids
    assert generation.run()[0].token_ids == llm.generate("a", 6).token_ids
    assert generation.stats.new_tokens == 6


@pytest.mark.parametrize("n", [np.int8(100), np.uint8(100)])
def test_numpys_small_integers_do_not_wrap(llm, n):
    assert len(llm.generate(["a"] * 3, 1, n=n, temperature=1.0)) == 3
    assert len(generate(llm.model, [[1]] * 3, 1, n=n, temperature=1.0)) == 300
    assert len(llm.infill("a", "b", np.int8(20)).token_ids) <= 20


def test_end_tokens_that_the_model_does_not_have_are_left_out_or_refused(llm, tmp_path):
    config = dataclasses.replace(llm.model.config, eos_token_id=[0, 5000])
    other = LLM(our_model(reference_model(config), config), llm.tokenizer)
    assert len(other.generate("a", 8, min_new_tokens=6).token_ids) >= 6
    for bad in (10**9, -1):
        with pytest.raises(PromptError, match="an end token is"):
            generate(llm.model, [[1]], 4, eos_token_id=bad, min_new_tokens=2)
    everything = list(range(config.vocab_size))
    with pytest.raises(PromptError, match="all tokens are end tokens"):
        generate(llm.model, [[1]], 4, eos_token_id=everything, min_new_tokens=2)


def test_a_stop_string_ends_the_work_and_not_only_the_text():
    llm = reciting("abcdefgh")
    with shapes_fed(llm.model) as shapes:
        assert llm.generate("x", 50, stop="c").text == "ab"
    assert len(shapes) == 3  # the prefill gives "a", two steps the others
