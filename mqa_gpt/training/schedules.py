"""Learning rate and weight decay as functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mqa_gpt.errors import ConfigError, require_int, require_number


@dataclass(frozen=True)
class ScheduleConfig:
    """How learning rate and weight decay change over a run of a known number of steps.

    The defaults are StarCoder's: 2,000 steps of warm-up, then a cosine to a tenth.

    Attributes:
        name: the shape after the warm-up. "cosine" and "linear" fall from 1 to `final`; "wsd"
            (warm-up, stable, decay: Hu et al. 2024) stays at 1 and falls linearly over the last
            `decay_share` of all steps; "constant" stays.
        warmup_steps: of linear growth to 1, beginning with 1 / warmup_steps.
        final: what is left of the learning rate at the end.
        decay_share: of all steps, for "wsd".
        weight_decay_final: what is left of the weight decay at the end of a straight line; 1 keeps
            it constant, 0 ends without any.

    Raises:
        ConfigError: a number out of range.
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 2000
    final: float = 0.1
    decay_share: float = 0.2
    weight_decay_final: float = 1.0

    def __post_init__(self) -> None:
        require_int(ConfigError, "warmup_steps", self.warmup_steps, 0)
        for key in ("final", "decay_share", "weight_decay_final"):
            value = getattr(self, key)
            require_number(ConfigError, key, value, "from 0 to 1", lambda x: 0 <= x <= 1)

    def learning_rate(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied by in step `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        start = self.warmup_steps
        if self.name == "wsd":
            start = max(start, steps - round(self.decay_share * steps))
        done = min(max(step - start, 0) / max(steps - start, 1), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.name == "cosine" else 1 - done
        return self.final + (1 - self.final) * left

    def weight_decay(self, step: int, steps: int) -> float:
        """What the weight decay is multiplied by in step `step` (from 0) of `steps`."""
        return 1 + (self.weight_decay_final - 1) * min(step / steps, 1.0)
