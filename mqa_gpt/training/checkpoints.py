"""Checkpoints of a run: complete or not there at all, and exact.

A checkpoint is a folder `RUN/checkpoints/step-00000200` with the tensors in the files of
`torch.distributed.checkpoint`, which any number of ranks can read, and `state.json`. It is written
under a temporary name, synced to the disk, and renamed: a process that is killed at any moment
leaves the checkpoints it had.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from mqa_gpt.errors import CheckpointError
from mqa_gpt.training.parallel import on_first

FOLDER, STATE_FILE, UNFINISHED = "checkpoints", "state.json", ".unfinished-"


@dataclass
class RunState:
    """What a run knows besides tensors. The position in the data, the learning rate and the seeds
    of dropout follow from `step`.

    Attributes:
        step: optimizer steps that are done, skipped ones included.
        tokens: predicted so far.
        seconds: of training so far, without evaluation.
        skipped: steps whose gradient was not used.
        grad_norms: of the last good steps, for telling a spike.
        held_out: the last held-out loss, and the step it is of.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    grad_norms: list[float] = field(default_factory=list)
    held_out: tuple[int, float] | None = None


def save(run: Path, state: RunState, tensors: Mapping[str, Tensor], keep: int) -> Path:
    """Write a checkpoint; every rank calls this with its part of the tensors.

    Args:
        run: folder of the run, which all ranks see.
        tensors: by name; tensors or DTensors.
        keep: number of latest checkpoints that stay, besides the best by held-out loss.

    Raises:
        CheckpointError: it cannot be written; those that exist are untouched.
    """
    folder = run / FOLDER / f"step-{state.step:08d}"
    temporary = folder.with_name(UNFINISHED + folder.name)

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        for path in (temporary / STATE_FILE, temporary):
            _sync(path)
        if folder.exists():  # of the same step, before it was resumed
            _remove(folder)
        temporary.rename(folder)
        _sync(folder.parent)
        _retain(run, keep)

    try:
        on_first(begin)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ", UserWarning)
            state_dict_saver.save(
                dict(tensors), checkpoint_id=temporary, no_dist=not dist.is_initialized()
            )
        on_first(finish)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"the checkpoint of step {state.step} cannot be written to {folder.parent} "
            f"({_reason(error)}): make room there and resume the run"
        ) from None
    return folder


def load(folder: Path, tensors: Mapping[str, Tensor]) -> RunState:
    """Read a checkpoint into the given tensors, of any number of ranks; returns its state.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model or optimizer.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ", UserWarning)
            state_dict_loader.load(
                dict(tensors), checkpoint_id=folder, no_dist=not dist.is_initialized()
            )
        return read_state(folder)
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({_reason(error)}): remove it to resume from the one before"
        ) from None


def read_state(folder: Path) -> RunState:
    """The part of a checkpoint that is not tensors."""
    values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    held_out = values.pop("held_out")
    return RunState(**values, held_out=None if held_out is None else tuple(held_out))


def complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def best(run: Path) -> Path | None:
    """The checkpoint with the least held-out loss, among those whose step was evaluated."""
    losses = {}
    for folder in complete(run):
        state = read_state(folder)
        if state.held_out is not None and state.held_out[0] == state.step:
            losses[folder] = state.held_out[1]
    return min(losses, key=lambda folder: losses[folder], default=None)


def tidy(run: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in (run / FOLDER).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _retain(run: Path, keep: int) -> None:
    for folder in set(complete(run)[:-keep]) - {best(run)}:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that it is never seen in part."""
    doomed = folder.with_name(f"{UNFINISHED}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _reason(error: BaseException) -> str:
    """In one line: that of a rank's exception ends with its message, after a traceback."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
