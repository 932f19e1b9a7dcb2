"""check_kernels.py: which calls it compiles, and what counts as a problem."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

import check_kernels
import triton
from check_kernels import (
    Usage,
    blocks_that_fit,
    in_flight,
    is_serialized,
    registers_and_spills,
    verdict,
    with_spills,
)
from kernel_cases import Case, all_cases

from mqa_gpt.config import PRESETS
from mqa_kernels import tuning

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

SPILLED_AROUND_LOOPS = {  # bytes
    "3.6.0": [8, 8, 8, 8],
    "3.7.1": [],
    "3.7.1 with ptxas 13.5.37": [8, 16, 40],
}
RECORDED = json.loads((ROOT / "benchmarks/results/kernel_resources.json").read_text())
LARGE = Case(90, "bfloat16", 128, 1, "train")
FITS = Usage(
    "dq_kernel", "64x64", shared=98_304, registers=218, blocks=2, tensor_cores="wgmma.mma_async"
)

REPORT = """
Fatbin elf code:
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function forward_kernel:
  REG:255 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:628 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


# Two wgmma into the same accumulators with something between them, and the sum.
PRODUCTS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u64 descriptor)
{{
  .reg .f32 %f<5>;
  .reg .b64 %d<3>;
  ld.param.u64 %d1, [out];
  ld.param.u64 %d2, [descriptor];
  mov.f32 %f1, 0f00000000;
  mov.f32 %f2, %f1;
  mov.f32 %f3, %f1;
  mov.f32 %f4, %f1;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {{%f1, %f2, %f3, %f4}}, %d2, %d2, 1, 1, 1, 0, 0;
  {between}
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {{%f1, %f2, %f3, %f4}}, %d2, %d2, 1, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  add.f32 %f1, %f1, %f2;
  add.f32 %f1, %f1, %f3;
  add.f32 %f1, %f1, %f4;
  st.global.f32 [%d1], %f1;
  ret;
}}
"""


def usage_of(row: dict[str, object]) -> Usage:
    """A recorded row of the table."""
    return Usage(**{field: row[field] for field in Usage._fields})


def spilling(case: Case) -> list[Usage]:
    """A stand-in for check_case."""
    return [FITS, FITS._replace(kernel="dkv_kernel", spilled=8, repeated_spills=2)]


def test_a_kernel_within_the_limits_has_no_problem():
    assert verdict(LARGE, FITS) == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spilled": 8, "repeated_spills": 2}, "8 bytes spilled, 2 accesses in loops"),
        ({"shared": 232_449}, "232449 bytes of shared memory of 232448"),
        ({"tensor_memory": 513}, "513 columns of tensor memory of 512"),
        ({"tensor_cores": ""}, "no tensor cores"),
        ({"serialized": True}, "wgmma instructions wait for each other"),
        ({"race": "reads before it waits"}, "reads before it waits"),
        ({"overwritten": "MOV R0, R1 overwrites"}, "MOV R0, R1 overwrites"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        (
            {"spilled": 8, "repeated_spills": 2, "tensor_cores": ""},
            "8 bytes spilled, 2 accesses in loops; no tensor cores",
        ),
    ],
)
def test_each_problem_is_named(change: dict[str, object], problem: str):
    assert verdict(LARGE, FITS._replace(**change)) == problem


def test_a_spill_around_a_loop_is_shown_and_no_problem():
    usage = FITS._replace(spilled=8)
    assert verdict(LARGE, usage) == ""
    assert [with_spills(one) for one in (FITS, usage)] == ["218", "218 + 8 bytes"]


def test_the_limit_of_shared_memory_is_the_gpus():
    usage = FITS._replace(shared=200_000)
    assert verdict(LARGE, usage) == ""
    assert "shared memory" in verdict(LARGE._replace(arch=80), usage)


def test_float32_and_kernels_without_products_need_no_tensor_cores():
    assert verdict(LARGE._replace(dtype="float32"), FITS._replace(tensor_cores="")) == ""
    for kernel in ("combine_kernel", "choose_kernel"):
        assert verdict(LARGE, FITS._replace(kernel=kernel, tensor_cores="")) == ""


def test_resident_blocks_are_limited_by_registers_memories_and_warps():
    small = {"warps": 4, "registers": 32, "shared": 1024, "tensor_memory": 0}
    for change, blocks in (
        ({}, 16),  # 64 warps
        ({"warps": 1}, 32),
        ({"registers": 128}, 4),  # all registers
        ({"registers": 129}, 3),
        ({"warps": 8, "registers": 168}, 1),  # 12 warps
        ({"shared": 113 * 1024}, 2),  # and 1 KB more each, of 228 KB
        ({"shared": 113 * 1024 + 1}, 1),
        ({"tensor_memory": 256}, 2),
    ):
        assert blocks_that_fit(100, **small | change) == blocks


def test_spilled_bytes_are_those_of_stack_and_local_memory():
    assert registers_and_spills(REPORT) == (255, 32)


def test_a_loop_that_waits_for_all_loads_is_marked_where_one_block_fits():
    for blocks, copies, shown in ((1, 0, "0 !"), (2, 0, "0"), (1, 2, "2"), (1, None, "")):
        assert in_flight(FITS._replace(blocks=blocks, copies_in_flight=copies)) == shown


def test_wgmma_is_serialized_where_something_touches_its_accumulators():
    commit, wait = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;"
    touch, fence = "add.f32 %f1, %f1, %f2;", "wgmma.fence.sync.aligned;"
    assert not is_serialized(PRODUCTS.format(between=""))
    assert not is_serialized(PRODUCTS.format(between=commit))
    assert is_serialized(PRODUCTS.format(between=commit + wait + touch + fence))
    assert is_serialized(PRODUCTS.format(between=commit + "st.global.f32 [%d1], %f2;"))


def test_every_common_configuration_is_compiled_once_for_every_gpu():
    cases = list(all_cases())
    assert len(set(cases)) == len(cases)
    for arch in (80, 90, 100):
        for dtype in ("bfloat16", "float32"):
            for D in (64, 80, 128, 256):
                for call in ("train", "decode"):
                    assert Case(arch, dtype, D, 1, call) in cases
            for call in ("fused", "fused_int8"):
                assert Case(arch, dtype, 128, 1, call, 32) in cases
        for D in (64, 128, 256):
            for call in ("ragged", "dropout"):
                assert Case(arch, "bfloat16", D, 1, call) in cases
    assert {case.D for case in cases} == {16, 32, 64, 80, 96, 128, 256}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert {case.call for case in cases if case.G > 1} == {"train", "decode"}
    assert {case.H // case.G for case in cases} == {1, 8, 12, 16, 22, 32, 48}


def test_fused_steps_of_every_official_shape_are_compiled():
    for _, n_head, n_embd, *_ in PRESETS.values():
        for dtype, call in (
            ("bfloat16", "fused"),
            ("bfloat16", "fused_int8"),
            ("float32", "fused"),
        ):
            assert Case(90, dtype, n_embd // n_head, 1, call, n_head) in all_cases()
    for call in ("fused", "fused_int8"):
        assert Case(90, "float16", 128, 1, call) in all_cases()


def test_the_recorded_results_have_every_case_for_two_versions_of_triton():
    assert sum(" with ptxas " not in version for version in RECORDED["runs"]) == 2
    for version in RECORDED["runs"]:
        mine = [row for row in RECORDED["kernels"] if row["triton"] == version]
        cases = [Case(*(row[field] for field in Case._fields)) for row in mine]
        only_hopper = " with ptxas " in version
        assert set(cases) == {case for case in all_cases() if case.arch == 90 or not only_hopper}
        problems = [verdict(case, usage_of(row)) for case, row in zip(cases, mine, strict=True)]
        assert not any(problems)
        spilled = sorted(row["spilled"] for row in mine if row["spilled"])
        assert spilled == SPILLED_AROUND_LOOPS[version]  # which kernels/README.md explains


def test_a_lone_block_of_an_official_head_dim_waits_for_all_loads_only_with_dropout():
    exposed = [row for row in RECORDED["kernels"] if "!" in in_flight(usage_of(row))]
    assert {row["call"] for row in exposed if row["arch"] == 90 and row["D"] <= 128} == {"dropout"}


def test_the_table_in_the_readme_has_the_recorded_figures():
    kernels = {"forward_kernel": "forward", "dq_kernel": "dQ", "dkv_kernel": "dK, dV"}
    lines: dict[tuple[int, int, str], dict[int, str]] = {}
    for row in RECORDED["kernels"]:
        key = row["triton"], row["dtype"], row["G"], row["H"], row["call"] in ("train", "decode")
        if key != ("3.7.1", "bfloat16", 1, 32, True) or row["kernel"] not in kernels:
            continue
        if row["D"] in (64, 128, 256):
            name = "decode" if row["call"] == "decode" else kernels[row["kernel"]]
            order = row["D"], (*kernels.values(), "decode").index(name)
            start = f"| {row['D']} | {name} | {row['tiles']} |"
            figures = row["registers"], f"{row['shared'] / 1024:.0f} KB", row["blocks"]
            cell = " / ".join(map(str, figures)) + f", {row['tensor_cores']}"
            lines.setdefault((*order, start), {})[row["arch"]] = cell
    table = "\n".join(
        f"{start} {' | '.join(cells.get(arch, '') for arch in (80, 90, 100))} |"
        for (_, _, start), cells in sorted(lines.items())
    )
    assert len(lines) == 14  # at D = 128 tiles of sm_80 are others
    assert table in (ROOT / "kernels/README.md").read_text(encoding="utf-8"), table


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_are_powers_of_two_that_tl_dot_accepts(dtype: torch.dtype, dropout: bool):
    for D in range(1, 257):
        tiles = [tuning.query_tiles(dtype, D, dropout)]
        tiles += [
            tuning.key_tiles(dtype, D, dropout, architecture) for architecture in (0, 90, 120)
        ]
        tiles += [
            tuning.forward_tiles(dtype, D, rows, dropout) for rows in (1, 16, 17, 32, 33, 65_536)
        ]
        for M, N, warps, stages in tiles:
            assert M in (16, 32, 64, 128)
            assert N in (16, 32, 64, 128)
            assert warps in (4, 8)
            assert 1 <= stages <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_kernels_occupy_every_warp_and_every_multiprocessor(
    dtype: torch.dtype,
):
    for C in (768, 2048, 2816, 4096, 6144):
        for R in range(1, 17):
            for N, K in ((C, C), (C + 256, C), (4 * C, C), (C, 4 * C), (49_152, C)):
                tiles = tuning.linear_tiles(dtype, R, N, K)
                assert R <= tiles.ROWS <= 16
                assert tiles.num_warps == tiles.BLOCK_N // 16 * tiles.SPLIT_K
                assert triton.cdiv(N, tiles.BLOCK_N) >= min(128, N // 16)
                int8 = tuning.linear_tiles(dtype, R, N, K, int8=True)
                assert int8.ROWS == tiles.ROWS
                assert int8.BLOCK_N <= tiles.BLOCK_N
                if dtype != torch.float32:  # each weight is converted by one warp
                    assert int8.num_warps == int8.SPLIT_K


@pytest.mark.parametrize("K", [16, 768, 2816, 24_576])
def test_tiles_of_up_to_64_rows_fit_the_shared_memory_of_every_gpu(K: int):
    for R in range(17, 65):
        for N in (2048, 4096, 16_384):
            tiles = tuning.linear_tiles(torch.bfloat16, R, N, K, int8=True)
            assert R <= tiles.ROWS <= 64
            step = tiles.BLOCK_K * (tiles.BLOCK_N + 2 * tiles.ROWS)  # bytes
            assert (tiles.STAGES - 1) * step <= 99 * 1024  # of sm_86, the least


def test_a_spill_fails_the_check_and_is_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(check_kernels, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(check_kernels, "check_case", spilling)
    monkeypatch.setattr(sys, "argv", ["check", "--head-dim", "16", "--call", "decode"])
    assert check_kernels.main() == 1
    printed = capsys.readouterr().out
    assert "8 bytes spilled" in printed
    assert ": 2 kernels, 1 spill, 1 with a problem" in printed


def test_the_file_keeps_tables_of_other_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "table.json"
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(sys, "argv", ["/a/check_kernels.py", "--arch", "90", f"--json={file}"])
    for version, shared in (("3.6.0", 1), ("3.7.1", 2), ("3.6.0", 3)):
        monkeypatch.setattr(triton, "__version__", version)
        check_kernels.write_json(file, [(LARGE, FITS._replace(shared=shared))])
    monkeypatch.setenv("TRITON_PTXAS_PATH", "elsewhere")
    monkeypatch.setattr(check_kernels, "ptxas_version", lambda path: "13.5.37")
    check_kernels.write_json(file, [(LARGE, FITS._replace(shared=4))])
    found = json.loads(file.read_text())
    assert found["runs"].keys() == {"3.6.0", "3.7.1", "3.6.0 with ptxas 13.5.37"}
    assert found["runs"]["3.6.0 with ptxas 13.5.37"]["ptxas"] == "13.5.37"
    command = "python scripts/check_kernels.py --arch 90 --json=table.json"  # wherever that was
    assert found["runs"]["3.6.0"]["command"] == command
    kernels = [(row["triton"], row["kernel"], row["D"], row["shared"]) for row in found["kernels"]]
    assert kernels == [
        ("3.7.1", "dq_kernel", 128, 2),
        ("3.6.0", "dq_kernel", 128, 3),
        ("3.6.0 with ptxas 13.5.37", "dq_kernel", 128, 4),
    ]


def test_decoding_compiles_without_a_gpu(tmp_path: Path):
    # In a process of its own, as in this one the kernels may be the interpreter's; with an empty
    # folder of compiled kernels, so that the compiler runs.
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check_kernels.py", "--head-dim", "16", "--call", "decode"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {triton.__version__}, ptxas " in done.stdout
    assert ": 2 kernels, 0 spill, 0 with a problem" in done.stdout
    assert "mma.sync" in done.stdout


def races_on_hopper(call: str, kernels: Path) -> set[tuple[str, str]]:
    """Each kernel of a step with one row and its race, or "".

    Compiled for real, in a process of its own: here kernels are interpreted.
    """
    program = (
        "import check_kernels, kernel_cases\n"
        "kernel_cases.PADDED_ROWS = {'bfloat16': (1,)}\n"
        f"case = kernel_cases.Case(90, 'bfloat16', 64, 1, {call!r})\n"
        "usages = check_kernels.check_case(case)\n"
        "assert not any(usage.error for usage in usages), usages\n"
        "print(*(f'{usage.kernel}: {usage.race}' for usage in usages), sep='\\n')\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "scripts", kernels, ROOT))),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, stdout=subprocess.PIPE
    )
    return {tuple(line.split(": ", 1)) for line in done.stdout.decode().splitlines()}


@pytest.mark.parametrize("call", ["decode", "fused"])
def test_no_kernel_of_a_decode_step_has_a_race_on_hopper(call: str):
    names = {
        "decode": ("forward_kernel", "combine_kernel"),
        "fused": ("linear_kernel", "qkv_kernel", "argmax_kernel", "choose_kernel"),
    }
    assert races_on_hopper(call, ROOT / "kernels") == {(name, "") for name in names[call]}


def test_kernels_that_wait_too_late_are_reported(tmp_path: Path):
    shutil.copytree(ROOT / "kernels", tmp_path, dirs_exist_ok=True)
    wait = "    await_inputs(OVERLAP)\n"
    for name, places in (
        ("forward", ["    rows = tile * M", "    m = tl.max"]),
        ("fused", ["    out = matmul("]),
        ("argmax", ["    tl.store(best_ptr", "    tl.store(ids_ptr"]),
    ):
        file = tmp_path / f"mqa_kernels/{name}.py"
        source = file.read_text().replace(wait, "")
        for place in places:
            assert place in source
            source = source.replace(place, wait + place)
        file.write_text(source)
    assert races_on_hopper("decode", tmp_path) == {
        ("forward_kernel", "reads start_ptr before it waits"),
        ("combine_kernel", "reads lses_ptr before it waits"),
    }
    assert races_on_hopper("fused", tmp_path) == {
        ("linear_kernel", ""),  # without a bias and a residual
        ("linear_kernel", "reads bias_ptr before it waits"),
        ("linear_kernel", "reads bias_ptr, residual_ptr before it waits"),
        ("qkv_kernel", "reads bias_ptr, lengths_ptr before it waits"),
        ("argmax_kernel",
         "reads norm_bias_ptr, norm_weight_ptr, weight_ptr, x_ptr before it waits"),
        ("choose_kernel", "reads best_ptr before it waits"),
    }  # fmt: skip
