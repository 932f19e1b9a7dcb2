"""The decode step that can be replayed: the tokens of the plain loop, and why a replay gives them.

Without a GPU the step is called instead of replayed, or `tests.fake_cuda` replays it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import pytest
import torch
from mqa_gpt.fast.cuda_graph import Replay, upload
from mqa_gpt.generation.decode import Token, stream_plain
from mqa_gpt.generation.decode_graph import Decoder, can_replay, stream_replayed
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mqa_gpt import GPT, KVCache
from mqa_gpt.attention import reference_attention, sdpa_attention
from mqa_gpt.fast import cuda_graph
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.generation import decode_graph
from mqa_gpt.generation import request as generation
from mqa_gpt.generation.request import generate, stream_tokens
from mqa_gpt.sampling import GREEDY, SamplingParams
from tests.fake_cuda import Tape, TapedGraph
from tests.helpers import our_model, random_prompts, reference_model, tiny_config

CONFIG = tiny_config()
PROMPTS = random_prompts(CONFIG, [17, 3, 9, 1])  # ragged
ALL_FILTERS = SamplingParams(1.3, 40, 0.95, 0.01, 1.2, seed=5)

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"
)


@pytest.fixture(scope="module")
def model() -> GPT:
    return our_model(reference_model(CONFIG), CONFIG)


DEVICE = torch.device("cuda", 1)


def test_the_first_run_is_ordinary_and_the_second_is_recorded_on_the_same_stream(cuda):
    replay, caller_s = Replay(cuda.action, DEVICE), cuda.stream
    replay()
    recording_s = cuda.events[0][0]
    assert recording_s is not caller_s
    assert cuda.events == [
        (recording_s, "waits for", caller_s),
        ("run", DEVICE, recording_s),
        (caller_s, "waits for", recording_s),
    ]
    cuda.events.clear()
    replay()
    replay()
    options = {"stream": recording_s, "capture_error_mode": "thread_local"}
    assert cuda.events == [("record", DEVICE, options), ("run", DEVICE, recording_s)]
    assert [graph.replays for graph in TapedGraph.made] == [2]


def in_a_thread(action: Callable[[], Any]) -> Any:
    """What the action returns in a thread of its own."""
    return ThreadPoolExecutor(1).submit(action).result(timeout=5)


def test_threads_and_devices_have_streams_of_their_own(cuda):
    streams = cuda_graph.RECORDING_STREAMS
    assert streams.on(DEVICE) is streams.on(torch.device("cuda", 1))
    assert streams.on(DEVICE) is not streams.on(torch.device("cuda", 0))
    assert streams.on(DEVICE) is not in_a_thread(lambda: streams.on(DEVICE))


def test_a_thread_records_only_what_it_has_run(cuda):
    """A generator may be asked for each of its tokens by another thread."""
    replay = Replay(cuda.action, DEVICE)
    replay()
    in_a_thread(replay)
    assert not TapedGraph.made
    replay()
    assert not TapedGraph.made
    replay()
    assert [graph.replays for graph in TapedGraph.made] == [1]


@pytest.mark.parametrize("runs_before", [0, 1], ids=["first run", "recording"])
def test_others_wait_for_a_first_run_and_a_recording_but_may_replay(cuda, runs_before):
    """While one replay is at work, others are called in threads of their own."""
    recorded, new = (Replay(cuda.action, DEVICE) for _ in range(2))
    recorded()
    recorded()
    threads: list[Thread] = []
    runs: list[bool] = []

    def action() -> None:
        if len(runs) == runs_before:
            in_a_thread(recorded)
            threads.append(Thread(target=new))
            threads[0].start()
            threads[0].join(0.1)
            assert threads[0].is_alive()
        runs.append(True)

    replay = Replay(action, DEVICE)
    for _ in range(runs_before + 1):
        replay()
    threads[0].join(20)
    assert not threads[0].is_alive()
    assert len(runs) == runs_before + 1
    assert TapedGraph.made[0].replays == 2


def check_same_tokens(model: GPT, *arguments: Any, **options: Any) -> list[Token]:
    """The tokens of both loops, row by row, after seeing that they are the same."""
    loops = []
    for stream in (stream_plain, stream_replayed):
        loops.append(sorted(stream(model, *arguments, **options), key=lambda token: token.row))
    plain, replayed = loops
    assert [(t.row, t.id, t.finished) for t in plain] == [
        (t.row, t.id, t.finished) for t in replayed
    ]
    return replayed


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("sampling", "n"),
    [
        (GREEDY, 1),
        (SamplingParams(repetition_penalty=1.5), 1),
        (SamplingParams(0.8, seed=1), 3),
        (ALL_FILTERS, 1),
        (ALL_FILTERS, 3),
    ],
)
def test_tokens_are_the_plain_loop_s(model, graphs, backend, sampling, n):
    model.set_backend(backend)
    tokens = check_same_tokens(model, PROMPTS, 40, sampling, n=n)
    model.set_backend("auto")
    assert len(tokens) == len(PROMPTS) * n * 40


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are for the GPU where there is one"
)
@pytest.mark.parametrize("multi_query", [True, False])
def test_the_triton_kernels_read_the_lengths_on_the_device(graphs, multi_query):
    attention = pytest.importorskip("mqa_kernels").attention
    config = tiny_config(multi_query=multi_query)
    model = our_model(reference_model(config), config)
    for block in model.transformer.h:
        block.attn.attend = attention
    check_same_tokens(model, random_prompts(config, [5, 2, 9]), 6)


def test_rows_of_one_length_are_replayed_too(model, graphs):
    check_same_tokens(model, random_prompts(CONFIG, [8, 8]), 30)


def test_rows_that_have_ended_stay_and_do_not_show(model, graphs):
    free = generate(model, PROMPTS, 40)
    ends = {(0, free[0][4]), (2, free[2][9])}
    tokens = check_same_tokens(model, PROMPTS, 40, should_stop=lambda token: token[:2] in ends)
    assert {token.finished for token in tokens} == {None, "stop", "length"}
    assert len(graphs) == 1


def test_rows_leave_when_half_have_ended(model, graphs, monkeypatch):
    monkeypatch.setattr(decode_graph, "FEW_ROWS", 2)

    def should_stop(token: Token) -> bool:
        ended[token.row] += 1
        return ended[token.row] == (6, 16, 21, 11)[token.row]

    for sampling, prompts in ((GREEDY, PROMPTS), (ALL_FILTERS, PROMPTS[:2])):
        options = {"n": 4 // len(prompts), "should_stop": should_stop, "logprobs": 2}
        batches = len(graphs)
        for stream in (stream_plain, stream_replayed):
            ended = [0] * 4
            tokens = sorted(
                stream(model, prompts, 40, sampling, **options), key=lambda token: token.row
            )
            if stream is stream_plain:
                expected = tokens
        assert [token[:3] for token in tokens] == [token[:3] for token in expected]
        for token, other in zip(tokens, expected, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [id_ for id_, _ in token.top] == [id_ for id_, _ in other.top]
        assert len(graphs) - batches == 2  # 4 rows, then 2, which are few


@pytest.mark.parametrize("logprobs", [0, 3])
def test_log_probabilities_are_the_plain_loop_s(model, graphs, logprobs):
    options = {"sampling": ALL_FILTERS, "logprobs": logprobs}
    plain = sorted(stream_plain(model, PROMPTS, 12, **options), key=lambda t: t.row)
    replayed = sorted(stream_replayed(model, PROMPTS, 12, **options), key=lambda t: t.row)
    for token, expected in zip(replayed, plain, strict=True):
        assert token[:3] == expected[:3]
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [i for i, _ in token.top] == [i for i, _ in expected.top]
        assert [v for _, v in token.top] == pytest.approx([v for _, v in expected.top], abs=1e-4)


def test_the_context_may_be_filled_to_the_last_token(model, graphs):
    prompts = random_prompts(CONFIG, [30, 100])
    check_same_tokens(model, prompts, CONFIG.n_positions - 100)


def test_a_chunked_prefill_and_the_fewest_tokens(model):
    for count in (0, 1, 2, 3):
        check_same_tokens(model, PROMPTS, count, prefill_chunk=4)
    assert list(stream_replayed(model, [], 5)) == []


def test_each_step_is_the_same_work_on_the_same_memory(model):
    """What changes from step to step is on the device: tensors' contents, and nothing else."""
    decoder = sampling_decoder(model)
    steps = []
    for _ in range(4):
        with Tape() as tape, torch.inference_mode():
            decoder.run()
        steps.append(
            [
                (str(func), tree_map(described, (args, kwargs)))
                for func, args, kwargs, _ in tape.operations
            ]
        )
    assert steps[0] == steps[1] == steps[2] == steps[3]
    assert decoder.state.cache.lengths.tolist() == [9 + 4, 4 + 4]


def described(x: Any) -> Any:
    return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def sampling_decoder(model: GPT) -> Decoder:
    """A decoder of two rows, 9 and 4 long, with all there is to sampling."""
    B, device = 2, model.device
    cache = KVCache(CONFIG, B, 30, dtype=model.dtype, device=device)
    cache.advance(9)
    cache.set_lengths([9, 4])
    seen = torch.zeros((B, CONFIG.vocab_size), dtype=torch.bool, device=device)
    draws = torch.rand((B, 20), dtype=torch.float64, device=device)
    return Decoder.new(model, cache, ALL_FILTERS, seen, draws, logprobs=3)


def test_a_step_never_asks_its_device_nor_copies_to_it():
    """On the "meta" device, which has no contents, reading a tensor on the host is an error.

    Tensors of the host that go to the device would show among the operations.
    """
    tensors = tensors_in_a_step(decoder_on_meta())
    assert {name for name, _ in tensors} >= {"mqa_kernels.attention_forward.default"}
    assert [name for name, x in tensors if x.device.type != "meta"] == []


def decoder_on_meta() -> Decoder:
    """A decoder whose attention is Triton's."""
    attention = pytest.importorskip("mqa_kernels").attention
    with torch.device("meta"):
        model = GPT(CONFIG).eval()
    for block in model.transformer.h:
        block.attn.attend = attention
    return sampling_decoder(model)


def tensors_in_a_step(decoder: Decoder) -> list[tuple[str, Tensor]]:
    """Every tensor that an operation of the step takes or gives, with the operation's name."""
    with Tape() as tape, torch.inference_mode():
        decoder.run()
    return [
        (str(func), x)
        for func, args, kwargs, out in tape.operations
        for x in tree_leaves((args, kwargs, out))
        if isinstance(x, Tensor)
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error_at_the_same_token(value, temperature):
    model = our_model(reference_model(CONFIG), CONFIG)
    with torch.no_grad():
        model.transformer.wpe.weight[12] = value  # the position of a prompt's fifth new token
    sampling = SamplingParams(temperature, seed=0)
    for stream in (stream_plain, stream_replayed):
        tokens = stream(model, random_prompts(CONFIG, [8]), 10, sampling)
        assert len(list(itertools.islice(tokens, 5))) == 5
        with pytest.raises(FloatingPointError, match="not finite"):
            next(tokens)


def test_what_becomes_of_a_row_after_its_end_is_no_error():
    model = our_model(reference_model(CONFIG), CONFIG)
    with torch.no_grad():
        model.transformer.wpe.weight[12] = float("nan")
    prompts = random_prompts(CONFIG, [3, 8])
    free = next(iter(stream_plain(model, prompts[1:], 1))).id
    tokens = check_same_tokens(
        model, prompts, 9, should_stop=lambda token: token.row == 1 and token.id == free
    )
    assert [token.row for token in tokens] == [0] * 9 + [1]


def test_results_come_by_copies_that_the_host_waits_for_when_it_reads_them(model, cuda):
    decoder = sampling_decoder(model)
    decoder._model = OnGpu(model)
    with torch.inference_mode():
        decoder.run()
        expected = [x.tolist() for x in (decoder.state.rows.chosen, *decoder.state.rows.reports)]
        results = decoder.fetch()
        assert cuda.events == [("to the host", True)] * len(expected)
        decoder.run()
        assert decoder.state.rows.reports[0].tolist() != expected[1]
        assert results() == expected
    assert cuda.events[len(expected) :] == ["the host waits"]


def test_a_list_goes_to_a_gpu_from_pinned_memory_without_a_wait(cuda):
    for values, dtype in (([3, 1], torch.int64), ([0.25, 0.1], torch.float64)):
        x = upload(values, DEVICE, dtype)
        assert (x.tolist(), x.dtype) == (values, dtype)
        assert cuda.events.pop() == ("to the device", DEVICE, True)
    assert upload([3, 1], torch.device("cpu")).tolist() == [3, 1]
    assert not cuda.events


def test_the_next_step_is_started_before_the_tokens_are_looked_at(model):
    events = []
    hook = model.register_forward_pre_hook(lambda module, args: events.append("step"))
    for token in stream_replayed(model, [[3, 4]], 3):
        events.append(token.finished)
    hook.remove()
    assert events == ["step", "step", None, "step", None, "length"]


def test_generation_leaves_gradients_and_modes_alone(model):
    tokens = stream_replayed(model, [[1]], 3)
    next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_without_a_gpu_nothing_is_replayed(model, monkeypatch):
    assert not can_replay(model)
    monkeypatch.setattr(decode_graph, "Replay", None)
    monkeypatch.setattr(generation, "stream_replayed", None)
    assert len(list(stream_tokens(model, [[1]], 3))) == 3


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
    on_gpu._model.cache_dtype = torch.int8
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
def test_a_cuda_graph_gives_the_tokens_of_plain_steps(dtype, backend, monkeypatch):
    model = our_model(reference_model(CONFIG), CONFIG).to("cuda", dtype)
    model.set_backend(backend)
    replays = []
    plain_replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), plain_replay(self))[1]
    )
    for sampling, n in ((GREEDY, 1), (ALL_FILTERS, 1), (ALL_FILTERS, 3)):
        replays.clear()
        tokens = [
            sorted(loop(model, PROMPTS, 40, sampling, n=n, logprobs=2), key=lambda t: t.row)
            for loop in (stream_called, stream_replayed)
        ]
        assert len(replays) == 40 - 1 - 1  # steps behind the first token, but the ordinary one
        assert [token[:3] for token in tokens[0]] == [token[:3] for token in tokens[1]]
    if dtype == torch.float32:
        check_same_tokens(model, PROMPTS, 40, ALL_FILTERS, n=3)
        assert can_replay(model)


def stream_called(*arguments: Any, **options: Any) -> Iterator[Token]:
    """`stream_replayed`, calling its step on a CUDA device too: the same work without a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_graph, "Replay", lambda action, device: action)
        yield from stream_replayed(*arguments, **options)


@needs_gpu
def test_a_graph_follows_rows_that_leave(monkeypatch):
    monkeypatch.setattr(decode_graph, "FEW_ROWS", 2)
    model = our_model(reference_model(CONFIG), CONFIG).cuda()

    def should_stop(token: Token) -> bool:
        counts[token.row] += 1
        return counts[token.row] == (6, 16, 21, 11, 26, 8, 31, 36)[token.row]

    prompts = random_prompts(CONFIG, [17, 3, 9, 1, 5, 5, 30, 2])
    for sampling, n in ((GREEDY, 1), (ALL_FILTERS, 2)):
        rows = []
        for stream in (stream_plain, stream_replayed):
            counts = [0] * 8
            tokens = stream(model, prompts[: 8 // n], 40, sampling, n=n, should_stop=should_stop)
            rows.append(sorted(token[:3] for token in tokens))
        assert rows[0] == rows[1]


@needs_gpu
def test_logits_that_are_not_numbers_do_not_break_the_device():
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
