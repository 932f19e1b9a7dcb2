"""The tests of compiled kernels need Triton's compiler; those of the other folders its interpreter.

Triton decides between them when it is imported. So these tests run in a process of their own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def compiling() -> Iterator[Callable[..., Any]]:
    """compiling(function, *arguments, **options): call it where Triton compiles."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"  # inherited by the process, which starts when it is needed
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=one_thread) as pool:

        def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            return pool.submit(function, *arguments, **options).result()

        call(os.getpid)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield call


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
