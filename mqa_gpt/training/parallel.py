"""One rank or many: the process group, and a model whose parameters are spread over its ranks.

Started by `torchrun`, every rank runs the same program; `World` says which one this is. Without
torchrun the world is one rank, and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mqa_gpt.checkpoints.placement import as_device
from mqa_gpt.model import Block


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank, size: which of how many processes.
        device: where this rank computes.
        mesh: of all ranks; None if there is only one.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each of them; in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.mesh is not None:
            dist.barrier()

    def any(self, value: int) -> int:
        """The largest value of all ranks, on each of them."""
        if self.mesh is None:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """The ranks that torchrun has started, or this process alone.

    Args:
        device: as in `as_device`; with several ranks each takes the GPU of its local rank.
    """
    chosen = as_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, chosen, init_device_mesh(chosen.type, (size,)))
    finally:
        dist.destroy_process_group()


def shard(objective: nn.Module, world: World) -> None:
    """Spread parameters, gradients and moments over the ranks (FSDP2), block by block.

    What is not in a block is one group: the tied `wte` and `lm_head` are one parameter, which two
    groups cannot both hold. Gradients are summed, not averaged: the loss is divided already.
    """
    if world.mesh is None:
        return
    for module in objective.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=world.mesh)
    fully_shard(objective, mesh=world.mesh)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def sum_gradients_after_next(objective: nn.Module, is_last: bool) -> None:
    """Have the next backward pass sum gradients over the ranks only if it is the last of a step."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(is_last)


def reshard(objective: nn.Module) -> None:
    """Free the gathered parameters that a forward pass without a backward pass leaves."""
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A parameter without its being spread over ranks; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale the gradient down to a norm of `largest`, unless that is 0; returns its norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if largest:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return float(whole(norm))
