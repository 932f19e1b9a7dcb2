"""Training runs of seconds: a tiny model and corpus, evaluated every three steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate_demo
import pytest
import torch
import train_demo
from corpus import Corpus, train_tokenizer
from torch import Tensor
from train_demo import PEAK_LR, WARMUP_STEPS, bits_per_byte, learning_rate, make_optimizer
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT, LLM, GPTConfig, Tokenizer
from mqa_gpt.errors import InputError
from tests.helpers import our_model, random_ids, reference_model, relative_error, tiny_config

CONFIG = GPTConfig(
    vocab_size=300,
    n_positions=128,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_inner=48,
    initializer_range=0.2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)
STEPS = 7  # evaluated and saved after 3, 6 and 7
CPU = torch.device("cpu")


def module(name: str) -> str:
    return "".join(f"def {name}_{i}(x):\n    y = x + {i}\n    return y\n\n\n" for i in range(20))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    corpus = Corpus({f"{name}.py": module(name) for name in "abc"}, {"heapq.py": module("heap")})
    for script in (train_demo, evaluate_demo):
        monkeypatch.setattr(script, "read_corpus", lambda: corpus)
    monkeypatch.setattr(train_demo, "CONFIG", CONFIG)
    monkeypatch.setattr(train_demo, "SHORT_BATCH", (3, 16))
    monkeypatch.setattr(train_demo, "LONG_BATCH", (2, 128))
    monkeypatch.setattr(train_demo, "EVALUATE_EVERY", 3)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)


def run(out: Path, *, resume: bool = False, fail_at: int | None = None) -> list[float]:
    """The losses of a run; the loss of step `fail_at` becomes NaN, which ends it."""
    losses: list[float] = []
    original = train_demo.loss_of

    def loss_of(model: GPT, batch: Tensor) -> Tensor:
        loss = original(model, batch)
        failing = len(losses) == fail_at
        losses.append(loss.item())
        return loss * math.nan if failing else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_demo, "loss_of", loss_of)
        train_demo.train(out, CPU, STEPS, resume)
    return losses


def saved_state(out: Path) -> dict[str, Any]:
    return torch.load(out / "state.pt", weights_only=True)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run(tmp_path / "broken", fail_at=5)
    assert run(tmp_path / "broken", resume=True) == whole[3:]

    one, other = saved_state(tmp_path / "whole"), saved_state(tmp_path / "broken")
    assert [step for step, _ in one["held_out"]] == [3, 6, 7]
    for part in ("step", "held_out", "model", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert len(one["seconds"]) == len(other["seconds"]) == STEPS
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_state(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the loss is nan at step 4: lower PEAK_LR"):
        run(tmp_path, fail_at=4)
    state = saved_state(tmp_path)
    assert state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (tmp_path / "model.safetensors").exists()


def test_resuming_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"state\.pt does not exist: there is no run to resume"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("state", [b"", b"garbage", {"step": 1}, [1]])
def test_a_file_that_is_not_a_run_state_is_refused(tmp_path: Path, state: Any, capsys) -> None:
    run(tmp_path)
    if isinstance(state, bytes):
        (tmp_path / "state.pt").write_bytes(state)
    else:
        torch.save(state, tmp_path / "state.pt")
    assert train_demo.main(["--out", str(tmp_path), "--device", "cpu", "--resume"]) == 2
    assert "state.pt is not the state of a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        PermissionError("no"),
        OSError("input/output error"),
        torch.OutOfMemoryError("full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_state_that_cannot_be_read_at_the_moment_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as raised:
        run(tmp_path, resume=True)
    assert raised.value is error


def test_a_run_cannot_be_resumed_for_fewer_steps_than_it_has_taken(tmp_path: Path, capsys) -> None:
    run(tmp_path)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--resume", "--steps", str(STEPS - 1)]
    assert train_demo.main(arguments) == 2
    assert f"has taken {STEPS} steps: ask for more --steps" in capsys.readouterr().err


def test_bad_options_are_one_sentence_each(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        train_demo.main(["--out", str(tmp_path / "run"), "--steps", "0"])
    assert ended.value.code == 2
    assert "--steps is 0: it must be at least 1" in capsys.readouterr().err
    assert train_demo.main(["--out", str(tmp_path / "run"), "--device", "nonsense"]) == 2
    assert "device is 'nonsense'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert train_demo.main(["--out", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert "file is not a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_a_run_is_not_evaluated(tmp_path: Path, capsys) -> None:
    assert evaluate_demo.main([str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    run(tmp_path)
    for text, problem in ((None, "No such file"), ("{", "is not JSON")):
        (tmp_path / "training.json").unlink()
        if text is not None:
            (tmp_path / "training.json").write_text(text)
        assert evaluate_demo.main([str(tmp_path), "--device", "cpu"]) == 2
        assert problem in capsys.readouterr().err
        (tmp_path / "training.json").touch()
    assert not (tmp_path / "figures.json").exists()


def test_a_finished_run_loads_here_and_in_transformers_and_gets_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--out", str(tmp_path), "--steps", str(STEPS), "--device", "cpu"]
    assert train_demo.main(arguments) == 0

    ids = random_ids(CONFIG, 2, 50)
    reference = GPTBigCodeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = GPT.from_pretrained(tmp_path, dtype="float32", device="cpu")(ids)
        assert relative_error(ours, reference(ids).logits) < 5e-6
    assert GPT.from_pretrained(tmp_path, device="cpu").dtype == torch.float16
    assert LLM.load(tmp_path, device="cpu").generate("def f(x):", 5).prompt_tokens > 0

    for name in ("FUNCTIONS", "HOLES", "FUNCTION_TOKENS", "HOLE_TOKENS"):
        monkeypatch.setattr(evaluate_demo, name, 4)
    monkeypatch.setattr(evaluate_demo, "HOLE_PROMPT_TOKENS", 64)
    assert evaluate_demo.main([str(tmp_path), "--device", "cpu"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    size = len(module("heap").encode())
    assert figures["training"]["held_out_parts_bits_per_byte"][-1][0] == STEPS
    assert figures["training_characters"] == 3 * len(module("a"))
    assert figures["completion"]["functions"] == figures["infilling"]["holes"] == 4
    assert figures["compression"]["bytes"] == size
    row = figures["compression"]["modules"]["heapq.py"]
    assert figures["compression"]["model"] == pytest.approx(row["model"])
    card = (tmp_path / "README.md").read_text()
    assert f"| `heapq.py` | {size} | {row['model']:.3f} | {row['xz']:.3f} |" in card


def test_the_learning_rate_warms_up_and_decays_linearly_to_zero() -> None:
    steps, middle = 1000, (WARMUP_STEPS + 1000) // 2
    assert learning_rate(0, steps) == pytest.approx(PEAK_LR / WARMUP_STEPS)
    assert learning_rate(WARMUP_STEPS // 2 - 1, steps) == pytest.approx(PEAK_LR / 2)
    assert learning_rate(WARMUP_STEPS - 1, steps) == pytest.approx(PEAK_LR)
    assert learning_rate(WARMUP_STEPS, steps) == pytest.approx(PEAK_LR)
    assert learning_rate(middle, steps) == pytest.approx(0.5 * PEAK_LR)
    assert 0 < learning_rate(steps - 1, steps) < 0.002 * PEAK_LR


def test_weight_decay_applies_to_matrices_and_embeddings_only() -> None:
    model = GPT(CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = (
        (group["weight_decay"], {names.pop(id(parameter)) for parameter in group["params"]})
        for group in make_optimizer(model).param_groups
    )
    assert not names  # each is in one group, the tied embedding too
    assert decaying[0] == 0.1
    assert others[0] == 0
    assert all(name.endswith("weight") and ".ln_" not in name for name in decaying[1])
    assert all(name.endswith("bias") or ".ln_" in name for name in others[1])


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
