"""The `batch` command: prompts from one file of JSON Lines, their completions into another.

A result is written as soon as it and all before it are finished. So the output lines up with the
input, and a run that was killed and begun anew leaves the same file as one that was not. Writing
each result at once would save little: a row lasts for at most `max_new_tokens` steps, and so does
the wait for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.checks import is_int, shown
from mqa_gpt.cli_input import name_of, read_text
from mqa_gpt.cli_output import note, print_json
from mqa_gpt.environment import peak_memory
from mqa_gpt.errors import InputError
from mqa_gpt.llm import LLM, Completion, Generation

MAX_INPUT_BYTES = 100_000_000  # prompts are all held in memory, as text and as tokens

RESULT_BEGINS = b'{"id": '


class Item(NamedTuple):
    """One line of the input: its number, its id, and a text or a (prefix, suffix) to infill."""

    line: int
    id: int | str
    prompt: str | tuple[str, str]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"line {self.line} (id {shown(self.id)})"


class Results(NamedTuple):
    """An output as it was found: its path, the ids it holds, and the size of its whole lines."""

    path: Path
    ids: frozenset[int | str]
    size: int


def read_items(path: str) -> list[Item]:
    """What there is to complete; "-" is standard input. Empty lines do not count.

    Raises:
        InputError: a file or line that cannot be used, or an id that comes twice.
    """
    items: dict[int | str, Item] = {}
    for number, line in enumerate(read_text(path, MAX_INPUT_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name_of(path)}"
        entry = _parse(line, where)
        id_, keys = entry["id"], {"prompt", "prefix", "suffix"} & entry.keys()
        if id_ in items:
            raise InputError(f"{where} has the id {shown(id_)} of line {items[id_].line}")
        if keys == {"prompt"}:
            prompt = entry["prompt"]
        elif keys == {"prefix", "suffix"}:
            prompt = entry["prefix"], entry["suffix"]
        else:
            raise InputError(
                f"{where} holds {' and '.join(sorted(keys)) or 'nothing to complete'}: it must "
                "hold a prompt, or a prefix and a suffix"
            )
        items[id_] = Item(number, id_, prompt)
    return list(items.values())


def read_results(path: str, items: Sequence[Item]) -> Results:
    """What an earlier run has left in the output; a half-written line at its end does not count.

    Raises:
        InputError: the file holds something else than results of these items, each once.
    """
    name = f"the output {shown(path)}"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{name} is not a file")
        if not Path(path).parent.is_dir():
            raise InputError(f"{name} is in a folder that does not exist: make it first")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except InputError:
        raise
    except ValueError as error:  # a lone surrogate or a NUL, which no file's name holds
        raise InputError(f"cannot read {name}: {error}") from error

    *lines, torn = data.split(b"\n")
    # Never cut off what another program wrote.
    if not torn.startswith(RESULT_BEGINS) and not RESULT_BEGINS.startswith(torn):
        lines.append(torn)
    known = {item.id for item in items}
    found: dict[int | str, int] = {}
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {name}"
        entry = _parse(line.decode(errors="replace"), where)
        id_ = entry["id"]
        if "completions" not in entry:
            raise InputError(f"{where} is not a result of this command: name another file")
        if id_ in found:
            raise InputError(f"{where} has the id {shown(id_)} of line {found[id_]}")
        if id_ not in known:
            raise InputError(
                f"{where} has the id {shown(id_)}, which the input does not have: give each input "
                "an output of its own"
            )
        found[id_] = number
    return Results(Path(path), frozenset(found), len(data) - len(torn))


def run_batch(
    llm: LLM,
    generation: Generation,
    items: Sequence[Item],
    results: Results,
    model: str | None,
    load_seconds: float,
    as_json: bool,
) -> None:
    """Run a generation, add each item's result to the output, and sum up.

    Args:
        items: what the generation's prompts are.
        results: what the output holds already.
    """
    stats, written, interrupted = generation.stats, 0, False
    try:
        with results.path.open("ab") as file, _progress_bar(stats.rows) as bar:
            file.truncate(results.size)

            def write_what_is_finished() -> None:
                nonlocal written
                for completions in generation.take():
                    file.write(_line(items[written], completions))
                    file.flush()
                    written += 1

            for _ in generation:
                write_what_is_finished()
                bar.set_postfix_str(f"{stats.rate:,.1f} tok/s", refresh=False)
                bar.update(stats.finished_rows - bar.n)
            write_what_is_finished()
            bar.update(stats.finished_rows - bar.n)
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        raise InputError(f"cannot write {results.path}: {error.strerror}") from error

    before, total = len(results.ids), len(results.ids) + len(items)
    if as_json:
        counts = {"prompts": total, "found": before, "written": written}
        numbers = {"load_seconds": load_seconds} | dataclasses.asdict(stats)
        numbers |= {
            "tokens_per_second": stats.rate,
            "peak_memory_bytes": peak_memory(llm.model.device),
        }
        report = {"model": model or "demo", "output": str(results.path)} | counts
        print_json(report | {"interrupted": interrupted, "stats": numbers})
    else:
        note(
            f"{before + written:,} of {total:,} results in {results.path}: {before:,} were there, "
            f"{written:,} are new; {stats.new_tokens:,} tokens at {stats.rate:,.1f} tok/s"
        )
    if interrupted:
        note("the same command goes on from there")
        raise KeyboardInterrupt


def _parse(line: str, where: str) -> dict[str, Any]:
    """A line's JSON object, which has an id."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {shown(entry)}: it must be a JSON object")
    if not is_int(entry.get("id")) and not isinstance(entry.get("id"), str):
        raise InputError(
            f"{where} has the id {shown(entry['id'])}: it must be a text or a whole number"
            if "id" in entry
            else f"{where} has no id: give each prompt one of its own"
        )
    return entry


def _line(item: Item, completions: list[Completion]) -> bytes:
    """A result; in ASCII, where nothing within can be taken for the end of a line."""
    texts = [
        {"text": c.text, "finish_reason": c.finish_reason, "new_tokens": len(c.token_ids)}
        for c in completions
    ]
    result = {
        "id": item.id,
        "prompt_tokens": completions[0].prompt_tokens,
        "completions": texts,
    }
    return json.dumps(result).encode() + b"\n"


def _progress_bar(rows: int) -> Any:
    """On a terminal only; every finished row counts, written or not."""
    return tqdm(total=rows, unit="completion", miniters=0, dynamic_ncols=True, disable=None)
