"""Complete a method, fill a hole, show a limit, with the bundled checkpoint: `make demo`."""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

from mqa_gpt import LLM
from mqa_gpt.errors import InputError
from mqa_gpt.generation.completion import Generation
from mqa_gpt.machine import peak_memory, threads_for

# No line break at the end of a prompt: one token holds it together with the indentation after it.
METHOD = """\
class Stack:
    def __init__(self):
        self.items = []

    def __len__(self):"""
BEFORE_HOLE = """\
def find(names, name):
    for i, n in"""
AFTER_HOLE = """
        if n == name:
            return i
    return -1
"""
FUNCTION = "def is_even(n):"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="another checkpoint: a hub name or a folder")
    model = parser.parse_args().model

    begin = time.perf_counter()
    try:
        llm = LLM.load(model, dtype="float32")
        torch.set_num_threads(threads_for(llm.model.config))
        load_seconds = time.perf_counter() - begin
        millions = llm.model.config.parameters / 1e6
        print(f"{model or 'The demo checkpoint'}: {millions:.1f} million parameters")

        print_title("It completes a method")
        show(llm, load_seconds, METHOD, llm.begin([METHOD], 48, stop="\n\n"), "")

        print_title("It fills a hole, knowing what comes before and after")
        filling = llm.begin_infill(BEFORE_HOLE, AFTER_HOLE, 48, mode="spm", stop="\n")
        show(llm, load_seconds, BEFORE_HOLE, filling, AFTER_HOLE)

        print_title("So small, it knows what Python looks like, but not what it means")
        show(llm, load_seconds, FUNCTION, llm.begin([FUNCTION], 48, stop="\n\n"), "")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as after `| head`; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def print_title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}\n")


def show(llm: LLM, load_seconds: float, before: str, generation: Generation, after: str) -> None:
    """Print a generation as it arrives, in bold on a terminal, and its statistics."""
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
