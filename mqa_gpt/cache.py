"""KVCache: the keys and values of the tokens seen so far, preallocated, one length per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError


class KVCache:
    """Keys and values of every layer for a batch whose rows may differ in length.

    A token's slot is its position, so there is no padding to skip. Rows of different lengths are
    filled together by right-padding: the padding's keys land behind the row's end, where causality
    hides them until later tokens overwrite them. `limit` announces the rows' ends before such a
    prefill, `set_lengths` puts them there behind it (see `decode.prefill`).

    As int8 a cache takes about half the memory of 16 bits, and is an approximation: each K and each
    V of a head is kept as integers from -127 to 127 and a float32 scale, max |.| / 127. `append`
    makes floats of one layer at a time. As rounding jumps where the last bit of a number differs, a
    row in a batch may differ from its solo run by more than the rounding of floats.

    Attributes:
        kv: (L, B, max_length, G, 2D), K and V of a head side by side, as `c_attn` produces them.
        scales: (L, B, max_length, G, 2) float32, of K and of V; None unless `kv` is int8.
        lengths: (B,) int64 on the cache's device: the tokens that each row holds.
        end: the longest row's length, known on the host without asking the device.

    Args:
        config: the model's config; the cache takes its layers, key/value heads and head dim.
        batch_size: B, rows.
        max_length: slots per row; 2 * L * B * max_length * G * D elements are allocated at once.
        dtype, device: where and how to store; torch's defaults if None. The model's dtype or int8.

    Raises:
        ValueError: `max_length` exceeds the model's context, or a size is not positive.
    """

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
        shape = (config.n_layer, batch_size, max_length, config.n_kv_head)
        self.kv = torch.zeros((*shape, 2 * config.head_dim), dtype=dtype, device=device)
        self.scales: Tensor | None = None
        if dtype == torch.int8:
            self.scales = torch.zeros((*shape, 2), dtype=torch.float32, device=device)
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
        """Slots per row."""
        return self.kv.shape[2]

    @property
    def start(self) -> int | Tensor:
        """Position of each row's next token: one int while all rows agree, else (B,) int64."""
        return self.lengths if self._ragged else self.end

    def require_room(self, T: int) -> None:
        """Raise ValueError unless T more tokens fit into every row."""
        if self.end + T > self.max_length:
            raise ValueError(
                f"the cache holds {self.end} of {self.max_length} positions: {T} more do not fit; "
                "make it with a larger max_length"
            )

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Write one layer's new keys and values behind each row's end.

        Args:
            layer: which layer, from 0.
            kv: (B, T, G, 2D), K and V side by side.

        Returns:
            (B, S, G, 2D): the layer's slots up to the longest row's new end; a view, unless the
            cache is int8. `advance` moves the ends themselves, once all layers are written.

        Raises:
            ValueError: `kv` needs gradients, or is not of the cache's batch size, dtype or device.
        """
        if kv.requires_grad:
            raise ValueError(
                "a cache is for inference: run the model under torch.inference_mode() or "
                "torch.no_grad()"
            )
        held = kv.dtype if self.scales is not None else self.kv.dtype
        if (len(kv), kv.dtype, kv.device) != (self.batch_size, held, self.kv.device):
            raise ValueError(
                f"the model gives {len(kv)} rows of {kv.dtype} on {kv.device}, but the cache is "
                f"made for {self.batch_size} of {held} on {self.kv.device}"
            )
        T = kv.shape[1]
        if self._limits is not None:
            positions = self.end + torch.arange(T, device=kv.device)  # (T,)
            is_padding = positions >= self._limits[:, None]  # (B, T)
            kv = kv.masked_fill(is_padding[..., None, None], 0)
        if self.scales is None:
            slots = self.kv[layer]  # (B, max_length, G, 2D)
            self._write(slots, kv)
            return slots[:, : self.end + T]
        integers, scales = quantize_kv(kv)  # (B, T, G, 2D), (B, T, G, 2)
        self._write(self.kv[layer], integers)
        self._write(self.scales[layer], scales)
        held_slots = slice(0, self.end + T)
        return dequantize_kv(
            self.kv[layer, :, held_slots], self.scales[layer, :, held_slots], kv.dtype
        )

    def _write(self, slots: Tensor, values: Tensor) -> None:
        """values (B, T, ...) behind each row's end of slots (B, max_length, ...)."""
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

        What is appended behind a row's end is stored as zeros, until `set_lengths`. A hidden key's
        weight is 0, but 0 times NaN is NaN: padding whose numbers overflow, as they can in 16 bits,
        would reach the row's tokens.
        """
        if self.end != 0:
            raise ValueError(
                f"the cache holds {self.end} positions: only an empty one is filled by padding"
            )
        self._limits = torch.tensor(lengths, device=self.kv.device)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many of its written slots each row really holds.

        After a right-padded prefill this drops the padding; with smaller numbers it rewinds.

        Raises:
            ValueError: not one length per row, or a row would hold slots that were never written.
        """
        if len(lengths) != self.batch_size or not all(0 <= n <= self.end for n in lengths):
            raise ValueError(
                f"lengths are {list(lengths)}: the cache needs {self.batch_size} numbers "
                f"from 0 to {self.end}, the positions written so far"
            )
        self.lengths.copy_(torch.tensor(lengths))
        self._limits = None
        self.end = max(lengths)
        self._ragged = min(lengths) != self.end

    def copy_row(self, row: int, other: KVCache, other_row: int) -> None:
        """Make a row a copy of another cache's, or of another of this one's.

        All of the row's slots are written, with zeros where `other` has none: what a former owner
        left behind would be hidden, but a NaN reaches through (see `limit`). How many tokens the
        row holds now is for `view` to say.
        """
        width = other.max_length
        for own, its in ((self.kv, other.kv), (self.scales, other.scales)):
            if own is not None and its is not None:
                own[:, row, :width] = its[:, other_row]
                own[:, row, width:] = 0

    def view(self, lengths: Sequence[int]) -> KVCache:
        """The first rows as a cache of their own, on the same memory, holding these many tokens.

        What is fed to the view is written here, up to the same limits; the counts are the view's
        own.
        """
        count = len(lengths)
        scales = None if self.scales is None else self.scales[:, :count]
        other = self._with(self.kv[:, :count], scales, lengths)
        other._limits = None if self._limits is None else self._limits[:count]
        return other

    def select(self, rows: Sequence[int]) -> KVCache:
        """A new cache whose row i is a copy of this one's row `rows[i]`.

        Repeating an index branches a prompt into several continuations of one prefill; leaving
        one out drops a finished row.
        """
        if not rows:
            raise ValueError("rows is empty: a cache needs at least one row")
        index = torch.tensor(rows, device=self.kv.device)
        scales = None if self.scales is None else self.scales.index_select(1, index)
        lengths = self.lengths[index].tolist()
        return self._with(self.kv.index_select(1, index), scales, lengths)

    @staticmethod
    def _with(kv: Tensor, scales: Tensor | None, lengths: Sequence[int]) -> KVCache:
        """A cache of this memory, whose rows hold so many tokens."""
        other = KVCache.__new__(KVCache)
        other.kv, other.scales = kv, scales
        other.lengths = torch.tensor(lengths, device=kv.device)
        other.end = max(lengths)
        other._ragged = min(lengths) != other.end
        other._limits = None
        return other


class StaticCache(KVCache):
    """A cache whose use is the same at every decode step, so that a CUDA graph can repeat it.

    It takes over what another cache holds. From then on nothing depends on numbers of the host:
    each row's one new token is written at `lengths`, and attention gets all slots, of which
    `lengths` tells it how many to see. Nobody counts the slots: whoever runs the steps has to know
    that there is room.

    Raises:
        ValueError: the other cache is int8.
    """

    def __init__(self, cache: KVCache) -> None:
        if cache.scales is not None:
            raise ValueError("the cache is int8: a static cache holds the model's own dtype only")
        self.kv, self.scales, self.lengths = cache.kv, None, cache.lengths
        self._set_up()

    def _set_up(self) -> None:
        self.end = self.max_length
        self._ragged, self._limits = True, None
        self._rows = torch.arange(self.batch_size, device=self.kv.device)  # (B,)

    def first(self, count: int) -> StaticCache:
        """The first rows, in the same memory, what they hold and how much of it included."""
        other = StaticCache.__new__(StaticCache)
        other.kv, other.scales, other.lengths = self.kv[:, :count], None, self.lengths[:count]
        other._set_up()
        return other

    def require_room(self, T: int) -> None:
        """Raise ValueError unless T is 1."""
        if T != 1:
            raise ValueError(f"{T} tokens per row: a static cache takes one at a time")

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Write kv (B, 1, G, 2D) of one layer; all its slots, (B, max_length, G, 2D)."""
        slots = self.kv[layer]  # (B, max_length, G, 2D)
        slots[self._rows, self.lengths] = kv[:, 0]
        return slots

    def advance(self, T: int) -> None:
        """Count the token that every layer has appended to every row."""
        self.lengths += T


def as_cache_dtype(name: str | None) -> torch.dtype | None:
    """What "int8" names, or None for the model's own dtype.

    Raises:
        InputError: anything else.
    """
    if name not in (None, "int8"):
        raise InputError(
            f"cache_dtype is {name!r}: accepted is int8; leave it out for the model's own"
        )
    return None if name is None else torch.int8


def quantize_kv(kv: Tensor) -> tuple[Tensor, Tensor]:
    """kv (B, T, G, 2D) -> integers (B, T, G, 2D) int8 and scales (B, T, G, 2) float32."""
    halves = kv.float().view(*kv.shape[:-1], 2, -1)  # (B, T, G, 2, D)
    scales = halves.abs().amax(-1) / 127  # (B, T, G, 2)
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]
    return (halves / divisors).round_().to(torch.int8).flatten(-2), scales


def dequantize_kv(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """integers (B, S, G, 2D) int8 and scales (B, S, G, 2) -> (B, S, G, 2D) of this dtype."""
    halves = integers.view(*scales.shape, -1) * scales[..., None]  # (B, S, G, 2, D)
    return halves.flatten(-2).to(dtype)


def cache_bytes(config: GPTConfig, dtype: torch.dtype, rows: int = 1, slots: int = 1) -> int:
    """Bytes of a `KVCache` with `slots` positions in each of `rows` rows."""
    of_a_head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)  # its scale
    return rows * slots * 2 * config.n_layer * config.n_kv_head * of_a_head
