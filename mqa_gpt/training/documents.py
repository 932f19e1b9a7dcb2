"""Source files, JSON Lines and Parquet as documents."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceConfig:
    """Which documents are read."""

    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pass
