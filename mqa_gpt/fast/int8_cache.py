"""Keys and values as 8-bit integers: half the cache of 16 bits, as an approximation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError, shown


class Int8KVCache(KVCache):
    """A `KVCache` that keeps each K and each V of a head as integers and a float32 scale.

    The integers are from -127 to 127, the scale is max |.| / 127. `append` makes floats of one
    layer at a time. Rounding jumps where the last bit of a number differs, so where a batch changes
    the order of sums, a row may differ from its solo run by more than the rounding of floats.

    Attributes:
        kv: (L, B, max_length, G, 2D) int8.
        scales: (L, B, max_length, G, 2) float32, of K and of V.

    Args:
        dtype: of what `append` takes and returns, the model's.

    All else is as in `KVCache`.
    """

    memory: ClassVar[tuple[str, ...]] = ("kv", "scales")

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, batch_size, max_length, dtype=torch.int8, device=device)
        self.dtype = dtype or torch.get_default_dtype()
        self.scales = torch.zeros((*self.kv.shape[:-1], 2), dtype=torch.float32, device=device)

    def store(self, layer: int, kv: Tensor) -> Tensor:
        """See `KVCache.store`; (B, S, G, 2D) made of the integers."""
        integers, scales = quantize_kv(kv)  # (B, T, G, 2D), (B, T, G, 2)
        self._write(self.kv[layer], integers)
        self._write(self.scales[layer], scales)
        held = slice(0, self.end + kv.shape[1])
        return dequantize_kv(self.kv[layer, :, held], self.scales[layer, :, held], self.dtype)


def cache_class(name: str | None) -> type[KVCache]:
    """`Int8KVCache` for "int8", `KVCache` for None; InputError for anything else."""
    if name not in (None, "int8"):
        raise InputError(
            f"cache_dtype is {shown(name)}: expected int8; leave it out for the model's own"
        )
    return KVCache if name is None else Int8KVCache


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
