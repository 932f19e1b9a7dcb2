"""`mqa_gpt.training.schedules`: the curves at the points that define them."""

from __future__ import annotations

import pytest

from mqa_gpt.errors import ConfigError
from mqa_gpt.training.schedules import ScheduleConfig


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_the_warm_up_grows_in_equal_steps_to_one(name: str) -> None:
    schedule = ScheduleConfig(name, warmup_steps=4)  # type: ignore[arg-type]
    rates = [schedule.learning_rate(step, 100) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("constant", 1, 1)]
)
def test_half_way_and_at_the_end(name: str, middle: float, end: float) -> None:
    schedule = ScheduleConfig(name, warmup_steps=20, final=0.2)  # type: ignore[arg-type]
    assert schedule.learning_rate(60, 100) == pytest.approx(middle)
    assert schedule.learning_rate(100, 100) == pytest.approx(end)
    assert schedule.learning_rate(1000, 100) == pytest.approx(end)


def test_a_cosine_is_flat_at_both_ends() -> None:
    schedule = ScheduleConfig("cosine", warmup_steps=0, final=0.0)
    first, second = schedule.learning_rate(0, 1000), schedule.learning_rate(1, 1000)
    assert first == 1
    assert 1 - second < 1e-5
    assert schedule.learning_rate(250, 1000) == pytest.approx(0.8535534)


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    schedule = ScheduleConfig("wsd", warmup_steps=10, final=0.0, decay_share=0.2)
    rates = [schedule.learning_rate(step, 100) for step in (10, 50, 80, 90, 100)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0])


def test_a_run_shorter_than_its_warm_up_ends_inside_it() -> None:
    schedule = ScheduleConfig(warmup_steps=100)
    assert schedule.learning_rate(9, 10) == pytest.approx(0.1)


def test_the_weight_decay_follows_a_straight_line() -> None:
    schedule = ScheduleConfig(weight_decay_final=0.2)
    values = [schedule.weight_decay(step, 100) for step in (0, 50, 100)]
    assert values == pytest.approx([1, 0.6, 0.2])
    assert ScheduleConfig().weight_decay(77, 100) == 1


@pytest.mark.parametrize("key", ["final", "decay_share", "weight_decay_final", "warmup_steps"])
def test_a_number_out_of_range_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is -1"):
        ScheduleConfig(**{key: -1})  # type: ignore[arg-type]
