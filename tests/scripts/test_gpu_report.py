"""gpu_report.py without a GPU: everything in small, and what happens when something is wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

from clock import Clock
from contenders import OURS, Problem, make_inputs
from gpu_report_checks import (
    CASES,
    Case,
    case_inputs,
    check_case,
    check_integration,
    poisoned_allocations,
)
from gpu_report_model import (
    STEPS,
    Size,
    measure_steps,
    prefill_flops,
    profile_step,
    step_bytes,
)
from gpu_report_pool import in_processes
from gpu_report_sections import SECTIONS, TUNED, Context, cpu_plan, gpu_plan
from judge import exact_attention, find_truth, plain_attention

from mqa_gpt import GPT, GPTConfig
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.generation.decode_graph import Decoder
from mqa_kernels import attention
from scripts import gpu_report
from scripts.gpu_report_table import failures, print_table

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# What a machine with a GPU need not have. Python reads sitecustomize.py first in every process.
ABSENT = ("typer", "rich", "hypothesis", "pytest", "matplotlib", "pandas")
SITECUSTOMIZE = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
"""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what runs without a GPU is tested where there is none"
)


def report_from(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as on a machine without a GPU, and with the packages it names only."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    environment.pop("TRITON_INTERPRET", None)  # the script has to see to it
    python = partial(
        subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert "ModuleNotFoundError" in python([sys.executable, "-c", "import rich"]).stderr
    command = [sys.executable, "scripts/gpu_report.py", "--out", str(folder), "--budget", "3000"]
    return python([*command, *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The report of one whole run from the command line, and what it printed: both streams."""
    folder = tmp_path_factory.mktemp("report")
    result = report_from(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "gpu_report.json").read_text()), result.stdout, result.stderr


def rows(run: tuple[dict[str, Any], str, str], section: str) -> list[dict[str, Any]]:
    found = run[0]["sections"][section]
    assert found["error"] is None
    assert found["seconds"] > 0
    return found["rows"]


def test_without_a_gpu_it_says_so_and_runs_everything_in_small(run):
    report, shown, _ = run
    assert report["device"] == "cpu"
    assert shown.startswith("no GPU: ")
    assert "nothing failed" in shown
    assert list(report["sections"]) == list(gpu_report.SHARES)
    assert not [row for name in report["sections"] for row in rows(run, name) if "skipped" in row]


def test_what_the_interpreter_warns_of_is_kept_from_the_reader(run):
    assert "numerics (at most" in run[2]
    assert "RuntimeWarning" not in run[2]


def test_it_says_where_it_ran(run):
    (row,) = rows(run, "environment")
    assert row["versions"]["torch"] == torch.__version__
    (row,) = rows(run, "ceilings")
    assert row["copy_gb_per_s"] > 0
    assert row["matmul_tflops"] > 0


def test_numerics_judges_outputs_and_gradients_in_every_dtype(run):
    judged = [row for row in rows(run, "numerics") if "case" in row]
    assert {row["dtype"] for row in judged} == {"float32", "bfloat16", "float16"}
    for row in judged:
        assert row["passed"]
        assert set(row["verdicts"]) == {"out", "lse", "dq", "dk", "dv"}
    checks = {row["check"]: row["passed"] for row in rows(run, "numerics") if "check" in row}
    # A CUDA graph cannot be captured here.
    assert checks.pop("capture") is None
    assert checks == dict.fromkeys(("compiled", "determinism", "operator", "integration"), True)


def test_a_model_on_the_kernels_says_the_same_as_transformers(run):
    found = {(row["dtype"], row["backend"]): row for row in rows(run, "parity")}
    assert len(found) == 6
    for (dtype, _), row in found.items():
        assert row["passed"]
        assert row["logits_error"] <= row["logits_limit"]
        assert dtype != "float32" or row["tokens_equal"] == row["tokens"] > 0


@pytest.mark.parametrize(
    ("section", "figure"), [("forward", "tflops"), ("backward", "tflops"), ("decode", "gb_per_s")]
)
def test_every_contender_is_timed_or_says_why_not(run, section, figure):
    for row in rows(run, section):
        results = {result["contender"]: result for result in row["results"]}
        assert results[OURS]["right"]
        assert results[OURS][figure] is not None
        assert results["plain PyTorch"]["right"]
        assert results["flash, heads expanded"]["right"]
        assert "refused" in results["cudnn, enable_gqa"]  # it needs a GPU
        assert len(results) == 15
        for result in results.values():
            assert ("refused" in result) != (figure in result)


def test_all_loops_say_the_same(run):
    found = rows(run, "model_tokens")
    assert [row["case"]["by"] for row in found] == ["greedy", "penalty", "filters"]
    for row in found:
        assert row["passed"]
        assert row["tokens_equal"] == dict.fromkeys(("replayed", "batched"), 3 + 4)
        assert row["tokens"] == 3 + 4


def test_decoding_is_timed_by_steps_and_by_whole_generations(run):
    one, two, loops, int8 = rows(run, "model_decode")
    assert [row["case"]["batch"] for row in (one, two, loops, int8)] == [1, 2, 2, 1]
    assert int8["case"] == one["case"] | {"weights": "int8"}
    assert int8["bytes_per_step"] < 0.7 * one["bytes_per_step"]
    for row in (one, two, int8):
        seconds = row["seconds_per_step"]
        assert set(seconds) == {"replayed", "called"}
        assert row["tokens_per_s"] == pytest.approx(row["case"]["batch"] / seconds["replayed"])
    for loop in loops["loops"].values():
        assert loop["tokens_per_s"] > 0
        assert loop["first_token_seconds"] > 0
    assert "x the plain loop" in run[1]
    assert "x bfloat16" in run[1]


def test_prefill_and_the_kernels_of_a_step_are_measured(run):
    (row,) = rows(run, "model_prefill")
    for way in ("whole", "by pieces"):
        assert row[way]["tokens_per_s"] == pytest.approx(9 / row[way]["seconds"])
    (row,) = rows(run, "model_profile")
    times = [kernel["microseconds"] for kernel in row["kernels"]]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= row["kernels_microseconds"] * 1.001
    assert row["kernels_per_step"] > 20


def test_multi_query_reads_a_smaller_cache_than_multi_head_and_as_many_weights(run):
    mqa, mha = rows(run, "model_heads")
    assert (mqa["case"]["heads"], mha["case"]["heads"]) == ("MQA", "MHA")
    assert mha["cache_bytes"] == 3 * mqa["cache_bytes"]  # three heads
    ours, theirs = (row["bytes_per_step"] - row["cache_bytes"] for row in (mqa, mha))
    # In each of two layers two key/value heads of 16 have 64 biases, and units of the MLP 32.
    assert theirs - ours == 2 * (64 - 32) * 2


def test_autotune_names_a_winner_of_each_kernel(run):
    found = rows(run, "autotune")
    assert [row["kernel"] for row in found] == ["forward", "decode splits", "dkv", "dq"]
    for row in found:
        assert row["winner"]["right"]
        assert {"shipped"} < {result["contender"] for result in row["results"]}


def test_only_runs_what_is_chosen(tmp_path):
    result = report_from(tmp_path, "--only", "ceilings,environment")
    assert result.returncode == 0, result.stdout + result.stderr
    sections = json.loads((tmp_path / "gpu_report.json").read_text())["sections"]
    chosen = [name for name, section in sections.items() if "rows" in section]
    assert chosen == ["environment", "ceilings"]
    assert sections["numerics"] == {"skipped": "not chosen"}


@pytest.mark.parametrize("budget", ["nan", "inf", "-5", "0", "1e9", "soon"])
def test_a_budget_that_is_no_time_is_refused(budget, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--out", str(tmp_path / "new"), "--budget", budget])
    assert ended.value.code == 2
    assert f"'{budget}' is not a number of seconds" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("obstacle", ["a file", "no space", "a folder of that name"])
def test_a_report_that_cannot_be_written_is_refused_before_it_begins(
    obstacle, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "report"
    if obstacle == "a file":
        folder.touch()
    elif obstacle == "a folder of that name":
        (folder / "gpu_report.json").mkdir(parents=True)
    else:
        folder.mkdir()

        def full(path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "touch", full)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(gpu_report, "Worker", None)  # nothing is started
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--out", str(folder)])
    assert ended.value.code == 2
    assert "gpu_report.json cannot be written: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_help_lists_the_sections_and_says_what_is_done_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Without a GPU it tries itself out in small" in shown
    assert ", ".join(gpu_report.SHARES) in shown
    assert "(default: 450)" in shown


def test_sections_that_do_not_exist_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--only", "forward,backwards"])
    assert "backwards: the sections are environment, ceilings" in capsys.readouterr().err


class FakeWorker:
    """Stands for the process: "numerics" fails, "parity" has a check that fails."""

    started = 0

    def __init__(self):
        self.device = None

    def start(self):
        FakeWorker.started += 1
        self.device = "cpu"
        return self.device

    def rows(self, section, seconds):
        if section == "numerics":
            yield {"check": "first", "passed": True}
            raise gpu_report.SectionError("Traceback\nRuntimeError: out of luck")
        if section == "ceilings":
            yield {"copy_gb_per_s": 1.0, "matmul_tflops": 1.0}

    def stop(self):
        self.device = None


def test_a_failing_section_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "Worker", FakeWorker)
    FakeWorker.started = 0
    arguments = ["--out", str(tmp_path), "--only", "numerics,ceilings"]
    assert gpu_report.main(arguments) == 1
    sections = json.loads((tmp_path / "gpu_report.json").read_text())["sections"]
    assert sections["numerics"]["rows"] == [{"check": "first", "passed": True}]
    assert sections["numerics"]["error"].endswith("out of luck")
    assert sections["ceilings"]["rows"]
    assert "numerics: RuntimeError: out of luck" in capsys.readouterr().out


def test_a_process_that_dies_is_a_failed_section(monkeypatch):
    worker = gpu_report.Worker()
    monkeypatch.setattr(gpu_report, "serve", len)  # which a pipe has not
    with pytest.raises(gpu_report.SectionError, match="died: exit code 1"):
        worker.start()
    worker.stop()


def test_time_is_shared_and_what_is_left_goes_to_the_next():
    names = list(gpu_report.SHARES)
    left = 480.0
    for i in range(len(names)):
        part = gpu_report.share(names[i:], left)
        assert 0 < part <= left
        left -= part
    assert left == pytest.approx(0)
    assert gpu_report.share(names[-1:], 100.0) == 100.0
    assert gpu_report.share(names, -5.0) == 0


class TestPool:
    tasks = (([("value", 4)],), (5,), ([("value", 3)],))  # for `dict`, which cannot make one of 5

    def test_every_task_has_a_row_and_one_that_fails_its_traceback(self):
        for workers in (0, 1):
            found = list(in_processes(dict, list(self.tasks), workers, time.monotonic() + 600))
            assert sorted(row["value"] for row in found if "value" in row) == [3, 4]
            (failed,) = (row for row in found if "error" in row)
            assert "TypeError" in failed["error"]
            assert failed["task"] == "(5,)"
            assert not failed["passed"]

    def test_what_comes_too_late_is_skipped(self):
        found = list(in_processes(dict, list(self.tasks), 2, 0.0))
        assert [row["skipped"] for row in found] == ["no time left"] * 3

    def test_what_hangs_is_ended(self):
        found = list(in_processes(time.sleep, [(60,)], 1, time.monotonic() + 1))
        assert [row["skipped"] for row in found] == ["no time left"]
        assert multiprocessing.active_children() == []


class TestErrorRule:
    def truth(self):
        q, k, v = make_inputs(Problem(2, 9, 9, 4, 16, torch.bfloat16), CPU)
        do = torch.randn(q.shape).to(q.dtype)
        return find_truth(q, k, v, 0, do), (q, k, v, do)

    def test_accepts_plain_pytorch_and_rejects_one_percent_too_much(self):
        truth, (q, k, v, _) = self.truth()
        out = plain_attention(q, k, v, 0)
        assert truth.judge({"out": out})["out"].passed
        assert not truth.judge({"out": out * 1.05})["out"].passed
        exact32 = find_truth(*(x.float() for x in (q, k, v)), 0)
        out32 = plain_attention(*(x.float() for x in (q, k, v)), 0)
        assert exact32.judge({"out": out32})["out"].passed
        assert not exact32.judge({"out": out32 * 1.01})["out"].passed

    def test_rejects_nan_and_gradients_of_another_row(self):
        truth, (q, k, v, _) = self.truth()
        out = plain_attention(q, k, v, 0)
        out[-1, 3, 0, 0] = float("nan")
        assert not truth.judge({"out": out})["out"].passed
        wrong = truth.exact["dk"].repeat(2, 1, 1, 1).roll(1, 1)
        assert not truth.judge({"dk": wrong})["dk"].passed

    def test_pieces_are_the_whole(self):
        truth, (q, k, v, do) = self.truth()
        leaves = [x[-1:].double().requires_grad_() for x in (q, k, v)]
        out = exact_attention(*leaves, 0)
        gradients = torch.autograd.grad(out, leaves, do[-1:].double())
        for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
            torch.testing.assert_close(truth.exact[name], x.detach())

    def test_a_kernel_that_is_one_percent_off_fails_its_case(self, monkeypatch):
        case = Case(1, 9, 9, 3, 1, 16, (0,))
        assert check_case(CPU, case, "float32")["passed"]

        def wrong(*arguments, **options):
            out, lse = attention(*arguments, **options)
            return out * 1.01, lse

        monkeypatch.setattr("gpu_report_checks.attention", wrong)
        row = check_case(CPU, case, "float32")
        assert not row["passed"]
        assert not row["verdicts"]["out"]["passed"]
        assert row["verdicts"]["lse"]["passed"]
        report = {"sections": {"numerics": {"rows": [row], "error": None}}}
        (text,) = failures(report)
        assert text == (
            "numerics: float32, B=1 T=9 S=9 H=3 G=1 D=16 start=(0,) lengths=None left_padding=None"
        )

    def test_padding_on_the_left_that_is_one_too_short_fails_its_case(self, monkeypatch):
        # Rows with padding before all queries, among them, and nothing but padding.
        case = Case(3, 5, 12, 3, 1, 16, (4, 4, 4), (5, 4, 5), (2, 6, 12))
        row = check_case(CPU, case, "float32")
        assert row["passed"], row["verdicts"]

        def wrong(*arguments, left_padding, **options):
            return attention(*arguments, left_padding=left_padding - 1, **options)

        monkeypatch.setattr("gpu_report_checks.attention", wrong)
        assert not check_case(CPU, case, "float32")["passed"]


def test_a_model_in_transformers_that_sees_its_padding_fails_the_integration(monkeypatch):
    def wrong(*arguments, left_padding, **options):
        return attention(*arguments, **options)

    monkeypatch.setattr("mqa_kernels.attention", wrong)
    row = check_integration(CPU)
    assert not row["passed"]
    assert len(row["equal"]) == 4


def test_the_cases_hold_every_size_that_the_kernels_are_to_be_tested_with():
    for names, sizes in (
        ("TS", {1, 63, 64, 65, 111, 128, 1000}),
        ("D", {16, 32, 64, 80, 96, 128, 256}),
        ("H", {1, 3, 12, 16, 22, 32, 48}),
    ):
        for name in names:
            assert sizes <= {getattr(case, name) for case in CASES}
    assert {1, 2} <= {case.G for case in CASES}
    assert any(case.G == case.H > 1 for case in CASES)
    assert any(case.lengths for case in CASES)
    assert any(max(case.start) for case in CASES)
    padded = [(case.start[0], case.T, left) for case in CASES for left in case.left_padding or ()]
    assert any(0 < left <= start for start, _, left in padded)
    assert any(start < left < start + T for start, T, left in padded)
    assert any(start + T <= left for start, T, left in padded)


def test_on_a_gpu_it_times_sequences_to_16k_and_batches_to_256():
    plan = gpu_plan()
    assert {p.T for p in plan.forward} == {512, 1024, 2048, 4096, 8192, 16384}
    assert plan.forward[0] == plan.backward[0] == Problem(2, 8192, 8192, 32, 128)
    assert {p.B for p in plan.decode} == {1, 8, 16, 32, 64, 128, 256}
    assert {p.S for p in plan.decode} == {1024, 8192, 16384}
    assert {p.T for p in plan.decode} == {1, 4, 8}
    assert {tuning.kernel for tuning in plan.autotune} == set(TUNED)
    model = plan.model
    assert {size.batch for size in model.decode} == {1, 8, 32, 128, 256}
    assert {size.batch for size in model.int8} == {1, 8, 32}
    assert set(model.int8) < set(model.decode)
    assert set(model.configs) == set(model.heads) == {"starcoderbase-1b", "starcoderbase-7b"}
    assert {(name, dtype) for name, _, dtype, _ in plan.parity} == {
        (f"starcoderbase-{size}b", dtype) for size in (1, 7) for dtype in ("float32", "bfloat16")
    }


def test_what_nobody_may_look_at_and_what_is_not_written_is_nan():
    _, k, _, *_ = case_inputs(CPU, Case(1, 2, 9, 3, 1, 16, (4,)), torch.float32)
    assert k[0, :6].isfinite().all()
    assert k[0, 6:].isnan().all()
    with poisoned_allocations():
        assert torch.empty(5).isnan().all()
        assert torch.empty_like(k).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_model_s_bytes_and_operations_are_counted_as_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("starcoderbase-7b")).bfloat16()
    # All weights but the positions', and 21,504 bytes per token: see the shapes of the checkpoint.
    assert step_bytes(model, Size(1, 0)) == 2 * (7_327_263_232 - 8192 * 4096)
    assert step_bytes(model, Size(3, 100)) - step_bytes(model, Size(1, 0)) == 300 * 21_504
    C, F, D, T = 4096, 16384, 128, 2048
    layer = C * (C + 2 * D) + C * C + 2 * C * F
    products = 2 * T * 42 * layer + 2 * C * 49152
    assert prefill_flops(model, T) == products + 42 * 4 * C * T * (T + 1) // 2

    # Of 8-bit weights one byte each, and four for each row; two for the other 1-D parameters.
    quantize(model)
    rows = 42 * (C + 2 * D + C + F + C) + 49152
    small = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1)
    assert step_bytes(model, Size(1, 0)) == 42 * layer + 49152 * C + 4 * rows + 2 * small


def test_a_cache_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("gpu_report_model.available_memory", lambda device: 10_000)
    model = GPT(cpu_plan().model.configs["tiny"])
    row = measure_steps(Clock(CPU), model, Size(2, 40), 1)
    assert row == {"refused": "its cache takes 0.0 GB, and 0.0 GB are free"}


def test_the_start_of_a_decoder_is_its_first_run_its_recording_and_a_replay(graphs):
    # What a process does once is in the first line.
    found = iter([90.0, 90.0, 90.0, 3.0, 5.0, 2.0, 1.0, 4.0, 1.0, 2.0, 6.0, 3.0])
    done = []

    class Told(Clock):
        """Notes what graphs an action makes and how many it replays, and says what it was told."""

        def wall(self, action):
            before = len(graphs), sum(graph.replays for graph in graphs)
            action()
            done.append((len(graphs) - before[0], sum(g.replays for g in graphs) - before[1]))
            return next(found, 1.0)

    model = GPT(cpu_plan().model.configs["tiny"]).eval()
    row = measure_steps(Told(CPU), model, Size(2, 12), 1)
    assert done[:12] == [(0, 0), (1, 1), (0, 1)] * 4
    names = ("first_run", "recording", "replay")
    assert [row[f"{name}_seconds"] for name in names] == [2.0, 5.0, 2.0]


def test_the_step_beside_a_profile_is_the_median_of_several_behind_the_same_context(monkeypatch):
    found = iter([9.0, 3.0, 1.0, 2.0])  # the first is the warm-up
    contexts = []
    run = Decoder.run

    class Told(Clock):
        """Measures nothing: it runs the action, and says what it was told."""

        def seconds(self, action):
            action()
            return next(found)

    def seen(self):
        contexts.append(self.state.cache.lengths.tolist())
        run(self)

    monkeypatch.setattr(Decoder, "run", seen)
    model = GPT(cpu_plan().model.configs["tiny"]).eval()
    row = profile_step(Told(CPU), model, Size(2, 12), 3)
    assert row["step_microseconds"] == pytest.approx(2.0 / STEPS * 1e6)
    behind = [[12 + i] * 2 for i in range(STEPS)]
    assert contexts == behind[:2] + 5 * behind  # to record, to measure and to profile


def test_operations_and_bytes_are_counted_as_by_hand():
    # 2 rows, 3 heads of 8: the queries see 1, 2, 3 and 4 keys; two products of 2 operations each.
    assert Problem(2, 4, 4, 3, 8).flops() == 2 * 3 * (1 + 2 + 3 + 4) * 8 * 2 * 2
    # Two queries behind 5 slots see 6 and 7 keys.
    assert Problem(1, 2, 7, 3, 8).flops() == 3 * (6 + 7) * 8 * 2 * 2
    assert Problem(4, 1, 100, 3, 8).kv_bytes() == 4 * 100 * (8 + 8) * 2
    assert Problem(4, 1, 100, 3, 8, torch.float32).kv_bytes() == 4 * 100 * (8 + 8) * 4


def test_the_table_has_a_line_for_everything(capsys):
    problem = Problem(1, 8192, 8192, 32, 128).describe()
    results = [
        {"contender": OURS, "right": True, "tflops": 500.0, "peak_bytes": 2e9},
        {"contender": "flash, heads expanded", "right": True, "tflops": 400.0, "peak_bytes": 3e9},
        {"contender": "cudnn, enable_gqa", "right": False, "tflops": 900.0},
        {"contender": "efficient, enable_gqa", "refused": "no"},
    ]
    case = {"model": "1b", "case": {"batch": 8, "context": 1024}}
    figures = {
        "seconds_per_step": {"replayed": 0.001, "called": 0.003},
        "first_run_seconds": 0.0314,
        "recording_seconds": 0.02,
        "replay_seconds": 0.0011,
        "tokens_per_s": 8000.0,
        "gb_per_s": 3000.0,
    }
    int8 = {"model": "1b", "case": case["case"] | {"weights": "int8"}}
    model_rows = [
        case | figures,
        int8 | figures | {"tokens_per_s": 13600.0, "gb_per_s": 2600.0},
        case | {"refused": "its cache takes too much"},
    ]
    sections = {
        "ceilings": {"rows": [{"copy_gb_per_s": 4000.0, "matmul_tflops": 800.0}], "seconds": 1},
        "backward": {"rows": [{"problem": problem, "results": results}], "seconds": 2},
        "decode": {"rows": [{"problem": problem, "skipped": "no time left"}], "seconds": 0},
        "parity": {"skipped": "not chosen"},
        "model_decode": {"rows": model_rows, "seconds": 1},
    }
    print_table({"sections": sections})
    shown = capsys.readouterr().out
    assert "500 TFLOP/s, 0.62 of ceiling; 1.25 x flash, heads expanded (400)" in shown
    assert "2.00 GB, expanded 3.00" in shown
    assert "no time for 1: B 1   T 8192" in shown
    assert "1b batch=8 context=1024:   8000.0 tok/s, 1000 us a step, 0.75 of ceiling" in shown
    assert "3.00 x as fast as called; first run 31.4 ms" in shown
    assert "; first run 31.4 ms, recording 20.0 ms, a replay 1.1 ms" in shown
    assert "0.65 of ceiling (2600 GB/s), 1.70 x bfloat16" in shown
    assert "its cache takes too much" in shown
    assert "nothing failed" in shown


def test_cases_that_fail_are_listed_in_the_table(capsys):
    late = Context(Clock(torch.device("cpu")), cpu_plan(), time.monotonic() - 1)
    sections, count = {"ceilings": {"skipped": "not chosen"}}, 0
    for name in SECTIONS:
        if name in ("environment", "ceilings"):  # they have no cases
            continue
        rows = [row for row in SECTIONS[name](late) if row.pop("skipped", None)]
        assert rows, name
        rows = [row | {"passed": False, "error": f"Traceback\nE: {name} {row}"} for row in rows]
        sections[name] = {"rows": rows, "seconds": 0}
        count += len(rows)
    print_table({"sections": sections})
    assert f"== {count} failures" in capsys.readouterr().out
