"""What a command is at: on a terminal, in one line that is gone at the end."""

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
from mqa_gpt import GPT
from mqa_gpt.progress import status
from tests.helpers import tiny_config


def read_all(descriptor: int) -> str:
    """What was written to a terminal whose other end is closed; it arrives by and by."""
    text = b""
    with contextlib.suppress(OSError), os.fdopen(descriptor, "rb", buffering=0) as terminal:
        while piece := terminal.read(1000):
            text += piece
    return text.decode()


def test_a_terminal_sees_what_a_command_is_at_until_it_is_done(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with status() as say:
            say("loading")
            say("at it")
    shown = read_all(ours)
    assert shown.split("\r")[-4:] == ["loading", "at it  ", "     ", ""]


def test_elsewhere_nothing_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with status() as say:
        say("loading")
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_what_takes_long_says_what_it_is_at(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    GPT(tiny_config()).save_pretrained(tmp_path)
    said: list[str] = []

    @contextmanager
    def listening() -> Iterator[Callable[[str], None]]:
        yield said.append

    monkeypatch.setattr(getattr(mqa_gpt, command), "status", listening)
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
        assert said == [
            "loading",
            "warming up",
            "loading transformers and warming it up",
            "warming up the measurement of the ceilings",
        ]
