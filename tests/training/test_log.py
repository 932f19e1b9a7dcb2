"""The log of a run: lines that any JSON reader takes, and no line twice after a resume."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.training.log import LOG_FILE, RunLog, read_log


def test_records_are_read_back_and_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("train", 1, loss=math.nan, norm=math.inf, lr=0.5)
    log.write("sample", 1, text="é\n")
    log.close()
    lines = (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "kind": "train", "step": 1, "loss": None, "norm": None, "lr": 0.5
    }  # fmt: skip
    assert read_log(tmp_path)[1] == {"kind": "sample", "step": 1, "text": "é\n"}


def test_a_resumed_run_drops_what_it_writes_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, loss=float(step))
    log.close()
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    assert len(read_log(tmp_path)) == 3
    log = RunLog(tmp_path, 2)
    log.write("train", 3, loss=7.0)
    log.close()
    assert [record["loss"] for record in read_log(tmp_path)] == [1.0, 2.0, 7.0]
    RunLog(tmp_path, 0).close()
    assert read_log(tmp_path) == []


def test_texts_with_any_line_break_do_not_end_a_record(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    text = "a\x0b\x0c\r\x1c\x85b\u2028c\u2029d\n"
    log.write("sample", 1, text=text)
    log.write("train", 2, loss=2.0)
    log.close()
    RunLog(tmp_path, 2).close()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    assert read_log(tmp_path)[0]["text"] == text


def test_a_record_that_was_cut_off_inside_a_character_is_left_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("train", 1, loss=2.0)
    log.write("sample", 1, text="é")
    log.close()
    data = (tmp_path / LOG_FILE).read_bytes()
    (tmp_path / LOG_FILE).write_bytes(data[: data.index(b"\xc3") + 1])
    assert [record["kind"] for record in read_log(tmp_path)] == ["train"]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, tensorboard=True)
    log.write("train", 1, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensorboard_gets_the_numbers_and_texts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, tensorboard=True)
    log.write("train", 1, loss=1.5)
    log.write("sample", 1, text="def f")
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.5]
    assert events.Tags()["tensors"] == ["sample/text_summary"]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="tensorboard is not installed: install the extra 'train'"):
        RunLog(tmp_path, tensorboard=True)
