"""Gluon with PyTorch in place of a GPU, as late and as early as the hardware may be.

Groups of warps are threads. A copy into shared memory fills it with NaN and arrives a moment later.
A product reads its operands when it begins and once more a moment after it is waited for, and they
must be the same. So whoever reads before a barrier says so gets NaN, whoever gives room free too
early an error, and whoever waits for what never comes one too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds until something is taken to hang
COMPUTING = 0.003  # seconds, long enough for what follows an arrival that comes too early


class Barrier:
    """An mbarrier: phases, each of which ends with the last of `count` arrivals and of the bytes
    that are expected in it."""

    def __init__(self) -> None:
        self.count = self.arrived = self.nbytes = self.phase = 0
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = count

    def arrive(self, expected: int = 0) -> None:
        with self.changed:
            self.arrived, self.nbytes = self.arrived + 1, self.nbytes + expected
            assert self.arrived <= self.count, "more arrivals than a phase has"
            self.end_phase()

    def receive(self, nbytes: int) -> None:
        with self.changed:
            self.nbytes -= nbytes
            self.end_phase()

    def end_phase(self) -> None:
        if self.arrived == self.count and self.nbytes == 0:
            self.arrived, self.phase = 0, self.phase + 1
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            ended = self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE)
            assert ended, "waited in vain"


class Shared:
    """A piece of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape, self.dtype = data.shape, data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))


class Barriers:
    """An array of barriers."""

    def __init__(self, size: int) -> None:
        self.all = [Barrier() for _ in range(size)]

    def index(self, i: int) -> Barrier:
        return self.all[int(i)]


class Descriptor:
    """A tensor in global memory, read in blocks; beyond its end are zeros."""

    def __init__(self, data: Tensor, shape: list[int], seconds: float) -> None:
        self.data, self.shape, self.dtype, self.layout = data, shape, data.dtype, None
        self.seconds = seconds  # that a copy takes
        self.block_type = SimpleNamespace(nbytes=shape[0] * shape[1] * data.element_size())

    def copy(self, at: list[int], barrier: Barrier, into: Shared) -> None:
        rows = self.data[int(at[0]) :][: self.shape[0]]
        assert at[1] == 0
        assert into.shape == tuple(self.shape)
        into.data.fill_(float("nan"))

        def finish() -> None:
            into.data.zero_()
            into.data[: len(rows)] = rows
            barrier.receive(self.block_type.nbytes)

        threading.Timer(self.seconds, finish).start()


class Pointer:
    """The address of an element, or of many."""

    def __init__(self, data: Tensor, offsets: Any = 0) -> None:
        self.data, self.offsets = data, offsets

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.data, self.offsets + offsets)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.data, self.offsets[key])

    def store(self, values: Tensor, mask: Tensor) -> None:
        mask = mask.expand(values.shape)
        self.data.view(-1)[self.offsets.expand(values.shape)[mask]] = values[mask]


class Product:
    """A product under way: nobody can compute with it before it has been waited for."""

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> None:
        self.shared = [x.data for x in (a, b) if isinstance(x, Shared)]
        self.read = [data.clone() for data in self.shared]
        value = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
        self.coming = value + acc if use_acc else value
        self.value: Tensor | None = None

    def finish(self) -> None:
        for data, read in zip(self.shared, self.read, strict=True):
            assert torch.equal(data, read), "changed while it was read, or not there yet"
        self.value = self.coming


under_way = threading.local()


def warpgroup_mma(
    a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async
    product = Product(a, b, acc, use_acc)
    if not hasattr(under_way, "products"):
        under_way.products = deque()
    under_way.products.append(product)
    return product


def warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    time.sleep(COMPUTING)
    while len(under_way.products) > outstanding:
        under_way.products.popleft().finish()
    values = []
    for dep in deps:
        value = dep.value if isinstance(dep, Product) else dep
        assert value is not None, "still under way"
        values.append(value)
    return values[0] if len(values) == 1 else tuple(values)


def warp_specialize(partitions: list[Any], warps: list[int], registers: Any) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def language(tile: int, b: int, tiles: int) -> SimpleNamespace:
    """`gl`, in one program of the grid."""
    programs = torch.tensor([tile, b])

    def shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            return Barriers(shape[0])
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

    return SimpleNamespace(
        constexpr=int,
        int64=torch.int64,
        float32=torch.float32,
        program_id=lambda axis: programs[axis],
        num_programs=lambda axis: tiles,
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        arange=lambda low, high, layout: torch.arange(low, high),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        where=torch.where,
        max=torch.amax,
        sum=torch.sum,
        exp2=torch.exp2,
        log2=torch.log2,
        convert_layout=lambda x, layout: x,
        SliceLayout=lambda dim, parent: None,
        store=Pointer.store,
        allocate_shared_memory=shared_memory,
        warp_specialize=warp_specialize,
    )


mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=lambda barrier, count: barrier.init(count),
    expect=Barrier.arrive,
    wait=Barrier.wait,
    arrive=Barrier.arrive,
)
tma = SimpleNamespace(async_copy_global_to_shared=Descriptor.copy)
