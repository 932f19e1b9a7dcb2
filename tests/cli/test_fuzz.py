"""Random options and damaged batch files: each is carried out or refused in one clear sentence.

The inputs are the same in every run. `MQA_GPT_FUZZ` sets how many there are of each kind.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mqa_gpt import LLM
from mqa_gpt.cli.jsonl import LINE_OPTIONS
from tests.cli.test_app import invoke, spelling_checkpoint

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

COUNT = int(os.environ.get("MQA_GPT_FUZZ", "150"))

NUMBERS = ["0", "1", "-1", "2", "0.5", "-0", "1e-7", "1e-5", "1e300", "1e999", "nan", "inf"]
NUMBERS += ["", " 3", "9" * 400, "0x10", "1_0", "½", "True", "None", "fit", str(2**31), str(2**64)]
TEXTS = ["", "a", "<fim_middle>", "<|endoftext|>", "\n", "\\n", "\\", "é", "\U0001f600", "\ud800"]
TEXTS += ["a\udcff", "\x00", "\x1b[31m", "\x9b", "-", "--n", "a" * 300, "no/such", "int8", "cpu"]
WORDS = ["psm", "spm", "auto", "sdpa", "reference", "bf16", "torch.half", "float64", "prompt"]

OPTIONS = {
    "--max-new-tokens": NUMBERS,
    "--min-new-tokens": NUMBERS,
    "--ignore-eos": None,
    "--truncate": None,
    "--temperature": NUMBERS,
    "--top-k": NUMBERS,
    "--top-p": NUMBERS,
    "--min-p": NUMBERS,
    "--repetition-penalty": NUMBERS,
    "--seed": NUMBERS,
    "--n": [number for number in NUMBERS if number not in (str(2**31), str(2**64), "9" * 400)],
    "--threads": ["1", "0", "-1", "40000", "x"],
    "--stop": TEXTS,
    "--device": TEXTS,
    "--dtype": TEXTS + WORDS,
    "--backend": TEXTS + WORDS,
    "--quantize": TEXTS,
    "--cache-dtype": TEXTS,
    "--revision": TEXTS,
}
OWN_OPTIONS = {
    "generate": {"--logprobs": NUMBERS, "--draft": TEXTS + WORDS, "--file": TEXTS, "--json": None},
    "infill": {
        "--at": [*TEXTS, "1:1", "0:0", "9:9", "1:99"],
        "--marker": TEXTS,
        "--prefix": TEXTS,
        "--suffix": TEXTS,
        "--mode": TEXTS + WORDS,
        "--whole": None,
        "--json": None,
    },
    "batch": {
        "--batch-size": NUMBERS,
        "--mode": TEXTS + WORDS,
        "--output": [*TEXTS[:-2], "."],
        "--force": None,
        "--no-special-tokens": None,
    },
}

VALUES: list[Any] = [None, True, False, 0, -1, 3, 2**64, 10**400, 0.5, 1e300, "", "a", "\ud800"]
VALUES += [[], ["a"], ["", 1], {}, {"a": [{"a": None}]}, "x" * 1000, "<fim_middle>", "id"]
KEYS = ["id", "task_id", "prompt", "prefix", "suffix", "n", "other"]
KEYS += LINE_OPTIONS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LLM]:
    folder = str(spelling_checkpoint(tmp_path_factory.mktemp("fuzz") / "checkpoint"))
    return folder, LLM.load(folder)


@pytest.fixture
def check(
    loaded: tuple[str, LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run a command on the loaded model, and check how it ends."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str | bytes = "") -> None:
        with mock.patch.object(LLM, "load", return_value=loaded[1]):
            result = invoke(*arguments, "-m", loaded[0], stdin=stdin)
        assert result.exit_code in (0, 2), arguments
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        is_usage = result.stderr.startswith("Usage: ")
        is_left_out = "left out: " in result.stderr
        assert result.exit_code == bool(errors or is_usage or is_left_out) * 2, arguments
        assert is_usage or all(line.isprintable() for line in result.stderr.splitlines()), arguments
        assert result.exit_code == 0 or len(result.stderr) < 5000, arguments

    return run


def flags(rng: random.Random, command: str) -> list[str]:
    options = OPTIONS | OWN_OPTIONS[command]
    chosen = []
    for name in rng.sample(sorted(options), rng.randrange(5)):
        values = options[name]
        chosen += [name] if values is None else [f"{name}={rng.choice(values)}"]
    return chosen


@pytest.mark.parametrize("command", OWN_OPTIONS)
def test_random_options_are_taken_or_refused(
    check: Callable[..., None], tmp_path: Path, command: str
):
    rng = random.Random(command)
    lines = [{"id": i, "prompt": prompt} for i, prompt in enumerate(["uvw", "", "0"])]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = {"generate": ["uvw"], "infill": ["--prefix=a"], "batch": ["in", "--output=out"]}
    for _ in range(COUNT):
        limit = ["--max-new-tokens=2"] * (rng.random() < 0.8)
        (tmp_path / "out").unlink(missing_ok=True)
        check(command, *texts[command], *limit, *flags(rng, command))


def entry(rng: random.Random, number: int) -> dict[str, Any]:
    """A line of the input, more or less."""
    line: dict[str, Any] = {"id": number, "prompt": rng.choice(["uvw", "", "w" * 30])}
    for key in rng.sample(KEYS, rng.choice([0, 0, 1, 2])):
        line[key] = rng.choice(VALUES)
    if rng.random() < 0.1:
        del line[rng.choice(sorted(line))]
    return line


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The data with some bytes changed, left out, repeated or added."""
    for _ in range(rng.choice([0, 1, 1, 3])):
        at, size = rng.randrange(len(data) + 1), rng.choice([0, 1, 1, 20])
        piece = rng.choice([b"", rng.randbytes(3), data[at : at + 20], b"\n", b'"', b"{", b"\xff"])
        data = data[:at] + piece + data[at + size :]
    return data


def test_damaged_batch_files_are_taken_or_refused_and_whole_results_are_kept(
    check: Callable[..., None], tmp_path: Path
):
    rng = random.Random("batch files")
    command = ["batch", "in", "--output=out", "--max-new-tokens=2"]
    (tmp_path / "in").write_text('{"id": 0, "prompt": "uvw"}\n{"id": 1, "prompt": "y"}\n')
    check(*command)
    results = (tmp_path / "out").read_bytes()
    for _ in range(COUNT):
        lines = [json.dumps(entry(rng, number)) for number in range(rng.randrange(4))]
        (tmp_path / "in").write_bytes(damaged(rng, "\n".join(lines).encode()))
        kept = damaged(rng, results) if rng.random() < 0.5 else b""
        (tmp_path / "out").write_bytes(kept)
        check(*command, *["--force"] * (rng.random() < 0.5))
        whole = kept[: kept.rfind(b"\n") + 1]
        assert (tmp_path / "out").read_bytes().startswith(whole)
