"""What `mqa_gpt.bench.run` times: this implementation, and others that run the same weights.

All of them generate greedily and never stop early, so that they do the same work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch

from mqa_gpt.errors import InputError
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.generation.request import generate
from mqa_gpt.machine import INSTALL_PEERS, version
from mqa_gpt.model import GPT
from mqa_gpt.verify.compare import quiet_transformers

OURS = "mqa-gpt"

# (prompts, all of one length; how many) -> so many new tokens per prompt, computed on return
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Contender:
    """A program with the weights loaded; `itemsize` is bytes per weight as it reads them."""

    name: str
    generate: Generate
    itemsize: int


class Peer(NamedTuple):
    """How to load a peer.

    Attributes:
        load: (folder, model) -> its contenders; the folder holds the model as a checkpoint.
        packages: that it needs.
        copies: of the weights that are in memory at its worst moment.
    """

    load: Callable[[Path, GPT], Iterator[Contender]]
    packages: tuple[str, ...]
    copies: int


def ours(model: GPT) -> Contender:
    """This implementation."""
    itemsize = 1 if is_quantized(model) else model.dtype.itemsize
    return Contender(OURS, lambda prompts, n: generate(model, prompts, n), itemsize)


def require_peers(names: Sequence[str]) -> None:
    """Raise InputError if a peer is unknown or not installed."""
    for name in names:
        if name not in PEERS:
            raise InputError(f"there is no peer {name!r}: accepted are {', '.join(PEERS)}")
        missing = [package for package in PEERS[name].packages if version(package) is None]
        if missing:
            raise InputError(
                f"comparing with {name} needs {' and '.join(missing)}, not installed here: "
                f"run {INSTALL_PEERS} in the checkout"
            )


def load_transformers(folder: Path, model: GPT) -> Iterator[Contender]:
    """transformers' `generate` with its defaults."""
    transformers: Any = import_module("transformers")
    with quiet_transformers():
        theirs = transformers.GPTBigCodeForCausalLM.from_pretrained(folder, dtype=model.dtype)
    theirs.to(model.device)
    # No end token: full length.
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)  # (B, T)
        mask = torch.ones_like(ids)
        output = theirs.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return output[:, ids.shape[1] :].tolist()

    yield Contender("transformers", run, model.dtype.itemsize)


def load_ctranslate2(folder: Path, model: GPT) -> Iterator[Contender]:
    """CTranslate2 with weights of the model's dtype and of 8 bits, as far as it has them here.

    Each runs in a process of its own: where CTranslate2 has once computed, PyTorch's products take
    up to twice as long for the rest of the process, and what is idle does not disturb.
    """
    ctranslate2: Any = import_module("ctranslate2")
    converters: Any = import_module("ctranslate2.converters")
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
    # It takes tokens by their names, so they get names: "0", "1", ...
    names = {str(token): token for token in range(model.config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "0", "eos_token": "0", "unk_token": "0"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    converted = str(folder / "ctranslate2")
    with quiet_transformers():
        converters.TransformersConverter(str(folder)).convert(converted)

    def contender(compute_type: str) -> Contender:
        options = {
            "device": device.type,
            "device_index": device.index or 0,
            "compute_type": compute_type,
            "inter_threads": 1,
            "intra_threads": torch.get_num_threads(),
        }
        process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _load_generator, (converted, options)
        )
        process.submit(_generate, [[0]], 1).result()  # the files are read before they are deleted

        def run(prompts: list[list[int]], count: int) -> list[list[int]]:
            return process.submit(_generate, prompts, count).result()

        label = compute_type.partition("_")[0]
        return Contender(f"ctranslate2 {label}", run, types[compute_type])

    yield from (contender(name) for name in types if name in supported)


def end_with_parent() -> None:
    """End this process once the one that started it has ended, even if it was killed.

    A worker of a pool would else wait for work for ever, with the weights in memory.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_generator: Any = None  # CTranslate2's, in its process


def _load_generator(folder: str, options: dict[str, Any]) -> None:
    global _generator
    end_with_parent()
    ctranslate2: Any = import_module("ctranslate2")
    _generator = ctranslate2.Generator(folder, **options)


def _generate(prompts: list[list[int]], count: int) -> list[list[int]]:
    results = _generator.generate_batch(
        [[str(token) for token in prompt] for prompt in prompts],
        max_length=count,
        end_token=[],
        include_prompt_in_result=False,
    )
    return [result.sequences_ids[0] for result in results]


PEERS = {
    "transformers": Peer(load_transformers, ("transformers",), 1),
    "ctranslate2": Peer(load_ctranslate2, ("ctranslate2", "transformers"), 3),
}
