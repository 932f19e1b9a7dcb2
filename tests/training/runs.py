"""Tiny runs: a folder of made-up sources, and the config of a model that learns it in seconds."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from mqa_gpt.training import checkpoints, speed
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.log import read_log
from mqa_gpt.training.run import train

# Each rank measures the processor first, which would take half the time of a run as small as these.
speed.PROBE_SIZE = 64

NO_DROPOUT = {f"model_{name}_pdrop": 0.0 for name in ("attn", "embd", "resid")}

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def write_sources(folder: Path, files: int = 24) -> Path:
    """A folder of small Python files, no two alike."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        functions = (
            f"def {rng.choice(WORDS)}_{j}(x, y):\n"
            f"    {rng.choice(WORDS)} = x * {rng.randrange(100)}\n"
            f"    return {rng.choice(WORDS)} + y\n\n\n"
            for j in range(12)
        )
        (folder / f"module_{i}.py").write_text("".join(functions))
    return folder


def tiny_run(sources: Path, **changes: Any) -> RunConfig:
    """The config of a run of 12 steps, evaluated and saved after 4, 8 and 12.

    Args:
        changes: settings as "section_key", such as run_steps=3.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {
            "n_positions": 48,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 40,
            "initializer_range": 0.1,
        },
        "data": {"sources": [str(sources)], "held_out": ["module_1*"], "length": 40},
        "tokenizer": {"vocab_size": 290},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 3},
        "averaging": {},
        "run": {
            "steps": 12,
            "batch_size": 8,
            "micro_batch_size": 2,
            "evaluate_every": 4,
            "evaluate_samples": 8,
            "save_every": 4,
        },
    }
    for name, value in changes.items():
        section, key = name.split("_", 1)
        values[section][key] = value
    return RunConfig.from_dict(values)


def say_nothing(text: str) -> None:
    """For `train`."""


def start(
    config: RunConfig,
    out: Path,
    resume: bool = False,
    tensor_parallel: int = 1,
    branch_from: Path | None = None,
) -> None:
    """A run on the CPU that says nothing."""
    train(
        config,
        out,
        resume=resume,
        branch_from=branch_from,
        device="cpu",
        tensor_parallel=tensor_parallel,
        say=say_nothing,
    )


def last_tensors(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint."""
    folder = checkpoints.complete(run)[-1]
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def results(run: Path) -> list[dict[str, Any]]:
    """The log of a run without what depends on the clock and on interruptions."""
    timed = ("tokens_per_second", "mfu", "mfu_causal")
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in read_log(run)
        if record["kind"] not in ("start", "event")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, weights, moments and averages of two runs are the same, bit for bit."""
    assert results(one) == results(other)
    mine, its = last_tensors(one), last_tensors(other)
    assert mine.keys() == its.keys()
    assert [name for name in mine if not torch.equal(mine[name], its[name])] == []
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name
