"""From a model's tensors to a call of the compiled forward pass."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache as once
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator
from torch import Tensor

from mqa_kernels.cpu import attention, linear, rows
from mqa_kernels.cpu.forward import PHASES, Scratch, Shape, forward
from mqa_kernels.cpu.simd import HAS_VNNI, PROCESSOR, kernel
from mqa_kernels.cpu.team import Team, new_counters

CODES = {"gelu": rows.GELU, "gelu_tanh": rows.GELU_TANH, "relu": rows.RELU}
UNUSED_SECONDS = 30 * 24 * 3600  # after which compiled code is removed
SHARED_TOKENS = 16  # with more, a token's blocks of keys are not shared out among threads

# numba knows no 16-bit floats: see `simd`.
_DTYPES = {
    torch.float32: np.float32,
    torch.int8: np.int8,
    torch.int32: np.int32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}

_TEAM = Team()

Tensors = Sequence[Tensor | None]


class Program:
    """The forward pass of one model.

    Args:
        shape: sizes and switches.
        layers: 16 tensors for each layer, and
        ends: 7, contiguous and in the order of `forward`; None for what there is not. They are read
            in place, so changes of their values are seen.
        numbers: of the layers, by which each finds its part of the cache.
    """

    def __init__(
        self, shape: Shape, layers: Sequence[Tensors], numbers: Sequence[int], ends: Tensors
    ) -> None:
        self.shape = shape
        # Kept, so that an address stays valid when the model gets another tensor.
        self._tensors = [x.detach() for row in (*layers, ends) for x in row if x is not None]
        rows = [[*map(_address, row), number] for row, number in zip(layers, numbers, strict=True)]
        self._layers = np.array(rows, dtype=np.int64).reshape(-1, 17)
        self._ends = np.array(list(map(_address, ends)), dtype=np.int64)
        self._dtypes = [x.dtype for x in (ends[0], ends[2]) if x is not None]
        self._least = max(numbers, default=-1) + 1  # layers that a cache must have
        self._limit = 0 if ends[2] is None else len(ends[2])  # positions

    def kinds(self, kv: Tensor) -> tuple[torch.dtype, ...]:
        """The dtypes of weights, other parameters and cache, for which code is compiled."""
        return (*self._dtypes, kv.dtype)

    def __call__(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        kv: Tensor,
        scales: Tensor | None = None,
        *,
        rounds: bool = False,
    ) -> Tensor:
        """Logits (M, V) float32 of some of N tokens.

        Args:
            ids, slots, positions: of each token. Those of a slot continue what the cache holds of
                it, in order.
            wanted: which tokens' logits to compute: indices into `ids`.
            kv: (L, B, S, G, 2D), a cache's keys and values; the tokens' are added.
            scales: (L, B, S, G, 2) float32, of int8 keys and values.
            rounds: in front of int8 weights, round the rows to 8 bits too where the processor
                multiplies such integers faster: for many tokens, as a prompt's. Not the head's.

        Raises:
            IndexError: a token is not in the vocabulary.
            ValueError: the cache is not one for this model, or for fewer rows or tokens.
        """
        s, N, M = self.shape, len(ids), len(wanted)
        if min(ids) < 0 or max(ids) >= s.V:
            raise IndexError(f"the tokens are not all from 0 to {s.V - 1}, the vocabulary")
        needed = (self._least, max(slots) + 1, max(positions) + 1)
        is_fit = kv.shape[3:] == (s.G, 2 * s.D) and needed[2] <= self._limit
        if not is_fit or any(a > b for a, b in zip(needed, kv.shape, strict=False)):
            raise ValueError(
                f"the cache's keys and values are {list(kv.shape)}: these tokens of this model "
                f"need at least {[*needed, s.G, 2 * s.D]}, and {self._limit} positions at most"
            )
        threads = torch.get_num_threads()
        can_round = HAS_VNNI and self._dtypes[0] == torch.int8 and s.C % 64 == s.F % 64 == 0
        # A row's end has room for an integer of each block, and the factor.
        most = (linear.ROW_END // 4 - 1) * 4 * linear.BLOCK
        can_round = can_round and max(s.C, s.F) <= most
        rounds = rounds and can_round
        # float32 where there are none, so that no code is compiled for them.
        rounded = torch.int8 if can_round else torch.float32
        blocks = (max(positions) + attention.KEYS) // attention.KEYS
        heads, step = s.H // s.G, attention.part_size(s.D)
        is_shared = N <= SHARED_TOKENS
        scores = heads * attention.KEYS + (0 if is_shared else blocks * heads * step)
        own = max(linear.PANEL * linear.WIDTH, scores)
        sizes = {
            "x": N * s.C,
            "normed": max(N, M) * s.C,
            "qkv": N * (s.C + 2 * s.G * s.D),
            "y": N * s.C,
            "hidden": N * s.F,
            "parts": N * blocks * s.H * step if is_shared else 0,
            "own": threads * own,
            "rounded": N * (max(s.C, s.F) + linear.ROW_END) // 4 if rounds else 0,
        }
        floats = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
        memory = torch.empty(sum(map(_aligned, sizes.values())) + 16, **floats)
        places, begin = {}, -(-memory.data_ptr() // 64) * 64
        for name, size in sizes.items():
            places[name] = begin if size else 0
            begin += 4 * _aligned(size)
        logits = torch.empty(M, s.V, **floats)
        _TEAM.run(
            _compiled(),
            (
                s,
                self._layers,
                self._ends,
                *(np.asarray(x, dtype=np.int64) for x in (ids, slots, positions)),
                np.arange(N),
                np.asarray(wanted, dtype=np.int64),
                attention.Cache(kv.data_ptr(), _address(scales), *kv.stride()[:3]),
                Scratch(**places, own_size=own, logits=logits.data_ptr()),
                blocks,
                rounds,
                new_counters(PHASES * s.L + 3),
                linear.Kinds(
                    *map(_example, (*self.kinds(kv), torch.float32, rounded, torch.int32))
                ),
            ),
            threads,
            owners=(self, memory, logits, kv, scales),
        )
        return logits


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _example(dtype: torch.dtype) -> np.ndarray:
    """An empty array."""
    return np.empty(0, _DTYPES[dtype])


def _aligned(size: int) -> int:
    """At least `size` numbers, in whole cache lines."""
    return -(-size // 16) * 16


class _Locator(InTreeCacheLocator):
    """Where compiled code is kept: for all checkouts together, since the folder's name covers the
    sources."""

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def ensure_cache_path(self) -> None:
        with suppress(OSError):  # code can be read where none can be written
            super().ensure_cache_path()

    def get_source_stamp(self) -> str:
        return ""


class _Files(CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]


class _Cache(FunctionCache):
    """Compiled code on disk, which is used where it can be read and written."""

    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # damaged, or written by something else
            return None
        # Two processes that save at once may choose the same file name.
        return found if found is not None and found.signature.args == sig else None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # such as a full disk
            try:
                super().save_overload(sig, data)
            except Exception as error:
                if isinstance(error, OSError):
                    raise
                self.flush()  # a damaged index: begin a new one
                super().save_overload(sig, data)


@once
def _compiled() -> Any:
    dispatcher = kernel(forward)
    with suppress(RuntimeError):  # no home: each process compiles again
        own, cache = cache_folder(), _Cache(forward)
        # A variable of numba's may choose another folder, whose name covers less.
        if cache.cache_path == str(own):
            dispatcher._cache = cache
            keep_used(own)
    return dispatcher


def keep_used(own: Path) -> None:
    """Note that a folder of compiled code is used, and remove those that long have not been.

    Each version of the kernels has a folder of its own. A process that loses its folder compiles
    again; it never sees half of one, since a folder is renamed first.
    """
    with suppress(OSError):
        os.utime(own)
    for old in own.parent.glob("compiled-*"):
        with suppress(OSError):  # another process removes it too
            if old != own and time.time() - old.stat().st_mtime > UNUSED_SECONDS:
                old.rename(old.with_name(f"unused-{os.getpid()}-{old.name}"))
    for doomed in own.parent.glob("unused-*"):  # a killed process may have left some
        shutil.rmtree(doomed, ignore_errors=True)


def cache_folder() -> Path:
    """Where compiled code is kept. The name changes with the code of this package, with numba's
    version and with the processor: numba would replace what another version or host has written."""
    digest = hashlib.sha256(repr((numba.__version__, PROCESSOR)).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA")
    else:
        user = os.environ.get("XDG_CACHE_HOME")
    folder = Path(user) if user else Path.home() / ".cache"
    return folder / "mqa-gpt" / f"compiled-{digest.hexdigest()[:16]}"
