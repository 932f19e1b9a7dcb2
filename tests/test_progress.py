"""The status line: rewritten on a terminal, a line now and then in a log."""

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

import pytest

import mqa_gpt.bench.ceilings
import mqa_gpt.bench.run
import mqa_gpt.verify.compare
from mqa_gpt import GPT, progress
from mqa_gpt.progress import status
from tests.helpers import tiny_config


def read_all(descriptor: int) -> str:
    """What was written to a terminal, until its other end is closed."""
    text = b""
    with contextlib.suppress(OSError), os.fdopen(descriptor, "rb", buffering=0) as terminal:
        while piece := terminal.read(1000):
            text += piece
    return text.decode()


def test_a_terminal_shows_each_stage_until_it_is_done(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with status() as say:
            say("loading")
            say("at it")
    shown = read_all(ours)
    assert shown.split("\r")[-4:] == ["loading", "at it  ", "     ", ""]


def test_a_log_gets_a_line_now_and_then_and_none_for_what_is_short(
    monkeypatch: pytest.MonkeyPatch,
):
    seconds = iter([0, 10, 29, 31, 60, 61])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with status() as say:
        for stage in ("a", "b", "c", "d", "e"):
            say(stage)
    assert sys.stderr.getvalue() == "c\ne\n"


@pytest.mark.parametrize("stream", ["none", "a closed pipe"])
def test_without_a_reader_the_work_goes_on(stream: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", None if stream == "none" else pipe)
        with status() as say:
            say("loading")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            pipe.close()


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_long_commands_name_their_stages(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    GPT(tiny_config()).save_pretrained(tmp_path)
    said: list[str] = []

    @contextmanager
    def listening() -> Iterator[Callable[[str], None]]:
        yield said.append

    module = mqa_gpt.bench.run if command == "bench" else mqa_gpt.verify.compare
    monkeypatch.setattr(module, "status", listening)
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
        assert said[:6] == [
            "loading",
            "writing a checkpoint for the other programs",
            *(f"warming up: mqa-gpt {workload}" for workload in workloads),
            "loading transformers",
        ]
        assert said[-11:-8] == [
            "warming up: transformers 1 x 2+2 tokens",
            "warming up the measurement of the ceilings",
            "measuring: round 1 of 1, mqa-gpt 1 x 2+1 tokens",
        ]
        assert said[-1] == "measuring: round 1 of 1, matmul_tflops"
