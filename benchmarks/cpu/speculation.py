"""When does speculation win, and how much?

    python -m benchmarks.cpu.speculation

Two measurements on this machine's CPU, greedy, one prompt, the plain loop and speculation in turn:

- by agreement: random weights of a preset, and a drafter that knows what will be written and gets
  each token right with a given probability. At 0 it shows the cost of useless speculation.
- of the prompt: the demo checkpoint and `PromptLookup`, on held-out modules of the standard
  library. "continue" gives a piece of the module to go on with; "edit" gives the piece and then its
  first lines once more, as when a file is rewritten with changes.

The compiled forward pass gives a token the same numbers in a step over several tokens, so the
tokens are the plain loop's each time, in 8 bits too. Without numba rounding may tip a near tie.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measure import (
    ROOT,
    add_shape,
    interleaved,
    make_parser,
    positive,
    ratio,
    refuse_bad_input,
    require_context,
    require_memory,
    result_path,
    several,
    within,
    write_result,
)
from mqa_gpt import GPT, LLM, GPTConfig, generate
from mqa_gpt.bench.counts import weight_bytes
from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.request import make_requests
from mqa_gpt.generation.speculative import Drafter, PromptLookup, Proposer
from mqa_gpt.sampling import GREEDY
from mqa_gpt.training.config import read_run_config
from mqa_gpt.training.prepare import held_out_documents

DEMO = read_run_config(ROOT / "configs/demo.toml").data  # the demo checkpoint's
PIECE = slice(100, 400)  # the tokens of a held-out module to continue
BEGINNING = 48  # how many of them an edit repeats
BETWEEN = "\n\n"  # the piece and the repeated beginning: at most a token per character


class Knowing(Drafter):
    """Guesses a known text, each token right with a given probability."""

    def __init__(self, text: list[int], agreement: float, vocabulary: int) -> None:
        self._text, self._agreement, self._vocabulary = text, agreement, vocabulary

    def start(self, rows: int) -> Proposer:
        self._random = random.Random(0)
        return self

    def propose(
        self, rows: Sequence[int], texts: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        right = self._text[len(texts[0]) : len(texts[0]) + most]
        return [
            [
                token if self._random.random() < self._agreement else (token + 1) % self._vocabulary
                for token in right
            ]
        ]


def drafted(
    model: GPT, prompt: list[int], count: int, drafter: Drafter
) -> tuple[list[int], int, int]:
    """The new tokens of `generate`, how many tokens were drafted, and how many accepted."""
    requests = make_requests(model.config, [prompt], count, GREEDY, drafter=drafter)
    engine = Engine.for_requests(model, requests)
    engine.add(requests[0])
    tokens = []
    while engine.is_busy:
        tokens += [token.id for token in engine.step()]
    return tokens, *engine.drafted


def compare(
    model: GPT, prompt: list[int], drafter: Drafter, options: argparse.Namespace, label: str
) -> dict[str, Any]:
    """Times of the decode steps with and without a drafter; the prefill is subtracted from both."""
    tokens, proposed, accepted = drafted(model, prompt, options.new, drafter)
    same = [tokens] == generate(model, [prompt], options.new)
    times = interleaved(
        {
            "first": partial(generate, model, [prompt], 1),
            "plain": partial(generate, model, [prompt], options.new),
            "draft": partial(generate, model, [prompt], options.new, draft=drafter),
        },
        options.repeats,
        label,
    )
    first, plain_time, draft_time = (times[name]["median"] for name in ("first", "plain", "draft"))
    return {
        "same_tokens": same,
        "proposed": proposed,
        "accepted": accepted,
        "speedup": ratio(plain_time - first, draft_time - first),
        "times": times,
    }


def by_agreement(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each drafter, by name."""
    for method in (None, "int8"):
        print(f"{options.shape}: random weights in {method or 'float32'}", file=sys.stderr)
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset(options.shape)).eval()
        if method:
            quantize(model)
        vocabulary = model.config.vocab_size
        prompt = torch.randint(vocabulary, (options.prompt,)).tolist()
        text = prompt + generate(model, [prompt], options.new)[0]
        for agreement in options.agreement:
            drafter = Knowing(text, agreement, vocabulary)
            name = f"{method or 'float32'}, agreement {agreement:g}"
            yield name, compare(model, prompt, drafter, options, name)


def of_the_prompt(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each task, by name, over all modules."""
    llm = LLM.load(dtype="float32")
    for task in ("continue", "edit"):
        results = {}
        modules = sorted(held_out_documents(DEMO), key=lambda document: document.name)
        for name, text in [(d.name, d.text) for d in modules[: options.modules]]:
            ids = llm.tokenizer.encode(text, special_tokens=False)[PIECE]
            again = [*ids, *llm.tokenizer.encode(BETWEEN), *ids[:BEGINNING]]
            prompt = ids if task == "continue" else again
            label = f"{task} {name}"
            results[name] = compare(llm.model, prompt, PromptLookup(), options, label)
        speedups = [r["speedup"] for r in results.values() if r["speedup"] is not None]
        yield (
            task,
            {
                "same_tokens": all(result["same_tokens"] for result in results.values()),
                "proposed": sum(result["proposed"] for result in results.values()),
                "accepted": sum(result["accepted"] for result in results.values()),
                "speedup": statistics.median(speedups) if speedups else None,
                "speedup_range": [min(speedups), max(speedups)] if speedups else None,
                "modules": results,
            },
        )


def show(name: str, figure: dict[str, Any]) -> None:
    """Print a line of the table."""
    of = f"{figure['accepted']} of {figure['proposed']}"
    same = "yes" if figure["same_tokens"] else "NO"
    speed = "-" if figure["speedup"] is None else f"{figure['speedup']:.2f}"
    late = "" if figure["speedup"] else "  not measurable: more --new or --repeats"
    print(f"{name:34}{of:>12}{speed:>16}  {same}{late}", flush=True)


def require_room(options: argparse.Namespace) -> None:
    """Raise InputError if a context is too short for what is asked, or the memory too small."""
    config = GPTConfig.preset(options.shape)
    require_context(config, options.prompt + options.new)
    longest = PIECE.stop - PIECE.start + len(BETWEEN) + BEGINNING
    require_context(read_config(DEMO_DIR), longest + options.new)
    require_memory(weight_bytes(config, torch.float32.itemsize), torch.device("cpu"))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "speculation_cpu.json")
    add_shape(parser)
    parser.add_argument(
        "--agreement",
        type=within(0.0, 1.0),
        nargs="+",
        default=[0, 0.3, 0.6, 0.8, 0.95],
        help="how often a guess is right",
    )
    parser.add_argument(
        "--modules", type=within(1, len(DEMO.held_out)), default=8, help="held-out modules"
    )
    parser.add_argument("--prompt", type=positive, default=128, help="prompt tokens, by agreement")
    parser.add_argument("--new", type=several, default=96, help="new tokens")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds of measurement")
    options = parser.parse_args(arguments)
    output = result_path(options.output, "speculation_cpu.json")
    require_room(options)

    figures: dict[str, dict[str, Any]] = {"by_agreement": {}, "of_the_prompt": {}}
    print(f"{'draft':34}{'accepted':>12}{'times as fast':>16}  same tokens", flush=True)
    for group, measured in (
        ("by_agreement", by_agreement(options)),
        ("of_the_prompt", of_the_prompt(options)),
    ):
        for name, figure in measured:
            figures[group][name] = figure
            show(name, figure)
    return write_result(output, __file__, __doc__, options, figures)


if __name__ == "__main__":
    sys.exit(main())
