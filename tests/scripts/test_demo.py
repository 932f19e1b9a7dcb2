"""`make demo`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo import AFTER_HOLE, BEFORE_HOLE, FUNCTION, METHOD, main

STATISTICS = re.compile(
    r"\[load \d+\.\d\d s \| prefill [\d,]+\.\d tok/s \| first token \d+\.\d{3} s"
    r" \| decode [\d,]+\.\d tok/s( \| peak memory [\d,]+ MB)?\]\n"
)


def test_it_completes_and_infills_with_the_bundled_checkpoint_and_reports_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert main() == 0
    completing, others = capsys.readouterr().out.split("It fills a hole")
    infilling, limit = others.split("So small")
    assert re.match(r"The demo checkpoint: \d\.\d million parameters\n", completing)
    assert f"{METHOD}\n        return len(self.items)\n" in completing
    assert f"{BEFORE_HOLE} enumerate(names):{AFTER_HOLE}" in infilling
    assert FUNCTION in limit
    for part in (completing, infilling, limit):
        assert len(STATISTICS.findall(part)) == 1


def test_a_model_that_cannot_be_loaded_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no ")


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_gets_no_traceback() -> None:
    script = Path(__file__).parents[2] / "scripts/demo.py"
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        demo.stdout.close()
        assert demo.stderr.read() == ""
    assert demo.returncode == 141
