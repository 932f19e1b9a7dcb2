"""gpu_report.py without a GPU: every section in small, and what happens when something is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not available on this platform")

import assemblers
import gpu_autotune
import gpu_kernels
import gpu_models
import gpu_report
import gpu_smoke
import gpu_speed
import gpu_tools
import gpu_training
from gpu_kernels import CASES, TINY, Case, Twins, check_attention, plain_attention, verdict

from mqa_gpt.config import PRESETS, GPTConfig
from mqa_kernels import attention, launch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# What a machine with a GPU need not have. Python reads sitecustomize.py first in every process.
SITECUSTOMIZE = """
import sys
for name in ("typer", "rich", "hypothesis", "pytest", "matplotlib", "pandas"):
    sys.modules[name] = None
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these are tests without a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter meets poisoned slots
]


@pytest.fixture(autouse=True)
def _allocations() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as on a bare machine without a GPU."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    environment.pop("TRITON_INTERPRET", None)  # the script has to set it
    return subprocess.run(
        [sys.executable, "scripts/gpu_report.py", "--out", folder / "new", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_script_runs_from_a_checkout_and_writes_the_chosen_sections(tmp_path):
    result = run_script(tmp_path, "--only", "prefill,ceilings", "--limit", "600")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "new/gpu_report.json").read_text())
    assert report["command"].startswith("python3 scripts/gpu_report.py --out ")
    assert list(report["sections"]) == ["ceilings", "prefill"]  # in the script's order
    (ceilings,) = report["sections"]["ceilings"]["rows"]
    for row in report["sections"]["prefill"]["rows"]:
        assert row["of_limit"] == pytest.approx(row["tflops"] / ceilings["matmul_tflops"])
    assert "== all passed" in result.stdout
    assert "RuntimeWarning" not in result.stderr


class TestSections:
    def test_environment_says_what_ran(self):
        (row,) = gpu_models.environment(CPU)
        assert row["versions"]["torch"] == row["torch"] == torch.__version__
        assert re.fullmatch(r"\d+\.\d+\.\d+", row["ptxas"])
        assert row["ptxas"] in row["assemblers"]

    def test_smoke_runs_every_kernel_and_says_so(self):
        *rows, last = gpu_smoke.smoke(CPU)
        assert all(row["passed"] for row in rows), rows
        assert last == {
            "verdict": "every kernel runs, and in graphs without overlap",
            "passed": True,
        }

    def test_smoke_says_that_something_failed(self, monkeypatch):
        monkeypatch.setattr(gpu_smoke, "check_step", lambda models, rows: {"passed": False})
        assert list(gpu_smoke.smoke(CPU))[-1] == {
            "verdict": "see what failed above",
            "passed": False,
        }

    def test_numerics_and_dtypes_judge_outputs_and_gradients_in_every_dtype(self):
        rows = [*gpu_kernels.numerics(CPU), *gpu_kernels.dtypes(CPU)]
        assert all(row["passed"] for row in rows), rows
        judged = [row for row in rows if "dtype" in row]
        assert {row["dtype"] for row in judged} == {"float32", "bfloat16", "float16"}
        assert all(set(row["errors"]) == {"out", "lse", "dq", "dk", "dv"} for row in judged)
        checks = [row["check"] for row in rows if "check" in row]
        assert checks == ["again", "large", "transformers"]

    def test_fused_judges_steps_in_16_bits_and_int8_and_their_replays(self):
        rows = list(gpu_kernels.fused(CPU))
        assert all(row["passed"] for row in rows), rows
        kinds = [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float16", "float16")]
        steps = [(r["dtype"], r["weights"], r["rows"]) for r in rows if "rows" in r]
        assert steps == [(*kind, count) for kind in kinds for count in (1, 3)]
        assert [row["equal"] for row in rows if "steps" in row] == [2, 2, 2]  # and the cache

    def test_parity_compares_with_transformers_and_replays_with_modules(self):
        rows = list(gpu_models.parity(CPU))
        assert all(row["passed"] for row in rows), rows
        compared = [row["as"] for row in rows if "as" in row]
        assert compared == [
            "float32 triton", "bfloat16 triton", "bfloat16 triton int8", "float16 triton",
            "float32 sdpa",
        ]  # fmt: skip
        exact = [row for row in rows if row.get("as", "").startswith("float32")]
        assert [(row["equal_tokens"], row["tokens"]) for row in exact] == [(16, 16)] * 2
        *tokens, recorded, graphs = [row for row in rows if "check" in row]
        assert [row["equal"] for row in tokens] == [45 * 24] * 3
        assert recorded["errors"].keys() == set(gpu_models.RECORDED)
        assert (graphs["equal"], graphs["graphs"]) == (3, 0)  # a GPU records them

    def test_decode_measures_steps_and_whole_generations(self):
        rows = list(gpu_models.decode(CPU))
        assert not [row for row in rows if "error" in row], rows
        assert [row["weights"] for row in rows] == [
            *["bfloat16"] * 2,
            *["int8"] * 2,
            *["bfloat16"] * 2,
        ]
        for row in rows[:4]:
            assert row["tokens_per_s"] == pytest.approx(1e6 * row["batch"] / row["step_us"])
        assert all(row["first_token_s"] > 0 for row in rows[4:])

    def test_training_compares_losses_and_measures_each_backend(self):
        rows = list(gpu_training.training(CPU))
        assert not [row for row in rows if "error" in row], rows
        check, *steps = rows
        assert check["passed"], check
        assert all(a > b for losses in check["losses"].values() for a, b in pairwise(losses))
        assert [(row["backend"], row["recompute"]) for row in steps] == [
            ("triton", False), ("sdpa", False), ("triton", True), ("sdpa", True),
        ]  # fmt: skip
        for row in steps:
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])
            assert row["mfu"] > row["mfu_causal"] > 0
            assert row["loss"] == pytest.approx(check["losses"]["mqa-gpt"][0], rel=0.01)

    def test_training_is_on_the_device_of_the_section_even_where_there_is_another(
        self, monkeypatch
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert gpu_training.random_ids(TINY, 3, CPU).device == CPU

    def test_a_loss_that_is_not_transformers_fails(self, monkeypatch):
        honest = gpu_training.make_step
        monkeypatch.setattr(
            gpu_training, "make_step",
            lambda name, *rest: (lambda step: lambda: step() + (name == "mqa-gpt") / 1000)(
                honest(name, *rest)
            ),
        )  # fmt: skip
        assert next(gpu_training.training(CPU))["passed"] is False

    def test_steps_and_attention_are_measured(self):
        assert all(row["attention_us"] > 0 < row["step_us"] for row in gpu_speed.steps(CPU))
        rows = list(gpu_speed.attention(CPU))
        assert [row["attention"] for row in rows] == ["forward", "backward", "decode"]
        assert all(row["us"] > 0 for row in rows), rows
        flops = 4 * 32 * 128 * 33 * 34 / 2
        assert rows[0]["tflops"] == pytest.approx(flops / rows[0]["us"] / 1e6)
        assert rows[2]["gb_per_s"] == pytest.approx(33 * 512 / rows[2]["us"] / 1e3)

    def test_autotune_compares_with_the_shipped_tiles(self):
        rows = list(gpu_autotune.autotune(CPU))
        assert not [row for row in rows if "error" in row], rows
        names = [row["kernel"] for row in rows]
        assert names[:4] == ["forward", "decode", "dQ", "dK, dV"]
        assert names[4] == "linear 32 to 32, 1 rows"
        assert {row["best"] for row in rows} == {"shipped"}  # without a GPU the only one

    def test_profile_lists_the_longest_kernels_first(self):
        for row in gpu_models.profile(CPU):
            times = [kernel["us"] for kernel in row["kernels"]]
            assert times == sorted(times, reverse=True)
            assert 0 < sum(times) <= row["kernels_us"] * 1.001
            assert row["kernels_per_step"] > 20


def test_recorded_values_and_kept_graphs_are_checked_on_replays(graphs, monkeypatch):
    model = Twins(TINY, torch.float32, False, CPU).plain
    kept = gpu_models.check_graphs(model)
    assert (kept["passed"], kept["equal"], kept["graphs"]) == (True, 3, 1)
    assert [graph.replays for graph in graphs] == [3 * 15 - 1]  # the first run compiles
    assert gpu_models.check_recorded(model)["passed"]
    assert len(graphs) > 2
    honest, calls = gpu_models.generate, []

    def wrong_when_recorded(*arguments):
        calls.append(honest(*arguments))
        return [row[::-1] for row in calls[-1]] if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(gpu_models, "generate", wrong_when_recorded)
    row = gpu_models.check_recorded(model)
    assert not row["passed"]
    assert not row["equal_tokens"]
    assert row["errors"]["logits"] > 1


def test_autotune_finds_the_fastest_tiles_and_names_those_that_fail(monkeypatch):
    seconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(gpu_autotune, "seconds_of", lambda action: next(seconds))
    changes = [{"N": 32}, {"N": 128}, {"unknown": 1}]
    search = gpu_autotune.Search(
        "forward", "mqa_kernels.forward", "forward_tiles", changes,
        lambda device: gpu_autotune.forward_call(5, device),
    )  # fmt: skip
    row = gpu_autotune.fastest(CPU, search)
    assert (row["shipped_us"], row["best"], row["best_us"]) == (3e6, "{'N': 32}", 1e6)
    assert "Tiles(M=128, N=64" in row["shipped"]
    shipped, small, large, wrong = row["candidates"]
    assert shipped["difference"] == 0
    assert max(small["difference"], large["difference"]) < 0.1
    assert "unknown" in wrong["error"]


FAKE_TOOL = """#!/bin/sh
echo "$0 $*"
while [ "$1" != "{python}" ]; do shift; done
test "$4" = dkv_kernel && exit 9
exec "$@"
"""


def test_tools_run_on_single_kernels_and_missing_ones_are_named(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tools.shutil, "which", {"compute-sanitizer": str(tool)}.get)
    kernels = ["linear_kernel", "dkv_kernel"]
    arguments = ["--out", str(tmp_path), "--tool", "ncu", "memcheck", "--kernel", *kernels]
    monkeypatch.setattr(gpu_tools, "Path", FolderWithoutTools)
    assert gpu_tools.main([*arguments, "--limit", "600"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ncu: ncu is not installed here",
        "memcheck linear_kernel: done",
        f"memcheck dkv_kernel: errors found; see {tmp_path}/memcheck_dkv_kernel.txt",
    ]
    printed = (tmp_path / "memcheck_linear_kernel.txt").read_text()
    assert "--tool memcheck --error-exitcode 9 --kernel-name kernel_substring=linear_ker" in printed
    assert gpu_tools.main([*arguments[:4], "--kernel", "linear_kernel"]) == 1  # no tool ran


class FolderWithoutTools(type(Path())):
    """A path with nothing of the CUDA toolkit below."""

    def glob(self, pattern: str) -> Iterator[Path]:
        return iter(())


@pytest.mark.parametrize("kernel", gpu_tools.KERNELS)
def test_every_kernel_that_tools_look_at_is_launched(kernel, tmp_path):
    program = (
        "import sys, triton\n"
        "sys.path.insert(0, 'scripts')\n"
        "import gpu_tools\n"
        "from triton.runtime.interpreter import GridExecutor\n"
        "launched = []\n"
        "call = GridExecutor.__call__\n"
        "GridExecutor.__call__ = lambda self, *a, **k: (launched.append(self.fn.__name__), "
        "call(self, *a, **k))\n"
        f"gpu_tools.main(['--run', {kernel!r}])\n"
        f"assert launched.count({kernel!r}) >= 2 or 'dq' in {kernel!r}, launched\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_the_newest_assembler_is_chosen_unless_it_is_tritons_own(monkeypatch):
    for found, expected in (
        ({"12.8.93": "own", "13.1.80": "b", "13.10.2": "c", "0": "broken"}, "c"),
        ({"13.1.80": "own", "12.8.93": "b"}, None),
        ({}, None),
    ):
        monkeypatch.setattr(assemblers, "assemblers", lambda found=found: found)
        assert assemblers.newer_ptxas() == expected


def test_sections_that_compare_assemblers_get_the_other_one_or_are_skipped(monkeypatch):
    section = gpu_report.SECTIONS["steps-ptxas"]
    chosen = gpu_report.with_ptxas(section, Path("/there/ptxas"))
    assert chosen is not None
    assert chosen.environment == {"TRITON_PTXAS_PATH": "/there/ptxas"}
    assert gpu_report.with_ptxas(gpu_report.SECTIONS["steps"], None) is not None
    rows = list(gpu_report.run_section(gpu_report.with_ptxas(section, None), 1))
    assert [list(row) for row in rows] == [["skipped"], ["ended"]]


def test_a_section_runs_with_its_environment(tmp_path, monkeypatch):
    (tmp_path / "telling.py").write_text(
        "import os\ndef tells(device):\n    yield {'pdl': os.environ['MQA_KERNELS_PDL']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    section = gpu_report.Section("telling", "tells", {"MQA_KERNELS_PDL": "0"})
    assert list(gpu_report.run_section(section, 600)) == [{"pdl": "0"}, {"ended": None}]


FAILING = """
import os, time
def works(device):
    yield {"check": "first", "passed": True}
def raises(device):
    yield {"check": "second", "passed": True}
    raise RuntimeError("out of luck")
def dies(device):
    yield {"check": "third", "passed": False}
    os._exit(3)
"""


def test_a_section_that_fails_or_dies_keeps_its_rows_and_the_next_one_runs(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        gpu_report,
        "SECTIONS",
        {name: gpu_report.Section("failing", name) for name in ("raises", "dies", "works")},
    )
    arguments = ["--out", str(tmp_path), "--only", "dies,raises,works", "--limit", "600"]
    assert gpu_report.main(arguments) == 1
    sections = json.loads((tmp_path / "gpu_report.json").read_text())["sections"]
    assert {name: len(section["rows"]) for name, section in sections.items()} == {
        "raises": 1, "dies": 1, "works": 1,
    }  # fmt: skip
    assert sections["raises"]["error"].endswith("RuntimeError: out of luck\n")
    assert sections["works"]["error"] is None
    shown = capsys.readouterr().out
    assert "== 3 failed\nraises: RuntimeError: out of luck\n" in shown
    assert "dies: its process died: exit code 3\ndies: check third\n" in shown


def test_a_section_that_takes_too_long_is_stopped():
    assert list(gpu_report.run_section(gpu_report.SECTIONS["environment"], 0.1)) == [
        {"ended": "stopped after 0.1 s"}
    ]


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path, monkeypatch):
    def section(section: gpu_report.Section, limit: float) -> Iterator[dict[str, Any]]:
        yield {"passed": True}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "run_section", section)
    with pytest.raises(KeyboardInterrupt):
        gpu_report.main(["--out", str(tmp_path), "--only", "decode"])
    section = json.loads((tmp_path / "gpu_report.json").read_text())["sections"]["decode"]
    assert section["rows"] == [{"passed": True}]
    assert section["error"] == "interrupted"


@pytest.mark.parametrize("obstacle", ["a file", "a folder of that name"])
def test_a_report_that_cannot_be_written_is_refused_at_once(
    obstacle, tmp_path, monkeypatch, capsys
):
    if obstacle == "a file":
        (tmp_path / "report").touch()
    else:
        (tmp_path / "report/gpu_report.json").mkdir(parents=True)
    monkeypatch.setattr(gpu_report, "run_section", None)  # no section starts
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--out", str(tmp_path / "report")])
    assert ended.value.code == 2
    assert "gpu_report.json cannot be written: " in capsys.readouterr().err


def test_unknown_sections_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--only", "decode,autotuning"])
    assert "autotuning: the sections are environment, smoke" in capsys.readouterr().err


def test_the_reference_is_scaled_dot_product_attention_with_a_mask():
    torch.manual_seed(0)
    q, do = torch.randn(2, 2, 5, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 2, 8, dtype=torch.float64)
    mask = gpu_kernels.visible(CPU, Case(5, 9, 4, 2, 8, (0, 4), (5, 4), (2, 0)))
    found = plain_attention([q, k, v, do], mask)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask[:, None], enable_gqa=True
    ).transpose(1, 2)
    sees = mask.any(-1)
    assert sees.tolist() == [[False, False, True, True, True], [True, True, True, True, False]]
    out = out.where(sees[..., None, None], 0.0)
    gradients = torch.autograd.grad(out, leaves, do)
    expected = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.nan_to_num(0.0))


def test_an_error_above_the_allowed_or_nan_does_not_pass():
    exact, plain = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.1)
    for answer, factor, passes in ((0.19, "out", True), (0.21, "out", False), (0.29, "dq", True)):
        error = gpu_kernels.judge(factor, torch.full((3,), answer), plain, exact)
        assert error == pytest.approx(answer / ({"out": 0.2, "dq": 0.3}[factor]), rel=1e-3)
        assert verdict({"x": error})["passed"] == passes
    poisoned = torch.tensor([0.0, math.nan, 0.0])
    assert not verdict({"x": gpu_kernels.judge("out", poisoned, plain, exact)})["passed"]


PADDED = Case(5, 12, 3, 1, 16, (4, 4, 4), (5, 4, 5), (2, 6, 12))


def off_by_one_percent(*arguments, **options):
    out, lse = attention(*arguments, **options)
    return out * 1.01, lse


def one_slot_too_far(*arguments, left_padding, **options):
    return attention(*arguments, left_padding=left_padding - 1, **options)


@pytest.mark.parametrize("wrong", [off_by_one_percent, one_slot_too_far])
def test_wrong_attention_fails_its_case(wrong, monkeypatch):
    assert check_attention(CPU, PADDED, torch.float32)["passed"]
    monkeypatch.setattr(gpu_kernels, "attention", wrong)
    row = check_attention(CPU, PADDED, torch.float32)
    assert not row["passed"]
    assert row["errors"]["lse"] <= 1 or wrong is one_slot_too_far


def test_padding_that_transformers_cannot_hide_fails(monkeypatch):
    def wrong(*arguments, left_padding, **options):
        return attention(*arguments, **options)

    monkeypatch.setattr("mqa_kernels.attention", wrong)
    row = gpu_kernels.check_transformers(CPU)
    assert not row["passed"]
    assert row["equal"].keys() == {"dynamic", "static"}


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins(TINY, torch.bfloat16, True, CPU)


def test_the_twins_of_an_int8_model_are_its_weights_times_their_scales(twins):
    layer = twins.model.transformer.h[1].mlp.c_fc
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    torch.testing.assert_close(twins.exact.transformer.h[1].mlp.c_fc.weight, weight)
    assert torch.equal(twins.plain.transformer.h[1].mlp.c_fc.weight, weight.bfloat16())
    assert twins.exact.lm_head.weight is twins.exact.transformer.wte.weight


@pytest.mark.parametrize("part", ["logits", "argmax", "kv"])
def test_a_wrong_fused_step_fails(twins, part, monkeypatch):
    step = gpu_kernels.fused_step

    def wrong(model, ids, cache):
        logits, chosen, highest = step(model, ids, cache)
        if part == "logits":
            logits = logits * 1.1
        elif part == "argmax":
            chosen = (chosen + 1) % TINY.vocab_size
        else:  # the newest slot of the last row
            cache.kv[:, -1, cache.lengths[-1] - 1] *= 1.1
        return logits, chosen, highest

    assert gpu_kernels.check_step(twins, 3)["passed"]
    monkeypatch.setattr(gpu_kernels, "fused_step", wrong)
    row = gpu_kernels.check_step(twins, 3)
    assert not row["passed"]
    assert row["errors"][part] > 1


def test_a_step_that_depends_on_overlap_fails(twins, monkeypatch):
    step = gpu_kernels.fused_step

    def racing(model, ids, cache):
        logits, *chosen = step(model, ids, cache)
        overlaps = launch.overlap(CPU) is not launch.NO_OVERLAP
        return logits + overlaps, *chosen

    monkeypatch.setattr(launch, "overlap", lambda device: dict(launch.NO_OVERLAP))
    assert gpu_kernels.check_replays(twins.model, 1)["passed"]
    monkeypatch.setattr(gpu_kernels, "fused_step", racing)
    row = gpu_kernels.check_replays(twins.model, 1)
    assert not row["passed"]
    assert row["equal"] == 1  # the cache


def test_an_action_is_run_once_before_it_is_recorded(cuda):
    count = torch.zeros(1)
    replay = gpu_kernels.recorded(lambda: count.add_(1), torch.device("cuda"))
    assert count.item() == 2  # the stand-in runs what it records
    replay()  # which it counts as the first replay
    replay()
    assert count.item() == 3


def test_replays_that_choose_other_tokens_than_the_modules_fail(twins, monkeypatch):
    def generate(model, prompts, count, **options):
        return [[len(model.lm_head._forward_hooks)] * count for _ in prompts]

    monkeypatch.setattr(gpu_models, "generate", generate)
    assert gpu_models.check_loops(twins.plain, {}) == {
        "passed": False, "equal": 0, "tokens": 45 * 24,
    }  # fmt: skip


def test_every_measured_step_follows_the_same_context(twins, monkeypatch):
    contexts, greedy_step = [], gpu_models.greedy_step

    def told(model, cache):
        step, state = greedy_step(model, cache)

        def run():
            contexts.append(state.lengths.tolist())
            step()

        return run, state

    monkeypatch.setattr(gpu_models, "greedy_step", told)
    row = gpu_models.step_speed(twins.plain, 2, 12)
    assert contexts == 2 * [[12 + i] * 2 for i in range(gpu_models.STEPS)]  # to warm up, to measure
    # The weights once, and 12.5 earlier tokens and the new one of two rows.
    config = twins.plain.config
    weights = 2 * (config.parameters - config.n_positions * config.n_embd)
    cache = 2 * 16.5 * 2 * config.n_layer * 16 * 2
    expected = (weights + cache) / row["step_us"] * 1e6 / 1e9
    assert row["gb_per_s"] == pytest.approx(expected)


def test_the_cases_hold_every_official_shape_and_kind_of_row():
    official = {(GPTConfig.preset(n).n_head, GPTConfig.preset(n).head_dim) for n in PRESETS}
    assert official <= {(case.H, case.D) for case in CASES}
    assert {case.G for case in CASES} >= {1, 2}
    assert any(case.G == case.H > 1 for case in CASES)
    assert {case.T for case in CASES} >= {1, 63, 64, 65, 111, 128, 1000}
    assert any(case.lengths for case in CASES[:4])
    assert any(case.left_padding for case in CASES[:4])
    assert math.prod((len(gpu_kernels.LARGE.start), 2048, 32, 128)) > 2**31


def test_out_of_memory_is_a_refusal_and_another_error_a_failure():
    def fails(error: Exception):
        def action():
            raise error

        return action

    cases = [({"n": 1}, fails(torch.OutOfMemoryError("full"))), ({"n": 2}, fails(ValueError("no")))]
    refused, failed = gpu_kernels.each(cases)
    assert refused["refused"] == "full"
    assert "passed" not in refused
    assert not failed["passed"]
    assert failed["error"].endswith("ValueError: no\n")
