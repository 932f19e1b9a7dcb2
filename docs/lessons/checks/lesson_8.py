"""Checks of lesson 8: the first loss, the schedule, losses apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from checks import checker
from mqa_gpt.training.loss import IGNORED, TokenLoss
from mqa_gpt.training.objective import mean_losses
from mqa_gpt.training.packing import CONTEXT, LEFT_TO_RIGHT, MASKED, MIDDLE
from mqa_gpt.training.parallel import World
from mqa_gpt.training.samples import Batch
from mqa_gpt.training.schedules import ScheduleConfig


def _first_loss(f: Callable[..., Any]) -> str | None:
    for vocab_size in (512, 49_152):
        got, nats = f(vocab_size), math.log(vocab_size)
        if math.isclose(got, math.log2(vocab_size)):
            return (
                f"for V = {vocab_size:,} it gives {got:.3f}: these are bits; take the natural log"
            )
        if math.isclose(got, -nats):
            return f"for V = {vocab_size:,} it gives {got:.3f}: a loss is minus the log of 1/V"
        if not math.isclose(got, nats):
            return f"for V = {vocab_size:,} it gives {got:.3f}; -ln(1/V) is {nats:.3f}"
    return None


def _learning_rate(f: Callable[..., Any]) -> str | None:
    for steps, warmup, peak, final in ((100, 10, 1.0, 0.1), (30, 1, 3e-4, 0.0)):
        schedule = ScheduleConfig("linear", warmup_steps=warmup, final=final)
        for step in (0, warmup - 1, warmup, (warmup + steps) // 2, steps - 1):
            got = f(step, steps, warmup, peak, final)
            right = peak * schedule.learning_rate(step, steps)
            if math.isclose(got, right, rel_tol=1e-6):
                continue
            where = f"step {step} of {steps}, warmup {warmup}, peak {peak:g}, final {final:g}"
            hint = f"{where}: it gives {got:.4g}, and it should be {right:.4g}"
            if step == 0:
                return f"{hint}; warm-up begins with peak / warmup, not with 0"
            if step < warmup:
                return f"{hint}; the last step of the warm-up has the peak"
            if step == warmup:
                return f"{hint}; the way down begins at step `warmup`, with the peak"
            return f"{hint}; the way begins after the warm-up and ends at final * peak"
    return None


class _Given(nn.Module):
    """Stands in for a model: its losses are given."""

    def __init__(self, nats: torch.Tensor) -> None:
        super().__init__()
        self.nats = nats

    def forward(self, _: Batch) -> TokenLoss:
        return TokenLoss(self.nats.sum(), self.nats)


def _losses_apart(f: Callable[..., Any]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 50), (3, 41)):
        kinds = torch.randint(4, shape, generator=generator, dtype=torch.uint8)
        nats = torch.rand(shape, generator=generator).masked_fill(kinds == MASKED, 0.0)
        labels = torch.zeros(shape, dtype=torch.long).masked_fill(kinds == MASKED, IGNORED)
        batch = Batch(labels, labels, kinds, None)
        right = mean_losses(_Given(nats), [batch], World(0, 1, torch.device("cpu")))
        got = f(nats, kinds)
        if not isinstance(got, dict) or got.keys() != right.keys():
            return f"it gives {got!r}: return a dict with the keys {', '.join(right)}"
        for name, loss in right.items():
            if math.isclose(float(got[name]), loss, rel_tol=1e-5):
                continue
            if name == "loss" and math.isclose(float(got[name]), nats.mean().item(), rel_tol=1e-5):
                return "loss: labels that are MASKED are not learned; leave them out of the mean"
            context = nats[kinds == CONTEXT].mean().item()
            if name == "infilling" and math.isclose(float(got[name]), context, rel_tol=1e-5):
                return "infilling: these are prefixes and suffixes; take the kind MIDDLE"
            chosen = {"left_to_right": LEFT_TO_RIGHT, "infilling": MIDDLE}.get(name)
            total = nats.sum() if chosen is None else nats[kinds == chosen].sum()
            if math.isclose(float(got[name]), total.item(), rel_tol=1e-5):
                return f"{name}: this is the sum; divide it by the number of labels"
            return f"{name}: it gives {float(got[name]):.4f}, and it should be {loss:.4f}"
    return None


check = checker(
    first_loss=(_first_loss, "Every run of this vocabulary begins near this number."),
    learning_rate=(_learning_rate, 'This is the library\'s schedule "linear".'),
    losses_apart=(_losses_apart, "These are the three held-out losses in a run's log."),
)
