"""The script is for real weights; here transformers publishes outputs of random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import Tokenizer
from scripts.check_published_outputs import CASES, main
from tests.helpers import (
    byte_tokenizer,
    reference_greedy,
    reference_model,
    shared_data,
    tiny_config,
)

SPECIALS = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]


def writing_ascii(vocab_size: int) -> GPTBigCodeForCausalLM:
    """transformers' model, which chooses among the printable ASCII characters."""
    reference = reference_model(tiny_config(vocab_size=vocab_size, tie_word_embeddings=False))
    with torch.no_grad():
        reference.lm_head.weight[len(SPECIALS) + 94 :] = 0
    return reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owner") / "model"
    tokenizer = byte_tokenizer(*SPECIALS)
    writing_ascii(tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def published(folder: Path, prompt: str, count: int = 6) -> dict[str, Any]:
    """A case as in the file of published outputs, from transformers."""
    tokenizer = Tokenizer.from_pretrained(folder)
    reference = writing_ascii(tokenizer.vocab_size)
    ids, logits = reference_greedy(reference, [tokenizer.encode(prompt)], count)
    logprobs = logits[0].log_softmax(-1).gather(1, ids[0][:, None])[:, 0]
    return {
        "model": "someone/model",
        "prompt": prompt,
        "mode": "greedy",
        "max_new_tokens": count,
        "ids": ids[0].tolist(),
        "logprobs": logprobs.half().tolist(),
        "text": tokenizer.decode(ids[0].tolist()),
        "source": "transformers",
    }


def run(folder: Path, cases: list[dict[str, Any]], *arguments: str) -> int:
    file = folder.parent / "cases.json"
    file.write_text(json.dumps({"cases": cases}))
    return main(["--model", str(folder), "--cases", str(file), *arguments])


PROMPTS = ["def f(x):", "<fim_prefix>a = <fim_suffix>\n<fim_middle>"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_outputs_of_transformers_pass(
    folder: Path, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = published(folder, prompt)
    only_text = {key: case[key] for key in ("model", "prompt", "text", "source")}
    assert run(folder, [case, only_text]) == 0
    assert "2 of 2 cases pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [5, 5, 5, 5, 5, 5]}, "ids: "),
        ({"logprobs": [-9.0] * 6}, "log-probabilities: "),
        ({"text": "something else"}, "text: "),
    ],
)
def test_a_difference_in_ids_log_probabilities_or_text_fails(
    folder: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = published(folder, PROMPTS[0])
    assert run(folder, [case, case | change], "--as", "someone/model") == 1
    shown = capsys.readouterr().out
    assert message in shown
    assert "1 of 2 cases pass" in shown


def test_a_model_without_cases_is_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, [published(folder, PROMPTS[0])], "--as", "bigcode/starcoder") == 2
    assert "no outputs are published for 'bigcode/starcoder'" in capsys.readouterr().err


def test_a_missing_model_or_case_file_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "no"), "--as", "bigcode/starcoder"]) == 2
    assert main(["--model", str(tmp_path), "--cases", str(tmp_path / "no.json")]) == 2
    assert "not a file of published outputs" in capsys.readouterr().err


def test_every_published_case_is_greedy_and_names_its_source() -> None:
    cases = json.loads(CASES.read_text())["cases"]
    assert {case["model"] for case in cases} == {
        "bigcode/santacoder",
        "bigcode/starcoder",
        "bigcode/gpt_bigcode-santacoder",
        "bigcode/tiny_starcoder_py",
    }
    for case in cases:
        assert case["mode"] == "greedy"
        assert case["prompt"]
        assert case["text"]
        assert case["source"]
        assert len(case.get("ids", [])) == len(case.get("logprobs", []))


def test_the_published_ids_of_starcoder_decode_to_the_published_text() -> None:
    tokenizer = Tokenizer.from_pretrained(shared_data("starcoder-tokenizer"))
    cases = json.loads(CASES.read_text())["cases"]
    case = next(case for case in cases if case["model"] == "bigcode/starcoder")
    assert tokenizer.decode(case["ids"]) == case["text"]
