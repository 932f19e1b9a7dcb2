"""Whole runs of a tiny model: exact resume, faults, refusals, and what is left in the folder."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPTBigCodeForCausalLM

from mqa_gpt import GPT, LLM
from mqa_gpt.errors import InputError
from mqa_gpt.training import checkpoints
from mqa_gpt.training.config import to_toml
from mqa_gpt.training.export import export_checkpoint
from mqa_gpt.training.log import LOG_FILE, read_log
from mqa_gpt.training.loop import Trainer
from mqa_gpt.training.run import prepare_folder, require_folder, train
from mqa_gpt.training.signals import RunInterruptedError
from tests.helpers import random_ids, relative_error
from tests.training.runs import (
    NO_DROPOUT,
    assert_same_run,
    last_tensors,
    results,
    say_nothing,
    start,
    tiny_run,
    write_sources,
)
from tests.training.test_loop import spoil_gradients

KILLS = int(os.environ.get("MQA_GPT_KILLS", "5"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen once, when a number of steps is done."""

    def arrange(done: int, action: Callable[[], None]) -> None:
        original = Trainer.step
        actions = [action]

        def step(self: Trainer, batches: Any) -> Any:
            if self.state.step == done and actions:
                actions.pop()()
            return original(self, batches)

        monkeypatch.setattr(Trainer, "step", step)

    return arrange


def fail() -> None:
    raise RuntimeError("as if the process had died")


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon, averaged": {"optimizer_name": "muon", "averaging_decay": 0.9},
    "no dropout, within documents": {**NO_DROPOUT, "data_within_documents": True},
    "no end in context": {"data_infilling": {"rate": 0.9, "end_in_context": False}},
    "bfloat16, recomputed": {"run_dtype": "bfloat16", "run_recompute": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_has_the_same_bits_as_an_uninterrupted_one(
    recipe: str, sources: Path, tmp_path: Path, before_step: Any
) -> None:
    config = tiny_run(sources, **RECIPES[recipe])
    start(config, tmp_path / "whole")
    before_step(6, fail)  # two steps after a checkpoint
    with pytest.raises(RuntimeError, match="had died"):
        start(config, tmp_path / "broken")
    assert [folder.name for folder in checkpoints.complete(tmp_path / "broken")] == [
        "step-00000004"
    ]
    start(config, tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_stays_as_it_is(sources: Path, tmp_path: Path) -> None:
    start(tiny_run(sources), tmp_path / "run")
    tensors, log = last_tensors(tmp_path / "run"), results(tmp_path / "run")
    start(tiny_run(sources), tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == log
    assert all(torch.equal(tensors[k], v) for k, v in last_tensors(tmp_path / "run").items())


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    sources: Path, tmp_path: Path, before_step: Any
) -> None:
    start(tiny_run(sources), tmp_path / "whole")
    before_step(2, fail)
    with pytest.raises(RuntimeError):
        start(tiny_run(sources), tmp_path / "broken")
    start(tiny_run(sources), tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(
    sources: Path, tmp_path: Path
) -> None:
    """`kill -9` again and again, until so many have hit the run; MQA_GPT_KILLS says how many."""
    config = tiny_run(
        sources,
        run_steps=5 * KILLS,
        run_save_every=2,
        run_evaluate_every=3,
        run_evaluate_samples=2,
        run_batch_size=2,
        optimizer_name="muon",
    )
    start(config, tmp_path / "whole")
    rng, run = random.Random(0), tmp_path / "killed"
    context = multiprocessing.get_context("fork")  # no import of torch in each
    for _ in range(KILLS):
        resume = (run / "config.toml").exists()
        child = context.Process(target=start, args=(config, run, resume))
        child.start()
        wait_for_steps(run, rng.randrange(5), child)
        time.sleep(rng.uniform(0, 0.05))  # in the middle of a step, of saving, of removing
        assert child.exitcode is None
        child.kill()
        child.join()
    start(config, run, resume=True)
    assert_same_run(tmp_path / "whole", run)


def wait_for_steps(run: Path, steps: int, child: Any) -> None:
    """Return when a run has logged so many steps from now on, or at once if that is none."""

    def logged() -> int:
        return (run / LOG_FILE).read_text().count('"train"') if (run / LOG_FILE).exists() else 0

    least = logged()
    while steps and logged() < least + steps:
        assert child.is_alive()
        least = min(least, logged())  # what is computed again is dropped first
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    number: signal.Signals, sources: Path, tmp_path: Path, before_step: Any
) -> None:
    start(tiny_run(sources), tmp_path / "whole")
    before_step(6, lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    with pytest.raises(RunInterruptedError) as caught:
        start(tiny_run(sources), tmp_path / "run")
    assert caught.value.number == number
    assert signal.getsignal(number) is handler
    assert checkpoints.complete(tmp_path / "run")[-1].name == "step-00000007"
    assert read_log(tmp_path / "run")[-1]["message"] == number.name
    start(tiny_run(sources), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_the_average_is_resumed_bit_for_bit_after_a_skipped_step(
    sources: Path, tmp_path: Path, before_step: Any
) -> None:
    config = tiny_run(sources, run_on_bad_step="skip", averaging_decay=0.9)
    for name in ("whole", "broken"):
        with pytest.MonkeyPatch.context() as patch, suppress(RuntimeError):
            spoil_gradients(patch, 3, math.inf)
            start(config, tmp_path / name)
        if name == "whole":
            before_step(6, fail)
    start(config, tmp_path / "broken", resume=True)
    assert checkpoints.read_state(checkpoints.complete(tmp_path / "broken")[-1]).skipped == 1
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_another_config_is_refused_with_the_settings_that_differ(
    sources: Path, tmp_path: Path
) -> None:
    start(tiny_run(sources), tmp_path / "run")
    other = tiny_run(sources, optimizer_lr=0.02, model_n_layer=3, run_keep=1)
    with pytest.raises(InputError) as caught:
        start(other, tmp_path / "run", resume=True)
    message = str(caught.value)
    assert "optimizer.lr was 0.01 and is 0.02" in message
    assert "model.n_layer was 2 and is 3" in message
    assert "keep" not in message


def test_a_folder_with_a_run_is_not_begun_again_and_one_without_not_resumed(
    sources: Path, tmp_path: Path
) -> None:
    config = tiny_run(sources, run_steps=1)
    with pytest.raises(InputError, match="holds no run to resume"):
        start(config, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    start(config, tmp_path / "run")
    with pytest.raises(InputError, match="holds a run: pass --resume"):
        start(config, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        start(config, tmp_path / "file")
    with pytest.raises(InputError, match="holds something else than a run"):
        start(config, tmp_path)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("text", ["the run's", "title = 'of another program'\n", "no TOML", ""])
def test_a_folder_of_the_users_own_is_never_written_to(
    text: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = tiny_run(sources, run_steps=1), tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data/corpus.txt").write_text("years of work")
    own = f"# my experiment\n{to_toml(config)}" if text == "the run's" else text
    (folder / "config.toml").write_text(own)
    before = contents(folder)
    monkeypatch.chdir(folder)
    for out in (Path(), folder):
        with pytest.raises(InputError, match=r"holds something else than a run: choose another"):
            start(config, out)
        with pytest.raises(InputError, match="holds no run to resume"):
            start(config, out, resume=True)
        with pytest.raises(InputError, match="holds something else than a run"):
            train(config, out, branch_from=tmp_path, device="cpu", say=say_nothing)
        assert contents(folder) == before


def test_a_run_begins_in_a_folder_of_one_that_was_killed_while_it_wrote_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    config, out = tiny_run(tmp_path, run_steps=1), tmp_path / "run"
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(out, config)
    monkeypatch.undo()
    require_folder(out, config, resume=False)
    prepare_folder(out, config)
    assert [path.name for path in out.iterdir()] == ["config.toml"]
    require_folder(out, config, resume=True)


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("kind", [InputError, OSError, RuntimeError])
def test_an_error_removes_only_what_the_run_has_written(
    kind: type[Exception],
    existed: bool,
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    if existed:
        out.mkdir()

    def refuse(*_: Any) -> None:
        (out / "notes.txt").write_text("written meanwhile")
        raise kind("too few documents")

    with monkeypatch.context() as patch:
        patch.setattr("mqa_gpt.training.run.make_model", refuse)
        with pytest.raises(kind, match="too few documents"):
            start(tiny_run(sources), out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    require_folder(out, tiny_run(sources), resume=False)


def test_resuming_removes_nothing_even_of_a_run_without_a_step(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tiny_run(sources, run_steps=1), tmp_path / "run"

    def ends_with(error: BaseException) -> Callable[..., None]:
        def end(*_: Any) -> None:
            raise error

        return end

    with monkeypatch.context() as patch:
        patch.setattr("mqa_gpt.training.run.make_model", ends_with(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            start(config, out)
    before = contents(out)
    assert {"config.toml", "tokenizer/tokenizer.json", "data/training/index.json"} <= before.keys()
    with pytest.raises(InputError, match="holds a run: pass --resume"):
        start(config, out)
    with monkeypatch.context() as patch:
        patch.setattr("mqa_gpt.training.run.make_model", ends_with(InputError("no such ranks")))
        with pytest.raises(InputError, match="no such ranks"):
            start(config, out, resume=True)
    assert contents(out).items() >= before.items()
    start(config, out, resume=True)
    assert contents(out).items() >= before.items()
    assert (out / "model/model.safetensors").exists()


def test_a_run_that_could_not_begin_may_begin_with_other_settings(
    sources: Path, tmp_path: Path
) -> None:
    wrong = tiny_run(sources, run_steps=1, data_length=47, model_n_positions=46)
    with pytest.raises(InputError, match="must fit into the context"):
        start(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    start(tiny_run(sources, run_steps=1, tokenizer_vocab_size=300), tmp_path / "run")
    assert LLM.load(tmp_path / "run/model", device="cpu").tokenizer.vocab_size == 300


def test_the_last_checkpoints_and_the_best_one_are_kept(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    monkeypatch.setattr(
        "mqa_gpt.training.loop.mean_losses", lambda *_: {"loss": next(losses), "infilling": None}
    )
    config = tiny_run(sources, run_evaluate_every=2, run_save_every=2, run_keep=2)
    start(config, tmp_path / "run")
    kept = [folder.name for folder in checkpoints.complete(tmp_path / "run")]
    assert kept == ["step-00000004", "step-00000010", "step-00000012"]
    best = checkpoints.best(tmp_path / "run")
    assert best is not None
    assert best.name == "step-00000004"


def test_the_model_of_a_run_loads_here_and_in_transformers_with_its_tokenizer(
    sources: Path, tmp_path: Path
) -> None:
    start(tiny_run(sources, averaging_decay=0.8), tmp_path / "run")
    folder = tmp_path / "run/model"
    model = GPT.from_pretrained(folder, device="cpu")
    ids = random_ids(model.config, 2, 20)
    reference = GPTBigCodeForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert relative_error(model(ids), reference(ids).logits) < 5e-6
    average = last_tensors(tmp_path / "run")["average.transformer.h.0.attn.c_attn.weight"]
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, average)
    llm = LLM.load(folder, device="cpu")
    assert llm.infill("def f(x):", "\n", max_new_tokens=3).prompt_tokens > 3
    text = "def alpha_1(x, y):"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == llm.tokenizer.encode(text)
    assert model.config.eos_token_id == llm.tokenizer.end_of_text_id == 0


def test_a_run_may_start_from_the_weights_of_a_checkpoint(sources: Path, tmp_path: Path) -> None:
    start(tiny_run(sources), tmp_path / "first")
    config = tiny_run(sources, optimizer_lr=1e-12, run_steps=2)
    model = dataclasses.replace(
        config.model, pretrained=str(tmp_path / "first/model"), sizes={"resid_pdrop": 0.25}
    )
    start(dataclasses.replace(config, model=model), tmp_path / "second")
    first, second = (
        GPT.from_pretrained(tmp_path / f"{name}/model") for name in ("first", "second")
    )
    assert second.config.resid_pdrop == 0.25
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_run_needs_the_checkpoint_that_it_started_from_no_more(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_step: Any
) -> None:
    start(tiny_run(sources, run_steps=1), tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")
    config = tiny_run(sources, run_steps=4, run_save_every=2, run_evaluate_every=0)
    model = dataclasses.replace(config.model, pretrained="model", sizes={"resid_pdrop": 0.25})
    config = dataclasses.replace(config, model=model)
    start(config, tmp_path / "whole")
    before_step(3, fail)
    with pytest.raises(RuntimeError, match="had died"):
        start(config, tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    export_checkpoint(tmp_path / "second", tmp_path / "exported")
    assert GPT.from_pretrained(tmp_path / "exported").config.resid_pdrop == 0.25
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=5))
    train(
        longer, tmp_path / "branch", branch_from=tmp_path / "second", device="cpu", say=say_nothing
    )
    start(config, tmp_path / "second", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "second")
