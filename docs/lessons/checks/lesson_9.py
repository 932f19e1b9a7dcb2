"""Checks of lesson 9's exercises, against the library's counts and `statistics.quantiles`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from checks import checker
from mqa_gpt import GPTConfig
from mqa_gpt.bench.counts import decode_bytes, weight_bytes, work_by_part
from mqa_gpt.cache import cache_bytes


def _attainable(f: Callable[..., Any]) -> str | None:
    config = GPTConfig.preset("starcoderbase-1b")
    peak, bandwidth = 4e11, 2e10  # of a desktop's order of magnitude
    for is_prefill in (False, True):
        parts = work_by_part(config, 1, 1024, torch.float32, itemsize=4, is_prefill=is_prefill)
        for name in ("attention", "mlp.c_fc", "lm_head"):
            part = parts[name]
            # the time is that of the slower of the two, so the rate is the lower one
            right = part.flops / max(part.flops / peak, part.bytes / bandwidth)
            got = f(part.flops, part.bytes, peak, bandwidth)
            if math.isclose(got, right):
                continue
            where = f"{part.flops:.3g} operations on {part.bytes:.3g} bytes"
            if math.isclose(got, peak):
                return f"{where}: memory is the limit here, not the peak"
            if got > peak:
                return f"{where}: it gives {got:.3g}, which is above the peak of {peak:.3g}"
            return f"{where}: it gives {got:.4g}; the limit is {right:.4g} operations per second"
    return None


def _fastest_decoding(f: Callable[..., Any]) -> str | None:
    for shape in ("tiny_starcoder_py", "starcoderbase-7b"):
        config = GPTConfig.preset(shape)
        weights, token = weight_bytes(config, 2), cache_bytes(config, torch.bfloat16)
        for texts, context in ((1, 1), (1, 8192), (16, 2048)):
            step = decode_bytes(config, texts, [context], 2, torch.bfloat16)
            got, right = f(weights, token, texts, context, 1e12), texts * 1e12 / step
            if math.isclose(got, right):
                continue
            if math.isclose(got * texts, right):
                return "that is the number of steps per second: each step writes a token per text"
            if math.isclose(got, texts * 1e12 / weights):
                return "a step also reads the cache: the keys and values of every text"
            if math.isclose(got, texts * 1e12 / (weights + context * token)):
                return "right for one text: each text has a cache of its own"
            where = f"{texts} texts of {context} tokens in the shape of {shape}"
            return f"for {where} it gives {got:.5g}; the limit is {right:.5g} tokens per second"
    return None


ROUNDS = (
    ([1.0] * 9, [1.2] * 9),  # every ratio is 1.2
    ([2.0, 2.1, 2.0, 4.0, 2.0, 2.2, 2.0], [1.8, 1.9, 1.8, 3.6, 1.8, 2.0, 1.8]),
    ([1.00, 1.02, 0.98, 1.01, 0.99, 1.00, 1.03], [1.01, 0.99, 1.00, 1.02, 0.98, 1.01, 1.00]),
    # the machine becomes slower from round to round: only the ratios of a round are steady
    ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.1, 2.2, 3.3, 4.4, 5.5, 6.6, 7.7]),
    # b wins most rounds, and by much the one that was disturbed, but loses too many
    ([1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0], [0.9, 1.1, 0.9, 1.0, 1.1, 0.9, 1.1]),
)


def _verdict(f: Callable[..., Any]) -> str | None:
    words = {"a is faster", "b is faster", "cannot say"}
    for number, (a, b) in enumerate(ROUNDS, 1):
        low, _, high = statistics.quantiles([y / x for x, y in zip(a, b, strict=True)], n=4)
        right = "a is faster" if low > 1 else "b is faster" if high < 1 else "cannot say"
        got = f(list(a), list(b))
        if got == right:
            continue
        where = f"case {number}: a = {a}, b = {b}"
        if got not in words:
            return f"{where}: it gives {got!r}; expected one of {', '.join(sorted(words))}"
        if "cannot say" not in (got, right):
            return f"{where}: it says {got!r}, the wrong way round: less time is faster"
        hint = f"the quartiles of b / a in each round are {low:.3f} and {high:.3f}"
        return f"{where}: it says {got!r}; {hint}"
    return None


check = checker(
    attainable=(
        _attainable,
        "The lower of two limits: the flat top, and the slope of the memory.",
    ),
    fastest_decoding=(
        _fastest_decoding,
        "More texts share the reading of the weights, until the caches are the larger part.",
    ),
    verdict=(
        _verdict,
        "The ratios of a round cancel what disturbs both; the quartiles say how sure they are.",
    ),
)
