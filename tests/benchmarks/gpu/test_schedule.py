"""benchmarks/gpu/schedule.py: the simulation of scheduling, and the steps that it is given."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.gpu import schedule
from benchmarks.gpu.schedule import (
    combine_seconds,
    dkv_steps,
    efficiency,
    forward_steps,
    simulate,
    step_rate,
    waves,
)


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_equal_programs_that_divide_evenly_are_fully_efficient(rounds: int):
    assert efficiency([3.0] * 132 * rounds, 132) == pytest.approx(1.0)
    assert waves(132 * rounds, 132) == (rounds, 1.0)


def test_one_program_too_many_takes_another_wave():
    assert simulate([5.0] * 265, 264) == 10
    assert efficiency([5.0] * 265, 264) == pytest.approx(265 / 528)
    assert waves(265, 264) == (2, pytest.approx(1 / 264))


def test_programs_start_in_order_wherever_a_place_is_free():
    # Two places: 4 and 1, then 1 after the 1, then 5 after that.
    assert simulate([4, 1, 1, 5], 2) == 7
    assert simulate([5, 4, 1, 1], 2) == 6  # the longest first


def test_it_is_never_faster_than_the_work_or_the_longest_program():
    for costs in itertools.permutations([7, 5, 3, 2, 2, 1]):
        for places in (1, 2, 3, 10):
            least = max(sum(costs) / places, max(costs))
            assert least <= simulate(costs, places) <= sum(costs) / places + max(costs)


def test_programs_that_share_a_bandwidth_take_as_long_as_their_sum():
    # However many run at once, together they do 10 steps per second.
    assert simulate([4, 1, 3, 2], 2, lambda running: 10 / running) == pytest.approx(1.0)


def test_a_lone_program_is_limited_by_its_own_rate():
    # Together at most 10 steps per second, each at most 4: 2 s for both to do 4 / 2 / ...
    rate = step_rate(schedule.BANDWIDTH / 10, ahead=1)  # 10 steps per second of all programs
    assert rate(5) == pytest.approx(2)
    assert rate(1) == pytest.approx(10)
    alone = step_rate(1.0, ahead=2)
    assert alone(1) == pytest.approx(2 / schedule.LATENCY)
    busy = step_rate(1.0, ahead=1, compute=1.0)
    assert busy(1) == busy(132) == 1.0
    assert busy(264) == 0.5
    many_rows = step_rate(1.0, ahead=1, cached_bytes=schedule.CACHE_BANDWIDTH / 10 - 1)
    assert many_rows(5) == pytest.approx(2)


def test_combining_costs_more_with_more_splits_and_nothing_without():
    assert combine_seconds(rows=512, splits=1, D=128) == 0
    few, many = (combine_seconds(512, splits, 128) - schedule.LATENCY for splits in (8, 16))
    assert many == pytest.approx(2 * few)
    assert few >= 0.999 * 2 * 512 * 8 * 128 * 4 / schedule.CACHE_BANDWIDTH  # written, read


def visible(T: int, length: int, H: int, G: int) -> list[list[bool]]:
    """Which of the slots each folded row sees."""
    return [
        [slot <= length - T + row // (H // G) for slot in range(length)]
        for row in range(T * H // G)
    ]


SHAPES = [(1, 40, 4, 1, 16, 16), (20, 20, 3, 1, 16, 8), (9, 30, 6, 2, 4, 8), (17, 17, 5, 1, 8, 16)]


@pytest.mark.parametrize(("T", "length", "H", "G", "M", "N"), SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_forward_programs_take_the_blocks_that_their_rows_see(T, length, H, G, M, N, splits):
    seen = visible(T, length, H, G)
    blocks = []
    for tile in range(0, len(seen), M):
        rows = seen[tile : tile + M]
        blocks.append(sum(any(any(r[k : k + N]) for r in rows) for k in range(0, length, N)))
    steps = forward_steps([length] * 2, T, H, G, M, N, splits)
    one = len(blocks) * 2 * G
    assert len(steps) == one * splits
    for group in range(2 * G):
        for tile, expected in enumerate(reversed(blocks)):
            mine = steps[group * len(blocks) + tile :: one]
            assert sum(mine) == expected
            assert max(mine) == -(-expected // splits)


@pytest.mark.parametrize(("T", "length", "H", "G", "M", "N"), SHAPES[1:])
@pytest.mark.parametrize("splits", [1, 3])
def test_key_blocks_take_the_tiles_that_see_them(T, length, H, G, M, N, splits):
    seen = visible(T, T, H, G)
    steps = dkv_steps(2, T, H, G, M, N, splits)
    shape = -(-T // N), 2 * G, splits
    assert len(steps) == shape[0] * shape[1] * shape[2]
    for index, key in enumerate(range(0, T, N)):
        expected = sum(
            any(any(row[key : key + N]) for row in seen[tile : tile + M])
            for tile in range(0, len(seen), M)
        )
        of_block = steps[index * shape[1] * splits :][:splits]
        assert sum(of_block) == expected
        assert max(of_block) - min(of_block) <= 1


def test_long_key_blocks_first_keep_the_gpu_busy_in_training():
    """The order of dkv_kernel's grid, beside the one in which it is not the longest first."""
    for B, T in ((2, 8192), (8, 2048), (4, 4096), (32, 512)):
        splits = max(1, min(2 * 132 // (B * T // 128), T * 32 // (4 * 32), 64))
        steps = dkv_steps(B, T, 32, 1, 32, 128, splits)
        blocks = T // 128
        assert efficiency(steps, 132) > 0.96
        row_by_row = [steps[block * B + b] for b in range(B) for block in range(blocks)]
        if splits == 1:
            assert efficiency(row_by_row, 132) < 0.75


def test_a_long_row_among_short_ones_takes_twice_as_long_as_equal_shares_would():
    """Decoding in the 7B model: 32 heads, blocks of 64 keys, two of them loaded ahead."""
    lengths = [8192] + [512] * 15
    rate = step_rate(64 * 2 * 128 * 2, ahead=2)
    same_number = forward_steps(lengths, 1, 32, 1, 32, 64, splits=16)
    shares = [2] * (sum(lengths) // 128)  # of two blocks each, more of them in the long row
    assert sum(shares) == sum(same_number)
    ratio = simulate(same_number, 264, rate) / simulate(shares, 264, rate)
    assert ratio == pytest.approx(2, abs=0.2)
