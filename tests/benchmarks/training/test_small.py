"""benchmarks/training/small.py: what the experiments share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.training.small import add_sizes, result_file, run_config, steps_to_reach


def test_the_dtype_is_that_of_the_run_and_in_the_name_of_its_result() -> None:
    parser = argparse.ArgumentParser()
    add_sizes(parser, steps=3)
    names = []
    for dtype in ("float32", "bfloat16"):
        options = parser.parse_args(["--work", "x", "--dtype", dtype, "--device", "cpu"])
        options.output = None
        assert run_config(options).run.dtype == dtype
        names.append(result_file(options, "some").name)
    assert names == ["training_some_cpu.json", "training_some_cpu_bfloat16.json"]
    options.output = Path("benchmarks/out/other.json")
    assert result_file(options, "some") == options.output


def test_the_steps_to_reach_a_loss_lie_between_the_lengths_around_it() -> None:
    tried = {100: 4.0, 200: 2.0}
    assert steps_to_reach(2.0, tried) == pytest.approx(200)
    assert steps_to_reach(8**0.5, tried) == pytest.approx(100 * 2**0.5)


def test_the_shortest_run_may_reach_it_and_the_longest_may_not() -> None:
    tried = {100: 4.0, 200: 2.0}
    assert steps_to_reach(5.0, tried) == 100
    assert steps_to_reach(1.9, tried) is None
