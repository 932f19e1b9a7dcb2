"""The whole-model sections of gpu_report.py: how fast is generation, and where does its time go?

The weights are random, which takes as long as any others. So is what the caches hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from clock import Clock
from mqa_vs_mha import both_configs
from torch.profiler import ProfilerActivity, profile

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.cache import cache_bytes
from mqa_gpt.fast.cuda_graph import Replay
from mqa_gpt.fast.fused_step import can_fuse
from mqa_gpt.fast.int8 import is_quantized, quantize
from mqa_gpt.generation.batching import stream_batched
from mqa_gpt.generation.decode import Token, prefill, stream_plain
from mqa_gpt.generation.decode_graph import Decoder, decode_step, stream_replayed
from mqa_gpt.machine import available_memory
from mqa_gpt.sampling import GREEDY, SamplingParams

Row = dict[str, Any]
Measure = Callable[[], Iterator[Row]]

STEPS = 8  # of decoding in one measurement
STARTS = 3  # of new decoders, each measured
MOST_KERNELS = 25  # of a profile

LOOPS = {"replayed": stream_replayed, "plain": stream_plain}

# Sizes and weights that make tokens differ and attention depend on positions.
SMALL = GPTConfig(
    vocab_size=997, n_positions=256, n_embd=512, n_layer=4, n_head=8, n_inner=1536,
    initializer_range=0.11, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
SAMPLINGS = {
    "greedy": GREEDY,
    "penalty": SamplingParams(repetition_penalty=1.3),
    "filters": SamplingParams(1.1, 100, 0.95, 0.01, 1.1, seed=0),
}


class Size(NamedTuple):
    """Decoding `batch` rows behind `context` tokens each."""

    batch: int
    context: int


class ModelPlan(NamedTuple):
    """What to measure of which models, in bfloat16. The most valuable comes first everywhere.

    Attributes:
        configs: name -> config.
        decode: of every model.
        int8: the same with 8-bit weights; each is in `decode` too.
        loops: where to measure the loops of `generate` too, which read the prompts first.
        new_tokens: of these loops.
        tokens: configs and numbers of prompts to compare the loops' tokens with; few prompts have
            the fused kernels, and so has a large batch once most rows have ended.
        prefill: prompt lengths, of every model.
        profile: one decode step, of every model.
        heads: name of a model -> where to compare one key/value head with one for each query head,
            in models of as many weights (see `both_configs`).
    """

    configs: dict[str, GPTConfig]
    decode: tuple[Size, ...]
    int8: tuple[Size, ...]
    loops: tuple[Size, ...]
    new_tokens: int
    tokens: tuple[tuple[GPTConfig, int], ...]
    prefill: tuple[int, ...]
    profile: tuple[Size, ...]
    heads: dict[str, tuple[Size, ...]]


def gpu_model_plan() -> ModelPlan:
    """For a GPU of 140 GB; what does not fit into a smaller one is refused."""
    names = ("starcoderbase-7b", "starcoderbase-1b")
    return ModelPlan(
        configs={name: GPTConfig.preset(name) for name in names},
        decode=(
            *(Size(batch, 1024) for batch in (1, 32, 8, 128, 256)),
            Size(256, 8192 - STEPS),
        ),
        int8=(Size(1, 1024), Size(8, 1024), Size(32, 1024)),
        loops=(Size(1, 1024), Size(32, 1024), Size(8, 1024)),
        new_tokens=64,
        tokens=((SMALL, 5), (SMALL, 40), (replace(SMALL, multi_query=False), 5)),
        prefill=(2048, 8192),
        profile=(Size(1, 1024), Size(32, 1024)),
        heads={
            "starcoderbase-1b": (Size(32, 8192 - STEPS),),
            "starcoderbase-7b": (Size(8, 8192 - STEPS), Size(32, 1024)),
        },
    )


def cpu_model_plan() -> ModelPlan:
    """Everything once, as small as it gets."""
    config = GPTConfig(
        vocab_size=61, n_positions=48, n_embd=48, n_layer=2, n_head=3, n_inner=80,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    sizes = (Size(1, 12), Size(2, 12))
    return ModelPlan(
        configs={"tiny": config},
        decode=sizes,
        int8=sizes[:1],
        loops=sizes[1:],
        new_tokens=5,
        tokens=((config, 2),),
        prefill=(9,),
        profile=sizes[:1],
        heads={"tiny": sizes[1:]},
    )


class Models:
    """Makes models with random weights, and keeps the last one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._config: GPTConfig | None = None
        self._model: GPT | None = None

    def get(self, config: GPTConfig, int8: bool = False) -> GPT:
        """A model in bfloat16, in eval mode, its weights in 8 bits if wanted."""
        model = self._model
        if model is None or config != self._config or (is_quantized(model) and not int8):
            self._model = model = None  # two may not fit
            with self._clock.device:
                self._model = model = GPT(config).bfloat16().eval()
            self._config = config
        if int8 and not is_quantized(model):
            quantize(model)
        self._clock.release()  # the weights that these were made from
        return model


def token_cases(clock: Clock, plan: ModelPlan) -> Iterator[tuple[Row, Measure]]:
    """All loops' tokens in float32."""
    for config, count in plan.tokens:
        for name, sampling in SAMPLINGS.items():

            def measure(
                config: GPTConfig = config, count: int = count, sampling: SamplingParams = sampling
            ) -> Iterator[Row]:
                yield compare_tokens(clock, config, count, sampling)

            heads = "MQA" if config.multi_query else "MHA"
            yield (
                {"check": "tokens", "case": {"heads": heads, "prompts": count, "by": name}},
                measure,
            )


def decode_cases(clock: Clock, plan: ModelPlan, repeats: int) -> Iterator[tuple[Row, Measure]]:
    """Decoding: seconds per step, and tokens per second of whole generations."""
    models = Models(clock)
    for name, config in plan.configs.items():
        for size in plan.decode:

            def measure(config: GPTConfig = config, size: Size = size) -> Iterator[Row]:
                model = models.get(config)
                row = measure_steps(clock, model, size, repeats)
                yield row
                if size in plan.loops and "refused" not in row:
                    loops = measure_loops(clock, model, size, plan.new_tokens)
                    yield {"loops": loops, "new_tokens": plan.new_tokens}

            yield {"model": name, "case": size._asdict()}, measure
        for size in plan.int8:

            def measure_int8(config: GPTConfig = config, size: Size = size) -> Iterator[Row]:
                yield measure_steps(clock, models.get(config, int8=True), size, repeats)

            yield {"model": name, "case": size._asdict() | {"weights": "int8"}}, measure_int8


def prefill_cases(clock: Clock, plan: ModelPlan, repeats: int) -> Iterator[tuple[Row, Measure]]:
    """Reading one prompt."""
    models = Models(clock)
    for name, config in plan.configs.items():
        for length in plan.prefill:

            def measure(config: GPTConfig = config, length: int = length) -> Iterator[Row]:
                yield measure_prefill(clock, models.get(config), length, repeats)

            yield {"model": name, "case": {"prompt": length}}, measure


def profile_cases(clock: Clock, plan: ModelPlan, repeats: int) -> Iterator[tuple[Row, Measure]]:
    """Where the time of a decode step goes."""
    models = Models(clock)
    for name, config in plan.configs.items():
        for size in plan.profile:

            def measure(config: GPTConfig = config, size: Size = size) -> Iterator[Row]:
                yield profile_step(clock, models.get(config), size, repeats)

            yield {"model": name, "case": size._asdict()}, measure


def heads_cases(clock: Clock, plan: ModelPlan, repeats: int) -> Iterator[tuple[Row, Measure]]:
    """Decoding with one key/value head, and with one for each query head."""
    models = Models(clock)
    for name, sizes in plan.heads.items():
        for heads, config in both_configs(plan.configs[name]).items():
            for size in sizes:

                def measure(config: GPTConfig = config, size: Size = size) -> Iterator[Row]:
                    yield measure_steps(clock, models.get(config), size, repeats)

                yield {"model": name, "case": {"heads": heads, **size._asdict()}}, measure


def compare_tokens(clock: Clock, config: GPTConfig, count: int, sampling: SamplingParams) -> Row:
    """Whether replayed steps say what the plain loop does, of prompts of 1 to 9 tokens.

    Row i ends after 3 + i tokens at most, so that finished rows stay and leave. "batched" are half
    as many rows at a time, whose places others take.
    """
    torch.manual_seed(0)
    with clock.device:
        model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(config.vocab_size, (1 + i % 9,), generator=generator).tolist()
        for i in range(count)
    ]
    found = {}
    batched = partial(stream_batched, batch_size=ceil(count / 2))
    loops: dict[str, Callable[..., Iterator[Token]]] = {**LOOPS, "batched": batched}
    for name, loop in loops.items():
        counts = [0] * count

        def should_stop(token: Token, counts: list[int] = counts) -> bool:
            counts[token.row] += 1
            return counts[token.row] == 3 + token.row

        tokens = loop(
            model, prompts, min(48, 3 + count), sampling=sampling, should_stop=should_stop
        )
        found[name] = sorted((token.row, i, token.id) for i, token in enumerate(tokens))
    said = {name: [(row, id_) for row, _, id_ in tokens] for name, tokens in found.items()}
    plain = said.pop("plain")
    return {
        "passed": all(tokens == plain for tokens in said.values()),
        "tokens": len(plain),
        "tokens_equal": {
            name: sum(a == b for a, b in zip(tokens, plain, strict=False))
            for name, tokens in said.items()
        },
        "different_tokens": len({id_ for _, id_ in plain}),
        "fused": can_fuse(model, count),
    }


@torch.inference_mode()
def measure_steps(clock: Clock, model: GPT, size: Size, repeats: int) -> Row:
    """Seconds per greedy decode step: "replayed" as `generate` does it, "called" from Python.

    Few rows are replayed by the fused kernels; "modules" is then a replay of the model's modules,
    which are also what is called. On a CPU nothing is replayed. "gb_per_s" counts the weights and
    the filled slots, each read once. `measure_start` adds what making the graph costs.
    """
    refusal = lacking_memory(model, size)
    if refusal is not None:
        return {"refused": refusal}
    cache, decoder = filled_decoder(model, size)
    start = measure_start(clock, model, cache, size.context)
    called = partial(decode_step, model, decoder.state, GREEDY)

    steps = partial(run_steps, cache, size.context)
    actions = {"replayed": partial(steps, decoder.run), "called": partial(steps, called)}
    if can_fuse(model, size.batch):
        actions["modules"] = partial(steps, Replay(called, model.device))
    times = clock.times(actions, repeats, f"decoding {size.batch} rows")
    seconds = {name: time["median"] / STEPS for name, time in times.items()}
    read = step_bytes(model, size)
    return {
        "seconds_per_step": seconds,
        **start,
        "tokens_per_s": size.batch / seconds["replayed"],
        "gb_per_s": read / seconds["replayed"] / 1e9,
        "bytes_per_step": read,
        "cache_bytes": cache_bytes(model.config, model.dtype, size.batch, size.context),
    }


def lacking_memory(model: GPT, size: Size) -> str | None:
    """Why the cache cannot be held, or None."""
    needed = cache_bytes(model.config, model.dtype, size.batch, size.context + STEPS)
    room = available_memory(model.device)
    if room is None or needed < 0.95 * room:
        return None
    return f"its cache takes {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free"


def filled_decoder(model: GPT, size: Size) -> tuple[KVCache, Decoder]:
    """A greedy decoder behind random tokens, and the cache of which it is a user."""
    slots = size.context + STEPS
    cache = KVCache(model.config, size.batch, slots, dtype=model.dtype, device=model.device)
    cache.kv.normal_()
    cache.advance(size.context)
    return cache, Decoder.new(model, cache, GREEDY, None, None, None)


def measure_start(clock: Clock, model: GPT, cache: KVCache, context: int) -> Row:
    """Seconds that the host sees of a new decoder's first run, of the second, in which its graph is
    made, and of the third, a replay: medians.

    Each generation has the first two. What a process has once, like compiling, is left out.
    """
    names = ("first_run_seconds", "recording_seconds", "replay_seconds")
    starts = []
    for _ in range(1 + STARTS):
        cache.lengths.fill_(context)
        decoder = Decoder.new(model, cache, GREEDY, None, None, None)
        starts.append([clock.wall(decoder.run) for _ in names])
    medians = map(statistics.median, zip(*starts[1:], strict=True))
    return dict(zip(names, medians, strict=True))


def run_steps(cache: KVCache, context: int, step: Callable[[], None]) -> None:
    """A decode step, STEPS times: behind `context` tokens per row, and those that it adds."""
    cache.lengths.fill_(context)
    for _ in range(STEPS):
        step()


def step_bytes(model: GPT, size: Size) -> int:
    """Weights and cache that a decode step has to read, each once.

    Of the embeddings of tokens and positions a step reads a few rows, but all of the `lm_head`,
    which may be the same weight.
    """
    seldom = [model.transformer.wpe.weight]
    if not model.config.tie_word_embeddings:
        seldom += model.transformer.wte.state_dict().values()
    tensors = [*model.parameters(), *model.buffers()]  # the scales of 8-bit weights are buffers
    weights = sum(x.nbytes for x in tensors) - sum(x.nbytes for x in seldom)
    return weights + cache_bytes(model.config, model.dtype, size.batch, size.context)


def measure_loops(clock: Clock, model: GPT, size: Size, new_tokens: int) -> Row:
    """Whole generations by both loops: seconds to the first tokens, then tokens per second.

    The second figure has all in it that a loop does: recording, reading tokens, and the rest.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    shape = (size.batch, size.context)
    prompts = torch.randint(vocabulary, shape, generator=generator).tolist()
    found: Row = {}
    for name, loop in LOOPS.items():
        for count in (4, new_tokens):  # the first is to warm up
            clock.synchronize()
            begin = time.perf_counter()
            moments = []
            tokens: Iterator[Token] = loop(model, prompts, count)
            for i, _ in enumerate(tokens):
                if i % size.batch == size.batch - 1:
                    moments.append(time.perf_counter())
        decoding = moments[-1] - moments[0]
        found[name] = {
            "first_token_seconds": moments[0] - begin,
            "tokens_per_s": size.batch * (new_tokens - 1) / decoding,
        }
        clock.release()
    return found


@torch.inference_mode()
def measure_prefill(clock: Clock, model: GPT, length: int, repeats: int) -> Row:
    """Seconds to read one prompt into an empty cache: whole, as `generate` does with one, and by
    four pieces, as it does with several that are as long."""
    config = model.config
    cache = KVCache(config, 1, length, dtype=model.dtype, device=model.device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (length,), generator=generator).tolist()

    def read(chunk: int) -> None:
        cache.set_lengths([0])
        prefill(model, cache, [prompt], chunk)

    actions = {"whole": partial(read, length), "by pieces": partial(read, ceil(length / 4))}
    times = clock.times(actions, repeats, f"prefill {length}")
    flops = prefill_flops(model, length)
    return {
        name: {
            "seconds": time["median"],
            "tokens_per_s": length / time["median"],
            "tflops": flops / time["median"] / 1e12,
        }
        for name, time in times.items()
    }


def prefill_flops(model: GPT, length: int) -> int:
    """Multiplications and additions of reading one prompt, hidden scores left out.

    The vocabulary projection is that of the last position alone.
    """
    config = model.config
    weights = sum(p.numel() for p in model.transformer.h.parameters() if p.ndim == 2)
    scores = length * (length + 1) // 2  # of one head
    attention = 4 * config.n_layer * config.n_embd * scores
    return 2 * length * weights + attention + 2 * config.n_embd * config.vocab_size


@torch.inference_mode()
def profile_step(clock: Clock, model: GPT, size: Size, repeats: int) -> Row:
    """The kernels of one replayed decode step, those that take longest first.

    On a CPU, operations instead of kernels. What is between the kernels' sum and the step's whole
    time, which is measured without the profiler, is waiting, or kernels beside each other.
    """
    cache, decoder = filled_decoder(model, size)
    for _ in range(2):
        decoder.run()  # the second records the graph
    steps = partial(run_steps, cache, size.context, decoder.run)
    times = clock.times({"steps": steps}, repeats, f"steps of {size.batch} rows")
    cache.lengths.fill_(size.context)
    activity = ProfilerActivity.CUDA if clock.has_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            decoder.run()
        clock.synchronize()
    attribute = "self_device_time_total" if clock.has_gpu else "self_cpu_time_total"
    kernels = [
        {
            "kernel": event.key,
            "count": event.count / STEPS,
            "microseconds": getattr(event, attribute) / STEPS,
        }
        for event in profiler.key_averages()
        if getattr(event, attribute) > 0  # what the host does takes no time of the device
    ]
    kernels.sort(key=lambda kernel: -kernel["microseconds"])
    return {
        "step_microseconds": times["steps"]["median"] / STEPS * 1e6,
        "kernels_microseconds": sum(kernel["microseconds"] for kernel in kernels),
        "kernels_per_step": sum(kernel["count"] for kernel in kernels),
        "kernels": kernels[:MOST_KERNELS],
    }
