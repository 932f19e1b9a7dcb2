"""What a kernel's machine code (SASS) does, on every path through it.

The checks of `check_kernels.py` that need control flow: what the assembler moved where. SASS is not
documented by NVIDIA; what is relied on here is

    HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8], R24, gsb0
        wgmma: accumulators R24.., A in R120 to R123 (or gdesc, in shared memory); gsb0 ends a group
    WARPGROUP.DEPBAR.LE gsb0, 0x1     waits until at most one group is unfinished
    LDGSTS, LDGDEPBAR, DEPBAR.LE SB0, 0x4    cp.async, the end of a group of them, and the wait
    ACQBULK                           griddepcontrol.wait

`tests/scripts/test_sass.py` compares which registers an instruction writes with `nvdisasm`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

State = TypeVar("State")

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?(\S+)\s*(.*?)\s*;")
REGISTER = re.compile(r"\b(U?R)(\d+)\b")
CONSTANT = re.compile(r"\bc\[0x0\]\[(\w*)")
PRODUCT = re.compile(r"[BHIQ]GMMA\.64x(\d+)x\d+\.(\w+)")
# Instructions whose first register is a source.
WRITE_NOTHING = re.compile(
    r"\w*SETP|R2P|BAR|BMOV\.\S*B|BRX|CALL|RET|WARPSYNC|NANOSLEEP|DEPBAR|VOTEU?\.ALL|KILL"
)
LOADS = re.compile(r"(LDG|LD|LDGSTS)(\.|$)")
STORES = re.compile(r"(STG|ST|REDG?|ATOMG?|UBLKCP|UBLKRED|UTMA\w+)(\.|$)")
UNKNOWN = "an unknown address"
MOST_GROUPS = 8  # of products that are told apart; a wait names the newest few

# Where a kernel's parameters begin in constant bank 0, by architecture.
PARAMETERS = {80: 0x160, 90: 0x210, 100: 0x380}
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i64": 8, "u64": 8, "fp64": 8}  # bytes; others 4, pointers 8


class Instruction(NamedTuple):
    """One instruction; `guard` is the predicate under which it runs, "" if it always does."""

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {', '.join(self.operands)} at {self.address:#06x}"


def parse(text: str) -> list[Instruction]:
    """The instructions in what `cuobjdump -sass` prints for one kernel."""
    return [
        Instruction(int(address, 16), guard or "", name, tuple(filter(None, rest.split(", "))))
        for address, guard, name, rest in LINE.findall(text)
    ]


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction the indices of those that may run next.

    Raises:
        ValueError: a jump whose target is computed.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    returns = [i + 1 for i, other in enumerate(code) if other.name.startswith("CALL")]
    found = []
    for i, instruction in enumerate(code):
        kind = instruction.name.partition(".")[0]
        # A jump has its condition in front or, as `BRA.U UP0, 0x40`, as an operand.
        following = [i + 1]
        if kind in ("BRA", "CALL"):
            target = index[int(instruction.operands[-1].split()[-1], 16)]
            is_conditional = instruction.guard or len(instruction.operands) > 1
            following = [target, i + 1] if is_conditional else [target]
        elif kind in ("EXIT", "RET"):
            following = returns if kind == "RET" else []
            following = [*following, i + 1] if instruction.guard else following
        elif kind in ("BRX", "JMP", "JMX", "BRXU"):
            raise ValueError(f"{instruction}: jumps to a computed address, which is not followed")
        found.append([j for j in following if j < len(code)])
    return found


def states(
    code: list[Instruction],
    initial: State,
    step: Callable[[Instruction, State], State | None],
    join: Callable[[State, State], State],
) -> dict[int, State]:
    """The state before each instruction that can be reached, joined over all paths to it.

    Args:
        step: the state after an instruction; None where no path is to be followed further.
    """
    following = successors(code)
    before, waiting = {0: initial}, [0]
    while waiting:
        i = heapq.heappop(waiting)
        after = step(code[i], before[i])
        if after is None:
            continue
        for j in following[i]:
            joined = join(before[j], after) if j in before else after
            if j not in before or joined != before[j]:
                before[j] = joined
                heapq.heappush(waiting, j)
    return before


def loops(code: list[Instruction]) -> Iterator[set[int]]:
    """The instructions of each loop: all that lead from a backward jump's target back to it."""
    following = successors(code)
    leading: dict[int, list[int]] = {}
    for i, others in enumerate(following):
        for j in others:
            leading.setdefault(j, []).append(i)
    reached = states(code, True, lambda instruction, state: state, lambda a, b: a)
    for end in reached:
        for top in following[end]:
            if top > end:
                continue
            body, waiting = {top}, [end]
            while waiting:
                i = waiting.pop()
                if i not in body:
                    body.add(i)
                    waiting += leading.get(i, [])
            yield body


# ---------------------------------------------------------------------------------------- registers


def written(instruction: Instruction) -> list[str]:
    """The registers ("R4", "UR4") that an instruction writes, in order."""
    name = instruction.name
    if WRITE_NOTHING.match(name):
        return []
    # Predicates that are written come first: IADD3 R0, P0, .. but SHFL.IDX PT, R0, ..
    for operand in instruction.operands[:2]:
        match = re.fullmatch(r"(U?R)(\d+)", operand)
        if match:
            kind, first = match[1], int(match[2])
            return [f"{kind}{first + i}" for i in range(width(name))]
        if not re.fullmatch(r"U?P[\dT]", operand):
            break
    return []


def width(name: str) -> int:
    """How many registers an instruction writes in a row."""
    product = PRODUCT.match(name)
    if product:
        return int(product[1]) // (2 if product[2] in ("F32", "S32") else 4)
    if name.startswith("LDSM"):
        return int(name[-1]) if name[-1] in "24" else 1
    if name.startswith(("HMMA", "IMMA")):
        return 2 if re.match(r"HMMA\.\d+\.F16", name) else 4
    if ".128" in name:
        return 4
    is_wide = any(
        (
            ".64" in name or ".WIDE" in name,
            re.match(r"D(ADD|MUL|FMA)|[FI]2F(\.FTZ)?\.F64|F2I\S*\.[SU]64", name),
            name.startswith("CS2R") and ".32" not in name,
        )
    )
    return 2 if is_wide else 1


# ----------------------------------------------------------------------------------------- products


def products_in_flight(code: list[Instruction]) -> dict[int, dict[int, int]]:
    """For each instruction that can be reached, the products that may be unfinished before it.

    A product is the index of its HGMMA. It maps to 0 while its group is open, else to how many
    groups have ended since it was issued, its own included.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}

    def step(instruction: Instruction, before: dict[int, int]) -> dict[int, int]:
        if PRODUCT.match(instruction.name):
            after = before | {index[instruction.address]: 0}
            if "gsb0" in instruction.operands:
                after = {i: min(n + 1, MOST_GROUPS) for i, n in after.items()}
            return after
        if instruction.name.startswith("WARPGROUP.DEPBAR"):
            newest = int(instruction.operands[-1], 16)
            return {i: n for i, n in before.items() if n <= newest}  # 0 stays
        return before

    def join(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
        return {i: min(a.get(i, MOST_GROUPS), b.get(i, MOST_GROUPS)) for i in a | b}

    return states(code, {}, step, join)


def overwritten_operands(code: list[Instruction]) -> list[str]:
    """Writes to a register that an unfinished product still reads its A operand from."""
    found = []
    for i, in_flight in sorted(products_in_flight(code).items()):
        targets = set(written(code[i]))
        for product in in_flight:
            first = re.fullmatch(r"R(\d+)", code[product].operands[1])
            if first and not targets.isdisjoint(f"R{int(first[1]) + k}" for k in range(4)):
                found.append(f"{code[i]} overwrites an operand of {code[product]}")
    return found


def exponentials(code: list[Instruction]) -> tuple[int, int]:
    """How many exponentials run while products do, and how many there are, in loops of products."""
    in_flight = products_in_flight(code)
    inside = {
        i for body in loops(code) if any(PRODUCT.match(code[i].name) for i in body) for i in body
    }
    found = [bool(in_flight[i]) for i in inside if code[i].name.startswith("MUFU.EX2")]
    return sum(found), len(found)


# -------------------------------------------------------------------------------------------- loads


def copies_in_flight(code: list[Instruction]) -> int | None:
    """The fewest groups of asynchronous copies that a loop does not wait for; None without any.

    At 0 a loop waits for all of its loads, and nothing is under way meanwhile.
    """
    waits = [
        int(code[i].operands[-1], 16)
        for body in loops(code)
        if any(code[i].name.startswith("LDGSTS") for i in body)
        for i in body
        if code[i].name.startswith("DEPBAR")
    ]
    return min(waits, default=None)


def repeated_spills(code: list[Instruction]) -> int:
    """How many instructions in loops load or store spilled registers; in all, if nothing loops.

    Around a loop, a spill is one store and one load of a register that the loop does not need.
    """
    accesses = {i for i, one in enumerate(code) if re.match(r"(LDL|STL)\b", one.name)}
    inside = set().union(*loops(code)) or accesses
    return len(accesses & inside)


def parameter_names(signature: Mapping[str, str], architecture: int) -> dict[int, str]:
    """Names of a kernel's pointer arguments by where they are in constant bank 0.

    Args:
        signature: Triton's: names to "*bf16", "i32", "constexpr", ...
    """
    offset, found = PARAMETERS[architecture], {}
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") else SIZES.get(kind, 4)
        offset = -(-offset // size) * size
        if kind.startswith("*"):
            found[offset] = name
        offset += size
    return found


def race_with_predecessor(code: list[Instruction], parameters: Mapping[int, str]) -> str:
    """What a kernel wrongly does before griddepcontrol.wait on some path; "" if nothing.

    Args:
        parameters: see `parameter_names`.
    """
    if not any(instruction.name == "ACQBULK" for instruction in code):
        return "does not wait for the kernel before"
    origins = pointers_before_wait(code, parameters)
    read = set()
    for i, state in origins.items():
        name = code[i].name
        if STORES.match(name):
            return "writes before it waits"
        if LOADS.match(name):
            # A copy has two addresses and reads the second.
            address = [operand for operand in code[i].operands if "[" in operand][-1]
            read |= origins_of(address.rpartition("[")[2], state) or {UNKNOWN}
    return f"reads {', '.join(sorted(read))} before it waits" if read else ""


Origins = dict[str, frozenset[str]]  # register -> the pointer arguments that it is computed from


def pointers_before_wait(
    code: list[Instruction], parameters: Mapping[int, str]
) -> dict[int, Origins]:
    """For each instruction that can be reached without a wait, the origins of all registers."""

    def step(instruction: Instruction, before: Origins) -> Origins | None:
        if instruction.name == "ACQBULK":
            return None
        targets = written(instruction)
        if not targets:
            return before
        sources = " ".join(instruction.operands)
        after = dict(before)
        for k, register in enumerate(targets):
            found = origins_of(sources.partition(" ")[2], before)
            for offset in CONSTANT.findall(sources):
                # Of constants that are loaded, each word has its own origin.
                word = 4 * k if re.match(r"U?LDC", instruction.name) else 0
                found |= constant_origin(offset, word, parameters)
            if LOADS.match(instruction.name):
                found = {UNKNOWN}
            if instruction.guard:
                found |= before.get(register, frozenset())
            after[register] = frozenset(found)
        return {register: names for register, names in after.items() if names}

    def join(a: Origins, b: Origins) -> Origins:
        none: frozenset[str] = frozenset()
        return {register: a.get(register, none) | b.get(register, none) for register in a | b}

    return states(code, {}, step, join)


def origins_of(text: str, state: Origins) -> set[str]:
    """The origins of all registers in a text."""
    names = (f"{kind}{number}" for kind, number in REGISTER.findall(text))
    return set().union(*(state.get(name, frozenset()) for name in names))


def constant_origin(offset: str, word: int, parameters: Mapping[int, str]) -> set[str]:
    """The pointer argument at a place in constant bank 0, if there is one."""
    if not offset.startswith("0x"):  # a register decides
        return {UNKNOWN}
    place = int(offset, 16) + word
    return {parameters[at] for at in (place, place - 4) if at in parameters}
