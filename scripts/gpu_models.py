"""Sections of gpu_report.py: the machine, its limits, and whole models with random weights."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from assemblers import assemblers, ptxas_version
from gpu_kernels import MODELS, TINY, Row, Twins, each, shallow, verdict
from torch import profiler
from triton import knobs
from triton.testing import do_bench

from mqa_gpt import GPT, GPTConfig, KVCache, generate
from mqa_gpt.bench.ceilings import probes
from mqa_gpt.bench.counts import decode_bytes, prefill_flops
from mqa_gpt.fast.decode_step import greedy_step
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.request import make_requests
from mqa_gpt.machine import describe
from mqa_gpt.sampling import GREEDY

STEPS = 8  # decode steps in one measurement
NEW_TOKENS = 64  # of a measured generation

# (batch, tokens in the cache) of what is decoded, by weights; the most telling first.
DECODE = {
    "bfloat16": ((1, 1024), (32, 1024), (8, 1024), (64, 1024), (128, 1024), (32, 8192 - STEPS)),
    "int8": ((1, 1024), (8, 1024), (32, 1024)),
}
PREFILL = ((1, 2048), (1, 8192), (8, 2048))  # (batch, tokens of a prompt)
SMALL = ((1, 12), (2, 12))  # instead of these, without a GPU
COMPARED = (  # dtype, attention backend, quantization
    ("float32", "triton", None),
    ("bfloat16", "triton", None),
    ("bfloat16", "triton", "int8"),
    ("float16", "triton", None),
    ("float32", "sdpa", None),
)
RECORDED = ("transformer.h.0.attn.k", "transformer.h.0.attn.z", "transformer.h.1", "logits")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "filters": {"temperature": 1.1, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "seed": 0},
}


def environment(device: torch.device) -> Iterator[Row]:
    """Versions, GPU, driver, assemblers and commit, as far as they can be found out."""
    row = describe()
    row |= {"torch": torch.__version__, "triton": row["versions"]["triton"]}
    row["ptxas"] = ptxas_version(knobs.nvidia.ptxas.path)  # that Triton uses, up to sm_90
    row["assemblers"] = {version: str(path) for version, path in assemblers().items()}
    for name, command in (
        ("driver", "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"),
        ("commit", "git rev-parse HEAD"),
    ):
        with suppress(OSError, subprocess.CalledProcessError):
            text = subprocess.check_output(command.split(), text=True, cwd=Path(__file__).parent)
            row[name] = text.strip().rpartition("\n")[2]
    yield row


def ceilings(device: torch.device) -> Iterator[Row]:
    """The rates of memory and matrix products, which limit those of the sections below."""
    limits = probes(device, torch.bfloat16)
    yield {name: probe.amount / seconds_of(probe.run) for name, probe in limits.items()}


def parity(device: torch.device) -> Iterator[Row]:
    """Checkpoints with random weights against transformers, as `mqa-gpt verify` compares them.

    Then replayed steps against the model's modules: their tokens, and what is recorded in them.
    """
    for name, config in shallow(device).items():
        model = Twins(config, torch.float32, False, device).plain
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            yield from each(
                (
                    {"model": name, "as": " ".join(filter(None, settings))},
                    partial(compare, folder, device, *settings),
                )
                for settings in COMPARED
            )
        yield from each(
            ({"model": name, "check": f"replays, {kind}"}, partial(check_loops, model, options))
            for kind, options in SAMPLINGS.items()
        )
        checks = {"values recorded in replays": check_recorded, "graphs kept": check_graphs}
        yield from each(
            ({"model": name, "check": check}, partial(action, model))
            for check, action in checks.items()
        )


def compare(
    folder: str, device: torch.device, dtype: str, backend: str, quantize: str | None
) -> Row:
    """The verdict of `verify` on a checkpoint."""
    from mqa_gpt.verify.compare import verify  # needs transformers

    count = 64 if device.type == "cuda" else 4
    report = verify(
        folder, device=device, dtype=dtype, backend=backend, quantize=quantize, max_new_tokens=count
    )
    fields = ("passed", "logits_error", "logits_limit", "loss", "reference_loss")
    return {name: getattr(report, name) for name in fields} | {
        "equal_tokens": sum(prompt.equal_tokens for prompt in report.prompts),
        "tokens": count * len(report.prompts),
    }


def check_loops(model: GPT, options: dict[str, Any]) -> Row:
    """Tokens of recorded steps, on a GPU, and of the modules: of few rows and of many."""
    model.set_backend("auto")
    equal, total = 0, 0
    for rows in (5, 40):
        prompts = [row[: 1 + i % 9] for i, row in enumerate(random_prompts(model, rows, 9))]
        fast = torch.tensor(generate(model, prompts, 24, **options))
        hook = model.lm_head.register_forward_hook(lambda *call: None)
        slow = torch.tensor(generate(model, prompts, 24, **options))
        hook.remove()
        equal += int((fast == slow).sum())
        total += slow.numel()
    return {"passed": equal == total, "equal": equal, "tokens": total}


def check_recorded(model: GPT) -> Row:
    """What `research.record` keeps of replayed steps is that of one pass over the whole text.

    A name's error is the largest distance over what sums in another order may differ by.
    """
    from mqa_gpt.research import record

    model.set_backend("auto")
    prompts = random_prompts(model, 3, 9)
    plain = generate(model, prompts, 24)
    with record(model, RECORDED) as replayed:
        tokens = generate(model, prompts, 24)
    texts = [[*prompt, *new][:-1] for prompt, new in zip(prompts, tokens, strict=True)]
    with torch.inference_mode(), record(model, RECORDED) as whole:
        model(torch.tensor(texts, device=model.device))
    errors = {}
    for name in RECORDED:
        ours, theirs = (torch.stack(list(acts[name])) for acts in (replayed, whole))  # (B, T, ..)
        allowed = 2e-4 * max(1.0, theirs.abs().max().item())
        errors[name] = (ours - theirs).abs().max().item() / allowed
    found = verdict(errors)
    return found | {"passed": found["passed"] and tokens == plain, "equal_tokens": tokens == plain}


def check_graphs(model: GPT) -> Row:
    """Generations on one engine: all use the graphs of the first, and give its tokens."""
    model.set_backend("auto")
    engine, tokens, graphs = Engine(model, 4, 40), [], []
    for _ in range(3):
        for request in make_requests(model.config, random_prompts(model, 3, 9), 16, GREEDY):
            engine.add(request)
        seen = []
        while engine.is_busy:
            seen += [(token.row % 3, token.id) for token in engine.step()]
        tokens.append(seen)
        graphs.append(set(getattr(engine._stepper, "_graphs", {}).values()))
    equal = sum(seen == tokens[0] for seen in tokens)
    kept = graphs[0] == graphs[1] == graphs[2]
    return {"passed": equal == 3 and kept, "equal": equal, "graphs": len(graphs[0])}


def decode(device: torch.device) -> Iterator[Row]:
    """Seconds per greedy decode step; then the tokens per second of whole generations."""
    for weights, sizes in DECODE.items():
        yield from measured(device, step_speed, sizes, weights)
    yield from measured(device, generation_speed, DECODE["bfloat16"][:2])


def prefill(device: torch.device) -> Iterator[Row]:
    """Seconds to read prompts, all positions in one pass."""
    return measured(device, prefill_speed, PREFILL)


def profile(device: torch.device) -> Iterator[Row]:
    """The kernels of a decode step."""
    return measured(device, profile_step, DECODE["bfloat16"][:2])


def measured(
    device: torch.device,
    measure: Callable[[GPT, int, int], Row],
    sizes: Sequence[tuple[int, int]],
    weights: str = "bfloat16",
) -> Iterator[Row]:
    """measure(model, batch, tokens) of every model and size; the weights are random."""
    configs = {"tiny": TINY}
    if device.type == "cuda":
        configs = {name: GPTConfig.preset(name) for name in MODELS}
    for name, config in configs.items():
        with device:
            model = GPT(config).bfloat16().eval()
        if weights == "int8":
            quantize(model)
        cases = (
            (
                {"model": name, "weights": weights, "batch": batch, "tokens": tokens},
                partial(measure, model, batch, tokens),
            )
            for batch, tokens in (sizes if device.type == "cuda" else SMALL)
        )
        yield from each(cases, may_refuse=True)
        del model  # before the next one is made


def random_prompts(model: GPT, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    return ids.tolist()


def seconds_of(action: Callable[[], object]) -> float:
    """The median on a GPU, from a cold L2 cache; on a CPU one run's, to try the code."""
    if torch.cuda.is_available():
        milliseconds: float = do_bench(action, rep=300, return_mode="median")
        return milliseconds / 1e3
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def decoding(model: GPT, batch: int, context: int) -> Callable[[], None]:
    """A function that runs `STEPS` greedy decode steps after `context` random tokens per row.

    Here and in `gpu_kernels.fused_step` this script uses what is not public: the step that
    `generate` runs, on a GPU a replayed graph.
    """
    slots = context + STEPS
    cache = KVCache(model.config, batch, slots, dtype=model.dtype, device=model.device)
    cache.kv.normal_()
    cache.advance(context)
    step, state = greedy_step(model, cache)

    def run() -> None:
        state.lengths.fill_(context)
        for _ in range(STEPS):
            step()

    run()  # compiles the kernels, and records the graph
    return run


@torch.inference_mode()
def step_speed(model: GPT, batch: int, context: int) -> Row:
    """A decode step's time, and the rate at which it reads weights and cache."""
    seconds = seconds_of(decoding(model, batch, context)) / STEPS
    steps = range(context + 1, context + STEPS + 1)
    itemsize = model.lm_head.weight.itemsize
    read = decode_bytes(model.config, batch, steps, itemsize, model.dtype) / STEPS
    return {
        "step_us": seconds * 1e6,
        "tokens_per_s": batch / seconds,
        "gb_per_s": read / seconds / 1e9,
    }


def generation_speed(model: GPT, batch: int, context: int) -> Row:
    """`generate` as users call it, once warm: its first token, then the rate of replayed steps.

    Each call records its graph, which cancels in the difference of the two longest.
    """
    prompts = random_prompts(model, batch, context)
    count = NEW_TOKENS if model.device.type == "cuda" else 2
    times = []
    for new in (2, 1, 1 + count, 1 + 2 * count):
        begin = time.perf_counter()
        generate(model, prompts, new)
        times.append(time.perf_counter() - begin)
    return {
        "new_tokens": count,
        "first_token_s": times[1],
        "generated_per_s": batch * count / (times[3] - times[2]),
    }


@torch.inference_mode()
def prefill_speed(model: GPT, batch: int, length: int) -> Row:
    """The time from prompts to the logits of their last positions."""
    ids = torch.tensor(random_prompts(model, batch, length), device=model.device)
    last = torch.full((batch,), length - 1, device=model.device)
    cache = KVCache(model.config, batch, length, dtype=model.dtype, device=model.device)

    def read() -> None:
        cache.set_lengths([0] * batch)
        model(ids, cache=cache, logits_at=last)

    read()
    seconds = seconds_of(read)
    return {
        "seconds": seconds,
        "tokens_per_s": batch * length / seconds,
        "tflops": prefill_flops(model.config, batch, length) / seconds / 1e12,
    }


@torch.inference_mode()
def profile_step(model: GPT, batch: int, context: int) -> Row:
    """Kernels per step and their time; on a CPU, operators.

    What is between their sum and the step's own time, which is measured without the profiler, is
    waiting, or kernels that overlap.
    """
    run = decoding(model, batch, context)
    seconds = seconds_of(run) / STEPS
    gpu = model.device.type == "cuda"
    activity = profiler.ProfilerActivity.CUDA if gpu else profiler.ProfilerActivity.CPU
    with profiler.profile(activities=[activity]) as profiled:
        run()
        if gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    kernels = [
        {"kernel": e.key, "count": e.count / STEPS, "us": getattr(e, key) / STEPS}
        for e in profiled.key_averages()
        if getattr(e, key) > 0  # the host's part has no time on the device
    ]
    kernels.sort(key=lambda kernel: -kernel["us"])
    return {
        "step_us": seconds * 1e6,
        "kernels_us": sum(kernel["us"] for kernel in kernels),
        "kernels_per_step": sum(kernel["count"] for kernel in kernels),
        "longest": kernels[0]["kernel"][:60],
        "kernels": kernels[:20],
    }
