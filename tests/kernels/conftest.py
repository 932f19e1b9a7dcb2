"""Fixtures of the tests of kernels."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """Newly allocated memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
