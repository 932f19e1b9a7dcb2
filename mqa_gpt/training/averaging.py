"""An exponential average of the weights, for a model better than its last step's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mqa_gpt.errors import ConfigError, require_number


@dataclass(frozen=True)
class AveragingConfig:
    """Whether the weights are averaged.

    Attributes:
        decay: what each step leaves of the average; it reaches back about 1 / (1 - decay) steps.
            0 keeps none.

    Raises:
        ConfigError: a number out of range.
    """

    decay: float = 0.0

    def __post_init__(self) -> None:
        require_number(ConfigError, "decay", self.decay, "from 0 to below 1", lambda x: 0 <= x < 1)


class WeightAverage:
    """The exponential average of a model's parameters after each step; tied ones are kept once.

    Like Adam's means it starts from nothing and is corrected for that: the k-th update leaves
    decay (1 - decay^(k-1)) / (1 - decay^k) of the average, so the random weights that training
    began with have no part in it. (`torch.optim.swa_utils.AveragedModel` copies the whole model,
    which a sharded one does not allow.)

    Args:
        model: sharded or not.
        decay: as in `AveragingConfig`, above 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of one more step into the average."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)  # 1 at first
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter.detach(), share)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the average as its weights inside the block, and its own after it."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            own = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(own)
