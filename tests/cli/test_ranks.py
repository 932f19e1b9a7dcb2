"""`mqa-gpt generate` under torchrun: the tokens of one process, printed once."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from mqa_gpt import GPT
from mqa_gpt.cli import generate as command
from tests.cli.test_app import environment, invoke, refusal
from tests.helpers import SPECIALS, byte_tokenizer, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("ranks") / "model")


def save(folder: Path, **changes: Any) -> str:
    """A model of random weights, with a tokenizer of bytes."""
    tokenizer = byte_tokenizer(*SPECIALS)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_head": 4, "eos_token_id": 0, **changes}
    torch.manual_seed(0)
    GPT(tiny_config(**sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def on_two_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "mqa_gpt", *arguments, "--device", "cpu"]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "3"]])
def test_ranks_write_what_one_process_writes(sampling: list[str], folder: str) -> None:
    run = ["generate", "-m", folder, "def f(x):", "import", "--max-new-tokens", "40", *sampling]
    run += ["--backend", "sdpa"]  # "auto" would compile, for the process alone
    alone = invoke(*run, "--device", "cpu")
    together = on_two_ranks(*run)
    assert (together.returncode, together.stdout) == (0, alone.stdout), together.stderr
    assert len(alone.stdout) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_head is 3 and there are 2 tensor-parallel ranks"),
        ({"multi_query": False}, "2 ranks can share a multi-query model"),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused_once(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    done = on_two_ranks("generate", "-m", save(tmp_path / "model", **changes), "a")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count(message) == 1
    assert "gloo" not in done.stderr


def test_what_ranks_would_read_or_draw_differently_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "rank_count", lambda: 2)
    monkeypatch.setattr(command, "sharing_layers", lambda device: nullcontext((device, id)))
    run = ("generate", "-m", folder)
    for prompts in ([], ["-"], ["a", "--file", "-"]):
        assert refusal(*run, *prompts, stdin="a").startswith("several ranks cannot share standard")
    assert refusal(*run, "a", "--temperature", "1").startswith("several ranks draw the same tokens")
    assert invoke(*run, "a", "--temperature", "1", "--seed", "0").exit_code == 0
