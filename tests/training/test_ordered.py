"""Sums in a fixed order, and runs of the same bits on 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mqa_gpt.errors import InputError
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.ordered import TreeSum, tree_sum
from tests.training.runs import assert_same_run, start, tiny_run, write_sources
from tests.training.test_parallel import SHORT, interrupted, on_ranks


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_what_arrives_one_by_one_is_added_as_the_same_tree(count: int) -> None:
    parts = list(torch.randn(count, 1000, generator=torch.Generator().manual_seed(0)))
    sums = TreeSum()
    for part in parts:
        sums.add([part.clone(), 2 * part])
    one, double = sums.total()
    assert torch.equal(one, tree_sum(parts))
    assert torch.equal(double, 2 * one)


def test_a_number_that_is_no_power_of_two_is_added_too() -> None:
    sums = TreeSum()
    for i in range(7):
        sums.add([torch.tensor(float(i))])
    assert sums.total() == [torch.tensor(21.0)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_ordered_run_has_the_same_bits_on_1_2_and_4_ranks(name: str, tmp_path: Path) -> None:
    config = tiny_run(
        write_sources(tmp_path / "sources"),
        run_reduce="ordered",
        run_micro_batch_size=1,
        optimizer_name=name,
        averaging_decay=0.9,
        **SHORT,
    )
    start(config, tmp_path / "one")
    for size in (2, 4):
        on_ranks(size, start, config, tmp_path / str(size))
        assert_same_run(tmp_path / "one", tmp_path / str(size))
    on_ranks(4, interrupted, config, tmp_path / "4 then 2", 3)
    on_ranks(2, start, config, tmp_path / "4 then 2", True)
    assert_same_run(tmp_path / "one", tmp_path / "4 then 2")


@pytest.mark.slow
def test_three_ranks_are_refused(tmp_path: Path) -> None:
    config = tiny_run(
        write_sources(tmp_path / "sources"),
        run_reduce="ordered",
        run_batch_size=9,
        run_micro_batch_size=1,
    )
    on_ranks(3, refused, config, tmp_path / "run")


def refused(config: RunConfig, out: Path) -> None:
    with pytest.raises(InputError, match="there are 3 ranks: it takes 1, 2, 4, 8"):
        start(config, out)
