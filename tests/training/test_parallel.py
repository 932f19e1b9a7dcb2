"""Many ranks on one machine, by gloo: the same losses and weights as one rank, and checkpoints that
any number of ranks can read.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training import checkpoints
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.loop import Trainer
from mqa_gpt.training.model import make_model
from mqa_gpt.training.objective import Objective
from mqa_gpt.training.parallel import PATIENCE, FirstRankError, shard, world
from mqa_gpt.training.plan import plan_run
from mqa_gpt.training.run import train
from mqa_gpt.training.signals import RunInterruptedError
from tests.helpers import SPECIALS, byte_tokenizer, relative_error
from tests.training.runs import (
    assert_same_run,
    last_tensors,
    results,
    say_nothing,
    start,
    tiny_run,
    write_sources,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function on ranks as torchrun starts them; fails if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    errors: Any = context.Queue()

    def run(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        os.environ |= {key: str(value) for key, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            function(*arguments)
        except BaseException:
            errors.put(f"rank {rank}: {traceback.format_exc()}")
            raise SystemExit(1) from None

    children = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    for child in children:
        child.kill()
    assert errors.empty(), errors.get()
    assert [child.exitcode for child in children] == [0] * size


SHORT = {
    **{"run_steps": 5, "run_evaluate_every": 3, "run_save_every": 2},
    # So large that Adam does not blow up rounding, and that a decay of none would be seen.
    **{"optimizer_eps": 1e-2, "optimizer_weight_decay": 0.5},
}


def assert_close_runs(one: Path, other: Path) -> None:
    """Losses and weights are the same but for rounding, the checkpoints' tensors of one shape."""
    for mine, its in zip(results(one), results(other), strict=True):
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            if isinstance(value, float):
                assert its[key] == pytest.approx(value, rel=1e-3), key
            else:
                assert its[key] == value
    mine, its = last_tensors(one), last_tensors(other)
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        assert tensor.shape == its[name].shape, name
        if name.startswith(("model.", "average.")):
            assert relative_error(its[name], tensor) < 1e-4, name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_ranks_compute_the_losses_and_weights_of_one(
    size: int, name: str, sources: Path, tmp_path: Path
) -> None:
    config = tiny_run(sources, optimizer_name=name, averaging_decay=0.9, **SHORT)
    start(config, tmp_path / "one")
    on_ranks(size, start, config, tmp_path / "many")
    assert_close_runs(tmp_path / "one", tmp_path / "many")


def test_the_gradients_of_ranks_are_those_of_one(sources: Path, tmp_path: Path) -> None:
    config = tiny_run(sources, run_steps=1, run_clip=0.0)
    start(config, tmp_path / "one")
    on_ranks(4, start, config, tmp_path / "many")
    mine, its = last_tensors(tmp_path / "one"), last_tensors(tmp_path / "many")
    for name, tensor in mine.items():
        if name.startswith("exp_avg."):
            assert relative_error(its[name], tensor) < 1e-5 or tensor.abs().max() < 1e-8, name


def test_the_ranks_of_a_resumed_run_may_be_fewer_or_more(sources: Path, tmp_path: Path) -> None:
    config = tiny_run(sources, optimizer_name="muon", averaging_decay=0.9, **SHORT)
    start(config, tmp_path / "one")
    for before, after in ((4, 2), (2, 1), (1, 4)):
        out = tmp_path / f"{before} then {after}"
        on_ranks(before, interrupted, config, out, 3)
        on_ranks(after, start, config, out, True)
        assert_close_runs(tmp_path / "one", out)


def test_a_resumed_run_on_as_many_ranks_has_the_same_bits(sources: Path, tmp_path: Path) -> None:
    config = tiny_run(sources, optimizer_name="muon", averaging_decay=0.9, **SHORT)
    on_ranks(2, start, config, tmp_path / "whole")
    on_ranks(2, interrupted, config, tmp_path / "broken", 3)
    on_ranks(2, start, config, tmp_path / "broken", True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(sources: Path, tmp_path: Path) -> None:
    on_ranks(2, signalled, tiny_run(sources), tmp_path / "run")
    assert checkpoints.complete(tmp_path / "run")[-1].name == "step-00000007"


def interrupted(config: RunConfig, out: Path, done: int, tensor_parallel: int = 1) -> None:
    """A run that ends as a crash would, when so many steps are done."""
    original = Trainer.step

    def step(self: Trainer, batches: Any) -> Any:
        if self.state.step == done:
            raise RuntimeError("as if the process had died")
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(RuntimeError, match="had died"):
            start(config, out, tensor_parallel=tensor_parallel)


def signalled(config: RunConfig, out: Path) -> None:
    """A run whose second rank gets SIGTERM in its seventh step."""
    original = Trainer.step

    def step(self: Trainer, batches: Any) -> Any:
        if self.state.step == 6 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(RunInterruptedError):
            start(config, out)


def test_ranks_that_cannot_share_the_batch_are_refused(sources: Path, tmp_path: Path) -> None:
    on_ranks(2, refused, tiny_run(sources, run_micro_batch_size=8), tmp_path / "run")


def refused(config: RunConfig, out: Path) -> None:
    """A run whose batch cannot be shared."""
    with pytest.raises(InputError, match="which 2 ranks cannot share equally"):
        start(config, out)


def test_an_error_of_the_first_rank_ends_all(sources: Path, tmp_path: Path) -> None:
    nothing = tiny_run(sources, data_include=["*.none"])
    on_ranks(2, ends_with, "there are no documents to train on", nothing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    longer = tiny_run(sources, run_steps=20)
    on_ranks(2, ends_with, "nowhere holds no run", longer, tmp_path / "run", Path("nowhere"))
    on_ranks(2, ends_with, "a dry run takes one process", nothing, None)


def ends_with(
    message: str, config: RunConfig, out: Path | None, source: Path | None = None
) -> None:
    """A run or a dry run that is refused: with words on the first rank, quietly on the others."""
    begin = plan_run if out is None else partial(train, out=out, branch_from=source)
    with pytest.raises(InputError, match=message) as caught:
        begin(config, device="cpu", say=say_nothing)
    is_first = os.environ["RANK"] == "0"
    assert isinstance(caught.value, FirstRankError) != (is_first or out is None)


def test_ranks_wait_longer_for_the_documents_than_for_anything_else(
    sources: Path, tmp_path: Path
) -> None:
    on_ranks(2, patient_once, tiny_run(sources, run_steps=1), tmp_path / "run")


def patient_once(config: RunConfig, out: Path) -> None:
    """A run in which is noted how long its ranks wait for the first one, each time that they do."""
    patience = []
    original = dist.broadcast_object_list

    def broadcast(*arguments: Any, group: Any = None, **options: Any) -> None:
        backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
        patience.append(backend.options._timeout)
        original(*arguments, group=group, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast_object_list", broadcast)
        start(config, out)
    assert patience.count(PATIENCE) == 1
    assert all(time <= PATIENCE / 100 for time in patience if time != PATIENCE)
    assert len(patience) > 3


def test_a_checkpoint_that_the_first_rank_cannot_write_ends_all(
    sources: Path, tmp_path: Path
) -> None:
    for name in ("mkdir", "rename"):
        on_ranks(2, without_disk, name, tiny_run(sources), tmp_path / name)


def without_disk(name: str, config: RunConfig, out: Path) -> None:
    """A run whose first checkpoint finds the disk full when it is begun, or when it is ended."""
    original = getattr(Path, name)

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if checkpoints.UNFINISHED in self.name and "step" in self.name:
            raise OSError(28, "No space left on device")
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, name, refuse)
        with pytest.raises(InputError, match="No space left on device"):
            start(config, out)


def test_embedding_and_head_stay_one_parameter(sources: Path, tmp_path: Path) -> None:
    on_ranks(2, tied, tiny_run(sources), tmp_path / "run")


def tied(config: RunConfig, out: Path) -> None:
    """A sharded model whose embedding and head are compared."""
    with world("cpu") as ranks:
        tokenizer = Tokenizer(byte_tokenizer(*SPECIALS))
        model = make_model(config, tokenizer, ranks.device)
        shard(Objective(model, "float32", False), ranks)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert isinstance(model.lm_head.weight, DTensor)
        assert len(dict(model.named_parameters())) == 12 * 2 + 4
