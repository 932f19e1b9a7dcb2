"""Check an official checkpoint against outputs published for it.

    python scripts/check_published_outputs.py --model bigcode/tiny_starcoder_py
    python scripts/check_published_outputs.py --model ./my-copy --as bigcode/santacoder

Token ids must be equal and texts must begin as published. Log-probabilities, published in float16,
may differ by 0.1. Exit status: 0 if all cases pass, 1 if one fails, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mqa_gpt import LLM
from mqa_gpt.errors import InputError

CASES = Path(__file__).parents[1] / "tests" / "data" / "published-outputs.json"
LOGPROB_TOLERANCE = 0.1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a hub name or a folder")
    parser.add_argument("--as", dest="name", help="check as this model (default: --model's name)")
    parser.add_argument("--cases", type=Path, default=CASES, help="the published outputs, as JSON")
    parser.add_argument("--dtype", help="default: the checkpoint's")
    parser.add_argument("--device", help="default: a GPU if there is one")
    options = parser.parse_args(arguments)

    try:
        cases = matching_cases(options.cases, options.name or options.model)
        llm = LLM.load(options.model, dtype=options.dtype, device=options.device)
        failed = 0
        for case in cases:
            problems = check(llm, case)
            failed += bool(problems)
            print(f"{'FAIL' if problems else 'pass'}  {case['prompt']!r}  ({case['source']})")
            for problem in problems:
                print(f"      {problem}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(cases) - failed} of {len(cases)} cases pass")
    return 1 if failed else 0


def matching_cases(file: Path, name: str) -> list[dict[str, Any]]:
    """The cases of the model of this name; owner and folder do not matter."""
    try:
        cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
        names = sorted({case["model"] for case in cases})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a file of published outputs: {error!r}") from error
    found = [case for case in cases if Path(case["model"]).name == Path(name).name]
    if not found:
        raise InputError(
            f"no outputs are published for {name!r}: name the model with --as {' or '.join(names)}"
        )
    return found


def check(llm: LLM, case: dict[str, Any]) -> list[str]:
    """How the greedy completion differs from the published one; prompts may hold control tokens."""
    count = case.get("max_new_tokens") or len(llm.tokenizer.encode(case["text"])) + 8
    completion = llm.generate(case["prompt"], count, logprobs=0)
    problems = []
    if "ids" in case and completion.token_ids != case["ids"]:
        problems.append(f"ids: {completion.token_ids}, published {case['ids']}")
    elif "logprobs" in case:
        assert completion.logprobs is not None
        pairs = zip(completion.logprobs, case["logprobs"], strict=True)
        worst = max(abs(ours - published) for ours, published in pairs)
        if not worst <= LOGPROB_TOLERANCE:
            problems.append(f"log-probabilities: {worst:.3f} away, {LOGPROB_TOLERANCE} allowed")
    if not completion.text.startswith(case["text"]):
        problems.append(f"text: {completion.text!r}, published {case['text']!r}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
