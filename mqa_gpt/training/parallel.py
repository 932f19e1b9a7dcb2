"""One rank or many: the process group, and a model whose parameters are spread over its ranks.

Started by `torchrun`, every rank runs the same program; `World` says which one this is. Without
torchrun the world is one rank, and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mqa_gpt.checkpoints.placement import as_device
from mqa_gpt.errors import ConfigError, InputError
from mqa_gpt.model import Block
from mqa_gpt.training.config import LoopConfig
from mqa_gpt.training.ordered import OrderedReduceScatter

T = TypeVar("T")

# How long ranks wait for the first one to tokenize the documents. PyTorch gives up after 10 minutes
# on GPUs, which is right for everything else.
PATIENCE = timedelta(days=7)


class FirstRankError(InputError):
    """On the other ranks: what the first one has ended with, and says."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank, size: which share of a batch this rank computes, of how many.
        device: where.
        mesh: of the ranks with different shares, maybe of one; None if there is only this process.
        tensor_mesh: of the ranks that compute the same share together; None if each is alone.
        is_first: whether this is the rank that writes what is written once.
        patient: a group of all ranks that waits for `PATIENCE`; None if there is only one process.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    tensor_mesh: DeviceMesh | None = None
    is_first: bool = True
    patient: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """Of all kinds."""
        return self.size * (1 if self.tensor_mesh is None else self.tensor_mesh.size())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the shares of a batch, on each rank; in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all shares of a batch, (size, ...), on each rank."""
        if self.mesh is None:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.mesh.get_group())
        return torch.stack(parts)

    def largest(self, value: int) -> int:
        """The largest value of all ranks, on each of them."""
        if self.ranks == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


@contextmanager
def world(device: str | None = None, tensor_parallel: int = 1) -> Iterator[World]:
    """The ranks that torchrun has started, or this process alone.

    Args:
        device: as in `as_device`; with several ranks each takes the GPU of its local rank.
        tensor_parallel: how many neighbouring ranks compute a share of the batch together.

    Raises:
        InputError: that many do not divide the ranks.
    """
    chosen = as_device(device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise InputError(
            f"tensor_parallel is {tensor_parallel} and there are {ranks} ranks: it must divide "
            "them; torchrun --nproc-per-node N starts N ranks"
        )
    if ranks == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        shares = ranks // tensor_parallel
        names = ("share", "tensor")
        mesh = init_device_mesh(chosen.type, (shares, tensor_parallel), mesh_dim_names=names)
        yield World(
            rank=dist.get_rank() // tensor_parallel,
            size=shares,
            device=chosen,
            mesh=mesh["share"],
            tensor_mesh=mesh["tensor"] if tensor_parallel > 1 else None,
            is_first=dist.get_rank() == 0,
            patient=dist.new_group(backend="gloo", timeout=PATIENCE),
        )
    finally:
        dist.destroy_process_group()


def on_first(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """Call a function on the first rank, while the others wait; its result, on them None.

    If it fails, all ranks end: its error is raised on the first one, FirstRankError on the others.

    Args:
        group: of all ranks, which says how long they wait: `World.patient`, or None for the usual.
    """
    if not dist.is_initialized():
        return function()
    result = failure = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    message = [None if failure is None else str(failure)]
    dist.broadcast_object_list(message, 0, group=group)
    if failure is not None:
        raise failure
    if message[0] is not None:
        raise FirstRankError(message[0])
    return result


def require_shared_batch(run: LoopConfig, ranks: World) -> None:
    """Raise ConfigError unless the ranks can share the batch equally, in the way that is asked."""
    count = run.batch_size // run.micro_batch_size
    if count % ranks.size:
        raise ConfigError(
            f"run.batch_size {run.batch_size} makes {count} micro-batches of "
            f"{run.micro_batch_size}, which {ranks.size} ranks cannot share equally: change "
            "one of the three"
        )
    if run.reduce == "ordered" and (ranks.size & (ranks.size - 1) or ranks.tensor_mesh):
        raise ConfigError(
            f'run.reduce is "ordered" and there are {ranks.ranks} ranks: it takes 1, 2, 4, 8, '
            "..., without tensor parallelism"
        )


def shard(objective: nn.Module, world: World, ordered: bool = False) -> None:
    """Spread parameters, gradients and moments over the shares of a batch (FSDP2), block by block.

    What is not in a block is one group: the tied `wte` and `lm_head` are one parameter, which two
    groups cannot both hold. Gradients are summed, not averaged: the loss is divided already.

    Args:
        ordered: sum in the order of the ranks (see `mqa_gpt.training.ordered`).
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
            if ordered:
                module.set_custom_reduce_scatter(OrderedReduceScatter())  # type: ignore[arg-type]


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


def clip_gradients(model: nn.Module, largest: float, ordered: bool = False) -> float:
    """Scale the gradient down to a norm of `largest`, unless that is 0; returns its norm before.

    The norm is that of all parameters on all ranks. PyTorch's functions take only gradients that
    are spread over the same ranks, so it is put together from one norm for each way of spreading.

    Args:
        ordered: compute it from whole gradients: the same bits on any number of ranks.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if ordered:
        norms = [torch.linalg.vector_norm(whole(grad)) for grad in grads]
    else:
        norms = [whole(torch.nn.utils.get_total_norm(group)) for group in _alike(grads)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if dist.is_initialized():
        dist.broadcast(norm, 0)  # ranks that differ in its last bit would drift apart
    if largest:
        factor = float((largest / (norm + 1e-6)).clamp(max=1.0))  # as clip_grad_norm_
        for group in _alike(grads):
            torch._foreach_mul_(group, factor)
    return float(norm)


def _alike(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors, in groups that are spread over the same ranks in the same way."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        key = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())
