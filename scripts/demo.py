"""Complete a function, then fill a hole in another, with the bundled checkpoint: `make demo`."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from mqa_gpt import LLM
from mqa_gpt.checkpoints.inspect import inspect_checkpoint
from mqa_gpt.errors import InputError
from mqa_gpt.generation.completion import Generation
from mqa_gpt.machine import peak_memory

CLASS = """\
class Reader:
    def __init__(self, file):
        self._file = file

"""
# No line break at the end: a token holds it together with the indentation that follows.
SIGNATURE = CLASS + "    def read(self, size=-1):"
BEFORE_HOLE = (
    CLASS
    + """\
    def close(self):
        if self._file is not None:
            self._file."""
)
AFTER_HOLE = """
            self._file = None
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="another checkpoint: a hub name or a folder")
    model = parser.parse_args().model

    torch.set_num_threads(1)  # a model this small is done before a second thread has joined in
    begin = time.perf_counter()
    try:
        llm = LLM.load(model, dtype="float32")
        load_seconds = time.perf_counter() - begin
        parameters = inspect_checkpoint(model).config.parameters
        print(f"{model or 'The demo checkpoint'}: {parameters / 1e6:.1f} million parameters")

        print_title("It completes a function from its signature")
        # The penalty keeps a small model from saying the same thing over and over.
        body = llm.begin([SIGNATURE], 96, repetition_penalty=1.15, stop="\n\n")
        show(llm, load_seconds, SIGNATURE, body, "")

        print_title("It fills a hole, knowing what is before and after it")
        filling = llm.begin_infill(BEFORE_HOLE, AFTER_HOLE, 48, mode="spm", stop="\n")
        show(llm, load_seconds, BEFORE_HOLE, filling, AFTER_HOLE)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def print_title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}\n")


def show(llm: LLM, load_seconds: float, before: str, generation: Generation, after: str) -> None:
    """Print a generation as it is written, in bold on a terminal, and its statistics."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(before, end=bold, flush=True)
    for _, piece in generation:
        print(piece, end="", flush=True)
    print(plain + after)
    memory = peak_memory(llm.model.device)
    peak = "" if memory is None else f" | peak memory {memory / 1e6:,.0f} MB"
    print(f"[load {load_seconds:.2f} s | {generation.stats}{peak}]")


if __name__ == "__main__":
    sys.exit(main())
