"""PTX text as instructions, and which registers each of them reads and writes.

Source: PTX ISA 8.7, sections 4 (syntax) and 9.3 (instruction format). Only what Triton emits
is read; anything else raises `UnknownPTXError` here or when it is translated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\n\{", re.DOTALL)
PARAMETER = re.compile(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)")
REGISTERS = re.compile(r"\.reg \.(\w+)\s+([%\w]+)(?:<(\d+)>)?")
STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
REGISTER = re.compile(r"%?[a-z]+\d+")
# Instructions that write no register, so that their first operand is a source like the others.
WITHOUT_TARGET = (
    "st", "stmatrix", "bra", "bar", "cp", "fence", "ret", "griddepcontrol", "prefetch",
)  # fmt: skip


class UnknownPTXError(NotImplementedError):
    """An instruction, operand or directive that the interpreter does not know."""


@dataclass(frozen=True)
class Address:
    """[base + offset]: a register or a symbol, and bytes."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@[!]guard name.modifiers operands`."""

    guard: str  # predicate register; empty if there is none
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str
    place: str  # source line, as "forward.py:45:72"

    @property
    def type(self) -> str:
        """The last modifier: the type of the operands."""
        return self.modifiers[-1]

    def __str__(self) -> str:
        return f"{self.text[:100]} ({self.place})"


@dataclass
class Program:
    """A kernel: parameters by name with their types, registers by name with their widths in bits,
    instructions, and the index of the instruction after each label."""

    name: str
    threads: int
    parameters: dict[str, str]
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Program:
    """The one kernel in a PTX module."""
    entry = ENTRY.search(ptx)
    if entry is None:
        raise UnknownPTXError("the module has no .visible .entry")
    name, parameters, directives = entry.groups()
    threads = re.search(r"\.reqntid (\d+)", directives)
    assert threads, "Triton always states the number of threads"
    program = Program(
        name, int(threads[1]), {symbol: kind for kind, symbol in PARAMETER.findall(parameters)}
    )
    body, end, _ = ptx[entry.end() :].partition("// -- End function")
    if not end:
        raise UnknownPTXError("the function has no end")
    place, statement = "", ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            place = comment.split("@")[0].strip()
        elif code.startswith(".reg"):
            declare(program, code)
        elif code.startswith(".pragma") or not code:
            continue
        else:
            *complete, statement = f"{statement} {code}".split(";")
            for text in complete:
                add_statement(program, text, place)
            statement = without_labels(program, statement)
    assert not statement
    assert program.instructions[-1].name == "ret"
    return program


def declare(program: Program, code: str) -> None:
    """Registers of a `.reg` directive: `%r<9>` declares %r0 to %r8."""
    match = REGISTERS.match(code)
    if match is None or match[1] not in WIDTHS:
        raise UnknownPTXError(code)
    kind, stem, count = match.groups()
    names = [stem] if count is None else [f"{stem}{i}" for i in range(int(count))]
    program.registers.update(dict.fromkeys(names, WIDTHS[kind]))


def without_labels(program: Program, text: str) -> str:
    """The text after leading labels, which are entered into the program, and scope braces."""
    while True:
        text = text.strip()
        label = re.match(r"(\$\w+):", text)
        if label:
            program.labels[label[1]] = len(program.instructions)
            text = text[label.end() :]
        elif text[:1] in ("{", "}"):
            text = text[1:]
        else:
            return text


def add_statement(program: Program, text: str, place: str) -> None:
    text = " ".join(without_labels(program, text).split())
    match = STATEMENT.fullmatch(text)
    if match is None:
        raise UnknownPTXError(f"{text} ({place})")
    negated, guard, opcode, rest = match.groups()
    name, *modifiers = opcode.split(".")
    operands = tuple(operand(part) for part in OPERAND.findall(rest))
    program.instructions.append(
        Instruction(guard or "", bool(negated), name, tuple(modifiers), operands, text, place)
    )


def operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(re.findall(r"[^{},\s]+", text))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    return text


def reads_and_writes(instruction: Instruction) -> tuple[set[str], set[str]]:
    """Names of the registers that an instruction reads and those that it writes."""
    operands = instruction.operands
    targets: tuple[Operand, ...] = ()
    if instruction.name == "wgmma":
        # The accumulators are read too, except where "scale-d" is the literal 0.
        if instruction.modifiers[0] == "mma_async":
            targets = operands[:1]
            operands = operands[1:] if operands[3] == "0" else operands
    elif instruction.name not in WITHOUT_TARGET:
        targets, operands = operands[:1], operands[1:]
    reads = named(operands)
    if instruction.guard:
        reads.add(instruction.guard)
    # A store's address is a source, wherever it stands.
    return reads, named(targets)


def named(operands: tuple[Operand, ...]) -> set[str]:
    """The registers among operands."""
    found = set()
    for item in operands:
        if isinstance(item, Address):
            found.update(REGISTER.findall(item.base))
        elif isinstance(item, tuple):
            found.update(name for name in item if REGISTER.fullmatch(name))
        else:
            found.update(REGISTER.findall(item) if item[:1] in "%!lh" else ())
    return found


def successors(program: Program, index: int) -> list[int]:
    """Instructions that may follow the one at `index`."""
    instruction = program.instructions[index]
    if instruction.name == "bra":
        target = program.labels[instruction.operands[0]]  # type: ignore[index]
        return [target, index + 1] if instruction.guard else [target]
    if instruction.name == "ret" and not instruction.guard:
        return []
    return [index + 1]


def read_before_written(program: Program) -> list[str]:
    """Instructions that may read a register that no instruction before them has written.

    A data-flow analysis over all paths, so it holds for every run. A write under a predicate
    counts: Triton clears the registers of a masked load first, and the interpreter poisons them.
    Packing two registers into one does not count as reading them: LLVM packs undefined halves that
    nothing uses.
    """
    bits = {name: 1 << i for i, name in enumerate(program.registers)}
    count = len(program.instructions)
    effects = []
    for instruction in program.instructions:
        reads, writes = reads_and_writes(instruction)
        if instruction.name == "mov" and isinstance(instruction.operands[1], tuple):
            reads = set()
        effects.append(
            (sum(bits[r] for r in reads if r in bits), sum(bits[w] for w in writes if w in bits))
        )
    everything = (1 << len(bits)) - 1
    before = [everything] * (count + 1)  # registers written on every path to an instruction
    before[0] = 0
    work = [0]
    reached = {0}
    while work:
        index = work.pop()
        if index == count:
            continue
        after = before[index] | effects[index][1]
        for following in successors(program, index):
            narrowed = before[following] & after
            if narrowed != before[following] or following not in reached:
                before[following] = narrowed
                reached.add(following)
                work.append(following)
    return [
        str(program.instructions[i])
        for i in sorted(reached - {count})
        if effects[i][0] & ~before[i]
    ]
