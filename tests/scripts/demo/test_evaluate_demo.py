"""The demo's evaluation: its prompts, and what counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import evaluate_demo
import pytest
import torch
from evaluate_demo import (
    bits_per_byte,
    complete_functions,
    count_fillings,
    fill_holes,
)

from mqa_gpt import LLM, Tokenizer
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.evaluation import Task
from mqa_gpt.generation.completion import Completion
from mqa_gpt.training.config import read_run_config
from mqa_gpt.training.run import train
from mqa_gpt.training.vocabulary import train_tokenizer
from tests.helpers import our_model, reference_model, tiny_config


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("\n        return x\n\n    def g(self):\n", False, (1, 1, 1)),
        ("\n        return x", True, (1, 1, 1)),
        ("  # why\n        return x", True, (1, 1, 1)),
        (" why\n        return x", True, (0, 0, 1)),
        (" return x\n\n    def g(self):\n", False, (1, 1, 1)),
        (" return x", True, (1, 1, 1)),
        (" return x", False, (0, 0, 0)),
        ("\n        return x\n        y =", False, (1, 1, 0)),
        ('\n        """Doc."""\n\n        return x[', False, (1, 0, 0)),
        ('\n        """Doc."""\n\nx = 1\n', False, (1, 0, 1)),
        ('\n        """Doc."""\n        return x\n', True, (1, 1, 1)),
        ('\n        """Doc.\n        more', False, (0, 0, 0)),
        ("\n        return (x\n    y = 1\n", False, (0, 0, 1)),
        ("\n        return x", False, (0, 0, 0)),
        ("\n    return x\n", False, (0, 0, 1)),
        ("", True, (0, 0, 1)),
    ],
)
def test_functions_count_as_parsed_beyond_the_docstring_and_finished(
    llm: LLM,
    text: str,
    ended: bool,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "x = 1\n" * 1000 + "class A:\n    def f(self, x):\n        return secret\n"

    def write(
        llm: LLM, prompts: list[list[int]], new_tokens: int, what: str, **sampling: Any
    ) -> list[tuple[str, bool]]:
        assert len(prompts[0]) + new_tokens == llm.model.config.n_positions
        assert llm.tokenizer.decode(prompts[0]).endswith("x = 1\nclass A:\n    def f(self, x):")
        calls.append(sampling)
        return [(text, ended)]

    calls: list[dict[str, float]] = []
    monkeypatch.setattr(evaluate_demo, "FUNCTIONS", 1)
    monkeypatch.setattr(evaluate_demo, "write", write)
    counts = complete_functions(llm, {"a.py": source})
    parse, beyond, finished = expected
    expected_counts = {
        "parse": parse,
        "parse_beyond_docstring": beyond,
        "finished": finished,
        "whole": beyond and finished,
    }
    sampling = {"temperature": 0.2, "top_p": 0.95}
    assert calls == [{}, {**sampling, "seed": 0}]
    assert counts == {
        "functions": 1,
        "greedy": expected_counts,
        "sampled": {**sampling, **expected_counts},
    }


@pytest.mark.parametrize(
    ("text", "ended", "restored", "one_line"),
    [
        ("\n    x = 1", True, 1, 1),
        ("\n    x = 1", False, 0, 0),
        ("\n    x = 1\n    y", True, 1, 0),
        ("\n    x = 1 ", True, 0, 1),
        ("\n    x = 12\n", False, 0, 0),
        ("\n  x = 1\n", False, 0, 0),
        (" = 3", True, 0, 0),
        ("", True, 0, 0),
    ],
)
def test_fillings_count_as_restored_ended_and_one_line(
    text: str, ended: bool, restored: int, one_line: int
) -> None:
    assert count_fillings(["\n    x = 1"], [20.0], [(text, ended)]) == {
        "bits_per_byte": 2.0,
        "restored": restored,
        "ended": ended,
        "one_line": one_line,
    }


def test_holes_are_lines_shown_without_their_suffix_and_in_both_orders(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def write(
        llm: LLM, prompts: list[list[int]], new_tokens: int, what: str, **sampling: Any
    ) -> list[tuple[str, bool]]:
        asked.append(llm.tokenizer.decode(prompts[0], skip_special_tokens=False))
        return [("\n    x = 1", True)]

    def complete(llm: LLM, tasks: list[Task], *_: int, **options: Any) -> Any:
        asked.append((tasks, options))
        return iter([[Completion("\n    x = 1", [], "length", 9)]])

    monkeypatch.setattr(evaluate_demo, "HOLES", 1)
    monkeypatch.setattr(evaluate_demo, "write", write)
    monkeypatch.setattr(evaluate_demo, "complete", complete)
    before, after = '"""Doc."""\n\nif (\n    a):', "\n# end\n"
    figures = fill_holes(llm, {"a.py": f"{before}\n    x = 1{after}"})
    task = Task(0, before, after, "\n    x = 1")
    assert asked == [
        f"<|endoftext|>{before}",
        ([task], {"mode": "psm", "prompt_tokens": 256}),
        ([task], {"mode": "spm", "prompt_tokens": 256}),
    ]
    assert figures.pop("holes") == 1
    assert list(figures) == ["without_suffix", "psm", "spm"]
    assert [counts["restored"] for counts in figures.values()] == [1, 0, 0]
    bits = 0.0
    ids = [0, *llm.tokenizer.encode(before)]
    for token in llm.tokenizer.encode("\n    x = 1"):
        with torch.no_grad():
            probabilities = llm.model(torch.tensor([ids]))[0, -1].softmax(-1)
        bits -= math.log2(probabilities[token].item())
        ids.append(token)
    expected = bits / len("\n    x = 1")
    assert figures["without_suffix"]["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_generated_text_comes_with_whether_it_reached_the_end_token(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[*llm.tokenizer.encode(f"x = {i}"), 0] for i in range(12)]
    rows[3].pop()
    monkeypatch.setattr(evaluate_demo, "generate", lambda model, prompts, *_, **__: prompts)
    expected = [(f"x = {i}", i != 3) for i in range(12)]
    assert evaluate_demo.write(llm, rows, 8, "test") == expected


def test_the_bundled_card_is_made_from_the_recorded_figures(llm: LLM) -> None:
    results = Path(__file__).parents[3] / "benchmarks/results/demo_checkpoint.json"
    text = evaluate_demo.card(llm, json.loads(results.read_text("utf-8")))
    assert text == (DEMO_DIR / "README.md").read_text("utf-8")


def module(name: str) -> str:
    return "".join(f"def {name}_{i}(x):\n    y = x + {i}\n    return y\n\n\n" for i in range(20))


def test_a_folder_without_a_run_is_not_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_demo.main([str(tmp_path)]) == 2
    assert "config.toml cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_the_demo_gets_figures_and_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = tmp_path / "library"
    sources.mkdir()
    for name in ("a", "b", "c", "heapq"):
        (sources / f"{name}.py").write_text(module(name))
    overrides = (
        f'data.sources=["{sources}"]', "tokenizer.vocab_size=300", "model.n_positions=128",
        "data.length=128", "model.n_embd=32", "model.n_layer=2", "run.steps=2",
        "run.evaluate_samples=4", "run.batch_size=2", "run.micro_batch_size=2",
    )  # fmt: skip
    config = read_run_config(Path(__file__).parents[3] / "configs/demo.toml", overrides)
    train(config, tmp_path / "run", device="cpu", say=lambda _: None)

    for name in ("FUNCTIONS", "HOLES", "FUNCTION_TOKENS", "HOLE_TOKENS"):
        monkeypatch.setattr(evaluate_demo, name, 4)
    monkeypatch.setattr(evaluate_demo, "HOLE_PROMPT_TOKENS", 64)
    assert evaluate_demo.main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    figures = json.loads((tmp_path / "run/model/figures.json").read_text())
    size = len(module("heapq").encode())
    assert figures["training_characters"] == 3 * len(module("a"))
    (facts,) = figures["training"]
    assert facts["steps"] == facts["held_out"][-1]["step"] == 2
    assert figures["completion"]["functions"] == figures["infilling"]["holes"] == 4
    assert figures["compression"]["bytes"] == size
    row = figures["compression"]["modules"]["heapq.py"]
    assert figures["compression"]["model"] == pytest.approx(row["model"])
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"| `heapq.py` | {size:,} | {row['model']:.3f} | {row['xz']:.3f} |" in card
    assert "Muon for the hidden matrices" in " ".join(card.split())

    first_figures = tmp_path / "run/model/figures.json"
    overrides = (f'model.pretrained="{tmp_path}/run/model"', *overrides[:1], *overrides[3:4],
                 "data.infilling.rate=0.25", *overrides[6:])  # fmt: skip
    config = read_run_config(Path(__file__).parents[3] / "configs/demo-2.toml", overrides)
    train(config, tmp_path / "run-2", device="cpu", say=lambda _: None)
    assert evaluate_demo.main([str(tmp_path / "run-2"), "--device", "cpu"]) == 0
    figures = json.loads((tmp_path / "run-2/model/figures.json").read_text())
    assert [facts["config"]["data"]["infilling"]["rate"] for facts in figures["training"]] == [
        0.5,
        0.25,
    ]
    card = " ".join((tmp_path / "run-2/model/README.md").read_text().split())
    first, second = card.split("configs/demo-2.toml")
    assert "50% (from epoch 9 on 80%) of the documents" in first
    assert "25% of the documents" in second
    assert "`<|endoftext|>` is left out of the loss" in second
    commands = [line.strip() for line in figures["command"].split(";")]
    assert commands == [
        "mqa-gpt train configs/demo.toml --out demo-run",
        "python scripts/demo/evaluate_demo.py demo-run",
        "mqa-gpt train configs/demo-2.toml --out demo-run-2",
        "python scripts/demo/evaluate_demo.py demo-run-2",
    ]

    first_figures.unlink()
    assert evaluate_demo.main([str(tmp_path / "run-2"), "--device", "cpu"]) == 2
    assert f"{first_figures} is missing: evaluate the run" in capsys.readouterr().err


def test_bits_per_byte_equal_those_of_one_token_at_a_time() -> None:
    texts = ["a few words of 猫 and é " * 8, "short"]
    tokenizer = Tokenizer(train_tokenizer(texts, 280))
    config = tiny_config(vocab_size=280, n_positions=24)
    model = our_model(reference_model(config), config)
    bits = 0.0
    for text in texts:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
        for i in range(1, len(ids)):
            # The window begins at 0, 12, 24, ...: the first from which 24 tokens reach up to i.
            start = max(0, math.ceil((i - 24) / 12) * 12)
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:i]]))[0, -1]
            bits -= logits.log_softmax(-1)[ids[i]].item() / math.log(2)
    assert len(ids) < 24 < 100 < len(tokenizer.encode(texts[0]))
    expected = bits / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(expected, rel=1e-5)
