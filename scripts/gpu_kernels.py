"""Sections of gpu_report.py: are the kernels right on this device?

Judged by FlashAttention's rule: the largest distance from float64 on the same rounded inputs may be
twice that of plain PyTorch in the same dtype, three times for gradients, plus 1e-5. A row's
"errors" are the distances over what is allowed: at most 1 passes.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.fast.decode_step import StaticCache
from mqa_gpt.fast.fused_step import fused_argmax, fused_hidden, fused_logits
from mqa_gpt.fast.int8 import quantize
from mqa_kernels import attention, launch, reference

Row = dict[str, Any]
Action = Callable[[], Any]

FACTORS = {"dq": 3.0, "dk": 3.0, "dv": 3.0}  # of everything else 2
SLACK = 1e-5
DTYPES = ("bfloat16", "float16", "float32")
MODELS = ("starcoderbase-7b", "starcoderbase-1b")
REPLAYED = (3, 33)  # rows; more than 16 have other kernels
TINY = GPTConfig(
    vocab_size=61, n_positions=128, n_embd=48, n_layer=2, n_head=3, n_inner=80,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class Case(NamedTuple):
    """One attention: sizes, and per row its first position, real tokens and left padding."""

    T: int
    S: int
    H: int
    G: int
    D: int
    start: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    left_padding: tuple[int, ...] | None = None


# The official shapes in prefill, decoding and speculation, ragged and padded rows; then odd sizes.
# In bfloat16 all of them, in other dtypes four: compiling takes the time.
CASES = (
    Case(1000, 1000, 32, 1, 128, (0,)),
    Case(1, 1000, 32, 1, 128, (999, 500)),
    Case(65, 65, 16, 1, 128, (0, 0, 0), (65, 17, 1)),
    Case(33, 128, 16, 1, 128, (64, 64, 64), (33, 20, 33), (63, 75, 128)),
    Case(8, 1000, 32, 1, 128, (992, 130)),
    Case(1, 1000, 32, 1, 128, (999, 999), None, (0, 870)),
    Case(64, 65, 12, 1, 64, (0, 1)),
    Case(128, 128, 48, 1, 128, (0,)),
    Case(111, 128, 22, 2, 128, (17, 3)),
    Case(63, 63, 16, 16, 96, (0,)),
    Case(65, 111, 3, 3, 80, (46,)),
    Case(64, 64, 32, 1, 256, (0,)),
    Case(1, 1, 1, 1, 16, (0, 0)),
)
SMALL_CASES = (
    Case(5, 20, 4, 2, 24, (3, 15)),
    Case(17, 17, 3, 1, 16, (0, 0), (17, 6)),
    Case(9, 20, 4, 2, 16, (8, 8, 8), (9, 7, 9), (3, 12, 20)),
)
LARGE = Case(2048, 2048, 32, 1, 128, (0,) * 264)  # over 2**31 elements in q


def numerics(device: torch.device) -> Iterator[Row]:
    """bfloat16 attention and its gradients by the rule, then what else training relies on."""
    gpu = device.type == "cuda"
    yield from attention_checks(device, CASES if gpu else SMALL_CASES, DTYPES[:1])
    checks = {
        "dropout": partial(check_dropout, device),
        "again": partial(check_again, device),
        "large": partial(check_attention, device, LARGE if gpu else SMALL_CASES[0], torch.bfloat16),
    }
    yield from each(({"check": name}, check) for name, check in checks.items())


def dtypes(device: torch.device) -> Iterator[Row]:
    """Attention in the other dtypes by the rule, then in transformers' model."""
    cases = CASES[:4] if device.type == "cuda" else SMALL_CASES
    yield from attention_checks(device, cases, DTYPES[1:])
    yield from each([({"check": "transformers"}, partial(check_transformers, device))])


def attention_checks(
    device: torch.device, cases: Iterable[Case], dtypes: Iterable[str]
) -> Iterator[Row]:
    """A row per case and dtype."""
    poison_allocations()
    for case, dtype in product(cases, dtypes):
        check = partial(check_attention, device, case, getattr(torch, dtype))
        yield from each([({"case": str(case), "dtype": dtype}, check)])


def fused(device: torch.device) -> Iterator[Row]:
    """A decode step in the fused kernels by the rule, then replays of it, bit by bit."""
    poison_allocations()
    counts, steps = ((1, 3, 8, 16, 32, 64), 200) if device.type == "cuda" else ((1, 3), 1)
    for (name, config), (dtype, int8) in product(
        shallow(device).items(), (("bfloat16", False), ("bfloat16", True), ("float16", False))
    ):
        models = Twins(config, getattr(torch, dtype), int8, device)
        shape = {"model": name, "dtype": dtype, "weights": "int8" if int8 else dtype}
        yield from each(
            (shape | {"rows": rows}, partial(check_step, models, rows)) for rows in counts
        )
        yield from each(
            (shape | {"rows": rows, "steps": steps},
             partial(check_replays, models.model, rows, steps))
            for rows in REPLAYED
        )  # fmt: skip
        del models


def poison_allocations() -> None:
    """From here on `torch.empty` gives NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def unpoisoned() -> Iterator[None]:
    """Kernels that fill memory with NaN would lie between ours, which then could not overlap."""
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = True


def shallow(device: torch.device) -> dict[str, GPTConfig]:
    """What models are checked with: two layers of each shape, which run the same kernels."""
    if device.type == "cpu":
        return {"tiny": TINY}
    return {name: replace(GPTConfig.preset(name), n_layer=2) for name in MODELS}


def each(cases: Iterable[tuple[Row, Callable[[], Row]]], may_refuse: bool = False) -> Iterator[Row]:
    """A row per case: what it is, then what its action finds or the error it ends with.

    A measurement may be refused for want of memory, with no verdict; a check that is has failed.
    """
    for case, action in cases:
        begin = time.monotonic()
        try:
            found = action()
        except torch.OutOfMemoryError as error:
            found = {"refused": str(error).splitlines()[0]}
            if not may_refuse:
                found["passed"] = False
        except Exception:
            found = {"passed": False, "error": traceback.format_exc()}
        yield case | found | {"wall_s": time.monotonic() - begin}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the device is lost, which ends the section
            torch.cuda.empty_cache()


def judge(name: str, answer: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The error over what the rule allows; NaN if there is any in the answer."""
    error = (answer.double() - exact).abs().max()
    allowed = FACTORS.get(name, 2.0) * (plain.double() - exact).abs().max() + SLACK
    return (error / allowed).item()


def verdict(errors: dict[str, float]) -> Row:
    """A row's "passed" and "errors"; NaN does not pass."""
    passed = all(error <= 1 for error in errors.values())
    return {"passed": passed, "largest": max(errors.values()), "errors": errors}


# --------------------------------------------------------------------------------------- attention


def check_attention(device: torch.device, case: Case, dtype: torch.dtype) -> Row:
    """Output, log-sum-exp and gradients of one case, all rows or the last of many."""
    q, k, v, do = inputs(device, case, dtype)
    start, lengths, left = (
        None if x is None else torch.tensor(x, device=device)
        for x in (case.start, case.lengths, case.left_padding)
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, start, lengths=lengths, left_padding=left, return_lse=True)
    gradients = torch.autograd.grad(out, leaves, do)
    # Of many rows the last three are judged.
    mask = reference.visible_slots(q, k, start, lengths, left)[-3:]
    plain, wide, exact = (
        plain_attention([x[-3:].nan_to_num(0.0).to(other) for x in (q, k, v, do)], mask)
        for other in (dtype, torch.float32, torch.float64)
    )
    plain["lse"] = wide["lse"]  # of scores that are not rounded
    lse = lse[-3:].where(mask.any(-1)[..., None], 0.0)  # undefined where nothing is visible
    answers = zip(plain, (out, lse, *gradients), strict=True)
    return verdict({n: judge(n, x[-3:], plain[n], exact[n]) for n, x in answers})


def inputs(device: torch.device, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q (B, T, H, D), k, v (B, S, G, D) and dO (B, T, H, D), laid out as a model has them.

    q is part of a projection (B, T, (H + 2G) D), and so are k and v where there is no cache, else
    they are parts of one (B, S, G, 2D). What a kernel must not look at is NaN.
    """
    T, S, H, G, D, *_ = case
    B = len(case.start)
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    qkv = normal(B, T, (H + 2 * G) * D)
    for b, count in enumerate(case.lengths or ()):
        qkv[b, count:] = torch.nan
    q = qkv[..., : H * D].view(B, T, H, D)
    if S == T:
        k, v = (part.view(B, S, G, D) for part in qkv[..., H * D :].chunk(2, -1))
    else:
        kv = normal(B, S, G, 2 * D)
        for b, position in enumerate(case.start):
            kv[b, position + T :] = torch.nan
        k, v = kv.chunk(2, -1)
    for b, count in enumerate(case.left_padding or ()):
        k[b, :count] = v[b, :count] = torch.nan
    do = normal(B, H, T, D).transpose(1, 2)  # its strides are not those of out
    return q, k, v, do


def plain_attention(
    tensors: list[Tensor], mask: Tensor, factors: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """Plain PyTorch's attention, with these factors of the probabilities, and its gradients, in the
    dtype of q, k, v and dO. A query that sees nothing has 0 for "out" and "lse"."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    scale = leaves[0].shape[-1] ** -0.5
    out = reference.attention(*leaves, mask, scale, factors)
    gradients = torch.autograd.grad(out, leaves, tensors[3])
    lse = reference.log_sum_exp(*tensors[:2], mask, scale)  # (B, T, H)
    lse = lse.where(mask.any(-1)[..., None], 0.0)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse, *gradients), strict=True))


def check_dropout(device: torch.device) -> Row:
    """Output and gradients with dropout. Which probabilities are kept is read off attention over
    one-hot values, for which there are as many channels as slots."""
    T, H, G = (128, 32, 1) if device.type == "cuda" else (16, 4, 2)
    q, k, v, do = tensors = inputs(device, Case(T, T, H, G, T, (0, 0)), torch.bfloat16)
    attend = partial(attention, dropout_p=0.3, seed=torch.tensor([7], device=device))
    one_hot = torch.eye(T, dtype=v.dtype, device=device)[None, :, None].expand_as(v)
    factors = (attend(q * 0, k * 0, one_hot) > 0) / 0.7  # (B, T, H, S)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, do)
    plain, exact = (
        plain_attention([x.to(dtype) for x in tensors], reference.visible_slots(q, k), factors)
        for dtype in (torch.bfloat16, torch.float64)
    )
    answers = zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True)
    return verdict({n: judge(n, x, plain[n], exact[n]) for n, x in answers})


def check_again(device: torch.device) -> Row:
    """Output and gradients are the same bits in every run, and through torch.compile."""
    case = Case(1000, 1000, 32, 1, 128, (0, 0)) if device.type == "cuda" else SMALL_CASES[0]
    q, k, v, do = inputs(device, case, torch.bfloat16)
    # Without a GPU nothing is gained from generating code, which takes a C++ compiler.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(attention, fullgraph=True, backend=backend)

    def run(attend: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, do)]

    first = run(attention)
    equal = {
        name: all(map(torch.equal, first, run(attend)))
        for name, attend in (("again", attention), ("once more", attention), ("compiled", compiled))
    }
    return {"passed": all(equal.values()), "equal": equal}


def check_transformers(device: torch.device) -> Row:
    """transformers' model generates the same from a left-padded batch on the kernels as on sdpa."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    from mqa_gpt.integrations.transformers import register

    register()
    mask = torch.ones(3, 7, dtype=torch.int64, device=device)  # (B, T)
    mask[0, :5] = mask[1, :6] = 0
    config = GPTBigCodeConfig(**replace(TINY, initializer_range=0.3).to_dict())
    torch.manual_seed(0)
    make: Any = GPTBigCodeForCausalLM
    theirs = make(config).eval().to(device)
    ids = torch.randint(config.vocab_size, mask.shape, device=device)
    equal = {}
    for cache in ("dynamic", "static"):
        tokens = []
        for implementation in ("sdpa", "mqa_triton"):
            theirs.set_attn_implementation(implementation)
            output = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                cache_implementation=cache, disable_compile=True,
            )  # fmt: skip
            tokens.append(output[:, ids.shape[1] :])
        equal[cache] = torch.equal(*tokens)
    return {"passed": all(equal.values()), "equal": equal}


# ---------------------------------------------------------------------------------- the fused step


class Twins:
    """A model with random weights, the same in plain PyTorch, and in float64.

    Attributes:
        model: in `dtype`, or with int8 weights.
        plain, exact: what its weights stand for, in `dtype` and in float64, reference backend.
    """

    def __init__(
        self, config: GPTConfig, dtype: torch.dtype, int8: bool, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        # Peaked attention: at the usual initialisation a wrong mask hardly shows.
        config = replace(config, initializer_range=2 * config.n_embd**-0.5)
        with device:
            model = GPT(config, backend="reference").eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # scales are near 1, and no bias is 0
                parameter.normal_(float(name.endswith("weight")), 0.3)
        self.model = model.to(dtype)
        self.plain, self.exact = deepcopy(self.model), deepcopy(self.model).double()
        if int8:
            quantize(self.model)
            for name, scale in self.model.named_buffers():
                name = name.removesuffix("_scale")
                weight = self.model.get_parameter(name).double() * scale.double()[:, None]
                for twin in (self.plain, self.exact):
                    twin.get_parameter(name).copy_(weight)


def fused_step(model: GPT, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, V), argmax (B,) and its logit (B,), of one token (B, 1) per row.

    Here and in `gpu_models.decoding` this script uses what is not public.
    """
    static = StaticCache(cache, cache.lengths, torch.ones_like(cache.lengths))
    x = fused_hidden(model, ids, static)  # (B, C)
    return fused_logits(model, x), *fused_argmax(model, x)


def filled_cache(model: GPT, rows: int, spare: int, lost: float) -> KVCache:
    """A cache whose row b holds 5 + 3b random tokens; slots after these hold `lost`."""
    lengths = [5 + 3 * b for b in range(rows)]
    slots = max(lengths) + spare
    cache = KVCache(model.config, rows, slots, dtype=model.dtype, device=model.device)
    torch.manual_seed(rows)
    cache.kv.normal_()
    cache.advance(max(lengths))
    cache.set_lengths(lengths)
    for b, length in enumerate(lengths):
        cache.kv[:, b, length:] = lost
    return cache


@torch.inference_mode()
def check_step(models: Twins, rows: int) -> Row:
    """One step: logits, the keys and values that it writes, and the argmax, by the rule."""
    ids = torch.arange(1, 1 + rows, device=models.model.device)[:, None]  # (B, 1)
    found = []
    for model in (models.plain, models.exact):
        cache = filled_cache(models.plain, rows, 1, 0.0)
        cache.kv, cache.dtype = cache.kv.to(model.dtype), model.dtype
        found.append((model(ids, cache=cache)[:, 0], cache.kv))
    (plain, plain_kv), (exact, exact_kv) = found
    cache = filled_cache(models.plain, rows, 1, torch.nan)
    new = torch.arange(rows), cache.lengths.tolist()  # slots, which the step fills
    logits, chosen, highest = fused_step(models.model, ids, cache)
    # A token whose exact logit is nearly the highest is right too.
    of_chosen = exact.gather(1, chosen[:, None])[:, 0]  # (B,)
    allowed = 2 * (plain.double() - exact).abs().max() + SLACK
    return verdict(
        {
            "logits": judge("logits", logits, plain, exact),
            "kv": judge("kv", *(kv[:, *new] for kv in (cache.kv, plain_kv, exact_kv))),
            "argmax": ((exact.amax(1) - of_chosen).max() / (2 * allowed)).item(),
            "highest": ((highest - of_chosen).abs().max() / allowed).item(),
        }
    )


@torch.inference_mode()
def check_replays(model: GPT, rows: int, steps: int) -> Row:
    """A recorded step whose kernels overlap gives, replayed, the bits of steps without overlap."""
    cache = filled_cache(model, rows, steps, 0.0)
    lengths, kv = cache.lengths.clone(), cache.kv.clone()
    ids = torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
    logits = torch.empty((rows, model.config.vocab_size), dtype=model.dtype, device=model.device)

    def step() -> None:
        new, chosen, _ = fused_step(model, ids, cache)
        logits.copy_(new)
        ids.copy_(chosen[:, None])

    def run(step: Action) -> list[Tensor]:
        cache.lengths.copy_(lengths)
        cache.kv.copy_(kv)
        ids.fill_(1)
        seen = []
        for _ in range(steps):
            step()
            seen.append(logits.clone())
        return [*seen, cache.kv.clone()]

    with unpoisoned():
        replayed = run(recorded(step, model.device))
        with patch.object(launch, "overlap", lambda device: launch.NO_OVERLAP):
            called = run(step)
    equal = sum(map(torch.equal, replayed, called))
    return {"passed": equal == len(called), "equal": equal, "of": len(called)}


def recorded(action: Action, device: torch.device) -> Action:
    """Replays a CUDA graph of the action; without a GPU, the action itself."""
    if device.type == "cpu":
        return action
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiling and workspaces must not be recorded
        action()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        action()
    return graph.replay
