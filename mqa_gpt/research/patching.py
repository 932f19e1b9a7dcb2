"""Activation patching: which layer at which position carries what makes two prompts differ.

A clean and a corrupted prompt differ in few tokens, and the model answers them differently. The
corrupted one runs again with one activation of the clean run put in its place; how much of the
answer comes back says how much that place carries (Vig et al. 2020; Meng et al. 2022, "Locating and
Editing Factual Associations in GPT"). Attribution patching estimates all places at once, to first
order, from one backward pass (Nanda 2023; Syed et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mqa_gpt.errors import InputError
from mqa_gpt.model import GPT
from mqa_gpt.research.lens import as_row
from mqa_gpt.research.patch import add, patch
from mqa_gpt.research.points import find_points
from mqa_gpt.research.record import record

RESIDUALS = "transformer.h.*.resid_pre"

SAME = 1e-5  # shares of an answer that differ by less are the same but for rounding

Metric = Callable[[Tensor], Tensor]  # logits (B, V) after the last token -> (B,)


@dataclass(frozen=True)
class Patching:
    """What patching restores.

    Attributes:
        restored: (L, T), 0 where a patch leaves the corrupted answer, 1 where it brings the clean
            one back.
        clean, corrupted: the metric of the two runs.
    """

    restored: Tensor
    clean: float
    corrupted: float


def logit_difference(token: int, against: int) -> Metric:
    """The metric that is usual: by how much one token's logit exceeds another's."""
    return lambda logits: logits[:, token] - logits[:, against]


@torch.no_grad()
def patch_positions(
    model: GPT,
    clean: Sequence[int],
    corrupted: Sequence[int],
    metric: Metric,
    point: str = RESIDUALS,
    *,
    batch_size: int = 32,
) -> Patching:
    """Put the clean activation into the corrupted run at each layer and position, one at a time.

    Args:
        clean, corrupted: token ids, equally many.
        metric: of the logits after the last token.
        point: a wildcard for layers at (B, T, C): the residual stream, attention or MLP outputs.
        batch_size: positions at a time, as rows of a batch.

    Raises:
        InputError: prompts of different lengths, prompts with the same answer, or another point.
    """
    values, clean_metric, wrong_metric = _both(model, clean, corrupted, metric, point)
    T, names = len(clean), [found.name for found in find_points(model, point)]
    row = torch.tensor([list(corrupted)], device=model.device)
    restored = torch.zeros(len(names), T)
    for layer, name in enumerate(names):
        for first in range(0, T, batch_size):
            places = torch.arange(first, min(first + batch_size, T), device=model.device)  # (B,)
            here = (torch.arange(T, device=model.device) == places[:, None])[..., None]  # (B, T, 1)
            put = partial(torch.where, here, values[layer])
            with patch(model, {name: put}):
                logits = _last_logits(model, row.expand(len(places), T))
            restored[layer, first : first + len(places)] = metric(logits).float().cpu()
    span = clean_metric - wrong_metric
    return Patching((restored - wrong_metric) / span, clean_metric, wrong_metric)


def attribute_positions(
    model: GPT,
    clean: Sequence[int],
    corrupted: Sequence[int],
    metric: Metric,
    point: str = RESIDUALS,
    *,
    steps: int = 1,
) -> Patching:
    """Estimate `patch_positions`, with its arguments, from gradients of the corrupted run.

    Args:
        steps: 1 takes the gradient at the corrupted run, a forward and a backward pass. More
            average it over as many points on the way to the clean prompt's embeddings (integrated
            gradients, Sundararajan et al. 2017), which is more accurate.

    Raises:
        InputError: as `patch_positions`.
    """
    values, clean_metric, wrong_metric = _both(model, clean, corrupted, metric, point)
    row = torch.tensor([list(corrupted)], device=model.device)
    with torch.no_grad():
        start, goal = (
            model.transformer.wte(torch.tensor([list(ids)], device=model.device))
            for ids in (corrupted, clean)
        )
    estimate = torch.zeros(values.shape[0], len(clean))
    wrong: Tensor | None = None
    names = [found.name for found in find_points(model, point)]
    for step in range(steps):
        moved = (torch.lerp(start, goal, step / steps) - start).requires_grad_()
        with torch.enable_grad(), record(model, point) as acts:
            with patch(model, {"transformer.wte": add(moved)}):
                reached = metric(_last_logits(model, row)).sum()
            layers = [acts[name] for name in names]  # (1, T, C) each
            gradients = torch.autograd.grad(reached, layers)  # of nothing else: weights have theirs
        wrong = torch.stack(layers).detach() if wrong is None else wrong  # (L, 1, T, C)
        share = ((values - wrong) * torch.stack(gradients)).sum(-1)  # (L, 1, T)
        estimate += share[:, 0].float().cpu() / steps
    return Patching(estimate / (clean_metric - wrong_metric), clean_metric, wrong_metric)


def agreement(truth: Patching, estimate: Patching) -> float | None:
    """The correlation of what two ways of patching restore, over all layers and positions.

    Returns:
        Pearson's r, or None where one of the two restores the same everywhere but for rounding. So
        it is with residual streams in prompts of one token: each layer's decides the answer alone.
    """
    both = torch.stack([truth.restored.flatten(), estimate.restored.flatten()])  # (2, LT)
    if (both.amax(1) - both.amin(1)).min() < SAME:
        return None
    return torch.corrcoef(both)[0, 1].item()


def _both(
    model: GPT, clean: Sequence[int], corrupted: Sequence[int], metric: Metric, point: str
) -> tuple[Tensor, float, float]:
    """The clean values (L, 1, T, C), and both metrics."""
    if len(clean) != len(corrupted):
        raise InputError(
            f"the prompts have {len(clean)} and {len(corrupted)} tokens: patching compares them "
            "position by position, so they must be equally long"
        )
    if any(found.axes != "BTC" for found in find_points(model, point)):
        raise InputError(f"{point} is not of shape (B, T, C): take residual streams or sublayers")
    with torch.no_grad():
        with record(model, point) as acts:
            right = metric(_last_logits(model, as_row(model, list(clean)))).item()
        wrong = metric(_last_logits(model, as_row(model, list(corrupted)))).item()
    if right == wrong:
        raise InputError("the metric is the same for both prompts: there is nothing to restore")
    return acts[point], right, wrong


def _last_logits(model: GPT, ids: Tensor) -> Tensor:
    last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
    return model(ids, logits_at=last)  # (B, V)
