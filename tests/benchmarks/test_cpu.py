"""benchmarks/cpu_decode.py, cpu_products.py and speculation.py: what they print and record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_decode
import cpu_products
import pytest
import speculation
import torch

from mqa_gpt import GPT, config
from mqa_gpt.generation.speculative import PromptLookup
from tests.helpers import our_model, reference_model, tiny_config

TINY = (1, 2, 24, 97, 112, "gelu", 0)  # layers, heads, width, vocabulary, context


def times_of(whole: float) -> Any:
    """`interleaved` of a machine on which a first token takes 2 s and all of them `whole`."""

    def interleaved(actions, repeats, label):
        return {
            name: {"median": 2.0 if "first" in name else whole, "seconds": []} for name in actions
        }

    return interleaved


@pytest.fixture
def models() -> tuple[dict[str, GPT], Any]:
    reference = reference_model(tiny_config())
    ours = our_model(reference, tiny_config())
    return {"mqa-gpt": ours, "mqa-gpt int8": ours}, reference


def test_a_decode_rate_is_the_time_behind_the_first_token(models, monkeypatch):
    monkeypatch.setattr(cpu_decode, "interleaved", times_of(5.0))
    options = argparse.Namespace(prompt=4, new=7, repeats=1)
    figures = cpu_decode.decode_rates(*models, 2, options)
    assert figures["same_tokens"]
    assert figures["mqa-gpt"] == {
        "prefill_s": 2.0, "decode_tok_s": 4.0, "decode_ratio": 1.0, "prefill_ratio": 1.0,
    }  # fmt: skip
    first, _, theirs = (line.split() for line in cpu_decode.lines(2, figures))
    assert first == ["2", "mqa-gpt", "2.000", "1.00", "4.0", "1.00"]
    assert theirs == ["2", "transformers", "2.000", "1.00", "4.0", "1.00"]


def test_a_decode_rate_that_noise_has_made_negative_is_null(models, monkeypatch):
    monkeypatch.setattr(cpu_decode, "interleaved", times_of(1.5))
    options = argparse.Namespace(prompt=4, new=7, repeats=1)
    figures = json.loads(json.dumps(cpu_decode.decode_rates(*models, 2, options)))
    assert figures["mqa-gpt"]["decode_tok_s"] is None
    assert figures["mqa-gpt"]["decode_ratio"] is None
    for line in cpu_decode.lines(2, figures):
        assert "not measurable: more --new or --repeats" in line


def test_a_speed_that_noise_has_made_negative_is_null(models, monkeypatch, capsys):
    monkeypatch.setattr(speculation, "interleaved", times_of(1.5))
    options = argparse.Namespace(new=7, repeats=1)
    figure = speculation.compare(models[0]["mqa-gpt"], [1, 2, 3], PromptLookup(), options, "x")
    assert figure["speedup"] is None
    speculation.show("continue", figure)
    assert "-  yes  not measurable: more --new or --repeats" in capsys.readouterr().out


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    return "tiny"


def test_the_draft_that_knows_follows_what_speculation_writes(models, monkeypatch):
    """As 8-bit products do: a step over several tokens may choose otherwise than the plain loop."""
    model, prompt = models[0]["mqa-gpt"], [1, 2, 3]
    plain = [*prompt, 4, 5, 6, 7]

    def generate(model, prompts, count, *, draft):
        known = draft.propose([0], prompts, count)[0]
        agreeing = next((i for i in range(count) if known[i] != 50 + i), count)
        written = [50 + i for i in range(agreeing + 1)] + [9] * count
        return [written[:count]]

    monkeypatch.setattr(speculation, "generate", generate)
    assert speculation.written_with(model, prompt, plain, 1.0) == [*prompt, 50, 51, 52, 53]


def test_speculation_prints_every_line_as_soon_as_it_is_known(
    tiny_shape, monkeypatch, tmp_path: Path, capsys
):
    shown = []

    def compare(model, prompt, draft, options, label):
        shown.append(capsys.readouterr().out)
        return {"same_tokens": True, "proposed": 3, "accepted": 2, "speedup": 1.5, "times": {}}

    monkeypatch.setattr(speculation, "compare", compare)
    output = tmp_path / "result.json"
    arguments = ["--shape", tiny_shape, "--prompt", "5", "--new", "4", "--modules", "2"]
    arguments += ["--agreement", "0", "0.5", "--output", str(output)]
    assert speculation.main(arguments) == 0
    assert shown[0].split() == ["draft", "accepted", "times", "as", "fast", "same", "tokens"]
    names = ["float32, agreement 0", "float32, agreement 0.5", "int8, agreement 0"]
    for line, name in zip(shown[1:], names, strict=False):
        assert line.startswith(name)
        assert line.split()[-5:] == ["2", "of", "3", "1.50", "yes"]
    figures = json.loads(output.read_text())["figures"]
    assert list(figures["by_agreement"])[:3] == names
    assert len(figures["of_the_prompt"]["edit"]["modules"]) == 2
    assert figures["of_the_prompt"]["edit"]["speedup_range"] == [1.5, 1.5]


def test_decoding_is_printed_for_each_batch_as_soon_as_it_is_known(
    tiny_shape, models, monkeypatch, tmp_path: Path, capsys
):
    shown = []

    def interleaved(*arguments):
        shown.append(capsys.readouterr().out)
        return times_of(5.0)(*arguments)

    times = {"mqa-gpt": {"median": 1.0}, "transformers": {"median": 2.0}}
    monkeypatch.setattr(cpu_decode, "interleaved", interleaved)
    monkeypatch.setattr(cpu_decode, "load_all", lambda folder: models)
    monkeypatch.setattr(cpu_decode, "cold_start", lambda *_: {"times": times, "ratio": 2.0})
    output = tmp_path / "result.json"
    arguments = ["--shape", tiny_shape, "--prompt", "4", "--new", "3", "--batch", "1", "2"]
    assert cpu_decode.main([*arguments, "--output", str(output)]) == 0
    head, first = shown
    assert head.splitlines()[-1].split() == [
        "batch", "prefill,", "s", "ratio", "decode,", "tok/s", "ratio",
    ]  # fmt: skip
    assert [line.split()[0] for line in first.splitlines()] == ["1", "1", "1"]
    rest = capsys.readouterr().out.splitlines()
    assert rest[-1] == "cold start: mqa-gpt 1.00 s, transformers 2.00 s, ratio 2.00"
    assert set(json.loads(output.read_text())["figures"]) == {"batch 1", "batch 2", "cold start"}


def test_a_size_that_pytorchs_8_bit_product_does_not_check_is_refused_before_it_is_called():
    with pytest.raises(ValueError, match="K is 33: it takes multiples of 16 only"):
        cpu_products.int8_weights_only(torch.ones(7, 33))
    _, product = cpu_products.int8_weights_only(torch.ones(7, 48))
    assert product(torch.ones(3, 48)).shape == (3, 7)


def test_a_contender_that_does_not_take_a_size_is_skipped_with_its_reason(tmp_path: Path, capsys):
    output = tmp_path / "products.json"
    arguments = ["--sizes", "33x7", "--rows", "1", "--repeats", "1", "--megabytes", "1"]
    assert cpu_products.main([*arguments, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    reasons = {row["product"]: row["reason"] for row in figures if "reason" in row}
    assert "multiples of 16" in reasons["int8 weights only, bfloat16"]
    assert "float32" in {row["product"] for row in figures if "ms" in row}
    assert "33 x 7, int8 weights only, bfloat16: K is 33" in capsys.readouterr().out


def test_tiny_weights_are_not_copied_without_end(monkeypatch):
    monkeypatch.setattr(cpu_products, "MOST_COPIES", 5)
    assert len(cpu_products.copies(cpu_products.plain_float32, torch.ones(1, 1), 1000)) == 6
    assert len(cpu_products.copies(cpu_products.plain_float32, torch.ones(5, 5), 300)) == 3
    assert len(cpu_products.copies(cpu_products.plain_float32, torch.ones(9, 9), 1)) == 2
