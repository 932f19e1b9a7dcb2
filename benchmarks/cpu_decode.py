"""How fast does this decode on a CPU, in float32 and with 8-bit weights, beside transformers?

    python benchmarks/cpu_decode.py                          # tiny_starcoder_py's shape
    python benchmarks/cpu_decode.py --shape starcoderbase-1b

All run the same random weights in one process, taking turns; transformers in float32. The decode
rate is (tokens - 1) * rows / (time of a whole generation - time of one that stops at its first
token).
The cold start is a new process each time: import, load the checkpoint (ours loads its tokenizer
too), first token.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, interleaved, write_result
from transformers import GenerationConfig, GPTBigCodeForCausalLM

from mqa_gpt import GPT, LLM, GPTConfig, generate
from mqa_gpt.checkpoint import DEMO_DIR

COLD_START = {
    "mqa-gpt": """
from mqa_gpt import LLM, generate
generate(LLM.load({folder!r}).model, [{prompt}], 1)
""",
    "transformers": """
import torch
from transformers import GPTBigCodeForCausalLM
model = GPTBigCodeForCausalLM.from_pretrained({folder!r})
model.generate(torch.tensor([{prompt}]), max_new_tokens=1, do_sample=False, pad_token_id=0)
""",
}


def load_all(folder: str) -> tuple[dict[str, GPT], GPTBigCodeForCausalLM]:
    ours = {
        "mqa-gpt": LLM.load(folder).model,
        "mqa-gpt int8": LLM.load(folder, quantize="int8").model,
    }
    theirs = GPTBigCodeForCausalLM.from_pretrained(folder)  # in eval mode
    # No end token: full length.
    theirs.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    return ours, theirs


def decode_rates(
    ours: dict[str, GPT], theirs: GPTBigCodeForCausalLM, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Prefill time and decode rate of all for one batch size, and ratios to transformers."""
    prompt = torch.randint(theirs.config.vocab_size, (rows, options.prompt))
    mask = torch.ones_like(prompt)

    def run_theirs(count: int) -> list[list[int]]:
        output = theirs.generate(  # type: ignore[misc]
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False
        )
        return output[:, options.prompt :].tolist()

    runs: dict[str, Callable[[int], list[list[int]]]] = {
        name: partial(generate, model, prompt) for name, model in ours.items()
    }
    runs["transformers"] = run_theirs
    same = runs["mqa-gpt"](options.new) == run_theirs(options.new)
    times = interleaved(
        {
            f"{name} {part}": partial(run, count)
            for part, count in (("first", 1), ("all", options.new))
            for name, run in runs.items()
        },
        options.repeats,
        f"batch {rows}",
    )
    figures: dict[str, Any] = {"same_tokens": same, "times": times}
    for name in runs:
        first, whole = times[f"{name} first"]["median"], times[f"{name} all"]["median"]
        figures[name] = {
            "prefill_s": first,
            "decode_tok_s": (options.new - 1) * rows / (whole - first),
        }
    reference = figures["transformers"]
    for name in ours:
        figures[name]["decode_ratio"] = figures[name]["decode_tok_s"] / reference["decode_tok_s"]
        figures[name]["prefill_ratio"] = reference["prefill_s"] / figures[name]["prefill_s"]
    return figures


def cold_start(folder: str, prompt: list[int], repeats: int) -> dict[str, Any]:
    """Seconds from starting a process to its first token, for both."""

    def run(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code.format(folder=folder, prompt=prompt)],
            check=True,
            cwd=Path(__file__).parents[1],
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - begin

    actions = {name: partial(run, code) for name, code in COLD_START.items()}
    times = interleaved(actions, repeats, "cold start")
    return {
        "times": times,
        "ratio": times["transformers"]["median"] / times["mqa-gpt"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="tiny_starcoder_py", help="an official shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--new", type=int, default=32, help="new tokens")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cold-repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu_decode_*.json")
    options = parser.parse_args()

    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        GPT(GPTConfig.official(options.shape)).save_pretrained(folder)
        shutil.copy(DEMO_DIR / "tokenizer.json", folder)  # any: the prompts are ids
        ours, theirs = load_all(folder)
        for rows in options.batch:
            figures[f"batch {rows}"] = decode_rates(ours, theirs, rows, options)
        del ours, theirs
        prompt = torch.randint(1000, (options.prompt,)).tolist()
        figures["cold start"] = cold_start(folder, prompt, options.cold_repeats)

    print(f"{options.shape}, {options.prompt} + {options.new} tokens, medians")
    for rows in options.batch:
        f = figures[f"batch {rows}"]
        same = "transformers' tokens" if f["same_tokens"] else "OTHER TOKENS than transformers"
        print(f"batch {rows}; mqa-gpt in float32 gives {same}")
        for name in ("mqa-gpt", "mqa-gpt int8", "transformers"):
            figure = f[name]
            decode, prefill = figure.get("decode_ratio", 1), figure.get("prefill_ratio", 1)
            print(
                f"  {name:14}{figure['decode_tok_s']:>7.1f} tok/s{decode:>6.2f}"
                f"   prefill{figure['prefill_s']:>7.3f} s{prefill:>6.2f}"
            )
    times = figures["cold start"]["times"]
    a, b = times["mqa-gpt"]["median"], times["transformers"]["median"]
    print(f"{'cold start':12}{a:>10.2f} s{b:>12.2f} s{figures['cold start']['ratio']:>8.2f}")
    write_result(
        options.output or RESULTS / f"cpu_decode_{options.shape}.json",
        __doc__.split("\n")[0],
        options,
        figures,
    )


if __name__ == "__main__":
    main()
