"""The folder of an evaluation: continued after a kill, refused with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import InputError
from mqa_gpt.evaluation.records import checkpoint_digest, open_records

SETTINGS = {"kind": "test", "modes": ("psm", "spm"), "n": 2}


def test_a_folder_holds_settings_records_and_in_the_end_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "new/results"
    with open_records(folder, "samples", SETTINGS) as records:
        assert records.found == []
        records.write([{"a": 1}, {"a": 2}])
        report = records.finish({"sum": 3})
    assert records.found == [{"a": 1}, {"a": 2}]
    assert sorted(p.name for p in folder.iterdir()) == [
        "report.json", "samples.jsonl", "settings.json"
    ]  # fmt: skip
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["results"] == {"sum": 3}
    assert report["settings"] == {"kind": "test", "modes": ["psm", "spm"], "n": 2}
    (run,) = report["runs"]
    assert run["command"]
    assert run["date"]
    assert run["versions"]["torch"]
    assert run["machine"]["cpu"]


def test_whole_groups_are_continued_and_what_is_half_written_is_dropped(tmp_path: Path) -> None:
    with open_records(tmp_path, "samples", SETTINGS, group=2) as records:
        records.write([{"a": 1}, {"a": 2}])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"a": 3}\n{"a"')
    with open_records(tmp_path, "samples", SETTINGS, group=2) as records:
        assert records.found == [{"a": 1}, {"a": 2}]
        records.write([{"a": 4}, {"a": 5}])
        assert len(records.finish({})["runs"]) == 2
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["a"] for line in lines] == [1, 2, 4, 5]


def test_other_settings_are_refused_by_the_names_that_differ(tmp_path: Path) -> None:
    with open_records(tmp_path, "samples", SETTINGS) as records:
        records.write([{"a": 1}])
    other = {"kind": "test", "modes": ["psm"], "seed": 1}
    with pytest.raises(InputError) as caught, open_records(tmp_path, "samples", other):
        pass
    message = str(caught.value)
    assert "modes (['psm', 'spm'] there, ['psm'] here)" in message
    assert "n (2 there, None here)" in message
    assert "seed (None there, 1 here)" in message
    assert "kind" not in message


def test_a_refused_run_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    with open_records(tmp_path, "samples", SETTINGS) as records:
        records.write([{"a": 1}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="other settings"), open_records(tmp_path, "results", {}):
        pass
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_ends_before_its_first_record_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad task"), open_records(tmp_path, "samples", SETTINGS):
        raise InputError("bad task")
    assert list(tmp_path.iterdir()) == []
    with open_records(tmp_path, "samples", {}) as records:  # what was mended is not refused
        records.finish({})


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot write to"),
        open_records(tmp_path / "file", "samples", SETTINGS),
    ):
        pass
    with open_records(tmp_path / "a", "samples", SETTINGS) as records:
        records.write([{"a": 1}])
    with (
        open_records(tmp_path / "a", "samples", SETTINGS),
        pytest.raises(InputError, match="another run is writing"),
        open_records(tmp_path / "a", "samples", SETTINGS),
    ):
        pass
    (tmp_path / "a/samples.jsonl").write_text('not JSON\n{"a": 1}\n')
    with (
        pytest.raises(InputError, match=r"line 1 of .* is damaged"),
        open_records(tmp_path / "a", "samples", SETTINGS),
    ):
        pass
    (tmp_path / "a/settings.json").unlink()
    with (
        pytest.raises(InputError, match="of something else"),
        open_records(tmp_path / "a", "samples", SETTINGS),
    ):
        pass
    assert (tmp_path / "a/samples.jsonl").read_text() == 'not JSON\n{"a": 1}\n'


def test_a_digest_is_of_everything_that_a_checkpoint_computes_with(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((DEMO_DIR / name).read_bytes())
    digest = checkpoint_digest(DEMO_DIR)
    assert checkpoint_digest(folder) == digest
    assert len(digest) == 64
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(
            data.replace(b"}", b"} ", 1) if "json" in name else data[:-1] + b"x"
        )
        assert checkpoint_digest(folder) != digest, name
        (folder / name).write_bytes(data)
