"""How fast a model runs, beside what this machine can do at most and beside other programs.

The tests have the names of llama.cpp's llama-bench. Each is a greedy generation as the user of a
program calls it, counted in tokens per second of all rows together:

    pp512           a prompt of 512 tokens up to its first new token (prefill)
    tg128           128 new tokens behind a prompt of one: 128 passes of a token each (decode)
    pp512+tg128     both in one generation
    tg127 @ d512    the decode steps of it: its time less that of pp512 in the same round

Two ceilings give these rates a scale. A decode step has to read the weights and the cache: GB/s,
and as a share of what this machine reads, MBU (model bandwidth utilisation). A prefill has to
multiply: TFLOP/s, and as a share of what a matrix product does here, MFU (model FLOPs utilisation);
with 8-bit weights on a CPU, of what a layer of 8-bit weights does. All of it is measured in turn
with the tests, so that a busy machine lowers everything alike.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.attention import acting_backend, select_attention
from mqa_gpt.bench.ceilings import PROBE_BYTES, Ceilings, probes, reached
from mqa_gpt.bench.counts import decode_bytes, prefill_flops, weight_bytes
from mqa_gpt.bench.peers import OURS, PEERS, Contender, ours, require_peers
from mqa_gpt.bench.report import Report, Result
from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import (
    DEMO_DIR,
    as_device,
    as_dtype,
    empty_model,
    load_model,
    read_config,
)
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError, is_int, shown
from mqa_gpt.fast.int8 import check_method, is_quantized
from mqa_gpt.fast.int8 import quantize as quantize_model
from mqa_gpt.fast.packing import can_pack, pack, packing_bytes
from mqa_gpt.machine import available_memory, command_line, describe, peak_memory
from mqa_gpt.model import GPT
from mqa_gpt.progress import status

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]


class Request(NamedTuple):
    """One generation: `new` tokens behind each of `batch` prompts of `prompt` tokens."""

    batch: int
    prompt: int
    new: int


class Test(NamedTuple):
    """What a result is about.

    Attributes:
        request: the generation whose time counts.
        tokens: per row, that this time is divided among.
        less: a generation whose time is taken off, or None.
        decode: its steps as the positions that each attends to, its own included; empty if there
            is more in it than decoding.
        is_prefill: whether there is nothing in it but a prefill.
    """

    name: str
    request: Request
    tokens: int
    less: Request | None = None
    decode: range = range(0)
    is_prefill: bool = False


# ------------------------------------------------------------------------------------- measurement


def take_turns(
    actions: Mapping[Key, Callable[[], object]],
    repeats: int,
    label: str,
    clock: Clock = time.perf_counter,
) -> dict[Key, list[float]]:
    """Run all actions in turn, `repeats` times, and return the seconds of each.

    Taking turns gives every action the same share of a noisy machine's good and bad moments.

    Args:
        actions: key -> what to time. An action that returns a float has timed itself.
        label: of the progress bar on standard error.
        clock: the time in seconds.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in actions}
    for _ in tqdm(range(repeats), desc=label, leave=False, disable=None):
        for key, action in actions.items():
            begin = clock()
            measured = action()
            elapsed = clock() - begin
            seconds[key].append(measured if isinstance(measured, float) else elapsed)
    return seconds


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
    clock: Clock = time.perf_counter,
) -> Report:
    """Measure a model with random ids as prompts; see the module's text for what is measured.

    On a CPU the weights are packed, as by `LLM.load`.

    Args:
        shape: the name of an official shape, which gets random weights.
        model, revision: instead, a checkpoint (see `load_model`); the demo if there is neither.
        device, backend, quantize: see `load_model`. Peers get the weights as they were before.
        dtype: None keeps the checkpoint's; of a shape it is float32 on a CPU, elsewhere bfloat16.
        prompt_lengths, new_lengths: in tokens. 0 leaves out what would need them.
        batches: rows.
        repeats: rounds, after one that warms up.
        compare: programs that run the same weights in the same rounds: "transformers",
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
        raise InputError(f"the repeats are {shown(repeats)}: they must be an integer of at least 1")
    compare = list(dict.fromkeys(compare))
    require_peers(compare)
    with tempfile.TemporaryDirectory() as folder:
        with status() as say:
            say("loading")
            gpt = _load(shape, model, revision, device, dtype, backend, tests, compare)
            if compare and is_quantized(gpt):
                raise InputError(
                    f"{model} holds 8-bit weights, which {' and '.join(compare)} cannot read: "
                    "compare the checkpoint that they were made from, with quantize='int8' "
                    "(--quantize int8)"
                )
            if compare:
                gpt.save_pretrained(folder)
            if quantize is not None and not is_quantized(gpt):
                quantize_model(gpt)
            if can_pack(gpt):
                pack(gpt)
            prompts = {test.request: random_prompts(gpt.config, test.request) for test in tests}
            say("warming up")
            contenders = [ours(gpt)]
            written = {(OURS, r): contenders[0].generate(ids, r.new) for r, ids in prompts.items()}
            peak = peak_memory(gpt.device)
            for name in compare:
                say(f"loading {name} and warming it up")
                for peer in PEERS[name].load(Path(folder), gpt):
                    contenders.append(peer)
                    written |= {
                        (peer.name, r): peer.generate(ids, r.new) for r, ids in prompts.items()
                    }
            say("warming up the measurement of the ceilings")
            in_8_bits = any(contender.itemsize == 1 for contender in contenders)
            limits = probes(gpt.device, gpt.dtype, in_8_bits)
            for probe in limits.values():
                probe.run()
        actions: dict[Any, Callable[[], object]] = {
            (contender.name, request): partial(contender.generate, ids, request.new)
            for request, ids in prompts.items()
            for contender in contenders
        }
        actions |= {name: probe.run for name, probe in limits.items()}
        seconds = take_turns(actions, repeats, "measuring", clock)

    ceilings = reached(limits, seconds)
    return Report(
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
        weight_bytes=weight_bytes(gpt.config, contenders[0].itemsize),
        cache_bytes_per_token=cache_bytes(gpt.config, gpt.dtype),
        peak_memory_bytes=peak,
        ceilings=ceilings,
        results=[
            _result(test, contender, gpt, seconds, written, ceilings)
            for test in tests
            for contender in contenders
        ],
        command=command_line(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        environment=describe(),
    )


def plan(
    prompt_lengths: Sequence[int], new_lengths: Sequence[int], batches: Sequence[int]
) -> list[Test]:
    """All tests of these lengths, and of their pairs, in each batch size.

    Raises:
        InputError: a number that is too small, or no test at all.
    """
    for what, numbers, least in (
        ("prompt length", prompt_lengths, 0),
        ("number of new tokens", new_lengths, 0),
        ("batch size", batches, 1),
    ):
        for number in numbers:
            if not is_int(number) or number < least:
                raise InputError(
                    f"the {what} is {shown(number)}: it must be an integer of at least {least}"
                )
    tests = []
    reads, writes = ([n for n in dict.fromkeys(ns) if n] for ns in (prompt_lengths, new_lengths))
    for batch in dict.fromkeys(batches):
        for P in reads:
            tests.append(Test(f"pp{P}", Request(batch, P, 1), P, is_prefill=True))
        for N in writes:
            tests.append(Test(f"tg{N}", Request(batch, 1, N), N, decode=range(1, N + 1)))
        for P, N in itertools.product(reads, writes):
            both, prefill = Request(batch, P, N), Request(batch, P, 1)
            tests.append(Test(f"pp{P}+tg{N}", both, P + N))
            if N > 1:
                name, steps = f"tg{N - 1} @ d{P}", range(P + 1, P + N)
                tests.append(Test(name, both, N - 1, prefill, decode=steps))
    if not tests:
        raise InputError("there is nothing to measure: no prompt and no new token is asked for")
    return tests


def random_prompts(config: GPTConfig, request: Request) -> list[list[int]]:
    """Random ids, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    shape = (request.batch, request.prompt)
    return torch.randint(config.vocab_size, shape, generator=generator).tolist()


def random_model(
    config: GPTConfig, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> GPT:
    """A model of random weights, made where it will be used, in evaluation mode.

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
    """The model to be measured, once it is known that the tests fit into context and memory."""
    if shape is None:
        folder = resolve(DEMO_DIR if name is None else name, revision)
        _require_context(read_config(folder), tests)
        model = load_model(folder, device=device, dtype=dtype, backend=backend)
        _require_room(model, model.dtype, model.device, tests, compare, loaded=True)
        return model
    if name is not None or revision is not None:
        raise InputError(
            "--shape makes a model of random weights, and --model and --revision name one that "
            "has weights: leave out the one or the other"
        )
    config = GPTConfig.preset(shape)
    _require_context(config, tests)
    place = as_device(device)
    kind = as_dtype(dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16))
    select_attention(backend, place)  # a wrong name is said before the work, not after
    _require_room(empty_model(config), kind, place, tests, compare, loaded=False)
    return random_model(config, kind, place, backend)


def _require_context(config: GPTConfig, tests: list[Test]) -> None:
    """Raise InputError if a test is longer than the model's context."""
    longest = max(test.request.prompt + test.request.new for test in tests)
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
        cache_bytes(model.config, dtype, request.batch, request.prompt + request.new)
        for request in (test.request for test in tests)
    )
    needed = copies * weights + packing_bytes(model, dtype, device) + cache + PROBE_BYTES
    room = available_memory(device)
    if room is not None and needed > room:
        raise InputError(
            f"this needs {needed / 1e9:,.2f} GB more, of which {copies * weights / 1e9:,.2f} GB "
            f"are for weights in {str(dtype).removeprefix('torch.')} and {cache / 1e9:,.2f} GB for "
            f"the KV cache, but {room / 1e9:,.2f} GB are available on {device}: take a smaller "
            "model, --dtype or batch, or compare with less"
        )


def _result(
    test: Test,
    contender: Contender,
    model: GPT,
    seconds: Mapping[Any, list[float]],
    written: Mapping[Any, list[list[int]]],
    ceilings: Ceilings,
) -> Result:
    """One test's figures from the seconds of everything that ran."""

    def times(name: str) -> list[float]:
        whole = seconds[name, test.request]
        taken_off = [0.0] * len(whole) if test.less is None else seconds[name, test.less]
        return [a - b for a, b in zip(whole, taken_off, strict=True)]

    batch, own = test.request.batch, times(contender.name)
    tokens = batch * test.tokens
    rates = [_ratio(tokens, time) for time in own]
    median = statistics.median(own)
    gb_per_s = tflops = None
    if test.decode:
        read = decode_bytes(model.config, batch, test.decode, contender.itemsize, model.dtype)
        gb_per_s = _ratio(read / 1e9, median)
    if test.is_prefill:
        tflops = _ratio(prefill_flops(model.config, batch, test.tokens) / 1e12, median)
    is_peer = contender.name != OURS
    pairs = zip(own, times(OURS), strict=True)
    ratios = [theirs / mine for theirs, mine in pairs if min(theirs, mine) > 0]
    return Result(
        test=test.name,
        batch=batch,
        contender=contender.name,
        tokens=tokens,
        mean=statistics.fmean(rates),
        stdev=_stdev(rates),
        median=_ratio(tokens, median),
        gb_per_s=gb_per_s,
        mbu=None if gb_per_s is None else gb_per_s / ceilings.gb_per_s,
        tflops=tflops,
        mfu=None if tflops is None else tflops / ceilings.tflops(contender.itemsize),
        ours_faster=statistics.median(ratios or [math.nan]) if is_peer else None,
        same_tokens=(
            written[contender.name, test.request] == written[OURS, test.request]
            if is_peer
            else None
        ),
        seconds=own,
    )


def _stdev(values: list[float]) -> float:
    if any(map(math.isnan, values)):  # which `statistics` trips over
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _ratio(a: float, b: float) -> float:
    """a / b, but NaN where noise has made a difference of two times zero or less."""
    return a / b if b > 0 else math.nan
