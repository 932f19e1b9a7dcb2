"""Sums in a fixed order, so that a step has the same bits on 1, 2 or 4 ranks.

Floating-point addition is not associative: 1 + (2 + 3) and (1 + 2) + 3 may differ in the last bit.
Usually each rank adds the gradients of its own micro-batches first, so what is added first depends
on how many ranks there are. Here the gradients of the micro-batches 0, 1, 2, ... are added as a
binary tree, ((0 + 1) + (2 + 3)) + ((4 + 5) + ...). R ranks, a power of two, compute R neighbouring
micro-batches at a time; the lowest levels of the tree are added between ranks, those above on each
rank.

This costs the sum over ranks after each micro-batch instead of once per step, and log2 of the
number of micro-batches as many copies of the gradient at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of 2^n tensors, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class TreeSum:
    """The same, of lists of tensors that arrive one after another; holds at most log2 of them.

    What is left over, because their number is no power of two, is added from the right.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # how many are in each sum

    def add(self, tensors: list[Tensor]) -> None:
        """Take in one more; `tensors` are changed."""
        count = 1
        while self._sums and self._sums[-1][0] == count:
            _, before = self._sums.pop()
            torch._foreach_add_(before, tensors)
            count, tensors = 2 * count, before
        self._sums.append((count, tensors))

    def total(self) -> list[Tensor]:
        """Of all that were added."""
        _, total = self._sums.pop()
        while self._sums:
            _, before = self._sums.pop()
            torch._foreach_add_(before, total)
            total = before
        return total


class OrderedReduceScatter:
    """FSDP's sum over ranks, as a tree in the order of the ranks."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer, as FSDP asks for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """input_tensor (ranks n,) of each rank -> output_tensor (n,), this rank's part."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        output_tensor.copy_(tree_sum(received.chunk(group.size())))
