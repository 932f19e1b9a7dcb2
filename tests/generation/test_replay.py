"""Steps that are replayed: the tokens of steps that are called, and when they may be replayed.

Without a GPU `tests.fake_cuda` replays them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mqa_gpt import GPT, generate
from mqa_gpt.attention import reference_attention, sdpa_attention
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.generation import batching, replay
from mqa_gpt.generation.batching import Engine, Token
from mqa_gpt.generation.replay import can_replay
from mqa_gpt.generation.request import make_requests
from mqa_gpt.sampling import GREEDY, SamplingParams
from tests.helpers import (
    engine_tokens,
    our_model,
    random_prompts,
    reference_model,
    tiny_config,
    tiny_model,
)

CONFIG = tiny_config()
PROMPTS = random_prompts(CONFIG, [17, 3, 9, 1])  # ragged
ALL_FILTERS = SamplingParams(1.3, 40, 0.95, 0.01, 1.2, seed=5)

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"
)


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def called(*arguments: Any, **options: Any) -> list[Token]:
    """The tokens of an engine that calls the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "can_replay", lambda model: False)
        return sorted(engine_tokens(*arguments, **options), key=lambda token: token.row)


def check_same_tokens(model: GPT, *arguments: Any, **options: Any) -> list[Token]:
    """The replayed tokens, row by row, after seeing that they are those of called steps."""
    expected = called(model, *arguments, **options)
    replayed = sorted(engine_tokens(model, *arguments, **options), key=lambda token: token.row)
    assert [token[:3] for token in replayed] == [token[:3] for token in expected]
    for token, other in zip(replayed, expected, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in token.top] == [i for i, _ in other.top]
        assert [v for _, v in token.top] == pytest.approx([v for _, v in other.top], abs=1e-4)
    return replayed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("sampling", "n", "logprobs"),
    [
        (GREEDY, 1, None),
        (SamplingParams(repetition_penalty=1.5), 1, 0),
        (SamplingParams(0.8, seed=1), 3, None),
        (ALL_FILTERS, 1, 3),
        (ALL_FILTERS, 3, None),
    ],
)
def test_tokens_are_those_of_called_steps(model, graphs, backend, sampling, n, logprobs):
    model.set_backend(backend)
    tokens = check_same_tokens(model, PROMPTS, 40, sampling, n=n, logprobs=logprobs)
    model.set_backend("auto")
    assert len(tokens) == len(PROMPTS) * n * 40
    assert len(graphs) == 1
    assert graphs[0].replays == 40 - 2  # without the first token and the ordinary first run


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are for the GPU where there is one"
)
@pytest.mark.parametrize("multi_query", [True, False])
def test_the_triton_kernels_read_the_lengths_on_the_device(graphs, multi_query):
    attention = pytest.importorskip("mqa_kernels").attention
    model = tiny_model(multi_query=multi_query)
    for block in model.transformer.h:
        block.attn.attend = attention
    check_same_tokens(model, random_prompts(CONFIG, [5, 2]), 5)


def test_rows_of_one_length_are_replayed_too(model, graphs):
    check_same_tokens(model, random_prompts(CONFIG, [8, 8]), 30)


def test_rows_that_leave_do_not_show_and_fewer_rows_have_a_graph_of_their_own(model, graphs):
    for sampling, prompts in ((GREEDY, PROMPTS), (ALL_FILTERS, PROMPTS[:2])):
        before = len(graphs)
        counts = (6, 16, 21, 11)[: len(prompts)]
        check_same_tokens(model, prompts, counts, sampling, n=4 // len(prompts), logprobs=2)
        assert len(graphs) - before == (3 if len(prompts) == 4 else 2)  # 4, 2 and 1 rows; 4 and 2


def test_a_row_that_waits_begins_in_a_slot_that_became_free(model, graphs):
    check_same_tokens(model, PROMPTS, (3, 30, 9, 25), slots=2)


def test_rows_with_options_of_their_own_share_a_graph_of_the_forward_pass(model, graphs):
    """A row whose end tokens are ruled out at first; from then on the choice is recorded too."""
    ends = range(0, CONFIG.vocab_size, 2)
    check_same_tokens(model, PROMPTS, 30, ALL_FILTERS, end_ids=ends, min_new_tokens=6, logprobs=1)
    assert len(graphs) >= 2


def test_the_least_recently_used_graph_is_dropped(model, replayed, monkeypatch):
    monkeypatch.setattr(replay, "MAX_GRAPHS", 2)
    stepper = replay.GraphStepper(model, 8, 20)
    keys = [(count, (GREEDY, None)) for count in (8, 4, 8, 2)]
    for key in keys:
        stepper._graph(*key)
    assert list(stepper._graphs) == [keys[2], keys[3]]


def test_the_context_may_be_filled_to_the_last_token(model, graphs):
    prompts = random_prompts(CONFIG, [30, 100])
    check_same_tokens(model, prompts, CONFIG.n_positions - 100)


def test_the_longest_row_may_fill_the_context_after_others_came_and_went(model, graphs):
    prompts = [*random_prompts(CONFIG, [CONFIG.n_positions - 20]), [1], [2]]
    check_same_tokens(model, prompts, (20, 3, 19), slots=2)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0, seed=3)], ids=["greedy", "drawn"])
def test_a_free_slot_stays_at_its_beginning_for_as_long_as_others_run(model, replayed, sampling):
    """Three rows share the graph of four slots; the fourth is free for longer than it is."""
    prompts = random_prompts(CONFIG, [1, 2, 3, 60])
    check_same_tokens(model, prompts, (100, 100, 100, 3), sampling)
    engine, tokens = Engine(model, 4, 30), 0
    for _ in range(3):
        for request in make_requests(CONFIG, prompts[:3], 20, sampling):
            engine.add(request)
        while engine.is_busy:
            tokens += len(engine.step())
    assert tokens == 3 * 3 * 20


def test_a_chunked_prefill_and_the_fewest_tokens(model, replayed):
    for count in (0, 1, 2, 3):
        check_same_tokens(model, PROMPTS, count, prefill_chunk=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_at_the_same_token(replayed, value, temperature):
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wpe.weight[12] = value  # the position of a prompt's fifth new token
    sampling, seen = SamplingParams(temperature, seed=0), []
    with pytest.raises(FloatingPointError, match="not finite"):
        seen.extend(engine_tokens(model, random_prompts(CONFIG, [8]), 10, sampling))
    assert len(seen) == 5


def test_what_is_computed_for_a_row_after_its_end_is_no_error(replayed):
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wpe.weight[12] = float("nan")  # where the second row would go on
    check_same_tokens(model, random_prompts(CONFIG, [3, 12]), (8, 1))


def test_the_next_step_is_started_before_the_tokens_are_looked_at(model, replayed):
    events = []
    hook = model.register_forward_pre_hook(lambda module, args: events.append("step"))
    for token in engine_tokens(model, [[3, 4]], 3):
        events.append(token.finished)
    hook.remove()
    assert events == ["step", "step", None, "step", None, "length"]


def test_generation_leaves_gradients_and_modes_alone(model, replayed):
    next(engine_tokens(model, [[1]], 3))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_without_a_gpu_nothing_is_replayed(model, monkeypatch):
    assert not can_replay(model)
    monkeypatch.setattr(batching, "GraphStepper", None)
    assert len(generate(model, [[1]], 3)[0]) == 3


class OnGpu:
    """A model that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, model: GPT) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@pytest.fixture
def on_gpu() -> OnGpu:
    """A new model that may be replayed."""
    on_gpu = OnGpu(our_model(reference_model(CONFIG), CONFIG))
    assert can_replay(on_gpu)
    return on_gpu


def test_hooks_are_not_replayed(on_gpu):
    mlp, modules = on_gpu.transformer.h[1].mlp, torch.nn.modules.module
    for register in (
        mlp.register_forward_hook,
        mlp.register_forward_pre_hook,
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
    ):
        hook = register(lambda *call: None)
        assert not can_replay(on_gpu)
        hook.remove()
        assert can_replay(on_gpu)


def test_dropout_is_not_replayed(on_gpu):
    on_gpu.transformer.h[0].mlp.dropout.train()
    assert not can_replay(on_gpu)


def test_a_quantized_cache_is_not_replayed_but_quantized_weights_are(on_gpu):
    quantize(on_gpu._model)
    on_gpu._model.eval()
    assert can_replay(on_gpu)
    on_gpu._model.cache_class = Int8KVCache
    assert not can_replay(on_gpu)


@pytest.mark.parametrize("attend", [reference_attention, sdpa_attention, "triton"])
def test_every_attention_of_our_own_is_replayed(on_gpu, attend):
    if attend == "triton":
        attend = pytest.importorskip("mqa_kernels").attention
    on_gpu.transformer.h[1].attn.attend = attend
    assert can_replay(on_gpu)


def test_python_code_of_others_is_not_replayed(on_gpu):
    class Wrapped(torch.nn.Linear):
        """What adapters do."""

    def wrapped(*arguments: Any) -> Tensor:
        return sdpa_attention(*arguments)

    block = on_gpu.transformer.h[1]
    block.attn.attend = wrapped
    assert not can_replay(on_gpu)
    on_gpu.set_backend("sdpa")
    c_fc, block.mlp.c_fc = block.mlp.c_fc, Wrapped(60, 136).eval()
    assert not can_replay(on_gpu)
    block.mlp.c_fc = c_fc
    assert can_replay(on_gpu)
    block.mlp.forward = block.mlp.forward
    assert not can_replay(on_gpu)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_cuda_graph_gives_the_tokens_of_steps_that_are_called(dtype, backend, monkeypatch):
    model = our_model(reference_model(CONFIG), CONFIG).to("cuda", dtype)
    model.set_backend(backend)
    for sampling, n in ((GREEDY, 1), (ALL_FILTERS, 1), (ALL_FILTERS, 3)):
        recorded = sorted(engine_tokens(model, PROMPTS, 40, sampling, n=n), key=lambda t: t.row)
        with monkeypatch.context() as patch:
            patch.setattr(replay, "Replay", lambda action, device: action)  # no graph
            tokens = sorted(engine_tokens(model, PROMPTS, 40, sampling, n=n), key=lambda t: t.row)
        assert [token[:3] for token in recorded] == [token[:3] for token in tokens]
    if dtype == torch.float32:
        check_same_tokens(model, PROMPTS, 40, ALL_FILTERS, n=3)
        assert can_replay(model)


@needs_gpu
def test_graphs_follow_rows_that_leave_and_come():
    model = our_model(reference_model(CONFIG), CONFIG).cuda()
    prompts = random_prompts(CONFIG, [17, 3, 9, 1, 5, 5, 30, 2])
    for slots in (None, 3):
        counts = (6, 16, 21, 11, 26, 8, 31, 36)
        check_same_tokens(model, prompts, counts, slots=slots)
        check_same_tokens(model, prompts, counts, ALL_FILTERS, slots=slots)


@needs_gpu
def test_logits_that_are_not_finite_do_not_break_the_device():
    model = our_model(reference_model(CONFIG), CONFIG).cuda()
    expected = generate(model, PROMPTS, 20)
    with torch.no_grad():
        kept = model.transformer.wpe.weight[12].clone()
        model.transformer.wpe.weight[12] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, random_prompts(CONFIG, [8]), 10, temperature=1.0)
    with torch.no_grad():
        model.transformer.wpe.weight[12] = kept
    assert generate(model, PROMPTS, 20) == expected
