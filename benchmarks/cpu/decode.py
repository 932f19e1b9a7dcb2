"""How fast does this decode on a CPU, in float32 and with 8-bit weights, next to other programs?

    python -m benchmarks.cpu.decode                          # the shape of tiny_starcoder_py
    python -m benchmarks.cpu.decode --shape starcoderbase-1b

All run the same random weights in turn: this, transformers in float32, and CTranslate2 in both if
it is installed. The decode rate is (tokens - 1) * rows / (time of a whole generation - time of one
that stops at its first token). The cold start is a new process each time: import, load the
checkpoint (ours loads its tokenizer too), first token.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
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
    write_result,
)
from mqa_gpt import GPT, LLM, GPTConfig
from mqa_gpt.bench.counts import weight_bytes
from mqa_gpt.bench.peers import PEERS, Program, ours, require_peers, temporary_folder
from mqa_gpt.bench.run import Workload, random_prompts
from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.machine import version

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


def installed_peers() -> list[str]:
    return [name for name, peer in PEERS.items() if all(map(version, peer.packages))]


def load_all(folder: Path) -> Iterator[Program]:
    model = LLM.load(folder).model
    yield ours(model)
    yield replace(ours(LLM.load(folder, quantize="int8").model), name="mqa-gpt int8")
    for name in installed_peers():
        yield from PEERS[name].load(folder, model)


def decode_rates(
    programs: list[Program], prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """Prefill time and decode rate of each for one batch size, and ratios to transformers.

    A rate is None where noise makes a whole generation as short as its first token.
    """
    rows, new = len(prompts), options.new
    written = {program.name: program.generate(prompts, new) for program in programs}
    times = interleaved(
        {
            f"{program.name} {part}": partial(program.generate, prompts, count)
            for part, count in (("first", 1), ("all", new))
            for program in programs
        },
        options.repeats,
        f"batch {rows}",
    )
    same = written["mqa-gpt"] == written["transformers"]
    figures: dict[str, Any] = {"same_tokens": same, "times": times}
    for name in written:
        first, whole = times[f"{name} first"]["median"], times[f"{name} all"]["median"]
        rate = ratio((new - 1) * rows, whole - first)
        figures[name] = {"prefill_s": first, "decode_tok_s": rate}
    reference = dict(figures["transformers"])
    for name in written:
        rate = figures[name]["decode_tok_s"]
        figures[name] |= {
            "decode_ratio": ratio(rate or 0, reference["decode_tok_s"] or 0),
            "prefill_ratio": reference["prefill_s"] / figures[name]["prefill_s"],
        }
    return figures


def lines(rows: int, figures: dict[str, Any]) -> Iterator[str]:
    """The table's lines for one batch size."""
    for name, found in figures.items():
        if name in ("same_tokens", "times"):
            continue
        decode = "not measurable: more --new or --repeats"
        if found["decode_tok_s"] is not None:
            decode = f"{found['decode_tok_s']:.1f}{shown_ratio(found['decode_ratio'])}"
        prefill = f"{found['prefill_s']:.3f}{shown_ratio(found['prefill_ratio'])}"
        yield f"{rows:>5}  {name:19}{prefill:>20}  {decode:>22}"
    if not figures["same_tokens"]:
        yield "       mqa-gpt in float32 gives OTHER TOKENS than transformers"


def shown_ratio(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>8}"


def cold_start(folder: Path, prompt: list[int], repeats: int) -> dict[str, Any]:
    """Seconds from starting a process to its first token, here and with transformers."""

    def run(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code.format(folder=str(folder), prompt=prompt)],
            check=True,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - begin

    actions = {name: partial(run, code) for name, code in COLD_START.items()}
    times = interleaved(actions, repeats, "cold start")
    return {"times": times, "ratio": times["transformers"]["median"] / times["mqa-gpt"]["median"]}


def require_room(options: argparse.Namespace) -> GPTConfig:
    """The shape's config; InputError if its context or the memory is too small."""
    config, dtype = GPTConfig.preset(options.shape), torch.float32
    require_context(config, options.prompt + options.new)
    # One copy in float32 and one in 8 bits here, of which one layer is there twice; then the peers.
    copies = 1.5 + sum(PEERS[name].copies for name in installed_peers())
    cache = cache_bytes(config, dtype, max(options.batch), options.prompt + options.new)
    require_memory(copies * weight_bytes(config, dtype.itemsize) + cache, torch.device("cpu"))
    return config


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
    require_peers(["transformers"])
    config = require_room(options)

    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    print(
        f"{options.shape}, prompts of {options.prompt} tokens and {options.new} new ones; medians\n"
        "ratios are to transformers: above 1 a program is faster\n"
        f"{'batch':>5}  {'':19}{'prefill, s   ratio':>20}  {'decode, tok/s   ratio':>22}",
        flush=True,
    )
    with temporary_folder() as folder:
        print("writing a checkpoint of random weights", file=sys.stderr)
        GPT(config).save_pretrained(folder)
        shutil.copy(DEMO_DIR / "tokenizer.json", folder)  # any: the prompts are ids
        (prompt,) = random_prompts(config, Workload(1, options.prompt, 1))
        # First, since CTranslate2's converter needs a tokenizer of its own in the folder.
        cold = cold_start(folder, prompt, options.cold_repeats)
        print("loading it in every program", file=sys.stderr)
        programs = list(load_all(folder))
    for rows in options.batch:
        prompts = random_prompts(config, Workload(rows, options.prompt, options.new))
        figures[f"batch {rows}"] = decode_rates(programs, prompts, options)
        print("\n".join(lines(rows, figures[f"batch {rows}"])), flush=True)
    figures["cold start"] = cold
    ours_s, theirs_s = (cold["times"][name]["median"] for name in ("mqa-gpt", "transformers"))
    print(
        f"cold start: mqa-gpt {ours_s:.2f} s, transformers {theirs_s:.2f} s, "
        f"ratio {cold['ratio']:.2f}"
    )
    return write_result(output, __file__, __doc__, options, figures)


if __name__ == "__main__":
    sys.exit(main())
