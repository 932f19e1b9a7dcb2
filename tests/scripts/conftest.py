"""Fixtures of the tests of scripts."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def undone_poisoning() -> Iterator[None]:
    """The GPU scripts fill new memory with NaN from their first check on."""
    yield
    torch.use_deterministic_algorithms(False)
