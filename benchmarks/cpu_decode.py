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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
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
    write_result,
)
from transformers import GenerationConfig, GPTBigCodeForCausalLM

from mqa_gpt import GPT, LLM, GPTConfig, generate
from mqa_gpt.bench.counts import weight_bytes
from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.load import DEMO_DIR

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
    """Prefill time and decode rate of all for one batch size, and ratios to transformers.

    A rate is None where noise has made a whole generation as short as its first token.
    """
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
            "decode_tok_s": ratio((options.new - 1) * rows, whole - first),
        }
    reference = figures["transformers"]
    for name in ours:
        mine = figures[name]
        mine["decode_ratio"] = ratio(mine["decode_tok_s"] or 0, reference["decode_tok_s"] or 0)
        mine["prefill_ratio"] = reference["prefill_s"] / mine["prefill_s"]
    return figures


def lines(rows: int, figures: dict[str, Any]) -> Iterator[str]:
    """The table's lines for one batch size."""
    for name in ("mqa-gpt", "mqa-gpt int8", "transformers"):
        mine = figures[name]
        decode = "not measurable: more --new or --repeats"
        if mine["decode_tok_s"] is not None:
            decode = f"{mine['decode_tok_s']:.1f}{shown_ratio(mine.get('decode_ratio', 1))}"
        prefill = f"{mine['prefill_s']:.3f}{shown_ratio(mine.get('prefill_ratio', 1))}"
        yield f"{rows:>5}  {name:12}{prefill:>22}{decode:>22}"
    if not figures["same_tokens"]:
        yield "       mqa-gpt in float32 gives OTHER TOKENS than transformers"


def shown_ratio(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>8}"


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


def require_room(options: argparse.Namespace) -> None:
    """Raise InputError if the context is too short for what is asked, or the memory too small."""
    config, dtype = GPTConfig.preset(options.shape), torch.float32
    require_context(config, options.prompt + options.new)
    # In float32 here and in transformers, and in 8 bits; one layer's weights are there twice.
    weights = 2.5 * weight_bytes(config, dtype.itemsize)
    cache = cache_bytes(config, dtype, max(options.batch), options.prompt + options.new)
    require_memory(weights + cache, torch.device("cpu"))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "cpu_decode_*.json")
    add_shape(parser)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=several, default=32, help="new tokens")
    parser.add_argument("--repeats", type=positive, default=9, help="rounds of measurement")
    parser.add_argument(
        "--cold-repeats", type=positive, default=5, help="rounds of starting a process"
    )
    options = parser.parse_args(arguments)
    output = result_path(options.output, f"cpu_decode_{options.shape}.json")
    require_room(options)

    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    print(
        f"{options.shape}, prompts of {options.prompt} tokens and {options.new} new ones; medians\n"
        "ratios are to transformers: above 1 this is faster\n"
        f"{'batch':>5}  {'':12}{'prefill, s   ratio':>22}{'decode, tok/s   ratio':>22}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        print("writing a checkpoint of random weights", file=sys.stderr)
        GPT(GPTConfig.preset(options.shape)).save_pretrained(folder)
        shutil.copy(DEMO_DIR / "tokenizer.json", folder)  # any: the prompts are ids
        print("loading it in float32 and 8 bits, and with transformers", file=sys.stderr)
        ours, theirs = load_all(folder)
        for rows in options.batch:
            figures[f"batch {rows}"] = decode_rates(ours, theirs, rows, options)
            print("\n".join(lines(rows, figures[f"batch {rows}"])), flush=True)
        del ours, theirs
        prompt = torch.randint(1000, (options.prompt,)).tolist()
        figures["cold start"] = cold_start(folder, prompt, options.cold_repeats)

    cold = figures["cold start"]
    ours_s, theirs_s = (cold["times"][name]["median"] for name in ("mqa-gpt", "transformers"))
    print(
        f"cold start: mqa-gpt {ours_s:.2f} s, transformers {theirs_s:.2f} s, "
        f"ratio {cold['ratio']:.2f}"
    )
    return write_result(output, __doc__.split("\n")[0], options, figures)


if __name__ == "__main__":
    sys.exit(main())
