"""Section of gpu_report.py: a training step, its loss against transformers' and its MFU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_kernels import TINY, Row, each, shallow
from gpu_models import seconds_of

from benchmarks.training_step import OURS, THEIRS, make_step
from mqa_gpt import GPTConfig
from mqa_gpt.machine import peak_memory
from mqa_gpt.training.speed import speed_of

BACKENDS = ("triton", "sdpa")
LENGTHS = (2048, 8192)  # tokens of a sequence; a batch is one
STEPS = 3  # whose losses are compared
CLOSE = 1e-5  # relative, between float32 losses that are summed in different orders


def training(device: torch.device) -> Iterator[Row]:
    """Losses of some steps against transformers'; then time, memory and MFU of a step."""
    gpu = device.type == "cuda"
    lengths = LENGTHS if gpu else (16,)
    config = trained(GPTConfig.preset("starcoderbase-1b") if gpu else TINY)
    models = [(name, trained(shape), 512 if gpu else 16) for name, shape in shallow(device).items()]
    models.append(("starcoderbase-1b, all layers", config, lengths[-1]))
    yield from each(
        ({"model": name, "check": "losses", "tokens": T}, partial(check_losses, shape, T, device))
        for name, shape, T in models
    )
    cases = (
        ({"backend": backend, "tokens": T, "recompute": again},
         partial(step_speed, config, T, device, backend, again))
        for T, again, backend in product(lengths, (False, True), BACKENDS)
    )  # fmt: skip
    yield from each(cases, may_refuse=True)


def trained(config: GPTConfig) -> GPTConfig:
    """Without dropout, which the two models would draw differently."""
    return replace(config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def random_ids(config: GPTConfig, T: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, T + 1), generator=generator).to(device)


def check_losses(config: GPTConfig, T: int, device: torch.device) -> Row:
    """Losses of the first float32 steps: after an optimizer step they depend on gradients too."""
    ids = random_ids(config, T, device)
    losses: dict[str, list[float]] = {}
    for name in (OURS, THEIRS):
        step = make_step(name, config, ids, torch.float32)
        losses[name] = [step() for _ in range(STEPS)]
    error = max(
        abs(ours / theirs - 1) for ours, theirs in zip(losses[OURS], losses[THEIRS], strict=True)
    )
    return {"passed": error <= CLOSE, "error_of_loss": error, "losses": losses}


def step_speed(
    config: GPTConfig, T: int, device: torch.device, backend: str, recompute: bool
) -> Row:
    """A step under bfloat16 autocast: forward and backward pass, clipping, AdamW."""
    ids = random_ids(config, T, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = make_step(OURS, config, ids, torch.bfloat16, backend=backend, recompute=recompute)
    loss: Any = step()
    seconds = seconds_of(step)
    used = speed_of(config, T, device, "bfloat16").utilisation(T / seconds)
    return {
        "loss": loss,
        "step_ms": seconds * 1e3,
        "tokens_per_s": T / seconds,
        "peak_gb": (peak_memory(device) or 0) / 1e9,
    } | used
