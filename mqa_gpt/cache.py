"""KVCache: the keys and values of the tokens seen so far, so that no step computes them again.

The idea takes three lines. Attention at a new position needs the keys and values of all positions
before it, and these never change. So each layer appends the K and V of its T new positions to what
it holds, and attends to all of it:

    kv[layer, :, end : end + T] = new         # append
    k, v = kv[layer, :, : end + T]            # attend to S = end + T positions
    end += T                                  # once per forward pass, after all layers

With one key/value head that is 2 * D numbers per layer and position; with H of them, H times more,
and a decode step reads them all (Shazeer 2019).

The rest of this file lets the rows of a batch have different lengths without padding in between:
a token's slot is its position, in every row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mqa_gpt.config import GPTConfig


class KVCache:
    """Keys and values of every layer for a batch whose rows may differ in length.

    Rows of different lengths are filled together by right-padding: the padding's keys are written
    after the row's end, where causality hides them until later tokens overwrite them. `limit`
    announces the rows' ends before such a prefill, `set_lengths` sets them after it (see
    `mqa_gpt.generation.prefill`).

    Attributes:
        kv: (L, B, max_length, G, 2D), K and V of a head side by side, as `c_attn` produces them.
        lengths: (B,) int64 on the cache's device: the tokens that each row holds.
        dtype: of the keys and values that `append` takes and returns.
        end: the longest row's length, known on the host without asking the device.
        labels: what the engine calls each row, for recording during generation; else None.

    Args:
        config: the model's config; the cache takes its layers, key/value heads and head dim.
        batch_size: B, rows.
        max_length: positions per row; 2 * L * B * max_length * G * D numbers are allocated.
        dtype, device: the model's; torch's defaults if None.

    Raises:
        ValueError: `max_length` exceeds the model's context, or a size is not positive.
    """

    memory: ClassVar[tuple[str, ...]] = ("kv",)  # the tensors (L, B, ...) that hold the rows
    labels: Sequence[Any] | None = None

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: a cache needs at least one row")
        if not 1 <= max_length <= config.n_positions:
            raise ValueError(
                f"max_length is {max_length}: it must be from 1 to the model's context of "
                f"{config.n_positions}"
            )
        shape = (config.n_layer, batch_size, max_length, config.n_kv_head, 2 * config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.dtype = self.kv.dtype
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.end = 0
        self._ragged = False
        self._limits: Tensor | None = None  # (B,) int64 while a padded prefill runs

    @property
    def batch_size(self) -> int:
        """B: the number of rows."""
        return self.kv.shape[1]

    @property
    def max_length(self) -> int:
        """Positions that a row can hold."""
        return self.kv.shape[2]

    @property
    def start(self) -> int | Tensor:
        """Position of each row's next token: one int while all rows agree, else (B,) int64."""
        return self.lengths if self._ragged else self.end

    @property
    def limits(self) -> Tensor | None:
        """Where each row will end, (B,) int64, while a right-padded prefill runs; else None."""
        return self._limits

    def require_room(self, T: int) -> None:
        """Raise ValueError unless T more tokens fit into every row."""
        if self.end + T > self.max_length:
            raise ValueError(
                f"the cache holds {self.end} of {self.max_length} positions: {T} more do not fit; "
                "make it with a larger max_length"
            )

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Write one layer's new keys and values after each row's end.

        Args:
            layer: which layer, from 0.
            kv: (B, T, G, 2D), K and V side by side.

        Returns:
            (B, S, G, 2D): the layer's positions up to the longest row's new end. `advance` moves
            the ends themselves, once all layers are written.

        Raises:
            ValueError: `kv` needs gradients, or is not of the cache's batch size, dtype or device.
        """
        if kv.requires_grad:
            raise ValueError(
                "a cache is for inference: run the model under torch.inference_mode() or "
                "torch.no_grad()"
            )
        if (len(kv), kv.dtype, kv.device) != (self.batch_size, self.dtype, self.kv.device):
            raise ValueError(
                f"the model gives {len(kv)} rows of {kv.dtype} on {kv.device}, but the cache is "
                f"made for {self.batch_size} of {self.dtype} on {self.kv.device}"
            )
        if self._limits is not None:
            positions = self.end + torch.arange(kv.shape[1], device=kv.device)  # (T,)
            is_padding = positions >= self._limits[:, None]  # (B, T)
            kv = kv.masked_fill(is_padding[..., None, None], 0)
        return self.store(layer, kv)

    def store(self, layer: int, kv: Tensor) -> Tensor:
        """What `append` does once `kv` (B, T, G, 2D) is checked; (B, S, G, 2D), a view."""
        self._write(self.kv[layer], kv)
        return self.kv[layer, :, : self.end + kv.shape[1]]

    def _write(self, slots: Tensor, values: Tensor) -> None:
        """values (B, T, ...) after each row's end in slots (B, max_length, ...)."""
        T = values.shape[1]
        if self._ragged:
            rows = torch.arange(self.batch_size, device=slots.device)[:, None]  # (B, 1)
            steps = torch.arange(T, device=slots.device)  # (T,)
            slots[rows, self.lengths[:, None] + steps] = values
        else:
            slots[:, self.end : self.end + T] = values

    def advance(self, T: int) -> None:
        """Count the T positions that every layer has appended to every row."""
        self.lengths += T
        self.end += T

    def limit(self, lengths: Sequence[int]) -> None:
        """Announce where each row will end, before a right-padded prefill of an empty cache.

        What is appended after a row's end is stored as zeros, until `set_lengths`. A hidden key's
        weight is 0, but 0 times NaN is NaN: padding whose numbers overflow, as they can in 16 bits,
        would reach the row's tokens.
        """
        if self.end != 0:
            raise ValueError(
                f"the cache holds {self.end} positions: only an empty one is filled with padding"
            )
        self._limits = torch.tensor(lengths, device=self.kv.device)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set how many of its written positions each row really holds.

        After a right-padded prefill this drops the padding; with smaller numbers it rewinds.

        Raises:
            ValueError: not one length per row, or a row would hold positions that were never
                written.
        """
        if len(lengths) != self.batch_size or not all(0 <= n <= self.end for n in lengths):
            raise ValueError(
                f"lengths are {list(lengths)}: the cache needs {self.batch_size} numbers "
                f"from 0 to {self.end}, the positions written so far"
            )
        self.lengths.copy_(torch.tensor(lengths))
        self._limits = None
        self._count(lengths)

    def _count(self, lengths: Sequence[int]) -> None:
        self.end = max(lengths)
        self._ragged = min(lengths) != self.end

    # Used by the engine, whose rows join and leave.

    def rows(self, first: int, lengths: Sequence[int], labels: Sequence[Any] | None = None) -> Self:
        """A cache over `len(lengths)` of these rows from `first` on, sharing their memory.

        Row first + i holds `lengths[i]` tokens there. The counts are the new cache's own, and so
        are the labels if given.
        """
        end = first + len(lengths)
        other = copy.copy(self)
        for name in self.memory:
            setattr(other, name, getattr(self, name)[:, first:end])
        other.lengths = torch.tensor(lengths, device=self.kv.device)
        other._limits = None if self._limits is None else self._limits[first:end]
        if labels is None and self.labels is not None:
            labels = self.labels[first:end]
        other.labels = labels
        other._count(lengths)
        return other

    def copy_row(self, target: int, source: int) -> None:
        """Copy all positions of one row to another; the caller tracks its length."""
        for name in self.memory:
            memory = getattr(self, name)
            memory[:, target] = memory[:, source]

    def clear(self, first: int, end: int) -> None:
        """Fill the rows from `first` to before `end` with zeros."""
        for name in self.memory:
            getattr(self, name)[:, first:end] = 0


def cache_bytes(config: GPTConfig, dtype: torch.dtype, rows: int = 1, slots: int = 1) -> int:
    """Bytes of a cache with `slots` positions in each of `rows` rows; int8 includes the scales."""
    of_a_head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    return rows * slots * 2 * config.n_layer * config.n_kv_head * of_a_head
