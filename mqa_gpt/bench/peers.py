"""The programs that `mqa_gpt.bench.run` times: this one, and others that run the same weights.

All of them generate greedily and never stop early, so that they do the same work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch

from mqa_gpt.errors import InputError, shown
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.request import make_requests
from mqa_gpt.machine import INSTALL_PEERS, version
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY
from mqa_gpt.verify.compare import quiet_transformers

OURS = "mqa-gpt"
OPENVINO = "it needs an older transformers, so see docs/bench.md for an environment of its own"


class Written(NamedTuple):
    """New tokens of each prompt, and the seconds until every prompt had its first."""

    tokens: list[list[int]]
    first_seconds: float


# (prompts, all of one length; count) -> `count` new tokens per prompt, computed on return
Generate = Callable[[list[list[int]], int], Written]


@dataclass(frozen=True)
class Program:
    """A program with the weights loaded; `itemsize` is the bytes it reads per weight."""

    name: str
    generate: Generate
    itemsize: int


class Peer(NamedTuple):
    """How to load another program.

    Attributes:
        load: (folder, model) -> its programs, one per precision; the folder holds the model as a
            checkpoint.
        packages: what has to be installed.
        copies: how often the weights are in memory at the peak.
        install: how to get them.
    """

    load: Callable[[Path, GPT], Iterator[Program]]
    packages: tuple[str, ...]
    copies: int
    install: str = f"run {INSTALL_PEERS} in the checkout"


def ours(model: GPT) -> Program:
    """This implementation: what `mqa_gpt.generate` does, step by step."""

    def run(prompts: list[list[int]], count: int) -> Written:
        begin, first = time.perf_counter(), 0.0
        tokens: list[list[int]] = [[] for _ in prompts]
        requests = make_requests(model.config, prompts, count, GREEDY)
        engine = Engine.for_requests(model, requests)
        for request in requests:
            engine.add(request)
        while engine.is_busy:
            for token in engine.step():
                tokens[token.row].append(token.id)
            first = first or time.perf_counter() - begin
        return Written(tokens, first)

    return Program(OURS, run, 1 if is_quantized(model) else model.dtype.itemsize)


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder in `parent`, or where temporary files go, deleted even if SIGTERM ends the process.

    Checkpoints in it take gigabytes, which nothing else would delete.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    is_ours = (
        threading.current_thread() is threading.main_thread()  # no other may set a handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="mqa-gpt-", dir=parent) as folder:
            yield Path(folder)
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def require_peers(names: Sequence[str]) -> None:
    """Raise InputError if one of these programs is unknown or not installed."""
    for name in names:
        if not isinstance(name, str) or name not in PEERS:
            raise InputError(
                f"there is no program {shown(name)} to compare with: there are {', '.join(PEERS)}"
            )
        missing = [package for package in PEERS[name].packages if version(package) is None]
        if missing:
            raise InputError(
                f"comparing with {name} needs {' and '.join(missing)}, not installed here: "
                f"{PEERS[name].install}"
            )


def load_transformers(folder: Path, model: GPT) -> Iterator[Program]:
    """transformers' `generate` with its defaults."""
    transformers: Any = import_module("transformers")
    with quiet_transformers():
        theirs = transformers.GPTBigCodeForCausalLM.from_pretrained(folder, dtype=model.dtype)
    theirs.to(model.device)
    yield Program("transformers", _transformers_generate(theirs), model.dtype.itemsize)


def load_openvino(folder: Path, model: GPT) -> Iterator[Program]:
    """OpenVINO through Optimum, with weights in float32 and in 8 bits; it computes in float32."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise InputError(
            f"openvino is compared in float32 on a CPU, but the model is in {model.dtype} on "
            f"{model.device}: choose --dtype float32 --device cpu"
        )
    with redirect_stdout(sys.stderr):  # where it prints what it does
        optimum: Any = import_module("optimum.intel")
        int8 = optimum.OVWeightQuantizationConfig(bits=8, sym=True)
    settings = {
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    for name, quantization, itemsize in (("float32", None, 4), ("int8", int8, 1)):
        with quiet_transformers(), redirect_stdout(sys.stderr):
            theirs = optimum.OVModelForCausalLM.from_pretrained(
                folder,
                export=True,
                load_in_8bit=False,
                quantization_config=quantization,
                ov_config=settings,
            )
        yield Program(f"openvino {name}", _transformers_generate(theirs), itemsize)


def _transformers_generate(theirs: Any) -> Generate:
    """The `generate` of transformers, whatever computes its logits."""
    transformers: Any = import_module("transformers")
    # Without an end token all have the full length.
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def run(prompts: list[list[int]], count: int) -> Written:
        times = _Times()
        ids = torch.tensor(prompts, device=theirs.device)  # (B, T)
        mask = torch.ones_like(ids)
        output = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, streamer=times
        )
        return Written(output[:, ids.shape[1] :].tolist(), times.seconds[1])

    return run


class _Times:
    """A streamer of transformers: seconds until the prompts, the first tokens, ... come."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter() - self._begin)

    def end(self) -> None:
        pass


def load_ctranslate2(folder: Path, model: GPT) -> Iterator[Program]:
    """CTranslate2 with weights in the model's dtype and in 8 bits, where it supports them here.

    Each runs in a process of its own: once CTranslate2 has computed, PyTorch's products take up to
    twice as long for the rest of that process. Idle processes do not disturb.
    """
    ctranslate2: Any = import_module("ctranslate2")
    if not model.config.multi_query:
        raise InputError(
            "ctranslate2 runs this architecture with one key/value head only, and this model has "
            "one per query head: compare it with transformers"
        )
    dtype, device = str(model.dtype).removeprefix("torch."), model.device
    supported = ctranslate2.get_supported_compute_types(device.type)
    types = {dtype: model.dtype.itemsize, f"int8_{dtype}": 1}
    if not supported & types.keys():
        raise InputError(
            f"ctranslate2 does not compute in {dtype} on this {device.type}, but in "
            f"{', '.join(sorted(supported))}: choose another --dtype"
        )
    converted = folder / "ctranslate2"
    convert_for_ctranslate2(folder, converted)

    def program(compute_type: str) -> Program:
        options = {
            "device": device.type,
            "device_index": device.index or 0,
            "compute_type": compute_type,
            "inter_threads": 1,
            "intra_threads": torch.get_num_threads(),
        }
        process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _load_generator, (str(converted), options)
        )
        process.submit(_generate, [[0]], 1).result()  # the files are read before they are deleted

        def run(prompts: list[list[int]], count: int) -> Written:
            return process.submit(_generate, prompts, count).result()

        label = compute_type.partition("_")[0]
        return Program(f"ctranslate2 {label}", run, types[compute_type])

    yield from (program(name) for name in types if name in supported)


def convert_for_ctranslate2(folder: Path, target: Path) -> None:
    """Write a checkpoint in CTranslate2's form; its own folder gets another tokenizer."""
    converters: Any = import_module("ctranslate2.converters")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    # It takes tokens as strings, so they get names: "0", "1", ...
    names = {str(token): token for token in range(size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "0", "eos_token": "0", "unk_token": "0"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with quiet_transformers():
        converters.TransformersConverter(str(folder)).convert(str(target))


def end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed.

    Otherwise a worker of a pool would wait for work forever, with the weights in memory.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_generator: Any = None  # CTranslate2's, in a worker process


def _load_generator(folder: str, options: dict[str, Any]) -> None:
    global _generator
    end_with_parent()
    ctranslate2: Any = import_module("ctranslate2")
    _generator = ctranslate2.Generator(folder, **options)


def _generate(prompts: list[list[int]], count: int) -> Written:
    begin, first = time.perf_counter(), 0.0

    def seen(result: Any) -> bool:
        nonlocal first
        if result.step == 0:
            first = time.perf_counter() - begin
        return False  # go on

    results = _generator.generate_batch(
        [[str(token) for token in prompt] for prompt in prompts],
        max_length=count,
        end_token=[],
        include_prompt_in_result=False,
        callback=seen,
    )
    return Written([result.sequences_ids[0] for result in results], first)


PEERS = {
    "transformers": Peer(load_transformers, ("transformers",), 1),
    "ctranslate2": Peer(load_ctranslate2, ("ctranslate2", "transformers"), 3),
    "openvino": Peer(load_openvino, ("optimum-intel", "openvino"), 4, OPENVINO),
}
