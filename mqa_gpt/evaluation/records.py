"""The folder of one evaluation: what was asked, what there is so far, and the result.

    settings.json     everything that decides the result, and the runs that worked on it
    NAME.jsonl        a record per line, in the order of the work
    report.json       settings, runs and result in one file, once all is done

A run that was killed is continued by the same call: whole records are kept, a half-written one is
replaced. Other settings are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from mqa_gpt.checkpoints.files import read_json
from mqa_gpt.checkpoints.inspect import hash_files, inspect_checkpoint
from mqa_gpt.errors import InputError, shown
from mqa_gpt.machine import command_line, describe

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs in one folder apart
    fcntl = None  # type: ignore[assignment]

SETTINGS, REPORT = "settings.json", "report.json"
CHECKPOINT_FILES = ("config.json", "tokenizer.json")  # besides the weights


class Records:
    """The records of an evaluation, in a folder or only in memory.

    Attributes:
        found: those that there are.
        report: settings, runs and, at the end, results.
    """

    def __init__(
        self,
        folder: Path | None = None,
        report: Mapping[str, Any] | None = None,
        file: BinaryIO | None = None,
    ) -> None:
        self.folder, self.report, self._file = folder, dict(report or {}), file
        self.found: list[dict[str, Any]] = []

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records; together, so that a run which is killed leaves all or none of them."""
        self.found += map(dict, records)
        if self._file is not None:
            with _errors(self.folder):
                self._file.write(b"".join(json.dumps(one).encode() + b"\n" for one in records))
                self._file.flush()

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The report with the results, which the folder now holds."""
        self.report |= {"results": results}
        if self.folder is not None:
            with _errors(self.folder):
                _write(self.folder / REPORT, self.report)
        return self.report


@contextmanager
def open_records(
    folder: str | PathLike[str] | None, name: str, settings: Mapping[str, Any], group: int = 1
) -> Iterator[Records]:
    """The records of an evaluation, to be continued or begun.

    Args:
        folder: made if it is missing; None keeps everything in memory.
        name: of the file of records.
        settings: everything that decides the result, ready for JSON.
        group: records that belong together; what is left of an unfinished group is dropped.

    Raises:
        InputError: the folder cannot be used, another run works in it, or it holds an evaluation
            with other settings.
    """
    settings = dict(json.loads(json.dumps(settings)))  # as they are read again
    runs = [provenance()]
    if folder is None:
        yield Records(None, {"settings": settings, "runs": runs})
        return
    place = Path(folder)
    path = place / f"{name}.jsonl"
    with _errors(place):
        _earlier_runs(path, settings)  # refused before anything is made
        place.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    with file:
        if not _lock(file):
            raise InputError(f"another run is writing to {place}: wait until it ends")
        runs = [*_earlier_runs(path, settings), *runs]
        records = Records(place, {"settings": settings, "runs": runs}, file)
        with _errors(place):
            records.found = _read(file, path, group)
            _write(place / SETTINGS, records.report)
        try:
            yield records
        finally:
            if not records.found and "results" not in records.report:  # nothing to continue
                with suppress(OSError):
                    (place / SETTINGS).unlink()
                    path.unlink()


@contextmanager
def _errors(folder: Path | None) -> Iterator[None]:
    """An InputError for what the file system refuses, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


def provenance() -> dict[str, Any]:
    """Where a result comes from: the command, the time, versions and the machine."""
    machine = describe()
    return {
        "command": command_line(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "versions": machine["versions"],
        "machine": {key: machine[key] for key in ("system", "cpu", "gpus")},
    }


def checkpoint_digest(folder: str | PathLike[str]) -> str:
    """SHA-256 of a checkpoint: of the digests of its weight files, config and tokenizer."""
    digests = {file.file: file.sha256 for file in hash_files(inspect_checkpoint(folder))}
    digests |= {name: file_digest(Path(folder) / name) for name in CHECKPOINT_FILES}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {shown(str(path))}: {error.strerror}") from error


def _earlier_runs(path: Path, settings: Mapping[str, Any]) -> list[Any]:
    """The runs that worked in a folder; InputError if what it holds is not to be continued.

    Args:
        path: of the file of records.
    """
    place = path.parent
    if (place / SETTINGS).exists():
        earlier = read_json(place / SETTINGS, InputError)
        _require_same(place, earlier, settings)
        return list(earlier["runs"])
    if path.exists() and path.stat().st_size:
        raise InputError(f"{place} holds {path.name} of something else: name another folder")
    return []


def _require_same(folder: Path, earlier: Any, settings: Mapping[str, Any]) -> None:
    """Raise InputError, naming what differs, unless a folder was begun with these settings."""
    if not isinstance(earlier, dict) or not isinstance(earlier.get("settings"), dict):
        raise InputError(f"{folder / SETTINGS} is not of an evaluation: name another folder")
    before = earlier["settings"]
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        differing = ", ".join(
            f"{name} ({shown(before.get(name))} there, {shown(settings.get(name))} here)"
            for name in names
        )
        raise InputError(
            f"{folder} holds an evaluation with other settings: {differing}; name another folder, "
            "or repeat the command that began it"
        )


def _read(file: BinaryIO, place: Path, group: int) -> list[dict[str, Any]]:
    """The whole groups of records in a file, which is cut after the last one."""
    file.seek(0)
    *lines, _ = file.read().split(b"\n")  # what follows the last line break is half-written
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise InputError(f"line {number} of {place} is damaged: begin with another folder")
        found.append(entry)
    whole = len(found) // group * group
    file.truncate(sum(len(line) + 1 for line in lines[:whole]))
    return found[:whole]


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False if another run holds it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def _write(file: Path, value: Any) -> None:
    """Write JSON at once: a reader sees the old file or the new one."""
    temporary = file.with_name(f".{file.name}.new")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
        temporary.replace(file)
    finally:
        with suppress(OSError):
            temporary.unlink()
