"""`mqa-gpt train`: runs, refusals, exit statuses, plots and exports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mqa_gpt.training.config import to_toml
from tests.cli.test_app import environment, invoke, refusal
from tests.training.runs import assert_same_run, tiny_run, write_sources


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("train")
    run = tiny_run(write_sources(folder / "sources"), run_steps=4, run_evaluate_every=2)
    (folder / "tiny.toml").write_text(to_toml(run))
    return str(folder / "tiny.toml")


@pytest.mark.slow
def test_a_run_is_trained_plotted_exported_and_used(config: str, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    result = invoke("train", config, "--out", out, "--set", "optimizer.lr=2e-3", "--device", "cpu")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "optimizer.lr = 0.002\n" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("step 2 of 4: ")]
    assert re.fullmatch(
        r"step 2 of 4: training loss [\d.]+; held out: all [\d.]+,.* middles [\d.]+; \d+ s left",
        line,
    )
    assert f"the model is in {out}/model" in result.stderr
    assert invoke("train", "plot", out).stdout == f"{out}/plot.png\n"
    exported = invoke("train", "export", out, str(tmp_path / "model"), "--best")
    assert exported.stdout == f"{tmp_path}/model\n"
    assert exported.stderr == f"the model of {out}/checkpoints/step-00000004\n"
    again = refusal("train", "export", out, str(tmp_path / "model"))
    assert again == f"{tmp_path}/model exists already: name another folder, or remove it"
    assert invoke("inspect", "-m", str(tmp_path / "model")).exit_code == 0
    assert invoke("generate", "-m", f"{out}/model", "def", "--max-new-tokens", "2").exit_code == 0
    assert "holds a run: pass --resume" in refusal_after_settings("train", config, "--out", out)
    again = invoke(
        "train", config, "--out", out, "--set", "optimizer.lr=2e-3", "--resume", "--device", "cpu"
    )
    assert again.exit_code == 0


def refusal_after_settings(*arguments: str) -> str:
    """The last line of what is refused once the settings are printed."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    return result.stderr.splitlines()[-1].removeprefix("error: ")


def test_a_dry_run_reports_and_leaves_nothing(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(invoke("train", config, "--dry-run", "--json", "--device", "cpu").stdout)
    assert found["steps"] == 4
    assert found["seconds_per_step"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--resume"], ["--from", "run"], ["--tensor-parallel", "2"]], ids=lambda o: o[0]
)
def test_what_a_dry_run_would_not_heed_is_refused(option: list[str], config: str) -> None:
    assert refusal("train", config, "--dry-run", *option) == (
        f"--dry-run takes a few steps of a new run in one process: leave {option[0]} out"
    )


@pytest.mark.slow
def test_only_the_first_of_the_ranks_says_what_is_wrong(config: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    wrong = ["--set", "data.include=['*.none']", "--out", str(tmp_path / "run"), "--device", "cpu"]
    command = [*torchrun, "2", "-m", "mqa_gpt", "train", config, *wrong]
    done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, check=False)
    assert done.returncode != 0
    assert done.stderr.count(b"there are no documents to train on") == 1
    assert b"gloo" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_is_refused_in_one_line(config: str, tmp_path: Path) -> None:
    assert refusal("train", config) == "--out is missing: name a folder for the run"
    assert refusal("train", "none.toml").startswith("none.toml cannot be read")
    assert "run.stepps is not a setting" in refusal("train", config, "--set", "run.stepps=1")
    for command in (["plot", "nothere"], ["export", "nothere", str(tmp_path / "model")]):
        assert refusal("train", *command) == (
            "nothere holds no run: name a folder that `mqa-gpt train CONFIG --out FOLDER` made"
        )
    wrong = refusal_after_settings("train", config, "--out", str(tmp_path / "run"), "--resume")
    assert "holds no run to resume" in wrong


def test_what_cannot_work_is_refused_at_once_with_file_and_line(
    config: str, tmp_path: Path
) -> None:
    text = Path(config).read_text().replace("length = 40", "length = 49")
    (tmp_path / "long.toml").write_text(text)
    line = text.splitlines().index("length = 49") + 1
    run = ("train", str(tmp_path / "long.toml"), "--device", "cpu", "--out", str(tmp_path / "run"))
    wrong = "data.length is 49 and model.n_positions is 48: a sequence must fit into the context"
    assert refusal_after_settings(*run) == f"{tmp_path}/long.toml:{line}: {wrong}"
    assert refusal(*run, "--dry-run") == f"{tmp_path}/long.toml:{line}: {wrong}"
    source = ("--set", "data.sources=['nowhere']", "--set", "data.length=40")
    assert refusal_after_settings(*run, *source) == (
        f"--set data.sources=['nowhere']: data.sources: {Path.cwd()}/nowhere does not exist: name "
        "folders, .jsonl or .parquet files"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_config_itself_is_refused_and_left_as_it_is(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"# mine\n{Path(config).read_text()}"
    (tmp_path / "config.toml").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    run = ("train", "config.toml", "--out", ".", "--device", "cpu")
    assert "holds something else than a run" in refusal_after_settings(*run)
    assert "holds no run to resume" in refusal_after_settings(*run, "--resume")
    assert Path("config.toml").read_text() == text
    assert Path("data/corpus.txt").read_text() == "years of work"


def test_an_error_in_the_config_of_another_run_names_that_one(config: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "checkpoints/step-00000002").mkdir(parents=True)
    (old / "config.toml").write_text("[run]\nsteps = 0\n[model]\n[data]\n")
    run = ("train", config, "--out", str(tmp_path / "new"), "--device", "cpu")
    said = refusal_after_settings(*run, "--from", str(old))
    wrong = "run.steps is 0: it must be an integer of at least 1"
    assert said == f"{old}/config.toml:2: {wrong}"
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_is_continued_from_another_with_another_length(config: str, tmp_path: Path) -> None:
    out = [str(tmp_path / name) for name in ("short", "long")]
    assert invoke("train", config, "--out", out[0], "--device", "cpu").exit_code == 0
    more = ("--set", "run.steps=6", "--device", "cpu")
    result = invoke("train", config, "--out", out[1], "--from", out[0], *more)
    assert result.exit_code == 0
    says = f"continues from step 4 of {out[0]} with run.steps was 4 and is 6"
    assert says in result.stderr
    assert "step 6 of 6: training loss" in result.stderr
    both = refusal_after_settings(
        "train", config, "--out", out[1], "--from", out[0], "--resume", *more
    )
    assert both.startswith("--resume continues this run and --from another one")


LONG = ["--set", "run.steps=150", "--set", "run.save_every=0", "--set", "run.evaluate_every=0"]


@pytest.fixture(scope="module")
def whole_run(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert invoke("train", config, "--device", "cpu", *LONG, "--out", str(out)).exit_code == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_its_exit_status_and_the_run_can_go_on(
    number: signal.Signals, status: int, config: str, whole_run: Path, tmp_path: Path
) -> None:
    arguments = ["train", config, "--device", "cpu", *LONG, "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "mqa_gpt", *arguments]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE) as process:
        log = tmp_path / "run/log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and '"train"' in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == status
    (step,) = re.findall(rf"interrupted by {number.name} after step (\d+); --resume", said.decode())
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{int(step):08}"]
    assert invoke(*arguments, "--resume").exit_code == 0
    assert_same_run(tmp_path / "run", whole_run)
