"""Tensor parallelism: each rank computes some query heads and a part of every MLP (Shoeybi et al.
2019, "Megatron-LM"), here for a model whose query heads share one key/value head.

    c_attn    queries: each rank has the rows of its heads; the one key/value head is too small to
              be shared out, so every rank has it. Its gradient comes from the query heads of all
              ranks and is summed over them.
    c_proj    each rank multiplies its heads, and the products are summed over the ranks
    MLP       c_fc by rows, c_proj by columns, summed likewise

Embeddings, norms and the head stay whole on every rank. With H key/value heads (MHA) each rank has
its own ones. As the parts of `c_attn` are distributed in different ways, they become three
parameters; `fused` joins them again under the official name, for checkpoints and export.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError
from mqa_gpt.model import GPT, Block
from mqa_gpt.training.parallel import whole
from mqa_gpt.training.qkv import join_qkv, split_qkv

PARTS = ("q", "k", "v")


class ParallelQKV(nn.Module):
    """`c_attn` of multi-query attention in three parts; the queries are those of this rank."""

    def __init__(self, c_attn: nn.Linear, config: GPTConfig) -> None:
        super().__init__()
        weights, biases = split_qkv(c_attn.weight, config), split_qkv(c_attn.bias, config)
        for name, weight, bias in zip(PARTS, weights, biases, strict=True):
            rows, columns = weight.shape
            linear = nn.Linear(columns, rows, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone())
            linear.bias = nn.Parameter(bias.detach().clone())
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C / ranks + 2D)."""
        return torch.cat([self.get_submodule(name)(x) for name in PARTS], dim=-1)


class SharedByHeads(ParallelStyle):
    """A linear layer that is whole on every rank, and whose output each rank uses for its own query
    heads: the gradient of the output is the sum over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def whole_input(_: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

        def local_output(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            # The redistribution does nothing on the way forward; on the way back it is the sum.
            shared = output.redistribute(mesh, [Replicate()])
            return shared.to_local(grad_placements=[Partial()])

        return distribute_module(module, device_mesh, None, whole_input, local_output)  # type: ignore[arg-type]


def require_equal_shares(config: GPTConfig, size: int) -> None:
    """Raise InputError unless `size` ranks can share query heads and the MLP's width equally."""
    for name, count in (("n_head", config.n_head), ("n_inner", config.inner_size)):
        if count % size:
            raise InputError(
                f"{name} is {count} and there are {size} tensor-parallel ranks, which must divide "
                "it: choose another number of ranks"
            )


def tensor_parallel(model: GPT, mesh: DeviceMesh) -> None:
    """Share a model's layers out over the ranks of a mesh, in place.

    Every rank passes the same weights. Afterwards the model takes the same input on each rank and
    gives the same output on each; with a `KVCache` only if it is a multi-query model.

    Raises:
        InputError: the ranks cannot share query heads or the MLP's width equally.
    """
    config, size = model.config, mesh.size()
    require_equal_shares(config, size)
    for block in model.transformer.h:
        assert isinstance(block, Block)
        attention = block.attn
        plan: dict[str, ParallelStyle] = {
            "attn.c_proj": RowwiseParallel(),
            "mlp.c_fc": ColwiseParallel(),
            "mlp.c_proj": RowwiseParallel(),
        }
        if config.n_kv_head == 1:
            attention.c_attn = ParallelQKV(attention.c_attn, config)  # type: ignore[assignment]
            plan["attn.c_attn.q"] = ColwiseParallel()
            plan |= {f"attn.c_attn.{name}": SharedByHeads() for name in ("k", "v")}
        else:  # its rows are those of head after head
            plan["attn.c_attn"] = ColwiseParallel()
            attention.n_kv_head //= size
        attention.n_head //= size
        parallelize_module(block, mesh, plan)


def fused(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Tensors by parameter name, with those of a divided `c_attn` joined under its own name.

    Args:
        tensors: parameters, or as many moments of each, whose names end with those of parameters.
            Every rank must call this with its part.
    """
    joined = {}
    for name, tensor in tensors.items():
        part = _part(name)
        if part is None:
            joined[name] = tensor
        elif part == "q":
            q, k, v = (whole(tensors[_renamed(name, other)]) for other in PARTS)
            joined[_renamed(name, None)] = q.clone() if q.ndim == 0 else join_qkv(q, k, v, config)
    return joined


@torch.no_grad()
def divide(joined: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: GPTConfig) -> None:
    """Write what `fused` joined, and something has changed, back into the divided tensors."""
    for name, tensor in tensors.items():
        part = _part(name)
        if part is not None:
            source = joined[_renamed(name, None)]
            if source.ndim:
                source = split_qkv(source, config)[PARTS.index(part)]
            if isinstance(tensor, DTensor):
                replicated = [Replicate()] * tensor.device_mesh.ndim
                source = DTensor.from_local(source, tensor.device_mesh, replicated, run_check=False)
                source = source.redistribute(tensor.device_mesh, tensor.placements)
            tensor.copy_(source)


def _part(name: str) -> str | None:
    """Which part of a divided `c_attn` a name is of, if it is of one."""
    *_, module, part, _ = ["", "", *name.split(".")]
    return part if module == "c_attn" and part in PARTS else None


def _renamed(name: str, part: str | None) -> str:
    """The name of another part, or with None that of the whole."""
    *path, _, kind = name.split(".")
    return ".".join([*path, *([part] if part else []), kind])
