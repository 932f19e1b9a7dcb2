"""The recorded decode step: nothing in it depends on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mqa_gpt import GPT
from mqa_gpt.fast.decode_step import StaticCache, StepState, decode_step, step_logits
from mqa_gpt.sampling import SamplingParams
from tests.fake_cuda import Tape
from tests.helpers import tiny_config, tiny_model

CONFIG = tiny_config()
ALL_FILTERS = SamplingParams(1.3, 40, 0.95, 0.01, 1.2, seed=5)


def steps_of(model: GPT) -> tuple[StaticCache, list[Callable[[], None]]]:
    """A cache of two rows, 9 and 4 long, and a free slot, with every kind of step."""
    state = StepState.empty(3, 20, model.device)
    seen = torch.zeros((3, CONFIG.vocab_size), dtype=torch.bool, device=model.device)
    state = StepState(**{**vars(state), "seen": seen})
    state.lengths[0], state.lengths[1], state.active[:2] = 9, 4, 1
    state.draws.uniform_()
    cache = StaticCache(model.new_cache(4, 30), state.lengths, state.active)
    values = torch.zeros((3, 2), device=model.device)
    reports = (values[:, 0].clone(), torch.zeros_like(values).long(), values)
    return cache, [
        partial(decode_step, model, cache, state, ALL_FILTERS, reports),
        partial(decode_step, model, cache, state, SamplingParams()),
        partial(step_logits, model, cache, state, values.new_zeros((3, CONFIG.vocab_size))),
    ]


def described(x: Any) -> Any:
    return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("kind", range(3))
def test_each_step_is_the_same_work_on_the_same_memory(kind: int) -> None:
    """What changes from step to step is on the device: tensors' contents, and nothing else."""
    cache, steps = steps_of(tiny_model())
    seen = []
    for _ in range(4):
        with Tape() as tape, torch.inference_mode():
            steps[kind]()
        seen.append(
            [
                (str(func), tree_map(described, (args, kwargs)))
                for func, args, kwargs, _ in tape.operations
            ]
        )
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert cache.lengths.tolist() == [9 + 4, 4 + 4, 0]


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("kind", range(3))
def test_a_step_never_asks_its_device_nor_copies_to_it(
    kind: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the "meta" device, which has no contents, reading a tensor on the host is an error.

    Tensors of the host that go to the device would show among the operations.
    """
    attention = pytest.importorskip("mqa_kernels").attention
    monkeypatch.setattr("mqa_gpt.fast.decode_step.can_fuse", lambda *_: fused)
    with torch.device("meta"):
        model = GPT(CONFIG).eval()
    for block in model.transformer.h:
        block.attn.attend = attention
    step = steps_of(model)[1][kind]
    with Tape() as tape, torch.inference_mode():
        step()
    tensors = [
        (str(func), x)
        for func, args, kwargs, out in tape.operations
        for x in tree_leaves((args, kwargs, out))
        if isinstance(x, Tensor)
    ]
    names = {name for name, _ in tensors}
    assert "mqa_kernels.attention_forward.default" in names
    assert ("mqa_kernels.norm_qkv_to_cache.default" in names) == fused
    assert [name for name, x in tensors if x.device.type != "meta"] == []


def test_a_static_cache_takes_one_token_per_row() -> None:
    cache, _ = steps_of(tiny_model())
    with pytest.raises(ValueError, match="one at a time"):
        cache.require_room(2)


def test_a_static_cache_writes_where_the_plain_cache_it_shares_memory_with_would() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    plain = model.new_cache(2, 12)
    plain.advance(5)
    plain.set_lengths([5, 3])
    lengths, active = plain.lengths.clone(), torch.tensor([1, 0])
    static = StaticCache(model.new_cache(3, 12), lengths, active)
    kv = torch.randn(2, 1, 1, 2 * CONFIG.head_dim)
    for layer in range(CONFIG.n_layer):
        held = plain.append(layer, kv * layer)
        assert torch.equal(static.append(layer, kv * layer)[:, :6], held)
    static.advance(1)
    assert lengths.tolist() == [6, 3]  # only the active row grows
