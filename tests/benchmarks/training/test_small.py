"""benchmarks/training/small.py: what the experiments share."""

from __future__ import annotations

import pytest

from benchmarks.training.small import steps_to_reach


def test_the_steps_to_reach_a_loss_lie_between_the_lengths_around_it() -> None:
    tried = {100: 4.0, 200: 2.0}
    assert steps_to_reach(2.0, tried) == pytest.approx(200)
    assert steps_to_reach(8**0.5, tried) == pytest.approx(100 * 2**0.5)


def test_the_shortest_run_may_reach_it_and_the_longest_may_not() -> None:
    tried = {100: 4.0, 200: 2.0}
    assert steps_to_reach(5.0, tried) == 100
    assert steps_to_reach(1.9, tried) is None
