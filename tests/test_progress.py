"""Progress: a line or a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

import mqa_gpt.bench.ceilings
import mqa_gpt.bench.run
import mqa_gpt.bench.timing
import mqa_gpt.progress
import mqa_gpt.verify.compare
from mqa_gpt import GPT
from mqa_gpt.progress import progress, status
from tests.helpers import tiny_config


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal; gives a function for all that it has shown at the end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))

    def read_all() -> str:
        text = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as stream:
            while piece := stream.read(1000):
                text += piece
        return text.decode()

    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield read_all


class Log(io.StringIO):
    """A stream that is no terminal, which tells when it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.written = Event()

    def flush(self) -> None:
        self.written.set()


def test_a_terminal_shows_the_current_stage_until_the_end(monkeypatch: pytest.MonkeyPatch):
    with terminal(monkeypatch) as shown, status() as say:
        say("loading")
        say("at it")
    assert shown().split("\r")[-4:] == ["loading", "at it  ", "     ", ""]


def test_a_terminal_shows_a_bar_until_the_end(monkeypatch: pytest.MonkeyPatch):
    with terminal(monkeypatch) as shown, progress(3, "row") as show:
        for done in range(1, 4):
            show(done, f"{done} tok/s")
    text = shown()
    assert "| 3/3 [" in text
    assert "3 tok/s" in text
    assert text.split("\r")[-2].isspace()


def test_elsewhere_what_is_quick_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with status() as say:
        say("loading")
    with progress(3, "row") as show:
        show(1, "")
    assert sys.stderr.getvalue() == ""


def test_elsewhere_what_takes_long_writes_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mqa_gpt.progress, "PERIOD", 0.01)
    monkeypatch.setattr(sys, "stderr", log := Log())
    with status() as say:
        say("loading")
        assert log.written.wait(60)
        say("computing")
        while "computing" not in log.getvalue():
            log.written.clear()
            assert log.written.wait(60)
    assert dict.fromkeys(log.getvalue().split()).keys() == {"loading", "computing"}

    monkeypatch.setattr(sys, "stderr", log := Log())
    with progress(1000, "row") as show:
        show(12, "3 tok/s")
        assert log.written.wait(60)
    assert log.getvalue().startswith("12 of 1,000 rows, 3 tok/s\n")

    clock = iter([0.0, 0.0, 60.0])
    monkeypatch.setattr(mqa_gpt.progress, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", log := Log())
    with progress(1000, "row") as show:
        show(10, "3 tok/s")
        show(20, "4 tok/s")  # 10 rows in a minute
        assert log.written.wait(60)
    assert log.getvalue().startswith("20 of 1,000 rows, 4 tok/s, 1 h 38 min left\n")


def test_lines_come_less_often_as_time_passes(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []

    class Clock:
        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            return len(waited) > 40

        def set(self) -> None: ...

    monkeypatch.setattr(mqa_gpt.progress, "Event", Clock)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with status() as say:
        say("computing")
    assert waited[0] == mqa_gpt.progress.PERIOD
    assert waited == sorted(waited)
    assert waited[-1] == mqa_gpt.progress.LONGEST_PERIOD
    assert sum(waited) / len(waited) > 60


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (70, "1 min"), (3600, "1 h 0 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_given_as_people_say_them(seconds: float, text: str):
    assert mqa_gpt.progress.duration_text(seconds) == text


def test_a_closed_or_failing_stream_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", None)
    with status() as say:
        say("loading")

    class Failing(Log):
        def write(self, text: str) -> int:
            self.written.set()
            raise BrokenPipeError

    monkeypatch.setattr(mqa_gpt.progress, "PERIOD", 0.01)
    monkeypatch.setattr(sys, "stderr", log := Failing())
    with status() as say:
        say("loading")
        assert log.written.wait(60)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_commands_that_take_long_name_their_stages(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    GPT(tiny_config()).save_pretrained(tmp_path)
    said: list[str] = []

    @contextmanager
    def listening() -> Iterator[Callable[[str], None]]:
        yield said.append

    module = mqa_gpt.verify.compare if command == "verify" else mqa_gpt.bench.run
    for each in (module, mqa_gpt.bench.timing):
        monkeypatch.setattr(each, "status", listening)
    if command == "verify":
        mqa_gpt.verify.compare.verify(tmp_path, dtype="bfloat16", max_new_tokens=2)
        assert said == [
            "loading",
            "computing",
            "loading in transformers",
            "computing in transformers",
            "computing in transformers in float32",
        ]
    else:
        monkeypatch.setattr(mqa_gpt.bench.ceilings, "PROBE_BYTES", 1000)
        monkeypatch.setattr(mqa_gpt.bench.ceilings, "CPU_PROBE_SIZE", 8)
        mqa_gpt.bench.run.benchmark(
            model=tmp_path, prompt_lengths=[2], new_lengths=[2], repeats=1, compare=["transformers"]
        )
        workloads = ["1 x 2+1 tokens", "1 x 1+2 tokens", "1 x 2+2 tokens"]
        assert said[:10] == [
            "loading",
            "writing a checkpoint for the other programs",
            *(f"warming up: mqa-gpt {workload}" for workload in workloads),
            "loading transformers",
            *(f"warming up: transformers {workload}" for workload in workloads),
            "warming up the measurement of the ceilings",
        ]
        assert said[10] == "measuring: round 1 of 1, mqa-gpt 1 x 2+1 tokens"
        assert len(said[10:]) == 2 * 3 + 3
