"""One forward pass taken apart: every tensor, the work of every part, what limits its speed, and
how much fits into memory. All of it follows from the sizes of a model; no weights are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from mqa_gpt.bench.counts import Work, model_bytes, whole, work_by_part
from mqa_gpt.bench.devices import Device
from mqa_gpt.cache import cache_bytes
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError, require_int

LAYER = "transformer.h.*."

# Every tensor in the order in which it is computed, with its axes. The names are those of
# `mqa_gpt.research.record`, but for the cache. Logits are those of each row's last position.
TENSORS = (
    ("transformer.wte", "B T C"),
    ("transformer.wpe", "1 T C"),
    (f"{LAYER}resid_pre", "B T C"),
    (f"{LAYER}ln_1", "B T C"),
    (f"{LAYER}attn.c_attn", "B T C+2GD"),
    (f"{LAYER}attn.q", "B T H D"),
    (f"{LAYER}attn.k", "B T G D"),
    (f"{LAYER}attn.v", "B T G D"),
    (f"{LAYER}cache", "B S G 2D"),
    (f"{LAYER}attn.scores", "B H T S"),
    (f"{LAYER}attn.probs", "B H T S"),
    (f"{LAYER}attn.z", "B T H D"),
    (f"{LAYER}attn.c_proj", "B T C"),
    (f"{LAYER}resid_mid", "B T C"),
    (f"{LAYER}ln_2", "B T C"),
    (f"{LAYER}mlp.c_fc", "B T F"),
    (f"{LAYER}mlp.post", "B T F"),
    (f"{LAYER}mlp.c_proj", "B T C"),
    (f"{LAYER}resid_post", "B T C"),
    ("transformer.ln_f", "B T C"),
    ("lm_head", "B V"),
)

BATCHES = (1, 8, 64, 512)  # for which intensities are shown


class Heads(NamedTuple):
    """A figure with one key/value head, and with one per query head."""

    mqa: float
    mha: float


@dataclass(frozen=True)
class Anatomy:
    """A prefill of B prompts of T tokens, and the decode step of B rows with S = T positions.

    Attributes:
        config: of the model.
        batch: B.
        context: T of the prefill; S of the decode step, its own position included.
        dtype: of weights, activations and cache.
        int8: whether the weights are 8-bit integers.

    Raises:
        InputError: a size below 1, or more positions than the model's context.
    """

    config: GPTConfig
    batch: int
    context: int
    dtype: torch.dtype
    int8: bool = False

    def __post_init__(self) -> None:
        require_int(InputError, "batch", self.batch, 1)
        require_int(InputError, "context", self.context, 1, self.config.n_positions)

    def dimensions(self, *, is_prefill: bool) -> dict[str, int]:
        """The letters of `mqa_gpt.model`, and what else `TENSORS` uses, as numbers."""
        c = self.config
        G, D = c.n_kv_head, c.head_dim
        T = self.context if is_prefill else 1
        found = {"B": self.batch, "T": T, "S": self.context, "H": c.n_head, "G": G, "D": D}
        found |= {"C": c.n_embd, "F": c.inner_size, "V": c.vocab_size, "L": c.n_layer}
        return found | {"1": 1, "2D": 2 * D, "C+2GD": c.n_embd + 2 * G * D}

    def shapes(self, *, is_prefill: bool) -> dict[str, tuple[int, ...]]:
        """The shape of each of `TENSORS`."""
        numbers = self.dimensions(is_prefill=is_prefill)
        return {name: tuple(numbers[axis] for axis in axes.split()) for name, axes in TENSORS}

    @cached_property
    def prefill(self) -> dict[str, Work]:
        """The work of each part while prompts are read."""
        return self._work(self.config, self.batch, is_prefill=True)

    @cached_property
    def decode(self) -> dict[str, Work]:
        """The work of each part in a decode step."""
        return self._work(self.config, self.batch, is_prefill=False)

    def decode_as(self, *, multi_query: bool, batch: int | None = None) -> Work:
        """All work of a decode step with one key/value head, or with one per query head."""
        config = replace(self.config, multi_query=multi_query)
        return whole(self._work(config, batch or self.batch, is_prefill=False).values())

    def intensities(self, batch: int) -> tuple[float, Heads]:
        """Operations per byte of a prefill, and of a decode step with one and with all heads."""
        prefill = whole(self._work(self.config, batch, is_prefill=True).values())
        one, many = (self.decode_as(multi_query=m, batch=batch) for m in (True, False))
        return prefill.intensity, Heads(one.intensity, many.intensity)

    def roof(self, device: Device) -> Roof | None:
        """What a device allows at most, in this dtype or in the one it was measured in; None if it
        does not compute in the dtype.
        """
        dtype = next(iter(device.rates)) if device.is_measured else self.dtype
        if dtype not in device.rates:
            return None
        here = replace(self, dtype=dtype)

        def seconds(work: Work) -> tuple[float, bool]:
            return device.least_seconds(work.flops, work.bytes, dtype)

        prefill, prefill_is_memory_bound = seconds(whole(here.prefill.values()))
        one, many = (here.decode_as(multi_query=m) for m in (True, False))
        decode, decode_is_memory_bound = seconds(one if self.config.multi_query else many)
        rates = Heads(*(self.batch / seconds(work)[0] for work in (one, many)))
        return Roof(dtype, prefill, prefill_is_memory_bound, decode, decode_is_memory_bound, rates)

    def rows_that_fit(
        self, memory: float, context: int, dtype: torch.dtype, *, int8: bool = False
    ) -> Heads:
        """How many rows of a given number of positions fit into memory next to the weights.

        Activations are not counted: they need little, and how much depends on the program.

        Args:
            int8: both weights and cache in 8 bits.
        """
        counts = []
        for multi_query in (True, False):
            config = replace(self.config, multi_query=multi_query)
            left = memory - model_bytes(config, dtype, int8=int8)
            row = cache_bytes(config, torch.int8 if int8 else dtype, 1, context)
            counts.append(max(0, int(left // row)))
        return Heads(*counts)

    def contexts(self) -> list[int]:
        """Up to five lengths to show: the model's context and halves of it."""
        return [n for i in range(4, -1, -1) if (n := self.config.n_positions >> i)]

    def to_dict(self, devices: Sequence[Device]) -> dict[str, Any]:
        """All of it, ready for JSON."""
        prefill, decode = self.shapes(is_prefill=True), self.shapes(is_prefill=False)
        intensities = {batch: self.intensities(batch) for batch in BATCHES}
        return {
            "batch": self.batch,
            "context": self.context,
            "dtype": name_of(self.dtype),
            "int8_weights": self.int8,
            "dimensions": self.dimensions(is_prefill=True),
            "tensors": [
                {"name": name, "axes": axes, "prefill": prefill[name], "decode": decode[name]}
                for name, axes in TENSORS
            ],
            "parts": {
                name: {
                    "parameters": work.parameters,
                    "prefill": _figures(work),
                    "decode": _figures(self.decode[name]),
                }
                for name, work in self.prefill.items()
            },
            "prefill": _figures(whole(self.prefill.values())),
            "decode": _figures(whole(self.decode.values())),
            "intensity_by_batch": [
                {"batch": batch, "prefill": prefill, "decode": decode._asdict()}
                for batch, (prefill, decode) in intensities.items()
            ],
            "rooflines": [_roof_figures(device, self.roof(device)) for device in devices],
            "rows_that_fit": [
                {
                    "device": device.name,
                    "memory_bytes": int(device.memory),
                    "context": context,
                    **{
                        label: self.rows_that_fit(device.memory, context, dtype, int8=i)._asdict()
                        for label, dtype, i in STORAGE
                    },
                }
                for device in devices
                for context in self.contexts()
            ],
        }

    def _work(self, config: GPTConfig, batch: int, *, is_prefill: bool) -> dict[str, Work]:
        itemsize = 1 if self.int8 else self.dtype.itemsize
        return work_by_part(
            config, batch, self.context, self.dtype, itemsize=itemsize, is_prefill=is_prefill
        )


class Roof(NamedTuple):
    """The least times of a pass on a device.

    Attributes:
        dtype: of weights, activations and cache there.
        prefill, decode: seconds.
        prefill_is_memory_bound, decode_is_memory_bound: whether memory traffic sets the time, not
            arithmetic.
        rates: tokens per second of decoding, of all rows together.
    """

    dtype: torch.dtype
    prefill: float
    prefill_is_memory_bound: bool
    decode: float
    decode_is_memory_bound: bool
    rates: Heads


# How weights and cache may be kept: label, dtype, and whether both are in 8 bits instead.
STORAGE = (
    ("float32", torch.float32, False),
    ("16 bits", torch.bfloat16, False),
    ("int8", torch.bfloat16, True),
)


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _figures(work: Work) -> dict[str, float]:
    return {"flops": work.flops, "bytes": work.bytes, "flops_per_byte": work.intensity}


def _roof_figures(device: Device, roof: Roof | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device.name,
        "source": device.source,
        "bytes_per_second": device.bandwidth,
        "flops_per_second": {name_of(dtype): rate for dtype, rate in device.rates.items()},
    }
    if roof is None:
        return found | {"dtype": None}
    names = {True: "memory", False: "arithmetic"}
    return found | {
        "dtype": name_of(roof.dtype),
        "flops_per_byte": device.balance(roof.dtype),
        "prefill_seconds": roof.prefill,
        "prefill_limited_by": names[roof.prefill_is_memory_bound],
        "decode_seconds": roof.decode,
        "decode_limited_by": names[roof.decode_is_memory_bound],
        "decode_tokens_per_second": roof.rates._asdict(),
    }
