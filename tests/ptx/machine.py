"""Running a kernel: blocks one after the other, the warps of a block between barriers.

The warps of a block run in one of four orders: all in lockstep ("together"), or one by one from
barrier to barrier, "forward", "reverse" or in "random" order. Threads of a group may diverge: those
at the lowest instruction run until the others' place is reached, as compilers lay code out.

Source: PTX ISA 8.7, sections 2 (machine model) and 9.7.13.1 (bar.sync).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.ptx import arithmetic, tensor_cores, transfers
from tests.ptx.memory import GlobalMemory, RaceError, SharedMemory
from tests.ptx.parse import Instruction, Program, UnknownPTXError, parse, read_before_written
from tests.ptx.registers import DTYPES, WARP, Array, Registers, Run
from tests.ptx.tensor_cores import TensorCores
from tests.ptx.transfers import Context

ORDERS = ("together", "forward", "reverse", "random")
CONTROL = ("bra", "bar", "ret")


@dataclass
class Segment:
    """Instructions that run one after the other, and the one that ends them, if any."""

    runs: list[Run] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    last: Instruction | None = None
    following: int = 0  # the instruction after the segment


class Group:
    """Warps that run in lockstep, with a translation of the program for their registers."""

    def __init__(self, program: Program, context: Context) -> None:
        self.program, self.context = program, context
        self.tensor = TensorCores()
        self.end = len(program.instructions)
        self.segments = self._segments()

    def _segments(self) -> dict[int, Segment]:
        starts = {0, *self.program.labels.values()}
        segments: dict[int, Segment] = {}
        segment = Segment()
        for index, instruction in enumerate(self.program.instructions):
            if index in starts:
                segment.following = index
                segment = segments[index] = Segment()
            if instruction.name in CONTROL and instruction.modifiers[:1] != ("warp",):
                segment.last, segment.following = instruction, index + 1
                starts.add(index + 1)
            elif instruction.name != "bar":  # bar.warp.sync: the lanes of a warp are in step
                segment.runs.append(self._translate(instruction))
                segment.instructions.append(instruction)
                segment.following = index + 1
        return segments

    def _translate(self, instruction: Instruction) -> Run:
        with transfers.naming(instruction):
            run = (
                arithmetic.translate(instruction, self.context.registers)
                or transfers.translate(instruction, self.context)
                or tensor_cores.translate(instruction, self.context, self.tensor)
            )
            if run is None:
                raise UnknownPTXError(instruction.text)
            return self._guarded(run, instruction) if instruction.guard else run

    def _guard(self, instruction: Instruction) -> Array:
        return self.context.registers.source(instruction.guard, DTYPES["pred"])

    def _guarded(self, run: Run, instruction: Instruction) -> Run:
        """Run an instruction only for the threads whose predicate holds."""
        predicate, negated = self._guard(instruction), instruction.negated

        def guarded(mask: Array | None) -> None:
            active = ~predicate if negated else predicate
            if mask is not None:
                active = active & mask
            if active.all():
                run(None)
            elif active.any():
                run(active)

        return guarded

    def start_block(self, block: Sequence[int], grid: Sequence[int]) -> None:
        self.context.start_block()
        self.tensor.open, self.tensor.groups = [], []
        for axis, index, count in zip("xyz", block, grid, strict=True):
            self.context.registers.special[f"%ctaid.{axis}"][:] = index
            self.context.registers.special[f"%nctaid.{axis}"][:] = count

    def execute(self) -> Iterator[int]:
        """Run one block's program; yields the place of each barrier that the warps reach."""
        places = np.zeros(self.context.registers.threads, int)
        place, mask = 0, None
        while place < self.end:
            segment = self.segments[place]
            run = None
            try:
                for run in segment.runs:
                    run(mask)
            except Exception as error:
                if run is not None:
                    error.add_note(f"at {segment.instructions[segment.runs.index(run)]}")
                raise
            following: int | Array = segment.following
            if segment.last is not None:
                if segment.last.name == "bar":
                    if mask is not None:
                        raise RaceError(f"divergent threads reach a barrier: {segment.last}")
                    yield place
                else:
                    following = self._jump(segment.last, segment.following)
            if mask is None and isinstance(following, int):
                place = following
                continue
            places[slice(None) if mask is None else mask] = (
                following if isinstance(following, int) or mask is None else following[mask]
            )
            place = int(places.min())
            mask = places == place
            if mask.all():
                mask = None
        self._check_nothing_pending()

    def _jump(self, instruction: Instruction, following: int) -> int | Array:
        """Where the threads continue after a branch or return: one place or one each."""
        if instruction.name == "ret":
            target = self.end
        else:
            assert isinstance(instruction.operands[0], str)
            target = self.program.labels[instruction.operands[0]]
        if not instruction.guard:
            return target
        taken = self._guard(instruction) != instruction.negated
        if taken.all():
            return target
        if not taken.any():
            return following
        return np.where(taken, target, following)

    def _check_nothing_pending(self) -> None:
        if self.tensor.in_flight():
            raise RaceError("a block ends with wgmma in flight")


class Kernel:
    """A compiled kernel, ready to run."""

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.program = parse(ptx)
        self.shared_bytes = shared_bytes
        unset = read_before_written(self.program)
        if unset:
            raise RaceError(f"registers may be read before they are written: {unset[:3]}")

    def run(
        self,
        memory: GlobalMemory,
        arguments: Sequence[int],
        grid: Sequence[int],
        order: str = "together",
        fence_copies: bool = True,
    ) -> set[tuple[str, str]]:
        """Run all blocks of the grid.

        Args:
            arguments: the parameters' raw bits, in order.
            order: in which the warps of a block run, one of ORDERS.
            fence_copies: as in `SharedMemory`.

        Returns:
            What was touched before griddepcontrol.wait: ("reads" or "writes", buffer's name).
        """
        assert order in ORDERS
        program = self.program
        warps = program.threads // WARP
        early: set[tuple[str, str]] = set()
        shared = SharedMemory(self.shared_bytes, smallest_access(program), warps, fence_copies)
        parameters = dict(zip(program.parameters, arguments, strict=True))
        groups = []
        count = 1 if order == "together" else warps
        threads = program.threads // count
        for first in range(0, program.threads, threads):
            warp = (np.arange(first, first + threads) // WARP + 1).astype("u1")
            registers = Registers(program, first, threads)
            groups.append(
                Group(program, Context(registers, memory, shared, warp, parameters, early))
            )
        grid = (*grid, 1, 1)[:3]
        generator = np.random.default_rng(0)
        for buffer in memory.buffers:
            buffer.read, buffer.written = False, None
        with np.errstate(all="ignore"):
            for block in np.ndindex(*grid[::-1]):
                self._run_block(groups, shared, block[::-1], grid, order, generator)
        return early

    def _run_block(
        self,
        groups: list[Group],
        shared: SharedMemory,
        block: Sequence[int],
        grid: Sequence[int],
        order: str,
        generator: np.random.Generator,
    ) -> None:
        shared.start_block()
        for group in groups:
            group.start_block(block, grid)
        running = [group.execute() for group in groups]
        while True:
            turns = list(range(len(groups)))
            if order == "reverse":
                turns.reverse()
            elif order == "random":
                generator.shuffle(turns)
            # Each group runs to its next barrier, or to its end.
            reached = {next(running[turn], None) for turn in turns}
            if len(reached) > 1:
                raise RaceError(f"warps wait at different barriers of {self.program.name}")
            if reached == {None}:
                return
            shared.barrier()


def smallest_access(program: Program) -> int:
    """Bytes of the smallest access to shared memory, the unit in which races are detected."""
    sizes = [16]
    for i in program.instructions:
        if i.name in ("ld", "st") and "shared" in i.modifiers:
            count = max((int(m[1]) for m in i.modifiers if m in ("v2", "v4")), default=1)
            sizes.append(count * DTYPES[i.type].itemsize)
        elif i.name == "cp" and "shared" in i.modifiers:
            sizes.append(int(str(i.operands[2]), 0))
    return min(sizes)
