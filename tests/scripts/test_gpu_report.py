"""gpu_report.py without a GPU: every section in small, and what happens when something is wrong."""

from __future__ import annotations

import json
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

pytest.importorskip("triton", reason="Triton is not available on this platform")

import gpu_kernels
import gpu_models
import gpu_report
import gpu_smoke
import gpu_speed
import gpu_tools
import gpu_training
from gpu_kernels import TINY
from triton.runtime.interpreter import GridExecutor

from tests.scripts.marks import WITHOUT_GPU

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# What a machine with a GPU need not have. Python reads sitecustomize.py first in every process.
SITECUSTOMIZE = """
import sys
for name in ("typer", "rich", "hypothesis", "pytest", "matplotlib", "pandas"):
    sys.modules[name] = None
"""

pytestmark = WITHOUT_GPU


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

    def test_smoke_runs_every_kernel_and_says_so(self, monkeypatch):
        launched, call = set(), GridExecutor.__call__
        monkeypatch.setattr(
            GridExecutor, "__call__",
            lambda self, *x, **y: (launched.add(self.fn.__name__), call(self, *x, **y)),
        )  # fmt: skip
        *rows, last = gpu_smoke.smoke(CPU)
        assert all(row["passed"] for row in rows), rows
        assert launched == set(gpu_tools.KERNELS)
        assert last == {
            "verdict": "every kernel runs, and in graphs without overlap",
            "passed": True,
        }

    def test_smoke_says_that_something_failed(self, monkeypatch):
        monkeypatch.setattr(gpu_smoke, "check_step", lambda models, rows: {"passed": False})
        monkeypatch.setattr(gpu_smoke, "check_replays", lambda *step: {"passed": True})
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
        assert checks == ["dropout", "again", "large", "transformers"]

    def test_fused_judges_steps_in_16_bits_and_int8_and_their_replays(self):
        rows = list(gpu_kernels.fused(CPU))
        assert all(row["passed"] for row in rows), rows
        kinds = [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float16", "float16")]
        steps = [(r["dtype"], r["weights"], r["rows"]) for r in rows if "steps" not in r]
        assert steps == [(*kind, count) for kind in kinds for count in (1, 3)]
        replays = [row for row in rows if "steps" in row]
        assert [row["rows"] for row in replays] == [3, 33] * 3
        assert [row["equal"] for row in replays] == [2] * 6  # and the cache

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
        shallow, whole, *steps = rows
        assert whole["model"] == "starcoderbase-1b, all layers"
        for check in (shallow, whole):
            assert check["passed"], check
            assert all(a > b for losses in check["losses"].values() for a, b in pairwise(losses))
        assert [(row["backend"], row["recompute"]) for row in steps] == [
            ("triton", False), ("sdpa", False), ("triton", True), ("sdpa", True),
        ]  # fmt: skip
        for row in steps:
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])
            assert row["mfu"] > row["mfu_causal"] > 0
            assert row["loss"] == pytest.approx(whole["losses"]["mqa-gpt"][0], rel=0.01)

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

    def test_profile_lists_the_longest_kernels_first(self):
        for row in gpu_models.profile(CPU):
            times = [kernel["us"] for kernel in row["kernels"]]
            assert times == sorted(times, reverse=True)
            assert 0 < sum(times) <= row["kernels_us"] * 1.001
            assert row["kernels_per_step"] > 20


def test_sections_that_compare_assemblers_get_the_other_one_or_are_skipped(monkeypatch):
    section = gpu_report.SECTIONS["steps-ptxas"]
    chosen = gpu_report.with_ptxas(section, Path("/there/ptxas"))
    assert chosen is not None
    assert chosen.environment == {"TRITON_PTXAS_PATH": "/there/ptxas"}
    assert gpu_report.with_ptxas(gpu_report.SECTIONS["steps"], None) is not None
    rows = list(gpu_report.run_sections({"it": gpu_report.with_ptxas(section, None)}, 1))
    assert [(name, *row) for name, row in rows] == [("it", "skipped"), ("it", "ended")]


def test_a_section_runs_with_its_environment(tmp_path, monkeypatch):
    (tmp_path / "telling.py").write_text(
        "import os\ndef tells(device):\n    yield {'pdl': os.environ['MQA_KERNELS_PDL']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    section = gpu_report.Section("telling", "tells", {"MQA_KERNELS_PDL": "0"})
    rows = list(gpu_report.run_sections({"told": section}, 600))
    assert rows == [("told", {"pdl": "0"}), ("told", {"ended": None})]


def test_checks_run_side_by_side_and_measurements_alone():
    names = [*gpu_report.SECTIONS]
    batches = list(gpu_report.batches(names))
    assert [name for batch in batches for name in batch] == names
    assert [batch for batch in batches if len(batch) > 1] == [
        ["fused", "numerics", "numerics-ptxas", "dtypes"]
    ]


WAITING = """
import os, pathlib, time
def meets(device, own, other):
    pathlib.Path(own).touch()
    while not pathlib.Path(other).exists():
        time.sleep(0.01)
    yield {"met": own}
def one(device):
    yield from meets(device, os.environ["ONE"], os.environ["OTHER"])
def other(device):
    yield from meets(device, os.environ["OTHER"], os.environ["ONE"])
def works(device):
    yield {"passed": True}
def sleeps(device):
    yield {"pid": os.getpid()}
    time.sleep(600)
"""


def test_sections_of_a_batch_run_at_the_same_time(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ONE", str(tmp_path / "1"))
    monkeypatch.setenv("OTHER", str(tmp_path / "2"))
    batch = {name: gpu_report.Section("waiting", name) for name in ("one", "other")}
    rows = list(gpu_report.run_sections(batch, 600))  # either waits for the other
    assert sorted(name for name, row in rows if "met" in row) == ["one", "other"]
    assert [row["ended"] for _, row in rows if "ended" in row] == [None, None]


def test_a_section_that_hangs_does_not_hold_up_the_others(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.syspath_prepend(tmp_path)
    batch = {name: gpu_report.Section("waiting", name) for name in ("sleeps", "works")}
    rows = gpu_report.run_sections(batch, 60)
    ended = next(row["ended"] for name, row in rows if name == "works" and "ended" in row)
    rows.close()
    assert ended is None


def test_an_interruption_ends_all_processes(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.syspath_prepend(tmp_path)
    rows = gpu_report.run_sections({"it": gpu_report.Section("waiting", "sleeps")}, 600)
    _, row = next(rows)
    rows.close()
    with pytest.raises(ProcessLookupError):
        os.kill(row["pid"], 0)


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
    batch = {"it": gpu_report.SECTIONS["environment"]}
    rows = list(gpu_report.run_sections(batch, 0.1))
    assert rows == [("it", {"ended": "stopped after 0.1 s"})]


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path, monkeypatch):
    def run(batch: dict[str, Any], limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "decode", {"passed": True}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "run_sections", run)
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
    monkeypatch.setattr(gpu_report, "run_sections", None)  # no section starts
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--out", str(tmp_path / "report")])
    assert ended.value.code == 2
    assert "gpu_report.json cannot be written: " in capsys.readouterr().err


def test_unknown_sections_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--only", "decode,autotuning"])
    assert "autotuning: the sections are environment, smoke" in capsys.readouterr().err
