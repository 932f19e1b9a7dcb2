"""Fixtures of the benchmarks: a preset that is measured in no time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mqa_gpt import config
from mqa_gpt.bench import ceilings

TINY = (2, 3, 60, 97, 112, "gelu", 0)  # layers, heads, width, vocabulary, context


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a tiny preset; the ceilings' probes are small, the number of threads restored."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    monkeypatch.setattr(ceilings, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)
    yield "tiny"
    torch.set_num_threads(threads)
