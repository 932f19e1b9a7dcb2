"""What the README and the help texts tell people to type works."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.cli.app import app
from mqa_gpt.machine import INSTALL_PEERS
from tests.helpers import quartiles_away

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


# Whose decoding is in the table of speeds, by the file of `benchmarks/cpu_decode.py`.
DECODED = {
    "tiny_starcoder_py": ["mqa-gpt"],
    "tiny_starcoder_py_zen4": ["mqa-gpt", "mqa-gpt int8"],
    "starcoderbase-1b_zen4": ["mqa-gpt", "mqa-gpt int8"],
    "tiny_starcoder_py_zen5": ["mqa-gpt", "mqa-gpt int8"],
    "starcoderbase-1b_zen5": ["mqa-gpt", "mqa-gpt int8"],
    "tiny_starcoder_py_avx512": ["mqa-gpt", "mqa-gpt int8"],
    "starcoderbase-1b_avx512": ["mqa-gpt", "mqa-gpt int8"],
}


def figures_of(shape: str) -> Any:
    file = ROOT / f"benchmarks/results/cpu_decode_{shape}.json"
    return json.loads(file.read_text())["figures"]


def test_the_speeds_are_those_of_the_benchmark_results():
    expected = []
    for shape, names in DECODED.items():
        figures = figures_of(shape)
        one, eight = figures["batch 1"], figures["batch 8"]
        for name in names:
            ratios = [one[name]["decode_ratio"], eight[name]["decode_ratio"]]
            ratios.append(one[name]["prefill_ratio"])
            if name == "mqa-gpt":
                ratios.append(figures["cold start"]["ratio"])
            expected.append([f"{ratio:.2f}" for ratio in ratios])
    (table,) = re.findall(r"\| cold start \|\n.*\n((?:\|.*\n)+)", README)
    assert [re.findall(r"\d+\.\d\d", line) for line in table.splitlines()] == expected


def rounds_of(figures: Any, batch: str, name: str) -> tuple[list[float], list[float]]:
    """The seconds that prefill and decoding took in each round."""
    times = figures[batch]["times"]
    first, whole = (times[f"{name} {part}"]["seconds"] for part in ("first", "all"))
    return first, [b - a for a, b in zip(first, whole, strict=True)]


def quotients(some: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(some, others, strict=True)]


def spread_of_decoding() -> str:
    """Of the ratios in the table of speeds, but for the two that the text names."""
    numbers = []
    for shape, names in DECODED.items():
        figures = figures_of(shape)
        for name in names:
            for batch in ("batch 1", "batch 8"):
                prefill, decode = map(
                    quotients,
                    rounds_of(figures, batch, "transformers"),
                    rounds_of(figures, batch, name),
                )
                found = figures[batch][name]
                if batch == "batch 1":
                    numbers.append((found["prefill_ratio"], prefill))
                if (shape, name, batch) != ("starcoderbase-1b_avx512", "mqa-gpt int8", "batch 8"):
                    numbers.append((found["decode_ratio"], decode))
        if shape != "starcoderbase-1b_avx512":
            cold = figures["cold start"]
            starts = (cold["times"][name]["seconds"] for name in ("transformers", "mqa-gpt"))
            numbers.append((cold["ratio"], quotients(*starts)))
    return quartiles_away(numbers)


def test_the_spread_of_the_speeds_is_that_of_the_benchmark_results():
    text = " ".join(README.split())
    found = re.findall(r"The quartiles of the rounds' ratios are at most (\d+%)", text)
    assert found == [spread_of_decoding()]


def test_what_else_is_needed_is_installed_by_one_command_wherever_it_is_said():
    for text in (README, help_texts()):
        text = " ".join(text.split())
        assert text.count("pip install") == text.count(INSTALL_PEERS) > 0


def test_make_runs_the_commands_that_the_readme_begins_with():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
