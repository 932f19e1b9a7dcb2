"""benchmarks/cpu/decode.py: what it prints and records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu import decode
from mqa_gpt.bench import peers
from mqa_gpt.bench.peers import Program
from tests.helpers import our_model, reference_model, tiny_config

PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def times_of(whole: float) -> Any:
    """`interleaved` of a machine on which a first token takes 2 s and all of them `whole`."""

    def interleaved(actions, repeats, label):
        return {
            name: {"median": 2.0 if "first" in name else whole, "seconds": []} for name in actions
        }

    return interleaved


@pytest.fixture
def programs(tmp_path: Path) -> list[Program]:
    model = our_model(reference_model(tiny_config()), tiny_config())
    model.save_pretrained(tmp_path)
    ours = peers.ours(model)
    (theirs,) = peers.load_transformers(tmp_path, model)
    return [ours, Program("mqa-gpt int8", ours.generate, 1), theirs]


def test_a_decode_rate_is_the_time_after_the_first_token(programs, monkeypatch):
    monkeypatch.setattr(decode, "interleaved", times_of(5.0))
    options = argparse.Namespace(new=7, repeats=1)
    figures = decode.decode_rates(programs, PROMPTS, options)
    assert figures["same_tokens"]
    assert figures["mqa-gpt"] == {
        "prefill_s": 2.0, "decode_tok_s": 4.0, "decode_ratio": 1.0, "prefill_ratio": 1.0,
    }  # fmt: skip
    first, _, theirs = (line.split() for line in decode.lines(2, figures))
    assert first == ["2", "mqa-gpt", "2.000", "1.00", "4.0", "1.00"]
    assert theirs == ["2", "transformers", "2.000", "1.00", "4.0", "1.00"]


def test_a_decode_rate_that_noise_has_made_negative_is_null(programs, monkeypatch):
    monkeypatch.setattr(decode, "interleaved", times_of(1.5))
    options = argparse.Namespace(new=7, repeats=1)
    figures = json.loads(json.dumps(decode.decode_rates(programs, PROMPTS, options)))
    assert figures["mqa-gpt"]["decode_tok_s"] is None
    assert figures["mqa-gpt"]["decode_ratio"] is None
    for line in decode.lines(2, figures):
        assert "not measurable: more --new or --repeats" in line


def test_other_tokens_than_transformers_are_said_to_be_so(programs, monkeypatch):
    monkeypatch.setattr(decode, "interleaved", times_of(5.0))
    wrong = Program("mqa-gpt", lambda prompts, count: [[0] * count for _ in prompts], 4)
    options = argparse.Namespace(new=7, repeats=1)
    figures = decode.decode_rates([wrong, *programs[1:]], PROMPTS, options)
    assert "OTHER TOKENS" in list(decode.lines(2, figures))[-1]


def test_every_program_that_is_installed_takes_part(tmp_path, monkeypatch):
    """The fastest of the others among them, whichever that is."""
    model = our_model(reference_model(tiny_config()), tiny_config())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(decode, "LLM", FakeLLM(model))
    other = peers.Peer(lambda folder, model: iter([Program("other", list, 4)]), (), 1)
    absent = peers.Peer(lambda folder, model: iter([]), ("no-such-package",), 1)
    monkeypatch.setattr(decode, "PEERS", {"other": other, "absent": absent})
    names = [program.name for program in decode.load_all(tmp_path)]
    assert names == ["mqa-gpt", "mqa-gpt int8", "other"]


class FakeLLM:
    """Stands for `LLM`, whose loading needs a tokenizer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load(self, folder: Path, **options: Any) -> FakeLLM:
        return self


def test_decoding_is_printed_for_each_batch_as_soon_as_it_is_known(
    tiny_shape, programs, monkeypatch, tmp_path: Path, capsys
):
    shown = []

    def interleaved(*arguments):
        shown.append(capsys.readouterr().out)
        return times_of(5.0)(*arguments)

    times = {"mqa-gpt": {"median": 1.0}, "transformers": {"median": 2.0}}
    monkeypatch.setattr(decode, "interleaved", interleaved)
    monkeypatch.setattr(decode, "load_all", lambda folder: programs)
    monkeypatch.setattr(decode, "cold_start", lambda *_: {"times": times, "ratio": 2.0})
    output = tmp_path / "result.json"
    arguments = ["--shape", tiny_shape, "--prompt", "4", "--new", "3", "--batch", "1", "2"]
    assert decode.main([*arguments, "--output", str(output)]) == 0
    head, first = shown
    assert head.splitlines()[-1].split() == [
        "batch", "prefill,", "s", "ratio", "decode,", "tok/s", "ratio",
    ]  # fmt: skip
    assert [line.split()[0] for line in first.splitlines()] == ["1", "1", "1"]
    rest = capsys.readouterr().out.splitlines()
    assert rest[-1] == "cold start: mqa-gpt 1.00 s, transformers 2.00 s, ratio 2.00"
    assert set(json.loads(output.read_text())["figures"]) == {"batch 1", "batch 2", "cold start"}
