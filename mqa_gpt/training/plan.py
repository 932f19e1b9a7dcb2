"""What a run will take, before it is started: sizes, memory, data, and a few timed steps."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mqa_gpt.errors import InputError
from mqa_gpt.machine import available_memory, peak_memory
from mqa_gpt.progress import duration_text
from mqa_gpt.training.checks import notes, require_runnable
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.data import load_data
from mqa_gpt.training.loop import Trainer
from mqa_gpt.training.model import make_model, model_config
from mqa_gpt.training.parallel import World, world
from mqa_gpt.training.speed import speed_of

TIMED_STEPS = 3  # after one that warms up


@dataclass(frozen=True)
class Plan:
    """What a run will take on this device, by one rank.

    Attributes:
        parameters: that are trained.
        state_bytes: of weights, gradients, moments and averaged weights, in float32.
        peak_bytes: most memory of the process, or of its GPU, in the timed steps; None if there
            were none, or if the system does not tell.
        steps, tokens: of the whole run.
        epochs: how often the run reads its documents.
        seconds_per_step: median of the timed steps; None, as all below, if the state does not fit
            into memory.
        tokens_per_second, mfu: in these.
        seconds: of all steps, without held-out losses and checkpoints.
    """

    parameters: int
    state_bytes: int
    peak_bytes: int | None
    steps: int
    tokens: int
    epochs: float
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """A line for each."""
        memory = f"{self.state_bytes / 1e9:,.2f} GB of weights, gradients, moments and averages"
        if self.peak_bytes is not None:
            memory += f"; {self.peak_bytes / 1e9:,.2f} GB at the peak of the timed steps"
        lines = [
            f"parameters   {self.parameters:,}",
            f"memory       {memory}",
            f"steps        {self.steps:,}",
            f"tokens       {self.tokens:,}, {self.epochs:.1f} epochs",
        ]
        if self.seconds_per_step is None:
            lines.append("time         not measured: the run does not fit into memory here")
        else:
            lines += [
                f"speed        {self.seconds_per_step:.3f} s a step, "
                f"{self.tokens_per_second:,.0f} tok/s, MFU {self.mfu:.0%}",
                f"time         {duration_text(self.seconds or 0)}, and that of evaluation",
            ]
        return "\n".join(lines)


def plan_run(
    config: RunConfig, *, device: str | None = None, say: Callable[[str], None] = print
) -> Plan:
    """Prepare a run in a temporary folder, take a few steps in this process, and leave nothing.

    Args:
        device: as in `train`.
        say: gets what is worth saying about the data.

    Raises:
        InputError: as `train`; or torchrun has started several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a dry run takes one process: start it without torchrun")
    with world(device) as ranks, tempfile.TemporaryDirectory() as folder:
        return _plan(config, Path(folder), ranks, say)


def _plan(config: RunConfig, folder: Path, ranks: World, say: Callable[[str], None]) -> Plan:
    run = config.run
    require_runnable(config, ranks)
    data = load_data(config, folder, say)
    sizes = model_config(config, data.tokenizer)
    per_parameter = 4 + 4 + (4 if config.optimizer.name == "muon" else 8)
    per_parameter += 4 if config.averaging.decay else 0
    least = Plan(
        parameters=sizes.parameters,
        state_bytes=per_parameter * sizes.parameters,
        peak_bytes=None,
        steps=run.steps,
        tokens=run.steps * run.batch_size * config.data.length,
        epochs=run.steps * run.batch_size / len(data.training),
    )
    available = available_memory(ranks.device)
    if available is not None and least.state_bytes > available:
        return least

    for note in notes(config, data.training):
        say(f"note: {note}")
    model = make_model(config, data.tokenizer, ranks.device)
    trainer = Trainer(config, model, data.training, data.held_out, ranks)
    steps = [trainer.step(batches) for batches in islice(trainer.batches(), 1 + TIMED_STEPS)]
    seconds = statistics.median(step.seconds for step in steps[-TIMED_STEPS:])
    rate = statistics.median(step.tokens / step.seconds for step in steps[-TIMED_STEPS:])
    speed = speed_of(sizes, config.data.length, ranks.device, run.dtype)
    tensors = trainer.tensors()
    return Plan(
        **{
            **least.to_dict(),
            "state_bytes": 4 * sizes.parameters + sum(t.nbytes for t in tensors.values()),
            "peak_bytes": peak_memory(ranks.device),
            "seconds_per_step": seconds,
            "tokens_per_second": rate,
            "mfu": speed.utilisation(rate)["mfu"],
            "seconds": seconds * run.steps,
        }
    )
