"""What a run records about itself: one JSON object per line in `log.jsonl`, and TensorBoard's files
if asked for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from mqa_gpt.errors import InputError

LOG_FILE = "log.jsonl"
# Held-out losses: their key in a record, and the name shown to users.
LOSSES = {"loss": "all", "left_to_right": "left to right", "infilling": "middles"}


class RunLog:
    """The log of a run, written by the first rank.

    A resumed run drops the records after its checkpoint, which it is about to write again: an
    interrupted run's log is that of an uninterrupted one, but for times.

    Args:
        folder: of the run; None writes nothing, as on ranks other than the first.
        step: steps that are done; 0 starts a new log.
        tensorboard: also write TensorBoard's files, into `folder/tensorboard`.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, step: int = 0, tensorboard: bool = False) -> None:
        self._file: TextIO | None = None
        self._board: Any = None
        if folder is None:
            return
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        path = folder / LOG_FILE
        kept = [record for record in read_log(folder) if record["step"] <= step] if step else []
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a record. Numbers that are not finite are written as null.

        Args:
            kind: "start", "train", "held_out", "sample" or "event".
            step: steps that are done.
            values: numbers, texts, or lists of them.
        """
        if self._file is not None:
            self._file.write(_line({"kind": kind, "step": step, **values}))
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
                elif kind in ("sample", "event"):
                    self._board.add_text(kind, str(value), step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that was cut off by a crash is left out."""
    records = []
    path = folder / LOG_FILE
    if path.exists():
        with path.open("rb") as lines:  # bytes end at "\n" only, str.splitlines at U+2028 too
            for line in lines:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
    return records


def _line(record: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def require_tensorboard() -> Any:
    """The class that writes TensorBoard's files.

    Raises:
        InputError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tensorboard is not installed: install the extra 'train', or leave out --tensorboard"
        ) from None
    return SummaryWriter


def _summary_writer(folder: Path, step: int) -> Any:
    return require_tensorboard()(str(folder), purge_step=step + 1 if step else None)
