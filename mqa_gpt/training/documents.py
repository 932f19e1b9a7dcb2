"""Documents: source files, JSON Lines and Parquet, read one after another and filtered.

    folders        every file is a document, named by its path in the folder; files of the two
                   kinds below are read as such
    .jsonl         one JSON object a line; .jsonl.gz too
    .parquet       a row each, as in The Stack (Kocetkov et al. 2022); needs pyarrow

The text is in the column or key `content` (or `text`), the language in `lang`, and so on: see
`KEYS`. For fine-tuning, a line may hold `prompt` and `completion` instead.

What cannot be read or is filtered out is counted in a `Report`, with names, and is not an error.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mqa_gpt.errors import ConfigError, InputError, require_int, require_number
from mqa_gpt.training.shards import is_prepared

STANDARD_LIBRARY = "python-standard-library"  # a source that every machine with Python has

# What a record's parts are called, in The Stack, its derivatives and elsewhere; first come first.
KEYS = {
    "text": ("content", "text"),
    "name": ("max_stars_repo_path", "path", "file_path", "name"),
    "language": ("lang", "language"),
    "licenses": ("max_stars_repo_licenses", "licenses", "license", "detected_licenses"),
    "prompt": ("prompt",),
    "completion": ("completion",),
}

NEEDS_PYARROW = "{} needs pyarrow: pip install 'mqa-gpt[train]', or convert it to JSON Lines"
NAMES = 100  # that a report gives for each reason
TOO_LARGE, NOT_UTF8 = "larger than data.max_bytes", "not UTF-8"


@dataclass(frozen=True)
class SourceConfig:
    """Which documents are read: part of the section `[data]`.

    In patterns `*` stands for any characters, "/" too. A pattern is compared with a document's name
    and with "/" before it: `*/test/*` is everything in folders named "test".

    Attributes:
        sources: folders, .jsonl, .jsonl.gz and .parquet files, "python-standard-library", or one
            folder of documents that are tokenized already.
        include: patterns of names, one of which must fit; by default every name does.
        exclude: patterns none of which may fit; by default hidden files and folders, and
            compiled Python.
        languages: those of records to keep, such as "Python"; empty keeps all. Documents that state
            none are left out then.
        licenses: likewise, such as "MIT". A document of several must have only these.
        max_bytes: larger documents are left out.
        duplicates: keep documents whose text has been read already.
        held_out: patterns of names that are kept from training, for measuring.
        held_out_share: share of the other documents that is held out too, chosen by their names.
        held_out_overlap: a training document with more than this share of its lines (of 20
            characters or more) in held-out documents repeats them and is left out; 1 keeps all.
    """

    sources: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("*/.*", "*/__pycache__/*")
    languages: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    max_bytes: int = 1_000_000
    duplicates: bool = False
    held_out: tuple[str, ...] = ()
    held_out_share: float = 0.0
    held_out_overlap: float = 0.25

    def __post_init__(self) -> None:
        require_int(ConfigError, "data.max_bytes", self.max_bytes, 1)
        for key in ("held_out_share", "held_out_overlap"):
            require_number(
                ConfigError, f"data.{key}", getattr(self, key), "from 0 to 1", lambda x: 0 <= x <= 1
            )


@dataclass(frozen=True)
class Document:
    """One text to learn.

    Attributes:
        name: such as its path.
        text: what is to be learned.
        prompt: what comes before `text` and is not to be learned.
    """

    name: str
    text: str
    prompt: str = ""


@dataclass
class Report:
    """What is trained on and what was left out.

    Attributes:
        documents, characters: that are trained on.
        left_out: how many documents for each reason.
        names: the first ones of them.
    """

    documents: int = 0
    characters: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        """Count one more."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES:
            names.append(name)

    def lines(self) -> list[str]:
        """The report as text: what is trained on, then one line for each reason."""
        lines = [f"{self.documents:,} documents, {self.characters / 1e6:,.1f} million characters"]
        for reason, count in self.left_out.items():
            first = ", ".join(self.names[reason][:3])
            lines.append(f"{count:,} left out, {reason}: {first}{' ...' * (count > 3)}")
        return lines


def read_documents(config: SourceConfig, report: Report) -> Iterator[Document]:
    """Every document of the sources that passes the filters, held out or not, in a fixed order.

    Line breaks become "\\n", and a byte order mark at the beginning is dropped.

    Args:
        report: counts what is left out.

    Raises:
        InputError: a source does not exist or is of no known kind, or pyarrow is missing.
    """
    for source in config.sources:
        for name, values in _records(source, config, report):
            document = _accept(name, values, config, report)
            if document is not None:
                yield document


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns (see `SourceConfig`)."""
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"/{name}", pattern)
        for pattern in patterns
    )


def require_sources(config: SourceConfig, *, has_tokenizer: bool) -> None:
    """Check that the sources are there and of a kind that can be read, without reading them.

    Args:
        has_tokenizer: whether the run names a tokenizer, as tokenized documents need.

    Raises:
        ConfigError: there is none, one does not exist, is tokenized already and must not be, or
            needs a package that is missing; begins with "data.sources".
    """
    if not config.sources:
        raise ConfigError("data.sources is empty: name folders, .jsonl or .parquet files")
    for source in config.sources:
        root = _root(source)
        if is_prepared(root) and (len(config.sources) > 1 or not has_tokenizer):
            raise _tokenized(root)
        if find_spec("pyarrow") is None:
            files = root.rglob("*.parquet") if root.is_dir() else [root]
            table = next((file for file in files if file.suffix == ".parquet"), None)
            if table is not None:
                raise ConfigError(f"data.sources: {NEEDS_PYARROW.format(table)}")


def _root(source: str) -> Path:
    """The folder or file of a source; ConfigError if it does not exist."""
    if source == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    root = Path(source).expanduser()
    if not root.exists():
        raise ConfigError(
            f"data.sources: {root.absolute()} does not exist: name folders, .jsonl or .parquet "
            "files"
        )
    return root


def _tokenized(root: Path) -> ConfigError:
    return ConfigError(
        f"data.sources: {root} holds tokenized documents: make it the only one, and name its "
        "tokenizer in tokenizer.source"
    )


Record = tuple[str, Mapping[str, Any]]  # the name of its place, and its keys with values


def _records(source: str, config: SourceConfig, report: Report) -> Iterator[Record]:
    """What a source holds, as records with the keys of `KEYS`."""
    root = _root(source)
    if root.is_file():
        yield from _records_of_file(root, root.name, config, report)
        return
    if is_prepared(root):
        raise _tokenized(root)

    def skip(error: OSError) -> None:
        report.leave_out(str(error.filename), f"cannot be read ({error.strerror})")

    for folder, folders, files in os.walk(root, onerror=skip):
        folders.sort()
        if source == STANDARD_LIBRARY:  # what is installed is not part of it
            folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages")]
        for file in sorted(files):
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            yield from _records_of_file(path, name, config, report)


def _records_of_file(
    path: Path, name: str, config: SourceConfig, report: Report
) -> Iterator[Record]:
    """The records of one file, or itself if it is text; `name` is its path in the source."""
    is_table = name.endswith((".jsonl", ".jsonl.gz", ".parquet"))
    if fits(name, config.exclude) or not (is_table or fits(name, config.include)):
        report.leave_out(name, "by name")
    elif not path.is_file():
        report.leave_out(name, "not a file")  # a pipe would never end
    elif name.endswith(".parquet"):
        yield from _read_parquet(path, name, report)
    elif is_table:
        yield from _read_json_lines(path, name, report)
    else:
        yield from _read_text(path, name, config, report)


def _read_text(path: Path, name: str, config: SourceConfig, report: Report) -> Iterator[Record]:
    try:
        if path.stat().st_size > config.max_bytes:
            report.leave_out(name, TOO_LARGE)
        else:
            yield name, {"content": path.read_bytes().decode()}
    except UnicodeDecodeError:
        report.leave_out(name, NOT_UTF8)
    except OSError as error:
        report.leave_out(name, f"cannot be read ({error.strerror})")


def _read_json_lines(path: Path, name: str, report: Report) -> Iterator[Record]:
    opener: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                place = f"{name}:{number}"
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    report.leave_out(place, "not JSON")
                    continue
                if isinstance(values, dict):
                    yield place, values
                else:
                    report.leave_out(place, "not a JSON object")
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged gzip file
        report.leave_out(name, f"cannot be read ({error})")


def _read_parquet(path: Path, name: str, report: Report) -> Iterator[Record]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(NEEDS_PYARROW.format(path)) from error
    wanted = {key for keys in KEYS.values() for key in keys}
    try:
        with parquet.ParquetFile(path) as file:
            columns = [column for column in file.schema_arrow.names if column in wanted]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    place = f"{name}:{number}"
                    try:
                        (values,) = batch.slice(row, 1).to_pylist()
                    except UnicodeDecodeError:
                        report.leave_out(place, NOT_UTF8)
                        continue
                    yield place, values
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        report.leave_out(name, f"cannot be read ({reason})")


def _accept(
    place: str, values: Mapping[str, Any], config: SourceConfig, report: Report
) -> Document | None:
    """The document of a record, or None if it is left out."""
    found = {
        part: next((values[key] for key in keys if values.get(key) is not None), None)
        for part, keys in KEYS.items()
    }
    name = found["name"] if isinstance(found["name"], str) else place
    text, prompt = found["text"], ""
    if found["completion"] is not None:
        text, prompt = found["completion"], found["prompt"] or ""
    if not fits(name, config.include) or fits(name, config.exclude):
        reason = "by name"
    elif not _allows(config.languages, found["language"]):
        reason = "by language"
    elif not _allows(config.licenses, found["licenses"]):
        reason = "by licence"
    elif not isinstance(text, str) or not isinstance(prompt, str):
        reason = f"without text in {' or '.join(KEYS['text'])}, or in prompt and completion"
    else:
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        reason = _unusable(text, prompt, config.max_bytes)
        if not reason:
            return Document(name, text, prompt)
    report.leave_out(name, reason)
    return None


def _allows(allowed: tuple[str, ...], stated: object) -> bool:
    """Whether all that a record states is allowed; if only some things are, it must state one."""
    names = {str(x).lower() for x in (stated if isinstance(stated, list) else [stated])}
    return not allowed or (names <= {x.lower() for x in allowed} and names != set())


def _unusable(text: str, prompt: str, max_bytes: int) -> str:
    """Why a text is left out, "" if it is not."""
    try:
        size = len(text.encode()) + len(prompt.encode())
    except UnicodeEncodeError:  # half of a pair of surrogates, from JSON's escapes
        return NOT_UTF8
    if size > max_bytes:
        return TOO_LARGE
    if not text.strip():
        return "empty"
    return "binary (holds a NUL)" if "\0" in text else ""
