"""Commands under torchrun: the ranks share the layers of a model, and only the first one speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import typer

from mqa_gpt.cli.output import BAD_INPUT
from mqa_gpt.errors import InputError
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.model import GPT


def rank_count() -> int:
    """How many ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def sharing_layers(device: str | None) -> Iterator[tuple[str | None, Callable[[GPT], None]]]:
    """Where this rank computes, and what divides a model's layers among all ranks, in place.

    Inside the block every rank must do the same. Those other than the first print nothing, and end
    silently with the same status if it fails. One rank alone gets `device` and what does nothing.

    Args:
        device: as in `as_device`; with several ranks each takes the GPU of its local rank.

    Raises:
        InputError: from dividing a model: it is not multi-query, has 8-bit weights, or its heads
            cannot be shared equally.
    """
    ranks = rank_count()
    if ranks == 1:
        yield device, lambda model: None
        return
    from mqa_gpt.training.parallel import world
    from mqa_gpt.training.tensor_parallel import tensor_parallel

    def divide(model: GPT) -> None:
        if not model.config.multi_query or is_quantized(model):
            raise InputError(
                f"{ranks} ranks can share a multi-query model whose weights are not 8-bit "
                "integers: start one process, without torchrun"
            )
        assert here.tensor_mesh is not None
        tensor_parallel(model, here.tensor_mesh)

    with ExitStack() as stack:
        if os.environ["RANK"] != "0":
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        try:
            here = stack.enter_context(world(device, ranks))
            yield str(here.device), divide
        except (InputError, FloatingPointError):
            if os.environ["RANK"] == "0":
                raise
            raise typer.Exit(BAD_INPUT) from None
