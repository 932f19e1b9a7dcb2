"""A GPU that is not there: what Triton compiles for it is interpreted, on tensors in CPU memory.

    with Device(order="reverse"):
        out = attention(q, k, v)

compiles each kernel that the call launches to PTX for sm_90, with the real arguments' types and
divisibility, and runs it when it is launched. ptxas is not needed: machine code is checked by
`scripts/check_kernels.py`. Triton's own interpreter must be off (TRITON_INTERPRET=0).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from packaging.version import Version
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.ptx.machine import Kernel
from tests.ptx.memory import GlobalMemory, RaceError

ARCHITECTURE = 90
MULTIPROCESSORS = 132  # H100, H200
# Triton before 3.7.1 leaves out the fence between cp.async and wgmma that the PTX ISA demands
# (triton #9610, #10537). Its attention kernels are tested as if cp.async needed none.
FENCES_COPIES = Version(triton.__version__) >= Version("3.7.1")


@dataclass
class Device:
    """Interprets launches while it is entered.

    Attributes:
        order: in which the warps of a block run (`machine.ORDERS`).
        rewrite: applied to each kernel's name and PTX before it runs, to break it on purpose.
        launched: names of the kernels launched so far.
    """

    order: str = "together"
    rewrite: Callable[[str, str], str] = lambda name, ptx: ptx
    launched: list[str] = field(default_factory=list)

    @contextmanager
    def active(self) -> Iterator[Device]:
        compile_launch = triton.JITFunction.run

        def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            compiled = compile_launch(kernel, *arguments, grid=grid, warmup=True, **options)
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            self.interpret(kernel.__name__, compiled, named, grid)

        driver.set_active(absent_gpu())
        with (
            # Kernels without machine code must not meet those with it.
            knobs.cache.scope(),
            patch("triton.backends.nvidia.compiler.CUDABackend.make_cubin", lambda *_: b""),
            patch.object(triton.JITFunction, "run", launch),
            patch("mqa_kernels.launch.runs_on", return_value=True),
            patch("mqa_kernels.launch.architecture", return_value=ARCHITECTURE),
            patch("mqa_kernels.forward.multiprocessors", return_value=MULTIPROCESSORS),
            patch("mqa_kernels.backward.multiprocessors", return_value=MULTIPROCESSORS),
            patch("mqa_kernels.fused_ops.multiprocessors", return_value=MULTIPROCESSORS),
        ):
            knobs.cache.dir += "-ptx"
            yield self

    def interpret(self, name: str, compiled: Any, named: dict[str, Any], grid: Any) -> None:
        """Run one launch on the tensors among its arguments."""
        memory = GlobalMemory()
        kernel = Kernel(self.rewrite(name, compiled.asm["ptx"]), compiled.metadata.shared)
        arguments = [
            raw_bits(named[argument], kind, argument, memory)
            for argument, kind in compiled.src.signature.items()
            if kind != "constexpr"
        ]
        # Triton appends pointers to scratch memory, which these kernels do not use.
        arguments += [0] * (len(kernel.program.parameters) - len(arguments))
        early = kernel.run(memory, arguments, grid, self.order, FENCES_COPIES)
        self.launched.append(name)
        if compiled.metadata.launch_pdl:
            check_overlap(name, early)


def check_overlap(name: str, early: set[tuple[str, str]]) -> None:
    """Raise if a kernel touched memory before it waited for its predecessor."""
    if early:
        wrong = ", ".join(f"{action} {buffer}" for action, buffer in sorted(early))
        raise RaceError(f"before griddepcontrol.wait, {name} {wrong}")


def raw_bits(value: Any, kind: str, name: str, memory: GlobalMemory) -> int:
    """A kernel argument as the bits of its parameter."""
    if isinstance(value, torch.Tensor):
        return memory.address_of(value, name)
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)


def absent_gpu() -> SimpleNamespace:
    """The part of Triton's driver that compiling needs."""
    return SimpleNamespace(
        get_current_device=lambda: ARCHITECTURE,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", ARCHITECTURE, 32),
    )
