"""Global and shared memory that notice wrong accesses.

Global memory is made of buffers, PyTorch's own storages, at addresses far apart: an access that
does not lie within one of them raises. Within a launch a buffer is either read or written, and no
byte is written twice, so that blocks cannot disturb each other in any order.

Shared memory detects races. Between two barriers, no warp may read or write what another has
written, or write what another has read (in any order: the detector looks at the epoch, not at who
came first). Sources: PTX ISA 8.7, sections 8 (memory consistency model) and 9.7.9.25 (asynchronous
copies); Savage et al. 1997 for the idea.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from tests.ptx.registers import POISON, Array

# Distance of buffers. Larger than any of them, so that a wrong offset cannot land in another.
SPACING = 1 << 40


class AccessError(RuntimeError):
    """An access out of bounds, misaligned, or of memory that holds nothing yet."""


class RaceError(RuntimeError):
    """Two accesses whose order nothing decides, at least one of them a write."""


@dataclass
class Buffer:
    """The bytes of one storage, and what the current launch has done with them."""

    name: str
    base: int
    data: Array  # bytes
    views: dict[int, Array] = field(default_factory=dict)  # by bytes per element
    read: bool = False
    written: Array | None = None  # per byte

    def view(self, size: int) -> Array:
        if size not in self.views:
            whole = len(self.data) // size * size
            self.views[size] = self.data[:whole].view(f"u{size}")
        return self.views[size]


class GlobalMemory:
    """Buffers by address."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.by_storage: dict[int, Buffer] = {}

    def address_of(self, tensor: torch.Tensor, name: str) -> int:
        """Address of a tensor's first element; its whole storage can be accessed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.by_storage:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            # Aligned as the storage is, since Triton compiles for that alignment.
            base = SPACING * (len(self.buffers) + 1) + storage.data_ptr() % 512
            buffer = Buffer(name, base, raw)
            self.buffers.append(buffer)
            self.by_storage[storage.data_ptr()] = buffer
        buffer = self.by_storage[storage.data_ptr()]
        return buffer.base + tensor.storage_offset() * tensor.element_size()

    def locate(self, address: Array, size: int) -> tuple[Buffer, Array]:
        """The buffer in which all accesses of `size` bytes lie, and their offsets.

        Raises:
            AccessError: some lie outside of it, or are not aligned to their size.
        """
        low, high = int(address.min()), int(address.max()) + size
        index = low // SPACING - 1
        if not 0 <= index < len(self.buffers):
            raise AccessError(f"global address {low:#x} belongs to no buffer")
        buffer = self.buffers[index]
        offset = address - buffer.base
        if low < buffer.base or high > buffer.base + len(buffer.data):
            raise AccessError(
                f"bytes {low - buffer.base} to {high - buffer.base} of {buffer.name}, "
                f"which has {len(buffer.data)}"
            )
        if (address % size).any():
            raise AccessError(f"{buffer.name}: access of {size} bytes is not aligned")
        return buffer, offset

    def read(self, address: Array, size: int) -> tuple[Buffer, Array]:
        buffer, offset = self.locate(address, size)
        buffer.read = True
        if buffer.written is not None:
            raise RaceError(f"{buffer.name} is read and written in one launch")
        return buffer, offset

    def write(self, address: Array, size: int) -> tuple[Buffer, Array]:
        buffer, offset = self.locate(address, size)
        if buffer.read:
            raise RaceError(f"{buffer.name} is read and written in one launch")
        if buffer.written is None:
            buffer.written = np.zeros(len(buffer.data), bool)
        touched = offset[:, None] + np.arange(size)
        if buffer.written[touched].any() or len(np.unique(offset)) < len(offset):
            raise RaceError(f"{buffer.name}: bytes are written twice in one launch")
        buffer.written[touched] = True
        return buffer, offset


# States of a unit of shared memory.
EMPTY, HELD, ARRIVING = 0, 1, 2
SEVERAL = 255  # in place of one warp's number plus one


class SharedMemory:
    """A block's shared memory, and for each unit of bytes what happened since the last barrier.

    `writer` and `reader` hold the number plus one of the warp that wrote or read a unit in this
    epoch, 0 if none did, SEVERAL if several read it. A unit is the smallest access of the kernel.
    `fence_copies`: whether wgmma needs a fence after cp.async too, as the PTX ISA demands.
    """

    def __init__(self, size: int, unit: int, warps: int, fence_copies: bool = True) -> None:
        assert warps < SEVERAL
        self.size, self.unit, self.fence_copies = size, unit, fence_copies
        padded = -(-size // 16) * 16
        self.data = np.empty(padded, "u1")
        self.views = {n: self.data.view(f"u{n}") for n in (1, 2, 4, 8)}
        units = padded // unit
        self.writer, self.reader, self.state = (np.zeros(units, "u1") for _ in range(3))
        self.unfenced = np.zeros(units, bool)  # written, and not yet visible to wgmma
        self.in_use = np.zeros(units, "u1")  # wgmma instructions in flight that read it
        self.start_block()

    def start_block(self) -> None:
        self.data.fill(POISON)
        for array in (self.writer, self.reader, self.state, self.unfenced, self.in_use):
            array.fill(0)

    def barrier(self) -> None:
        """All warps have arrived: what they did before happened before what they do now."""
        self.writer.fill(0)
        self.reader.fill(0)

    def fence(self) -> None:
        """fence.proxy.async: what has been written becomes visible to wgmma."""
        self.unfenced.fill(False)

    def units(self, address: Array, size: int) -> Array:
        """(accesses, units per access)."""
        if (address % size).any():
            raise AccessError(f"shared memory: access of {size} bytes is not aligned")
        if ((address < 0) | (address + size > self.size)).any():
            raise AccessError(f"shared address {int(address.max())} of {self.size} bytes")
        return address[:, None] // self.unit + np.arange(size // self.unit)

    def read(self, address: Array, size: int, warp: Array) -> None:
        """Check reads of `size` bytes; `warp` is the reading warp's number plus one."""
        self.read_units(self.units(address, size), warp[:, None])

    def read_units(self, units: Array, warp: Array) -> None:
        self._check_held(units)
        writer = self.writer[units]
        if ((writer != 0) & (writer != warp)).any():
            raise RaceError("shared memory is read in the epoch in which another warp wrote it")
        self._mark_read(units, warp)

    def _check_held(self, units: Array) -> None:
        state = self.state[units]
        if (state == ARRIVING).any():
            raise RaceError("shared memory is read while cp.async fills it")
        if (state == EMPTY).any():
            raise AccessError("shared memory is read that nothing has been written to")

    def _mark_read(self, units: Array, warp: Array) -> None:
        reader = self.reader[units]
        reader = np.where((reader == 0) | (reader == warp), warp, SEVERAL).astype("u1")
        self.reader[units] = reader
        lost = self.reader[units] != reader  # two warps of one instruction read the same unit
        if lost.any():
            self.reader[units[lost]] = SEVERAL

    def write(self, address: Array, values: Array, warp: Array) -> Array:
        """Write values (accesses, elements), one access per address. Returns the units.

        Several warps may write the same value: Triton lets all that hold a copy of it do so.
        """
        size = values.shape[1] * values.itemsize
        units, warp = self.units(address, size), warp[:, None]
        self._check_write(units, warp)
        memory = self.views[values.itemsize]
        elements = address[:, None] // values.itemsize + np.arange(values.shape[1])
        writer = self.writer[units]
        other = ((writer != 0) & (writer != warp)).any(1)
        if other.any() and (memory[elements[other]] != values[other]).any():
            raise RaceError("shared memory is written in the epoch in which another warp wrote it")
        self.writer[units] = warp
        memory[elements] = values
        lost = (self.writer[units] != warp).any(1)
        if lost.any() and (memory[elements[lost]] != values[lost]).any():
            raise RaceError("two warps write different values to the same shared memory at once")
        self.state[units] = HELD
        self.unfenced[units] = True
        return units

    def _check_write(self, units: Array, warp: Array) -> None:
        reader = self.reader[units]
        if ((reader != 0) & (reader != warp)).any():
            raise RaceError("shared memory is written in the epoch in which another warp read it")
        if (self.state[units] == ARRIVING).any():
            raise RaceError("shared memory is written while cp.async fills it")
        if self.in_use[units].any():
            raise RaceError("shared memory is written while wgmma reads it")

    def start_copy(self, address: Array, size: int, warp: Array) -> Array:
        """cp.async: from now on the bytes hold nothing, until the copy is waited for."""
        poison = np.full((len(address), size // 4), POISON * 0x01010101, "u4")
        units = self.write(address, poison, warp)
        self.state[units] = ARRIVING
        return units

    def finish_copy(self, address: Array, data: Array, units: Array, warp: Array) -> None:
        """The bytes (accesses, size) arrive, visible to their own warp until the next barrier."""
        self.data[address[:, None] + np.arange(data.shape[1])] = data
        self.state[units] = HELD
        self.writer[units] = warp[:, None]
        self.unfenced[units] = self.fence_copies  # a fence before now does not order these bytes

    def start_asynchronous_read(self, units: Array, warp: Array) -> None:
        """wgmma reads units (each once) on behalf of warps; `warp` broadcasts against them."""
        self.read_units(units, warp)
        if self.unfenced[units].any():
            raise RaceError("wgmma reads shared memory without fence.proxy.async after the write")
        self.in_use[units] += 1

    def finish_asynchronous_read(self, units: Array, warp: Array) -> None:
        """The wgmma has been waited for. Other warps know that only after the next barrier."""
        self.in_use[units] -= 1
        self._mark_read(units, warp)
