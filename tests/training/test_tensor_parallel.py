"""Layers shared out over ranks, by gloo: the losses, weights and tokens of one rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mqa_gpt import GPT, generate
from mqa_gpt.errors import InputError
from mqa_gpt.training import checkpoints
from mqa_gpt.training.parallel import whole, world
from mqa_gpt.training.tensor_parallel import divide, fused, tensor_parallel
from tests.helpers import random_ids, relative_error, tiny_model
from tests.training.runs import NO_DROPOUT, last_tensors, start, tiny_run, write_sources
from tests.training.test_parallel import SHORT, assert_close_runs, interrupted, on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def sizes(multi_query: bool) -> dict[str, Any]:
    """Of a model whose heads four ranks can share."""
    return {"n_head": 4, "n_inner": 136, "multi_query": multi_query}


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_logits_and_gradients_are_those_of_one_rank(size: int, multi_query: bool) -> None:
    on_ranks(size, compare, size, multi_query)


def compare(size: int, multi_query: bool) -> None:
    """One forward and backward pass, next to that of an undivided copy."""
    model, alone = (tiny_model(**sizes(multi_query)).train() for _ in range(2))
    ids = random_ids(model.config, 3, 17)
    with world("cpu", size) as ranks:
        assert ranks.tensor_mesh is not None
        assert (ranks.size, ranks.ranks) == (1, size)
        tensor_parallel(model, ranks.tensor_mesh)
        logits, expected = model(ids), alone(ids)
        assert relative_error(logits, expected) < 1e-5
        for found in (logits, expected):
            found.logsumexp(-1).mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        joined = fused(gradients, model.config)
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            assert relative_error(whole(joined[name]), parameter.grad) < 1e-4, name


def test_greedy_tokens_are_those_of_one_rank() -> None:
    on_ranks(2, compare_tokens)


def compare_tokens() -> None:
    """Generation with a cache, next to that of an undivided copy."""
    model, alone = (tiny_model(**sizes(True)) for _ in range(2))
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (3, 11)]
    with world("cpu", 2) as ranks:
        assert ranks.tensor_mesh is not None
        tensor_parallel(model, ranks.tensor_mesh)
        assert generate(model, prompts, 24) == generate(alone, prompts, 24)


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_has_the_losses_of_one_rank(size: int, sources: Path, tmp_path: Path) -> None:
    """Four ranks are two shares of the batch, each computed by two."""
    # No dropout: ranks that share heads draw the same mask for different heads.
    config = tiny_run(sources, optimizer_name="muon", averaging_decay=0.9, **NO_DROPOUT, **SHORT)
    start(config, tmp_path / "one")
    on_ranks(size, start, config, tmp_path / "many", False, 2)
    assert_close_runs(tmp_path / "one", tmp_path / "many")
    names = {name for name in last_tensors(tmp_path / "many") if name.startswith("model.")}
    assert names == {f"model.{name}" for name, _ in small_model(tmp_path).named_parameters()}


def small_model(folder: Path) -> GPT:
    return GPT.from_pretrained(folder / "many/model", device="cpu")


def test_a_run_is_resumed_with_other_ways_of_sharing(sources: Path, tmp_path: Path) -> None:
    config = tiny_run(sources, **NO_DROPOUT, **SHORT)
    start(config, tmp_path / "one")
    on_ranks(4, interrupted, config, tmp_path / "many", 3, 2)
    assert checkpoints.complete(tmp_path / "many")[-1].name == "step-00000002"
    on_ranks(2, start, config, tmp_path / "many", True, 2)
    assert_close_runs(tmp_path / "one", tmp_path / "many")
    on_ranks(2, interrupted, config, tmp_path / "other", 3, 1)
    on_ranks(4, start, config, tmp_path / "other", True, 4)
    assert_close_runs(tmp_path / "one", tmp_path / "other")


def test_what_is_joined_can_be_divided_again() -> None:
    config = dataclasses.replace(tiny_model().config, n_embd=6, n_head=3)
    parts = {
        f"exp_avg.h.0.attn.c_attn.{part}.weight": torch.randn(rows, 6)
        for part, rows in (("q", 6), ("k", 2), ("v", 2))
    }
    others = {"step.h.0.attn.c_attn.q.weight": torch.tensor(1.0), "model.wte.weight": torch.ones(2)}
    others |= {f"step.h.0.attn.c_attn.{part}.weight": torch.tensor(1.0) for part in "kv"}
    joined = fused(parts | others, config)
    assert joined.keys() == {
        *("exp_avg.h.0.attn.c_attn.weight", "step.h.0.attn.c_attn.weight", "model.wte.weight")
    }
    assert torch.equal(joined["exp_avg.h.0.attn.c_attn.weight"], torch.cat(list(parts.values())))
    for tensor in joined.values():
        tensor *= 2
    before = {name: tensor.clone() for name, tensor in (parts | others).items()}
    divide(joined, parts | others, config)
    for name, tensor in (parts | others).items():
        assert torch.equal(tensor, before[name] * (1 if "wte" in name else 2)), name


def test_ranks_that_do_not_divide_heads_or_width_are_refused() -> None:
    on_ranks(2, refused, {"n_head": 3}, "n_head is 3 and there are 2 tensor-parallel ranks")
    on_ranks(2, refused, {"n_head": 4, "n_inner": 135}, "n_inner is 135 and there are 2")


def refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model(**changes)
    with world("cpu", 2) as ranks:
        assert ranks.tensor_mesh is not None
        with pytest.raises(InputError, match=message):
            tensor_parallel(model, ranks.tensor_mesh)


def test_a_number_that_does_not_divide_the_ranks_is_refused() -> None:
    with (
        pytest.raises(InputError, match="tensor_parallel is 2 and there are 1 ranks"),
        world("cpu", 2),
    ):
        pass
