"""Checkpoints of a run: all or nothing, exact, and as many as are to be kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mqa_gpt.errors import CheckpointError
from mqa_gpt.training import checkpoints
from mqa_gpt.training.checkpoints import RunState, best, complete, load, save, tidy


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    return {"model.a": torch.full((3, 2), value), "step.a": torch.tensor(value)}


def write(run: Path, step: int, loss: float | None = None, keep: int = 9) -> Path:
    state = RunState(step=step, held_out=None if loss is None else (step, loss))
    return save(run, state, tensors(step), keep)


def names(run: Path) -> list[str]:
    return [folder.name for folder in complete(run)]


def test_tensors_and_state_are_read_back_exactly(tmp_path: Path) -> None:
    written = {"a": torch.randn(5, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7.0)}
    state = RunState(3, 1234, 5.5, 1, [0.1, 1 / 3], (2, 1 / 7))
    folder = save(tmp_path, state, written, 1)
    found = {name: torch.zeros_like(tensor) for name, tensor in written.items()}
    assert load(folder, found) == state
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None), (5, None)):
        write(tmp_path, step, loss, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    write(tmp_path, 6, 0.5, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_the_best_is_the_least_loss_that_was_measured_at_its_own_step(tmp_path: Path) -> None:
    assert best(tmp_path) is None
    write(tmp_path, 1, 2.0)
    save(tmp_path, RunState(step=2, held_out=(1, 0.1)), tensors(), 9)
    assert best(tmp_path) == tmp_path / "checkpoints/step-00000001"


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = save(tmp_path, RunState(step=1, tokens=5), tensors(9.0), 9)
    found = tensors()
    assert load(folder, found).tokens == 5
    assert torch.equal(found["model.a"], torch.full((3, 2), 9.0))
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000001"]


def test_a_failure_leaves_the_others_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", full)
    with pytest.raises(CheckpointError, match=r"of step 2 cannot be written .*make room there"):
        write(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    tidy(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_an_error_without_words_is_named_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(path: Path) -> None:
        raise OSError

    monkeypatch.setattr(checkpoints, "_sync", end)
    with pytest.raises(CheckpointError, match=r"cannot be written to .* \(OSError\)"):
        write(tmp_path, 2)


def test_a_damaged_one_or_one_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be loaded .*remove it"):
        load(folder, tensors() | {"model.b": torch.zeros(2)})
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be loaded"):
        load(folder, tensors())
