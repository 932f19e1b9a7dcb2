"""Sections of gpu_report.py: the speed of attention by itself, and of a few steps to compare.

`steps` is short, because it runs again without overlap and with another assembler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_kernels import Row, each, recorded
from gpu_models import measured, seconds_of, step_speed
from torch import Tensor

from mqa_gpt import GPT, KVCache
from mqa_gpt.bench.counts import BACKWARD, attention_flops
from mqa_kernels import attention as attend

H, D = 32, 128  # of StarCoder 7B; one key/value head
PASSES = ((1, 8192), (2, 8192), (8, 2048))  # (sequences, tokens of each)
CACHES = ((16, 8192), (256, 8192), (1, 16384), (128, 1024))  # (rows, tokens that each holds)
SMALL = ((1, 33),)  # instead of these, without a GPU


def steps(device: torch.device) -> Iterator[Row]:
    """Decode steps, and how long attention alone takes in them."""
    return measured(device, step_parts, ((1, 1024), (16, 1024)))


def attention(device: torch.device) -> Iterator[Row]:
    """Attention forward, backward and of one new token."""
    gpu = device.type == "cuda"
    for name, measure, sizes in (
        ("forward", forward_speed, PASSES),
        ("backward", backward_speed, PASSES),
        ("decode", decode_speed, CACHES),
    ):
        cases = (
            ({"attention": name, "batch": B, "tokens": T}, partial(measure, device, B, T))
            for B, T in (sizes if gpu else SMALL)
        )
        yield from each(cases, may_refuse=True)


@torch.inference_mode()
def step_parts(model: GPT, batch: int, context: int) -> Row:
    """A step's time, and that of the attention of all its layers."""
    config = model.config
    cache = KVCache(config, batch, context + 1, dtype=model.dtype, device=model.device)
    cache.kv.normal_()
    q = torch.randn(
        batch, 1, config.n_head, config.head_dim, dtype=model.dtype, device=model.device
    )
    lengths = torch.full((batch,), context, device=model.device)

    def run() -> None:
        for slots in cache.kv:  # (B, max_length, G, 2D)
            attend(q, *slots.chunk(2, -1), lengths)

    seconds = seconds_of(recorded(run, model.device))
    return step_speed(model, batch, context) | {"attention_us": seconds * 1e6}


def inputs(device: torch.device, B: int, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, S, 1, D), laid out as in a model."""
    q = torch.randn(B, T, H + 2, D, dtype=torch.bfloat16, device=device)[:, :, :H]
    k, v = torch.randn(B, S, 1, 2 * D, dtype=torch.bfloat16, device=device).chunk(2, -1)
    return q, k, v


def forward_speed(device: torch.device, B: int, T: int) -> Row:
    """The rate of causal attention over B sequences of T tokens."""
    q, k, v = inputs(device, B, T, T)
    return rate(lambda: attend(q, k, v), attention_flops(B, T, T, H, D))


def backward_speed(device: torch.device, B: int, T: int) -> Row:
    """The rate of the gradients alone."""
    leaves = [x.detach().requires_grad_() for x in inputs(device, B, T, T)]
    out = attend(*leaves)
    do = torch.randn_like(out)
    flops = BACKWARD * attention_flops(B, T, T, H, D)
    return rate(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True), flops)


def decode_speed(device: torch.device, B: int, S: int) -> Row:
    """The rate at which one new token per row reads its keys and values."""
    q, k, v = inputs(device, B, 1, S)
    start = torch.full((B,), S - 1, device=device)
    seconds = seconds_of(recorded(lambda: attend(q, k, v, start), device))
    return {"us": seconds * 1e6, "gb_per_s": 2 * k.numel() * k.itemsize / seconds / 1e9}


def rate(action: Callable[[], object], flops: float) -> Row:
    """An action's time and rate."""
    seconds = seconds_of(action)
    return {"us": seconds * 1e6, "tflops": flops / seconds / 1e12}
