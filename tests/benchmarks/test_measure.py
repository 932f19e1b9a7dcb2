"""What the benchmarks share: options that make no sense, where results go, and what is written."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import measure
from mqa_gpt.errors import InputError

SCRIPTS = [
    *("cpu.products", "cpu.speculation", "cpu.start"),
    *("mqa_vs_mha", "step_profile", "gpu.attention"),
]
FILE = str(measure.ROOT / "benchmarks/cpu/start.py")

NONSENSE = """
cpu.start --folder /nonexistent
cpu.start --repeats 0
cpu.start --shape nonsense
cpu.products --sizes foo
cpu.products --sizes 0x64
cpu.products --sizes 64x-4
cpu.products --sizes 268435456x268435456
cpu.products --sizes 99999999999999999999x64
cpu.products --rows 0
cpu.products --rows 268435456
cpu.products --megabytes -5
cpu.products --repeats 0
mqa_vs_mha --batch 0
mqa_vs_mha --context 0
mqa_vs_mha --context 8193
mqa_vs_mha --device nonsense
mqa_vs_mha --dtype nonsense
mqa_vs_mha --memory-gb nan
mqa_vs_mha --memory-gb -1
mqa_vs_mha --repeats 1
mqa_vs_mha --shape nonsense
cpu.speculation --agreement nan
cpu.speculation --agreement 1.5
cpu.speculation --modules 0
cpu.speculation --modules 99
cpu.speculation --new 1
cpu.speculation --new 900
cpu.speculation --prompt 8192
cpu.speculation --repeats 0
step_profile --batch 0
step_profile --batch 99999999
step_profile --context 0
step_profile --context 8193
step_profile --device nonsense
step_profile --dtype nonsense
step_profile --quantize nonsense
step_profile --repeats 1
step_profile --shape nonsense
gpu.attention --only nonsense
gpu.attention --repeats 0
"""


def benchmark(name: str) -> ModuleType:
    if name.startswith("gpu."):
        pytest.importorskip("triton", reason="Triton is not available on this platform")
    return import_module(f"benchmarks.{name}")


def status(main: Callable[[list[str]], int], arguments: list[str]) -> int | str | None:
    """What a script ends with, however it does."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.fixture(autouse=True)
def _nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "OUT", tmp_path / "out")


@pytest.mark.parametrize("command", NONSENSE.strip().splitlines())
def test_nonsense_is_one_sentence_and_status_2_and_no_result(command, tmp_path, capsys):
    name, *arguments = command.split()
    assert status(benchmark(name).main, arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: " in shown.err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", SCRIPTS[:-1])
@pytest.mark.parametrize("obstacle", ["a folder", "below a file", "not JSON"])
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(
    name, obstacle, tmp_path, capsys
):
    output = tmp_path / {"not JSON": "result.png"}.get(obstacle, "result.json")
    if obstacle == "a folder":
        output.mkdir()
    elif obstacle == "below a file":
        output.touch()
        output /= "result.json"
    before = sorted(tmp_path.rglob("*"))
    assert status(benchmark(name).main, ["--output", str(output)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert str(output) in shown.err
    assert len(shown.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_by_default_results_go_where_git_does_not_look(monkeypatch, tmp_path):
    assert measure.result_path(None, "x.json") == tmp_path / "out" / "x.json"
    monkeypatch.undo()
    out = measure.OUT.relative_to(measure.ROOT)
    assert f"{out}/" in (measure.ROOT / ".gitignore").read_text().splitlines()


def test_a_result_named_by_output_goes_there_and_its_folder_is_made(tmp_path):
    output = tmp_path / "a" / "b.json"
    assert measure.result_path(output, "x.json") == output
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_an_old_result_survives_one_that_breaks_off(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("old")

    def write_half(self, text):
        self.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        measure.write_result(path, FILE, "question", argparse.Namespace(), {"a": 1})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_was_measured_there_is_no_success(capsys):
    assert measure.nothing_measured() == 1
    assert "no result is written" in capsys.readouterr().err


def test_a_device_name_is_a_part_of_a_files_name_whatever_the_gpu_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10/24 (PCIe)")
    assert measure.device_name(torch.device("cuda")) == "NVIDIA_A10_24_PCIe_"
    assert measure.device_name(torch.device("cpu")) == "cpu"


def test_a_result_says_what_was_asked_and_what_came_out(tmp_path):
    path = tmp_path / "x.json"
    options = argparse.Namespace(repeats=3, output=path)
    assert measure.write_result(path, FILE, "question\n\nmore", options, {"a": 1}) == 0
    written = json.loads(path.read_text())
    assert written["question"] == "question"
    assert written["command"] == "python -m benchmarks.cpu.start --repeats 3"
    assert written["settings"] == {"repeats": 3}
    assert written["figures"] == {"a": 1}


def test_products_that_all_fail_are_no_success(tmp_path, monkeypatch, capsys):
    module = benchmark("cpu.products")

    def absent(weight, copies):
        raise RuntimeError("not in this PyTorch")

    monkeypatch.setattr(module, "PRODUCTS", {"absent": module.Product(4, absent)})
    assert module.main(["--sizes", "32x16", "--rows", "1", "--repeats", "1"]) == 1
    assert "32 x 16, absent: not in this PyTorch" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_errors_that_no_input_causes_keep_their_traceback(capsys):
    def fails(error):
        @measure.refuse_bad_input
        def main(arguments):
            raise error

        return main

    assert fails(InputError("too much"))([]) == 2
    assert fails(OSError("disk full"))([]) == 2
    assert capsys.readouterr().err == "error: too much\nerror: disk full\n"
    with pytest.raises(ValueError, match="a mistake of ours"):
        fails(ValueError("a mistake of ours"))([])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_says_what_every_option_is_and_its_default(name, monkeypatch, capsys):
    module = benchmark(name)
    parsers = []

    def parse(parser, arguments):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit):
        module.main([])
    (parser,) = parsers
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.option_strings
        if isinstance(action.default, int | float | str) and action.default not in (
            False,
            argparse.SUPPRESS,
        ):
            assert f"(default: {action.default})" in shown
    assert "(default: None)" not in shown
    file = name.replace("cpu.", "cpu_").replace("gpu.", "")
    file = "speculation_cpu" if name == "cpu.speculation" else file
    assert f"(default: benchmarks/out/{file}" in shown


def test_a_number_has_to_be_of_its_kind_and_within_its_range():
    assert measure.within(2, 5)("5") == 5
    assert measure.within(0.0, 1.0)("0.25") == 0.25
    for low, high, text in (
        (2, 5, "1"),
        (2, 5, "6"),
        (2, 5, "2.5"),
        (2, 5, ""),
        (0.0, 1.0, "nan"),
        (0.0, 1.0, "inf"),
        (0.0, 1.0, "half"),
        (1, 5, "9" * 5000),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"number from {low} to {high}$"):
            measure.within(low, high)(text)


def test_a_ratio_is_none_where_noise_has_made_it_meaningless():
    assert measure.ratio(3.0, 2.0) == 1.5
    assert measure.ratio(3.0, 0.0) is measure.ratio(3.0, -1.0) is measure.ratio(-1.0, 2.0) is None


def test_the_warm_up_is_not_counted():
    calls = []
    times = measure.interleaved({"a": lambda: calls.append(0)}, 3, "label")
    assert len(calls) == 4
    assert len(times["a"]["seconds"]) == 3


def test_more_memory_than_there_is_is_refused(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(measure, "available_memory", lambda device: 1_000_000_000)
    measure.require_memory(1_000_000_000, cpu)
    with pytest.raises(InputError, match=r"about 1\.5 GB, but 1\.0 GB are available on cpu"):
        measure.require_memory(1_500_000_000, cpu)
    monkeypatch.setattr(measure, "available_memory", lambda device: None)
    measure.require_memory(math.inf, cpu)
