"""What the README and the help texts tell people to type works."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mqa_gpt.checkpoint import DEMO_DIR
from mqa_gpt.cli import app
from mqa_gpt.environment import INSTALL_PEERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The lines that call `mqa-gpt`, from its name to what the shell would take for itself."""
    lines = re.findall(r"^ .*?\b(mqa-gpt [a-z].*)$", text, re.MULTILINE)
    return [re.split(r" [|>] |   +", line)[0] for line in lines]


def help_texts() -> str:
    names = ["generate", "infill", "batch", "verify", "inspect", "bench", "env"]
    runs = [[], *([name] for name in names)]
    return "".join(CliRunner().invoke(app, [*run, "--help"]).stdout for run in runs)


def test_the_python_examples_run_on_the_demo_checkpoint_each_by_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # one of them saves
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        if "bigcode/" not in block:  # which would be downloaded
            exec(block, {})
    assert len(capsys.readouterr().out) > 100

    (command,) = (command for command in commands(README) if "--model demo-int8" in command)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0
    assert result.stdout.strip()


@pytest.mark.parametrize("command", [*commands(README), *commands(help_texts())])
def test_every_command_that_is_shown_has_only_options_that_exist(command: str):
    words = [word for word in shlex.split(command)[1:] if word not in ("COMMAND", "...")]
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def test_the_commands_are_found():
    assert len(commands(README)) > 8
    assert len(commands(help_texts())) > 10


def test_every_file_in_the_tree_exists():
    (tree,) = re.findall(r"## What is where\n\n(.*?)\n\n", README, re.DOTALL)
    for line in tree.splitlines():
        name = line.split()[0]
        folder = DEMO_DIR.parent if line.startswith("      ") else ROOT
        assert (folder / name).exists(), name


def test_the_speeds_are_those_of_the_benchmark_results():
    expected = []
    for shape, names in {
        "tiny_starcoder_py": ["mqa-gpt"],
        "tiny_starcoder_py_zen4": ["mqa-gpt", "mqa-gpt int8"],
        "starcoderbase-1b_zen4": ["mqa-gpt", "mqa-gpt int8"],
        "tiny_starcoder_py_zen5": ["mqa-gpt", "mqa-gpt int8"],
        "starcoderbase-1b_zen5": ["mqa-gpt", "mqa-gpt int8"],
        "tiny_starcoder_py_avx512": ["mqa-gpt", "mqa-gpt int8"],
        "starcoderbase-1b_avx512": ["mqa-gpt", "mqa-gpt int8"],
    }.items():
        file = ROOT / f"benchmarks/results/cpu_decode_{shape}.json"
        figures = json.loads(file.read_text())["figures"]
        one, eight = figures["batch 1"], figures["batch 8"]
        for name in names:
            ratios = [one[name]["decode_ratio"], eight[name]["decode_ratio"]]
            ratios.append(one[name]["prefill_ratio"])
            if name == "mqa-gpt":
                ratios.append(figures["cold start"]["ratio"])
            expected.append([f"{ratio:.2f}" for ratio in ratios])
    (table,) = re.findall(r"\| cold start \|\n.*\n((?:\|.*\n)+)", README)
    assert [re.findall(r"\d+\.\d\d", line) for line in table.splitlines()] == expected


def test_what_else_is_needed_is_installed_by_one_command_wherever_it_is_said():
    for text in (README, help_texts()):
        text = " ".join(text.split())
        assert text.count("pip install") == text.count(INSTALL_PEERS) > 0


def test_make_runs_the_commands_that_the_readme_begins_with():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
