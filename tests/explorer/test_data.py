"""What the explorer shows is what the model computes."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from mqa_gpt import LLM, InputError, PromptError, Tokenizer
from mqa_gpt.cache import cache_bytes
from mqa_gpt.explorer import collect
from mqa_gpt.explorer.data import ALTERNATIVES, token_text
from mqa_gpt.fast.int8_cache import cache_class
from mqa_gpt.fim import infill_prompt
from mqa_gpt.research.heads import attention_patterns
from mqa_gpt.research.lens import logit_lens
from tests.helpers import SPECIALS, byte_tokenizer, tiny_model

PROMPT = "def f(x):\n    "


def tiny_llm(**changes: object) -> LLM:
    tokenizer = Tokenizer(byte_tokenizer(*SPECIALS))
    sizes = {"vocab_size": tokenizer.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    return LLM(tiny_model("sdpa", **sizes, **changes), tokenizer)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


@pytest.fixture(scope="module")
def data(llm: LLM) -> dict[str, Any]:
    return collect(llm, PROMPT, max_new_tokens=7, ignore_eos=True)


def patterns_in(data: dict[str, Any], layers: int, heads: int) -> torch.Tensor:
    """The attention in the page, (L, H, T, T)."""
    T = len(data["ids"])
    numbers = np.frombuffer(base64.b64decode(data["attention"]), np.uint8)
    found = torch.zeros(layers, heads, T, T)
    rows, columns = torch.tril_indices(T, T)
    found[:, :, rows, columns] = torch.from_numpy(numbers.copy()).view(layers, heads, -1) / 255
    return found


def test_the_tokens_are_those_of_a_generation(llm: LLM, data: dict[str, Any]) -> None:
    completion = llm.generate(PROMPT, 7, ignore_eos=True)
    assert data["ids"] == llm.tokenizer.encode(PROMPT) + completion.token_ids
    assert data["prompt_tokens"] == completion.prompt_tokens == len(PROMPT)
    assert data["parts"] == ["prompt"] * len(PROMPT) + ["new"] * 7
    assert data["finish_reason"] == "length"
    assert data["seconds"]["prefill"] > 0
    assert data["seconds"]["decode"] > 0


def test_probabilities_ranks_and_alternatives_are_the_models_own(
    llm: LLM, data: dict[str, Any]
) -> None:
    ids = torch.tensor(data["ids"])
    with torch.no_grad():
        probabilities = llm.model(ids[None])[0].softmax(-1)  # (T, V)
    own = probabilities[:-1].gather(1, ids[1:, None])[:, 0]
    assert data["logprobs"][0] is data["ranks"][0] is None
    assert data["logprobs"][1:] == pytest.approx(own.log().tolist(), abs=1e-4)
    order = probabilities.argsort(-1, descending=True)
    assert data["ranks"][1:] == [
        row.tolist().index(id_) + 1 for row, id_ in zip(order, ids[1:].tolist(), strict=False)
    ]
    assert data["ranks"][len(PROMPT) :] == [1] * 7  # it was greedy
    assert data["next"]["ids"] == order[:, :ALTERNATIVES].tolist()
    likeliest = probabilities.sort(-1, descending=True).values[:, :ALTERNATIVES]
    assert np.allclose(data["next"]["probabilities"], likeliest, atol=1e-5)


def test_attention_is_every_heads_own_within_a_255th(llm: LLM, data: dict[str, Any]) -> None:
    expected = attention_patterns(llm.model, data["ids"])
    found = patterns_in(data, *expected.shape[:2])
    assert (found - expected).abs().max() <= 1 / 255
    assert (found[0, 0] - expected[0, 1]).abs().max() > 0.1  # no two heads are alike
    assert (found[0, 0] - expected[1, 0]).abs().max() > 0.1


def test_the_lens_is_the_logit_lens(llm: LLM, data: dict[str, Any]) -> None:
    expected = logit_lens(llm.model, data["ids"])
    assert data["lens"]["ids"] == expected.top_ids.tolist()
    top = [[row[0] for row in data["next"][key]] for key in ("ids", "probabilities")]
    assert [data["lens"][key][-1] for key in ("ids", "probabilities")] == top
    shares = torch.tensor(data["lens"]["probabilities"])
    assert (shares >= expected.probability - 1e-4).all()  # the largest is at least any other
    agrees = expected.top_ids == expected.top_ids[-1]
    assert np.allclose(shares[agrees], expected.probability[agrees], atol=1e-4)


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_caches_bytes_are_counted_as_elsewhere(multi_query: bool) -> None:
    llm = tiny_llm(multi_query=multi_query)
    found = collect(llm, "ab", max_new_tokens=1)
    config = llm.model.config
    shared = dataclasses.replace(config, multi_query=True)
    assert found["model"]["n_kv_head"] == config.n_kv_head
    sizes = found["cache"]["bytes_per_token"]
    assert sizes["mqa"] == cache_bytes(shared, torch.float32)
    assert sizes["mha"] == config.n_head * sizes["mqa"]
    assert sizes["mqa" if multi_query else "mha"] == cache_bytes(config, torch.float32)
    llm.model.cache_class = cache_class("int8")
    found = collect(llm, "ab", max_new_tokens=1)
    assert found["cache"]["dtype"] == "int8"
    assert found["cache"]["bytes_per_token"]["mqa"] == cache_bytes(shared, torch.int8)


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_the_parts_of_an_infill_are_told_apart(llm: LLM, mode: str) -> None:
    found = collect(llm, infill=("ab", "c"), mode=mode, max_new_tokens=2, ignore_eos=True)
    assert found["ids"][:-2] == infill_prompt(llm.tokenizer, "ab", "c", mode=mode)
    by_part: dict[str, str] = {}
    for id_, part in zip(found["ids"], found["parts"], strict=True):
        by_part[part] = by_part.get(part, "") + found["texts"][str(id_)]
    assert by_part.pop("new")
    control = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    assert by_part == {"prefix": "ab", "suffix": "c", "control": "".join(control)}


def test_control_tokens_in_a_prompt_act_unless_told_not_to(llm: LLM) -> None:
    text = "a<|endoftext|>"
    found = collect(llm, text, max_new_tokens=1)
    assert found["parts"] == ["prompt", "control", "new"]
    found = collect(llm, text, max_new_tokens=1, special_tokens=False)
    assert found["parts"] == ["prompt"] * len(text) + ["new"]


def test_bytes_of_a_character_that_is_cut_are_spelled_out(llm: LLM) -> None:
    found = collect(llm, "\U0001f600\0", max_new_tokens=1)
    texts = [found["texts"][str(id_)] for id_ in found["ids"][:-1]]
    assert texts == ["\\xf0", "\\x9f", "\\x98", "\\x80", "\0"]
    assert token_text(llm.tokenizer, 5000) == "[5000]"


def test_the_data_is_json_and_names_every_token_in_it(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    shown = {*data["ids"], *sum(data["next"]["ids"] + data["lens"]["ids"], [])}  # noqa: RUF017
    assert set(data["texts"]) == set(map(str, shown))


def test_sampling_does_not_change_whose_probabilities_are_shown(llm: LLM) -> None:
    found = collect(llm, "ab", max_new_tokens=5, temperature=2.0, seed=1, ignore_eos=True)
    score = llm.score(("ab", llm.tokenizer.decode(found["ids"][2:], skip_special_tokens=False)))
    if score.token_ids == found["ids"][2:]:  # else the bytes were no text
        assert found["logprobs"][2:] == pytest.approx(score.logprobs, abs=1e-3)
    assert math.prod(found["ranks"][2:]) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the text is empty"),
        ({"infill": ("", "")}, "the text is empty"),
        ({}, "give a prompt, or infill"),
        ({"prompt": "a", "infill": ("a", "b")}, "one of the two"),
        ({"prompt": "a", "layer": 2}, "layer is 2: it must be an integer from 0 to 1"),
        ({"prompt": "a", "head": -1}, "head is -1: it must be an integer from 0 to 2"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a" * 112}, "prompt 0 has 112 tokens"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"infill": ("a", "b"), "mode": "mps"}, "mode is 'mps'"),
        ({"prompt": "a", "temperature": -1.0}, "temperature is -1"),
    ],
)
def test_a_mistake_is_one_clear_sentence(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        collect(llm, **options)
    assert "\n" not in str(caught.value)


def test_more_attention_than_a_page_should_hold_is_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqa_gpt.explorer.data.MOST_ATTENTION", 6 * 20 * 21 // 2)
    assert len(collect(llm, "a" * 18, max_new_tokens=2, ignore_eos=True)["ids"]) == 20
    with pytest.raises(InputError, match="up to 22: a page for 6 heads holds the attention of 20"):
        collect(llm, "a" * 20, max_new_tokens=2)


def test_a_prompt_error_is_the_one_of_generation(llm: LLM) -> None:
    with pytest.raises(PromptError, match="top_p is 2"):
        collect(llm, "a", temperature=1.0, top_p=2.0)
