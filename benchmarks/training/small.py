"""Small models of the standard library's sources, trained in minutes: what the experiments share.

Each run is kept in the experiment's folder under the name of its settings, so that an experiment
that is started again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import device_name, positive, replacing, result_path
from mqa_gpt.model import GPT
from mqa_gpt.progress import progress
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.data import Data, load_data
from mqa_gpt.training.loop import Trainer
from mqa_gpt.training.parallel import World

SOURCES = ("python-standard-library",)
# The modules that are held out of the demo checkpoint's training too.
HELD_OUT = (
    "argparse.py", "asyncio/streams.py", "calendar.py", "configparser.py", "csv.py", "fractions.py",
    "graphlib.py", "heapq.py", "http/cookies.py", "json/decoder.py", "logging/handlers.py",
    "shlex.py", "tempfile.py", "textwrap.py",
)  # fmt: skip
NOT_THE_LIBRARY = (
    "*/site-packages/*", "*/dist-packages/*", "*/test/*", "*/tests/*", "*/idle_test/*",
    "*/pydoc_data/*", "encodings/*", "_sysconfigdata*",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """How one run went.

    Attributes:
        held_out: (step, nats per token) pairs; the last is of the whole run.
        seconds_per_step: mean over the run, evaluations left out.
    """

    held_out: list[tuple[int, float]]
    seconds_per_step: float

    @property
    def final(self) -> float:
        """The held-out loss at the end, nats per token."""
        return self.held_out[-1][1]


def add_sizes(parser: argparse.ArgumentParser, steps: int) -> None:
    """The options of an experiment with small models."""
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=positive, default=steps, help="of a full run")
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--vocabulary", type=positive, default=2048)
    parser.add_argument("--length", type=positive, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=positive, default=8, help="sequences per step")
    parser.add_argument("--held-out-sequences", type=positive, default=128, help="of a loss")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products"
    )
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--note", help="kept with the result: what else this machine was doing")


def result_file(options: argparse.Namespace, experiment: str) -> Path:
    """Where an experiment's result goes: --output, or a name that says device and dtype."""
    device = device_name(torch.device(options.device or "cpu"))
    dtype = "" if options.dtype == "float32" else f"_{options.dtype}"
    return result_path(options.output, f"training_{experiment}_{device}{dtype}.json")


def run_config(options: argparse.Namespace, **sections: dict[str, Any]) -> RunConfig:
    """A run on the standard library, read left to right, without dropout.

    Args:
        options: those of `add_sizes`.
        sections: settings that differ from these, such as run={"steps": 100}.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {
            "n_embd": options.width,
            "n_layer": options.layers,
            "n_head": options.heads,
            "n_positions": options.length,
            "initializer_range": round(options.width**-0.5, 4),
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "data": {
            "sources": SOURCES,
            "include": ["*.py"],
            "exclude": NOT_THE_LIBRARY,
            "held_out": HELD_OUT,
            "length": options.length,
            "infilling": {"rate": 0.0},
        },
        "tokenizer": {"vocab_size": options.vocabulary},
        "schedule": {"name": "linear", "warmup_steps": 50, "final": 0.0},
        "run": {
            "steps": options.steps,
            "batch_size": options.batch,
            "micro_batch_size": options.batch,
            "evaluate_samples": options.held_out_sequences,
            "dtype": options.dtype,
        },
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return RunConfig.from_dict(values)


def load(options: argparse.Namespace, config: RunConfig) -> Data:
    """The data of all runs of an experiment, made at the first call."""
    return load_data(config, options.work, print)


def train(
    name: str,
    config: RunConfig,
    data: Data,
    options: argparse.Namespace,
    start: GPT | None = None,
    evaluations: int = 20,
) -> tuple[GPT, Curve]:
    """A trained model and its curve: a new run, or that of an earlier call with this name.

    Args:
        name: of the run's files in the experiment's folder.
        start: a model to go on from; None for random weights, drawn by the run's seed.
        evaluations: held-out losses of a run, evenly spaced.
    """
    alone = World(0, 1, torch.device(options.device or "cpu"))
    torch.manual_seed(config.run.seed)
    model = start or GPT(config.model.gpt_config(vocab_size=data.tokenizer.vocab_size))
    model = model.to(alone.device)
    curve_file, weights_file = options.work / f"{name}.json", options.work / f"{name}.pt"
    if curve_file.exists():
        model.load_state_dict(torch.load(weights_file, map_location=alone.device))
        kept = json.loads(curve_file.read_text())
        return model, Curve([(step, loss) for step, loss in kept[0]], kept[1])

    trainer = Trainer(config, model, data.training, data.held_out, alone)
    every = max(1, config.run.steps // evaluations)
    held_out: list[tuple[int, float]] = []
    with progress(config.run.steps, "step") as show:
        for batches in trainer.batches():
            step = trainer.step(batches)
            done = trainer.state.step
            show(done, f"{name}, loss {step.loss:.3f}")
            if done % every == 0 or done == config.run.steps:
                loss = trainer.evaluate()["loss"]
                assert loss is not None
                held_out.append((done, loss))
    curve = Curve(held_out, trainer.state.seconds / config.run.steps)
    print(f"{name}: {curve.final:.4f}, {curve.seconds_per_step:.3f} s per step", flush=True)
    torch.save(model.state_dict(), weights_file)
    with replacing(curve_file) as part:
        part.write_text(json.dumps([curve.held_out, curve.seconds_per_step]))
    return model.eval(), curve


def steps_to_reach(loss: float, tried: dict[int, float]) -> float | None:
    """How many steps a run must be planned for to end at a loss.

    Args:
        loss: to be reached.
        tried: final loss by number of steps, of runs each with its own whole schedule; between them
            log loss is taken as linear in log steps.

    Returns:
        The number, the smallest tried one if that reaches the loss, or None if none does.
    """
    lengths = sorted(tried)
    if tried[lengths[0]] <= loss:
        return lengths[0]
    for short, long in pairwise(lengths):
        if tried[long] <= loss < tried[short]:
            done = math.log(tried[short] / loss) / math.log(tried[short] / tried[long])
            return short * (long / short) ** done
    return None
