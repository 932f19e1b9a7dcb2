"""What does it cost to record a model's residual streams, here and with other tools?

    python -m benchmarks.recording                # CPU, some minutes
    python -m benchmarks.recording --one-thread   # on a CPU in use

All three residual streams of every layer are recorded in a forward pass: before it, between its
sublayers, after it. That is compared with the same forward pass without recording, in turn, for the
shape with random weights. Then the same for the demo checkpoint and few tokens, where a fixed cost
shows, also with nnsight and TransformerLens if they are installed, each compared with its own plain
forward pass. They pin other versions of what this project needs: give them an environment of their
own, in which this one is on PYTHONPATH.

`--one-thread` counts the processor's time of one thread, which leaves out the turns of other
programs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import (
    add_model,
    interleaved,
    make_parser,
    positive,
    read_device,
    refuse_bad_input,
    require_context,
    result_path,
    several,
    write_result,
)
from mqa_gpt import GPT, GPTConfig
from mqa_gpt.bench.run import random_model
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.research import record

RESIDUALS = [f"transformer.h.*.resid_{where}" for where in ("pre", "mid", "post")]
CONTEXTS = 200  # contexts that are entered and left to time one of them

Actions = dict[str, Callable[[], object]]


def of_this(model: GPT, ids: torch.Tensor, times: int = 1) -> Actions:
    """Plain and recorded forward passes, `times` in a row."""

    def plain() -> None:
        for _ in range(times):
            model(ids)

    def recorded() -> None:
        for _ in range(times):
            with record(model, RESIDUALS):
                model(ids)

    return {"plain": torch.no_grad()(plain), "recorded": torch.no_grad()(recorded)}


def of_nnsight(ids: torch.Tensor, times: int) -> Actions:
    """The same with nnsight's wrapper of transformers' model."""
    from nnsight import LanguageModel  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(DEMO_DIR, dtype=torch.float32)
    model = LanguageModel(hf, tokenizer=AutoTokenizer.from_pretrained(DEMO_DIR))

    def plain() -> None:
        for _ in range(times):
            hf(ids)

    def recorded() -> None:
        for _ in range(times):
            with model.trace(ids):
                saved = []
                for block in model.transformer.h:
                    saved.append(block.input.save())
                    saved.append(block.ln_2.input.save())
                    saved.append(block.output.save())

    return {"plain": torch.no_grad()(plain), "recorded": torch.no_grad()(recorded)}


def of_transformer_lens(ids: torch.Tensor, times: int) -> Actions:
    """The same with TransformerLens' bridge to transformers' model."""
    from transformer_lens.model_bridge import (  # type: ignore[import-not-found,unused-ignore]
        TransformerBridge,
    )

    model = TransformerBridge.boot_transformers(str(DEMO_DIR), device="cpu")
    model.enable_compatibility_mode(no_processing=True)
    names = [
        f"blocks.{i}.hook_resid_{where}"
        for i in range(model.cfg.n_layers)
        for where in ("pre", "mid", "post")
    ]

    def plain() -> None:
        for _ in range(times):
            model(ids)

    def recorded() -> None:
        for _ in range(times):
            model.run_with_cache(ids, names_filter=names)

    return {"plain": torch.no_grad()(plain), "recorded": torch.no_grad()(recorded)}


PEERS: dict[str, Callable[[torch.Tensor, int], Actions]] = {
    "nnsight": of_nnsight,
    "transformer_lens": of_transformer_lens,
}


def compare(actions: Actions, repeats: int, label: str, clock: Callable[[], float]) -> Any:
    """Both times, and the ratio and difference of each round."""
    times = interleaved(actions, repeats, label, clock)
    rounds = list(zip(times["recorded"]["seconds"], times["plain"]["seconds"], strict=True))
    ratios = [recorded / plain for recorded, plain in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    extra = statistics.median(recorded - plain for recorded, plain in rounds)
    return {
        "times": times,
        "ratio": {"median": middle, "quartiles": [low, high]},
        "extra_seconds": extra,
    }


def fixed_cost(model: GPT, names: str | list[str], clock: Callable[[], float]) -> float:
    """Seconds to enter and leave a context in which nothing runs: the fastest of some rounds."""

    def once() -> float:
        begin = clock()
        for _ in range(CONTEXTS):
            with record(model, names):
                pass
        return (clock() - begin) / CONTEXTS

    return min(once() for _ in range(10))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "recording_*.json")
    add_model(parser)
    parser.add_argument("--tokens", type=positive, default=512, help="of the pass with the shape")
    parser.add_argument("--demo-tokens", type=positive, default=16, help="of the demo's passes")
    parser.add_argument("--repeats", type=several, default=15, help="rounds of measurement")
    options = parser.parse_args(arguments)

    device, dtype, where = read_device(options)
    output = result_path(options.output, f"recording_{options.shape}_{where}.json")
    config = GPTConfig.preset(options.shape)
    require_context(config, options.tokens)
    clock = time.thread_time if options.one_thread else time.perf_counter
    model = random_model(config, dtype, device)
    ids = torch.randint(config.vocab_size, (1, options.tokens), device=device)
    figures: dict[str, Any] = {
        "shape": compare(of_this(model, ids), options.repeats, options.shape, clock),
        "fixed_seconds": {
            "all residual streams": fixed_cost(model, RESIDUALS, clock),
            "one per layer": fixed_cost(model, RESIDUALS[-1], clock),
            "one": fixed_cost(model, "transformer.h.3", clock),
        },
    }
    middle, ends = figures["shape"]["ratio"]["median"], figures["shape"]["ratio"]["quartiles"]
    print(
        f"{options.shape}, {options.tokens} tokens: {middle:.4f} ({ends[0]:.4f} to {ends[1]:.4f})"
    )
    for name, seconds in figures["fixed_seconds"].items():
        print(f"to enter and leave a context for {name}: {1e6 * seconds:.1f} us")

    demo = GPT.from_pretrained(DEMO_DIR, dtype="float32")
    ids = torch.randint(demo.config.vocab_size, (1, options.demo_tokens))
    contenders: dict[str, Actions] = {"mqa-gpt": of_this(demo, ids, 10)}
    for name, make in PEERS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
        else:
            contenders[f"{name} {importlib.metadata.version(name)}"] = make(ids, 10)
    # All of them take turns, so that each has the same share of a noisy machine.
    actions = {f"{name} {key}": run for name, two in contenders.items() for key, run in two.items()}
    times = interleaved(actions, options.repeats, "demo checkpoint", clock)
    figures["demo"] = {}
    for name in contenders:
        plain, recorded = (times[f"{name} {key}"]["seconds"] for key in ("plain", "recorded"))
        differences = [(b - a) / 10 for a, b in zip(plain, recorded, strict=True)]
        figures["demo"][name] = {
            "plain_seconds": statistics.median(plain) / 10,
            "extra_seconds": statistics.median(differences),
            "extra_quartiles": statistics.quantiles(differences, n=4)[::2],
        }
        print(
            f"demo, {name}: {1e6 * figures['demo'][name]['plain_seconds']:,.0f} us, recording adds "
            f"{1e6 * figures['demo'][name]['extra_seconds']:,.0f} us"
        )
    return write_result(output, __file__, __doc__, options, figures)


if __name__ == "__main__":
    sys.exit(main())
