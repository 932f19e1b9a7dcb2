"""Checks of lesson 2's exercises, against the library's counts and its greedy decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from checks import checker
from mqa_gpt import GPT, GPTConfig, generate
from mqa_gpt.bench.counts import decode_bytes, weight_bytes
from mqa_gpt.cache import cache_bytes

SHAPES = ("tiny_starcoder_py", "starcoderbase-1b", "starcoderbase-7b")


def _cache_size(f: Callable[..., Any]) -> str | None:
    for shape in SHAPES:
        for multi_query in (True, False):
            config = dataclasses.replace(GPTConfig.preset(shape), multi_query=multi_query)
            L, G, D = config.n_layer, config.n_kv_head, config.head_dim
            for dtype, tokens in ((torch.bfloat16, 100), (torch.float32, 8192)):
                got = f(L, G, D, tokens, dtype.itemsize)
                right = cache_bytes(config, dtype, rows=1, slots=tokens)
                if got == right:
                    continue
                if 2 * got == right:
                    return "half of it: a token keeps a key and a value"
                call = f"{L} layers, {G} heads of {D}, {tokens} tokens of {dtype.itemsize} bytes"
                return f"for {call} it gives {got:,}; the library counts {right:,}"
    return None


def _step_speedup(f: Callable[..., Any]) -> str | None:
    for shape in SHAPES:
        mqa = GPTConfig.preset(shape)
        weights, H = weight_bytes(mqa, 2), mqa.n_head
        per_token = cache_bytes(dataclasses.replace(mqa, multi_query=False), torch.bfloat16)
        for texts, context in ((1, 1), (1, 2048), (8, 512), (64, 8192)):
            mqa_step = decode_bytes(mqa, texts, [context], 2, torch.bfloat16)
            right = (weights + texts * context * per_token) / mqa_step
            got = f(weights, per_token, H, texts, context)
            if math.isclose(got, right, rel_tol=1e-6):
                continue
            if math.isclose(got, 1 / right, rel_tol=1e-6):
                return "the wrong way round: divide the time of MHA by that of MQA"
            if math.isclose(got, H, rel_tol=1e-6):
                return "only the cache becomes H times smaller: both steps also read the weights"
            one_text = (weights + context * per_token) / (weights + context * per_token / H)
            if math.isclose(got, one_text, rel_tol=1e-6):
                return "right for one text: each text has a cache of its own"
            where = f"{texts} texts of {context} tokens in the shape of {shape}"
            return f"for {where} it gives {got:.4f}; the bytes of the library give {right:.4f}"
    return None


class _Counted(GPT):
    """A tiny model that notes how many tokens each pass gets."""

    def forward(
        self, ids: torch.Tensor, cache: Any = None, logits_at: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.passes.append(ids.shape[1])
        return super().forward(ids, cache, logits_at)


def _write_greedily(f: Callable[..., Any]) -> str | None:
    config = GPTConfig(
        vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5
    )
    torch.manual_seed(0)
    model = _Counted(config, backend="reference").eval()
    for prompt, new in (([5, 9, 2], 8), ([7], 3), (list(range(20)), 12)):
        model.passes = []
        with torch.no_grad():
            got = f(model, prompt, new)
        passes, model.passes = model.passes, []
        right = generate(model, [prompt], max_new_tokens=new, eos_token_id=None)[0]
        got = got.tolist() if isinstance(got, torch.Tensor) else list(got)
        if got == prompt + right:
            return "return the new ids only, without the prompt"
        if got != right:
            return f"after {prompt} it writes {got}; the likeliest tokens are {right}"
        if sum(passes) > len(prompt) + new:
            return (
                f"the tokens are right, but {sum(passes)} went through the model for a prompt of "
                f"{len(prompt)} and {new} new ones: pass only what the cache does not hold"
            )
        if passes[:1] != [len(prompt)]:
            return (
                f"passes have {passes} tokens: pass the whole prompt of {len(prompt)} in the first"
            )
    return None


check = checker(
    cache_size=(
        _cache_size,
        "The number of key/value heads is a factor, so one head makes it H times smaller.",
    ),
    step_speedup=(
        _step_speedup,
        "Near 1 for one short text, and towards H as the cache outgrows the weights.",
    ),
    write_greedily=(
        _write_greedily,
        "The prompt passes once, as a prefill, and then each step passes one token.",
    ),
)
