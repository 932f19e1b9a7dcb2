"""How much memory is left, so that what cannot fit is refused before it is allocated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError

if TYPE_CHECKING:
    from mqa_gpt.model import GPT


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    On Linux that is what the machine has available or, if less, what the limits of this process's
    control groups (containers, batch systems; cgroup v2) leave. Memory that only caches files
    counts as available in both.

    Args:
        device: the CPU or an accelerator.
        root: where `proc` and `sys` are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    rooms = [] if found is None else [int(found[1]) * 1024]
    group = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    if group is not None:
        top = root / "sys/fs/cgroup"
        folder = top / group[1]
        while folder.is_relative_to(top):
            rooms += _room_in(folder)
            folder = folder.parent
    return min(rooms, default=None)


def cache_bytes(config: GPTConfig, dtype: torch.dtype, rows: int = 1, slots: int = 1) -> int:
    """Bytes of a `KVCache` with `slots` positions in each of `rows` rows."""
    of_a_head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)  # its scale
    return rows * slots * 2 * config.n_layer * config.n_kv_head * of_a_head


def require_cache_room(model: GPT, rows: int, slots: int, copied: int | None = None) -> None:
    """Raise PromptError if the model's device cannot hold what generation needs for its cache.

    Args:
        rows, slots: size of the cache.
        copied: slots, of all rows together, that are held twice for a moment. By default those of
            several rows: when one leaves, the others are copied.
    """
    if copied is None:
        copied = 0 if rows == 1 else rows * slots
    dtype = model.cache_dtype or model.dtype
    needed = cache_bytes(model.config, dtype, slots=rows * slots + copied)
    room = available_memory(model.device)
    if room is not None and needed > room:
        raise PromptError(
            f"{rows:,} completions of {slots:,} tokens need {needed / 1e9:,.2f} GB for their keys "
            f"and values, but {room / 1e9:,.2f} GB are available on {model.device}: ask for less"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; on a CPU torch has no type for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _room_in(group: Path) -> list[int]:
    """What the limit of one control group leaves; nothing if it has no limit."""
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if not limit.strip().isdigit() or not used.strip().isdigit():  # "max", or no such file
        return []
    cached = re.findall(r"^(?:in)?active_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    return [max(0, int(limit) - int(used) + sum(map(int, cached)))]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
