"""The decode step by fused kernels: as exact as the modules, and the same tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.attention import reference_attention
from mqa_gpt.fast import decode_step
from mqa_gpt.fast.decode_step import StaticCache
from mqa_gpt.fast.fused_step import can_fuse, fused_argmax, fused_hidden, fused_logits
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.sampling import GREEDY, SamplingParams
from mqa_kernels import launch
from tests.generation.test_replay import OnGpu, check_same_tokens
from tests.helpers import (
    engine_tokens,
    error,
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
)

# NumPy says so where exp is infinite, as it should be: the sigmoid of that is 0.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

LENGTHS = [9, 1, 5]
MANY_LENGTHS = [1 + 5 * b % 9 for b in range(19)]  # more rows than a product normalizes itself
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CONFIGS = [
    tiny_config(),
    tiny_config(multi_query=False, activation_function="gelu", scale_attn_weights=False),
    tiny_config(activation_function="relu", tie_word_embeddings=False, n_inner=None),
]


def model_of(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    return our_model(reference_model(config).to(dtype), config).to(DEVICE)


def filled_cache(model: GPT, rows: int) -> StaticCache:
    """After prompts of different lengths, with room for a few tokens."""
    lengths = lengths_of(rows)
    cache = KVCache(model.config, rows, 12, dtype=model.dtype, device=DEVICE)
    model(random_ids(model.config, rows, max(lengths)).to(DEVICE), cache=cache)
    cache.set_lengths(lengths)
    return StaticCache(cache, cache.lengths, torch.ones_like(cache.lengths))


def lengths_of(rows: int) -> list[int]:
    return LENGTHS if rows == len(LENGTHS) else MANY_LENGTHS


@torch.inference_mode()
def plain_steps(model: GPT, steps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, B, V) of N steps, each of one token per row, and the cache's contents."""
    cache = filled_cache(model, len(steps[0]))
    return torch.stack([model(ids, cache=cache)[:, 0] for ids in steps]), cache.kv


@torch.inference_mode()
def fused_steps(model: GPT, steps: list[Tensor]) -> tuple[Tensor, Tensor]:
    cache = filled_cache(model, len(steps[0]))
    logits = [fused_logits(model, fused_hidden(model, ids, cache)) for ids in steps]
    assert cache.lengths.tolist() == [n + len(steps) for n in lengths_of(len(steps[0]))]
    return torch.stack(logits), cache.kv


def random_steps(config: GPTConfig, rows: int = len(LENGTHS)) -> list[Tensor]:
    return list(random_ids(config, 2, rows, 1, seed=1).to(DEVICE))


@pytest.fixture
def many_float32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for many rows take float32 too, for which they are only too slow."""
    monkeypatch.setitem(launch.MAX_ROWS, torch.float32, 64)


@pytest.mark.usefixtures("many_float32_rows")
@pytest.mark.parametrize("rows", [len(LENGTHS), len(MANY_LENGTHS)])
@pytest.mark.parametrize("config", CONFIGS, ids=["mqa", "mha", "relu"])
def test_logits_and_cache_are_the_modules(config, rows):
    model, steps = model_of(config), random_steps(config, rows)
    for ours, expected in zip(fused_steps(model, steps), plain_steps(model, steps), strict=True):
        assert relative_error(ours, expected) <= 2e-5


@pytest.mark.parametrize("rows", [len(LENGTHS), len(MANY_LENGTHS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_to_float32_as_the_modules_are(dtype, rows):
    model, steps = model_of(CONFIGS[0], dtype), random_steps(CONFIGS[0], rows)[:1]
    exact, _ = plain_steps(copy.deepcopy(model).float(), steps)
    ours, _ = fused_steps(model, steps)
    plain, _ = plain_steps(model, steps)
    assert ours.dtype == dtype
    assert error(ours, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("config", CONFIGS[1:], ids=["mha", "relu"])
def test_8_bit_weights_give_the_logits_and_cache_of_their_modules(config):
    model, steps = model_of(config), random_steps(config)
    quantize(model)
    for ours, expected in zip(fused_steps(model, steps), plain_steps(model, steps), strict=True):
        assert relative_error(ours, expected) <= 2e-5


@pytest.mark.parametrize("rows", [len(LENGTHS), len(MANY_LENGTHS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_8_bit_weights_in_low_precision_are_as_close_to_float32_as_their_modules_are(dtype, rows):
    model, steps = model_of(CONFIGS[0], dtype), random_steps(CONFIGS[0], rows)[:1]
    quantize(model)
    exact, _ = plain_steps(copy.deepcopy(model).float(), steps)
    ours, _ = fused_steps(model, steps)
    plain, _ = plain_steps(model, steps)
    assert ours.dtype == dtype
    assert error(ours, exact) <= 2 * error(plain, exact)


@torch.inference_mode()
def test_the_likeliest_token_is_the_logits_argmax():
    model = model_of(CONFIGS[0])
    x = torch.randn(5, 60, device=DEVICE)
    logits = fused_logits(model, x)
    ids, highest = fused_argmax(model, x)
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert highest.tolist() == logits.amax(-1).tolist()
    x[2, 7] = float("nan")
    assert fused_argmax(model, x)[1].isnan().tolist() == [i == 2 for i in range(5)]


@pytest.fixture
def fused(monkeypatch):
    """Replayed steps are fused ones; they are counted."""
    calls = []
    plain = decode_step.fused_hidden
    monkeypatch.setattr(decode_step, "can_fuse", lambda model, rows: True)
    monkeypatch.setattr(
        decode_step, "fused_hidden", lambda *arguments: (calls.append(1), plain(*arguments))[1]
    )
    return calls


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(
    ("sampling", "logprobs"),
    [(GREEDY, None), (SamplingParams(1.3, 40, 0.95, 0.01, 1.2, seed=5), 2)],
    ids=["greedy", "sampled"],
)
def test_tokens_are_those_of_called_steps(fused, graphs, sampling, logprobs, is_int8):
    model = model_of(CONFIGS[0])
    if is_int8:
        quantize(model)
    prompts = random_prompts(CONFIGS[0], [3, 2])
    check_same_tokens(model, prompts, 4, sampling, logprobs=logprobs)
    assert len(fused) == 2  # called, then recorded; the last step is a replay
    assert DEVICE == "cuda" or [graph.replays for graph in graphs] == [2]


@pytest.mark.usefixtures("many_float32_rows")
def test_tokens_of_many_rows_are_those_of_called_steps(fused, graphs):
    model = model_of(CONFIGS[0])
    check_same_tokens(model, random_prompts(CONFIGS[0], MANY_LENGTHS), 4, GREEDY)
    assert len(fused) == 2


def test_logits_that_are_not_finite_are_an_error(fused, replayed):
    model, tokens = model_of(CONFIGS[0]), []
    with torch.no_grad():
        model.transformer.wpe.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        tokens.extend(engine_tokens(model, random_prompts(CONFIGS[0], [2]), 5))
    assert len(tokens) == 2


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: 90)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 16), (torch.bfloat16, 64), (torch.float16, 64)], ids=str
)
def test_gpus_with_little_shared_memory_take_fewer_rows(dtype, most, monkeypatch):
    model = OnGpu(our_model(reference_model(CONFIGS[0]).to(dtype), CONFIGS[0]))
    for architecture, rows in ((80, most), (86, 8), (89, 8), (90, most), (100, most), (120, 8)):
        monkeypatch.setattr(launch, "architecture", lambda device, sm=architecture: sm)
        assert can_fuse(model, rows)
        assert not can_fuse(model, rows + 1)


def test_it_is_not_taken_in_float64(hopper):
    model = our_model(reference_model(CONFIGS[0]).double(), CONFIGS[0])
    assert not can_fuse(OnGpu(model), 1)


def test_it_is_taken_for_few_rows_of_untouched_modules_on_a_gpu(hopper):
    class Wrapped(nn.Linear):
        """What adapters do."""

    model = our_model(reference_model(CONFIGS[0]), CONFIGS[0])
    on_gpu = OnGpu(model)
    assert can_fuse(on_gpu, 16)
    assert not can_fuse(on_gpu, 17)
    assert not can_fuse(model, 1)  # on the CPU
    quantize(model)
    assert can_fuse(on_gpu, 16)
    model.transformer.h[1].attn.attend = reference_attention
    assert not can_fuse(on_gpu, 1)
    model.set_backend("auto")
    model.transformer.h[1].mlp.c_fc = Wrapped(60, 136)
    assert not can_fuse(on_gpu, 1)


def give_the_head_a_bias(model: GPT) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(97))


def activate_otherwise(model: GPT) -> None:
    model.transformer.h[1].mlp.activate = torch.tanh


def split_otherwise(model: GPT) -> None:
    attn = model.transformer.h[1].attn
    attn.split = lambda qkv: type(attn).split(attn, -qkv)


def leave_a_norms_weight_out(model: GPT) -> None:
    model.transformer.h[1].ln_1 = nn.LayerNorm(60, elementwise_affine=False).eval()


def prune_a_head(model: GPT) -> None:
    model.transformer.h[1].attn.n_head -= 1


def transpose_a_weight(model: GPT) -> None:
    c_fc = model.transformer.h[1].mlp.c_fc
    c_fc.weight = nn.Parameter(c_fc.weight.T.contiguous().T)


@pytest.mark.parametrize(
    "change",
    [
        *(give_the_head_a_bias, activate_otherwise, split_otherwise),
        *(leave_a_norms_weight_out, prune_a_head, transpose_a_weight),
    ],
)
def test_it_is_not_taken_where_it_would_compute_something_else(hopper, change):
    model = our_model(reference_model(CONFIGS[0]), CONFIGS[0])
    assert can_fuse(OnGpu(model), 1)
    change(model)
    assert not can_fuse(OnGpu(model), 1)


def test_each_layer_has_its_own_activation():
    model = model_of(CONFIGS[0])
    model.transformer.h[1].mlp.activation = "relu"
    steps = random_steps(model.config)
    assert relative_error(fused_steps(model, steps)[0], plain_steps(model, steps)[0]) < 1e-5
