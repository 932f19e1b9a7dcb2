"""Complete a function, then fill a hole in another, with the bundled checkpoint: `make demo`."""

from __future__ import annotations

import argparse
import sys
import time

from mqa_gpt import LLM
from mqa_gpt.environment import peak_memory
from mqa_gpt.errors import InputError
from mqa_gpt.inspection import inspect_checkpoint
from mqa_gpt.llm import Generation

COMPLETE = "def read_lines(path):\n"

INFILL_BEFORE = '''\
def count_words(path):
    """Return how often each word occurs in a file."""
    counts = {}
    with open(path) as f:
        for line in f:
            for word in line.split():
                '''
INFILL_AFTER = """
    return counts
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="another checkpoint: a hub name or a folder")
    model = parser.parse_args().model

    begin = time.perf_counter()
    try:
        llm = LLM.load(model, dtype="float32")
        load_seconds = time.perf_counter() - begin
        parameters = sum(inspect_checkpoint(model).parameters.values())
        print(f"{model or 'The demo checkpoint'}: {parameters / 1e6:.1f} million parameters")

        title("It completes a function")
        show(llm, load_seconds, COMPLETE, llm.begin([COMPLETE], 96, stop=["\n\n\n"]), "")
        title("It fills a hole, marked here, between what is before and after it")
        filling = llm.begin_infill(INFILL_BEFORE, INFILL_AFTER, 48)
        show(llm, load_seconds, INFILL_BEFORE, filling, INFILL_AFTER)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def title(text: str) -> None:
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
