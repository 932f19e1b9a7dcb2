"""The forward pass of a model by the compiled function of `mqa_kernels.cpu`, not by its modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mqa_gpt.attention import auto_attention
from mqa_gpt.cache import KVCache
from mqa_gpt.config import ACTIVATIONS, GPTConfig
from mqa_gpt.fast.int8 import Int8Embedding, Int8Linear
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.fast.plain import is_plain, is_watched
from mqa_gpt.machine import INSTALL_NUMBA
from mqa_gpt.model import GPT, Block
from mqa_gpt.progress import status

if TYPE_CHECKING:
    from mqa_kernels.cpu.program import Program

Forward = Callable[[Tensor, KVCache], Tensor]

HAS_NUMBA = find_spec("numba") is not None

# Tokens of a prompt in one call: enough that reading the weights takes little of the time, few
# enough that the activations stay in cache.
PIECE = 512

WEIGHTS = (nn.Linear, Int8Linear, Int8Embedding)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of models

_READY: set[tuple[torch.dtype, ...]] = set()  # dtypes that this process has compiled code for


class CompiledForward:
    """A model's forward pass as one compiled function, with float32 logits.

    A row's numbers do not depend on the rows and tokens beside it, bit for bit. Weights are read
    in place: changes of their values are seen, other tensors in their place are not.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, T, V) of ids (B, T), which continue the cache's rows."""
        B, T = ids.shape
        cache.require_room(T)
        start = cache.start
        starts = [start] * B if isinstance(start, int) else start.tolist()
        logits = self._run(
            ids.flatten().tolist(),
            [b for b in range(B) for _ in range(T)],
            [first + t for first in starts for t in range(T)],
            range(B * T),
            cache,
        )
        cache.advance(T)
        return logits.view(B, T, -1)

    def read(
        self, prompts: Sequence[Sequence[int]], cache: KVCache, size: int | None = None
    ) -> Tensor:
        """Read prompts into an empty cache; the logits (B, V) after each one's last token.

        They are read one after the other, in pieces of `size` tokens wherever a prompt ends.
        """
        cache.require_room(max(map(len, prompts)))
        size = size or PIECE
        ids = [id_ for prompt in prompts for id_ in prompt]
        slots = [b for b, prompt in enumerate(prompts) for _ in prompt]
        positions = [t for prompt in prompts for t in range(len(prompt))]
        lengths = [len(prompt) for prompt in prompts]
        is_last = [t == lengths[b] - 1 for b, t in zip(slots, positions, strict=True)]
        logits = []
        for begin in range(0, len(ids), size):
            piece = slice(begin, begin + size)
            wanted = [i for i, last in enumerate(is_last[piece]) if last]
            logits.append(
                self._run(ids[piece], slots[piece], positions[piece], wanted, cache, rounds=True)
            )
        cache.advance(max(lengths))
        cache.set_lengths(lengths)
        return torch.cat(logits)

    def _run(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        cache: KVCache,
        rounds: bool = False,
    ) -> Tensor:
        scales = cache.scales if isinstance(cache, Int8KVCache) else None
        kinds = self._program.kinds(cache.kv)
        if cache.dtype != kinds[1] or cache.kv.device.type != "cpu":
            raise ValueError(
                f"the model is of {kinds[1]} on cpu, but the cache is made for {cache.dtype} on "
                f"{cache.kv.device}"
            )
        if kinds in _READY:
            return self._program(ids, slots, positions, wanted, cache.kv, scales, rounds=rounds)
        with status() as say:
            say("compiling for this processor, once: about ten seconds")
            logits = self._program(ids, slots, positions, wanted, cache.kv, scales, rounds=rounds)
        _READY.add(kinds)
        return logits


@cache
def numba_works() -> bool:
    """Whether numba and what is written for it can be imported; if not, a warning says why, once.

    An installation may be broken in many ways: without llvmlite, with another NumPy than numba
    knows, without a library of the system.
    """
    try:
        import mqa_kernels.cpu.program  # noqa: F401
    except Exception as error:
        warnings.warn(
            f"numba is installed but cannot be used ({type(error).__name__}: {error}), so "
            f"generation is slower: run {INSTALL_NUMBA} in the checkout, or uninstall numba",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def compiled_forward(model: GPT) -> CompiledForward | None:
    """The compiled forward pass of a model; None where there is none and its modules must run.

    There is one with numba, on a CPU, for a plain model in at most 32 bits whose attention is left
    to "auto".
    """
    if not HAS_NUMBA or not _is_compilable(model) or not numba_works():
        return None
    from numba import config

    if config.DISABLE_JIT:
        return None
    c, t = model.config, model.transformer
    C, F, V, D = c.n_embd, c.inner_size, c.vocab_size, c.head_dim
    blocks = cast(list[Block], t.h)
    try:
        layers = [
            [
                *_norm(block.ln_1, c),
                *_linear(block.attn.c_attn, C + 2 * c.n_kv_head * D, C),
                *_linear(block.attn.c_proj, C, C),
                *_norm(block.ln_2, c),
                *_linear(block.mlp.c_fc, F, C),
                *_linear(block.mlp.c_proj, C, F),
            ]
            for block in blocks
        ]
        head = _linear(model.lm_head, V, C)
        wpe = _linear(t.wpe, c.n_positions, C)[0]
        ends = [*_linear(t.wte, V, C)[:2], wpe, *_norm(t.ln_f, c), *head[:2]]
    except _ChangedError:
        return None
    if head[2] is not None:  # a bias
        return None
    from mqa_kernels.cpu.program import CODES, Program, Shape
    from mqa_kernels.cpu.simd import HAS_FLOAT16

    if model.dtype == torch.float16 and not HAS_FLOAT16:
        return None
    shape = Shape(
        L=len(blocks),
        C=C,
        H=c.n_head,
        G=c.n_kv_head,
        D=D,
        F=F,
        V=V,
        activation=CODES[ACTIVATIONS[c.activation_function]],
        epsilon=c.layer_norm_epsilon,
        scale=_attention_scale(c),
    )
    numbers = [block.attn.layer for block in blocks]
    return CompiledForward(Program(shape, layers, numbers, ends))


def step_forward(model: GPT) -> Forward:
    """A function of ids (B, T) and a cache that gives the logits (B, T, V): compiled, or the
    model's modules.

    Get a new one after modules, weights, hooks or attention were replaced. Only what
    `mqa_gpt.research` records or patches may come later.
    """

    def by_modules(ids: Tensor, cache: KVCache) -> Tensor:
        return model(ids, cache=cache)

    compiled = compiled_forward(model)
    if compiled is None:
        return by_modules

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        runs_modules = is_watched(model) or not is_known(cache)
        return by_modules(ids, cache) if runs_modules else compiled(ids, cache)

    return step


def is_known(cache: KVCache) -> bool:
    """Whether the compiled pass can write to a cache, which it does without its methods."""
    return type(cache) in (KVCache, Int8KVCache)


def _is_compilable(model: GPT) -> bool:
    """Whether its modules are as the model made them, with the config's switches."""
    if type(model) is not GPT or model.device.type != "cpu" or model.dtype not in DTYPES:
        return False
    c, blocks = model.config, cast(list[Block], model.transformer.h)
    weights = {layer.weight.dtype for layer in model.modules() if isinstance(layer, WEIGHTS)}
    others = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if name.endswith("bias") or ".ln_" in name or ".wpe." in name
    }
    return (
        is_plain(model)
        and not any(module._compiled_call_impl for module in model.modules())
        and all(
            block.attn.attend is auto_attention
            and (block.attn.n_head, block.attn.n_kv_head) == (c.n_head, c.n_kv_head)
            and block.attn.scale == _attention_scale(c)
            and block.mlp.activation == c.activation_function
            for block in blocks
        )
        and weights in ({model.dtype}, {torch.int8})
        and others == {model.dtype}
    )


def _attention_scale(config: GPTConfig) -> float:
    """By which scores are multiplied."""
    return config.head_dim**-0.5 if config.scale_attn_weights else 1.0


class _ChangedError(Exception):
    """A layer is not as the config says."""


def _norm(layer: nn.LayerNorm, config: GPTConfig) -> list[Tensor]:
    """Its weight and bias (C,)."""
    size = (config.n_embd,)
    if layer.normalized_shape != size or layer.eps != config.layer_norm_epsilon:
        raise _ChangedError
    return [_checked(layer.weight, size), _checked(layer.bias, size)]


def _linear(layer: nn.Module, rows: int, columns: int) -> list[Tensor | None]:
    """Weight (rows, columns), scale if it is int8, and bias, if there is one."""
    weight = getattr(layer, "weight", None)
    scale, bias = getattr(layer, "weight_scale", None), getattr(layer, "bias", None)
    return [
        _checked(weight, (rows, columns)),
        None if scale is None else _checked(scale, (rows,)),
        None if bias is None else _checked(bias, (rows,)),
    ]


def _checked(x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose numbers lie in memory one after the other."""
    if x is None or type(x) not in (Tensor, nn.Parameter) or x.shape != shape:
        raise _ChangedError
    if x.device.type != "cpu" or not x.is_contiguous():
        raise _ChangedError
    return x
