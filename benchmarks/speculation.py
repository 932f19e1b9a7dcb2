"""When does speculation win, and how much?

    python benchmarks/speculation.py

Two measurements on this machine's CPU, greedy, one prompt, plain loop and speculation taking turns:

- by agreement: random weights of a published shape, and a draft that knows what the plain loop
  writes and gets each token right with a given probability. At 0 it shows what speculation costs
  where it is of no use.
- of the prompt: the demo checkpoint and `PromptLookup`, on held-out modules of the standard
  library. "continue" goes on where a piece of the module ends; "edit" is given the piece and then
  its first lines once more, as when a file is written anew with changes.

In float32 the tokens must be the plain loop's each time. 8-bit products round every row of numbers
(see `mqa_gpt.packing.PackedInt8Linear`), so there a choice between near equals may differ.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, interleaved, write_result

from mqa_gpt import GPT, LLM, GPTConfig, generate
from mqa_gpt.packing import pack
from mqa_gpt.quantization import quantize
from mqa_gpt.speculation import Draft, PromptLookup

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from demo_data import read_corpus


class Knowing(Draft):
    """Guesses what is known to come, each token right with a probability."""

    def __init__(self, text: list[int], agreement: float, vocabulary: int) -> None:
        self._text, self._agreement, self._vocabulary = text, agreement, vocabulary
        super().__init__()

    def begin(self) -> None:
        super().begin()
        self._random = random.Random(0)

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


def compare(
    model: GPT, prompt: list[int], draft: Draft, options: argparse.Namespace, label: str
) -> dict[str, Any]:
    """Times of the decode steps with and without a draft; the prefill is taken off both."""
    plain = generate(model, [prompt], options.new)
    same = generate(model, [prompt], options.new, draft=draft) == plain
    proposed, accepted = draft.proposed, draft.accepted
    times = interleaved(
        {
            "first": partial(generate, model, [prompt], 1),
            "plain": partial(generate, model, [prompt], options.new),
            "draft": partial(generate, model, [prompt], options.new, draft=draft),
        },
        options.repeats,
        label,
    )
    first = times["first"]["median"]
    return {
        "same_tokens": same,
        "proposed": proposed,
        "accepted": accepted,
        "speedup": (times["plain"]["median"] - first) / (times["draft"]["median"] - first),
        "times": times,
    }


def by_agreement(options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for method in (None, "int8"):
        torch.manual_seed(0)
        model = GPT(GPTConfig.official(options.shape)).eval()
        if method:
            quantize(model)
        pack(model)
        vocabulary = model.config.vocab_size
        prompt = torch.randint(vocabulary, (options.prompt,)).tolist()
        text = prompt + generate(model, [prompt], options.new)[0]
        for agreement in options.agreement:
            draft = Knowing(text, agreement, vocabulary)
            name = f"{method or 'float32'}, agreement {agreement}"
            figures[name] = compare(model, prompt, draft, options, name)
    return figures


def of_the_prompt(options: argparse.Namespace) -> dict[str, Any]:
    llm = LLM.load(dtype="float32")
    figures: dict[str, Any] = {}
    for task in ("continue", "edit"):
        results = {}
        for name, text in sorted(read_corpus().held_out.items())[: options.modules]:
            ids = llm.tokenizer.encode(text, special_tokens=False)[100:400]
            # A blank line between the piece and its beginning anew.
            again = [*ids, *llm.tokenizer.encode("\n\n"), *ids[:48]]
            prompt = ids if task == "continue" else again
            label = f"{task} {name}"
            results[name] = compare(llm.model, prompt, PromptLookup(), options, label)
        speedups = [result["speedup"] for result in results.values()]
        figures[task] = {
            "same_tokens": all(result["same_tokens"] for result in results.values()),
            "proposed": sum(result["proposed"] for result in results.values()),
            "accepted": sum(result["accepted"] for result in results.values()),
            "speedup": statistics.median(speedups),
            "speedup_range": [min(speedups), max(speedups)],
            "modules": results,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="tiny_starcoder_py", help="an official shape")
    parser.add_argument("--agreement", type=float, nargs="+", default=[0, 0.3, 0.6, 0.8, 0.95])
    parser.add_argument("--modules", type=int, default=8, help="held-out modules")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens, by agreement")
    parser.add_argument("--new", type=int, default=96, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "speculation_cpu.json")
    options = parser.parse_args()
    figures = {"by_agreement": by_agreement(options), "of_the_prompt": of_the_prompt(options)}
    print(f"{'':34}{'accepted':>12}{'speed':>8}  same tokens")
    for group in figures.values():
        for name, figure in group.items():
            of = f"{figure['accepted']} of {figure['proposed']}"
            same = "yes" if figure["same_tokens"] else "NO"
            print(f"{name:34}{of:>12}{figure['speedup']:>8.2f}  {same}")
    write_result(options.output, __doc__.split("\n")[0], options, figures)


if __name__ == "__main__":
    main()
