"""Timing several actions on a machine that may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from mqa_gpt.progress import status

Key = TypeVar("Key", bound=Hashable)


def take_turns(
    actions: Mapping[Key, Callable[[], object]],
    repeats: int,
    label: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Run all actions in turn, `repeats` times, and return the seconds of each.

    Taking turns gives every action the same share of a noisy machine's good and bad moments.

    Args:
        actions: key -> what to time. An action that returns a float has timed itself.
        label: what the status line calls the measurement.
        clock: the time in seconds.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in actions}
    with status() as say:
        for repeat in range(1, repeats + 1):
            for key, action in actions.items():
                name = " ".join(map(str, key)) if isinstance(key, tuple) else key
                say(f"{label}: round {repeat} of {repeats}, {name}")
                begin = clock()
                measured = action()
                elapsed = clock() - begin
                seconds[key].append(measured if isinstance(measured, float) else elapsed)
    return seconds
