"""benchmarks/cpu/speculation.py: what it prints and records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.cpu import speculation
from mqa_gpt import GPT
from mqa_gpt.generation.speculative import PromptLookup
from tests.helpers import our_model, reference_model, tiny_config


@pytest.fixture
def model() -> GPT:
    return our_model(reference_model(tiny_config()), tiny_config())


def test_a_speed_that_noise_has_made_negative_is_null(model, monkeypatch, capsys):
    monkeypatch.setattr(
        speculation,
        "interleaved",
        lambda actions, repeats, label: {
            name: {"median": 2.0 if name == "first" else 1.5} for name in actions
        },
    )
    options = argparse.Namespace(new=7, repeats=1)
    figure = speculation.compare(model, [1, 2, 3], PromptLookup(), options, "x")
    assert figure["speedup"] is None
    speculation.show("continue", figure)
    assert "-  yes  not measurable: more --new or --repeats" in capsys.readouterr().out


@pytest.mark.slow
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
