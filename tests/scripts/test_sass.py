"""sass.py: every fault in small machine code is noticed, on whatever path it lies."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

import triton
from sass import (
    Instruction,
    copies_in_flight,
    exponentials,
    loops,
    overwritten_operands,
    parameter_names,
    parse,
    products_in_flight,
    race_with_predecessor,
    repeated_spills,
    successors,
    written,
)


def assemble(source: str) -> list[Instruction]:
    """Instructions, one a line; `name:` in front of one is where `BRA name` goes."""
    lines = [line.strip() for line in source.strip().splitlines()]
    labels = {}
    for i, line in enumerate(lines):
        label, colon, rest = line.partition(": ")
        if colon:
            labels[label], lines[i] = f"{16 * i:#x}", rest
    text = "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;          /* 0x0000000000007918 */\n"
        "                                                            /* 0x000fe20000000000 */"
        for i, line in enumerate(lines)
    )
    for label, address in labels.items():
        text = re.sub(rf"\b{label}\b", address, text)
    return parse(text)


WAIT_ALL, WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
FROM_REGISTERS = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24"
FROM_MEMORY = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88"
OVERWRITE = "F2FP.BF16.F32.PACK_AB R123, R4, R5"  # the last of R120 to R123


def test_instructions_are_read_with_guards_names_and_operands():
    code = assemble("""
        @!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]
        EXIT
    """)
    assert code == [
        Instruction(0, "!P0", "LDG.E.128", ("R4", "desc[UR4][R2.64+0x10]")),
        Instruction(16, "", "EXIT", ()),
    ]
    assert str(code[0]) == "LDG.E.128 R4, desc[UR4][R2.64+0x10] at 0x0000"


def test_jumps_calls_and_ends_are_followed():
    code = assemble("""
        @P0 BRA end
        BRA.U UP0, end
        CALL.REL.NOINC function
        @P1 EXIT
        BRA end
        function: MOV R1, R2
        RET.REL.NODEC R20 0x0
        end: EXIT
    """)
    assert successors(code) == [[7, 1], [7, 2], [5], [4], [7], [6], [3], []]
    with pytest.raises(ValueError, match=r"BRX R4 -0x100 at 0x0000: jumps to a computed address"):
        successors(assemble("BRX R4 -0x100"))


class TestOperands:
    """A register of wgmma's A operand is overwritten before the wait that covers it."""

    def check(self, source: str, count: int) -> None:
        found = overwritten_operands(assemble(source))
        assert len(found) == count, found
        for text in found:
            assert re.search(r"overwrites an operand of HGMMA\S+ R24, R120, gdesc", text)

    def test_in_straight_code(self):
        for code, count in (
            (f"{FROM_REGISTERS}, gsb0\n{OVERWRITE}\n{WAIT_ALL}", 1),
            (f"{FROM_REGISTERS}, gsb0\n{WAIT_ALL}\n{OVERWRITE}", 0),
            (f"{OVERWRITE}\n{FROM_REGISTERS}, gsb0\n{WAIT_ALL}", 0),
            (f"{FROM_MEMORY}, gsb0\n{OVERWRITE}\n{WAIT_ALL}", 0),  # A is in shared memory
            (f"{FROM_REGISTERS}, gsb0\nMOV R124, R4\nMOV R119, R4\n{WAIT_ALL}", 0),
            (f"{FROM_REGISTERS}, gsb0\nLDS.128 R116, [R4]\nLDS.64 R122, [R4]\n{WAIT_ALL}", 1),
            (f"{FROM_REGISTERS}, gsb0\n@P3 MOV R120, R4\n{WAIT_ALL}", 1),
            (f"{FROM_REGISTERS}, gsb0\nSTS [R4], R120\nISETP.NE.AND P0, PT, R120, 0x1, PT", 0),
        ):  # fmt: skip
            self.check(f"{code}\nEXIT", count)

    def test_where_a_wait_leaves_the_newest_groups(self):
        older = f"{FROM_REGISTERS}, gsb0\n{FROM_MEMORY}, gsb0\n"
        newest = f"{FROM_MEMORY}, gsb0\n{FROM_REGISTERS}, gsb0\n"
        self.check(f"{older}{WAIT_ONE}\n{OVERWRITE}\nEXIT", 0)
        self.check(f"{newest}{WAIT_ONE}\n{OVERWRITE}\nEXIT", 1)
        # Without gsb0 it belongs to the group that the next one ends, and no wait covers it before.
        self.check(f"{FROM_REGISTERS}\n{FROM_MEMORY}, gsb0\n{WAIT_ALL}\n{OVERWRITE}\nEXIT", 0)
        self.check(f"{FROM_REGISTERS}\n{WAIT_ALL}\n{OVERWRITE}\n{FROM_MEMORY}, gsb0\nEXIT", 1)

    def test_in_the_next_round_of_a_loop(self):
        for first, last, count in (
            (OVERWRITE, WAIT_ALL, 0),
            (OVERWRITE, "NOP", 1),
            (WAIT_ALL, "NOP", 0),
        ):
            rest = OVERWRITE if first == WAIT_ALL else "NOP"
            self.check(
                f"""top: {first}
                {rest}
                {FROM_REGISTERS}, gsb0
                {last}
                @P0 BRA top
                EXIT""",
                count,
            )

    def test_on_one_of_two_paths(self):
        for taken, fallen, count in (
            (WAIT_ALL, WAIT_ALL, 0),
            ("NOP", WAIT_ALL, 1),
            (WAIT_ALL, "NOP", 1),
        ):
            self.check(
                f"""{FROM_REGISTERS}, gsb0
                @P0 BRA other
                {fallen}
                BRA both
                other: {taken}
                both: {OVERWRITE}
                EXIT""",
                count,
            )

    def test_behind_a_loop_that_may_be_skipped(self):
        self.check(
            f"""{FROM_REGISTERS}, gsb0
            @P0 BRA after
            top: {WAIT_ALL}
            @P1 BRA top
            after: {OVERWRITE}
            EXIT""",
            1,
        )

    def test_in_the_loop_that_triton_makes_of_a_product_with_a_converted_operand(self):
        """A wait at the end leaves the newest group; the next round loads into its operand."""
        for wait, count in ((WAIT_ONE, 1), (WAIT_ALL, 0)):
            self.check(
                f"""top: LDSM.16.M88.4 R88, [R12+UR7+0xc000]
                LDSM.16.M88.4 R120, [R13+UR7+0xc000]
                WARPGROUP.ARRIVE
                HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR20].tnspB, R24, gsb0
                {WAIT_ONE}
                WARPGROUP.ARRIVE
                {FROM_REGISTERS}, gsb0
                {wait}
                @!P0 BRA top
                {WAIT_ALL}
                EXIT""",
                count,
            )

    def test_by_accumulators(self):
        self.check(
            f"{FROM_REGISTERS}, gsb0\n"
            "HGMMA.64x16x16.F32.BF16 R116, gdesc[UR8], RZ, !UPT, gsb0\n"
            f"{WAIT_ALL}\nEXIT",
            1,
        )  # R116 to R123


def test_products_of_many_rounds_do_not_add_up():
    code = assemble(f"top: {FROM_REGISTERS}, gsb0\n@P0 BRA top\nEXIT")
    assert products_in_flight(code)[2] == {0: 1}


def test_exponentials_in_loops_are_counted_with_those_that_run_during_products():
    code = assemble(f"""
        MUFU.EX2 R0, R1
        top: {FROM_MEMORY}, gsb0
        MUFU.EX2 R0, R1
        {WAIT_ALL}
        MUFU.EX2 R0, R1
        MUFU.RCP R0, R1
        @P0 BRA top
        other: MUFU.EX2 R0, R1
        @P0 BRA other
        EXIT
    """)
    assert exponentials(code) == (1, 2)


def test_a_loop_is_what_leads_back_to_its_top():
    code = assemble("""
        MOV R0, R1
        outer: MOV R0, R1
        inner: MOV R0, R1
        @P0 BRA inner
        @P1 BRA away
        @P2 BRA outer
        EXIT
        away: MOV R0, R1
        BRA outer
        dead: BRA dead
    """)
    assert sorted(map(sorted, loops(code))) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 7, 8], [2, 3]]


def test_the_copies_in_flight_are_those_that_the_strictest_wait_of_a_loop_allows():
    def loop(*waits: str) -> str:
        copies = "LDGSTS.E.BYPASS.128 [R151+0x8000], desc[UR18][R28.64], !P0\nLDGDEPBAR\n"
        return f"top: NOP\n{copies}" + "\n".join(waits) + "\n@P0 BRA top\nDEPBAR.LE SB0, 0x0\nEXIT"

    one, four = "DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x4"
    assert copies_in_flight(assemble(loop(four))) == 4
    assert copies_in_flight(assemble(loop(four, one))) == 1
    assert copies_in_flight(assemble(loop(one, WAIT_ALL))) == 1  # that is for products
    assert copies_in_flight(assemble(loop("DEPBAR.LE SB0, 0x0"))) == 0
    assert copies_in_flight(assemble("top: LDG.E R0, desc[UR4][R2.64]\n@P0 BRA top\nEXIT")) is None


def test_spills_are_repeated_in_loops_and_not_around_them():
    def kernel(inside: str, end: str = "@P0 BRA top") -> list[Instruction]:
        return assemble(f"STL.64 [R1], R2\ntop: MOV R4, R5\n{inside}\n{end}\nLDL.LU R2, [R1]\nEXIT")

    assert repeated_spills(kernel("MOV R6, R7")) == 0
    assert repeated_spills(kernel("LDL R6, [R1]\nSTL [R1+0x4], R6")) == 2
    assert repeated_spills(kernel("LDL R6, [R1]", end="NOP")) == 3  # nothing loops


SIGNATURE = {
    "x_ptr": "*bf16", "K": "constexpr", "rows": "i32", "weight_ptr": "*i8", "bias_ptr": "*bf16",
    "flag": "i1", "eps": "fp32", "out_ptr": "*fp32",
}  # fmt: skip
WEIGHT = "ULDC.64 UR6, c[0x0][0x220]\nIMAD.WIDE R2, R0, 0x2, RZ\nIADD3 R4, P0, R2, UR6, RZ"
LOAD_WEIGHT = f"{WEIGHT}\nLDG.E R8, desc[UR4][R4.64]"
X = "IMAD.WIDE R2, R0, R1, c[0x0][0x210]"
LOAD_X, COPY_X = "LDG.E R8, desc[UR4][R2.64]", "LDGSTS.E [R4], desc[UR4][R2.64]"
STORE = f"{X}\nSTG.E desc[UR4][R2.64], R9"


def test_pointers_are_found_by_their_places_among_the_parameters():
    assert parameter_names(SIGNATURE, 90) == {
        0x210: "x_ptr", 0x220: "weight_ptr", 0x228: "bias_ptr", 0x238: "out_ptr",
    }  # fmt: skip
    assert min(parameter_names(SIGNATURE, 100)) == 0x380


@pytest.mark.parametrize(
    ("source", "race"),
    [
        (f"{X}\nACQBULK\n{LOAD_X}\n{STORE}", ""),
        (f"{LOAD_WEIGHT}\nACQBULK\n{X}\n{LOAD_X}\n{STORE}", "reads weight_ptr before it waits"),
        (f"{WEIGHT}\nCCTL.E.PF2 [R4]\nACQBULK\n{X}\n{LOAD_X}\n{STORE}", ""),  # a prefetch
        (f"{X}\n{LOAD_X}\nACQBULK\n{STORE}", "reads x_ptr before it waits"),
        (f"{X}\n{COPY_X}\nACQBULK\n{STORE}", "reads x_ptr before it waits"),
        (f"LDC.64 R2, c[0x0][0x210]\n{LOAD_X}\nACQBULK", "reads x_ptr before it waits"),
        ("LDC.128 R0, c[0x0][0x220]\nLDG.E R8, desc[UR4][R2.64]\nACQBULK",
         "reads bias_ptr before it waits"),
        (f"{LOAD_WEIGHT}\nLDG.E R9, desc[UR4][R8.64]\nACQBULK",
         "reads an unknown address, weight_ptr before it waits"),
        ("LDG.E R9, desc[UR4][R12.64]\nACQBULK", "reads an unknown address before it waits"),
        (f"{LOAD_WEIGHT}\n{STORE}\nACQBULK", "writes before it waits"),
        (f"{X}\nRED.E.ADD.F32 desc[UR4][R2.64], R9\nACQBULK", "writes before it waits"),
        (f"{X}\n{LOAD_X}\n{STORE}", "does not wait for the kernel before"),
        # A pointer that is chosen, and one whose register is used again.
        (f"{WEIGHT}\n@P0 MOV R4, c[0x0][0x210]\nLDG.E R8, desc[UR4][R4.64]\nACQBULK",
         "reads weight_ptr, x_ptr before it waits"),
        (f"{X}\n{WEIGHT}\nMOV R2, R4\n{LOAD_X}\nACQBULK", "reads weight_ptr before it waits"),
        # Only one of two paths waits.
        (f"{X}\n@P0 BRA around\nACQBULK\naround: {LOAD_X}\nEXIT", "reads x_ptr before it waits"),
        (f"{X}\n@P0 BRA around\nACQBULK\naround: STS [R4], R8\nEXIT", ""),
        (f"@P0 BRA around\nACQBULK\naround: {STORE}\nEXIT", "writes before it waits"),
    ],
)  # fmt: skip
def test_accesses_before_the_wait_are_races(source, race):
    parameters = parameter_names(SIGNATURE, 90)
    source = f"{source}\nEXIT"
    assert race_with_predecessor(assemble(source), parameters) == race


# Instructions whose results have all widths.
WIDTHS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 x, .param .u64 descriptor, .param .u64 out)
{
  .shared .align 128 .b8 tile[4096];
  .reg .f32 %f<9>;
  .reg .b32 %r<20>;
  .reg .b64 %d<6>;
  .reg .f64 %g<3>;
  ld.param.u64 %d1, [x];
  ld.param.u64 %d2, [descriptor];
  ld.param.u64 %d3, [out];
  mov.u32 %r1, %tid.x;
  mad.wide.u32 %d4, %r1, 16, %d1;
  ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d4];
  ld.global.v2.b32 {%r6, %r7}, [%d4+4096];
  shfl.sync.bfly.b32 %r8, %r6, 1, 31, -1;
  mov.u32 %r9, tile;
  mad.lo.u32 %r9, %r1, 16, %r9;
  st.shared.v4.b32 [%r9], {%r2, %r3, %r4, %r8};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r9];
  ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r9];
  mov.f32 %f1, 0f00000000;
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {%f5, %f6, %f7, %f8}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f1, %f1, %f1, %f1};
  cvt.f64.f32 %g1, %f5;
  fma.rn.f64 %g2, %g1, %g1, %g1;
  cvt.rn.f32.f64 %f5, %g2;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {%f5, %f6, %f7, %f8}, {%r2, %r3, %r4, %r5}, %d2, 1, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  ex2.approx.f32 %f5, %f5;
  add.f32 %f6, %f6, %f7;
  add.f32 %f6, %f6, %f8;
  mad.wide.u32 %d5, %r1, 8, %d3;
  st.global.v2.f32 [%d5], {%f5, %f6};
  ret;
}
"""


def test_the_registers_that_instructions_write_are_those_that_nvdisasm_finds(tmp_path: Path):
    """Its table of live registers has ^ or x where an instruction writes one."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    (tmp_path / "kernel.ptx").write_text(WIDTHS)
    for assembler in ("ptxas", "ptxas-blackwell"):  # nvdisasm knows the format of one of them
        command = [tools / assembler, "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
        subprocess.run(command, cwd=tmp_path, check=True)
        listing = subprocess.run(
            [tools / "nvdisasm", "-c", "-lrm", "narrow", "kernel.cubin"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        ).stdout.splitlines()  # fmt: skip
        if listing:
            break
    titles = next(line for line in listing if "GPR" in line)
    numbers = next(line for line in listing if "# 0123" in line)
    kinds = []  # of registers, with the column of number 0
    for match in re.finditer(r"# (?=0)", numbers):
        section = titles[: titles.index("|", match.end())].rpartition("|")[2].strip()
        kinds.append((section, match.end()))
    compared = 0
    for line in listing:
        for instruction in parse(line):
            expected = []
            for section, first in kinds:
                marks = line[first:].partition("|")[0]
                if section in ("GPR", "UGPR"):
                    kind = "R" if section == "GPR" else "UR"
                    expected += [f"{kind}{i}" for i, mark in enumerate(marks) if mark in "^x"]
            assert written(instruction) == expected, instruction
            compared += 1
    assert compared > 40
