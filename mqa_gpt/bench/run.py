"""How fast a model runs, next to what this machine can do at most and next to other programs.

The tests are named as in llama.cpp's llama-bench. Each is a greedy generation as a user of the
program calls it, in tokens per second of all rows together:

    pp512           a prompt of 512 tokens up to its first new token (prefill)
    tg128           128 new tokens after a prompt of one: 128 passes of a token each (decode)
    pp512+tg128     both in one generation
    tg127 @ d512    its decode steps: its time from the first token on

Two ceilings give these rates a scale. A decode step has to read the weights and the cache: GB/s,
and as a share of what this machine reads, MBU (model bandwidth utilisation). A prefill has to
multiply: TFLOP/s, and as a share of the rate of a matrix product, MFU (model FLOPs utilisation);
with 8-bit weights on a CPU, of a product of 8-bit integers. Ceilings and tests are measured in
turn, and the fastest round of a ceiling counts.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch

from mqa_gpt.attention import acting_backend, select_attention
from mqa_gpt.bench.ceilings import PROBE_BYTES, Ceilings, probes, reached
from mqa_gpt.bench.counts import decode_bytes, prefill_flops, weight_bytes
from mqa_gpt.bench.peers import OURS, PEERS, Program, ours, require_peers, temporary_folder
from mqa_gpt.bench.report import BenchReport, Result
from mqa_gpt.bench.timing import take_turns
from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.headers import read_checkpoint
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import DEMO_DIR, empty_model, load_model
from mqa_gpt.checkpoints.placement import as_device, as_dtype, fast_dtype
from mqa_gpt.config import PRESETS, GPTConfig
from mqa_gpt.errors import InputError, is_int, shown
from mqa_gpt.fast.int8 import check_method, is_quantized
from mqa_gpt.fast.int8 import quantize as quantize_model
from mqa_gpt.machine import available_memory, command_line, describe, peak_memory
from mqa_gpt.model import GPT
from mqa_gpt.progress import status


class Workload(NamedTuple):
    """A generation: `new` tokens after each of `batch` prompts of `prompt` tokens."""

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt}+{self.new} tokens"


class Test(NamedTuple):
    """What one result measures.

    Attributes:
        workload: the generation whose time counts.
        tokens: per row, which the rate counts.
        after_first: whether only the time after the first token counts.
        decode: if it is decoding alone, the positions each step attends to, its own included.
        is_prefill: whether it is a prefill alone.
    """

    name: str
    workload: Workload
    tokens: int
    after_first: bool = False
    decode: range = range(0)
    is_prefill: bool = False


def benchmark(
    *,
    shape: str | None = None,
    model: str | PathLike[str] | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    prompt_lengths: Sequence[int] = (512,),
    new_lengths: Sequence[int] = (128,),
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    compare: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> BenchReport:
    """Measure a model on random prompts; the module's docstring says what is measured.

    Args:
        shape: the name of a preset, which gets random weights.
        model, revision: instead, a checkpoint (see `load_model`); the demo if there is neither.
        device, backend, quantize: see `load_model`. Peers get the weights before quantization.
        dtype: None is what `LLM.load` chooses for a checkpoint; for a shape it is float32 on a CPU,
            else bfloat16.
        prompt_lengths, new_lengths: in tokens. 0 leaves out the tests that would need them.
        batches: rows.
        repeats: rounds, after one to warm up.
        compare: other programs to run the same weights in the same rounds: "transformers",
            "ctranslate2".
        clock: the time in seconds.

    Raises:
        InputError: an option that cannot be used, a program that is not installed, or too little
            memory.
        CheckpointError, ConfigError: see `load_model`.
    """
    check_method(quantize)
    tests = plan(prompt_lengths, new_lengths, batches)
    if not is_int(repeats) or repeats < 1:
        raise InputError(f"repeats is {shown(repeats)}: it must be an integer of at least 1")
    require_peers(_listed("compare", compare))
    compare = list(dict.fromkeys(compare))
    with status() as say, temporary_folder() as folder:
        say("loading")
        gpt = _load(shape, model, revision, device, dtype, backend, tests, compare)
        if compare and is_quantized(gpt):
            raise InputError(
                f"{model} holds 8-bit weights, which {' and '.join(compare)} cannot read: "
                "compare the checkpoint that they were made from, with quantize='int8' "
                "(--quantize int8)"
            )
        if compare:
            say("writing a checkpoint for the other programs")
            gpt.save_pretrained(folder)
        if quantize is not None and not is_quantized(gpt):
            quantize_model(gpt)
        prompts = {test.workload: random_prompts(gpt.config, test.workload) for test in tests}
        programs: list[Program] = []
        written = {}
        peak = None

        def add(program: Program) -> None:
            programs.append(program)
            for workload, ids in prompts.items():
                say(f"warming up: {program.name} {workload}")
                written[program.name, workload] = program.generate(ids, workload.new).tokens

        add(ours(gpt))
        peak = peak_memory(gpt.device)
        for name in compare:
            say(f"loading {name}")
            for peer in PEERS[name].load(folder, gpt):
                add(peer)
        say("warming up the measurement of the ceilings")
        in_8_bits = any(program.itemsize == 1 for program in programs)
        limits = probes(gpt.device, gpt.dtype, in_8_bits)
        for probe in limits.values():
            probe.run()
    firsts: dict[Any, list[float]] = defaultdict(list)  # seconds until the first token

    def generate(program: Program, workload: Workload) -> None:
        result = program.generate(prompts[workload], workload.new)
        firsts[program.name, workload].append(result.first_seconds)

    actions: dict[Any, Callable[[], object]] = {
        (program.name, workload): partial(generate, program, workload)
        for workload in prompts
        for program in programs
    }
    actions |= {name: probe.run for name, probe in limits.items()}
    seconds = take_turns(actions, int(repeats), "measuring", clock)

    ceilings = reached(limits, seconds)
    return BenchReport(
        model=shape or ("demo" if model is None else str(model)),
        weights="checkpoint" if shape is None else "random",
        config=gpt.config.to_dict(),
        parameters=gpt.config.parameters,
        dtype=str(gpt.dtype).removeprefix("torch."),
        device=str(gpt.device),
        backend=acting_backend(backend, gpt.device, gpt.dtype, gpt.config.head_dim),
        asked_backend=backend,
        quantize=quantize,
        repeats=repeats,
        weight_bytes=weight_bytes(gpt.config, programs[0].itemsize),
        cache_bytes_per_token=cache_bytes(gpt.config, gpt.dtype),
        peak_memory_bytes=peak,
        ceilings=ceilings,
        results=[
            _result(test, program, gpt, seconds, firsts, written, ceilings)
            for test in tests
            for program in programs
        ],
        command=command_line(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        environment=describe(),
    )


def plan(
    prompt_lengths: Sequence[int], new_lengths: Sequence[int], batches: Sequence[int]
) -> list[Test]:
    """The tests of all these lengths, and of their pairs, for every batch size.

    Raises:
        InputError: a number that is too small, or no test at all.
    """

    def numbers(name: str, values: Sequence[int], what: str, least: int) -> list[int]:
        for number in _listed(name, values):
            if not is_int(number) or number < least:
                raise InputError(
                    f"the {what} is {shown(number)}: it must be an integer of at least {least}"
                )
        return [number for number in dict.fromkeys(map(int, values)) if number]

    reads = numbers("prompt_lengths", prompt_lengths, "prompt length", 0)
    writes = numbers("new_lengths", new_lengths, "number of new tokens", 0)
    tests = []
    for batch in numbers("batches", batches, "batch size", 1):
        for P in reads:
            tests.append(Test(f"pp{P}", Workload(batch, P, 1), P, is_prefill=True))
        for N in writes:
            tests.append(Test(f"tg{N}", Workload(batch, 1, N), N, decode=range(1, N + 1)))
        for P, N in itertools.product(reads, writes):
            both = Workload(batch, P, N)
            tests.append(Test(f"pp{P}+tg{N}", both, P + N))
            if N > 1:
                name, steps = f"tg{N - 1} @ d{P}", range(P + 1, P + N)
                tests.append(Test(name, both, N - 1, after_first=True, decode=steps))
    if not tests:
        raise InputError("there is nothing to measure: ask for prompt tokens or new tokens")
    return tests


def _listed(name: str, values: Any) -> list[Any]:
    """A list argument; a text is none, though it can be iterated."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise InputError(f"{name} is {shown(values)}: it must be a list")
    return list(values)


def random_prompts(config: GPTConfig, workload: Workload) -> list[list[int]]:
    """Random ids, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch, workload.prompt)
    return torch.randint(config.vocab_size, shape, generator=generator).tolist()


def random_model(
    config: GPTConfig, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> GPT:
    """A model with random weights, created on the device it will run on, in evaluation mode.

    Biases are random too: a GPU multiplies zeros with less power, and so at a higher clock.
    """
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(0)
    std = config.initializer_range
    state = {}
    for name, parameter in model.named_parameters():
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        state[name] = values.normal_(mean, std, generator=generator)
    model.load_state_dict(state, assign=True, strict=False)  # a tied head has no entry of its own
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.set_backend(backend)
    return model.eval()


def _load(
    shape: str | None,
    name: str | PathLike[str] | None,
    revision: str | None,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    backend: str,
    tests: list[Test],
    compare: Sequence[str],
) -> GPT:
    """The model to measure, after checking that the tests fit into context and memory."""
    if shape is None:
        checkpoint = read_checkpoint(resolve(DEMO_DIR if name is None else name, revision))
        config = checkpoint.config
        _require_context(config, tests)
        if dtype is None:  # as `LLM.load`, so that what is measured is what generates
            dtype, _ = fast_dtype(checkpoint.dtype, as_device(device), config.parameters)
        model = load_model(checkpoint, device=device, dtype=dtype, backend=backend)
        _require_room(model, model.dtype, model.device, tests, compare, loaded=True)
        return model
    if name is not None or revision is not None:
        raise InputError(
            "--preset makes a model with random weights, and --model and --revision name one that "
            "has weights: leave out one or the other"
        )
    if not isinstance(shape, str):
        raise InputError(f"shape is {shown(shape)}: it must be one of {', '.join(PRESETS)}")
    config = GPTConfig.preset(shape)
    _require_context(config, tests)
    where = as_device(device)
    kind = as_dtype(dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16))
    select_attention(backend, where)  # fail early on an unknown name
    _require_room(empty_model(config), kind, where, tests, compare, loaded=False)
    return random_model(config, kind, where, backend)


def _require_context(config: GPTConfig, tests: list[Test]) -> None:
    """Raise InputError if a test is longer than the model's context."""
    longest = max(test.workload.prompt + test.workload.new for test in tests)
    if longest > config.n_positions:
        raise InputError(
            f"the longest test has {longest:,} tokens, and the context of the model "
            f"{config.n_positions:,}: measure shorter prompts or fewer new tokens"
        )


def _require_room(
    model: GPT,
    dtype: torch.dtype,
    device: torch.device,
    tests: list[Test],
    compare: Sequence[str],
    *,
    loaded: bool,
) -> None:
    """Raise InputError if weights, largest cache, probes and peers exceed the memory left."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    copies = sum(PEERS[name].copies for name in compare) + (not loaded)
    cache = max(
        cache_bytes(model.config, dtype, workload.batch, workload.prompt + workload.new)
        for workload in (test.workload for test in tests)
    )
    needed = copies * weights + cache + PROBE_BYTES
    room = available_memory(device)
    if room is not None and needed > room:
        raise InputError(
            f"this needs {needed / 1e9:,.2f} GB more, of which {copies * weights / 1e9:,.2f} GB "
            f"are for weights in {str(dtype).removeprefix('torch.')} and {cache / 1e9:,.2f} GB for "
            f"the KV cache, but {room / 1e9:,.2f} GB are available on {device}: choose a smaller "
            "model, --dtype or batch, or compare with fewer programs"
        )


def _result(
    test: Test,
    program: Program,
    model: GPT,
    seconds: Mapping[Any, list[float]],
    firsts: Mapping[Any, list[float]],
    written: Mapping[Any, list[list[int]]],
    ceilings: Ceilings,
) -> Result:
    """One test's figures for one program, from the seconds of everything that ran."""

    def times(name: str) -> list[float]:
        whole = seconds[name, test.workload]
        if not test.after_first:
            return whole
        return [a - b for a, b in zip(whole, firsts[name, test.workload], strict=True)]

    batch, own = test.workload.batch, times(program.name)
    tokens = batch * test.tokens
    rates = [tokens / time for time in own]
    median = statistics.median(own)
    gb_per_s = tflops = None
    if test.decode:
        read = decode_bytes(model.config, batch, test.decode, program.itemsize, model.dtype)
        gb_per_s = read / 1e9 / median
    if test.is_prefill:
        tflops = prefill_flops(model.config, batch, test.tokens) / 1e12 / median
    ours_faster = same_tokens = None
    if program.name != OURS:
        rounds = zip(own, times(OURS), strict=True)
        ours_faster = statistics.median(theirs / mine for theirs, mine in rounds)
        same_tokens = written[program.name, test.workload] == written[OURS, test.workload]
    return Result(
        test=test.name,
        batch=batch,
        contender=program.name,
        tokens=tokens,
        mean=statistics.fmean(rates),
        stdev=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        median=tokens / median,
        gb_per_s=gb_per_s,
        mbu=None if gb_per_s is None else gb_per_s / ceilings.gb_per_s,
        tflops=tflops,
        mfu=None if tflops is None else tflops / ceilings.tflops(program.itemsize),
        ours_faster=ours_faster,
        same_tokens=same_tokens,
        seconds=own,
    )
