"""Wrong accesses, races and missing waits are noticed; right ones are not."""

from __future__ import annotations

import pytest
import torch

from tests.ptx.machine import ORDERS, Kernel
from tests.ptx.memory import AccessError, GlobalMemory, RaceError
from tests.ptx.parse import read_before_written
from tests.ptx.snippets import MODULE, program

# Every thread of two warps: its number, and addresses of its own and its neighbour's word.
START = """
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128;
    ld.param.b64 %rd1, [snippet_param_0]; cvt.u64.u32 %rd2, %r2; add.s64 %rd2, %rd1, %rd2;
    mov.b32 %r4, 0; mov.b32 %r5, 0;
"""
COPY = "cp.async.ca.shared.global [%r2], [%rd2], 4; cp.async.commit_group;"
COPIED = "cp.async.wait_group 0;"
STORE, STORE_OTHER = "st.shared.b32 [%r2], %r1;", "st.shared.b32 [%r3], %r1;"
LOAD, LOAD_OTHER = "ld.shared.b32 %r4, [%r2];", "ld.shared.b32 %r4, [%r3];"
BARRIER = "bar.sync 0;"
RESULT = "st.global.b32 [%rd2], %r4;"


def launch(code: str, order: str = "together", grid: tuple[int, ...] = (1,), elements: int = 64):
    """Run START and `code` in blocks of 64 threads on a tensor of int32; returns it and what was
    touched before the wait for the kernel before."""
    data = torch.arange(elements, dtype=torch.int32)
    memory = GlobalMemory()
    address = memory.address_of(data, "data_ptr")
    kernel = Kernel(MODULE.format(threads=64, code=START + code), 256)
    return data, kernel.run(memory, [address], grid, order)


def loaded(code: str) -> list[int]:
    """What is in %r4 after `code`, of each of 64 threads."""
    data, out = torch.arange(64, dtype=torch.int32), torch.full((64,), -1, dtype=torch.int32)
    memory = GlobalMemory()
    address = memory.address_of(data, "data_ptr")
    distance = memory.address_of(out, "out_ptr") - address
    code = f"{START} {code} st.global.b32 [%rd2+{distance}], %r4;"
    Kernel(MODULE.format(threads=64, code=code), 256).run(memory, [address], (1,), "together")
    return out.tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ([STORE, BARRIER, LOAD_OTHER], [STORE, LOAD_OTHER], "another warp wrote it"),
        ([STORE, BARRIER, LOAD_OTHER, BARRIER, STORE],
         [STORE, BARRIER, LOAD_OTHER, STORE], "another warp read it"),
        ([STORE, BARRIER, STORE_OTHER], [STORE, STORE_OTHER], "another warp wrote it"),
        ([COPY, COPIED, BARRIER, LOAD_OTHER], [COPY, COPIED, LOAD_OTHER], "another warp wrote it"),
        ([COPY, COPIED, LOAD], [COPY, LOAD], "while cp.async fills it"),
        ([COPY, COPIED, BARRIER, LOAD_OTHER],
         [COPY, BARRIER, COPIED, LOAD_OTHER], "another warp wrote it"),
        ([COPY, COPIED, STORE], [COPY, STORE, COPIED], "written while cp.async fills it"),
        ([STORE, BARRIER, LOAD_OTHER, BARRIER, COPY, COPIED],
         [STORE, BARRIER, LOAD_OTHER, COPY, COPIED], "another warp read it"),
    ],
)  # fmt: skip
def test_races_in_shared_memory_are_noticed_in_every_order(right, wrong, message, order):
    launch("".join(right), order)
    # One by one, a warp may find memory that nothing has been written to before it meets the race.
    with pytest.raises((RaceError, AccessError), match=message if order == "together" else None):
        launch("".join(wrong), order)


def test_warps_may_store_the_same_value_to_one_place_but_not_different_ones():
    same = "mov.b32 %r2, 0; mov.b32 %r6, 5; st.shared.b32 [%r2], %r6;"
    for order in ORDERS:
        launch(same, order)
        with pytest.raises(RaceError, match=r"wrote it|at once"):
            launch(same.replace("%r6;", "%r1;"), order)


def test_copies_arrive_when_they_are_waited_for_and_not_before():
    other = COPY.replace("%r2", "%r3")  # to the neighbour's word, once the first has arrived
    assert loaded(f"{COPY} {COPIED} {LOAD}") == list(range(64))
    assert loaded(f"{COPY} {COPIED} {BARRIER} {LOAD_OTHER}") == [i ^ 32 for i in range(64)]
    one_left = "cp.async.wait_group 1;"
    assert loaded(f"{COPY} cp.async.commit_group; {one_left} {LOAD}") == list(range(64))
    with pytest.raises(RaceError, match=r"while cp\.async fills it"):
        launch(f"{COPY} {COPIED} {BARRIER} {other} {one_left} {LOAD_OTHER}")


def test_a_copy_with_source_size_0_fills_with_zeros_and_reads_nothing():
    copy = "cp.async.ca.shared.global [%r2], [%rd1+99999], 4, %r5; cp.async.commit_group;"
    assert loaded(f"{STORE} {copy} {COPIED} {LOAD}") == [0] * 64


def test_shared_memory_that_nothing_was_written_to_must_not_be_read():
    with pytest.raises(AccessError, match="nothing has been written to"):
        launch(LOAD)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ld.global.b32 %r4, [%rd2+4];", "bytes 4 to 260 of data_ptr, which has 256"),
        ("ld.global.b32 %r4, [%rd2+-4];", "belongs to no buffer|data_ptr"),
        ("add.s64 %rd2, %rd1, 1099511627776; ld.global.b32 %r4, [%rd2];", "belongs to no buffer"),
        ("st.global.b32 [%rd2+4], %r1;", "bytes 4 to 260"),
        ("ld.global.b32 %r4, [%rd1+2];", "not aligned"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd1+4];", "not aligned"),
        ("cp.async.ca.shared.global [%r2], [%rd2+4], 4;", "bytes 4 to 260"),
        ("cp.async.ca.shared.global [%r2+2], [%rd2], 4;", "not aligned"),
        ("st.shared.b32 [%r2+128], %r1;", "shared address"),
        ("prefetch.global.L2 [%rd2+4];", "bytes 4 to 257"),
    ],
)
def test_accesses_outside_of_a_buffer_or_misaligned_are_noticed(code, message):
    with pytest.raises(AccessError, match=message) as error:
        launch(code)
    assert code.split(";")[-2].strip() in error.value.__notes__[0]  # names the instruction


def test_a_guarded_access_outside_is_not_an_access():
    guarded = "mov.b32 %r4, 7; setp.lt.u32 %p1, %r1, 63; @%p1 ld.global.b32 %r4, [%rd2+4];"
    assert loaded(guarded) == [*range(1, 64), 7]


def test_blocks_must_not_write_the_same_bytes_or_read_what_others_write():
    data, _ = launch(f"mov.b32 %r4, 7; {RESULT}")
    assert (data == 7).all()
    with pytest.raises(RaceError, match="written twice"):
        launch(RESULT, grid=(2,))
    with pytest.raises(RaceError, match="written twice"):
        launch("st.global.b32 [%rd1], %r1;")
    with pytest.raises(RaceError, match="read and written in one launch"):
        launch(f"ld.global.b32 %r4, [%rd2]; {RESULT}")


def test_all_blocks_of_a_grid_run_and_know_their_place():
    where = "mov.u32 %r6, %ctaid.x; mov.u32 %r7, %ctaid.y; mov.u32 %r8, %nctaid.x;"
    code = f"""{where} mad.lo.s32 %r4, %r7, %r8, %r6;
    shl.b32 %r9, %r4, 8; cvt.u64.u32 %rd3, %r9; add.s64 %rd2, %rd2, %rd3; {RESULT}"""
    data, _ = launch(code, grid=(3, 2), elements=6 * 64)
    assert torch.equal(data, torch.arange(6).repeat_interleave(64).int())


def test_what_is_touched_before_the_wait_for_the_kernel_before_is_reported():
    read = "ld.global.b32 %r4, [%rd2];"
    assert launch(f"{read} griddepcontrol.wait;")[1] == {("reads", "data_ptr")}
    assert launch(f"griddepcontrol.wait; {read}")[1] == set()
    assert launch(f"griddepcontrol.launch_dependents; {RESULT} griddepcontrol.wait;")[1] == {
        ("writes", "data_ptr")
    }


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_must_be_reached_by_all_threads_together(order):
    half = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $skip; bar.sync 0; $skip: mov.b32 %r6, 0;"
    for limit in (32, 16):  # one warp, half a warp
        with pytest.raises(RaceError, match="barrier"):
            launch(half.format(limit), order)


def test_registers_that_some_path_leaves_unwritten_are_noticed():
    branch = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 5; @%p1 bra $skip; mov.b32 %r2, 1; $skip:"
    assert read_before_written(program(f"{branch} add.s32 %r3, %r1, %r1;")) == []
    assert len(read_before_written(program(f"{branch} add.s32 %r3, %r2, %r1;"))) == 1
    loop = """mov.u32 %r1, %tid.x; $loop: add.s32 %r2, %r2, %r1;
    setp.lt.s32 %p1, %r2, 9; @%p1 bra $loop;"""
    assert len(read_before_written(program(loop))) == 1
    with pytest.raises(RaceError, match="read before they are written"):
        launch("add.s32 %r6, %r7, %r7;")


def test_numbers_in_memory_keep_their_order():
    """Through global and shared memory, as vectors of one width and loaded as another."""
    data, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int64)
    text = MODULE.replace(
        "snippet_param_0\n", "snippet_param_0,\n.param .u64 .ptr .global snippet_param_1\n"
    )
    code = """
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1]; sub.s32 %r4, %r8, %r6;
    shl.b32 %r9, %r1, 3; st.shared.v2.b32 [%r9], {%r4, %r7}; ld.shared.b64 %rd3, [%r9];
    ld.param.b64 %rd4, [snippet_param_1]; cvt.u64.u32 %rd5, %r9; add.s64 %rd4, %rd4, %rd5;
    st.global.b64 [%rd4], %rd3;
    """
    memory = GlobalMemory()
    kernel = Kernel(text.format(threads=64, code=START + code), 512)
    kernel.run(memory, [memory.address_of(data, "data"), memory.address_of(out, "out")], (1,))
    assert (out == 2 | 2 << 32).all()
