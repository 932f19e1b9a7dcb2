"""benchmarks/cpu/start.py: every program starts, and what is recorded of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cpu import start
from mqa_gpt.machine import version


@pytest.mark.slow
def test_every_program_starts_and_its_time_and_memory_are_recorded(
    tiny_shape, tmp_path: Path, capsys
):
    output = tmp_path / "result.json"
    arguments = ["--shape", tiny_shape, "--repeats", "1", "--folder", str(tmp_path)]
    if version("ctranslate2") is None or version("transformers") is None:
        pytest.skip("the other programs are not installed")
    prompt = [1] * 20
    codes = {}
    programs = start.programs

    def short(folder, converted, given):
        codes.update(programs(folder, converted, prompt))  # the shape's context is short
        del codes["mqa-gpt, nothing compiled"]  # compiles for long
        return codes

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(start, "programs", short)
        assert start.main([*arguments, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    assert figures["checkpoint_bytes"] > 4 * 97 * 60
    assert figures["programs"].keys() == codes.keys() == {
        "mqa-gpt", "mqa-gpt int8", "transformers", "ctranslate2 float32", "ctranslate2 int8",
    }  # fmt: skip
    shown = capsys.readouterr().out
    for name, found in figures["programs"].items():
        assert found["seconds"] > 0.01  # CTranslate2 needs less than 0.1 on an idle machine
        assert (found["peak_bytes"] or 0) > 1e7 or sys.platform != "linux"
        assert f"{found['seconds']:.2f}" in shown
        assert name in shown
    assert list(tmp_path.iterdir()) == [output]


def test_nothing_compiled_means_an_empty_cache_folder_and_the_others_keep_theirs(monkeypatch):
    seen = []

    def run(code, environment):
        folder = environment.get("XDG_CACHE_HOME")
        seen.append((code, folder is not None and not list(Path(folder).iterdir())))
        return 10 * len(seen)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(start, "run", run)
    found = start.measure({"mqa-gpt": "a", "mqa-gpt, nothing compiled": "b"}, 2)
    assert seen == [("a", False), ("b", True)] * 3  # the first to warm up
    assert [program["peak_bytes"] for program in found.values()] == [50, 60]
